"""Measure how the gateway's search gets better from use alone, on training queries that are replayed as its log.

```bash
python recipes/benchmarks/replay.py --catalog catalog.jsonl --train_queries queries.train.jsonl \\
    --test_queries queries.test.jsonl --output_dir out/replay
```

The training queries come in random order. Each is searched with what was learned so far, and of the first `k` tools
those that the query needs are called: what search does not find is not called, and not learned. Queries and calls are
written as the gateway writes its log. After a number of calls, a gateway that starts with this log ranks the tools for
the test queries. No model is trained; an aligned one can be measured besides.

With `--mistakes 0.2` all is done once more, and for a fifth of the queries one of the found tools that they do not need
is called instead, as if it had succeeded.
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
    model: str | None = field(default=None, metadata={"help": "Aligned model that is measured as well."})
    encoder: str | None = field(default=None, metadata={"help": "sentence-transformers model."})
    calls: list[int] = field(default_factory=lambda: [0, 100, 500, 2000], metadata={"help": "When to measure."})
    k: int = field(default=5, metadata={"help": "Number of tools that a search returns."})
    mistakes: float = field(default=0.0, metadata={"help": "Share of queries for which a wrong tool is called."})
    seed: int = field(default=0, metadata={"help": "Seed of the order."})


async def replay(
    args: ReplayArguments, mistakes: float, catalog: ToolCatalog, train: list[Query], test: list[Query]
) -> dict[int, list[list[RetrievedTool]]]:
    """Replay the training queries; return the rankings of the test queries after each number of calls."""
    from toolweaver_hf.agent.gateway_search import GatewaySearch
    from toolweaver_hf.data.usage_log import UsageLog, load_usage_queries

    chance, rankings, num_calls = random.Random(args.seed), {}, 0
    with tempfile.TemporaryDirectory() as folder:
        log = UsageLog(Path(folder, "log"))

        async def start() -> GatewaySearch:
            queries = load_usage_queries(log.folder) if num_calls else []
            usage = [(query.text, tool_id) for query in queries for tool_id in query.tools]
            search = GatewaySearch(encoder=args.encoder, cache_dir=Path(folder, "cache"), usage=usage)
            await search.update(list(catalog))
            search.settle()
            await search.catch_up()
            return search

        async def measure() -> None:
            rankings[num_calls] = (await start()).retriever([query.text for query in test], top_k=10)

        search, waiting = await start(), sorted(args.calls)
        for number, query in enumerate(chance.sample(train, len(train))):
            if waiting and num_calls >= waiting[0]:
                waiting = [calls for calls in waiting if calls > num_calls]
                await measure()
            if not waiting:
                break
            found = [tool.tool_id for tool in await search(query.text, args.k, catalog.ids)]
            log.add_query("replay", number, query.text, found)
            wrong = [tool_id for tool_id in found if tool_id not in query.tools]
            called = [tool_id for tool_id in found if tool_id in query.tools]
            if wrong and chance.random() < mistakes:
                called = [chance.choice(wrong)]
            for tool_id in called:
                log.add_call("replay", number, query.text, tool_id, {}, {"content": []}, "ok")
                search.learn(query.text, tool_id)
            num_calls += len(called)
            await search.catch_up()
        if num_calls not in rankings:
            await measure()
    return rankings


def draw(metrics: dict[str, Any], curves: dict[str, dict[int, str]], model: str | None, path: Path) -> None:
    """Draw nDCG@5 over the number of calls with 95 % intervals, and that of a model.

    Args:
        metrics (`dict`): The content of `metrics.json`.
        curves (`dict[str, dict[int, str]]`): For each curve the systems, by their number of calls.
        model (`str`, *optional*): The system that is an aligned model.
        path (`Path`): The picture.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    def percent(system: str) -> tuple[float, ...]:
        results, intervals = metrics["results"][system]["all"], metrics["intervals"][system]["all"]
        return tuple(100 * value for value in (results["nDCG@5"], *intervals["nDCG@5"]))

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for label, systems in curves.items():
        values, low, high = zip(*map(percent, systems.values()), strict=True)
        (line,) = axes.plot([*systems], values, "o-", label=label)
        axes.fill_between([*systems], low, high, color=line.get_color(), alpha=0.15)
    if model is not None:
        value, low, high = percent(model)
        axes.axhline(value, color="0.3", linestyle="--", label=model)
        axes.axhspan(low, high, color="0.3", alpha=0.1)
    axes.set(xlabel="calls in the gateway's log", ylabel="nDCG@5 of find_tools, percent")
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
    from toolweaver_hf.retrieval import ToolRetriever

    catalog = ToolCatalog.from_file(args.catalog)
    train, test = load_queries(args.train_queries, args.train_qrels), load_queries(args.test_queries, args.test_qrels)
    rankings: dict[str, list[list[RetrievedTool]]] = {}
    curves: dict[str, dict[int, str]] = {}
    for mistakes in dict.fromkeys((0.0, args.mistakes)):
        label = f"the same, {mistakes:.0%} of the calls wrong" if mistakes else "search that learns from its log"
        for calls, ranking in anyio.run(replay, args, mistakes, catalog, train, test).items():
            system = f"{calls:,} calls" + (f", {mistakes:.0%} wrong" if mistakes and calls else "")
            rankings[system] = ranking
            curves.setdefault(label, {})[calls] = system
    model = "model aligned with all queries" if args.model else None
    if model is not None:
        rankings[model] = ToolRetriever.from_pretrained(args.model)([query.text for query in test], top_k=10)
    name = Path(args.test_queries).name
    metrics = save_run(args.output_dir, test, rankings, catalog.ids, asdict(args), name, args.seed)
    draw(metrics, curves, model, Path(args.output_dir, "replay.png"))
    print(tables(metrics))
    return metrics


if __name__ == "__main__":
    run_command(lambda: main(*parse_arguments(None, ReplayArguments)))
