"""How good a ranking of tools is, and whether another one is better."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ir_measures
import numpy as np
from ir_measures import RR, R, nDCG
from scipy.stats import ttest_rel
from transformers.utils import logging

from ..data.queries import Query
from ..retrieval import RetrievedTool


logger = logging.get_logger(__name__)

METRICS_FILE = "metrics.json"
METRICS_VERSION = 1  # its schema_version

MEASURES = ("nDCG@1", "nDCG@3", "nDCG@5", "R@1", "R@3", "R@5", "RR@10", "COMP@3", "COMP@5")
"""The measures of a report. The mean of RR@10, the reciprocal rank of the first ground-truth tool, is known as MRR.
COMP@k (COLT, CIKM 2024) is the share of queries whose tools are all among the first k."""

NUM_RESAMPLES = 1000
SIGNIFICANCE_LEVEL = 0.05


def measure_queries(queries: Sequence[Query], rankings: Sequence[Sequence[RetrievedTool]]) -> np.ndarray:
    """Score the tools that were retrieved for each query.

    Args:
        queries (`Sequence[Query]`):
            The queries with their ground-truth tools.
        rankings (`Sequence[Sequence[RetrievedTool]]`):
            For each query the tools retrieved, best first; at least 10 for every measure to be meaningful.

    Returns:
        `np.ndarray` of shape `(num_queries, len(MEASURES))`: each of `MEASURES`, between 0 and 1.
    """
    rows = {query.id: row for row, query in enumerate(queries)}
    qrels = {query.id: dict.fromkeys(query.tools, 1) for query in queries}
    # A rank, not the score, decides: equal scores would otherwise be ordered by the tools' ids.
    run = {
        query.id: {tool.tool_id: -float(rank) for rank, tool in enumerate(ranking)}
        for query, ranking in zip(queries, rankings, strict=True)
    }
    values = np.zeros((len(queries), len(MEASURES)))
    measures = [nDCG @ 1, nDCG @ 3, nDCG @ 5, R @ 1, R @ 3, R @ 5, RR @ 10]
    for value in ir_measures.iter_calc(measures, qrels, run):
        values[rows[value.query_id], MEASURES.index(str(value.measure))] = value.value
    for cutoff in (3, 5):
        values[:, MEASURES.index(f"COMP@{cutoff}")] = values[:, MEASURES.index(f"R@{cutoff}")] == 1
    return values


def check_ground_truth(queries: Sequence[Query], tool_ids: Iterable[str], source: str) -> None:
    """Warn of ground-truth tools that will not be ranked, so that no system can find them.

    They stay in the ground truth and count as missed, as ToolBench's queries name some that its catalogs lack.

    Args:
        queries (`Sequence[Query]`): The queries.
        tool_ids (`Iterable[str]`): The tools that will be ranked.
        source (`str`): Where these come from, for the message.

    Raises:
        `ValueError`: if none of the ground-truth tools will be ranked: then the ids are of another catalog.
    """
    needed = {tool for query in queries for tool in query.tools}
    missing = sorted(needed.difference(tool_ids))
    found = (
        f"{len(missing)} of {len(needed)} tools that the queries need are not in {source}: {', '.join(missing[:5])}"
    )
    if len(missing) == len(needed):
        raise ValueError(found)
    if missing:
        logger.warning(f"{found}. They count as missed.")


def query_groups(queries: Sequence[Query]) -> dict[str, np.ndarray]:
    """Return the rows of each group of queries: `all`, `single` (with one ground-truth tool), `multi` (with several),
    and the groups that the queries name themselves. A group without a query is left out."""
    rows = np.arange(len(queries))
    several = np.array([len(query.tools) > 1 for query in queries], dtype=bool)
    groups = {"all": rows, "single": rows[~several], "multi": rows[several]}
    for name in dict.fromkeys(query.group for query in queries if query.group):
        groups[name] = rows[[query.group == name for query in queries]]
    return {name: members for name, members in groups.items() if len(members)}


def evaluate_rankings(
    queries: Sequence[Query], rankings: Sequence[Sequence[RetrievedTool]]
) -> dict[str, dict[str, float]]:
    """Score the tools that were retrieved for each query, and average over each group of queries.

    Args:
        queries, rankings: As for [`measure_queries`].

    Returns:
        `dict[str, dict[str, float]]`: for each group of [`query_groups`] the means of `MEASURES`, each between 0 and
        1, and its number of `queries`.
    """
    values = measure_queries(queries, rankings)
    return {
        group: {"queries": len(members), **_named(values[members].mean(0))}
        for group, members in query_groups(queries).items()
    }


def ranking_metrics(queries: Sequence[Query], rankings: Sequence[Sequence[RetrievedTool]]) -> dict[str, float]:
    """Return nDCG@1 and nDCG@5 over all queries, for the log of a training.

    Args:
        queries, rankings: As for [`measure_queries`].
    """
    measured = evaluate_rankings(queries, rankings)["all"]
    return {name: measured[name] for name in ("nDCG@1", "nDCG@5")}


def compare_rankings(
    queries: Sequence[Query], rankings: Mapping[str, Sequence[Sequence[RetrievedTool]]], seed: int = 0
) -> dict[str, Any]:
    """Score several systems on the same queries, and tell how sure their scores and their differences are.

    Args:
        queries (`Sequence[Query]`):
            The queries with their ground-truth tools.
        rankings (`Mapping[str, Sequence[Sequence[RetrievedTool]]]`):
            For each system its rankings, as for [`evaluate_rankings`]. The first is the one that the others are
            compared with.
        seed (`int`, *optional*, defaults to 0):
            Seed of the bootstrap.

    Returns:
        `dict`: `results`, name -> what [`evaluate_rankings`] returns; `intervals`, name -> group -> measure -> the
        ends of the 95 % interval (percentiles of 1,000 bootstrap samples of the queries); `p_values`, rival -> group
        -> measure -> probability of a difference to the first system at least as large if there were none (paired
        t-test over the queries, two-sided).
    """
    values = np.stack([measure_queries(queries, ranking) for ranking in rankings.values()], axis=1)
    compared: dict[str, Any] = {key: {name: {} for name in rankings} for key in ("results", "intervals", "p_values")}
    for group, members in query_groups(queries).items():
        scores = values[members]  # (num_queries, num_systems, num_measures)
        intervals = bootstrap_intervals(scores, seed)
        p_values = _paired_p_values(scores)
        for i, name in enumerate(rankings):
            compared["results"][name][group] = {"queries": len(members), **_named(scores[:, i].mean(0))}
            compared["intervals"][name][group] = _named(np.stack(intervals[:, i], axis=-1))
            compared["p_values"][name][group] = _named(p_values[i])
    del compared["p_values"][next(iter(rankings))]
    return compared


def _named(values: np.ndarray) -> dict[str, Any]:
    return dict(zip(MEASURES, values.tolist(), strict=True))


def bootstrap_intervals(scores: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return both ends of the 95 % intervals of the means over the first axis, of shape `(2, *scores.shape[1:])`."""
    num_queries = len(scores)
    # How often each query is drawn into a sample; all systems see the same samples.
    draws = np.random.default_rng(seed).multinomial(
        num_queries, np.full(num_queries, 1 / num_queries), size=NUM_RESAMPLES
    )
    means = np.tensordot(draws / num_queries, scores, axes=1)
    return np.percentile(means, [2.5, 97.5], axis=0)


def _paired_p_values(scores: np.ndarray) -> np.ndarray:
    """Return the p-values of every system's difference to the first, of shape `scores.shape[1:]`."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # of systems that differ for no query, or for all alike
        p_values = ttest_rel(scores[:, :1], scores, axis=0).pvalue
    return np.nan_to_num(p_values, nan=1.0)


def markdown_table(
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
    group: str = "all",
    intervals: Mapping[str, Any] | None = None,
    p_values: Mapping[str, Any] | None = None,
) -> str:
    """Lay out one group of the results of several systems in Markdown.

    Args:
        results (`Mapping`):
            Name -> what [`evaluate_rankings`] returned.
        group (`str`, *optional*, defaults to `"all"`):
            The group of queries.
        intervals, p_values (`Mapping`, *optional*):
            As [`compare_rankings`] returns them. With intervals a value is followed by ± half of its interval's
            width; with p-values † marks a difference to the first system with p below 0.05, multiplied by the number
            of rivals (Bonferroni).

    Returns:
        `str`: the table. Measures are in percent, the best value of each in bold.
    """
    systems = {name: result[group] for name, result in results.items() if group in result}
    measures = [measure for measure in MEASURES if all(measure in result for result in systems.values())]
    best = {measure: max(result[measure] for result in systems.values()) for measure in measures}
    lines = [f"| | {' | '.join(measures)} |", "|---|" + "---:|" * len(measures)]
    for name, result in systems.items():
        cells = []
        for measure in measures:
            cell = f"{100 * result[measure]:.1f}"
            if result[measure] == best[measure]:
                cell = f"**{cell}**"
            if intervals is not None:
                low, high = intervals[name][group][measure]
                cell += f" ± {50 * (high - low):.1f}"
            if p_values and name in p_values:
                cell += " †" if p_values[name][group][measure] * len(p_values) < SIGNIFICANCE_LEVEL else ""
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
