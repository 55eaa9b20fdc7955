"""`SimulatedTools`: recorded or simulated answers of tools, for reproducible runs of an agent.

```bash
toolweaver serve-tools --catalog tools.jsonl --recordings answers.jsonl
```
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from ..agent.run import from_json
from ..agent.schema import NOTHING_REMOTE, find_error
from ..data.catalog import Tool, ToolCatalog
from ..data.trajectories import find_results, load_trajectories
from ..files import read_rows, truncate_partial_line
from .chat_endpoint import DEFAULT_URL, ChatEndpoint


SIMULATION_INSTRUCTIONS = """\
You stand for a web API. You get a JSON object with the description of one of its functions, arguments of a call, \
and answers that the function gave to other calls. Reply with one JSON object: what the function answers to this call. \
It agrees with the arguments, holds plausible concrete values, has the form of the other answers or of the schema \
where there is one, and is short."""


MAX_REFERENCES = 2
"""How many references lie in one another before a simulated answer holds only what is required."""


class SimulatedTools(Mapping[str, Callable[..., Any]]):
    """The tools of a catalog as functions for an agent, with the same answers in every run.

    A call is answered by the first available source: a recorded answer for the same tool and arguments; the tool's
    real function; a chat model; or a random value of the tool's `metadata["output_schema"]`, seeded by tool and
    arguments. Answers of functions and of the model are recorded. As with a real API, arguments that do not match the
    tool's schema are an error (`ValueError`).

    Args:
        catalog ([`ToolCatalog`]): The tools.
        path (`str`, *optional*):
            JSONL file of recorded answers, with rows of `tool`, `arguments` and `answer`. New answers are appended.
        functions (`Mapping[str, Callable]`, *optional*): Real functions, by tool id.
        endpoint ([`ChatEndpoint`], *optional*): The model that simulates answers.
        seed (`int`, *optional*, defaults to 0): Seed of simulated answers.

    Raises:
        `ValueError`: naming the file and line that is wrong.

    Example:

    ```python
    >>> tools = SimulatedTools(catalog, "answers.jsonl")
    >>> tools.record_trajectories(load_trajectories("trajectories.jsonl"))
    >>> agent = ToolAgent.from_pretrained("out/agent", tools)
    ```
    """

    def __init__(
        self,
        catalog: ToolCatalog,
        path: str | os.PathLike | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        endpoint: ChatEndpoint | None = None,
        seed: int = 0,
    ):
        self.catalog, self.path, self.endpoint, self.seed = catalog, path, endpoint, seed
        self.functions = functions or {}
        self._answers: defaultdict[str, dict[str, Any]] = defaultdict(dict)  # of each tool, by arguments
        self._lock = threading.Lock()
        if path is not None and os.path.exists(path):
            truncate_partial_line(path)
            for place, row in read_rows(path):
                if not isinstance(row.get("tool"), str) or "answer" not in row:
                    raise ValueError(f"{place}: a recorded answer needs 'tool', 'arguments' and 'answer'")
                self._answers[row["tool"]][_key(row.get("arguments") or {})] = row["answer"]

    def __getitem__(self, tool_id: str) -> Callable[..., Any]:
        if tool_id not in self.catalog:
            raise KeyError(tool_id)
        return lambda **arguments: self.call(tool_id, arguments)

    def __iter__(self) -> Iterator[str]:
        return iter(self.catalog.ids)

    def __len__(self) -> int:
        return len(self.catalog)

    def record_trajectories(self, trajectories: Iterable[dict[str, Any]]) -> None:
        """Add what trajectories ([`~data.trajectories.load_trajectories`]) observe to the answers, not to the file."""
        for row in trajectories:
            messages = row["messages"]
            for (place, i), result in find_results(messages).items():
                function, observation = messages[place]["tool_calls"][i]["function"], messages[result]["content"]
                with self._lock:
                    self._answers[function["name"]].setdefault(_key(function["arguments"]), from_json(observation))

    def call(self, tool_id: str, arguments: dict[str, Any]) -> Any:
        """Answer a call.

        Raises:
            `ValueError`: for arguments that do not match the tool's schema.
            `KeyError`: for a tool that the catalog lacks.
        """
        key, recorded = _key(arguments), self._answers.get(tool_id, {})
        if key in recorded:
            return recorded[key]
        tool = self.catalog[tool_id]
        error = find_error(arguments, tool.parameters)
        if error is not None:
            raise ValueError(error)
        if tool_id in self.functions:
            return self._record(tool_id, arguments, self.functions[tool_id](**arguments))
        if self.endpoint is not None:
            answer = self._ask(tool, arguments)
            if answer is not None:
                return self._record(tool_id, arguments, answer)
        return simulate_answer(tool, arguments, self.seed)

    def _ask(self, tool: Tool, arguments: dict[str, Any]) -> dict[str, Any] | None:
        with self._lock:
            others = list(islice(self._answers[tool.id].values(), 5))
        question = {"function": tool.to_dict(), "arguments": arguments, "other_answers": others}
        return self.endpoint.ask(SIMULATION_INSTRUCTIONS, json.dumps(question, ensure_ascii=False), self.seed).content

    def _record(self, tool_id: str, arguments: dict[str, Any], answer: Any) -> Any:
        with self._lock:
            # If two threads answer the same call, the first answer wins
            answer = self._answers[tool_id].setdefault(_key(arguments), answer)
            if self.path is not None:
                row = {"tool": tool_id, "arguments": arguments, "answer": answer}
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return answer


def _key(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, sort_keys=True)


def simulate_answer(tool: Tool, arguments: dict[str, Any], seed: int = 0) -> Any:
    """Generate an answer that matches the tool's `metadata["output_schema"]`, or a generic one without a schema.

    The same tool, arguments and seed give the same answer on every machine. Deep in references, such as those of a
    schema that holds itself, the answer holds only what is required.
    """
    generator = random.Random(f"{seed} {(tool.id, _key(arguments))}")
    schema = tool.metadata.get("output_schema")
    if isinstance(schema, dict):
        try:
            return _draw(schema, generator, tool.name, schema)
        except RecursionError:  # only an endless answer would match
            pass
    return {"result": f"answer {generator.randrange(10**6):06} of {tool.name}"}


def _draw(
    schema: Any, generator: random.Random, name: str, root: dict[str, Any], inside: frozenset[str] = frozenset()
) -> Any:
    """Draw a random value of a JSON Schema, with its types, enumerations, defaults, ranges, compositions and references.

    Raises:
        `RecursionError`: if the value needs another one of a reference that it is `inside` of.
    """
    schema, inside = _combine(schema, root, inside)
    for keyword in ("const", "default"):
        if keyword in schema:
            return schema[keyword]
    for keyword in ("enum", "examples"):
        if isinstance(schema.get(keyword), list) and schema[keyword]:
            return generator.choice(schema[keyword])
    for keyword in ("anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list) and schema[keyword]:
            alternatives = schema.pop(keyword)
            for alternative in alternatives:
                with suppress(RecursionError):
                    return _draw({"allOf": [schema, alternative]}, generator, name, root, inside)
            raise RecursionError(f"each alternative of {name} holds itself")
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    brief = len(inside) > MAX_REFERENCES
    if kind == "object":
        required, drawn = _required(schema), {}
        for key, inner in (schema.get("properties") or {}).items():
            if key in required:
                drawn[key] = _draw(inner, generator, key, root, inside)
            elif not brief:
                with suppress(RecursionError):
                    drawn[key] = _draw(inner, generator, key, root, inside)
        return drawn
    if kind == "array":
        least = schema.get("minItems", 0)
        length = least if brief else max(least, min(2, schema.get("maxItems", 2)))
        try:
            return [_draw(schema.get("items"), generator, name, root, inside) for _ in range(length)]
        except RecursionError:
            if least:
                raise
            return []
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        high = schema.get("maximum", schema.get("exclusiveMaximum", low + 100))
        if kind == "integer":
            low = math.floor(low) + 1 if "exclusiveMinimum" in schema else math.ceil(low)
            high = math.ceil(high) - 1 if "exclusiveMaximum" in schema else math.floor(high)
            return generator.randint(min(low, high), high)
        value = generator.uniform(min(low, high), high)
        return round(value, 2) if low < round(value, 2) < high else value
    if kind == "boolean":
        return generator.random() < 0.5
    return None if kind == "null" else f"{name} {generator.randrange(1000)}"


def _combine(schema: Any, root: dict[str, Any], inside: frozenset[str]) -> tuple[dict[str, Any], frozenset[str]]:
    """Merge a schema with its `$ref` and `allOf`; return it and all the references that it is `inside` of then."""
    own = dict(schema) if isinstance(schema, dict) else {}
    reference, parts = own.pop("$ref", None), own.pop("allOf", None) or []
    found = [_combine(part, root, inside) for part in parts]
    if isinstance(reference, str):
        if reference in inside:
            raise RecursionError(f"{reference} holds itself")
        resolver = NOTHING_REMOTE.resolver_with_root(DRAFT202012.create_resource(root))
        with suppress(Unresolvable):  # any value matches then
            found.append(_combine(resolver.lookup(reference).contents, root, inside | {reference}))
    merged: dict[str, Any] = {}
    for part, followed in [*found, (own, inside)]:
        inside |= followed
        properties, required = dict(merged.get("properties") or {}), _required(merged) + _required(part)
        for key, inner in (part.get("properties") or {}).items():
            properties[key] = {"allOf": [properties[key], inner]} if key in properties else inner
        merged |= part
        if properties:
            merged["properties"] = properties
        if required:
            merged["required"] = required
    return merged, inside


def _required(schema: dict[str, Any]) -> list[str]:
    names = schema.get("required")
    return names if isinstance(names, list) else []


def mcp_server(tools: SimulatedTools):
    """Return an MCP server for the tools; `.streamable_http_app()` is its ASGI application.

    Raises:
        `ImportError`: without the `mcp` package.
    """
    try:
        from anyio import to_thread
        from mcp import types
        from mcp.server.lowlevel import Server
    except ImportError:
        raise ImportError('a server of tools needs the mcp package: pip install "toolweaver-hf[mcp]"') from None

    listed = [
        types.Tool(
            name=tool.id,
            title=tool.name,
            description=tool.description,
            input_schema={"type": "object"} | tool.parameters,
        )
        for tool in tools.catalog
    ]

    async def list_tools(context, params) -> types.ListToolsResult:
        return types.ListToolsResult(tools=listed)

    async def call_tool(context, params) -> types.CallToolResult:
        try:
            answer = await to_thread.run_sync(tools.call, params.name, params.arguments or {})
        except Exception as error:  # an exception of a tool is returned as an error
            text = f"no such tool: {error}" if isinstance(error, KeyError) else str(error)
            return types.CallToolResult(content=[types.TextContent(text=text)], is_error=True)
        text = types.TextContent(text=json.dumps(answer, ensure_ascii=False))
        return types.CallToolResult(content=[text], structured_content=answer if isinstance(answer, dict) else None)

    return Server("toolweaver", on_list_tools=list_tools, on_call_tool=call_tool)


def serve_tools(
    catalog: str,
    recordings: str | None = None,
    trajectories: str | None = None,
    model: str | None = None,
    url: str | None = None,
    seed: int = 0,
    host: str = "127.0.0.1",
    port: int = 8765,
) -> None:
    """Serve a catalog's tools over MCP, until it is stopped.

    Args:
        catalog (`str`):
            The catalog's file.
        recordings (`str`, *optional*):
            JSONL file of recorded answers, to which a model's are added.
        trajectories (`str`, *optional*):
            Trajectories whose observations are recorded answers, too.
        model (`str`, *optional*):
            Chat model that makes up what is not recorded. Without one, the answers' schemas do.
        url (`str`, *optional*):
            OpenAI-compatible endpoint of the model, OpenAI's by default; its key is the environment's
            `OPENAI_API_KEY`.
        seed (`int`, *optional*, defaults to 0):
            Seed of what is made up.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on.
        port (`int`, *optional*, defaults to 8765):
            Port to listen on.
    """
    endpoint = ChatEndpoint(model, url or DEFAULT_URL) if model else None
    tools = SimulatedTools(ToolCatalog.from_file(catalog), recordings, endpoint=endpoint, seed=seed)
    if trajectories:
        tools.record_trajectories(load_trajectories(trajectories))
    server = mcp_server(tools)
    import uvicorn  # comes with mcp

    print(f"{len(tools)} tools at http://{host}:{port}/mcp", flush=True)
    uvicorn.run(server.streamable_http_app(host=host), host=host, port=port, log_level="warning")
