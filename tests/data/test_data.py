import itertools
import json

import pytest
from transformers.utils import logging

from toolweaver_hf import ToolCodes, ToolWeaverTokenizer
from toolweaver_hf.alignment.rows import repeat_rows, retrieval_rows, tokenize_rows, trajectory_rows
from toolweaver_hf.data.queries import Query, load_queries
from toolweaver_hf.data.trajectories import asked_in_trajectories, load_trajectories, render_calls


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


TOOLBENCH = {"query_id": 7, "query": "rain?", "relevant APIs": [["Weather", "rain"], ["Sky", "wind"]]}
TOOLBENCH_API = {
    "category_name": "Weather",
    "tool_name": "Weather",
    "api_name": "rain",
    "api_description": "",
    "required_parameters": [{"name": "place", "type": "STRING", "description": "", "default": "Oslo"}],
    "optional_parameters": [{"name": "hours", "type": "NUMBER", "description": "", "default": 3}],
    "method": "GET",
    "template_response": '{"rain": "bool", "places": [{"na',  # cut off, as long ones are
}
SEALTOOLS = {"id": "easy-0", "query": "rain?", "calling": [{"api": "rain", "parameters": {}}, {"api": "rain"}]}
TOOLRET = {"id": "q_5", "query": "rain?", "labels": '[{"id": "rain", "relevance": 1}, {"id": "fx", "relevance": 0}]'}


@pytest.mark.parametrize(
    ("row", "query"),
    [
        (TOOLBENCH, Query("7", "rain?", ("<<Weather&&rain>>", "<<Sky&&wind>>"))),
        (TOOLBENCH | {"api_list": [TOOLBENCH_API]}, Query("7", "rain?", ("<<Weather&&rain>>",))),
        (SEALTOOLS, Query("easy-0", "rain?", ("rain",))),
        (TOOLRET, Query("q_5", "rain?", ("rain",))),
        (TOOLRET | {"labels": [{"id": "rain", "doc": {}, "relevance": 1}]}, Query("q_5", "rain?", ("rain",))),
        (TOOLRET | {"labels": '[{"id": 12, "relevance": "1"}]'}, Query("q_5", "rain?", ("12",))),
        (TOOLBENCH | {"group": "I2"}, Query("7", "rain?", ("<<Weather&&rain>>", "<<Sky&&wind>>"), "I2")),
        ({"id": "1", "text": "x", "tools": ["a"], "split": "I3"}, Query("1", "x", ("a",), "I3")),
    ],
)
def test_queries_of_other_benchmarks(tmp_path, row, query):
    assert load_queries(write(tmp_path / "q.jsonl", [row])) == [query]
    (tmp_path / "q.json").write_text(json.dumps([row]))
    assert load_queries(tmp_path / "q.json") == [query]


@pytest.mark.parametrize(
    "row",
    [
        TOOLBENCH | {"relevant APIs": []},
        TOOLBENCH | {"relevant APIs": [["Sky", "wind"]], "api_list": [TOOLBENCH_API]},
        SEALTOOLS | {"calling": []},
        TOOLRET | {"labels": "[]"},
    ],
)
def test_rows_of_benchmarks_without_a_tool_are_left_out(tmp_path, row):
    rows = [row, {"id": "1", "text": "x", "tools": ["a"]}]
    assert load_queries(write(tmp_path / "q.jsonl", rows)) == [Query("1", "x", ("a",))]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[]", "line 2: expected a JSON object"),
        ({"id": "2", "text": "", "tools": ["a"]}, "line 2: a query needs"),
        ({"id": "2", "text": "x"}, "line 2: query '2' needs 'tools'"),
        ({"id": "2", "text": "x", "tools": []}, "line 2: query '2' has no ground-truth tool"),
        ({"id": "1", "text": "x", "tools": ["a"]}, "line 2: the query id '1' occurs twice"),
        (TOOLBENCH | {"relevant APIs": [["Weather"]]}, "line 2: its tools cannot be read"),
        (SEALTOOLS | {"calling": [{"name": "rain"}]}, "line 2: its tools cannot be read"),
        (TOOLRET | {"labels": "["}, "line 2: its tools cannot be read"),
        (TOOLRET | {"query": None}, "line 2: a query needs"),
        ({"conversations": [{"from": "gpt", "value": "<<a&&b>>"}], "tools": ["a"]}, "line 2: "),
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


@pytest.fixture
def atomic(base_tokenizer):
    """Codes of tools that ToolBench names, one of them with what closes a token in its name."""
    tools = ["Weather&&rain", "<<Weather&&wind>>", "High Mobility&&Code->Access<token>"]
    return ToolWeaverTokenizer.from_base(
        base_tokenizer, ToolCodes([3, 4], {tool: [i, i] for i, tool in enumerate(tools)})
    )


def test_sharegpt_rows_and_their_loss_flags(tmp_path, atomic):
    """ToolGen's end-to-end rows: the action alone is learned in the first turn, all of the second."""
    conversation = [
        {"from": "system", "value": "You call tools."},
        {"from": "human", "value": "Rain in Oslo? 1 << 2"},
        {"from": "gpt", "value": "I think.", "loss": False},
        {"from": "user", "value": "Generate the action."},
        {"from": "assistant", "value": "<<Weather&&rain>>", "loss": True},
        {"from": "function", "value": "<<Weather&&rain>> says yes", "loss": False},
        {"role": "assistant", "content": "<<Finish>> Yes."},
    ]
    path = tmp_path / "e2e.json"
    path.write_text(json.dumps([{"conversations": conversation}]))
    (row,) = trajectory_rows(load_trajectories(path), atomic)
    assert row["id"] == f"{path}, item 1"
    assert [message["role"] for message in row["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert row["messages"][4]["content"] == "<a_0><b_0>"
    assert row["messages"][5]["content"] == "<<Weather&&rain>> says yes"  # what others say stays as it is
    dataset, too_long = tokenize_rows([row], atomic)
    learned = atomic.decode([label for label in dataset[0]["labels"] if label != -100])
    assert learned == f"<a_0><b_0>{atomic.eos_token}<<Finish>> Yes.{atomic.eos_token}" and too_long == 0


def test_toolgen_rows_of_memorization_and_retrieval(tmp_path, atomic):
    rows = [
        {"conversations": [{"role": "user", "content": "Does it rain?"}, {"role": "assistant", "content": name}]}
        for name in ("<<Weather&&rain>>", "<<Weather&&wind>>", "<<High Mobility&&Code->Access<token>>>")
    ]
    path = write(tmp_path / "retrieval.jsonl", rows)
    codes = [row["messages"][1]["content"] for row in retrieval_rows(load_queries(path), atomic)]
    assert codes == ["<a_0><b_0>", "<a_1><b_1>", "<a_2><b_2>"]
    path = write(
        tmp_path / "unknown.jsonl",
        [*rows, {"conversations": [*rows[0]["conversations"][:1], {"from": "gpt", "value": "<<No&&tool>>"}]}],
    )
    with pytest.raises(ValueError, match=r"unknown\.jsonl, line 4: the tool 'No&&tool' has no code"):
        retrieval_rows(load_queries(path), atomic)
    path = write(
        tmp_path / "chat.jsonl",
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}],
    )
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 1: expected a user's text and its tools"):
        load_queries(path)


def test_rows_with_tools_beside_them(tmp_path, atomic):
    """TRL's rows: the tools as objects or as text, the arguments too; a call must be to one of them."""
    tools = [{"type": "function", "function": {"name": "Weather&&rain", "parameters": {}}}]
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "tool_calls": [call("Weather&&rain", '{"city": "Oslo"}'), call("Weather&&rain", {})]},
        {"role": "tool", "content": "yes"},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "Both."},
    ]
    path = write(
        tmp_path / "t.jsonl",
        [{"messages": messages, "tools": tools}, {"messages": messages, "tools": json.dumps(tools)}],
    )
    rows = trajectory_rows(load_trajectories(path), atomic)
    assert rows[0]["messages"] == rows[1]["messages"]
    assert [message["content"] for message in rows[0]["messages"][1:]] == [
        "Rain?",
        '<a_0><b_0>{"city": "Oslo"}',
        "yes",
        "<a_0><b_0>{}",
        "no",
        "Both.",
    ]
    path = write(tmp_path / "t.jsonl", [{"messages": messages, "tools": [{"name": "other"}]}])
    with pytest.raises(ValueError, match="line 1: the tool 'Weather&&rain' is called but is not among"):
        load_trajectories(path)


def test_several_tools_make_a_row_each_of_which_one_says_all(atomic):
    """In turn the first, the second and so on: that a query needs a second tool is learned behind each of them."""
    tools = ("Weather&&rain", "<<Weather&&wind>>")
    queries = [Query(str(n), "Weather?", tools) for n in range(2)] + [Query("2", "Rain?", tools[:1])]
    rows = retrieval_rows(queries, atomic)
    rain, wind = "<a_0><b_0>", "<a_1><b_1>"
    assert [(row["messages"][1]["content"], row["whole"]) for row in rows] == [
        (rain + wind, True),
        (wind, False),
        (rain, False),
        (wind + rain, True),
        (rain, True),
    ]


def test_long_rows_are_left_out_whole_and_counted(atomic):
    queries = [Query(str(n), "Rain? " * n, ("Weather&&rain",)) for n in (1, 5, 50)]
    rows = retrieval_rows(queries, atomic)
    whole, _ = tokenize_rows(rows, atomic)
    dataset, too_long = tokenize_rows(rows, atomic, max_length=len(whole[1]["input_ids"]))
    assert too_long == 1 and list(dataset["id"]) == ["1", "5"]
    for row in dataset:
        assert [label for label in row["labels"] if label != -100][:2] == atomic.encode_tool("Weather&&rain")


def test_tokens_are_split_by_a_seed_and_codes_are_not(atomic):
    rows = retrieval_rows([Query("1", "the weather of the cities of the world", ("Weather&&rain",))], atomic)
    plain, split, again, other = (
        tokenize_rows(rows, atomic, split_share=share, seed=seed)[0][0]
        for share, seed in ((0, 0), (0.5, 1), (0.5, 1), (0.5, 2))
    )
    assert split == again != other
    assert len(split["input_ids"]) > len(plain["input_ids"])
    assert atomic.decode(split["input_ids"]) == atomic.decode(plain["input_ids"])
    assert [i for i in split["labels"] if i != -100] == [i for i in plain["labels"] if i != -100]


def test_weights(atomic):
    dataset, _ = tokenize_rows(
        retrieval_rows([Query(str(n), "x", ("Weather&&rain",)) for n in range(10)], atomic), atomic
    )
    seen = repeat_rows(dataset, 2.3, seed=0)["id"]
    assert len(seen) == 23 and all(seen.count(str(n)) in (2, 3) for n in range(10))
    assert len(repeat_rows(dataset, 0.5, seed=0)) == 5


def test_calls_of_one_message_become_turns(atomic):
    messages = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": "Two.",
            "tool_calls": [call("Weather&&rain", {}), call("Weather&&rain", {})],
            "loss": False,
        },
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    rendered = render_calls(messages, atomic)
    assert [message["role"] for message in rendered] == ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert [message.get("loss") for message in rendered] == [None, None, False, None, False, None]


def test_calls_without_observations_are_all_rendered(tokenizer):
    calls = [call("rain", {"day": i}) for i in range(3)]
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "0"},
    ]
    written = [f'<a_0><b_0>{{"day": {i}}}' for i in range(3)]
    rendered = render_calls(messages, tokenizer)
    assert [message["content"] for message in rendered[2:]] == [written[0], "0", *written[1:]]
    rendered = render_calls([*messages, {"role": "user", "content": "?"}], tokenizer)
    assert [message["content"] for message in rendered[2:]] == [written[0], "0", *written[1:], "?"]


def results_of(tmp_path, tokenizer, messages):
    """The turns of a trajectory from a file, without the system prompt."""
    path = write(tmp_path / "t.jsonl", [{"messages": messages}])
    (row,) = trajectory_rows(load_trajectories(path), tokenizer)
    return [message["content"] for message in row["messages"][1:]]


def test_results_follow_their_calls_by_id(tmp_path, tokenizer):
    """In whatever order they come, and also where a call has no result."""
    first, second, third = (call("rain", {"day": i}) | {"id": f"c{i}"} for i in range(3))
    user = {"role": "user", "content": "?"}

    def results(*numbers):
        return [{"role": "tool", "content": f"result {i}", "tool_call_id": f"c{i}"} for i in numbers]

    written = [f'<a_0><b_0>{{"day": {i}}}' for i in range(3)]
    calls = {"role": "assistant", "content": None, "tool_calls": [first, second, third]}
    pairs = [written[0], "result 0", written[1], "result 1", written[2], "result 2"]
    for order in itertools.permutations(range(3)):
        assert results_of(tmp_path, tokenizer, [user, calls, *results(*order)]) == ["?", *pairs]
    assert results_of(tmp_path, tokenizer, [user, calls, *results(2, 1)]) == ["?", written[0], *pairs[2:]]
    # A result that comes late stands behind its call as well.
    late = [user, calls, *results(1), {"role": "assistant", "content": "Wait."}, *results(0, 2)]
    assert results_of(tmp_path, tokenizer, late) == ["?", *pairs, "Wait."]
    # Without ids they are in the order of the calls.
    plain = [{name: m[name] for name in ("role", "content")} for m in results(0, 1, 2)]
    assert results_of(tmp_path, tokenizer, [user, calls, *plain]) == ["?", *pairs]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "tool", "content": "x"}], "message 2 holds a tool's result without a call"),
        ([{"role": "assistant", "content": "Hm."}, {"role": "tool", "content": "x"}], "message 3 holds"),
        (
            [
                {"role": "assistant", "tool_calls": [call("rain", {}) | {"id": "c1"}]},
                {"role": "tool", "content": "x", "tool_call_id": "c2"},
            ],
            "message 3 holds a tool's result, of the call 'c2', without a call",
        ),
        (
            [{"role": "assistant", "tool_calls": [call("rain", {})]}] + [{"role": "tool", "content": "x"}] * 2,
            "message 4 holds",
        ),
    ],
)
def test_a_result_without_a_call_is_refused(tmp_path, messages, says):
    rows = [{"messages": [{"role": "user", "content": "?"}, *messages, {"role": "assistant", "content": "Yes."}]}]
    path = write(tmp_path / "t.jsonl", rows)
    with pytest.raises(ValueError, match=rf"t\.jsonl, line 1: {says}"):
        load_trajectories(path)


def test_old_forms_of_a_call_are_calls(tmp_path, tokenizer):
    """ShareGPT's turns `function_call` and `observation`, OpenAI's first field `function_call`, Hermes' texts."""
    value = json.dumps({"name": "rain", "arguments": {"city": "Oslo"}})
    sharegpt = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": value},
        {"from": "observation", "value": "yes"},
        {"from": "gpt", "value": "It rains."},
    ]
    function_call = {"name": "rain", "arguments": '{"city": "Oslo"}'}
    openai = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "function_call": function_call, "refusal": None},
        {"role": "function", "name": "rain", "content": "yes"},
        {"role": "assistant", "content": "It rains."},
    ]
    hermes = [*sharegpt]
    hermes[1] = {"from": "gpt", "value": f"<tool_call>\n{value}\n</tool_call>"}
    path = write(tmp_path / "t.jsonl", [{"conversations": sharegpt}, {"messages": openai}, {"conversations": hermes}])
    rows = trajectory_rows(load_trajectories(path), tokenizer)
    for row in rows:
        written = [message["content"] for message in row["messages"][1:]]
        assert written == ["Rain?", '<a_0><b_0>{"city": "Oslo"}', "yes", "It rains."]
    sharegpt[1]["value"] = "rain(Oslo)"
    with pytest.raises(ValueError, match="line 1: a call in a message's text must be JSON"):
        load_trajectories(write(tmp_path / "t.jsonl", [{"conversations": sharegpt}]))


def test_thoughts_are_read_wherever_they_stand(tmp_path):
    answers = [
        {"content": "Yes.", "reasoning_content": "Hm.\n"},
        {"content": "Yes.", "reasoning": "Hm."},
        {"content": "Yes.", "thinking": "Hm."},
        {"content": "<think>\nHm.\n</think>\n\nYes."},
        {"content": "Hm.</think>Yes."},
    ]
    user = {"role": "user", "content": "Rain?"}
    rows = [{"messages": [user, {"role": "assistant", **answer}]} for answer in answers]
    for row in load_trajectories(write(tmp_path / "t.jsonl", rows)):
        assert row["messages"][1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}


def test_thoughts_before_a_call(tmp_path, tokenizer):
    """The thought of a turn that calls a tool is rendered without its tags, and is part of what search is asked."""
    user, rain = {"role": "user", "content": "Rain?"}, '{"name": "rain", "arguments": {}}'
    turns = [
        {"content": "<think>\nI look.\n</think>\n\n", "tool_calls": [call("rain", {})]},
        {"content": f"<think>\nI look.\n</think>\n\n<tool_call>\n{rain}\n</tool_call>"},
        {"content": "", "reasoning_content": "I look.", "tool_calls": [call("rain", {})]},
        {"content": "I look.", "tool_calls": [call("rain", {})]},
    ]
    rows = [{"messages": [user, {"role": "assistant", **turn}]} for turn in turns]
    trajectories = load_trajectories(write(tmp_path / "t.jsonl", rows))
    for row in trajectory_rows(trajectories, tokenizer):
        assert row["messages"][2] == {"role": "assistant", "content": "<a_0><b_0>{}", "reasoning_content": "I look."}
    assert asked_in_trajectories(trajectories) == [("Rain? I look.", ["rain"])] * len(turns)


def test_no_field_of_a_message_is_dropped_in_silence(tmp_path, caplog):
    answer = {"role": "assistant", "content": "Yes.", "audio": None, "annotations": [], "mood": "glad"}
    path = write(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "?"}, answer]}])
    logging.get_logger("transformers").addHandler(caplog.handler)
    try:
        load_trajectories(path)
    finally:
        logging.get_logger("transformers").removeHandler(caplog.handler)
    assert "the field 'mood' of messages is not read" in caplog.text
    assert "audio" not in caplog.text and "annotations" not in caplog.text
    wrong = {"role": "user", "content": "?", "tool_calls": [call("rain", {})]}
    with pytest.raises(ValueError, match="line 1: a message of the role 'user' can neither call"):
        load_trajectories(write(tmp_path / "t.jsonl", [{"messages": [wrong, answer]}]))


def test_weights_of_messages_are_loss_flags(tmp_path):
    answers = [
        {"role": "assistant", "content": "No.", "weight": 0},
        {"role": "assistant", "content": "Yes.", "weight": 1},
    ]
    path = write(tmp_path / "t.jsonl", [{"messages": [{"role": "user", "content": "?"}, *answers]}])
    (row,) = load_trajectories(path)
    assert [message.get("loss") for message in row["messages"]] == [None, False, True]


def test_bad_rows_are_collected(tmp_path):
    good = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes."}]}
    path = write(tmp_path / "t.jsonl", [good, "{", "[]", {"messages": []}, good])
    bad_rows = []
    rows = load_trajectories(path, bad_rows)
    assert [row["place"] for row in rows] == [f"{path}, line 1", f"{path}, line 5"]
    assert [row.split(":")[0].removeprefix(f"{path}, ") for row in bad_rows] == [
        "line 2 is not valid JSON",
        "line 3",
        "line 4",
    ]


def test_rows_of_sealtools(tmp_path):
    calling = [
        {"api": "getTeam", "parameters": {"name": "Hawks"}, "responses": ["API_call_0"]},
        {"api": "getScore", "parameters": {"team": "API_call_0"}},
    ]
    path = tmp_path / "dev.jsonl"
    path.write_text(json.dumps({"id": "easy-0", "query": "Score of the Hawks?", "calling": calling}))
    (row,) = load_trajectories(path)
    user, *turns, answer = row["messages"]
    assert row["id"] == "easy-0" and user == {"role": "user", "content": "Score of the Hawks?"}
    assert [turn["tool_calls"][0]["function"] for turn in turns[::2]] == [
        {"name": "getTeam", "arguments": {"name": "Hawks"}},
        {"name": "getScore", "arguments": {"team": "API_call_0"}},
    ]
    assert [turn["content"] for turn in turns[1::2]] == ['["API_call_0"]', "[]"]
    assert answer == {"role": "assistant", "content": ""}
    path.write_text(json.dumps({"id": "easy-0", "query": "Score?", "calling": [{"api": "getScore"}]}))
    with pytest.raises(ValueError, match="line 1: the arguments of the call to 'getScore'"):
        load_trajectories(path)


def test_parts_of_text_and_the_developers_role(tmp_path, tokenizer):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, "rain?"]},
        {"role": "assistant", "content": None, "tool_calls": [call("rain", {})]},
        {"role": "tool", "content": [{"type": "text", "text": "yes"}]},
        {"role": "assistant", "content": []},
    ]
    path = write(tmp_path / "t.jsonl", [{"messages": messages}])
    (row,) = load_trajectories(path)
    read = [(message["role"], message["content"]) for message in row["messages"]]
    assert read == [
        ("system", "Be brief."),
        ("user", "Look:\nrain?"),
        ("assistant", ""),
        ("tool", "yes"),
        ("assistant", ""),
    ]
    # An agent is given a conversation as an API has it.
    assert render_calls(messages, tokenizer) == render_calls(row["messages"], tokenizer)
    messages[1]["content"].append({"type": "image_url", "image_url": {"url": "https://example.com/rain.png"}})
    write(path, [{"messages": messages}])
    with pytest.raises(ValueError, match=r"t\.jsonl, line 1: .*'image_url'.*only parts of text"):
        load_trajectories(path)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    rows = [{"id": str(i), "text": text, "tools": ["a"]} for i, text in enumerate(["café", "tea"])]
    path = tmp_path / "q.jsonl"
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("latin-1"))
    with pytest.raises(ValueError, match=r"q\.jsonl, line 1 is not valid JSON: 'utf-8' codec"):
        load_queries(path)
    bad_rows = []
    assert [query.id for query in load_queries(path, bad_rows=bad_rows)] == ["1"] and len(bad_rows) == 1
    queries = write(tmp_path / "beir.jsonl", [{"_id": "1", "text": "rain?"}])
    (tmp_path / "qrels.tsv").write_bytes("1\tcafé\t1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"qrels\.tsv is not UTF-8 text"):
        load_queries(queries, tmp_path / "qrels.tsv")


def test_numeric_ids_and_lines_in_a_json_file(tmp_path):
    rows = [{"id": 1, "text": "rain?", "tools": [7]}, {"_id": 2, "text": "wind?", "tools": ["w"]}]
    path = write(tmp_path / "queries.json", rows)
    assert [(query.id, query.tools) for query in load_queries(path)] == [("1", ("7",)), ("2", ("w",))]


def test_half_a_character_is_named_by_line(tmp_path):
    for read, row in (
        (load_queries, {"id": "1", "text": "\ud83d", "tools": ["a"]}),
        (load_trajectories, {"messages": [{"role": "assistant", "content": "\ud83d"}]}),
    ):
        path = write(tmp_path / "rows.jsonl", [row])
        with pytest.raises(ValueError, match=r"rows\.jsonl, line 1 holds .*half of a character"):
            read(path)
