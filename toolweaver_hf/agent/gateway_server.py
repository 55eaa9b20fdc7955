"""`GatewayServer`: the MCP server of a gateway."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import uuid
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import anyio

from .gateway import Gateway, Names
from .mcp_config import ClientConfig
from .questions import STATE_PREFIX, WaitingCalls
from .schema import find_error
from .upstream import QUESTION_SECONDS, Ask, Upstream, UpstreamError


if TYPE_CHECKING:
    from mcp import types
    from mcp.server.context import ServerRequestContext
    from mcp.server.lowlevel import Server

    from ..data.usage_log import UsageLog


logger = logging.getLogger(__name__)

MAX_SESSIONS = 1024
MAX_PAGES = 100
MAX_RESULTS = 50
MAX_QUERIES = 32  # of a session, whose calls may still come

INSTRUCTIONS = (
    "The tools of several servers stand behind this one. Search them with find_tools, then call one by its name with "
    "call_tool and arguments that obey its inputSchema."
)
FIND_TOOLS_SCHEMA = {
    "type": "object",
    "properties": {
        "query": {"type": "string", "minLength": 1, "description": "What is to be done, in plain words."},
        "k": {"type": "integer", "minimum": 1, "maximum": MAX_RESULTS, "default": 5, "description": "How many tools."},
    },
    "required": ["query"],
}
CALL_TOOL_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "The tool's name, as find_tools gives it."},
        "arguments": {"type": "object", "description": "Its arguments, which obey its inputSchema."},
    },
    "required": ["name"],
}


@dataclass
class Session:
    """The state of a client's session."""

    key: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    num_queries: int = 0
    queries: deque[tuple[int, str, frozenset[str]]] = field(default_factory=lambda: deque(maxlen=MAX_QUERIES))
    notify: Callable[[], Awaitable[None]] | None = None

    def query_of(self, tool_id: str) -> tuple[int, str | None]:
        """Return the number and text of the latest query that found a tool; 0 and `None` if there is none.

        Clients may search for several things before they call anything, and call tools that they know from before.
        """
        found = ((number, query) for number, query, tool_ids in reversed(self.queries) if tool_id in tool_ids)
        return next(found, (0, None))


class GatewayServer:
    """Handles the requests of MCP clients with a [`Gateway`].

    Resources, resource templates, prompts and completions of the servers are forwarded, as are progress notifications,
    cancellation, and, for clients that support them, sampling and elicitation.

    Args:
        gateway ([`Gateway`]):
            The gateway.
        clients (`Mapping[str, ClientConfig]`, *optional*):
            The clients that may connect over HTTP, by name. If empty, any client may connect.
        usage_log ([`UsageLog`], *optional*):
            Log of queries, calls and their outcomes.

    Attributes:
        server (`mcp.server.lowlevel.Server`): The MCP server, which needs a running gateway.

    Example:

    ```python
    >>> async with Gateway(servers, GatewaySearch()).running() as gateway:
    ...     async with Client(GatewayServer(gateway).server) as client:
    ...         found = await client.call_tool("find_tools", {"query": "What time is it in Tokyo?"})
    ```
    """

    def __init__(
        self,
        gateway: Gateway,
        clients: Mapping[str, ClientConfig] | None = None,
        usage_log: UsageLog | None = None,
    ):
        from mcp.server.lowlevel import NotificationOptions, Server
        from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler

        self.gateway = gateway
        self.usage_log = usage_log
        self._clients = {_digest(client.token): client for client in (clients or {}).values()}
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._resource_owners: dict[str, Upstream] = {}
        self._waiting = WaitingCalls(gateway.tasks, QUESTION_SECONDS)
        self._bus = InMemorySubscriptionBus()
        self.server: Server = Server(
            "toolweaver-gateway",
            version=version("toolweaver-hf"),
            instructions=INSTRUCTIONS,
            on_list_tools=_answer(self._list_tools),
            on_call_tool=_answer(self._call_tool),
            on_list_resources=_answer(self._list_resources),
            on_list_resource_templates=_answer(self._list_resource_templates),
            on_read_resource=_answer(self._read_resource),
            on_list_prompts=_answer(self._list_prompts),
            on_get_prompt=_answer(self._get_prompt),
            on_completion=_answer(self._complete),
            on_subscriptions_listen=ListenHandler(self._bus),
        )
        self.options = self.server.create_initialization_options(NotificationOptions(tools_changed=True))
        gateway.on_direct_change = self._tell_clients

    # Clients and sessions

    def client_of(self, authorization: str | None) -> ClientConfig | None:
        """Return the client that an `Authorization` header authenticates, if any."""
        scheme, _, token = (authorization or "").partition(" ")
        return self._clients.get(_digest(token.strip())) if scheme.lower() == "bearer" else None

    @property
    def needs_token(self) -> bool:
        """`bool`: Whether HTTP clients must authenticate with a token."""
        return bool(self._clients)

    def _client(self, context: ServerRequestContext) -> ClientConfig | None:
        return None if context.request is None else self.client_of(context.request.headers.get("authorization"))

    def _session(self, context: ServerRequestContext) -> Session:
        key = "stdio"
        if context.request is not None:
            headers, address = context.request.headers, context.request.client
            key = headers.get("mcp-session-id") or "/".join(
                [address.host if address else "", headers.get("user-agent", ""), _digest(headers.get("authorization"))]
            )
        session = self._sessions.setdefault(key, Session(key))
        self._sessions.move_to_end(key)
        session.notify = context.session.send_tool_list_changed
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return session

    async def _tell_clients(self) -> None:
        from mcp.server.subscriptions import ToolsListChanged

        await self._bus.publish(ToolsListChanged())
        for session in list(self._sessions.values()):
            with anyio.move_on_after(1), contextlib.suppress(Exception):  # the client may be gone
                await session.notify()

    # Tools

    async def _list_tools(self, context: ServerRequestContext, params: Any) -> dict[str, Any]:
        self._session(context)
        names = sorted(self.gateway.upstreams)
        shown = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
        tools = [
            {
                "name": "find_tools",
                "description": f"Find the tools that fit a task, best first. They come from these servers: {shown}.",
                "inputSchema": FIND_TOOLS_SCHEMA,
                "annotations": {"readOnlyHint": True},
            },
            {
                "name": "call_tool",
                "description": "Call a tool that find_tools has found.",
                "inputSchema": CALL_TOOL_SCHEMA,
            },
        ]
        direct = self.gateway.direct_tools(self._client(context)).values()
        return {"tools": tools + [{key: value for key, value in tool.items() if key != "id"} for tool in direct]}

    async def _call_tool(self, context: ServerRequestContext, params: types.CallToolRequestParams) -> Any:
        from mcp import MCPError
        from mcp.types import INVALID_PARAMS

        arguments = params.arguments or {}
        client = self._client(context)
        if params.name == "find_tools":
            problem = find_error(arguments, FIND_TOOLS_SCHEMA)
            return _error(problem) if problem else await self._find_tools(context, arguments, client)
        if params.name == "call_tool":
            problem = find_error(arguments, CALL_TOOL_SCHEMA)
            if problem:
                return _error(problem)
            name, arguments = arguments["name"], arguments.get("arguments", {})
        else:
            direct = self.gateway.direct_tools(client).get(params.name)
            if direct is None:
                raise MCPError(INVALID_PARAMS, f"Unknown tool: {params.name}")
            name = direct["id"]
        return await self._pass_call(context, params, name, arguments, client)

    async def _find_tools(
        self, context: ServerRequestContext, arguments: dict[str, Any], client: ClientConfig | None
    ) -> dict[str, Any]:
        session = self._session(context)
        try:
            found = await self.gateway.find_tools(arguments["query"], arguments.get("k", 5), client)
        except UpstreamError as error:
            return _error(str(error))
        except Exception as error:  # a failed search must not stop the server
            logger.exception("a search failed")
            return _error(self.gateway.redact(f"the search failed: {error}"))
        session.num_queries += 1
        ids = [self.gateway.id_of(tool["name"], client) for tool in found["tools"]]
        session.queries.append((session.num_queries, arguments["query"], frozenset(ids)))
        if self.usage_log is not None:
            self.usage_log.add_query(session.id, session.num_queries, arguments["query"], ids)
        return {"content": [_text(json.dumps(found, ensure_ascii=False))], "structuredContent": found}

    async def _pass_call(
        self,
        context: ServerRequestContext,
        params: types.CallToolRequestParams,
        name: str,
        arguments: dict[str, Any],
        client: ClientConfig | None,
    ) -> dict[str, Any]:
        from mcp import MCPError

        session = self._session(context)
        outcome = "cancelled"
        result: dict[str, Any] | None = None

        async def call(ask: Callable[[Any], Awaitable[Any]]) -> dict[str, Any]:
            return await self.gateway.call_tool(
                name,
                arguments,
                client,
                meta=_passed_meta(context.meta),
                on_progress=context.session.report_progress,
                ask=Ask(session.key, ask),
                extra={"input_responses": params.input_responses, "request_state": params.request_state},
            )

        try:
            if context.session.can_send_request:
                result = await call(partial(_ask, context))
            elif params.request_state in self._waiting:
                result = await self._waiting.go_on(session.key, params.request_state, params.input_responses)
            elif (params.request_state or "").startswith(STATE_PREFIX):
                raise UpstreamError("the question was answered too late or twice; the call may have taken effect")
            else:
                result = await self._waiting.begin(session.key, lambda ask: call(partial(_ask_later, context, ask)))
            outcome = "error" if result.get("isError") else "ok"
        except MCPError as error:
            outcome, result = "error", _error(error.message)
            raise
        except (UpstreamError, TimeoutError, PermissionError) as error:
            outcome, result = "no answer", _error(str(error))
        finally:
            asked = result is not None and result.get("resultType") == "input_required"
            if self.usage_log is not None and not asked:
                tool_id = self.gateway.id_of(name, client)
                number, query = session.query_of(tool_id)
                self.usage_log.add_call(session.id, number, query, tool_id, arguments, result, outcome)
                if query is not None and outcome == "ok":
                    self.gateway.search.learn(query, tool_id)
        return result

    # Resources, prompts and completions

    def _servers(self, context: ServerRequestContext, capability: str) -> list[Upstream]:
        """Return the running servers with a capability that the client may use."""
        return [
            upstream
            for upstream in self.gateway.upstreams.values()
            if getattr(upstream.capabilities, capability, None) is not None
            and self.gateway.may_use_server(upstream.name, self._client(context))
        ]

    async def _list(
        self, context: ServerRequestContext, capability: str, make_request: Callable[[Any], Any], key: str
    ) -> list[tuple[Upstream, dict[str, Any]]]:
        """List the items of all servers with a capability, with their servers; failing servers are skipped."""
        from mcp import MCPError
        from mcp.types import PaginatedRequestParams

        servers = self._servers(context, capability)
        items: dict[str, list[dict[str, Any]]] = {upstream.name: [] for upstream in servers}

        async def list_one(upstream: Upstream) -> None:
            cursor = None
            for _ in range(MAX_PAGES):
                try:
                    page = await upstream.request(make_request(PaginatedRequestParams(cursor=cursor)))
                except (MCPError, UpstreamError) as error:
                    logger.warning("%s does not list its %s: %s", upstream.name, capability, error)
                    return
                items[upstream.name] += page[key]
                cursor = page.get("nextCursor")
                if not cursor:
                    return

        async with anyio.create_task_group() as tasks:
            for upstream in servers:
                tasks.start_soon(list_one, upstream)
        return [(upstream, self.gateway.redact(item)) for upstream in servers for item in items[upstream.name]]

    async def _list_resources(self, context: ServerRequestContext, params: Any) -> dict[str, Any]:
        from mcp.types import ListResourcesRequest

        found = await self._list(context, "resources", lambda page: ListResourcesRequest(params=page), "resources")
        resources, owners = {}, {}
        for upstream, item in found:
            resources.setdefault(item["uri"], item)
            owners.setdefault(item["uri"], upstream)
        self._resource_owners = owners
        return {"resources": list(resources.values())}

    async def _list_resource_templates(self, context: ServerRequestContext, params: Any) -> dict[str, Any]:
        from mcp.types import ListResourceTemplatesRequest

        found = await self._list(
            context, "resources", lambda page: ListResourceTemplatesRequest(params=page), "resourceTemplates"
        )
        return {"resourceTemplates": [item for _, item in found]}

    async def _read_resource(
        self, context: ServerRequestContext, params: types.ReadResourceRequestParams
    ) -> dict[str, Any]:
        from mcp import types

        request = types.ReadResourceRequest(params=_without_envelope(params))
        servers = self._servers(context, "resources")
        owner = self._resource_owners.get(str(params.uri))
        if owner in servers:  # otherwise each server is tried, as the URI may come from a template
            servers = [owner]
        return await self._first_answer(servers, request, f"no server has the resource {params.uri}")

    async def _first_answer(self, servers: Iterable[Upstream], request: Any, message: str) -> dict[str, Any]:
        from mcp import MCPError
        from mcp.types import INVALID_PARAMS

        error: Exception = MCPError(INVALID_PARAMS, message)
        for upstream in servers:
            try:
                return await upstream.request(request)
            except MCPError as refused:
                error = refused
            except UpstreamError as failed:
                error = MCPError(INVALID_PARAMS, str(failed))
        raise error

    async def _prompts(self, context: ServerRequestContext) -> dict[str, tuple[Upstream, dict[str, Any]]]:
        from mcp.types import ListPromptsRequest

        found = await self._list(context, "prompts", lambda page: ListPromptsRequest(params=page), "prompts")
        by_id = {f"{upstream.name}.{item['name']}": (upstream, item) for upstream, item in found}
        names = Names(by_id)
        return {names.of(prompt_id): entry for prompt_id, entry in by_id.items()}

    async def _list_prompts(self, context: ServerRequestContext, params: Any) -> dict[str, Any]:
        return {"prompts": [item | {"name": name} for name, (_, item) in (await self._prompts(context)).items()]}

    async def _get_prompt(self, context: ServerRequestContext, params: types.GetPromptRequestParams) -> dict[str, Any]:
        from mcp import MCPError, types

        found = (await self._prompts(context)).get(params.name)
        if found is None:
            raise MCPError(types.INVALID_PARAMS, f"Unknown prompt: {params.name}")
        upstream, prompt = found
        request = types.GetPromptRequest(params=_without_envelope(params).model_copy(update={"name": prompt["name"]}))
        return await self._first_answer([upstream], request, "")

    async def _complete(self, context: ServerRequestContext, params: types.CompleteRequestParams) -> dict[str, Any]:
        from mcp import MCPError, types

        params = _without_envelope(params)
        servers = self._servers(context, "completions")
        if params.ref.type == "ref/prompt":
            found = (await self._prompts(context)).get(params.ref.name)
            if found is None:
                raise MCPError(types.INVALID_PARAMS, f"Unknown prompt: {params.ref.name}")
            servers = [upstream for upstream in servers if upstream is found[0]]
            params = params.model_copy(update={"ref": params.ref.model_copy(update={"name": found[1]["name"]})})
        return await self._first_answer(servers, types.CompleteRequest(params=params), "no server completes this")


async def _ask(context: ServerRequestContext, params: Any) -> Any:
    """Forward a server's question to the client of a request."""
    from mcp.shared.message import ServerMessageMetadata
    from mcp.types import ErrorData

    request, answer = _question(context, params)
    if isinstance(request, ErrorData):
        return request
    metadata = ServerMessageMetadata(related_request_id=context.request_id)
    return await context.session.send_request(request, answer, metadata=metadata)


async def _ask_later(
    context: ServerRequestContext, ask: Callable[[dict[str, Any]], Awaitable[Any]], params: Any
) -> Any:
    """Ask a client that repeats its call with the answer."""
    from mcp.types import INVALID_REQUEST, ErrorData

    request, answer = _question(context, params)
    if isinstance(request, ErrorData):
        return request
    found = await ask(request.model_dump(mode="json", by_alias=True, exclude_none=True))
    if found is None:
        return ErrorData(code=INVALID_REQUEST, message="the client called again without an answer")
    return answer.model_validate(found if isinstance(found, dict) else found.model_dump(by_alias=True))


def _question(context: ServerRequestContext, params: Any) -> tuple[Any, Any]:
    """Return the request for the client, or an error if it does not support it, and the type of the answer."""
    from mcp import types

    if isinstance(params, types.CreateMessageRequestParams):
        answer = types.CreateMessageResultWithTools if params.tools else types.CreateMessageResult
        request, able = types.CreateMessageRequest(params=params), "sampling"
    else:
        request, answer, able = types.ElicitRequest(params=params), types.ElicitResult, "elicitation"
    if getattr(context.session.client_capabilities, able, None) is None:
        request = types.ErrorData(code=types.INVALID_REQUEST, message=f"the client does not support {able}")
    return request, answer


def _passed_meta(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the part of a request's `_meta` that is forwarded to servers."""
    return {
        key: value
        for key, value in (meta or {}).items()
        if key not in ("progress_token", "progressToken") and not key.startswith("io.modelcontextprotocol/")
    }


def _without_envelope(params: Any) -> Any:
    return params.model_copy(update={"meta": _passed_meta(params.meta) or None})


def _answer(handler: Callable[..., Awaitable[dict[str, Any]]]) -> Callable[..., Awaitable[dict[str, Any]]]:
    """Add the result fields that newer protocol versions require; the SDK drops them for older versions."""

    async def answer(context: Any, params: Any) -> dict[str, Any]:
        return {"resultType": "complete", "ttlMs": 0, "cacheScope": "private"} | await handler(context, params)

    return answer


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _error(text: str) -> dict[str, Any]:
    return {"content": [_text(text)], "isError": True}


def _digest(token: str | None) -> str:
    return hashlib.sha256((token or "").encode()).hexdigest()
