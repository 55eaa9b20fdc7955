"""A gateway as a process: where it listens, where its messages go, and how it ends.

```bash
toolweaver gateway mcp.json
```
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio

from ..data.usage_log import UsageLog
from .approvals import Approvals
from .gateway import Gateway
from .gateway_search import GatewaySearch
from .gateway_server import GatewayServer
from .mcp_config import ClientConfig, Redactor, read_mcp_config, redactor_of


logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run_gateway(
    config: str | os.PathLike,
    model: str | None = None,
    encoder: str | None = None,
    port: int | None = None,
    host: str = "127.0.0.1",
    allow: Sequence[str] = ("*",),
    direct: Sequence[str] = (),
    time_limit: float = 60.0,
    pin: bool = False,
    approve: bool = False,
    log: str | os.PathLike | None = None,
    redact: bool = False,
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Run a gateway until its client leaves or a signal comes.

    Args:
        config (`str`):
            The servers' `mcp.json`.
        model (`str`, *optional*):
            Folder or repository of an aligned model that finds the tools. By default words and meaning do.
        encoder (`str`, *optional*):
            The sentence-transformers model of the search without an aligned model.
        port (`int`, *optional*):
            Port to serve at by streamable HTTP; 0 for any. By default it is standard input and output.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on.
        allow (`Sequence[str]`, *optional*, defaults to `("*",)`):
            Patterns of the ids, `server.tool`, of the only tools that may be used.
        direct (`Sequence[str]`, *optional*):
            Patterns of the ids of tools that are listed as they are, too.
        time_limit (`float`, *optional*, defaults to 60.0):
            Seconds for a call.
        pin (`bool`, *optional*, defaults to `False`):
            Whether tools that have changed since they were approved are held back.
        approve (`bool`, *optional*, defaults to `False`):
            Whether to approve all tools as they are now, and end.
        log (`str`, *optional*):
            Folder of the log of queries, calls and outcomes (see [`UsageLog`]).
        redact (`bool`, *optional*, defaults to `False`):
            Whether arguments and outcomes are left out of the log.
        cache_dir (`str`, *optional*, defaults to `"~/.cache/toolweaver"`):
            Folder for approvals and embeddings.

    Raises:
        `ValueError`: naming what is wrong in the file or the options, or without the `mcp` package.
        `OSError`: if the file cannot be read, or the port is taken.
    """
    if find_spec("mcp") is None:
        raise ValueError('the gateway needs the mcp package: pip install "toolweaver-hf[mcp]"')
    if time_limit <= 0:
        raise ValueError(f"the time limit must be positive, not {time_limit}")
    servers, clients = read_mcp_config(config)
    hide = redactor_of(servers, {client.token: "[token]" for client in clients.values() if client.token})
    _log_to_stderr(hide)
    cache = Path(cache_dir or "~/.cache/toolweaver").expanduser()
    name = sha256(os.path.realpath(config).encode()).hexdigest()[:16]
    approvals = Approvals(cache / f"approved-{name}.json", pin, approve)
    usage_log = UsageLog(log, redact, hide) if log else None
    gateway = Gateway(
        servers,
        GatewaySearch(model, encoder, cache / f"embeddings-{name}"),
        hide,
        allow=allow,
        direct=direct,
        time_limit=time_limit,
        approvals=approvals,
        on_index=usage_log.save_catalog if usage_log else None,
    )
    if approve:
        anyio.run(_approve, gateway, approvals)
        return
    threading.Thread(target=import_module, args=("toolweaver_hf.retrieval",), daemon=True).start()  # takes seconds
    if port is None:
        anyio.run(serve_stdio, gateway, clients, usage_log)
    else:
        if host not in LOOPBACK and not any(client.token for client in clients.values()):
            logger.warning("whoever reaches %s may call every tool: give 'clients' with tokens in the file", host)
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        print(f"{len(servers)} servers at http://{host}:{listener.getsockname()[1]}/mcp", flush=True)
        anyio.run(serve_http, gateway, clients, usage_log, host, listener)


async def serve_stdio(gateway: Gateway, clients: Mapping[str, ClientConfig], usage_log: UsageLog | None) -> None:
    """Serve one client on standard input and output until it closes them, or a signal comes."""
    from mcp.server.stdio import stdio_server

    done = anyio.Event()
    stopped = False

    async def speak() -> None:
        server = GatewayServer(gateway, clients, usage_log)
        async with stdio_server() as streams:
            await server.server.run(*streams, server.options)
        done.set()

    async def wait_for_signal() -> None:
        nonlocal stopped
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                stopped = True
                done.set()
                return

    async with anyio.create_task_group() as tasks:
        async with gateway.running():
            tasks.start_soon(speak)
            tasks.start_soon(wait_for_signal)
            await done.wait()
        if stopped:
            sys.stderr.flush()
            os._exit(0)  # a thread waits for a line of input that may never come
        tasks.cancel_scope.cancel()


async def serve_http(
    gateway: Gateway,
    clients: Mapping[str, ClientConfig],
    usage_log: UsageLog | None,
    host: str,
    listener: socket.socket,
) -> None:
    """Serve clients by streamable HTTP until a signal comes."""
    import uvicorn  # comes with mcp

    async with gateway.running():
        server = GatewayServer(gateway, clients, usage_log)
        app = server.server.streamable_http_app(host=host)
        if server.needs_token:
            app = _RequireToken(app, server)
        config = uvicorn.Config(app, log_config=None, log_level="warning", timeout_graceful_shutdown=2)
        await uvicorn.Server(config).serve(sockets=[listener])


class _RequireToken:
    """Turns away requests that do not show the token of a client."""

    def __init__(self, app: Any, server: GatewayServer):
        self.app, self.server = app, server

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        if scope["type"] == "http" and self.server.client_of(Headers(scope=scope).get("authorization")) is None:
            answer = PlainTextResponse("unknown token", 401, {"WWW-Authenticate": "Bearer"})
            return await answer(scope, receive, send)
        await self.app(scope, receive, send)


async def _approve(gateway: Gateway, approvals: Approvals) -> None:
    async with anyio.create_task_group() as tasks:
        for upstream in gateway.upstreams.values():
            tasks.start_soon(upstream.run)
        for upstream in gateway.upstreams.values():
            await upstream.settled()
        tasks.cancel_scope.cancel()
    approvals.check(gateway.listed_tools())
    for upstream in gateway.upstreams.values():
        print(f"{upstream.name}: {len(upstream.tools)} tools approved" if upstream.tools else f"{upstream.name}: none")


def _log_to_stderr(redact: Redactor) -> None:
    """Send all messages to standard error, without secrets."""

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return redact(super().format(record))

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("toolweaver_hf").setLevel(logging.INFO)
    for name in ("mcp", "client"):  # of what servers do wrong, one line is enough
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", module="mcp")
