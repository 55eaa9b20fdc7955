"""Reproducible answers of simulated tools, as functions and over MCP."""

import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers.chat_server import ChatServer

from toolweaver_hf import MCPTools, Tool, ToolCatalog
from toolweaver_hf.data.trajectories import load_trajectories
from toolweaver_hf.demo import DEMO_FOLDER
from toolweaver_hf.evaluation.chat_endpoint import ChatEndpoint
from toolweaver_hf.evaluation.simulated_tools import SimulatedTools, mcp_server, simulate_answer


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
OUTPUT = {"type": "object", "properties": {"mm": {"type": "number"}, "sky": {"enum": ["clear", "gray"]}}}
CATALOG = ToolCatalog(
    [
        Tool("rain", "Rain of a city.", parameters=PARAMETERS, metadata={"output_schema": OUTPUT}),
        Tool("wind", "Wind of a city.", parameters=PARAMETERS),
    ]
)


def test_answers_by_schema_are_those_of_the_seed():
    answers = [SimulatedTools(CATALOG, seed=seed)["rain"](city="Oslo") for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]
    jsonschema.validate(answers[0], OUTPUT)
    assert answers[0] != SimulatedTools(CATALOG)["rain"](city="Rome")
    assert answers[0] == {"mm": 67.67, "sky": "gray"}  # on every machine


def test_a_recorded_answer_comes_before_a_function_and_that_before_a_schema(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"tool": "rain", "arguments": {"city": "Oslo"}, "answer": {"mm": 1}}\n{"tool": "rain", "argu')
    calls = []
    functions = {"rain": lambda city: calls.append(city) or {"mm": 2}}
    tools = SimulatedTools(CATALOG, path, functions)
    assert tools["rain"](city="Oslo") == {"mm": 1} and not calls
    assert [tools["rain"](city="Rome") for _ in range(2)] == [{"mm": 2}] * 2 and calls == ["Rome"]
    assert "result" in tools["wind"](city="Rome")
    again = SimulatedTools(CATALOG, path)
    assert again["rain"](city="Rome") == {"mm": 2}  # it was recorded


def test_answers_of_a_model_are_recorded(tmp_path):
    with ChatServer(lambda question: json.dumps({"km": len(json.loads(question)["arguments"]["city"])})) as server:
        tools = SimulatedTools(CATALOG, tmp_path / "answers.jsonl", endpoint=ChatEndpoint("any", server.url))
        assert tools["wind"](city="Oslo") == tools["wind"](city="Oslo") == {"km": 4}
        assert len(server.requests) == 1
    assert SimulatedTools(CATALOG, tmp_path / "answers.jsonl")["wind"](city="Oslo") == {"km": 4}


def test_trajectories_are_recordings():
    catalog = ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl")
    trajectories = load_trajectories(DEMO_FOLDER / "trajectories.test.jsonl")
    tools = SimulatedTools(catalog)
    tools.record_trajectories(trajectories)
    for row in trajectories:
        for message, following in zip(row["messages"], row["messages"][1:], strict=False):
            for call in message.get("tool_calls", []):
                answer = tools[call["function"]["name"]](**call["function"]["arguments"])
                assert answer == json.loads(following["content"])


def test_wrong_calls_and_recordings(tmp_path):
    tools = SimulatedTools(CATALOG)
    with pytest.raises(ValueError, match="'city' is a required property"):
        tools["rain"]()
    with pytest.raises(KeyError):
        tools["snow"]
    path = tmp_path / "answers.jsonl"
    path.write_text('{"tool": "rain"}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 1: a recorded answer"):
        SimulatedTools(CATALOG, path)


BOUNDS = st.tuples(st.integers(-5, 5), st.integers(0, 9)).map(lambda b: {"minimum": b[0], "maximum": b[0] + b[1]})
SCHEMAS = st.recursive(
    st.sampled_from([{"type": "string"}, {"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}, {}])
    | BOUNDS.map(lambda bounds: {"type": "integer", **bounds})
    | BOUNDS.map(lambda bounds: {"type": "number", **bounds})
    | st.lists(st.integers(), min_size=1).map(lambda values: {"enum": values}),
    lambda inner: (
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(
            lambda properties: {"type": "object", "properties": properties, "required": list(properties)}
        )
        | st.tuples(inner, st.integers(0, 4)).map(
            lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": pair[1] + 1}
        )
        | st.lists(inner, min_size=1, max_size=2).map(lambda schemas: {"anyOf": schemas})
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 9))
def test_answers_obey_the_schema(schema, seed):
    tool = Tool("rain", "Rain.", metadata={"output_schema": schema})
    jsonschema.validate(simulate_answer(tool, {}, seed), schema)


def struct(**properties):
    return {"type": "object", "properties": properties, "required": list(properties)}


NODE = {"$ref": "#/$defs/Node"}
SUM, NUMBER = {"$ref": "#/$defs/Sum"}, {"$ref": "#/$defs/Number"}


@pytest.mark.parametrize(
    "schema",
    [
        {**struct(place={"$ref": "#/$defs/Place"}), "$defs": {"Place": struct(lat={"type": "number"})}},
        {"allOf": [struct(a={"type": "string"}), struct(a={"enum": ["x"]}, b={"type": "null"})]},
        {**struct(), "properties": {"a": {"type": "null"}}, "anyOf": [{"required": ["a"]}]},
        {"type": "integer", "maximum": -1},
        {"type": "integer", "minimum": 0.5, "exclusiveMaximum": 1.5},
        {"type": "number", "minimum": 0.001, "maximum": 0.004},
        {
            **NODE,
            "$defs": {"Node": struct(next={"anyOf": [NODE, {"type": "null"}]}, all={"items": NODE, "type": "array"})},
        },
        {
            "oneOf": [SUM, NUMBER],
            "$defs": {"Sum": struct(sum={"anyOf": [SUM, NUMBER]}), "Number": struct(number={"type": "number"})},
        },
    ],
)
def test_answers_obey_references_compositions_and_bounds(schema):
    tool = Tool("rain", "Rain.", metadata={"output_schema": schema})
    for seed in range(5):
        jsonschema.validate(simulate_answer(tool, {}, seed), schema)


def test_a_schema_of_which_everything_refers_to_everything_has_a_short_answer():
    refs = {f"to{i}": {"$ref": f"#/$defs/{i}"} for i in range(20)}
    schema = {"$ref": "#/$defs/0", "$defs": {str(i): {"type": "object", "properties": refs} for i in range(20)}}
    assert len(json.dumps(simulate_answer(Tool("x", "X.", metadata={"output_schema": schema}), {}))) < 10_000
    endless = struct(again={"$ref": "#"})
    assert simulate_answer(Tool("x", "X.", metadata={"output_schema": endless}), {}).keys() == {"result"}


def test_a_model_is_asked_while_other_answers_are_recorded():
    tools = SimulatedTools(CATALOG, functions={"rain": lambda city: city})
    interval = sys.getswitchinterval()
    with ChatServer(lambda question: json.dumps({"others": json.loads(question)["other_answers"]})) as server:
        tools.endpoint = ChatEndpoint("any", server.url)
        sys.setswitchinterval(1e-5)  # so that threads come in each other's way
        try:
            with ThreadPoolExecutor(5) as pool:
                pool.submit(lambda: [tools["rain"](city=str(i)) for i in range(5000)])
                answers = [*pool.map(lambda i: tools["wind"](city=str(i)), range(40))]
        finally:
            sys.setswitchinterval(interval)
    assert all(len(answer["others"]) <= 5 for answer in answers)


def test_the_same_answers_over_mcp():
    uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'mcp'")
    tools = SimulatedTools(CATALOG)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = mcp_server(tools).streamable_http_app()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            with MCPTools(f"http://127.0.0.1:{listening.getsockname()[1]}/mcp") as remote:
                assert remote.catalog["rain"].parameters == PARAMETERS
                for tool_id in CATALOG.ids:
                    assert remote[tool_id](city="Oslo") == tools[tool_id](city="Oslo")
                with pytest.raises(RuntimeError, match="'city' is a required property"):
                    remote["rain"]()
        finally:
            server.should_exit = True
            thread.join()
