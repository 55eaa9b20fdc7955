"""Using the model: the agent's loop, its turns, their arguments, and tools of MCP servers."""
