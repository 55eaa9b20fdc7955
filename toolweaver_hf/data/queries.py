"""Queries with their ground-truth tools, and readers of their file formats."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import local_file, read_rows
from .trajectories import ATOMIC_TOKEN, read_messages


@dataclass(frozen=True)
class Query:
    """A query with its ground-truth tools.

    Args:
        id (`str`): Unique identifier.
        text (`str`): The text of the query.
        tools (`tuple[str, ...]`): Ids of the ground-truth tools, at least one.
        group (`str`, *optional*): A group that is reported separately, such as ToolBench's I1, I2 and I3.
        place (`str`, *optional*): The file and line of the query, for error messages.
        generated (`bool`, *optional*, defaults to `False`): Whether a language model wrote the query.
        reliable (`bool`, *optional*, defaults to `True`): Whether the query can stand for those of people. Not so a
            generated one, unless its generator follows its instructions (see `toolweaver queries`).
    """

    id: str
    text: str
    tools: tuple[str, ...]
    group: str | None = None
    place: str | None = field(default=None, compare=False, repr=False)
    generated: bool = field(default=False, compare=False, repr=False)
    reliable: bool = field(default=True, compare=False, repr=False)


def load_queries(
    path: str | os.PathLike, qrels: str | os.PathLike | None = None, bad_rows: list[str] | None = None
) -> list[Query]:
    """Read queries with their ground-truth tools.

    Args:
        path (`str`):
            A JSONL file with rows `{"id", "text", "tools"}`; a BEIR queries file with rows `{"_id", "text"}`; or
            ToolGen's rows for memorization and retrieval, whose `conversations` have a user message and the tool's
            token `<<tool&&api>>`. Also, as JSONL or a JSON list: ToolBench's instructions with `relevant APIs`,
            Seal-Tools' rows with `calling`, and ToolRet's rows with `labels`; rows of these benchmarks without a
            relevant tool are skipped. A row may have a `group` (or `split`), and a generated one has a `source`.
        qrels (`str`, *optional*):
            The relevance file of a BEIR queries file: tab-separated `query-id`, `corpus-id` and `score` with a header
            line; scores above 0 are relevant. Queries without a relevant tool are skipped.
        bad_rows (`list[str]`, *optional*):
            If given, invalid rows are skipped and their error messages are appended to this list.

    Raises:
        `ValueError`: naming the invalid file and line, or the duplicate id.
    """
    relevant = _read_qrels(qrels) if qrels is not None else None
    queries: dict[str, Query] = {}
    for place, row in read_rows(path, bad_rows):
        try:
            query = _read_query(place, row, relevant)
            if query is not None and query.id in queries:
                raise ValueError(f"{place}: the query id {query.id!r} occurs twice")
        except ValueError as error:
            if bad_rows is None:
                raise
            bad_rows.append(str(error))
            continue
        if query is not None:
            queries[query.id] = query
    if not queries:
        raise ValueError(f"{path} holds no query with a ground-truth tool")
    return list(queries.values())


def _read_query(place: str, row: dict[str, Any], relevant: dict[str, list[str]] | None) -> Query | None:
    """Convert one row; `None` if it has no relevant tool, in a format that allows this."""
    row = _query_row(place, row)
    query_id, text = _as_id(row.get("id", row.get("_id"))), row.get("text")
    if not isinstance(query_id, str) or not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place}: a query needs a string 'id' (or '_id') and a non-empty 'text'")
    tools = row.get("tools") if relevant is None else relevant.get(query_id, [])
    tools = [_as_id(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, str) for tool in tools):
        raise ValueError(f"{place}: query {query_id!r} needs 'tools', a list of tool ids (or give a qrels file)")
    if not tools and relevant is None and "query" not in row:
        raise ValueError(f"{place}: query {query_id!r} has no ground-truth tool")
    group, source = row.get("group", row.get("split")), row.get("source")
    source = source if isinstance(source, dict) else {}
    generated = "generator" in source
    reliable = not generated or source.get("reliable") is True
    if not tools:
        return None
    return Query(query_id, text, tuple(dict.fromkeys(tools)), group and str(group), place, generated, reliable)


def _as_id(value: Any) -> Any:
    """Convert an integer id to a string."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _query_row(place: str, row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row of another format to `id`, `text` and `tools`."""
    if "conversations" in row:
        return _query_of_conversation(place, row)
    try:
        if "relevant APIs" in row:  # ToolBench, whose ground truth is limited to its `api_list`
            listed = [[api["tool_name"], api["api_name"]] for api in row.get("api_list") or ()] or row["relevant APIs"]
            tools = [f"<<{tool}&&{api}>>" for tool, api in row["relevant APIs"] if [tool, api] in listed]
        elif "calling" in row:  # Seal-Tools
            tools = [call["api"] for call in row["calling"]]
        elif "labels" in row:  # ToolRet, whose labels may be JSON in a string
            labels = json.loads(row["labels"]) if isinstance(row["labels"], str) else row["labels"]
            tools = [str(label["id"]) for label in labels if int(label["relevance"]) > 0]
        else:
            return row
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{place}: its tools cannot be read: {error!r}") from None
    return row | {"id": str(row.get("query_id", row.get("id", place))), "text": row.get("query"), "tools": tools}


def _query_of_conversation(place: str, row: dict[str, Any]) -> dict[str, Any]:
    """Convert a conversation of a user message and its tools."""
    try:
        *_, question, answer = read_messages(row)
    except (ValueError, TypeError, AttributeError) as error:  # the latter two for values of a wrong type
        raise ValueError(f"{place}: {error}") from None
    tools = ATOMIC_TOKEN.findall(answer["content"])
    if question["role"] != "user" or ATOMIC_TOKEN.sub("", answer["content"]).strip() or not tools:
        raise ValueError(f"{place}: expected a user's text and its tools, written <<tool&&api>>, as the answer")
    return {"id": str(row.get("id", place)), "text": question["content"], "tools": tools}


def _read_qrels(path: str | os.PathLike) -> dict[str, list[str]]:
    relevant: dict[str, list[str]] = {}
    try:
        lines = Path(local_file(path)).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if (number == 1 and fields[0] == "query-id") or fields == [""]:
            continue
        try:
            query_id, tool_id, score = fields
            if float(score) > 0:
                relevant.setdefault(query_id, []).append(tool_id)
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: expected query-id, corpus-id and score, separated by tabs"
            ) from None
    return relevant
