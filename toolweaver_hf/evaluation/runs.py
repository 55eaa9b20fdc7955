"""The folder of an evaluation run, with its results and circumstances, and the comparison of several runs."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import matplotlib
import numpy as np
import torch
from transformers.utils import logging

from ..data.queries import Query
from ..files import atomic_write, read_json, write_json, write_text
from ..retrieval import RetrievedTool
from .rankings import METRICS_FILE, RANKING_METRICS_VERSION, compare_rankings, markdown_table


logger = logging.get_logger(__name__)

RUN_FILE = "run.json"
RUN_VERSION = 1  # its schema_version
QRELS_FILE = "qrels.txt"
TABLES_FILE = "results.md"
CHART_FILE = "results.png"
CHART_MEASURES = ("nDCG@1", "nDCG@3", "nDCG@5")

PACKAGES = (
    "toolweaver-hf",
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "sentence-transformers",
    "bm25s",
    "ir-measures",
    "numpy",
    "scipy",
)

Rankings = Mapping[str, Sequence[Sequence[RetrievedTool]]]


def describe_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe how a run was made: configuration, time, versions, commit of the code and hardware.

    Args:
        config (`Mapping[str, Any]`): The arguments of the run, including its seed, as JSON types.

    Returns:
        `dict`: the content of `run.json`. `commit` is `None` if the package is not in a git checkout, and ends in
        `-dirty` if the checkout has uncommitted changes.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": dict(config),
        "versions": versions,
        "commit": _commit(),
        "hardware": _hardware(),
    }


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails inside the checkout of another project
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        cpu = named[1] if named else cpu
    return {
        "system": platform.platform(terse=True),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


@dataclass
class EvaluationRun:
    """The rankings in the folder of a run.

    Args:
        folder (`Path`): The folder.
        queries (`list[Query]`): The queries with ground-truth tools and groups, without texts.
        rankings (`dict[str, list[list[RetrievedTool]]]`): The ranked tools of each query, by system; their
            scores are negative ranks.
        checksums (`dict[str, str]`): Checksums of the `queries` with their ground truth, and of the ranked `tools`.
    """

    folder: Path
    queries: list[Query]
    rankings: dict[str, list[list[RetrievedTool]]]
    checksums: dict[str, str]


def save_run(
    folder: str | os.PathLike,
    queries: Sequence[Query],
    rankings: Rankings,
    tool_ids: Sequence[str],
    config: Mapping[str, Any],
    queries_name: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate the rankings of several systems and write the run to a folder.

    The folder holds `run.json` ([`describe_run`]), `metrics.json` ([`compare_rankings`]), the ground truth and the
    rankings in TREC's formats (`qrels.txt`, with the query's group as second column, and `NAME.run`), tables and a
    chart.

    Args:
        folder (`str`): The folder.
        queries (`Sequence[Query]`): The queries.
        rankings (`Mapping[str, Sequence[Sequence[RetrievedTool]]]`): The rankings of each system, the evaluated system
            first.
        tool_ids (`Sequence[str]`): Ids of the ranked tools.
        config (`Mapping[str, Any]`): The run's arguments.
        queries_name (`str`): Name of the queries in tables and cards, such as their file name.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.

    Returns:
        `dict`: the content of `metrics.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted([query.id, query.text, sorted(query.tools)] for query in queries)
    checksums = {"queries": _checksum(rows), "tools": _checksum(sorted(tool_ids))}
    write_json(folder / RUN_FILE, {**describe_run(config), "checksums": checksums}, RUN_VERSION)
    judged = [(query.id, query.group or 0, tool, 1) for query in queries for tool in query.tools]
    write_text(folder / QRELS_FILE, _trec_lines(judged))
    for name, ranking in rankings.items():
        ranked = [
            (query.id, "Q0", tool.tool_id, rank, tool.score, name)
            for query, tools in zip(queries, ranking, strict=True)
            for rank, tool in enumerate(tools, start=1)
        ]
        write_text(folder / f"{name}.run", _trec_lines(ranked))
    metrics = {"queries": queries_name, **compare_rankings(queries, rankings, seed)}
    _write_results(folder, metrics)
    return metrics


def save_tables(folder: str | os.PathLike, tables: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> None:
    """Write the tables of a benchmark to `metrics.json` in a folder, next to `run.json` ([`describe_run`]).

    Args:
        folder (`str`): The folder.
        tables (`Sequence[Mapping]`): Each with a `title`, its `columns` and its `rows`, the cells as text.
        config (`Mapping[str, Any]`): The run's arguments.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / RUN_FILE, describe_run(config), RUN_VERSION)
    write_json(Path(folder) / METRICS_FILE, {"tables": list(tables)}, RANKING_METRICS_VERSION)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format cells of text as a Markdown table, with all columns but the first aligned to the right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _write_results(folder: Path, metrics: dict[str, Any]) -> None:
    write_text(folder / TABLES_FILE, tables(metrics))
    draw_chart(metrics, folder / CHART_FILE)
    write_json(folder / METRICS_FILE, metrics, RANKING_METRICS_VERSION)


def _checksum(document: Any) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:16]


def _trec_lines(rows: Sequence[tuple]) -> str:
    # Fields are separated by spaces, so one in an id is written as %20.
    rows = ((re.sub(r"[\s%]", lambda match: quote(match[0]), str(field)) for field in row) for row in rows)
    return "".join(" ".join(row) + "\n" for row in rows)


def load_evaluation(folder: str | os.PathLike) -> EvaluationRun:
    """Read a folder written by [`save_run`].

    Raises:
        `ValueError`: naming the file and line that is wrong.
        `OSError`: if a file is missing.
    """
    folder = Path(folder)
    names = read_json(folder / METRICS_FILE, RANKING_METRICS_VERSION).get("results")
    checksums = read_json(folder / RUN_FILE, RUN_VERSION).get("checksums")
    if not isinstance(names, dict) or not names or not isinstance(checksums, dict):
        raise ValueError(f"{folder} does not hold a run of `toolweaver evaluate`")
    tools: dict[str, list[str]] = {}
    groups: dict[str, str] = {}
    for query_id, group, tool_id, _ in _read_trec(folder / QRELS_FILE, 4):
        tools.setdefault(query_id, []).append(tool_id)
        if group != "0":
            groups[query_id] = group
    queries = [Query(query_id, "", tuple(needed), groups.get(query_id)) for query_id, needed in tools.items()]
    rankings: dict[str, list[list[RetrievedTool]]] = {}
    for name in names:
        ranked: dict[str, list[RetrievedTool]] = {query.id: [] for query in queries}
        for query_id, _, tool_id, *_ in _read_trec(folder / f"{name}.run", 6):
            if query_id not in ranked:
                raise ValueError(f"{folder / name}.run ranks tools for {query_id!r}, which {QRELS_FILE} lacks")
            ranked[query_id].append(RetrievedTool(tool_id, -float(len(ranked[query_id]))))
        rankings[name] = list(ranked.values())
    return EvaluationRun(folder, queries, rankings, checksums)


def _read_trec(path: Path, num_fields: int) -> list[list[str]]:
    rows = [[unquote(field) for field in line.split()] for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, start=1):
        if len(row) != num_fields:
            raise ValueError(f"{path}, line {number}: expected {num_fields} fields, not {len(row)}")
    return rows


def compare_runs(folders: Sequence[str | os.PathLike], seed: int = 0) -> dict[str, Any]:
    """Merge the systems of several runs and compare each with the first system of the first run.

    A system with the same rankings in several runs, such as BM25, is taken once. If the rankings differ, its name gets
    the folder of the run.

    Args:
        folders (`Sequence[str]`): Folders as `toolweaver evaluate` writes them.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.

    Returns:
        `dict`: the content of `metrics.json`, see [`compare_rankings`].

    Raises:
        `ValueError`: if a folder does not hold a run, or its queries or ground truth differ from the first run's.
    """
    runs = [load_evaluation(folder) for folder in folders]
    first, *others = runs
    for run in others:
        if run.checksums["queries"] != first.checksums["queries"]:
            raise ValueError(
                f"{run.folder} and {first.folder} cannot be compared: their queries or ground-truth tools differ"
            )
        if run.checksums["tools"] != first.checksums["tools"]:
            logger.warning(f"{run.folder} ranks other tools than {first.folder}: their measures differ for that alone")
    rankings: dict[str, list[list[RetrievedTool]]] = {}
    for name in dict.fromkeys(name for run in runs for name in run.rankings):
        found = [(run.folder, _in_order(run, name, first.queries)) for run in runs if name in run.rankings]
        differ = any(ranking != found[0][1] for _, ranking in found)
        rankings |= {f"{name} ({folder})" if differ else name: ranking for folder, ranking in found}
    queries_name = read_json(first.folder / METRICS_FILE, RANKING_METRICS_VERSION).get("queries", "")
    return {"queries": queries_name, **compare_rankings(first.queries, rankings, seed)}


def _in_order(run: EvaluationRun, name: str, queries: Sequence[Query]) -> list[list[RetrievedTool]]:
    ranking_of_query = dict(zip((query.id for query in run.queries), run.rankings[name], strict=True))
    return [ranking_of_query[query.id] for query in queries]


def tables(metrics: Mapping[str, Any]) -> str:
    """Format a `metrics.json` in Markdown: a table for each group of queries, and a legend."""
    results = metrics["results"]
    own = next(iter(results))
    parts = [
        f"{group} ({measured['queries']:,} queries of {metrics['queries']}), in percent\n\n"
        + markdown_table(results, group, metrics["intervals"], metrics["p_values"])
        for group, measured in results[own].items()
    ]
    note = "±: half the width of the 95 % bootstrap interval."
    if len(results) > 1:
        note += f" †: differs from {own} (p < 0.05 in a paired t-test, Bonferroni-corrected)."
    return "\n\n".join([*parts, note]) + "\n"


def draw_chart(metrics: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Draw a `metrics.json` as bars of nDCG with 95 % intervals, one panel per group of queries."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    results, intervals = metrics["results"], metrics["intervals"]
    groups = list(next(iter(results.values())))
    figure, panels = plt.subplots(
        len(groups), figsize=(10, 1 + 2.6 * len(groups)), sharey=True, squeeze=False, layout="constrained"
    )
    width = 0.85 / len(results)
    colors = plt.get_cmap("tab20" if len(results) > 10 else "tab10").colors
    for axes, group in zip(panels[:, 0], groups, strict=True):
        for i, name in enumerate(results):
            values = 100 * np.array([results[name][group][measure] for measure in CHART_MEASURES])
            ends = 100 * np.array([intervals[name][group][measure] for measure in CHART_MEASURES])
            # With skewed samples, an interval may not contain the mean.
            errors = np.maximum(0, [values - ends[:, 0], ends[:, 1] - values])
            places = np.arange(len(CHART_MEASURES)) + (i - (len(results) - 1) / 2) * width
            axes.bar(places, values, 0.92 * width, yerr=errors, label=name, color=colors[i % 20], ecolor="0.3")
        axes.set_xticks(range(len(CHART_MEASURES)), CHART_MEASURES)
        axes.set(title=f"{group} ({results[name][group]['queries']:,} queries)", ylabel="percent")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)


def print_comparison(folders: Sequence[str], output_dir: str | None = None) -> None:
    """Print the tables of [`compare_runs`]; write them, the measures and a chart to `output_dir`."""
    metrics = compare_runs(folders)
    print(tables(metrics), end="")
    if output_dir:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        _write_results(Path(output_dir), metrics)
