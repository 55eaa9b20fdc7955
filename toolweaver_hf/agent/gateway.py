"""`Gateway`: search and calls over the tools of many MCP servers."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import anyio
from anyio import to_thread

from ..data.catalog import Tool
from .mcp_config import ClientConfig, Redactor, ServerConfig, redactor_of
from .schema import find_error
from .upstream import START_SECONDS, Ask, Upstream, UpstreamError


if TYPE_CHECKING:
    from mcp import types

    from .approvals import Approvals
    from .gateway_search import GatewaySearch


logger = logging.getLogger(__name__)

STARTS_AT_ONCE = 16
FIRST_ANSWER_SECONDS = 2.0  # after the first query, while queries wait for starting servers
RESERVED_NAMES = ("find_tools", "call_tool")


class Gateway:
    """A gateway to many MCP servers: `find_tools` searches their tools and `call_tool` calls one.

    The servers are started concurrently, monitored and restarted. While a server is down, its tools are not found and
    calls to them fail with a clear error; other servers are not affected.

    Needs the `mcp` package: `pip install "toolweaver-hf[mcp]"`.

    Args:
        servers (`Sequence[ServerConfig]`):
            The servers, as [`read_mcp_config`] reads them.
        search ([`GatewaySearch`]):
            The search over the tools.
        redact ([`Redactor`], *optional*):
            Removes secrets from logs and results. Defaults to a redactor of the secrets of `servers`.
        allow (`Sequence[str]`, *optional*, defaults to `("*",)`):
            Patterns of tool ids (`server.tool`). Only matching tools can be found and called.
        direct (`Sequence[str]`, *optional*):
            Patterns of the ids of tools that are listed directly, next to `find_tools` and `call_tool`.
        time_limit (`float`, *optional*, defaults to 60.0):
            Time limit of a call, in seconds.
        approvals ([`Approvals`], *optional*):
            The approved tools. Changed tools are reported or held back.
        on_index (`Callable`, *optional*):
            Called in a thread with the callable tools whenever they change.

    Attributes:
        upstreams (`dict[str, Upstream]`): The servers by name.
        tasks (`TaskGroup`): The background tasks of the running gateway.
        on_direct_change (`Callable`): Awaited when the directly listed tools change.

    Example:

    ```python
    >>> servers, clients = read_mcp_config("mcp.json")
    >>> async with Gateway(servers, GatewaySearch()).running() as gateway:
    ...     found = await gateway.find_tools("What time is it in Tokyo?")
    ```
    """

    def __init__(
        self,
        servers: Sequence[ServerConfig],
        search: GatewaySearch,
        redact: Redactor | None = None,
        allow: Sequence[str] = ("*",),
        direct: Sequence[str] = (),
        time_limit: float = 60.0,
        approvals: Approvals | None = None,
        on_index: Callable[[Sequence[Tool]], None] | None = None,
    ):
        self.redact = redact or redactor_of(servers)
        starts = anyio.CapacityLimiter(STARTS_AT_ONCE)
        self.upstreams = {
            config.name: Upstream(config, self.redact, self._on_change, time_limit, starts) for config in servers
        }
        self.search = search
        self._allow, self._direct = tuple(allow), tuple(direct)
        self._approvals, self._on_index = approvals, on_index
        self.on_direct_change: Callable[[], Awaitable[None]] | None = None
        self._changed = anyio.Event()
        self._found_any = anyio.Event()  # set once any tools are searchable, or no server has any
        self._indexed = anyio.Event()  # set once every server has started or failed, and all tools are searchable
        self._patience: float | None = None  # until when queries wait for all servers
        self._listed: dict[str, types.Tool] = {}  # as they were last indexed
        self._described: dict[str, Tool | None] = {}
        self._documents: dict[str, Tool] = {}  # callable tools by id
        self._searched: dict[str, Tool] = {}  # searchable tools by id
        self._searched_servers: set[str] = set()  # whose tools are searchable
        self._names = Names({})
        self._available: frozenset[str] = frozenset()
        self._held_back: frozenset[str] = frozenset()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Gateway]:
        """Run the servers while the context is open."""
        async with anyio.create_task_group() as tasks:
            self.tasks = tasks
            for upstream in self.upstreams.values():
                tasks.start_soon(upstream.run)
            tasks.start_soon(self._keep_index)
            tasks.start_soon(self.search.keep_up)
            try:
                yield self
            finally:
                tasks.cancel_scope.cancel()

    async def ready(self) -> None:
        """Wait until every server has started or failed, and all tools are searchable."""
        await self._indexed.wait()

    # The index

    def _on_change(self) -> None:
        self._changed.set()

    async def _keep_index(self) -> None:
        """Update the index whenever the servers' tools change; changes in quick succession are batched."""
        while True:
            await self._changed.wait()
            self._changed = anyio.Event()
            settled = all(upstream.state != "starting" for upstream in self.upstreams.values())
            began = anyio.current_time()
            try:
                await self._index()
            except Exception as error:  # keep the previous index
                logger.error("the tools could not be indexed: %s", self.redact(f"{type(error).__name__}: {error}"))
            if settled or self._searched:
                self._found_any.set()
            if settled:
                self._indexed.set()
                self.search.settle()
            # Half of the time at most is spent on the index while hundreds of servers start.
            await anyio.sleep(max(0.05, anyio.current_time() - began))

    def listed_tools(self) -> dict[str, types.Tool]:
        """Return the tools that the servers list, by id."""
        return {
            f"{upstream.name}.{name}": tool
            for upstream in self.upstreams.values()
            for name, tool in upstream.tools.items()
        }

    async def _index(self) -> None:
        listed, up = self.listed_tools(), {name for name, upstream in self.upstreams.items() if upstream.state == "up"}
        fresh = {tool_id: tool for tool_id, tool in listed.items() if self._listed.get(tool_id) is not tool}
        held_back = self._held_back & (listed.keys() - fresh.keys())
        if self._approvals is not None and fresh:
            held_back |= await to_thread.run_sync(self._approvals.check, fresh)
        described = self._described | await to_thread.run_sync(self._describe, fresh)
        described = {tool_id: described[tool_id] for tool_id in listed}
        documents = {i: tool for i, tool in described.items() if tool is not None and i not in held_back}
        before = self.direct_tools()
        self._listed, self._described = listed, described
        self._documents, self._names, self._held_back = documents, Names(documents), held_back
        self._available = frozenset(tool_id for tool_id in documents if tool_id.split(".", 1)[0] in up)
        if self.on_direct_change is not None and self.direct_tools() != before:
            await self.on_direct_change()
        # The tools are callable from here on, and searchable after the update below, which may take a while.
        if documents != self._searched:
            if self._on_index is not None:
                await to_thread.run_sync(self._on_index, list(documents.values()))
            await self.search.update(list(documents.values()))
            self._searched = documents
        self._searched_servers = up

    def _describe(self, listed: Mapping[str, types.Tool]) -> dict[str, Tool | None]:
        """Convert tools for the search, with the server as the category and without secrets; invalid ones to `None`."""
        described: dict[str, Tool | None] = {}
        for tool_id, tool in listed.items():
            server, name = tool_id.split(".", 1)
            row = self._redact_tool(tool)
            annotated = (row.get("annotations") or {}).get("title")
            row = {"description": row.get("description") or row.get("title") or annotated or name} | row
            row = {key: value for key, value in row.items() if value != ""} | {"id": tool_id, "category": server}
            row["inputSchema"] = {"type": "object"} | row.get("inputSchema", {})
            try:
                described[tool_id] = Tool.from_dict(row)
            except ValueError as error:
                logger.warning("a tool of %s is left out: %s", server, self.redact(str(error)))
                described[tool_id] = None
        return described

    def _redact_tool(self, tool: types.Tool) -> dict[str, Any]:
        """Return a tool's definition without secrets in its texts; its name and what arguments must match stay."""
        row = tool.model_dump(mode="json", by_alias=True, exclude_none=True)
        schemas = {key: self.redact.schema(row.pop(key)) for key in ("inputSchema", "outputSchema") if key in row}
        return self.redact(row) | {"name": tool.name} | schemas

    def _may(self, tool_id: str, client: ClientConfig | None) -> bool:
        patterns = [self._allow] if client is None else [self._allow, client.allow]
        return all(any(fnmatchcase(tool_id, pattern) for pattern in several) for several in patterns)

    def may_use_server(self, server: str, client: ClientConfig | None = None) -> bool:
        """Whether a client may use any tool of a server, and thus its resources and prompts."""
        patterns = [self._allow] if client is None else [self._allow, client.allow]
        return all(any(fnmatchcase(server, pattern.split(".", 1)[0]) for pattern in several) for several in patterns)

    def id_of(self, name: str, client: ClientConfig | None = None) -> str:
        """Return the id of a tool by its name, or the name itself if a client may use none or several of that name."""
        ids = self._ids_of(name, client)
        return ids[0] if len(ids) == 1 else name

    def _ids_of(self, name: str, client: ClientConfig | None) -> list[str]:
        return [tool_id for tool_id in self._names.resolve(name) if self._may(tool_id, client)]

    def direct_tools(self, client: ClientConfig | None = None) -> dict[str, dict[str, Any]]:
        """Return the tools that are listed directly to a client: the servers' definitions by name."""
        tools = {}
        for tool_id in sorted(self._available):
            if any(fnmatchcase(tool_id, pattern) for pattern in self._direct) and self._may(tool_id, client):
                name = re.sub(r"[^A-Za-z0-9_.-]", "_", self._names.of(tool_id))[:128]
                tools.setdefault(name, self._redact_tool(self._listed[tool_id]) | {"name": name, "id": tool_id})
        return tools

    # The two tools

    async def find_tools(self, query: str, k: int = 5, client: ClientConfig | None = None) -> dict[str, Any]:
        """Search the tools of all servers that are up.

        Args:
            query (`str`): The query.
            k (`int`, *optional*, defaults to 5): Maximum number of tools to return.
            client ([`ClientConfig`], *optional*): The client.

        Returns:
            `dict`: the `tools`, best first, each with its `name`, `description`, `inputSchema` and `probability`, and
            the names of `unavailable` servers, if any.

        Raises:
            `UpstreamError`: if no server is ready yet.
        """
        if self._patience is None:
            self._patience = anyio.current_time() + FIRST_ANSWER_SECONDS
        with anyio.CancelScope(deadline=self._patience):
            await self._indexed.wait()
        with anyio.move_on_after(START_SECONDS):
            await self._found_any.wait()
        if not self._found_any.is_set():
            raise UpstreamError("the servers are still starting: try again in a few seconds")
        allowed = self._available
        if client is not None or "*" not in self._allow:
            allowed = frozenset(tool_id for tool_id in allowed if self._may(tool_id, client))
        found = []
        if allowed and query.strip():
            found = await self.search(query, k, allowed)
        tools = []
        for tool_id, score in found:
            tool = self._documents.get(tool_id)
            if tool is not None:
                tools.append(
                    {
                        "name": self._names.of(tool_id),
                        "description": tool.description,
                        "inputSchema": tool.parameters,
                        "probability": round(math.exp(min(score, 0.0)), 4),
                    }
                )
        unavailable = [
            name
            for name, upstream in self.upstreams.items()
            if upstream.state != "up" or name not in self._searched_servers
        ]
        return {"tools": tools} | ({"unavailable": unavailable} if unavailable else {})

    async def call_tool(
        self,
        name: str,
        arguments: dict[str, Any],
        client: ClientConfig | None = None,
        meta: dict[str, Any] | None = None,
        on_progress: Callable[..., Any] | None = None,
        ask: Ask | None = None,
        extra: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Call a tool and return the server's result unchanged; secrets are removed from errors.

        Args:
            name (`str`): The tool's name or id.
            arguments (`dict`): The arguments, validated against the tool's schema before the request.
            client ([`ClientConfig`], *optional*): The client.
            meta (`dict`, *optional*): The `_meta` of the request.
            on_progress (`Callable`, *optional*): Called with the server's progress notifications.
            ask ([`Ask`], *optional*): Forwards the server's questions (sampling, elicitation) to the client.
            extra (`dict`, *optional*): Additional fields of the request, such as answers to a server's questions.

        Raises:
            `mcp.MCPError`: if the server responds with an error.
            `UpstreamError`: if there is no such tool, the arguments are invalid, or the server does not respond.
        """
        from mcp import types

        if self.id_of(name, client) not in self._documents:  # its server may still be starting
            with anyio.move_on_after(START_SECONDS):
                await self._indexed.wait()
        tool_id = self._resolve(name, client)
        server, tool_name = tool_id.split(".", 1)
        problem = find_error(arguments, self._documents[tool_id].parameters)
        if problem is not None:
            raise UpstreamError(f"the arguments of {name!r} do not match its inputSchema: {problem}")
        params = types.CallToolRequestParams(name=tool_name, arguments=arguments, _meta=meta or None, **(extra or {}))
        result = await self.upstreams[server].request(types.CallToolRequest(params=params), on_progress, ask)
        return self.redact(result) if result.get("isError") else result

    def _resolve(self, name: str, client: ClientConfig | None) -> str:
        """Return the id of the tool that a client calls by name or id."""
        candidates = self._ids_of(name, client)
        if len(candidates) > 1:
            raise UpstreamError(f"several servers have a tool {name!r}: call one of {', '.join(candidates)}")
        if name in self._held_back and self._may(name, client):
            raise UpstreamError(f"the tool {name!r} is held back: it has changed since it was approved")
        if not candidates:
            raise UpstreamError(f"there is no tool {name!r}: find_tools tells which there are")
        (tool_id,) = candidates
        upstream = self.upstreams[tool_id.split(".", 1)[0]]
        if upstream.state == "down":
            raise UpstreamError(f"the server {upstream.name!r} is down and being started again: {upstream.reason}")
        return tool_id


class Names:
    """Public names of tools: the tool's own name if it is unique, otherwise its id (`server.tool`).

    Args:
        tool_ids (`Iterable[str]`): The ids of all tools.
    """

    def __init__(self, tool_ids: Iterable[str]):
        self._ids = frozenset(tool_ids)
        self._ids_of: dict[str, list[str]] = {}
        for tool_id in sorted(self._ids):
            self._ids_of.setdefault(tool_id.split(".", 1)[1], []).append(tool_id)

    def of(self, tool_id: str) -> str:
        """Return the public name of a tool."""
        name = tool_id.split(".", 1)[1]
        unique = len(self._ids_of.get(name, ())) == 1 and name not in self._ids and name not in RESERVED_NAMES
        return name if unique else tool_id

    def resolve(self, name: str) -> list[str]:
        """Return the ids of the tools with a name. An id resolves to itself."""
        return [name] if name in self._ids else self._ids_of.get(name, [])
