"""Run a gateway as a process, over stdio or HTTP.

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

from ..data.usage_log import UsageLog, load_usage_queries
from .approvals import Approvals
from .gateway import Gateway
from .gateway_search import GatewaySearch
from .gateway_server import GatewayServer
from .mcp_config import ClientConfig, Redactor, read_mcp_config, redactor_of
from .stdio_transport import GATEWAYS_VARIABLE


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
    """Run a gateway until its client disconnects or a signal is received.

    Args:
        config (`str`):
            The servers' `mcp.json`.
        model (`str`, *optional*):
            Folder or repository of an aligned model. Without it, tools are ranked by BM25 and embeddings.
        encoder (`str`, *optional*):
            The sentence-transformers model, used without an aligned model.
        port (`int`, *optional*):
            Port of the streamable HTTP server; 0 for any free port. Defaults to serving over stdio.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on.
        allow (`Sequence[str]`, *optional*, defaults to `("*",)`):
            Patterns of tool ids (`server.tool`). Only matching tools can be found and called.
        direct (`Sequence[str]`, *optional*):
            Patterns of the ids of tools that are also listed directly.
        time_limit (`float`, *optional*, defaults to 60.0):
            Time limit of a call, in seconds.
        pin (`bool`, *optional*, defaults to `False`):
            Whether to hold back tools that have changed since they were approved.
        approve (`bool`, *optional*, defaults to `False`):
            Whether to approve all tools in their current version and exit.
        log (`str`, *optional*):
            Folder of the usage log (see [`UsageLog`]), from which search learns.
        redact (`bool`, *optional*, defaults to `False`):
            Whether to replace the values of arguments and the results in the log by a placeholder.
        cache_dir (`str`, *optional*, defaults to `"~/.cache/toolweaver"`):
            Cache folder of approvals and embeddings.

    Raises:
        `ValueError`: if the file or an option is invalid, or the `mcp` package is not installed.
        `OSError`: if the file cannot be read, the model cannot be found, the port is in use, or approvals that `approve`
            asks for cannot be stored.
    """
    if find_spec("mcp") is None:
        raise ValueError('the gateway needs the mcp package: pip install "toolweaver-hf[mcp]"')
    if time_limit <= 0:
        raise ValueError(f"the time limit must be positive, not {time_limit}")
    above, real_path = os.environ.get(GATEWAYS_VARIABLE, "").split(os.pathsep), os.path.realpath(config)
    if real_path in above:
        raise ValueError(f"{config} lists this gateway as one of its own servers: remove that entry")
    os.environ[GATEWAYS_VARIABLE] = os.pathsep.join([*filter(None, above), real_path])
    servers, clients = read_mcp_config(config)
    if model is not None:
        _check_model(model)
    hide = redactor_of(servers, {client.token: "[token]" for client in clients.values()})
    _log_to_stderr(hide)
    cache = Path(cache_dir or "~/.cache/toolweaver").expanduser()
    name = sha256(real_path.encode()).hexdigest()[:16]
    approvals = Approvals(cache / f"approved-{name}.json", pin, approve)
    usage_log = UsageLog(log, redact, hide) if log else None
    usage = _read_usage(log) if log else []
    gateway = Gateway(
        servers,
        GatewaySearch(model, encoder, cache / f"embeddings-{name}", usage=usage),
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
        if host not in LOOPBACK and not clients:
            logger.warning("anyone who can reach %s can call every tool: add 'clients' with tokens to the file", host)
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        print(f"{len(servers)} servers at http://{host}:{listener.getsockname()[1]}/mcp", flush=True)
        anyio.run(serve_http, gateway, clients, usage_log, host, listener)


def _check_model(model: str) -> None:
    """Raise before serving if there is no such model; it is loaded once the servers have started."""
    from transformers.utils import cached_file

    from ..tool_codes_file import TOOL_CODES_FILE

    if cached_file(model, TOOL_CODES_FILE, _raise_exceptions_for_missing_entries=False):
        return
    from ..text_expert import TEXT_EXPERT_FILE  # takes seconds, which a folder for search alone has to wait

    if not cached_file(model, TEXT_EXPERT_FILE, _raise_exceptions_for_missing_entries=False):
        raise ValueError(
            f"--model {model} holds neither {TEXT_EXPERT_FILE} nor {TOOL_CODES_FILE}: give the folder of an aligned model"
        )


def _read_usage(folder: str | os.PathLike) -> list[tuple[str, str]]:
    """Return the queries of a usage log, each with a tool that was called for it; none if it cannot be read."""
    try:
        return [(query.text, tool_id) for query in load_usage_queries(folder) for tool_id in query.tools]
    except OSError:
        return []  # there is none yet
    except ValueError as error:
        logger.warning("nothing is learned from the log: %s", error)
        return []


async def serve_stdio(gateway: Gateway, clients: Mapping[str, ClientConfig], usage_log: UsageLog | None) -> None:
    """Serve one client over stdio until it disconnects or a signal is received."""
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
            os._exit(0)  # a thread still blocks on reading stdin
        tasks.cancel_scope.cancel()


async def serve_http(
    gateway: Gateway,
    clients: Mapping[str, ClientConfig],
    usage_log: UsageLog | None,
    host: str,
    listener: socket.socket,
) -> None:
    """Serve clients over streamable HTTP until a signal is received."""
    import uvicorn  # comes with mcp

    async with gateway.running():
        server = GatewayServer(gateway, clients, usage_log)
        app = server.server.streamable_http_app(host=host)
        if server.needs_token:
            app = _RequireToken(app, server)
        config = uvicorn.Config(app, log_config=None, log_level="warning", timeout_graceful_shutdown=2)
        await uvicorn.Server(config).serve(sockets=[listener])


class _RequireToken:
    """Rejects requests without the token of a client."""

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
    """Log to standard error, with secrets redacted."""

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return redact(super().format(record))

    os.environ.setdefault("TQDM_DISABLE", "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO)
    handler.setFormatter(Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("toolweaver_hf").setLevel(logging.INFO)
    for name in ("mcp", "client", "bitsandbytes"):  # `Upstream` already logs each failure in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", module="mcp")
