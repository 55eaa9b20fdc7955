"""From queries and trajectories on disk to the rows that the language model is trained on."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from tokenizers.models import BPE

from .catalog import ToolCatalog


if TYPE_CHECKING:
    from .tokenization_toolweaver import ToolWeaverTokenizer


TRAJECTORY_PROMPT = "Think, call tools by their code with JSON arguments, then answer."


@dataclass(frozen=True)
class Query:
    """A query and the tools that it needs.

    Args:
        id (`str`): Identifier, unique among its queries.
        text (`str`): What the user says.
        tools (`tuple[str, ...]`): Ids of the ground-truth tools, at least one.
    """

    id: str
    text: str
    tools: tuple[str, ...]


def read_jsonl(path: str | os.PathLike) -> list[tuple[int, dict[str, Any]]]:
    """Read the rows of a JSONL file with their line numbers.

    Raises:
        `ValueError`: naming the file and the line that is not a JSON object.
    """
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: expected a JSON object, not {type(row).__name__}")
                rows.append((number, row))
    return rows


def load_queries(path: str | os.PathLike, qrels: str | os.PathLike | None = None) -> list[Query]:
    """Read queries with their ground-truth tools.

    Args:
        path (`str`):
            JSONL file with rows `{"id", "text", "tools"}`, or a BEIR queries file with rows `{"_id", "text"}`.
        qrels (`str`, *optional*):
            For a BEIR queries file, the tab-separated file of `query-id`, `corpus-id` and `score` (a header line,
            scores above 0 are relevant). Queries without a relevant tool are left out.

    Raises:
        `ValueError`: naming the file and line that is wrong, or the id that occurs twice.
    """
    relevant = _read_qrels(qrels) if qrels is not None else None
    queries: dict[str, Query] = {}
    for number, row in read_jsonl(path):
        place = f"{path}, line {number}"
        query_id, text = row.get("id", row.get("_id")), row.get("text")
        tools = row.get("tools") if relevant is None else relevant.get(query_id, [])
        if not isinstance(query_id, str) or not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: a query needs a string 'id' (or '_id') and a non-empty 'text'")
        if not isinstance(tools, list) or not all(isinstance(tool, str) for tool in tools):
            raise ValueError(f"{place}: query {query_id!r} needs 'tools', a list of tool ids (or give a qrels file)")
        if query_id in queries:
            raise ValueError(f"{place}: the query id {query_id!r} occurs twice")
        if tools:
            queries[query_id] = Query(query_id, text, tuple(dict.fromkeys(tools)))
        elif relevant is None:
            raise ValueError(f"{place}: query {query_id!r} has no ground-truth tool")
    if not queries:
        raise ValueError(f"{path} holds no query with a ground-truth tool")
    return list(queries.values())


def _read_qrels(path: str | os.PathLike) -> dict[str, list[str]]:
    relevant: dict[str, list[str]] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            fields = line.rstrip("\n").split("\t")
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


def load_trajectories(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read trajectories: JSONL rows with `messages` in the conversational format of TRL.

    A tool call stands in an assistant message's `tool_calls` as
    `{"type": "function", "function": {"name": TOOL_ID, "arguments": {...}}}`, with the thought as its `content`; the
    observation follows as a message of the role `tool`.

    Raises:
        `ValueError`: naming the file and line of a row that is not of that form.
    """
    rows = []
    for number, row in read_jsonl(path):
        try:
            _checked_messages(row.get("messages"))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append(row)
    return rows


def _checked_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("a trajectory needs 'messages', a non-empty list")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant", "tool"):
            raise ValueError("every message needs a role: system, user, assistant or tool")
        if not isinstance(message.get("content") or "", str):
            raise ValueError("a message's content must be a text")
        for call in message.get("tool_calls") or []:
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ValueError("a tool call needs a 'function' with the 'name' of the tool")
            if not isinstance(function.get("arguments", {}), dict):
                raise ValueError(f"the arguments of the call to {function['name']!r} must be a JSON object")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("a trajectory needs at least one assistant message to learn from")


def code_text(tool_id: str, tokenizer: ToolWeaverTokenizer) -> str:
    """Return a tool's code as text, such as `<a_12><b_5>`."""
    return "".join(tokenizer.convert_ids_to_tokens(tokenizer.encode_tool(tool_id)))


def memorization_rows(catalog: ToolCatalog, tokenizer: ToolWeaverTokenizer) -> list[list[dict[str, str]]]:
    """Rows that teach tool document -> code: one conversation a tool."""
    return [_code_row(tool.document, tool.id, tokenizer) for tool in catalog]


def retrieval_rows(queries: Iterable[Query], tokenizer: ToolWeaverTokenizer) -> list[list[dict[str, str]]]:
    """Rows that teach query -> code: one conversation for each ground-truth tool of each query."""
    return [_code_row(query.text, tool_id, tokenizer) for query in queries for tool_id in query.tools]


def _code_row(text: str, tool_id: str, tokenizer: ToolWeaverTokenizer) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": code_text(tool_id, tokenizer)}]


def trajectory_rows(
    trajectories: Iterable[dict[str, Any]], tokenizer: ToolWeaverTokenizer
) -> list[list[dict[str, str]]]:
    """Rows that teach whole trajectories: thought, code, arguments, observation, answer."""
    return [render_calls(row["messages"], tokenizer) for row in trajectories]


def render_calls(messages: Sequence[dict[str, Any]], tokenizer: ToolWeaverTokenizer) -> list[dict[str, str]]:
    """Write the tool calls of a conversation as the model generates them.

    Every message comes out with a plain `content`: a call becomes the thought, a line break, the tool's code and its
    arguments as one JSON object. Several calls of one assistant message become turns of their own, each followed by
    its observation. A conversation without a system message gets `TRAJECTORY_PROMPT`.

    Raises:
        `ValueError`: if a call names a tool that has no code.
    """
    rendered = [] if messages[0]["role"] == "system" else [{"role": "system", "content": TRAJECTORY_PROMPT}]
    waiting: list[str] = []  # calls of the last assistant message that still lack their turn
    for message in messages:
        content = message.get("content") or ""
        if message["role"] == "tool" and waiting and rendered[-1]["role"] == "tool":
            rendered.append({"role": "assistant", "content": waiting.pop(0)})
        calls = [
            code_text(call["function"]["name"], tokenizer)
            + json.dumps(call["function"].get("arguments", {}), ensure_ascii=False)
            for call in message.get("tool_calls") or []
        ]
        if calls:
            content = f"{content}\n{calls[0]}" if content else calls[0]
            waiting = calls[1:]
        rendered.append({"role": message["role"], "content": content})
    return rendered


def leave_out_words(row: list[dict[str, str]], generator: random.Random) -> list[dict[str, str]]:
    """Copy a conversation with some words of the user's messages alone, in their order.

    Half to all of a query's words stay; of a document no more than a query has, 16.
    """

    def thin(text: str) -> str:
        words = text.split()
        kept = math.ceil(generator.uniform(0.5, 1) * min(len(words), 16))
        return " ".join(words[i] for i in sorted(generator.sample(range(len(words)), kept)))

    return [
        {**message, "content": thin(message["content"])} if message["role"] == "user" else message for message in row
    ]


def tokenize_rows(
    rows: Iterable[list[dict[str, str]]],
    tokenizer: ToolWeaverTokenizer,
    max_length: int | None = None,
    bpe_dropout: float | None = None,
) -> tuple[Dataset, int]:
    """Tokenize conversations for `SFTTrainer`, with the loss on the assistant's turns alone.

    Args:
        rows (`Iterable[list[dict]]`):
            Conversations whose messages have a plain `content`.
        tokenizer ([`ToolWeaverTokenizer`]):
            The tokenizer with the tools' codes.
        max_length (`int`, *optional*):
            Rows of more tokens are left out whole: a cut row would lose the answer that it teaches.
        bpe_dropout (`float`, *optional*):
            Share of the tokenizer's merges to leave out at random (BPE-dropout, arXiv 1910.13267). A tokenizer that is
            no BPE ignores it.

    Returns:
        `tuple[Dataset, int]`: the dataset with the columns `input_ids` and `labels` (-100 where no loss is taken), and
        the number of rows that were left out.
    """
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    too_long = 0
    bpe = tokenizer.backend_tokenizer.model
    if isinstance(bpe, BPE):
        kept_dropout, bpe.dropout = bpe.dropout, bpe_dropout
    for messages in rows:
        encoded = tokenizer.encode_conversation(messages)
        input_ids = encoded["input_ids"]
        if max_length is not None and len(input_ids) > max_length:
            too_long += 1
            continue
        columns["input_ids"].append(input_ids)
        columns["labels"].append(
            [token if learn else -100 for token, learn in zip(input_ids, encoded["assistant_mask"], strict=True)]
        )
    if isinstance(bpe, BPE):
        bpe.dropout = kept_dropout
    return Dataset.from_dict(columns), too_long
