"""Time the gateway in front of hundreds of servers, next to a plain BM25 proxy.

```bash
python recipes/benchmarks/gateway.py --catalog catalog.jsonl --output_dir out/benchmark
```

The tools of the catalog, whose ids are `server.tool`, are served by simulated MCP servers: one process answers by HTTP,
at an address for each server. `toolweaver gateway` runs in front of them as a user starts it, first with an empty cache
of embeddings, then with a full one. Clients of the official SDK search and call tools. The proxy is an MCP server that
ranks the same documents with bm25s.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from toolweaver_hf.cli import parse_arguments, run_command
from toolweaver_hf.data.catalog import Tool, ToolCatalog


WAIT_SECONDS = 900


@dataclass
class BenchmarkArguments:
    """Arguments of the benchmark."""

    catalog: str = field(metadata={"help": "Catalog with ids 'server.tool'."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run, with benchmark_gateway.json."})
    clients: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Numbers of concurrent clients."})
    queries: int = field(default=200, metadata={"help": "Number of queries per number of clients, and of calls."})
    encoder: str | None = field(default=None, metadata={"help": "sentence-transformers model of the gateway."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer that counts prompt tokens. Defaults to the encoder's."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the queries."})


def serve_upstreams(catalog: str, port: int) -> None:
    """Serve each MCP server of a catalog under `/SERVER/mcp`."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    tools: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for tool in ToolCatalog.from_file(catalog):
        server, name = tool.id.split(".", 1)
        schema = {"type": "object"} | tool.parameters
        tools[server].append({"name": name, "description": tool.description, "inputSchema": schema})

    async def answer(request: Any) -> Response:
        message = await request.json()
        if "id" not in message:
            return Response(status_code=202)
        server = request.path_params["server"]
        results = {
            "initialize": {
                "protocolVersion": "2025-06-18",
                "capabilities": {"tools": {}},
                "serverInfo": {"name": server, "version": "1"},
            },
            "tools/list": {"tools": tools[server]},
            "tools/call": {"content": [{"type": "text", "text": "done"}]},
            "ping": {},
        }
        return JSONResponse({"jsonrpc": "2.0", "id": message["id"], "result": results[message["method"]]})

    app = Starlette(routes=[Route("/{server}/mcp", answer, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def serve_proxy(catalog: str, port: int) -> None:
    """Serve the baseline: BM25 over the catalog's documents, as an MCP server with one tool."""
    import bm25s
    import uvicorn
    from mcp.server.mcpserver import MCPServer

    tools = ToolCatalog.from_file(catalog)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(tools.documents, stopwords="en", show_progress=False), show_progress=False)
    server = MCPServer("proxy")

    @server.tool()
    def find_tools(query: str, k: int = 5) -> dict[str, Any]:
        """Find tools."""
        words = bm25s.tokenize([query], stopwords="en", show_progress=False)
        rows, scores = index.retrieve(words, k=k, show_progress=False)
        found = [(tools[int(row)], float(score)) for row, score in zip(rows[0], scores[0], strict=True)]
        return {"tools": [listed(tool) | {"score": score} for tool, score in found]}

    uvicorn.run(server.streamable_http_app(), host="127.0.0.1", port=port, log_level="error")


def listed(tool: Tool) -> dict[str, Any]:
    return {"name": tool.id, "description": tool.description, "inputSchema": tool.parameters}


@asynccontextmanager
async def process(*command: str, stderr: Path | None = None) -> AsyncIterator[subprocess.Popen]:
    """Run a command, and terminate it on exit of the context."""
    with open(stderr or os.devnull, "wb") as errors, subprocess.Popen(command, stderr=errors) as running:
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()


async def connect(url: str) -> Any:
    """Wait until a server listens at the URL, and return an unconnected client."""
    import anyio
    from mcp import Client

    host, port = url.split("/")[2].split(":")
    for _ in range(100 * WAIT_SECONDS):
        try:
            stream = await anyio.connect_tcp(host, int(port))
        except OSError:
            await anyio.sleep(0.01)
        else:
            await stream.aclose()
            return Client(url, mode="legacy", cache=None)
    raise TimeoutError(f"nothing listens at {url}")


async def shown_texts(url: str, queries: list[str]) -> tuple[str, list[str]]:
    """Return the definitions of a server's tools, and what it answers to queries, as a client's model reads them."""
    async with await connect(url) as client:
        listed = [tool.model_dump_json(by_alias=True, exclude_none=True) for tool in (await client.list_tools()).tools]
        answers = [await client.call_tool("find_tools", {"query": query}) for query in queries]
    return "\n".join(listed), [answer.content[0].text for answer in answers]


async def search_times(url: str, queries: list[str], num_clients: int) -> dict[str, float]:
    """Return p50 and p99 of `find_tools` in milliseconds, with concurrent clients."""
    import anyio

    times: list[float] = []

    async def work(mine: list[str]) -> None:
        async with await connect(url) as client:
            await client.call_tool("find_tools", {"query": mine[0]})
            for query in mine:
                start = time.perf_counter()
                await client.call_tool("find_tools", {"query": query})
                times.append(1000 * (time.perf_counter() - start))

    async with anyio.create_task_group() as tasks:
        for i in range(num_clients):
            tasks.start_soon(work, queries[i::num_clients])
    return {"p50_ms": median(times), "p99_ms": quantiles(times, n=100)[98]}


async def call_times(url: str, name: str, arguments: dict[str, Any], repeats: int) -> float:
    """Return the median latency of a call in milliseconds."""
    times = []
    async with await connect(url) as client:
        for _ in range(repeats):
            start = time.perf_counter()
            result = await client.call_tool(name, arguments)
            times.append(1000 * (time.perf_counter() - start))
            if result.is_error:
                raise ValueError(f"a call failed: {result.content[0].text}")
    return median(times)


def megabytes(running: subprocess.Popen) -> float:
    import psutil

    return psutil.Process(running.pid).memory_info().rss / 2**20


async def time_start(command: list[str], url: str, log: Path, started: float, query: str) -> dict[str, float]:
    """Return the seconds until the first answer, until all servers are up, and until all tools are embedded."""
    import anyio

    results = {}
    async with await connect(url) as client:
        while len(results) < 3:
            found = await client.call_tool("find_tools", {"query": query})
            answer = found.structured_content or {"tools": []}  # an error while no server has started
            now = time.perf_counter() - started
            if answer["tools"]:
                results.setdefault("first_answer_s", now)
            if answer["tools"] and "unavailable" not in answer:
                results.setdefault("all_servers_s", now)
                if "are embedded" in log.read_text().rpartition(" is up")[2]:
                    results.setdefault("embedded_s", now)
            await anyio.sleep(0.1)
            if now > WAIT_SECONDS:
                raise TimeoutError(
                    f"the gateway is not ready after {WAIT_SECONDS} s; its messages: {log.read_text()[-500:]}"
                )
    return results


async def benchmark(args: BenchmarkArguments) -> dict[str, Any]:
    """Benchmark the gateway and the proxy."""
    from transformers import AutoTokenizer

    from toolweaver_hf.text_expert import default_encoder

    catalog = ToolCatalog.from_file(args.catalog)
    chance = random.Random(args.seed)
    drawn = [catalog[chance.randrange(len(catalog))] for _ in range(args.queries)]
    queries = [" ".join(tool.description.split()[:12]) for tool in drawn]
    servers = sorted({tool.id.split(".", 1)[0] for tool in catalog})
    base = chance.randrange(20_000, 30_000)
    python, this = sys.executable, os.path.abspath(__file__)
    results: dict[str, Any] = {"tools": len(catalog), "servers": len(servers)}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "mcp.json")
        urls = {name: {"url": f"http://127.0.0.1:{base}/{name}/mcp"} for name in servers}
        config.write_text(json.dumps({"mcpServers": urls}))
        url = f"http://127.0.0.1:{base + 1}/mcp"
        gateway = [python, "-m", "toolweaver_hf.cli", "gateway", str(config), "--port", str(base + 1)]
        gateway += ["--cache-dir", str(Path(folder, "cache")), *(["--encoder", args.encoder] if args.encoder else [])]
        async with process(python, this, "upstreams", args.catalog, str(base)):
            await connect(f"http://127.0.0.1:{base}/")
            for start in ("cold", "warm"):
                log, started = Path(folder, f"{start}.log"), time.perf_counter()
                async with process(*gateway, stderr=log) as running:
                    results[start] = await time_start(gateway, url, log, started, queries[0])
                    if start == "warm":
                        results["find_tools"] = {
                            str(number): await search_times(url, queries, number) for number in args.clients
                        }
                        results["memory_mb"] = megabytes(running)
                        tool = next(tool for tool in catalog if not tool.parameters.get("required"))
                        server, name = tool.id.split(".", 1)
                        through = {"name": tool.id, "arguments": {}}
                        direct = f"http://127.0.0.1:{base}/{server}/mcp"
                        definitions, answers = await shown_texts(url, queries[:50])
                        results["call_ms"] = {
                            "direct": await call_times(direct, name, {}, args.queries),
                            "gateway": await call_times(url, "call_tool", through, args.queries),
                        }
        proxy = f"http://127.0.0.1:{base + 2}/mcp"
        async with process(python, this, "proxy", args.catalog, str(base + 2)) as running:
            results["proxy"] = {
                "find_tools": {str(number): await search_times(proxy, queries, number) for number in args.clients},
                "memory_mb": megabytes(running),
            }
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.encoder or default_encoder())

    def count(texts: list[str]) -> int:
        return sum(len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"])

    results["tokens"] = {
        "all_tools": count([json.dumps(listed(tool)) for tool in catalog]),
        "two_tools": count([definitions]),
        "answer": count(answers) / len(answers),
    }
    return results


def tables_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Arrange the results in tables."""
    cold, warm = results["cold"], results["warm"]
    names = {"first_answer_s": "first answer", "all_servers_s": "all servers", "embedded_s": "all tools embedded"}
    starts = [[name, f"{cold[key]:.1f}", f"{warm[key]:.1f}"] for key, name in names.items()]
    gateway, proxy = results["find_tools"], results["proxy"]["find_tools"]
    searches = [
        [clients, *(f"{times[clients][key]:.0f}" for times in (gateway, proxy) for key in ("p50_ms", "p99_ms"))]
        for clients in gateway
    ]
    call, tokens = results["call_ms"], results["tokens"]
    others = [
        ["a call of the server itself, ms", f"{call['direct']:.1f}"],
        ["the same call through the gateway, ms", f"{call['gateway']:.1f}"],
        ["memory of the gateway, MB", f"{results['memory_mb']:.0f}"],
        ["memory of the BM25 proxy, MB", f"{results['proxy']['memory_mb']:.0f}"],
        ["tokens of all tools", f"{tokens['all_tools']:,}"],
        ["tokens of the gateway's two tools", f"{tokens['two_tools']:,}"],
        ["tokens of an answer of `find_tools`, five tools", f"{tokens['answer']:,.0f}"],
    ]
    return [
        {"title": "Seconds after the start", "columns": ["", "empty cache", "full cache"], "rows": starts},
        {
            "title": "`find_tools`, ms",
            "columns": ["clients at once", "p50", "p99", "BM25 proxy, p50", "BM25 proxy, p99"],
            "rows": searches,
        },
        {
            "title": f"{results['tools']:,} tools of {results['servers']:,} servers",
            "columns": ["", ""],
            "rows": others,
        },
    ]


def main(args: BenchmarkArguments) -> dict[str, Any]:
    """Benchmark, print the tables and return the results."""
    import anyio

    from toolweaver_hf.evaluation.runs import save_tables, text_table

    results = anyio.run(benchmark, args)
    tables = tables_of(results)
    for table in tables:
        print(f"\n{table['title']}\n\n{text_table(table['columns'], table['rows'])}")
    if args.output_dir:
        save_tables(args.output_dir, tables, asdict(args))
        Path(args.output_dir, "benchmark_gateway.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    if sys.argv[1:2] in (["upstreams"], ["proxy"]):
        serve = serve_upstreams if sys.argv[1] == "upstreams" else serve_proxy
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        run_command(lambda: main(*parse_arguments(None, BenchmarkArguments)))
