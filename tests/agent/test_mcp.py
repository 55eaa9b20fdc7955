import asyncio
import json
import sys
from pathlib import Path

import pytest
from bases import build
from conftest import small_llama
from mcp import Client, ClientSession, StdioServerParameters, stdio_client
from test_agent import QUERY, Script, call, end
from transformers import LogitsProcessorList

from toolweaver_hf import MCPTools, ToolAgent, ToolCodes, ToolWeaverTokenizer


SERVER = StdioServerParameters(
    command=sys.executable, args=[str(Path(__file__).parents[1] / "servers" / "mcp_server.py")]
)


@pytest.fixture(scope="module")
def tools():
    with MCPTools(SERVER, time_limit=20) as tools:
        yield tools


@pytest.fixture
def tokenizer():
    codes = ToolCodes([3, 3], {"rain": [0, 0], "wind": [0, 1], "wait": [1, 0], "mail": [1, 1], "photo": [2, 2]})
    return ToolWeaverTokenizer.from_base(build("smollm2"), codes)


def make_agent(tokenizer, tools, *turns, **kwargs):
    script = [token for turn in turns for token in tokenizer.encode(turn, add_special_tokens=False)]
    kwargs["logits_processor"] = LogitsProcessorList([Script(script)])
    model = small_llama(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return ToolAgent(model, tokenizer, tools.catalog, tools, **kwargs)


def test_the_servers_tools_are_listed_and_called(tools):
    assert list(tools) == ["rain", "wind", "wait", "photo"]
    assert tools.catalog["rain"].description == "Tell how many millimetres of rain fall at a place."
    assert tools.catalog["rain"].parameters["required"] == ["place"]
    assert tools["rain"](place="Oslo", days=2) == {"mm": 8.0}
    assert tools["photo"]() == [{"type": "image", "mimeType": "image/png"}, "a note"]
    with pytest.raises(RuntimeError, match="no such place"):
        tools["wind"](place="nowhere")
    with pytest.raises(KeyError):
        tools["mail"]


def test_an_agent_calls_the_servers_tools(tools, tokenizer):
    turns = [
        call(tokenizer, "rain", {"place": "Oslo"}),
        call(tokenizer, "wind", {"place": "Oslo"}),
        call(tokenizer, "wind", {"place": "nowhere"}),
        end(tokenizer),
    ]
    run = make_agent(tokenizer, tools, *turns)(QUERY)
    observations = [json.loads(message["content"]) for message in run.messages if message["role"] == "tool"]
    assert observations[:2] == [{"mm": 4.0}, "Oslo: <a_1><b_1><|im_end|>"]
    assert "no such place" in observations[2]["error"]
    codes = [token for token in run.token_ids if token in tokenizer.code_token_ids]
    assert codes == [token for name in ("rain", "wind", "wind") for token in tokenizer.encode_tool(name)]


def test_only_the_sessions_tools_can_be_chosen(tools, tokenizer):
    """`mail` has a code, but not on this server; and a run may be allowed less than the server has."""
    run = make_agent(tokenizer, tools, call(tokenizer, "mail", {}), max_steps=1, time_limit=0.2)(QUERY)
    assert run.messages[1]["tool_calls"][0]["function"]["name"] == "wait"
    agent = make_agent(tokenizer, tools, call(tokenizer, "wait", {}), max_steps=1, time_limit=0.2)
    run = agent(QUERY, allowed_tools=["rain"])
    assert {c["function"]["name"] for m in run.messages for c in m.get("tool_calls", [])} <= {"rain"}


def test_a_call_has_a_time_limit(tools, tokenizer):
    run = make_agent(tokenizer, tools, call(tokenizer, "wait", {}), end(tokenizer), time_limit=0.5)(QUERY)
    assert json.loads(run.messages[2]["content"]) == {"error": "the call took longer than 0.5 seconds"}


@pytest.mark.parametrize("kind", ["client", "session"])
def test_a_session_of_an_event_loop(tokenizer, kind):
    turns = [call(tokenizer, "rain", {"place": "Rome"}), end(tokenizer)]

    async def answer(session):
        tools = await MCPTools.from_session(session)
        return await asyncio.to_thread(make_agent(tokenizer, tools, *turns), QUERY)

    async def main():
        if kind == "client":
            async with Client(SERVER) as client:
                return await answer(client)
        async with stdio_client(SERVER) as streams, ClientSession(*streams) as session:
            await session.initialize()
            return await answer(session)

    run = asyncio.run(main())
    assert json.loads(run.messages[2]["content"]) == {"mm": 4.0}
    assert run.stop_reason == "answer"


def test_a_server_that_does_not_start():
    with pytest.raises(FileNotFoundError), MCPTools(StdioServerParameters(command="no-such-server")):
        pass


def test_two_servers_with_tools_of_the_same_names():
    with MCPTools({"north": SERVER, "south": SERVER}, time_limit=20) as tools:
        assert list(tools)[:2] == ["north.rain", "north.wind"] and len(tools) == 8
        assert tools.catalog["south.rain"].name == "rain"
        assert tools.catalog["south.rain"].metadata["server"] == "south"
        assert tools["north.rain"](place="Oslo") == {"mm": 4.0}
        assert tools["south.wind"](place="Oslo").startswith("Oslo")
        with pytest.raises(KeyError):
            tools["rain"]
