"""How a chat template writes conversations: the prompt of a turn, what the model writes in it, and what follows it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


# A conversation for base models that come without a chat template; it needs no token that the base lacks.
DEFAULT_CHAT_TEMPLATE = (
    "{%- if bos_token -%}{{ bos_token }}{%- endif -%}"
    "{%- for message in messages -%}{{ message.role + '\\n' + message.content + eos_token + '\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'assistant\\n' }}{%- endif -%}"
)
# Put before a template that reads contents as lists of parts alone, as those of vision models do.
PARTS_TEMPLATE = (
    "{%- set ns = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}"
    "{%- set ns.messages = ns.messages + [dict(message, content=parts)] -%}"
    "{%- endfor -%}{%- set messages = ns.messages -%}"
)
# Put before a template that knows no tool role: observations are shown to it as messages of the user.
TOOL_ROLE_TEMPLATE = (
    "{%- set ns = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set ns.messages = ns.messages + [{'role': 'user', 'content': message.content} if message.role == 'tool'"
    " else message] -%}{%- endfor -%}{%- set messages = ns.messages -%}"
)
# Put before a template that knows no system role: the system's text opens the first message of the user.
SYSTEM_ROLE_TEMPLATE = (
    "{%- if messages[0].role == 'system' -%}{%- set messages = [{'role': messages[1].role, 'content':"
    " messages[0].content + '\\n\\n' + messages[1].content}] + messages[2:] -%}{%- endif -%}"
)

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""The names that chat templates have for what a model thinks before it speaks."""
THOUGHT = re.compile(r"\s*(?:<think>)?((?:(?!<think>).)*?)</think>\s*", re.DOTALL)
"""A thought at the start of a text, as reasoning models write it; its opening may have stood in the prompt."""

OPENED = re.compile(r"(?:<(\w*(?:think|thought|reason)\w*)>|\[(\w*(?:think|thought|reason)\w*)\])\s*$", re.IGNORECASE)
"""The marker of a thought that a prompt opens."""
CODE = re.compile(r"<a_\d+>")
# Private characters that stand for what a message holds, to find it in what a template renders
CONTEXT, CONTENT, REASONING = "\ue002", "\ue003", "\ue004"


def complete_template(template: str, renders: Callable[..., bool]) -> str:
    """Put before a chat template what it lacks: contents that are plain text, the role of tools, that of the system.

    Args:
        template (`str`):
            The chat template.
        renders (`Callable[..., bool]`):
            Says of a template, and of the roles after it, whether it shows the contents of messages of these roles.
    """
    if not renders(template, "user", "assistant") and renders(PARTS_TEMPLATE + template, "user", "assistant"):
        template = PARTS_TEMPLATE + template
    if not renders(template, "user", "assistant", "tool"):
        template = TOOL_ROLE_TEMPLATE + template
    if not renders(template, "system", "user"):
        template = SYSTEM_ROLE_TEMPLATE + template
    return template


class Frame(NamedTuple):
    """What a chat template writes around the thought and the content of an assistant's turn, after its prompt."""

    lead: str  # before every turn, and so a part of its prompt
    bare: str  # then, before the content of a turn without a thought
    opening: str | None  # before a thought; None where a thought has no place of its own
    closing: str  # between a thought and the content
    end: str  # after the content of the last turn


class Row(NamedTuple):
    """A conversation as text to train on."""

    text: str
    cuts: list[int]  # where turns begin, where their contents end, and where they end: no token reaches across
    learned: list[tuple[int, int]]  # the spans to learn, each of a turn with its end


class ConversationWriter:
    """Writes conversations by a chat template, turn by turn, as they are generated.

    A run of the assistant's turns, with the results of tools between them, is written as an agent generates it: the
    prompt that the template renders for the first turn, what the model writes, what the template writes after a turn
    and before the next. So a row to learn holds what the model sees, also where a template renders a conversation
    differently once it goes on, such as without its earlier thoughts.

    Args:
        render (`Callable[[list[dict], bool], str]`):
            Renders messages, and opens the assistant's next turn if the flag says so.
        find_end (`Callable[[str, bool], int | None]`):
            Returns for a text that follows a turn's content the length of its part up to the token at which generation
            stops; where there is none and the flag says so, up to the first control token.
        eos_token (`str`):
            The end of a turn that the template does not end.
        thinks (`bool`):
            Whether turns have a thought. Without it, a thought that the prompt opens is closed at once.
    """

    def __init__(
        self,
        render: Callable[[list[dict[str, Any]], bool], str],
        find_end: Callable[[str, bool], int | None],
        eos_token: str,
        thinks: bool,
    ):
        self.render, self.find_end, self.eos_token, self.thinks = render, find_end, eos_token, thinks
        self._frames: dict[str, Frame] = {}

    def frame(self, after: str) -> Frame:
        """Return what the template writes around a turn that follows a message of the role `after`."""
        kind = "tool" if after == "tool" else "user"
        if kind not in self._frames:
            self._frames[kind] = self._find_frame(kind)
        return self._frames[kind]

    def _find_frame(self, after: str) -> Frame:
        context = [{"role": "user", "content": CONTEXT}]
        if after == "tool":
            context = [{"role": "user", "content": "?"}, _assistant("."), {"role": "tool", "content": CONTEXT}]

        def rest(*messages: dict[str, Any], prompt: bool = False) -> str:
            return self.render([*context, *messages], prompt).rpartition(CONTEXT)[2]

        prompt, plain = rest(prompt=True), rest(_assistant(CONTENT))
        opening, closing = None, ""
        thought = rest(_assistant(CONTENT, REASONING)).partition(CONTENT)[0]
        if thought.startswith(prompt) and REASONING in thought:
            opening, _, closing = thought[len(prompt) :].partition(REASONING)
        before, _, end = plain.partition(CONTENT)
        if before.startswith(prompt):
            bare = before[len(prompt) :]
        else:
            # The prompt holds what no rendered turn begins with: it opens a thought, or has closed an empty one.
            opened = OPENED.search(prompt)
            if opening is None and opened is not None:
                opening, closing = "", f"\n</{opened[1]}>\n\n" if opened[1] else f"\n[/{opened[2]}]\n\n"
            bare = (opening or "") + closing
        if self.thinks and (opening is not None or bare.isspace()):
            # A space before a text is one token with the word after it, so that the model has to write it.
            return Frame("", bare, opening, closing, end)
        return Frame(bare, "", None, "", end)

    def _shown(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Bring earlier messages to the form in which the template reads a thought."""
        shown = []
        for message in messages:
            thought, content = message.get("reasoning_content") or "", message["content"]
            if message["role"] != "assistant":
                shown.append({"role": message["role"], "content": content})
            elif self.frame("user").opening is None:
                shown.append(_assistant(_join(thought.strip(), content.strip())))
            else:
                shown.append(_assistant(content.strip(), thought.strip()))
        return shown

    def whole(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return a conversation as the template renders it."""
        return self.render(self._shown(messages), False)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return what stands before what the model writes in the assistant's next turn."""
        return self.render(self._shown(messages), True) + self.frame(messages[-1]["role"]).lead

    def turn(self, message: Mapping[str, Any], after: str) -> str:
        """Return what the model writes in a turn after a message of the role `after`, without the turn's end."""
        thought, content = (message.get("reasoning_content") or "").strip(), message["content"].strip()
        frame = self.frame(after)
        if frame.opening is None:
            return frame.bare + _join(thought, content)
        return (frame.opening + thought + frame.closing if thought else frame.bare) + content

    def reply(self, observation: str | None) -> tuple[str, int]:
        """Return what follows a turn that is not the last, up to the next turn, and the length of the turn's end in it.

        Args:
            observation (`str`, *optional*): What the tool returned; nothing where a call has no result.
        """
        content = CONTENT
        while observation is not None and content in observation:
            content += CONTENT
        messages = [{"role": "user", "content": "?"}, _assistant(content)]
        messages += [] if observation is None else [{"role": "tool", "content": observation}]
        text = self.render(messages, True).partition(content)[2]
        text += self.frame("user" if observation is None else "tool").lead
        end = self.find_end(text, True)
        return (self.eos_token + text, len(self.eos_token)) if end is None else (text, end)

    def end(self, after: str) -> str:
        """Return the end of a conversation's last turn, which follows a message of the role `after`."""
        text = self.frame(after).end
        end = self.find_end(text, False)
        if end is not None:
            return text[:end]
        question = {"role": "user", "content": "?"}
        following = self.render([question, _assistant(CONTENT), question], False).partition(CONTENT)[2]
        end = self.find_end(following, False)
        return text.rstrip() + self.eos_token if end is None or text.strip() else following[:end]

    def rows(self, messages: Sequence[Mapping[str, Any]]) -> list[Row]:
        """Write a conversation as rows to learn.

        There is one row for each run of the assistant's turns, such as all that follow a message of the user. It
        becomes a part of the next row where the template leaves a conversation as it is when it goes on.
        """
        runs: list[list[int]] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and i > 0:  # what opens a conversation, no model was asked to write
                if runs and (runs[-1][-1] == i - 1 or (runs[-1][-1] == i - 2 and messages[i - 1]["role"] == "tool")):
                    runs[-1].append(i)
                else:
                    runs.append([i])
        rows: list[Row] = []
        for run in runs:
            row = self._row(messages, run)
            if rows and row.text.startswith(rows[-1].text):
                before = rows.pop()
                row = Row(row.text, before.cuts + row.cuts, before.learned + row.learned)
            rows.append(row)
        return [row for row in rows if row.learned]

    def _row(self, messages: Sequence[Mapping[str, Any]], run: list[int]) -> Row:
        row = Row(self.prompt(messages[: run[0]]), [], [])
        for i in run:
            after, start = messages[i - 1]["role"], len(row.text)
            text = row.text + self.turn(messages[i], after)
            if i == run[-1]:
                following = self.end(after)
                end = len(following)
            else:
                following, end = self.reply(messages[i + 1]["content"] if messages[i + 1]["role"] == "tool" else None)
            row = row._replace(text=text + following)
            row.cuts.extend((start, len(text), len(text) + end))
            if messages[i].get("loss", True):
                row.learned.append((start, len(text) + end))
        return row

    def read(self, text: str) -> tuple[str, str]:
        """Split what the model wrote in a turn into its thought and its content."""
        for after in ("user", "tool"):
            frame = self.frame(after)
            if frame.opening is not None:
                thought, closing, content = text.partition(frame.closing.strip())
                if closing and thought.strip().startswith(frame.opening.strip()):
                    return thought.strip().removeprefix(frame.opening.strip()).strip(), content.strip()
                if text.strip().startswith(frame.opening.strip() or "\0"):
                    return text.strip().removeprefix(frame.opening.strip()).strip(), ""
                if frame.bare.strip():
                    text = text.strip().removeprefix(frame.bare.strip())
        found = THOUGHT.match(text)
        return (found[1].strip(), text[found.end() :].strip()) if found else ("", text.strip())


def _assistant(content: str, thought: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content} | (dict.fromkeys(REASONING_FIELDS, thought) if thought else {})


def _join(thought: str, content: str) -> str:
    """Write a thought as text: before a call as it is, before an answer so that the two can be told apart."""
    if not thought:
        return content
    return f"{thought}\n{content}" if CODE.match(content) else f"<think>\n{thought}\n</think>\n\n{content}"
