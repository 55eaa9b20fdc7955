"""Trajectories: conversations with tool calls, in their file formats and as a model generates them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..chat_template import REASONING_FIELDS, THOUGHT
from ..files import read_rows


if TYPE_CHECKING:
    from ..tokenization_toolweaver import ToolWeaverTokenizer


logger = logging.get_logger(__name__)


ATOMIC_TOKEN = re.compile(r"<<(?:(?!<<).)+?(?:&&(?:(?!<<).)+?)?>>(?!>)")
"""ToolGen's token of a tool, `<<tool&&api>>`."""


ROLES = {
    "developer": "system",  # OpenAI's newer name
    "human": "user",  # ShareGPT's
    "gpt": "assistant",
    "function": "tool",
    "function_call": "assistant",
    "observation": "tool",
}


MESSAGE_FIELDS = {"role", "from", "content", "value", "loss", "weight", "name", *REASONING_FIELDS}
MESSAGE_FIELDS |= {"tool_calls", "function_call", "tool_call_id"}
TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)

TRAJECTORY_PROMPT = "Think, call tools by their code with JSON arguments, then answer."


def load_trajectories(path: str | os.PathLike, bad_rows: list[str] | None = None) -> list[dict[str, Any]]:
    """Read trajectories, or conversations without tool calls.

    A row has either `messages` in TRL's conversational format, optionally with `tools`, or ShareGPT's `conversations`,
    of `from` and `value` or `role` and `content`. A message's content is a string or a list of text parts, which are
    joined.

    A tool call is an item `{"type": "function", "function": {"name": TOOL_ID, "arguments": {...}}}` of an assistant
    message's `tool_calls`, with the thought as the message's `content`. Older formats are also supported: a
    `function_call`, ShareGPT's turn `function_call`, and calls in the text as ToolGen's token `<<tool&&api>>` or
    Hermes' `<tool_call>`. Results follow as messages of the role `tool`. A result is matched to its call by
    `tool_call_id`, or by order if there are no ids. A row of Seal-Tools is converted to the query, one turn per call
    of its `calling` with the call's `responses` as the observation, and an empty final answer.

    The model's reasoning is in `reasoning_content` (or `reasoning`, or `thinking`), or at the start of its text as
    `<think>...</think>`. An assistant message may set `loss` (true or false), or OpenAI's `weight` (1 or 0), to
    include it in the training loss or not.

    Args:
        path (`str`):
            A JSONL file, or a JSON file with a list.
        bad_rows (`list[str]`, *optional*):
            If given, invalid rows are skipped and their error messages are appended to this list.

    Returns:
        `list[dict]`: rows with `id`, `messages` and the `place` in the file. `tools` are dropped, because the model
        knows the tools by their codes.

    Raises:
        `ValueError`: naming the file and line of a row that has an invalid format, calls a tool that is missing in its
            `tools`, or has a result without a call.
    """
    rows = []
    for place, row in read_rows(path, bad_rows):
        try:
            rows.append({"id": str(row.get("id", place)), "messages": read_messages(row), "place": place})
        except (ValueError, TypeError, AttributeError) as error:  # the latter two for values of a wrong type
            if bad_rows is None:
                raise ValueError(f"{place}: {error}") from None
            bad_rows.append(f"{place}: {error}")
    return rows


def read_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Validate a row's conversation and return its messages with `role`, `content` and arguments as objects."""
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
    read = [_read_message(message, names) for message in messages]
    if not any(message.get("loss", True) for message in read if message["role"] == "assistant"):
        raise ValueError("a trajectory needs at least one message of the assistant to learn from")
    find_results(read)
    return read


def _read_message(message: Any, names: set[str] | None) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError("a message must be a JSON object")
    said = message.get("role", message.get("from"))
    role = ROLES.get(said, said)
    if role not in ("system", "user", "assistant", "tool"):
        raise ValueError(f"every message needs a role: system, user, assistant or tool, not {role!r}")
    for name, value in message.items():
        if value and name not in MESSAGE_FIELDS:
            logger.warning_once(f"the field {name!r} of messages is not read")
    content = content_text(message.get("content", message.get("value")))
    calls = list(message.get("tool_calls") or [])
    if message.get("function_call"):  # OpenAI's deprecated format
        calls.append({"function": message["function_call"]})
    if role == "assistant" and "<tool_call>" in content:  # Hermes' format
        calls += [{"function": call} for text in TOOL_CALL.findall(content) for call in _read_json_calls(text)]
        content = TOOL_CALL.sub("", content).strip()
    if said == "function_call":  # ShareGPT's
        calls, content = [{"function": call} for call in _read_json_calls(content)], ""
    thought = next((content_text(message[name]) for name in REASONING_FIELDS if message.get(name)), "")
    if (calls or thought) and role != "assistant":
        raise ValueError(f"a message of the role {role!r} can neither call tools nor think")
    if role == "assistant" and not thought and (found := THOUGHT.match(content)):
        thought, content = found[1], content[found.end() :]
    read: dict[str, Any] = {"role": role, "content": content}
    if thought.strip():
        read["reasoning_content"] = thought.strip()
    if calls:
        read["tool_calls"] = [_read_call(call, names) for call in calls]
    if role == "tool" and message.get("tool_call_id") is not None:
        read["tool_call_id"] = str(message["tool_call_id"])
    loss = message.get("loss", message.get("weight"))
    if loss is not None:
        if loss not in (0, 1):
            raise ValueError("a message's loss must be true or false")
        if loss and role != "assistant":
            raise ValueError(f"a message of the role {role!r} cannot be learned: the model does not write it")
        read["loss"] = bool(loss)
    return read


def _read_json_calls(text: str) -> list[Any]:
    try:
        calls = json.loads(text)
    except ValueError:
        raise ValueError(
            f"a call in a message's text must be JSON of a 'name' and 'arguments', not {text[:80]!r}"
        ) from None
    return calls if isinstance(calls, list) else [calls]


def find_results(messages: Sequence[dict[str, Any]]) -> dict[tuple[int, int], int]:
    """Match the results of a conversation to its tool calls.

    Returns:
        `dict[tuple[int, int], int]`: maps each call, by the index of its message and its index in `tool_calls`, to the
        index of the message with its result. Calls without a result are omitted.

    Raises:
        `ValueError`: for a result without a call.
    """
    results: dict[tuple[int, int], int] = {}
    waiting: dict[tuple[int, int], str | None] = {}  # calls that still have no result, with their ids
    last = -1  # index of the last assistant message
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            last = place
            waiting |= {(place, i): call.get("id") for i, call in enumerate(message.get("tool_calls") or ())}
        elif message["role"] == "tool":
            call_id = message.get("tool_call_id")
            if call_id is not None and any(waiting.values()):
                found = [call for call, waiting_id in waiting.items() if waiting_id == call_id][-1:]
            else:
                found = [call for call in waiting if call[0] == last][:1]
            if found:
                results[found[0]] = place
                del waiting[found[0]]
            elif last < 0 or messages[last].get("tool_calls") or not ATOMIC_TOKEN.search(messages[last]["content"]):
                named = "" if call_id is None else f", of the call {call_id!r},"
                raise ValueError(f"message {place + 1} holds a tool's result{named} without a call before it")
    return results


def content_text(content: Any) -> str:
    """Return a message's content as one string; parts `{"type": "text", "text": ...}` of chat APIs are joined.

    Raises:
        `ValueError`: naming the type of a part that is not text, such as an image.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError(f"a message's content must be a text or a list of parts, not {type(content).__name__}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"a message's content has a part of the type {kind!r}: only parts of text can be read")
        texts.append(text)
    return "\n".join(texts)


def _read_call(call: Any, names: set[str] | None) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call needs a 'function' with the 'name' of the tool")
    name, arguments = function["name"], function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI's API returns a JSON string
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of the call to {name!r} must be a JSON object")
    if names is not None and name not in names:
        raise ValueError(f"the tool {name!r} is called but is not among the row's 'tools'")
    read = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return read if call.get("id") is None else read | {"id": str(call["id"])}


def asked_in_trajectories(trajectories: Iterable[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return a query and the tool ids for each turn that calls tools.

    The query is the user's last message and the turn's thought. A ToolGen token counts as two ids, with and without its
    angle brackets.
    """
    asked = []
    for row in trajectories:
        said = ""
        for message in row["messages"]:
            content = message["content"] or ""
            if message["role"] == "user":
                said = content
            elif message["role"] == "assistant":
                tokens = ATOMIC_TOKEN.findall(content)
                tools = [call["function"]["name"] for call in message.get("tool_calls") or []]
                tools += [name for token in tokens for name in (token, token[2:-2])]
                if tools:
                    parts = (said, message.get("reasoning_content"), ATOMIC_TOKEN.sub("", content).strip())
                    asked.append((" ".join(filter(None, parts)), tools))
    return asked


def code_text(tool_id: str, tokenizer: ToolWeaverTokenizer) -> str:
    """Return a tool's code as text, such as `<a_12><b_5>`. The tool id may also be ToolGen's token `<<tool&&api>>`."""
    if ATOMIC_TOKEN.fullmatch(tool_id) and not tokenizer.has_tool(tool_id):
        tool_id = tool_id[2:-2]
    return "".join(tokenizer.convert_ids_to_tokens(tokenizer.encode_tool(tool_id)))


def _atomic_to_code(token: str, tokenizer: ToolWeaverTokenizer) -> str:
    is_tool = "&&" in token or tokenizer.has_tool(token) or tokenizer.has_tool(token[2:-2])
    return code_text(token, tokenizer) if is_tool else token  # not a tool: <<Finish>>, or a shift operator in C++


def render_calls(messages: Sequence[dict[str, Any]], tokenizer: ToolWeaverTokenizer) -> list[dict[str, Any]]:
    """Render the tool calls of a conversation in the format that the model generates.

    Every returned message has a string as its `content`. A call is rendered on its own line as the tool's code,
    followed by its arguments as a JSON object; ToolGen's tokens in the assistant's text are replaced by codes. The
    thought is the `reasoning_content`, or the text before a call without one. Parallel calls of one assistant message
    are split into consecutive turns, each followed by its result if there is one. `TRAJECTORY_PROMPT` is prepended to a
    conversation without a system message.

    Raises:
        `ValueError`: if a call names a tool without a code.
    """
    messages = [
        {
            **message,
            "role": ROLES.get(message["role"], message["role"]),
            "content": content_text(message.get("content")),
        }
        for message in messages
    ]
    rendered = [] if messages[0]["role"] == "system" else [{"role": "system", "content": TRAJECTORY_PROMPT}]
    results = find_results(messages)
    found = set(results.values())
    for place, message in enumerate(messages):
        kept = {"loss": message["loss"]} if "loss" in message else {}
        content, thought = message["content"], message.get("reasoning_content")
        calls = message.get("tool_calls") or ()
        if message["role"] == "assistant":
            content = ATOMIC_TOKEN.sub(lambda match: _atomic_to_code(match[0], tokenizer), content)
        if calls and not thought:
            content, thought = "", content
        said = {"content": content} | ({"reasoning_content": thought} if thought else {})
        if place not in found and not calls:
            rendered.append({"role": message["role"], **said, **kept})
        for i, call in enumerate(calls):
            text = code_text(call["function"]["name"], tokenizer)
            text += json.dumps(call["function"].get("arguments", {}), ensure_ascii=False)
            text = f"{content}\n{text}" if content and i == 0 else text
            rendered.append({"role": "assistant", **(said if i == 0 else {}), "content": text, **kept})
            if (place, i) in results:
                rendered.append({"role": "tool", "content": messages[results[place, i]]["content"]})
    return rendered
