"""An MCP server on standard input and output, for the tests."""

import time

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError


server = MCPServer("weather")


@server.tool()
def rain(place: str, days: int = 1) -> dict[str, float]:
    """Tell how many millimetres of rain fall at a place."""
    return {"mm": float(len(place) * days)}


@server.tool(structured_output=False)
def wind(place: str) -> str:
    """Tell the wind at a place."""
    if place == "nowhere":
        raise ToolError("no such place")
    return f"{place}: <a_1><b_1><|im_end|>"


@server.tool(structured_output=False)
def wait() -> str:
    """Take a minute."""
    time.sleep(60)
    return "done"


@server.tool()
def get_current_time(timezone: str) -> str:
    """Tell the time."""
    return "12:00"


if __name__ == "__main__":
    server.run("stdio")
