"""The demo's splits do not leak, and its trajectories match what its functions compute."""

import json
import re

import jsonschema
import pytest

from toolweaver_hf import ToolCatalog
from toolweaver_hf.data.queries import load_queries
from toolweaver_hf.data.trajectories import load_trajectories
from toolweaver_hf.demo import DEMO_FOLDER, demo_functions


SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def catalog():
    return ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl")


@pytest.fixture(scope="module")
def queries():
    return {split: load_queries(DEMO_FOLDER / f"queries.{split}.jsonl") for split in SPLITS}


@pytest.fixture(scope="module")
def trajectories():
    return {split: load_trajectories(DEMO_FOLDER / f"trajectories.{split}.jsonl") for split in SPLITS}


def test_every_tool_is_asked_for_in_training(catalog, queries):
    assert len(catalog) == 200
    assert {tool for query in queries["train"] for tool in query.tools} == set(catalog.ids)
    assert {tool for split in SPLITS for query in queries[split] for tool in query.tools} <= set(catalog.ids)


def test_no_near_copy_of_a_test_query_is_in_training(queries, trajectories):
    def words(text):
        return frozenset(re.findall(r"\w+", text.lower()))

    seen = [words(query.text) for query in queries["train"]]
    seen += [words(row["messages"][0]["content"]) for row in trajectories["train"]]
    for query in queries["test"]:
        mine = words(query.text)
        nearest = max(seen, key=lambda other: len(mine & other) / len(mine | other))
        assert len(mine & nearest) / len(mine | nearest) < 0.8, (query.text, sorted(nearest))


def test_some_combinations_are_in_the_test_split_alone(queries):
    combinations = {
        split: {frozenset(query.tools) for query in queries[split] if len(query.tools) > 1} for split in SPLITS
    }
    assert len(combinations["test"] - combinations["train"] - combinations["validation"]) >= 10


def test_observations_are_what_the_functions_compute(catalog, trajectories):
    functions = demo_functions(catalog)
    assert set(functions) == set(catalog.ids)
    calls = 0
    for row in (row for split in SPLITS for row in trajectories[split]):
        messages = row["messages"]
        assert messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
        for message, following in zip(messages, messages[1:], strict=False):
            for call in message.get("tool_calls", []):
                name, arguments = call["function"]["name"], call["function"]["arguments"]
                jsonschema.validate(arguments, catalog[name].parameters)
                assert json.loads(following["content"]) == functions[name](**arguments)
                calls += 1
    assert calls >= 300
