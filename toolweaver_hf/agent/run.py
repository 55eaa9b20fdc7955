"""The result of an agent's run, and saving runs as training trajectories."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..files import atomic_write


@dataclass
class AgentRun:
    """The run of an agent on one query.

    Args:
        messages (`list[dict]`):
            The conversation in the format of a training trajectory (see [`~data.trajectories.load_trajectories`]).
        stop_reason (`str`):
            `"answer"`, `"max_steps"`, `"max_tokens"` or `"cancelled"`.
        token_ids (`list[int]`):
            The tokens of the conversation.
        num_new_tokens (`int`):
            Number of generated tokens.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    stop_reason: str = "max_steps"
    token_ids: list[int] = field(default_factory=list, repr=False)
    num_new_tokens: int = 0
    _cancelled: Future = field(default_factory=Future, repr=False, compare=False)

    @property
    def answer(self) -> str | None:
        """`str`: The final answer, or `None` if the run ended without one."""
        return self.messages[-1]["content"] if self.stop_reason == "answer" else None

    def cancel(self) -> None:
        """Stop the run at its next token, or immediately while it waits for a tool. Thread-safe."""
        if not self._cancelled.done():
            self._cancelled.set_result(None)


def save_trajectories(runs: Iterable[AgentRun], path: str | os.PathLike) -> None:
    """Write runs as training trajectories for [`~data.trajectories.load_trajectories`] (JSONL), atomically."""
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for i, run in enumerate(runs):
            file.write(json.dumps({"id": f"run-{i}", "messages": run.messages}, ensure_ascii=False) + "\n")


def as_json(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        text = json.dumps({"error": f"what the tool returned is not JSON: {error}"}, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode("utf-8")  # replaces unpaired surrogates


def from_json(text: str) -> Any:
    """Parse JSON; text that is none, or nested too deeply, stays as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
