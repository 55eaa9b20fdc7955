"""Measure how the gateway's search gets better from use alone, on training queries that are replayed as its log.

```bash
python recipes/benchmarks/replay.py --catalog catalog.jsonl --train_queries queries.train.jsonl \\
    --test_queries queries.test.jsonl --output_dir out/replay
```

The training queries come in random order. Each is searched with what was learned so far, and of the first `k` tools
those that the query needs are called: what search does not find is not called, and not learned. Queries and calls are
written as the gateway writes its log. After a number of calls, a gateway that starts with this log ranks the tools for
the test queries. No model is trained.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolweaver_hf.cli import parse_arguments, run_command


if TYPE_CHECKING:
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.data.queries import Query
    from toolweaver_hf.retrieval import RetrievedTool


@dataclass
class ReplayArguments:
    """Arguments of the benchmark."""

    catalog: str = field(metadata={"help": "Catalog."})
    train_queries: str = field(metadata={"help": "Queries that are replayed, with their tools."})
    test_queries: str = field(metadata={"help": "Queries that measure."})
    output_dir: str = field(metadata={"help": "Folder of the run."})
    train_qrels: str | None = field(default=None, metadata={"help": "Relevance file (TSV) of the training queries."})
    test_qrels: str | None = field(default=None, metadata={"help": "Relevance file (TSV) of the test queries."})
    model: str | None = field(default=None, metadata={"help": "Aligned model that searches, too."})
    encoder: str | None = field(default=None, metadata={"help": "sentence-transformers model."})
    calls: list[int] = field(default_factory=lambda: [0, 100, 500, 2000], metadata={"help": "When to measure."})
    k: int = field(default=5, metadata={"help": "Number of tools that a search returns."})
    mistakes: float = field(default=0.0, metadata={"help": "Share of queries for which the first tool is called."})
    seed: int = field(default=0, metadata={"help": "Seed of the order."})


async def replay(
    args: ReplayArguments, catalog: ToolCatalog, train: list[Query], test: list[Query]
) -> dict[str, list[list[RetrievedTool]]]:
    """Replay the training queries; return the rankings of the test queries after each number of calls."""
    from toolweaver_hf.agent.gateway_search import GatewaySearch
    from toolweaver_hf.data.usage_log import UsageLog, load_usage_queries

    with tempfile.TemporaryDirectory() as folder:

        async def start(learns: bool) -> GatewaySearch:
            usage = (
                [(query.text, tool_id) for query in load_usage_queries(log.folder) for tool_id in query.tools]
                if learns
                else []
            )
            search = GatewaySearch(args.model, args.encoder, Path(folder, "cache"), usage=usage)
            await search.update(list(catalog))
            search.settle()
            await search.catch_up()
            return search

        async def measure() -> list[list[RetrievedTool]]:
            search = await start(learns=num_calls > 0)
            return search.retriever([query.text for query in test], top_k=10)

        log, num_calls = UsageLog(Path(folder, "log")), 0
        search, chance = await start(learns=False), random.Random(args.seed)
        waiting, rankings = sorted(set(args.calls)), {}
        for number, query in enumerate(chance.sample(train, len(train))):
            if waiting and num_calls >= waiting[0]:
                rankings[f"after {waiting.pop(0):,} calls"] = await measure()
            found = [tool.tool_id for tool in await search(query.text, args.k, catalog.ids)]
            log.add_query("replay", number, query.text, found)
            called = [tool_id for tool_id in found if tool_id in query.tools]
            if chance.random() < args.mistakes:
                called = found[:1]
            for tool_id in called:
                log.add_call("replay", number, query.text, tool_id, {}, {"content": []}, "ok")
                search.learn(query.text, tool_id)
            num_calls += len(called)
            await search.catch_up()
        rankings[f"after {num_calls:,} calls"] = await measure()
    return rankings


def draw(metrics: dict[str, Any], path: Path) -> None:
    """Draw nDCG@1 and nDCG@5 over the number of calls, with 95 % intervals."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    names = list(metrics["results"])
    calls = [int(name.split()[1].replace(",", "")) for name in names]
    for measure in ("nDCG@5", "nDCG@1"):
        values = [100 * metrics["results"][name]["all"][measure] for name in names]
        low, high = zip(*(metrics["intervals"][name]["all"][measure] for name in names), strict=True)
        (line,) = axes.plot(calls, values, "o-", label=measure)
        axes.fill_between(calls, [100 * x for x in low], [100 * x for x in high], color=line.get_color(), alpha=0.15)
    axes.set(
        xlabel="successful calls in the gateway's log",
        ylabel="percent, test queries",
        title="find_tools, by use alone",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: ReplayArguments) -> dict[str, Any]:
    """Replay and measure; write the run and its picture, `replay.png`."""
    import anyio

    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.data.queries import load_queries
    from toolweaver_hf.evaluation.runs import save_run, tables

    catalog = ToolCatalog.from_file(args.catalog)
    train, test = load_queries(args.train_queries, args.train_qrels), load_queries(args.test_queries, args.test_qrels)
    rankings = anyio.run(replay, args, catalog, train, test)
    metrics = save_run(
        args.output_dir, test, rankings, catalog.ids, asdict(args), Path(args.test_queries).name, args.seed
    )
    draw(metrics, Path(args.output_dir, "replay.png"))
    print(tables(metrics))
    return metrics


if __name__ == "__main__":
    run_command(lambda: main(*parse_arguments(None, ReplayArguments)))
