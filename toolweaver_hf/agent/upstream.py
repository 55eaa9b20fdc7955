"""`Upstream`: a supervised connection of a gateway to one MCP server."""

from __future__ import annotations

import logging
import math
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import anyio

from .mcp_config import Redactor, ServerConfig
from .stdio_transport import stdio_transport


if TYPE_CHECKING:
    from mcp import Client, types


logger = logging.getLogger(__name__)

START_SECONDS = 60.0  # to start, initialize and list the tools
PROBE_SECONDS = 10.0  # to answer a ping, or to list the tools again
PROBE_PAUSE = 30.0  # between two health checks of an idle server
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 60.0
STEADY_SECONDS = 30.0  # uptime after which the back-off is reset
QUESTION_SECONDS = 600.0  # for a client to answer a server's question
MAX_TOOLS = 10_000  # per server


class UpstreamError(Exception):
    """A server gave no response; the message names the server and the reason."""


class Upstream:
    """An MCP server that is started, monitored, and restarted after failures with exponential back-off.

    Args:
        config ([`ServerConfig`]):
            The server's configuration.
        redact ([`Redactor`]):
            Removes secrets from the server's errors.
        on_change (`Callable`):
            Called whenever the server's tools or state change.
        time_limit (`float`, *optional*, defaults to 60.0):
            Time limit of a request in seconds; each progress notification resets it.
        starts (`anyio.CapacityLimiter`, *optional*):
            Limits how many servers start concurrently.

    Attributes:
        state (`str`): `"starting"`, `"up"` or `"down"`.
        reason (`str`): Why the server is down.
        tools (`dict[str, mcp.types.Tool]`): The most recently listed tools by name, kept while the server is down.
        restarts (`int`): Number of restarts.
    """

    def __init__(
        self,
        config: ServerConfig,
        redact: Redactor,
        on_change: Callable[[], None],
        time_limit: float = 60.0,
        starts: anyio.CapacityLimiter | None = None,
    ):
        self.name = config.name
        self.config = config
        self.redact = redact
        self.time_limit = time_limit
        self.state, self.reason, self.restarts = "starting", "", 0
        self.tools: dict[str, types.Tool] = {}
        self._on_change = on_change
        self._starts = starts or anyio.CapacityLimiter(1)
        self._client: Client | None = None
        self._mode = "legacy"  # lets servers send requests; "auto" is for servers that only know the newer protocol
        self._wake = anyio.Event()
        self._listing_changed = False
        self._settled = anyio.Event()  # set once the first start has succeeded or failed
        self._calls: list[tuple[Ask | None, anyio.CancelScope]] = []  # requests in flight

    async def run(self) -> None:
        """Keep the server running until cancelled."""
        from mcp import MCPError

        backoff = FIRST_BACKOFF
        while True:
            began = anyio.current_time()
            try:
                await self._connect()
            except Exception as error:  # any error of the transport ends only this connection
                self.reason = self.describe(error)
                if self._client is None and isinstance(_first(error), MCPError):
                    self._mode = "auto"  # it responds, but not to the older handshake
            if self._client is not None and anyio.current_time() - began > STEADY_SECONDS:
                backoff = FIRST_BACKOFF
            self._client = None
            self._enter("down")
            pause = backoff * random.uniform(0.75, 1.25)
            logger.warning("%s is down: %s; it is started again in %.1f s", self.name, self.reason, pause)
            await anyio.sleep(pause)
            backoff = min(2 * backoff, LONGEST_BACKOFF)
            self.restarts += 1

    async def _connect(self) -> None:
        """Open one connection and keep it until it ends."""
        from mcp import Client

        async with AsyncExitStack() as turn:
            await turn.enter_async_context(self._starts)
            with anyio.CancelScope(deadline=anyio.current_time() + START_SECONDS) as scope:
                client = Client(
                    self._transport(),
                    mode=self._mode,
                    cache=None,
                    message_handler=self._on_message,
                    sampling_callback=self._on_question,
                    elicitation_callback=self._on_question,
                    client_info=_client_info(),
                )
                async with client:
                    await self._list_tools(client)
                    scope.deadline = math.inf
                    await turn.aclose()
                    self._client = client
                    self._enter("up")
                    await self._watch(client)
            raise TimeoutError(f"it was not ready within {START_SECONDS:.0f} s")

    def _transport(self) -> Any:
        if self.config.command is not None:
            return stdio_transport(self.config)
        return _sse_transport(self.config) if self.config.sse else _http_transport(self.config)

    async def _watch(self, client: Client) -> None:
        """Check periodically that the server responds, and update its tools. Raises if it does not respond."""
        while True:
            with anyio.move_on_after(PROBE_PAUSE * random.uniform(0.75, 1.25)):
                await self._wake.wait()
            self._wake = anyio.Event()
            with anyio.CancelScope(deadline=anyio.current_time() + PROBE_SECONDS) as scope:
                if self._listing_changed or self._mode != "legacy":
                    self._listing_changed = False
                    await self._list_tools(client)
                else:
                    await _ping(client)
            if scope.cancelled_caught:
                raise TimeoutError(f"it does not answer: no answer to a ping within {PROBE_SECONDS:.0f} s")

    async def _list_tools(self, client: Client) -> None:
        from mcp.types import PaginatedRequestParams

        tools: dict[str, types.Tool] = {}
        cursor: str | None = None
        if client.server_capabilities.tools is not None:
            while True:
                page = await client.session.list_tools(params=PaginatedRequestParams(cursor=cursor))
                for tool in page.tools:
                    tools.setdefault(tool.name, tool)
                if len(tools) > MAX_TOOLS:
                    raise ValueError(f"it lists more than {MAX_TOOLS} tools")
                if not page.next_cursor or page.next_cursor == cursor:
                    break
                cursor = page.next_cursor
        if tools != self.tools:
            self.tools = tools
            self._on_change()

    def _enter(self, state: str) -> None:
        self.state = state
        if state == "up":
            self.reason = ""
            logger.info("%s is up: %d tools", self.name, len(self.tools))
        self._settled.set()
        self._on_change()

    async def _on_message(self, message: Any) -> None:
        from mcp.types import ToolListChangedNotification

        if isinstance(message, ToolListChangedNotification):
            self._listing_changed = True
            self._wake.set()

    async def _on_question(self, context: Any, params: Any) -> Any:
        """Forward a server's question (sampling or elicitation) to the client whose request it is handling."""
        from mcp.types import INVALID_REQUEST, ErrorData

        asking = {ask.client: (ask, scope) for ask, scope in self._calls if ask is not None}
        if len(asking) != 1:
            who = "no client" if not asking else "more than one client"
            return ErrorData(code=INVALID_REQUEST, message=f"{who} of the gateway waits for this server now")
        ((ask, scope),) = asking.values()
        scope.deadline = anyio.current_time() + QUESTION_SECONDS  # users need time to answer
        try:
            with anyio.fail_after(QUESTION_SECONDS):
                return await ask.ask(params)
        except Exception as error:
            return ErrorData(code=INVALID_REQUEST, message=self.describe(error))
        finally:
            scope.deadline = anyio.current_time() + self.time_limit

    async def settled(self) -> None:
        """Wait until the first start has succeeded or failed."""
        await self._settled.wait()

    @property
    def capabilities(self) -> types.ServerCapabilities | None:
        """`ServerCapabilities`: The server's capabilities; `None` while it is not up."""
        return None if self._client is None else self._client.server_capabilities

    async def request(
        self,
        request: types.ClientRequest,
        on_progress: Callable[[float, float | None, str | None], Awaitable[None]] | None = None,
        ask: Ask | None = None,
    ) -> dict[str, Any]:
        """Send a request and return the server's result unchanged.

        The request is never repeated if the server fails, because it may already have taken effect.

        Args:
            request (`mcp.types.ClientRequest`): The request.
            on_progress (`Callable`, *optional*): Called with the server's progress notifications.
            ask ([`Ask`], *optional*): Forwards the server's questions to the client of the request.

        Raises:
            `mcp.MCPError`: if the server responds with an error.
            `UpstreamError`: if the server is down, exits, exceeds the time limit, or sends an invalid response.
        """
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED
        from pydantic import ValidationError

        with anyio.move_on_after(self.time_limit):
            await self.settled()
        client = self._client
        if client is None:
            raise UpstreamError(f"the server {self.name!r} is {self.state}" + (f": {self.reason}" * bool(self.reason)))
        scope = anyio.CancelScope(deadline=anyio.current_time() + self.time_limit)

        async def progress(done: float, total: float | None, message: str | None) -> None:
            scope.deadline = anyio.current_time() + self.time_limit
            await on_progress(done, total, message)

        self._calls.append(call := (ask, scope))
        try:
            with scope:
                return await client.session.send_request(
                    request, _any_object(), progress_callback=progress if on_progress else None
                )
        except MCPError as error:
            if error.code != CONNECTION_CLOSED:
                if self.config.url:
                    self._wake.set()  # the HTTP transport also reports its own failures as MCPError
                raise MCPError(error.code, self.redact(error.message), self.redact(error.data)) from None
            reason = "it ended before it answered; the request may have taken effect"
        except ValidationError:
            reason = "its answer is not valid MCP"
        except (anyio.ClosedResourceError, anyio.BrokenResourceError, RuntimeError, OSError) as error:
            reason = self.describe(error)
        else:
            reason = f"it did not answer within {self.time_limit:g} s"
        finally:
            self._calls.remove(call)
        self._wake.set()  # check its health immediately
        raise UpstreamError(f"the server {self.name!r} failed: {reason}")

    def describe(self, error: BaseException) -> str:
        """Return a one-line description of an error, without secrets."""
        error = _first(error)
        if isinstance(error, FileNotFoundError) and error.filename:
            return self.redact(f"there is no such program or folder: {error.filename}")
        text = " ".join(str(error).split())[:500]
        return self.redact(f"{text}" if text else type(error).__name__)


class Ask:
    """Forwards a server's questions to a client of the gateway.

    Args:
        client (`Hashable`): Identifier of the client.
        ask (`Callable`): Sends the parameters of the server's request to the client and returns its answer.
    """

    def __init__(self, client: Any, ask: Callable[[Any], Awaitable[Any]]):
        self.client = client
        self.ask = ask


async def _ping(client: Client) -> None:
    """Raise unless the server responds; an error because it does not support ping counts as a response."""
    from mcp import MCPError
    from mcp.types import INVALID_PARAMS, METHOD_NOT_FOUND

    try:
        await client.session.send_ping()
    except MCPError as error:
        if error.code not in (METHOD_NOT_FOUND, INVALID_PARAMS):
            raise


@asynccontextmanager
async def _http_transport(config: ServerConfig) -> AsyncIterator[tuple[Any, Any]]:
    import httpx2  # comes with mcp
    from mcp.client.streamable_http import streamable_http_client

    timeout = httpx2.Timeout(START_SECONDS, read=None)  # each request has its own time limit
    async with (
        httpx2.AsyncClient(headers=config.headers, timeout=timeout, verify=_ssl_context()) as http_client,
        streamable_http_client(config.url, http_client=http_client) as streams,
    ):
        yield streams


def _sse_transport(config: ServerConfig) -> Any:
    import httpx2
    from mcp.client.sse import sse_client

    def make_client(**options: Any) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(**options, verify=_ssl_context())

    return sse_client(config.url, config.headers, START_SECONDS, None, make_client)


@cache
def _ssl_context() -> ssl.SSLContext:
    """Shared by all servers, because loading the certificates is slow."""
    return ssl.create_default_context()


def _first(error: BaseException) -> BaseException:
    while exceptions := getattr(error, "exceptions", None):  # an ExceptionGroup
        error = exceptions[0]
    return error


@cache
def _any_object() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(dict[str, Any])


@cache
def _client_info() -> types.Implementation:
    from mcp.types import Implementation

    return Implementation(name="toolweaver-gateway", version=version("toolweaver-hf"))
