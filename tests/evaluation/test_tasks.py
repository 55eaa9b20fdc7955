"""Measures of agent runs that need no judge."""

import json

import pytest

from toolweaver_hf import AgentRun, ToolCatalog
from toolweaver_hf.demo import DEMO_FOLDER
from toolweaver_hf.evaluation.tasks import canonical, evaluate_runs, load_agent_runs, load_tasks


TRAJECTORIES = DEMO_FOLDER / "trajectories.test.jsonl"


@pytest.fixture(scope="module")
def catalog():
    return ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl")


def weather(city, **arguments):
    function = {"name": "weather.current_weather", "arguments": {"city": city, **arguments}}
    call = {"type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_ground_truth_measures_best(catalog):
    tasks, runs = load_tasks(TRAJECTORIES), load_agent_runs(TRAJECTORIES)
    measures = evaluate_runs(tasks, runs, catalog)
    assert measures.pop("tasks") == len(tasks) == 125
    assert measures.pop("steps") == sum(len(task.calls) for task in tasks) / 125
    assert set(measures.values()) == {1.0}


def test_measures_of_runs_that_are_partly_right(tmp_path, catalog):
    ask = {"role": "user", "content": "Weather?"}
    answer = {"role": "assistant", "content": "Warm."}
    path = write(
        tmp_path / "tasks.jsonl",
        [{"id": str(i), "messages": [ask, weather("Oslo"), weather("Rome"), answer]} for i in range(4)],
    )
    runs = {
        "0": AgentRun([ask, weather(" ROME"), weather("oslo"), answer], "answer"),  # the order is free
        "1": AgentRun([ask, weather("Oslo"), weather("Paris"), answer], "answer"),  # one argument of two
        "2": AgentRun([ask, weather("Oslo", town=1), {"role": "assistant", "content": "It is"}], "max_tokens"),
    }  # and nothing at all for the last
    measures = evaluate_runs(load_tasks(path), runs, catalog)
    assert measures == {
        "tasks": 4,
        "tool_accuracy": 2 / 4,
        "tool_F1": 2 * 5 / (8 + 5),
        "argument_exact_match": 1 / 4,
        "argument_F1": 2 * 4 / (8 + 6),
        "parse_rate": 2 / 4,
        "answered": 2 / 4,
        "steps": 5 / 4,
    }


def test_the_first_query_of_a_conversation_is_the_task(tmp_path, catalog):
    ask, answer = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Warm."}
    result = {"role": "tool", "content": "{}"}
    first, second = [ask, weather("Oslo"), result, answer], [ask, weather("Rome"), result]
    path = write(tmp_path / "tasks.jsonl", [{"id": "0", "messages": [*first, *second]}])
    (task,) = load_tasks(path)
    assert task.calls == [("weather.current_weather", {"city": "Oslo"})]
    assert (task.messages, task.observations, task.answer) == ([ask], ["{}"], "Warm.")
    assert evaluate_runs([task], load_agent_runs(path), catalog)["argument_exact_match"] == 1


def test_arguments_that_break_the_schema_or_name_no_tool_are_not_parsed(tmp_path, catalog):
    row = {"id": "0", "messages": [{"role": "user", "content": "Weather?"}, weather("Oslo")]}
    tasks = load_tasks(write(tmp_path / "tasks.jsonl", [row]))
    unknown = weather("Oslo")
    unknown["tool_calls"][0]["function"]["name"] = "weather.no_such_tool"
    for wrong in (weather(5), unknown):
        assert evaluate_runs(tasks, {"0": AgentRun([wrong], "max_steps")}, catalog)["parse_rate"] == 0


def test_queries_are_tasks_whose_calls_are_not_known(tmp_path, catalog):
    row = {"id": "0", "text": "Weather?", "tools": ["weather.current_weather"]}
    tasks = load_tasks(write(tmp_path / "queries.jsonl", [row]))
    assert tasks[0].query == "Weather?" and tasks[0].calls is None
    measures = evaluate_runs(tasks, {"0": AgentRun([weather("Oslo"), weather("Rome")], "max_steps")}, catalog)
    assert measures["tool_accuracy"] == measures["tool_F1"] == 1
    assert "argument_F1" not in measures


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (85, "85", True),
        (85, 85.0, True),
        ("New  York", "new york", True),
        ({"a": 1, "b": [2]}, {"b": ["2.0"], "a": "1"}, True),
        (True, 1, False),
        ("nan", "nan", True),
        ([1, 2], [2, 1], False),
        ("1e999", "1e998", False),
    ],
)
def test_canonical_values(one, other, equal):
    assert (canonical(one) == canonical(other)) is equal


def test_wrong_tasks_are_named(tmp_path):
    ask = {"role": "user", "content": "Weather?"}
    row = {"id": "0", "messages": [ask, weather("Oslo")]}
    with pytest.raises(ValueError, match="'0' occurs twice"):
        load_tasks(write(tmp_path / "tasks.jsonl", [row, row]))
    with pytest.raises(ValueError, match="'1' needs a user's query"):
        load_tasks(write(tmp_path / "tasks.jsonl", [{"id": "1", "messages": [weather("Oslo"), ask]}]))
    with pytest.raises(ValueError, match="holds no query"):
        load_tasks(write(tmp_path / "tasks.jsonl", []))
