"""The usage log of a gateway: queries, calls and their outcomes."""

from __future__ import annotations

import calendar
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock

from .catalog import CATALOG_FILE, Tool, ToolCatalog
from .queries import Query
from .trajectories import read_messages


logger = logging.getLogger(__name__)

MAX_LOG_BYTES = 256 * 2**20  # total size of a folder
MAX_FILE_BYTES = 16 * 2**20
LOCK_TIMEOUT = 10.0  # seconds to wait while other processes write the catalog
MAX_TEXT = 2000  # maximum characters of a result
REDACTED = "[redacted]"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
MAX_PAUSE = 1800  # seconds without a call after which tools are no longer used together


class UsageLog:
    """Writes queries and calls to a folder as trajectories in the format of [`~data.trajectories.load_trajectories`].

    Each call is one line of `trajectories-*.jsonl` with its query, the call and its outcome, written before the caller
    receives the result. Each query is one line of `queries-*.jsonl` with the retrieved tools. `catalog.jsonl` has all
    tools seen so far. Several processes may share a folder: each writes its own rows, and they take turns at the
    catalog, by `catalog.lock`. The oldest files of queries and calls are deleted when all of them exceed `max_bytes`.
    [`load_usage`] groups the calls by query.

    Args:
        folder (`str`):
            The folder; created if it does not exist.
        redact (`bool`, *optional*, defaults to `False`):
            Whether to replace arguments and results by a placeholder.
        clean (`Callable`, *optional*):
            Applied to each row, for example to remove secrets.
        max_bytes (`int`, *optional*, defaults to 256 MiB):
            Maximum total size of the files of queries and calls.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        redact: bool = False,
        clean: Callable[[Any], Any] = lambda row: row,
        max_bytes: int = MAX_LOG_BYTES,
    ):
        self.folder, self.redact, self.clean, self.max_bytes = Path(folder), redact, clean, max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._number = 0
        self._tools: dict[str, Tool] = {}  # as they are in the folder's catalog
        self._written: tuple[int, int] | None = None  # what tells that file from one that another process wrote
        self._process = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}"

    def save_catalog(self, tools: Sequence[Tool]) -> None:
        """Merge the current tools into the folder's catalog."""
        path = self.folder / CATALOG_FILE
        try:
            with WeakFileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT):
                written = _identity(path)
                if written != self._written:  # by another process, or before this one
                    self._tools = {tool.id: tool for tool in ToolCatalog.from_file(path)} if written else {}
                merged = self._tools | {tool.id: tool for tool in tools}
                if merged and merged != self._tools:
                    ToolCatalog(merged.values()).to_jsonl(path)
                self._tools, self._written = merged, _identity(path)
        except (OSError, ValueError) as error:
            logger.warning("the catalog of the log cannot be written: %s", error)

    def add_query(self, session: str, number: int, query: str, found: Sequence[str]) -> None:
        """Log a query and the ids of the retrieved tools."""
        self._append("queries", {"id": f"{session}/{number}", "time": _now(), "query": query, "found": list(found)})

    def add_call(
        self,
        session: str,
        number: int,
        query: str | None,
        tool_id: str,
        arguments: dict[str, Any],
        result: dict[str, Any] | None,
        outcome: str,
    ) -> None:
        """Log a call.

        Args:
            session (`str`): The session's id.
            number (`int`): Number of the query in the session that found the tool; 0 if none did.
            query (`str`, *optional*): The query; `None` if none found the tool.
            tool_id (`str`): The tool.
            arguments (`dict`): The call's arguments.
            result (`dict`, *optional*): The MCP result; `None` if there is none.
            outcome (`str`): `"ok"`, `"error"`, `"no answer"` or `"cancelled"`.
        """
        texts = [part.get("text", "") for part in (result or {}).get("content", []) if part.get("type") == "text"]
        if self.redact:
            arguments = dict.fromkeys(arguments, REDACTED)
            texts = [REDACTED] if texts else []
        function = {"name": tool_id, "arguments": arguments}
        messages: list[dict[str, Any]] = [] if query is None else [{"role": "user", "content": query}]
        messages.append(
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        )
        messages.append({"role": "tool", "content": "\n".join(texts)[:MAX_TEXT]})
        self._append(
            "trajectories",
            {"id": f"{session}/{number}", "time": _now(), "outcome": outcome, "messages": messages},
        )

    def _append(self, kind: str, row: dict[str, Any]) -> None:
        line = json.dumps(self.clean(row), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            path = self._path(kind)
            if path.exists() and path.stat().st_size + len(line) > min(MAX_FILE_BYTES, self.max_bytes // 4):
                self._number += 1
                path = self._path(kind)
            if not path.exists():
                self._make_room()
            file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)
            try:
                os.write(file, line)  # a single write, so that a killed process leaves no partial line
            finally:
                os.close(file)
        except OSError as error:  # a full disk must not fail the request
            logger.warning("the log cannot be written: %s", error)

    def _path(self, kind: str) -> Path:
        return self.folder / f"{kind}-{self._process}-{self._number:04d}.jsonl"

    def _make_room(self) -> None:
        files = [path for kind in ("queries", "trajectories") for path in self.folder.glob(f"{kind}-*.jsonl")]
        files.sort(key=lambda path: (path.stat().st_mtime, path.name))
        size = sum(path.stat().st_size for path in files) + min(MAX_FILE_BYTES, self.max_bytes // 4)
        for path in files:
            if size <= self.max_bytes:
                break
            size -= path.stat().st_size
            path.unlink(missing_ok=True)


def load_usage(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the trajectories of a usage log, one per query with all of its calls.

    Failed calls are kept with `loss` set to false, which excludes them from the training loss. Trajectories without a
    successful call are omitted, as are calls of tools that no query found, and incomplete last lines of killed
    processes.

    Args:
        folder (`str`): A folder written by [`UsageLog`].

    Returns:
        `list[dict]`: rows with `id`, `messages` and the `time` of the first call, in the order of the log.

    Raises:
        `ValueError`: naming the file and line of an invalid trajectory.
        `OSError`: if the folder has no log.
    """
    rows: dict[str, dict[str, Any]] = {}
    good: set[str] = set()
    for row, messages in _logged_calls(folder):
        if messages[0]["role"] != "user":
            continue
        if row.get("outcome") == "ok":
            good.add(row["id"])
        else:
            messages = [m | ({"loss": False} if m["role"] == "assistant" else {}) for m in messages]
        whole = rows.setdefault(row["id"], {"id": row["id"], "messages": [], "time": row.get("time")})
        whole["messages"] += [m for m in messages if m["role"] != "user" or not whole["messages"]]
    return [row for trajectory_id, row in rows.items() if trajectory_id in good]


def load_usage_queries(folder: str | os.PathLike) -> list[Query]:
    """Read the queries of a usage log, each with the tools that were called successfully for it.

    Args:
        folder (`str`): A folder written by [`UsageLog`].

    Returns:
        `list[Query]`: the queries, in the order of their last calls. Equal queries are one.

    Raises:
        `ValueError` or `OSError`: as [`load_usage`].
    """
    queries: dict[str, Query] = {}
    for row in load_usage(folder):
        text = row["messages"][0]["content"].strip()
        earlier = queries.pop(text, None)
        tools = [*(earlier.tools if earlier else ()), *_called_tools(row["messages"])]
        queries[text] = Query(row["id"], text, tuple(dict.fromkeys(tools)))
    return [query for text, query in queries.items() if text]


def load_usage_sessions(folder: str | os.PathLike) -> list[Query]:
    """Read which tools were used together: by one session, with pauses of at most half an hour.

    Args:
        folder (`str`): A folder written by [`UsageLog`].

    Returns:
        `list[Query]`: for each session, or part of one between pauses, its first query with all of its tools.

    Raises:
        `ValueError` or `OSError`: as [`load_usage`].
    """
    parts: dict[tuple[str, int], Query] = {}
    latest: dict[str, tuple[float, int]] = {}  # of each session the time and part of the last call
    for row, messages in _logged_calls(folder):
        session = row["id"].rpartition("/")[0]
        now = calendar.timegm(time.strptime(row["time"], TIME_FORMAT))
        before, part = latest.get(session, (now, 0))
        part += now - before > MAX_PAUSE
        latest[session] = (now, part)
        if row.get("outcome") == "ok" and messages[0]["role"] == "user":
            text = messages[0]["content"].strip()
            query = parts.get((session, part), Query(f"{session}/part{part}", text or "?", ()))
            tools = dict.fromkeys([*query.tools, *_called_tools(messages)])
            parts[session, part] = replace(query, tools=tuple(tools))
    return list(parts.values())


def _logged_calls(folder: str | os.PathLike) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield the calls of a log in order, each as its row and its messages; the first is a user's if a query found it."""
    paths = sorted(Path(folder).glob("trajectories-*.jsonl"))
    if not paths:
        raise OSError(f"{folder} holds no log: there is no trajectories-*.jsonl in it")
    for path in paths:
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # the text after the last line break is incomplete
            try:
                row = json.loads(line)
                messages = read_messages(row)
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            yield row, messages


def _called_tools(messages: list[dict[str, Any]]) -> list[str]:
    """Return the tools that were called successfully."""
    called = [message for message in messages if message.get("loss", True)]
    return [call["function"]["name"] for message in called for call in message.get("tool_calls", ())]


def _identity(path: Path) -> tuple[int, int] | None:
    found = path.stat() if path.exists() else None
    return found and (found.st_ino, found.st_mtime_ns)


def _now() -> str:
    return time.strftime(TIME_FORMAT, time.gmtime())
