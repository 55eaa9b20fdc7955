"""Pass rate and win rate, by ground truth and by a chat model behind a real endpoint on loopback."""

import json
from collections import Counter

import pytest
from servers.chat_server import ChatServer

from toolweaver_hf import AgentRun
from toolweaver_hf.demo import DEMO_FOLDER
from toolweaver_hf.evaluation.chat_endpoint import ChatEndpoint
from toolweaver_hf.evaluation.judges import (
    AnswerChecker,
    ChatJudge,
    judge_pairs,
    judge_runs,
    pass_rate,
    token_counts,
    win_rate,
)
from toolweaver_hf.evaluation.tasks import AgentTask, load_agent_runs, load_tasks


TASKS = [AgentTask(str(i), [{"role": "user", "content": f"Question {i}?"}], ["weather"]) for i in range(4)]


def answered(text, num_calls=0):
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    steps = [{"role": "assistant", "content": "", "tool_calls": [call]}] * num_calls
    return AgentRun([*steps, {"role": "assistant", "content": text}], "answer")


def opinion(question):
    """The judge's model: a run is good by the word for it."""
    shown = json.loads(question)
    if "0" in shown:
        return json.dumps({"reason": "more", "better": int(len(shown["1"]) > len(shown["0"]))})
    text = shown.get("answer", shown.get("steps"))
    if "mumble" in text:
        return "I would rather not say."
    if "depends" in text:
        return json.dumps({"status": "Unsure" if "answer" in shown else "Solved", "reason": "seen in the steps"})
    return f"```json\n{json.dumps({'reason': 'clear', 'status': 'Solved' if 'good' in text else 'Unsolved'})}\n```"


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with ChatServer(opinion) as server:
        yield server


def test_pass_rate_of_a_chat_model(chat, tmp_path):
    judge = ChatJudge(ChatEndpoint("judge", chat.url))
    runs = {"0": answered("good"), "1": answered("bad"), "2": answered("it depends"), "3": answered("mumble")}
    verdicts = judge_runs(judge, TASKS, runs, 2, tmp_path / "verdicts.jsonl")
    assert [row["value"] for row in verdicts] == ["solved"] * 2 + ["unsolved"] * 2 + ["solved"] * 2 + ["unsure"] * 2
    rate = pass_rate(verdicts)
    assert rate["SoPR"] == (1 + 0 + 1 + 0.5) / 4 and rate["SoPR_std"] == 0
    assert rate["SoPR_low"] < rate["SoPR"] < rate["SoPR_high"]
    # What leaves it unsure is asked twice, what cannot be read three times each
    assert len(chat.requests) == 2 * (1 + 1 + 2 + 2 * 3)
    assert token_counts(verdicts) == {"prompt_tokens": 200, "completion_tokens": 60}
    assert {request["model"] for request in chat.requests} == {"judge"}
    assert {request["seed"] for request in chat.requests if "good" in request["messages"][-1]["content"]} == {0, 1}
    assert chat.keys == {"Bearer sk-mine"}


def test_without_a_key_none_is_sent_not_the_hubs_either(chat, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    ChatEndpoint("judge", chat.url).ask("Judge.", '{"answer": "good"}')
    assert chat.keys == {None}


def test_a_model_that_refuses_options():
    def reply(question):
        return 400 if "temperature" in server.requests[-1] else '{"status": "Solved"}'

    with ChatServer(reply) as server:
        endpoint = ChatEndpoint("judge", server.url)
        assert endpoint.ask("Judge.", "{}").content == endpoint.ask("Judge.", "{}").content == {"status": "Solved"}
        assert ["temperature" in request for request in server.requests] == [True, False, False]


def test_runs_without_an_answer_are_unsolved_unasked(chat, tmp_path):
    judge = ChatJudge(ChatEndpoint("judge", chat.url))
    runs = {"0": AgentRun([{"role": "assistant", "content": "good"}], "max_tokens"), "1": answered("")}
    verdicts = judge_runs(judge, TASKS, runs, 1, tmp_path / "verdicts.jsonl")
    assert {row["value"] for row in verdicts} == {"unsolved"} and not chat.requests


def test_judging_goes_on_where_it_was_cut_off(chat, tmp_path):
    judge, path = ChatJudge(ChatEndpoint("judge", chat.url)), tmp_path / "verdicts.jsonl"
    runs = {task.id: answered("good") for task in TASKS}
    whole = judge_runs(judge, TASKS, runs, 2, path)
    assert len(chat.requests) == 8
    path.write_bytes(path.read_bytes()[:-20])  # killed while the last row was written
    assert judge_runs(judge, TASKS, runs, 2, path) == whole
    assert len(chat.requests) == 9
    assert judge_runs(judge, TASKS, runs, 3, path)[::3] == whole[::2]
    assert len(chat.requests) == 13


def test_win_rate_of_a_chat_model(chat, tmp_path):
    judge = ChatJudge(ChatEndpoint("judge", chat.url))
    ours = {"0": answered("good"), "1": answered("good", 2), "2": answered("bad"), "3": answered("good")}
    theirs = {"0": answered("bad", 3), "1": answered("good"), "2": answered("bad"), "3": answered("good", 1)}
    verdicts, others = (
        judge_runs(judge, TASKS, runs, 1, tmp_path / f"{name}.jsonl") for name, runs in (("a", ours), ("b", theirs))
    )
    chat.requests.clear()
    preferences = judge_pairs(judge, TASKS, ours, theirs, verdicts, others, 2, tmp_path / "preferences.jsonl")
    # 0: the only one that passes; 1 and 3: the longer run, in either order; 2: the same
    assert [row["value"] for row in preferences] == ["candidate"] * 4 + ["tie"] * 2 + ["reference"] * 2
    assert win_rate(preferences) == {"SoWR": 0.5, "ties": 0.25, "losses": 0.25}
    assert len(chat.requests) == 4
    shown = [json.loads(request["messages"][-1]["content"]) for request in chat.requests]
    asked = Counter((pair["query"], frozenset((pair["0"], pair["1"]))) for pair in shown)
    assert [*asked.values()] == [2, 2] and len({(pair["query"], pair["0"]) for pair in shown}) == 4


def test_missing_runs_lose(tmp_path):
    verdicts = [{"id": task.id, "vote": 0, "value": "unsolved"} for task in TASKS]
    ours, theirs = {"0": answered("x")}, {"1": answered("x")}
    rows = judge_pairs(AnswerChecker(), TASKS[:3], ours, theirs, verdicts, verdicts, 1, tmp_path / "p.jsonl")
    assert [row["value"] for row in rows] == ["candidate", "reference", "tie"]


def test_an_endpoint_that_fails_for_a_moment(monkeypatch):
    monkeypatch.setattr("toolweaver_hf.evaluation.chat_endpoint.time.sleep", lambda seconds: None)
    replies = iter([503, 429, '{"status": "Solved"}', 401])
    with ChatServer(lambda _: next(replies)) as server:
        endpoint = ChatEndpoint("judge", server.url)
        assert endpoint.ask("Judge.", "{}").content == {"status": "Solved"}
        with pytest.raises(OSError, match="does not answer for the model 'judge'"):
            endpoint.ask("Judge.", "{}")
        assert len(server.requests) == 4
    with pytest.raises(OSError, match="does not answer"):
        endpoint.ask("Judge.", "{}")


def test_ground_truth_of_the_demo_is_solved_and_answers_of_others_are_not():
    path = DEMO_FOLDER / "trajectories.test.jsonl"
    tasks, runs, checker = load_tasks(path), load_agent_runs(path), AnswerChecker()
    verdicts = [checker.solves(task, runs[task.id]).value for task in tasks]
    assert set(verdicts) <= {"solved", "unsure"} and verdicts.count("solved") > 0.95 * len(tasks)
    swapped = [checker.solves(task, runs[other.id]).value for task, other in zip(tasks, tasks[1:], strict=False)]
    assert set(swapped) == {"unsolved"}


@pytest.mark.parametrize(
    ("observation", "text", "value"),
    [
        ('{"c": 12.5, "sky": "clear"}', "Clear skies at 12.5 degrees.", "solved"),
        ('{"c": 12.5, "sky": "clear"}', "Clear skies.", "unsolved"),  # half of it
        ('{"c": 12.5, "sky": "clear"}', "Clear skies at 112.5 degrees, or 12.55.", "unsolved"),
        ('{"error": "no such city"}', "Clear skies at 12.5 degrees.", "unsolved"),  # not learned from a tool
    ],
)
def test_answers_are_checked_against_what_the_tools_answer(observation, text, value):
    gold = {"observations": ['{"c": 12.5, "sky": "clear"}'], "answer": "It is clear, 12.5 degrees."}
    task = AgentTask("0", [{"role": "user", "content": "Weather?"}], ["weather"], [("weather", {})], **gold)
    run = answered(text, 1)
    run.messages.insert(1, {"role": "tool", "content": observation})
    assert AnswerChecker().solves(task, run).value == value


def test_ground_truth_that_is_missing_is_said_so():
    with pytest.raises(ValueError, match="'0' has no ground-truth calls"):
        AnswerChecker().solves(TASKS[0], answered("good"))
