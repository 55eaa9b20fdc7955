import json

import pytest

from toolweaver_hf.data import load_queries, load_trajectories


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_queries(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"id": "1", "text": "rain?", "tools": ["rain", "wind", "rain"]}])
    (query,) = load_queries(path)
    assert (query.id, query.text, query.tools) == ("1", "rain?", ("rain", "wind"))


def test_beir_queries(tmp_path):
    queries = write(tmp_path / "q.jsonl", [{"_id": "1", "text": "rain?"}, {"_id": "2", "text": "unjudged"}])
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\n1\train\t1\n1\tsnow\t0\n")
    assert [(query.id, query.tools) for query in load_queries(queries, qrels)] == [("1", ("rain",))]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[]", "line 2: expected a JSON object"),
        ({"id": "2", "text": "", "tools": ["a"]}, "line 2: a query needs"),
        ({"id": "2", "text": "x"}, "line 2: query '2' needs 'tools'"),
        ({"id": "2", "text": "x", "tools": []}, "line 2: query '2' has no ground-truth tool"),
        ({"id": "1", "text": "x", "tools": ["a"]}, "line 2: the query id '1' occurs twice"),
    ],
)
def test_wrong_queries_are_named(tmp_path, line, says):
    path = write(tmp_path / "q.jsonl", [{"id": "1", "text": "x", "tools": ["a"]}, line])
    with pytest.raises(ValueError, match=r"q\.jsonl, ") as error:
        load_queries(path)
    assert says in str(error.value)


def test_wrong_qrels_are_named(tmp_path):
    queries = write(tmp_path / "q.jsonl", [{"_id": "1", "text": "rain?"}])
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\n1 rain 1\n")
    with pytest.raises(ValueError, match=r"qrels\.tsv, line 2: expected query-id"):
        load_queries(queries, qrels)


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "non-empty"),
        ([{"role": "robot", "content": "x"}], "role"),
        ([{"role": "user", "content": 5}], "text"),
        ([{"role": "user", "content": "x"}], "assistant"),
        ([{"role": "assistant", "tool_calls": [{"name": "a"}]}], "function"),
        ([{"role": "assistant", "tool_calls": [call("a", "[]")]}], "'a' must be a JSON object"),
    ],
)
def test_wrong_trajectories_are_named(tmp_path, messages, says):
    path = write(tmp_path / "t.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match=r"t\.jsonl, line 1: ") as error:
        load_trajectories(path)
    assert says in str(error.value)
