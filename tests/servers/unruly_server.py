"""An MCP server that misbehaves when it is told to, for the tests of the gateway."""

import os
import sys
import threading
import time

import anyio
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import SamplingMessage, TextContent
from pydantic import BaseModel


NAME = sys.argv[1] if len(sys.argv) > 1 else "unruly"
server = MCPServer(NAME)


@server.tool(structured_output=False)
def echo(text: str, times: int = 1) -> str:
    """Say a text again."""
    return f"{NAME}: " + text * times


@server.tool(structured_output=False)
def pid() -> str:
    """Tell the number of the process."""
    return str(os.getpid())


@server.tool(structured_output=False)
async def nap(seconds: float) -> str:
    """Sleep for a while."""
    await anyio.sleep(seconds)
    return "rested"


@server.tool(structured_output=False)
def die() -> str:
    """End the process at once."""
    os._exit(3)


@server.tool(structured_output=False)
def freeze() -> str:
    """Never answer anything again."""
    threading.Thread(target=lambda: None).start()
    time.sleep(3600)
    return ""


@server.tool(structured_output=False)
def babble(lines: int, line: str = "this is no message") -> str:
    """Write what is no message to the standard output."""
    real = os.environ["UNRULY_STDOUT"]
    with open(real, "wb", buffering=0) as file:
        for _ in range(lines):
            file.write(line.encode() + b"\n")
    return "babbled"


@server.tool(structured_output=False)
def shout(megabytes: int) -> str:
    """Flood the standard error."""
    for _ in range(megabytes):
        os.write(2, b"x" * 2**20)
    return "shouted"


@server.tool(structured_output=False)
def fail(kind: str = "tool") -> str:
    """Fail with the secret of the environment in the message."""
    raise ToolError(f"cannot log in with {os.environ.get('UNRULY_TOKEN')}")


@server.tool(structured_output=False)
async def learn(name: str, description: str, context: Context) -> str:
    """Get a new tool, or a new description of one."""
    if name in {tool.name for tool in await server.list_tools()}:
        server.remove_tool(name)
    server.add_tool(lambda: "learned", name=name, description=description, structured_output=False)
    await context.session.send_tool_list_changed()
    return "changed"


@server.tool(structured_output=False)
async def count(to: int, context: Context) -> str:
    """Report progress while counting."""
    for i in range(to):
        await context.report_progress(i + 1, to, f"at {i + 1}")
        await anyio.sleep(0.05)
    return "counted"


class Color(BaseModel):
    color: str


@server.tool(structured_output=False)
async def ask(context: Context) -> str:
    """Ask the user for a color."""
    answer = await context.elicit("Which color?", Color)
    return f"{answer.action}: {answer.data.color if answer.action == 'accept' else ''}"


@server.tool(structured_output=False)
async def think(context: Context) -> str:
    """Let the client's model say something."""
    message = SamplingMessage(role="user", content=TextContent(type="text", text="Say hello."))
    answer = await context.session.create_message([message], max_tokens=10, related_request_id=context.request_id)
    return f"the model says {answer.content.text}"


@server.resource("memo://today")
def today() -> str:
    """What is on today."""
    return f"{NAME}: nothing"


@server.resource("memo://{day}/note")
def note(day: str) -> str:
    """A note of a day."""
    return f"{NAME}: a note of {day}"


@server.prompt()
def greet(who: str) -> str:
    """Greet somebody."""
    return f"Say hello to {who} from {NAME}."


if __name__ == "__main__":
    # The server's transport keeps the real output for itself, so that a tool has to open it by name.
    os.environ["UNRULY_STDOUT"] = os.path.realpath(f"/proc/{os.getpid()}/fd/1")
    os.environ["UNRULY_STDOUT"] = f"/proc/{os.getpid()}/fd/{os.dup(1)}"
    if os.environ.get("UNRULY_CRASH"):
        print(f"no license: {os.environ['UNRULY_CRASH']}", file=sys.stderr, flush=True)
        sys.exit(4)
    if len(sys.argv) > 2:
        server.run(sys.argv[2], port=int(sys.argv[3]))
    server.run("stdio")
