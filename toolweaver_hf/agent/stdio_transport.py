"""A stdio transport for MCP servers with bounded memory, even if a server misbehaves."""

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


MAX_MESSAGE_BYTES = 64 * 2**20  # size of one message
MAX_GARBAGE_BYTES = 2**20  # invalid output between two messages
MAX_STDERR_BYTES = 2000  # end of stderr that is kept
STDERR_PAUSE = 0.01  # seconds between two reads, which limits stderr to a few MB per second
STOP_SECONDS = 2.0
GATEWAYS_VARIABLE = "TOOLWEAVER_GATEWAYS"  # tells a started server the files of the gateways above it


@asynccontextmanager
async def stdio_transport(config: ServerConfig) -> AsyncIterator[tuple[Any, Any]]:
    """Start a server and connect to it.

    The end of its standard error is kept for error messages. Invalid lines of its standard output are skipped. On exit
    of the context, the server's input is closed, and the server and its children are stopped.

    Yields:
        `tuple`: the streams of messages from and to the server, for `mcp.Client`.

    Raises:
        `OSError`: if the program cannot be started.
        `ConnectionError`: inside the context, if the server exits or writes too much invalid output.
    """
    from mcp.client.stdio import get_default_environment

    process = await anyio.open_process(
        [shutil.which(config.command, path=config.env.get("PATH")) or config.command, *config.args],
        env=get_default_environment() | config.env | {GATEWAYS_VARIABLE: os.environ.get(GATEWAYS_VARIABLE, "")},
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
                raise ConnectionError("it floods its standard output with invalid messages") from None
            continue
        garbage = 0
        try:
            await to_session.send(SessionMessage(message))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return  # the session has ended
    with anyio.move_on_after(1):  # wait for the exit status and the end of stderr
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
    # The server has closed its input: pending requests must fail.
    raise ConnectionError("it closed its standard input")


async def _read_stderr(stream: ByteReceiveStream, last_words: bytearray) -> None:
    with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, ConnectionError):
        async for chunk in stream:
            last_words += chunk[-MAX_STDERR_BYTES:]
            del last_words[:-MAX_STDERR_BYTES]
            await anyio.sleep(STDERR_PAUSE)


async def _stop(process: Process) -> None:
    """Stop a server as the protocol specifies: close its input, wait, then kill it and its children."""
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
    # Surviving children would keep the pipes open.
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
