"""From queries and trajectories on disk to the rows that the language model is trained on."""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from datasets.utils import tqdm

from .data.catalog import ToolCatalog
from .files import local_file, read_rows


if TYPE_CHECKING:
    from .tokenization_toolweaver import ToolWeaverTokenizer


ATOMIC_TOKEN = re.compile(r"<<(?:(?!<<).)+?(?:&&(?:(?!<<).)+?)?>>(?!>)")
"""How ToolGen writes a tool: one token, `<<tool&&api>>`."""

SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function": "tool",
    "function_call": "assistant",
    "observation": "tool",
}

TRAJECTORY_PROMPT = "Think, call tools by their code with JSON arguments, then answer."


@dataclass(frozen=True)
class Query:
    """A query and the tools that it needs.

    Args:
        id (`str`): Identifier, unique among its queries.
        text (`str`): What the user says.
        tools (`tuple[str, ...]`): Ids of the ground-truth tools, at least one.
        group (`str`, *optional*): A group to report on its own, such as ToolBench's I1, I2 and I3.
    """

    id: str
    text: str
    tools: tuple[str, ...]
    group: str | None = None


def load_queries(path: str | os.PathLike, qrels: str | os.PathLike | None = None) -> list[Query]:
    """Read queries with their ground-truth tools.

    Args:
        path (`str`):
            JSONL file with rows `{"id", "text", "tools"}`, or a BEIR queries file with rows `{"_id", "text"}`, or
            ToolGen's rows for memorization and retrieval: `conversations` of a user's text and the tool's token
            `<<tool&&api>>`. Also, as JSONL or as a JSON list: ToolBench's instructions with their `relevant APIs`,
            Seal-Tools' rows with their `calling`, ToolRet's with their `labels`; of these benchmarks, rows without a
            relevant tool are left out. A row may name its `group` (or `split`).
        qrels (`str`, *optional*):
            For a BEIR queries file, the tab-separated file of `query-id`, `corpus-id` and `score` (a header line,
            scores above 0 are relevant). Queries without a relevant tool are left out.

    Raises:
        `ValueError`: naming the file and line that is wrong, or the id that occurs twice.
    """
    relevant = _read_qrels(qrels) if qrels is not None else None
    queries: dict[str, Query] = {}
    for place, row in read_rows(path):
        row = _query_row(place, row)
        query_id, text = row.get("id", row.get("_id")), row.get("text")
        tools = row.get("tools") if relevant is None else relevant.get(query_id, [])
        if not isinstance(query_id, str) or not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: a query needs a string 'id' (or '_id') and a non-empty 'text'")
        if not isinstance(tools, list) or not all(isinstance(tool, str) for tool in tools):
            raise ValueError(f"{place}: query {query_id!r} needs 'tools', a list of tool ids (or give a qrels file)")
        if query_id in queries:
            raise ValueError(f"{place}: the query id {query_id!r} occurs twice")
        if tools:
            group = row.get("group", row.get("split"))
            queries[query_id] = Query(query_id, text, tuple(dict.fromkeys(tools)), group and str(group))
        elif relevant is None and "query" not in row:
            raise ValueError(f"{place}: query {query_id!r} has no ground-truth tool")
    if not queries:
        raise ValueError(f"{path} holds no query with a ground-truth tool")
    return list(queries.values())


def _query_row(place: str, row: dict[str, Any]) -> dict[str, Any]:
    """Bring a row of another format to `id`, `text` and `tools`."""
    if "conversations" in row:
        return _query_of_conversation(place, row)
    try:
        if "relevant APIs" in row:  # ToolBench, whose own ground truth is what `api_list` has of them
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
    """Read a conversation that is no more than a text and the tool that it stands for."""
    try:
        *_, question, answer = _read_messages(row)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    tools = ATOMIC_TOKEN.findall(answer["content"])
    if question["role"] != "user" or ATOMIC_TOKEN.sub("", answer["content"]).strip() or not tools:
        raise ValueError(f"{place}: expected a user's text and its tools, written <<tool&&api>>, as the answer")
    return {"id": str(row.get("id", place)), "text": question["content"], "tools": tools}


def _read_qrels(path: str | os.PathLike) -> dict[str, list[str]]:
    relevant: dict[str, list[str]] = {}
    with open(local_file(path), encoding="utf-8") as file:
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
    """Read trajectories, or any other conversations.

    A row has `messages` in the conversational format of TRL, with `tools` beside it or not, or `conversations` as
    ShareGPT has them, of `from` and `value` or `role` and `content`. A tool call stands in an assistant message's
    `tool_calls` as `{"type": "function", "function": {"name": TOOL_ID, "arguments": {...}}}`, with the thought as its
    `content`, or in its text as ToolGen's token `<<tool&&api>>`; the observation follows as a message of the role
    `tool`. A message may say by `loss`, true or false, whether it is to be learnt. A row of Seal-Tools becomes the query,
    a turn for each call of its `calling`, observed by the call's `responses`, and an empty answer, which ends the run.

    Returns:
        `list[dict]`: rows of an `id` and `messages`. Their `tools` are left out: the model knows the tools by their
        codes.

    Raises:
        `ValueError`: naming the file and line of a row that is not of that form, or calls a tool that its `tools` lack.
    """
    rows = []
    for place, row in read_rows(path):
        try:
            rows.append({"id": str(row.get("id", place)), "messages": _read_messages(row)})
        except (ValueError, TypeError, AttributeError) as error:  # also of a value of another type than is asked for
            raise ValueError(f"{place}: {error}") from None
    return rows


def _read_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Check a row's conversation and return it with `role` and `content`, and with arguments that are objects."""
    if "calling" in row:  # Seal-Tools
        turns: list[dict[str, Any]] = [{"role": "user", "content": row.get("query")}]
        for call in row["calling"]:
            function = {"name": call.get("api"), "arguments": call.get("parameters")}
            turns.append({"role": "assistant", "tool_calls": [{"function": function}]})
            turns.append({"role": "tool", "content": json.dumps(call.get("responses", []))})
        row = {"messages": [*turns, {"role": "assistant"}]}
    messages = row.get("messages", row.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise ValueError("a trajectory needs 'messages' or 'conversations', a non-empty list")
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    names = {(tool.get("function") or tool).get("name") for tool in tools} if tools else None
    read = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError("a message must be a JSON object")
        role = message.get("role", message.get("from"))
        role = SHAREGPT_ROLES.get(role, role)
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"every message needs a role: system, user, assistant or tool, not {role!r}")
        content = message.get("content", message.get("value")) or ""
        if not isinstance(content, str):
            raise ValueError("a message's content must be a text")
        if not isinstance(message.get("loss", True), bool):
            raise ValueError("a message's loss must be true or false")
        calls = [_read_call(call, names) for call in message.get("tool_calls") or []]
        read.append({"role": role, "content": content} | ({"tool_calls": calls} if calls else {}))
        if "loss" in message:
            read[-1]["loss"] = message["loss"]
    if not any(message.get("loss", message["role"] == "assistant") for message in read):
        raise ValueError(
            "a trajectory needs at least one message to learn from: the assistant's, or one marked 'loss'"
        )
    return read


def _read_call(call: Any, names: set[str] | None) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call needs a 'function' with the 'name' of the tool")
    name, arguments = function["name"], function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's API gives them as text
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of the call to {name!r} must be a JSON object")
    if names is not None and name not in names:
        raise ValueError(f"the tool {name!r} is called but is not among the row's 'tools'")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def code_text(tool_id: str, tokenizer: ToolWeaverTokenizer) -> str:
    """Return a tool's code as text, such as `<a_12><b_5>`. ToolGen's token `<<tool&&api>>` names a tool, too."""
    if ATOMIC_TOKEN.fullmatch(tool_id) and not tokenizer.has_tool(tool_id):
        tool_id = tool_id[2:-2]
    return "".join(tokenizer.convert_ids_to_tokens(tokenizer.encode_tool(tool_id)))


def _atomic_to_code(token: str, tokenizer: ToolWeaverTokenizer) -> str:
    is_tool = "&&" in token or tokenizer.has_tool(token) or tokenizer.has_tool(token[2:-2])
    return code_text(token, tokenizer) if is_tool else token  # such as <<Finish>>, or a shift in C++


def memorization_rows(catalog: ToolCatalog, tokenizer: ToolWeaverTokenizer) -> list[dict[str, Any]]:
    """Rows that teach tool document -> code: one conversation a tool."""
    return [_code_row(tool.id, tool.document, [tool.id], tokenizer) for tool in catalog]


def retrieval_rows(
    queries: Iterable[Query], tokenizer: ToolWeaverTokenizer, as_sequence: bool = False
) -> list[dict[str, Any]]:
    """Rows that teach query -> code.

    Args:
        queries (`Iterable[Query]`):
            The queries.
        tokenizer ([`ToolWeaverTokenizer`]):
            The tokenizer with the tools' codes.
        as_sequence (`bool`, *optional*, defaults to `False`):
            Whether a query's ground-truth tools make one conversation, answered by their codes one after another,
            rather than one conversation for each tool.

    Raises:
        `ValueError`: naming the query whose tool has no code.
    """
    rows = []
    for query in queries:
        answers = [query.tools] if as_sequence else [[tool_id] for tool_id in query.tools]
        rows += [_code_row(query.id, query.text, answer, tokenizer) for answer in answers]
    return rows


def _code_row(row_id: str, text: str, tool_ids: Sequence[str], tokenizer: ToolWeaverTokenizer) -> dict[str, Any]:
    try:
        answer = "".join(code_text(tool_id, tokenizer) for tool_id in tool_ids)
    except ValueError as error:
        raise ValueError(f"{row_id}: {error}") from None
    return {"id": row_id, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


def trajectory_rows(trajectories: Iterable[dict[str, Any]], tokenizer: ToolWeaverTokenizer) -> list[dict[str, Any]]:
    """Rows that teach whole trajectories: thought, code, arguments, observation, answer.

    Raises:
        `ValueError`: naming the trajectory that calls a tool without a code.
    """
    rows = []
    for row in trajectories:
        try:
            rows.append({"id": row["id"], "messages": render_calls(row["messages"], tokenizer)})
        except ValueError as error:
            raise ValueError(f"{row['id']}: {error}") from None
    return rows


def render_calls(messages: Sequence[dict[str, Any]], tokenizer: ToolWeaverTokenizer) -> list[dict[str, Any]]:
    """Write the tool calls of a conversation as the model generates them.

    Every message comes out with a plain `content`: a call becomes the thought, a line break, the tool's code and its
    arguments as one JSON object; ToolGen's tokens in the assistant's text become codes. Several calls of one
    assistant message become turns of their own, each followed by its observation if there is one. A conversation
    without a system message gets `TRAJECTORY_PROMPT`.

    Raises:
        `ValueError`: if a call names a tool that has no code.
    """
    rendered = [] if messages[0]["role"] == "system" else [{"role": "system", "content": TRAJECTORY_PROMPT}]
    waiting: list[dict[str, Any]] = []  # turns for the calls of the last assistant message that still lack theirs
    for message in messages:
        content = message.get("content") or ""
        flags = {"loss": message["loss"]} if "loss" in message else {}
        if message["role"] == "tool" and waiting and rendered[-1]["role"] == "tool":
            rendered.append(waiting.pop(0))
        elif message["role"] != "tool":  # calls that nothing was observed of
            rendered += waiting
            waiting = []
        if message["role"] == "assistant":
            content = ATOMIC_TOKEN.sub(lambda match: _atomic_to_code(match[0], tokenizer), content)
        calls = [
            code_text(call["function"]["name"], tokenizer)
            + json.dumps(call["function"].get("arguments", {}), ensure_ascii=False)
            for call in message.get("tool_calls") or []
        ]
        if calls:
            content = f"{content}\n{calls[0]}" if content else calls[0]
            waiting = [{"role": "assistant", "content": call, **flags} for call in calls[1:]]
        rendered.append({"role": message["role"], "content": content, **flags})
    return rendered + waiting


def leave_out_words(row: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """Copy a row with some words of the user's messages alone, in their order.

    Half to all of a query's words stay; of a document no more than a query has, 16.
    """

    def thin(text: str) -> str:
        words = text.split()
        kept = math.ceil(generator.uniform(0.5, 1) * min(len(words), 16))
        return " ".join(words[i] for i in sorted(generator.sample(range(len(words)), kept)))

    messages = [
        {**message, "content": thin(message["content"])} if message["role"] == "user" else message
        for message in row["messages"]
    ]
    return {**row, "messages": messages}


def tokenize_rows(
    rows: Iterable[dict[str, Any]],
    tokenizer: ToolWeaverTokenizer,
    max_length: int | None = None,
    codes_alone: bool = False,
    split_share: float = 0.0,
    seed: int = 0,
) -> tuple[Dataset, int]:
    """Tokenize conversations for `SFTTrainer`, with the loss on the messages to learn alone.

    These are the assistant's messages, or those that say `loss: true` where messages say it. A conversation whose
    earlier turns the chat template rewrites becomes one row for each turn to learn, which ends with it.

    Args:
        rows (`Iterable[dict]`):
            Rows of an `id` and `messages` with a plain `content`.
        tokenizer ([`ToolWeaverTokenizer`]):
            The tokenizer with the tools' codes.
        max_length (`int`, *optional*):
            Rows of more tokens are left out whole: a cut row would lose the answer that it teaches.
        codes_alone (`bool`, *optional*, defaults to `False`):
            Whether to learn of an answer its codes alone, and end the row with them, since retrieval decodes a code
            and nothing else.
        split_share (`float`, *optional*, defaults to 0):
            How many of the tokens that are not learnt to write as shorter ones, at random.
        seed (`int`, *optional*, defaults to 0):
            Seed of these.

    Returns:
        `tuple[Dataset, int]`: the dataset with the columns `id`, `input_ids` and `labels` (-100 where no loss is
        taken), and the number of rows that were left out.
    """
    columns: dict[str, list] = {"id": [], "input_ids": [], "labels": []}
    too_long = 0
    generator = random.Random(seed)
    codes = set(tokenizer.code_token_ids)
    for row in tqdm(rows, desc="Tokenizing", leave=False):
        for messages in _learnable(row["messages"], tokenizer):
            encoded = tokenizer.encode_conversation(messages)
            ids, mask = encoded["input_ids"], encoded["assistant_mask"]
            if codes_alone:
                mask = [int(learn and token_id in codes) for token_id, learn in zip(ids, mask, strict=True)]
                length = max((i + 1 for i, learn in enumerate(mask) if learn), default=0)
                ids, mask = ids[:length], mask[:length]
            input_ids, labels = [], []
            for learn, part in groupby(zip(ids, mask, strict=True), itemgetter(1)):
                ids = [token_id for token_id, _ in part]
                if split_share and not learn:
                    ids = tokenizer.split_tokens(ids, split_share, generator)
                input_ids += ids
                labels += ids if learn else [-100] * len(ids)
            if max_length is not None and len(input_ids) > max_length:
                too_long += 1
            else:
                for name, value in (("id", row["id"]), ("input_ids", input_ids), ("labels", labels)):
                    columns[name].append(value)
    return Dataset.from_dict(columns), too_long


def _learnable(messages: list[dict[str, Any]], tokenizer: ToolWeaverTokenizer) -> list[list[dict[str, Any]]]:
    """Cut a conversation where the chat template requires it, so that every turn is learnt as it will be generated."""
    if tokenizer.appends_messages:
        return [messages]
    return [
        [{**earlier, "loss": False} for earlier in messages[:i]] + [{**message, "loss": True}]
        for i, message in enumerate(messages)
        if message.get("loss", message["role"] == "assistant")
    ]


def weigh_rows(dataset: Dataset, weight: float, seed: int) -> Dataset:
    """Repeat a dataset's rows so that each is seen `weight` times an epoch: 2 is twice, 0.5 is half of the rows."""
    copies, rest = divmod(weight, 1)
    some = random.Random(seed).sample(range(len(dataset)), round(rest * len(dataset)))
    return dataset.select([*range(len(dataset))] * int(copies) + sorted(some))


def share_prompts(dataset: Dataset) -> Dataset:
    """Merge tokenized rows of one prompt, such as a query with several ground-truth tools, into rows that hold it once.

    Loss and gradient stay the same, but the prompt is computed once instead of once for each answer. A merged row is
    the prompt but for its last token, then for each answer this token and the answer;
    [`~train_alignment.SharedPromptCollator`] keeps the answers from seeing each other.

    Args:
        dataset (`Dataset`): Rows as [`tokenize_rows`] makes them, each with one answer at its end.

    Returns:
        `Dataset`: rows with a further column `seq_lengths`, the lengths of these parts. A row with one answer has one
        part. What stood behind an answer, where no loss is taken, is left out.
    """
    groups: dict[tuple[int, ...], list[tuple[str, list[int]]]] = {}
    for row in dataset:
        learnt = [i for i, label in enumerate(row["labels"]) if label != -100]
        prompt, answer = row["input_ids"][: learnt[0]], row["input_ids"][learnt[0] : learnt[-1] + 1]
        groups.setdefault(tuple(prompt), []).append((row["id"], answer))
    columns: dict[str, list] = {"id": [], "input_ids": [], "labels": [], "seq_lengths": []}
    for prompt, answers in groups.items():
        (*shared, last), (ids, answers) = prompt, zip(*answers, strict=True)
        parts = [[last, *answer] for answer in answers]
        columns["id"].append(ids[0])
        columns["input_ids"].append([*shared, *chain.from_iterable(parts)])
        columns["labels"].append([-100] * len(shared) + [i for answer in answers for i in (-100, *answer)])
        several = [len(shared), *map(len, parts)]
        columns["seq_lengths"].append(several if len(parts) > 1 else [sum(several)])
    return Dataset.from_dict(columns)
