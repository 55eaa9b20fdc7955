"""Trajectories for queries: what a call may hold, and that a run goes on where it was cut off."""

import json

import pytest
from servers.chat_server import ChatServer

from toolweaver_hf import Tool, ToolCatalog
from toolweaver_hf.data.queries import Query
from toolweaver_hf.data.trajectories import load_trajectories
from toolweaver_hf.evaluation.chat_endpoint import ChatEndpoint
from toolweaver_hf.evaluation.simulated_tools import SimulatedTools
from toolweaver_hf.synthesis.generators import EndpointGenerator
from toolweaver_hf.synthesis.trajectories import find_problem, write_trajectories


PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "exact": {"type": "boolean"},
        "scale": {"anyOf": [{"enum": ["beaufort"]}, {"type": "null"}]},
        "fields": {"type": "array", "items": {"$ref": "#/$defs/Field"}},
    },
    "required": ["city"],
    "$defs": {
        "Field": {
            "type": "object",
            "properties": {
                "kind": {"enum": ["humidity", 0.5]},
                "note": {"type": "string"},
                "inside": {"$ref": "#/$defs/Field"},
            },
        }
    },
}
CATALOG = ToolCatalog(
    [
        Tool(
            "forecast",
            "Forecast the weather of a city.",
            parameters=PARAMETERS,
            metadata={"output_schema": {"type": "object", "properties": {"station": {"const": "EGLL"}}}},
        ),
        Tool("history", "Past weather.", parameters={"type": "object", "properties": {"station": {"type": "string"}}}),
    ]
)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"city": "New York", "days": 3, "unit": "celsius", "exact": True}, None),
        ({"city": "york"}, None),
        ({"city": "york", "scale": "beaufort"}, None),
        ({"city": "york", "fields": [{"kind": "humidity"}, {"inside": {"kind": 0.5}}]}, None),
        ({"city": "york", "fields": [{"kind": "humidity", "note": "damp"}]}, "damp"),
        ({"days": 3}, "city"),
        ({"city": "Boston"}, "Boston"),
        ({"city": "New York", "days": 4}, "'4'"),
        ({"city": "New York", "mood": "new"}, "mood"),
        (["New York"], "JSON object"),
    ],
)
def test_arguments_obey_the_schema_and_stand_in_the_query(arguments, says):
    problem = find_problem(arguments, CATALOG["forecast"], "What will New York be like in 3 days?")
    assert problem is None if says is None else says in problem


def reply(content):
    """Make up a city at first, and take it from the query when told; the station comes from the first call."""
    question = json.loads(content)
    if "function" not in question:
        return json.dumps({"answer": f"It was measured at {question['returned'][0]['station']}."})
    if question["function"]["name"] == "history":
        return json.dumps({"thought": "", "arguments": {"station": question["returned"][0]["station"]}})
    city = question["user"].split()[-1] if "error" in question else "Atlantis"
    return json.dumps({"thought": "I look it up.", "arguments": {"city": city}})


def test_a_trajectory_of_two_calls(tmp_path):
    queries = [
        Query("1", "The weather now and before in Oslo", ("forecast", "history")),
        Query("2", "Nothing here is a place: ...", ("forecast",)),
    ]
    path, tools = tmp_path / "candidates.jsonl", SimulatedTools(CATALOG)
    with ChatServer(lambda content: reply(content) if "Oslo" in content else "no") as server:
        writer = EndpointGenerator(ChatEndpoint("m", server.url))
        rows = write_trajectories(path, queries, CATALOG, tools, writer)
        asked = len(server.requests)
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"id": "3", "mess')
        assert write_trajectories(path, queries, CATALOG, tools, writer) == rows
        assert len(server.requests) == asked

        # Another seed, and another schema of a tool
        assert write_trajectories(path, queries[:1], CATALOG, tools, writer, seed=1)[0]["source"]["seed"] == 1
        assert write_trajectories(path, queries[:1], CATALOG, tools, writer) == rows
        number = {"type": "object", "properties": {"station": {"type": "integer"}}}
        changed = ToolCatalog([CATALOG["forecast"], Tool("history", "Past weather.", parameters=number)])
        assert write_trajectories(path, queries[:1], changed, SimulatedTools(changed), writer) == []
    assert [row["id"] for row in rows] == ["1"]
    (tmp_path / "out.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    messages = load_trajectories(tmp_path / "out.jsonl")[0]["messages"]
    calls = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    assert [(call["name"], call["arguments"]) for call in calls] == [
        ("forecast", {"city": "Oslo"}),
        ("history", {"station": "EGLL"}),
    ]
    assert [message["role"] for message in messages] == ["user", *["assistant", "tool"] * 2, "assistant"]
    assert messages[-1]["content"] == "It was measured at EGLL."
