"""Tasks and runs of an agent, and the measures that need no judge."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..agent.run import AgentRun
from ..agent.schema import find_error
from ..data.catalog import ToolCatalog
from ..data.queries import load_queries
from ..data.trajectories import load_trajectories
from ..files import read_rows


Call = tuple[str, dict[str, Any]]
"""The id of the called tool, and the arguments."""


@dataclass(frozen=True)
class AgentTask:
    """A query for an agent, with its ground truth.

    Args:
        id (`str`): Identifier, unique among its tasks.
        messages (`list[dict]`): The conversation up to and including the user's query.
        tools (`list[str]`): Ids of the ground-truth tools, one per call if the calls are known.
        calls (`list[tuple[str, dict]]`, *optional*): The ground-truth calls: tool id and arguments.
        observations (`list[str]`): The observations of these calls, as JSON.
        answer (`str`, *optional*): The ground-truth answer.
    """

    id: str
    messages: list[dict[str, Any]]
    tools: list[str]
    calls: list[Call] | None = None
    observations: list[str] = field(default_factory=list)
    answer: str | None = None

    @property
    def query(self) -> str:
        """`str`: The user's query."""
        return self.messages[-1]["content"]


def load_tasks(path: str | os.PathLike) -> list[AgentTask]:
    """Read tasks from ground-truth trajectories ([`~data.trajectories.load_trajectories`], including runs of an agent
    and Seal-Tools), or from queries with their tools ([`~data.queries.load_queries`]), without ground-truth calls. Of a
    conversation with several queries, the first and its answer are the task.

    Raises:
        `ValueError`: naming the file and the line that is wrong, or the id that occurs twice.
    """
    _, first = next(iter(read_rows(path)), ("", {}))
    if not any(name in first for name in ("messages", "conversations", "calling")):
        return [
            AgentTask(query.id, [{"role": "user", "content": query.text}], list(query.tools))
            for query in load_queries(path)
        ]
    tasks: dict[str, AgentTask] = {}
    for row in load_trajectories(path):
        asked, answered = _first_exchange(row["messages"])
        if not asked or asked[-1]["role"] != "user":
            raise ValueError(f"{path}: the task {row['id']!r} needs a user's query and the assistant's turns after it")
        if row["id"] in tasks:
            raise ValueError(f"{path}: the task id {row['id']!r} occurs twice")
        run = AgentRun(answered, _stop_reason(answered))
        calls = list(calls_of(run))
        tasks[row["id"]] = AgentTask(
            row["id"], asked, [name for name, _ in calls], calls, observations_of(run), run.answer
        )
    return list(tasks.values())


def load_agent_runs(path: str | os.PathLike) -> dict[str, AgentRun]:
    """Read the runs of an agent by task id: trajectories, optionally with a `stop_reason`. Of a conversation with
    several queries, the run ends before the second, as in [`load_tasks`].

    Raises:
        `ValueError`: naming the file and line that is wrong.
    """
    runs: dict[str, AgentRun] = {}
    for run, (_, row) in zip(load_trajectories(path), read_rows(path), strict=True):
        asked, answered = _first_exchange(run["messages"])
        reason = row.get("stop_reason", _stop_reason(answered))
        runs[run["id"]] = AgentRun(asked + answered, reason, num_new_tokens=row.get("num_new_tokens", 0))
    return runs


def _first_exchange(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the messages before the assistant's first, and what follows up to the user's next."""
    start = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    end = next((i for i in range(start, len(messages)) if messages[i]["role"] == "user"), len(messages))
    return messages[:start], messages[start:end]


def _stop_reason(messages: Sequence[dict[str, Any]]) -> str:
    last = messages[-1]
    return "answer" if last["role"] == "assistant" and not last.get("tool_calls") else "max_steps"


def calls_of(run: AgentRun) -> Iterator[Call]:
    """Yield the calls of a run, in order."""
    for message in run.messages:
        for call in message.get("tool_calls") or ():
            yield call["function"]["name"], call["function"]["arguments"]


def observations_of(run: AgentRun) -> list[str]:
    """Return the observations of a run, in order, as JSON."""
    return [message["content"] for message in run.messages if message["role"] == "tool"]


def canonical(value: Any) -> str:
    """Serialize a value in a canonical form, which ignores number formats, case, white space and the order of keys."""
    return json.dumps(_canonical(value), sort_keys=True)


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, str):
        value = " ".join(value.casefold().split())
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return value
        return number if math.isfinite(number) else str(value)
    return value


def call_counts(calls: Sequence[Call]) -> Counter[tuple[str, str]]:
    """Count equal calls: calls of the same tool with the same [`canonical`] arguments."""
    return Counter((name, canonical(arguments)) for name, arguments in calls)


def evaluate_runs(
    tasks: Sequence[AgentTask], runs: Mapping[str, AgentRun], catalog: ToolCatalog
) -> dict[str, float | int]:
    """Compute the measures that need no judge. A task without a run counts as a run without calls.

    Args:
        tasks (`Sequence[AgentTask]`): The tasks.
        runs (`Mapping[str, AgentRun]`): The agent's runs, by task id.
        catalog ([`ToolCatalog`]): The tools, with the schemas of their arguments.

    Returns:
        `dict[str, float]`: the number of `tasks`, measures against the ground truth

        - `tool_accuracy`: share of tasks in which exactly the ground-truth tools were called, equally often;
        - `tool_F1`: micro-averaged F1 of the called tools;
        - `argument_exact_match`: share of tasks in which exactly the ground-truth calls were made, with all arguments;
        - `argument_F1`: micro-averaged F1 of single arguments (tool, name and value);

        and measures of the runs alone

        - `parse_rate`: share of runs in which every turn is complete and every call names a tool of the catalog with
          arguments that match its schema;
        - `answered`: share of runs that end with an answer;
        - `steps`: mean number of calls per run.

        Arguments are compared in their [`canonical`] form.
    """
    done = {task.id: list(calls_of(runs[task.id])) if task.id in runs else [] for task in tasks}
    measured = {
        "parse_rate": _mean(task.id in runs and _is_well_formed(runs[task.id], catalog) for task in tasks),
        "answered": _mean(task.id in runs and runs[task.id].stop_reason == "answer" for task in tasks),
        "steps": _mean(len(done[task.id]) for task in tasks),
    }
    by_call = [task for task in tasks if task.calls is not None]
    if by_call:
        pairs = [(task.calls, done[task.id]) for task in by_call]
        measured = {
            "tool_accuracy": _mean(Counter(n for n, _ in gold) == Counter(n for n, _ in ours) for gold, ours in pairs),
            "tool_F1": _f1([(Counter(n for n, _ in gold), Counter(n for n, _ in ours)) for gold, ours in pairs]),
            "argument_exact_match": _mean(call_counts(gold) == call_counts(ours) for gold, ours in pairs),
            "argument_F1": _f1([(_argument_counts(gold), _argument_counts(ours)) for gold, ours in pairs]),
            **measured,
        }
    elif tasks:  # queries give the tools, but neither the number of calls nor their arguments
        pairs = [(set(task.tools), {name for name, _ in done[task.id]}) for task in tasks]
        measured = {
            "tool_accuracy": _mean(gold == ours for gold, ours in pairs),
            "tool_F1": _f1([(Counter(gold), Counter(ours)) for gold, ours in pairs]),
            **measured,
        }
    return {"tasks": len(tasks), **measured}


def _mean(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / max(len(values), 1)


def _f1(pairs: Sequence[tuple[Counter, Counter]]) -> float:
    """Micro-averaged F1 of pairs of ground truth and prediction."""
    both = sum((gold & ours).total() for gold, ours in pairs)
    total = sum(gold.total() + ours.total() for gold, ours in pairs)
    return 2 * both / total if total else 1.0


def _argument_counts(calls: Sequence[Call]) -> Counter[tuple[str, str, str]]:
    return Counter((tool, name, canonical(value)) for tool, arguments in calls for name, value in arguments.items())


def _is_well_formed(run: AgentRun, catalog: ToolCatalog) -> bool:
    return run.stop_reason != "max_tokens" and all(
        name in catalog and find_error(arguments, catalog[name].parameters) is None
        for name, arguments in calls_of(run)
    )
