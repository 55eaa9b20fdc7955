"""Trajectories: conversations with tool calls, as files have them and as a model writes them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..files import read_rows


if TYPE_CHECKING:
    from ..tokenization_toolweaver import ToolWeaverTokenizer


ATOMIC_TOKEN = re.compile(r"<<(?:(?!<<).)+?(?:&&(?:(?!<<).)+?)?>>(?!>)")
"""How ToolGen writes a tool: one token, `<<tool&&api>>`."""


ROLES = {
    "developer": "system",  # as OpenAI's newer models call it
    "human": "user",  # ShareGPT's
    "gpt": "assistant",
    "function": "tool",
    "function_call": "assistant",
    "observation": "tool",
}


TRAJECTORY_PROMPT = "Think, call tools by their code with JSON arguments, then answer."


def load_trajectories(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read trajectories, or any other conversations.

    A row has `messages` in the conversational format of TRL, with `tools` beside it or not, or `conversations` as
    ShareGPT has them, of `from` and `value` or `role` and `content`. A tool call stands in an assistant message's
    `tool_calls` as `{"type": "function", "function": {"name": TOOL_ID, "arguments": {...}}}`, with the thought as its
    `content`, or in its text as ToolGen's token `<<tool&&api>>`; the observation follows as a message of the role
    `tool`. A message's content is a text, or a list of text parts, which are joined. A message may say by `loss`, true or false, whether it is to be learned. A row of Seal-Tools becomes the query,
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
            rows.append({"id": str(row.get("id", place)), "messages": read_messages(row)})
        except (ValueError, TypeError, AttributeError) as error:  # also of a value of another type than is asked for
            raise ValueError(f"{place}: {error}") from None
    return rows


def read_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
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
        role = ROLES.get(role, role)
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"every message needs a role: system, user, assistant or tool, not {role!r}")
        content = content_text(message.get("content", message.get("value")))
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


def content_text(content: Any) -> str:
    """Return a message's content as one text: `{"type": "text", "text": ...}` parts, as chat APIs have them, are joined.

    Raises:
        `ValueError`: naming the kind of a part that is no text, such as an image.
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


def render_calls(messages: Sequence[dict[str, Any]], tokenizer: ToolWeaverTokenizer) -> list[dict[str, Any]]:
    """Write the tool calls of a conversation as the model generates them.

    Every message comes out with a plain `content`: a call becomes the thought, a line break, the tool's code and its
    arguments as one JSON object; ToolGen's tokens in the assistant's text become codes. Several calls of one
    assistant message become turns of their own, each followed by its observation if there is one. A conversation
    without a system message gets `TRAJECTORY_PROMPT`.

    Raises:
        `ValueError`: if a call names a tool that has no code.
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
    waiting: list[dict[str, Any]] = []  # turns for the calls of the last assistant message that still lack theirs
    for message in messages:
        content = message["content"]
        flags = {"loss": message["loss"]} if "loss" in message else {}
        if message["role"] == "tool" and waiting and rendered[-1]["role"] == "tool":
            rendered.append(waiting.pop(0))
        elif message["role"] != "tool":  # calls without an observation
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
