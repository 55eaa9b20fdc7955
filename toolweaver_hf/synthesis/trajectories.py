"""Trajectories for queries: a language model fills in the arguments and words the answer, tools or their stand-ins
observe."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from ..agent.schema import find_error
from ..data.catalog import Tool, ToolCatalog
from ..data.queries import Query
from ..data.schemas import MANY, NAMED, ONE
from ..evaluation.simulated_tools import SimulatedTools
from ..files import read_rows, truncate_partial_line
from .filters import words


NUM_ATTEMPTS = 2
CALL_INSTRUCTIONS = """\
You are an assistant that calls functions. You get a JSON object with what the user says, the function to call now, and \
what earlier calls returned. Reply with one JSON object {"thought": ..., "arguments": {...}}: what you do next, in one \
short sentence, and the arguments of the call. Take values from what the user says or what was returned, word for word; \
leave out what is said nowhere."""
ANSWER_INSTRUCTIONS = """\
You are an assistant. You get a JSON object with what the user says and what the functions returned that were called \
for it. Reply with one JSON object {"answer": ...}: what you answer the user, in one or two sentences, by what was \
returned alone."""


class Writer(Protocol):
    """What answers a question with a JSON object, or with `None`: [`LocalGenerator`] or [`EndpointGenerator`]."""

    name: str
    num_workers: int

    def ask(self, instructions: str, question: str, seed: int) -> dict[str, Any] | None: ...


def write_trajectory(
    query: Query, catalog: ToolCatalog, tools: SimulatedTools, writer: Writer, seed: int = 0
) -> list[dict[str, Any]] | None:
    """Write the conversation that answers a query with its tools, each called once, in order.

    Args:
        query ([`~data.queries.Query`]): The query.
        catalog ([`ToolCatalog`]): The tools.
        tools ([`SimulatedTools`]): What observes: recorded answers, functions, or made-up answers.
        writer (`Writer`): The language model.
        seed (`int`, *optional*, defaults to 0): Seed of what it writes.

    Returns:
        `list[dict]` or `None`: messages as [`~data.trajectories.load_trajectories`] reads them; `None` if in two
        attempts no arguments obeyed the tool's schema with values that stand in the query or in what was returned, or if there
        was no answer.
    """
    messages: list[dict[str, Any]] = [{"role": "user", "content": query.text}]
    returned: list[Any] = []
    for tool_id in query.tools:
        tool = catalog[tool_id]
        function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        question = {"user": query.text, "function": function, "returned": returned}
        source = " ".join([query.text, *(json.dumps(item, ensure_ascii=False) for item in returned)])
        for attempt in range(NUM_ATTEMPTS):
            reply = writer.ask(CALL_INSTRUCTIONS, json.dumps(question, ensure_ascii=False), seed + attempt) or {}
            arguments, thought = reply.get("arguments"), reply.get("thought")
            problem = find_problem(arguments, tool, source)
            if problem is None:
                break
            question["error"] = problem
        else:
            return None
        observation = tools.call(tool_id, arguments)
        returned.append(observation)
        call = {"type": "function", "function": {"name": tool_id, "arguments": arguments}}
        thought = thought if isinstance(thought, str) else ""
        messages.append({"role": "assistant", "content": thought, "tool_calls": [call]})
        messages.append({"role": "tool", "content": json.dumps(observation, ensure_ascii=False)})
    question = {"user": query.text, "returned": returned}
    reply = writer.ask(ANSWER_INSTRUCTIONS, json.dumps(question, ensure_ascii=False), seed) or {}
    answer = reply.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        return None
    return [*messages, {"role": "assistant", "content": answer.strip()}]


def find_problem(arguments: Any, tool: Tool, source: str) -> str | None:
    """Return what is wrong with arguments: that they break the schema, or that a value stands nowhere in a text.

    A value that the argument's schema itself names (of an enumeration, a constant, a default, also in the schemas that
    it holds or refers to) need not stand in the text, nor need a boolean.
    """
    if not isinstance(arguments, dict):
        return "the arguments are no JSON object"
    error = find_error(arguments, tool.parameters)
    if error is not None:
        return error
    properties, said = tool.parameters.get("properties", {}), set(words(source))
    for name, value in arguments.items():
        if name not in properties:
            return f"the function has no argument {name!r}"
        named = _named_values(properties[name], tool.parameters)
        unsaid = [leaf for leaf in _leaves(value) if leaf not in named and not said.issuperset(words(leaf))]
        if unsaid:
            return (
                f"{unsaid[0]!r}, the value of {name!r}, stands neither in what the user says nor in what was returned"
            )
    return None


def _named_values(schema: Any, parameters: dict[str, Any]) -> set[str]:
    """Return the texts and numbers that the schema of an argument names."""
    definitions = {
        f"#/{key}/{name}": inner for key in ("$defs", "definitions") for name, inner in parameters.get(key, {}).items()
    }
    named: set[str] = set()
    waiting = [schema]
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, dict):
            named.update(_leaves([schema.get(key) for key in ("const", "default", "enum")]))
            for key in (*ONE, *MANY):
                waiting += schema[key] if isinstance(schema.get(key), list) else [schema.get(key)]
            for key in NAMED:
                waiting += schema[key].values() if isinstance(schema.get(key), dict) else ()
            waiting.append(definitions.pop(str(schema.get("$ref")), None))  # once, as a schema may refer to itself
    return named


def _leaves(value: Any) -> Iterable[str]:
    """Yield the texts and numbers of a value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif isinstance(value, float) and value.is_integer():
        yield str(int(value))
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def write_trajectories(
    path: str | os.PathLike,
    queries: Sequence[Query],
    catalog: ToolCatalog,
    tools: SimulatedTools,
    writer: Writer,
    seed: int = 0,
    show_progress_bar: bool = False,
) -> list[dict[str, Any]]:
    """Write a trajectory for each query, and go on with a file that an earlier run has begun.

    Args:
        path (`str`):
            JSONL file, to which each trajectory is added as soon as it is there; also what came to nothing, so that it
            is not asked for again. A trajectory is written again for another text, writer or seed, and where one of
            its tools has changed. Changed answers of the tools are not noticed: delete the file then.
        queries (`Sequence[Query]`), catalog ([`ToolCatalog`]), tools ([`SimulatedTools`]), writer (`Writer`), seed (`int`):
            As for [`write_trajectory`].
        show_progress_bar (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `list[dict]`: rows of `id`, `messages` and `source`, without those that came to nothing.
    """
    if Path(path).exists():
        truncate_partial_line(path)
    written = [row for _, row in read_rows(path)] if Path(path).exists() else []
    done = {_key(row): row for row in written}
    source = {"generator": writer.name, "seed": seed}
    asked = [
        {"id": query.id, "query": query.text, "checksum": _checksum(query, catalog), "source": source}
        for query in queries
    ]
    missing = [i for i, row in enumerate(asked) if _key(row) not in done]

    def write(i: int) -> list[dict[str, Any]] | None:
        return write_trajectory(queries[i], catalog, tools, writer, seed)

    with open(path, "a", encoding="utf-8") as file, ThreadPoolExecutor(writer.num_workers) as pool:
        try:
            results = tqdm(
                pool.map(write, missing),
                total=len(missing),
                desc="Writing trajectories",
                disable=not show_progress_bar,
            )
            for i, messages in zip(missing, results, strict=True):
                row = asked[i] | {"messages": messages or []}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                done[_key(row)] = row
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nothing more is asked for
    rows = [done[_key(row)] for row in asked]
    return [{name: row[name] for name in ("id", "messages", "source")} for row in rows if row["messages"]]


def _checksum(query: Query, catalog: ToolCatalog) -> str:
    """Return the checksum of a query's tools with their schemas."""
    rows = json.dumps([catalog[tool_id].to_dict() for tool_id in query.tools], sort_keys=True)
    return hashlib.sha256(rows.encode()).hexdigest()[:16]


def _key(row: dict[str, Any]) -> tuple:
    """Return what a written trajectory is recognized by."""
    source = row.get("source", {})
    return row.get("id"), row.get("query"), row.get("checksum"), source.get("generator"), source.get("seed")
