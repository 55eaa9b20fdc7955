"""The gateway before servers, and behind clients, that people use. Those that are not installed are skipped.

The servers are looked for on the `PATH`: `pip install mcp-server-time mcp-server-git`, `pip install mcp-server-sqlite
"mcp<2"` and `npm install @modelcontextprotocol/server-everything @modelcontextprotocol/server-memory
@modelcontextprotocol/server-filesystem`. Each client is a package of this Python or, as some need `mcp<2`, of the one
that `FASTMCP_PYTHON`, `LANGCHAIN_PYTHON` or `SMOLAGENTS_PYTHON` names.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_gateway import plain, running

from toolweaver_hf.agent.mcp_config import ServerConfig


SERVERS = Path(__file__).parents[1] / "servers"


def installed(program, *args, **env):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not on the PATH")
    return ServerConfig(program.removeprefix("mcp-server-"), program, list(args), env)


def test_time():
    with running([installed("mcp-server-time")]) as gateway:
        assert "get_current_time" in gateway.names("What time is it in Tokyo now?", k=2)
        text, is_error = gateway.call("get_current_time", timezone="Asia/Tokyo")
        assert not is_error
        assert json.loads(text)["timezone"] == "Asia/Tokyo"
        assert gateway.call("get_current_time")[1]


def test_git(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "new.txt").write_text("new")
    with running([installed("mcp-server-git")]) as gateway:
        assert "git_status" in gateway.names("Which files have changed in the working tree?", k=3)
        text, is_error = gateway.call("git_status", repo_path=str(tmp_path))
        assert not is_error
        assert "new.txt" in text


def test_sqlite(tmp_path):
    with running([installed("mcp-server-sqlite", "--db-path", str(tmp_path / "x.db"))]) as gateway:
        assert "list_tables" in gateway.names("list the tables of the database", k=3)
        gateway.call("create_table", query="CREATE TABLE pets (name TEXT)")
        assert gateway.call("write_query", query="INSERT INTO pets VALUES ('Rex')")[1] is False
        assert "Rex" in gateway.call("read_query", query="SELECT * FROM pets")[0]
        assert [str(r.uri) for r in gateway.portal.call(gateway.client.list_resources).resources] == [
            "memo://insights"
        ]


def test_memory(tmp_path):
    server = installed("mcp-server-memory", MEMORY_FILE_PATH=str(tmp_path / "memory.jsonl"))
    with running([server]) as gateway:
        entity = {"name": "Ada", "entityType": "person", "observations": ["likes tea"]}
        assert gateway.call("create_entities", entities=[entity])[1] is False
        assert "likes tea" in gateway.call("read_graph")[0]
        assert "search_nodes" in gateway.names("search for nodes in the knowledge graph", k=3)


def test_filesystem(tmp_path):
    with running([installed("mcp-server-filesystem", str(tmp_path))]) as gateway:
        path = str(tmp_path / "note.txt")
        assert gateway.call("write_file", path=path, content="buy milk")[1] is False
        assert gateway.call("read_text_file", path=path)[0] == "buy milk"
        text, is_error = gateway.call("read_text_file", path="/etc/passwd")
        assert is_error
        assert "Access denied" in text


def test_everything():
    heard = []

    async def on_progress(done, total, message):
        heard.append(done)

    with running([installed("mcp-server-everything")]) as gateway:
        assert gateway.call("echo", message="hi") == ("Echo: hi", False)
        portal, client = gateway.portal, gateway.client
        assert portal.call(client.list_resources).resources
        assert portal.call(client.list_prompts).prompts
        name = next(name for name in gateway.names("long running operation with progress") if "ong" in name)
        arguments = {"name": name, "arguments": {"duration": 0.6, "steps": 3}}
        result = portal.call(lambda: client.call_tool("call_tool", arguments, progress_callback=on_progress))
        assert not result.is_error
        assert heard


FASTMCP = """
import asyncio, sys
from fastmcp import Client
from fastmcp.client.transports import StdioTransport

async def main():
    async with Client(StdioTransport(sys.argv[1], sys.argv[2:])) as client:
        found = await client.call_tool("find_tools", {"query": "say a text in the voice of p"})
        name = found.structured_content["tools"][0]["name"]
        print((await client.call_tool("call_tool", {"name": name, "arguments": {"text": "hi"}})).content[0].text)

asyncio.run(main())
"""

LANGCHAIN = """
import asyncio, json, sys
from langchain_mcp_adapters.client import MultiServerMCPClient

async def main():
    client = MultiServerMCPClient({"gateway": {"transport": "stdio", "command": sys.argv[1], "args": sys.argv[2:]}})
    async with client.session("gateway") as session:
        from langchain_mcp_adapters.tools import load_mcp_tools
        tools = {tool.name: tool for tool in await load_mcp_tools(session)}
        found = await tools["find_tools"].ainvoke({"query": "say a text in the voice of p"})
        text = found if isinstance(found, str) else found[0]["text"]
        name = json.loads(text)["tools"][0]["name"]
        print(await tools["call_tool"].ainvoke({"name": name, "arguments": {"text": "hi"}}))

asyncio.run(main())
"""

SMOLAGENTS = """
import json, sys
from mcp import StdioServerParameters
from smolagents import MCPClient

with MCPClient(StdioServerParameters(command=sys.argv[1], args=sys.argv[2:]), structured_output=False) as tools:
    tools = {tool.name: tool for tool in tools}
    found = json.loads(tools["find_tools"](query="say a text in the voice of p"))
    print(tools["call_tool"](name=found["tools"][0]["name"], arguments={"text": "hi"}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "variable", "script"),
    [
        ("fastmcp", "FASTMCP_PYTHON", FASTMCP),
        ("langchain_mcp_adapters", "LANGCHAIN_PYTHON", LANGCHAIN),
        ("smolagents", "SMOLAGENTS_PYTHON", SMOLAGENTS),
    ],
)
def test_clients_that_people_use(tmp_path, package, variable, script):
    python = os.environ.get(variable, sys.executable if importlib.util.find_spec(package) else None)
    if python is None:
        pytest.skip(f"{package} is not installed, and {variable} names no Python that has it")
    server = plain("p", tmp_path)
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"p": {"command": server.command, "args": server.args}}}))
    gateway = ["-m", "toolweaver_hf.cli", "gateway", str(config), "--cache-dir", str(tmp_path / "cache")]
    run = subprocess.run(
        [python, "-c", script, sys.executable, *gateway], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert "p: hi" in run.stdout
