"""A connection to an MCP server on its standard input and output that no misbehavior of the server can flood."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import ByteReceiveStream, Process


if TYPE_CHECKING:
    from .mcp_config import ServerConfig


MAX_MESSAGE_BYTES = 64 * 2**20  # of one message
MAX_GARBAGE_BYTES = 2**20  # between two messages
MAX_STDERR_BYTES = 2000  # that are kept
STDERR_PAUSE = 0.01  # seconds after each read: what a server can write to it is bounded by a few MB a second
STOP_SECONDS = 2.0


@asynccontextmanager
async def stdio_transport(config: ServerConfig) -> AsyncIterator[tuple[Any, Any]]:
    """Start a server and connect to it.

    What it writes to its standard error is read and its end kept. Lines on its standard output that are no messages are
    skipped. The server ends with the context: its input is closed, and then it and its children are stopped.

    Yields:
        `tuple`: the streams of messages from the server and to it, as `mcp.Client` takes them.

    Raises:
        `OSError`: if the program cannot be started.
        `ConnectionError`: inside the context, when the server ends, or writes too much that is no message.
    """
    from mcp.client.stdio import get_default_environment

    process = await anyio.open_process(
        [shutil.which(config.command, path=config.env.get("PATH")) or config.command, *config.args],
        env=get_default_environment() | config.env,
        cwd=config.cwd,
        start_new_session=sys.platform != "win32",
    )
    to_session, from_server = anyio.create_memory_object_stream[Any](0)
    to_server, from_session = anyio.create_memory_object_stream[Any](0)
    last_words = bytearray()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_read_stderr, process.stderr, last_words)
            tasks.start_soon(_read_messages, process, to_session, last_words)
            tasks.start_soon(_write_messages, process, from_session)
            yield from_server, to_server
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await _stop(process)
            for stream in (to_session, from_server, to_server, from_session):
                stream.close()


async def _read_messages(process: Process, to_session: Any, last_words: bytearray) -> None:
    from mcp.shared.message import SessionMessage
    from mcp.types import jsonrpc_message_adapter

    garbage = 0
    async for line in _lines(process.stdout):
        try:
            if not line.lstrip().startswith(b"{"):
                raise ValueError("no JSON object")
            message = jsonrpc_message_adapter.validate_json(line, by_name=False)
        except ValueError:
            garbage += len(line) + 1
            if garbage > MAX_GARBAGE_BYTES:
                raise ConnectionError("it floods its standard output with what is no message") from None
            continue
        garbage = 0
        try:
            await to_session.send(SessionMessage(message))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return  # the session ends first
    with anyio.move_on_after(1):  # for its exit status and its last words
        await process.wait()
        await anyio.sleep(2 * STDERR_PAUSE)
    ending = "it closed its standard output" if process.returncode is None else f"it ended ({process.returncode})"
    words = " ".join(last_words.decode("utf-8", "replace").split())[-300:]
    raise ConnectionError(f"{ending}: {words}" if words else ending)


async def _lines(stream: ByteReceiveStream) -> AsyncIterator[bytes]:
    parts: list[bytes] = []
    size = 0
    with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, ConnectionError):
        async for chunk in stream:
            *lines, rest = chunk.split(b"\n")
            for line in lines:
                yield b"".join([*parts, line])
                parts, size = [], 0
            parts.append(rest)
            size += len(rest)
            if size > MAX_MESSAGE_BYTES:
                raise OverflowError(f"it wrote a line of more than {MAX_MESSAGE_BYTES} bytes")


async def _write_messages(process: Process, from_session: Any) -> None:
    with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, ConnectionError):
        async for message in from_session:
            text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
            await process.stdin.send(text.encode("utf-8", "replace") + b"\n")
        return
    # The server has closed its input: whoever waits for it is told so.
    raise ConnectionError("it closed its standard input")


async def _read_stderr(stream: ByteReceiveStream, last_words: bytearray) -> None:
    with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, ConnectionError):
        async for chunk in stream:
            last_words += chunk[-MAX_STDERR_BYTES:]
            del last_words[:-MAX_STDERR_BYTES]
            await anyio.sleep(STDERR_PAUSE)


async def _stop(process: Process) -> None:
    """End a server as the protocol asks: close its input, wait, then stop it and its children."""
    with suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        await process.stdin.aclose()
    for sign in (None, "SIGTERM", "SIGKILL"):
        if sign is not None:
            with suppress(OSError):
                if sys.platform == "win32":
                    process.kill()
                else:
                    os.killpg(process.pid, getattr(signal, sign))
        deadline = anyio.current_time() + STOP_SECONDS
        while process.returncode is None and anyio.current_time() < deadline:
            await anyio.sleep(0.01)
        if process.returncode is not None:
            break
    # Children that outlive it would keep its pipes open.
    if sys.platform != "win32":
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdout, process.stderr):
        with suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
            await stream.aclose()
    transport = getattr(getattr(process, "_process", None), "_transport", None)
    if transport is not None:
        with suppress(OSError):
            transport.close()
