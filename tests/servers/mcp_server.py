"""An MCP server on standard input and output, for the tests."""

import time

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import EmbeddedResource, ImageContent, TextResourceContents


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


@server.tool(structured_output=False)
def photo() -> list:
    """Take a photo."""
    resource = {"uri": "file:///note.txt", "mimeType": "text/plain", "text": "a note"}
    return [
        ImageContent(type="image", data="AAAA", mime_type="image/png"),
        EmbeddedResource(type="resource", resource=TextResourceContents.model_validate(resource)),
    ]


if __name__ == "__main__":
    server.run("stdio")
