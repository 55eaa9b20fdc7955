"""`MCPTools`: the tools of MCP servers as functions for an agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..data.catalog import ToolCatalog


if TYPE_CHECKING:
    from mcp import Client, ClientSession, StdioServerParameters


class MCPTools(Mapping[str, Callable[..., Any]]):
    """A mapping of tool ids to functions that call the tools of MCP servers, for [`ToolAgent`].

    As a context manager, it connects to the server and lists its tools. Within an event loop, wrap an open session with
    [`MCPTools.from_session`].

    Needs the `mcp` package: `pip install "toolweaver-hf[mcp]"`.

    Args:
        server (`StdioServerParameters` or `str`):
            Command of a stdio server, URL of an HTTP server, or any other argument of `mcp.Client`. The tools of a
            mapping of names to servers are merged into one catalog, with ids such as `github.search` (see
            [`ToolCatalog.from_servers`]); servers without tools are left out.
        time_limit (`float`, *optional*):
            Time limit of a request, in seconds.

    Attributes:
        catalog ([`ToolCatalog`]): The tools of the servers.

    Raises:
        `ImportError`: if the `mcp` package is not installed.
        `ValueError`: if no server has tools, or one has an invalid tool.

    Example:

    ```python
    >>> from mcp import StdioServerParameters
    >>> from toolweaver_hf import MCPTools, ToolAgent

    >>> with MCPTools(StdioServerParameters(command="mcp-server-time")) as tools:
    ...     agent = ToolAgent.from_pretrained("out/agent", tools, catalog=tools.catalog)
    ...     print(agent("What time is it in Tokyo?").answer)
    ```
    """

    def __init__(self, server: StdioServerParameters | str | Any, time_limit: float | None = None):
        self._server = server
        self._time_limit = time_limit
        self.catalog: ToolCatalog | None = None

    def __enter__(self) -> MCPTools:
        try:
            from anyio.from_thread import start_blocking_portal
            from mcp import Client
        except ImportError:
            raise ImportError('tools of MCP servers need the mcp package: pip install "toolweaver-hf[mcp]"') from None
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            self._call = portal.call
            clients = {}
            for name, server in _by_name(self._server).items():
                client = Client(server, read_timeout_seconds=self._time_limit)
                clients[name] = stack.enter_context(portal.wrap_async_context_manager(client))
            self._set_catalog(clients, {name: self._call(_list_tools, client) for name, client in clients.items()})
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.__exit__(*exception)

    @classmethod
    async def from_session(cls, session: Client | ClientSession | Mapping[str, Client | ClientSession]) -> MCPTools:
        """Wrap an open session of the running event loop, or a mapping of server names to sessions.

        Run the agent in another thread, so that the loop can serve its calls: `await asyncio.to_thread(agent, query)`.
        """
        loop = asyncio.get_running_loop()
        tools = cls(None)
        tools._call = lambda function, *args: asyncio.run_coroutine_threadsafe(function(*args), loop).result()
        sessions = _by_name(session)
        tools._set_catalog(sessions, {name: await _list_tools(one) for name, one in sessions.items()})
        return tools

    def _set_catalog(self, clients: dict[str | None, Client | ClientSession], listed: dict[str | None, Any]) -> None:
        catalogs = {name: ToolCatalog.from_functions(tools) for name, tools in listed.items() if tools or name is None}
        self.catalog = catalogs[None] if None in catalogs else ToolCatalog.from_servers(catalogs)
        tools = [(client, tool.id) for name, client in clients.items() for tool in catalogs.get(name, ())]
        self._routes = dict(zip(self.catalog.ids, tools, strict=True))

    def __getitem__(self, tool_id: str) -> Callable[..., Any]:
        if self.catalog is None or tool_id not in self.catalog:
            raise KeyError(tool_id)
        client, name = self._routes[tool_id]
        return lambda **arguments: self._call(_call_tool, client, name, arguments)

    def __iter__(self) -> Iterator[str]:
        return iter(() if self.catalog is None else self.catalog.ids)

    def __len__(self) -> int:
        return 0 if self.catalog is None else len(self.catalog)


def _by_name(servers: Any) -> dict[str | None, Any]:
    """Return a mapping of names to servers; the name of a single server is `None`."""
    return dict(servers) if isinstance(servers, Mapping) else {None: servers}


async def _list_tools(client: Client | ClientSession) -> list[dict[str, Any]]:
    from mcp import ClientSession
    from mcp.types import PaginatedRequestParams

    tools, cursor = [], None
    while True:
        if isinstance(client, ClientSession):
            page = await client.list_tools(params=PaginatedRequestParams(cursor=cursor))
        else:
            page = await client.list_tools(cursor=cursor)
        tools += [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in page.tools]
        cursor = page.next_cursor
        if not cursor:
            return tools


async def _call_tool(client: Client | ClientSession, name: str, arguments: dict[str, Any]) -> Any:
    """Call a tool and return its structured content, or else its text; raise its errors."""
    result = await client.call_tool(name, arguments)
    parts = [_read_part(part) for part in result.content]
    if all(isinstance(part, str) for part in parts):
        parts = "\n".join(parts)
    if result.is_error:
        raise RuntimeError(parts)
    return parts if result.structured_content is None else result.structured_content


def _read_part(part: Any) -> str | dict[str, Any]:
    """Return the text of a content part, or the metadata of a binary part such as an image, without its bytes."""
    resource = getattr(part, "resource", part)
    if hasattr(resource, "text"):
        return resource.text
    return part.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"data": True, "resource": {"blob"}})
