"""Measures of tool rankings, with confidence intervals and significance tests."""

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
RANKING_METRICS_VERSION = 1  # its schema_version

MEASURES = ("nDCG@1", "nDCG@3", "nDCG@5", "R@1", "R@3", "R@5", "RR@10", "COMP@3", "COMP@5")
"""The measures of a report. RR@10 is the reciprocal rank of the first ground-truth tool; its mean is known as MRR.
COMP@k (COLT, CIKM 2024) is the share of queries whose ground-truth tools are all among the first k."""

NUM_RESAMPLES = 1000
SIGNIFICANCE_LEVEL = 0.05


def measure_queries(queries: Sequence[Query], rankings: Sequence[Sequence[RetrievedTool]]) -> np.ndarray:
    """Compute the measures of each query.

    Args:
        queries (`Sequence[Query]`):
            The queries with their ground-truth tools.
        rankings (`Sequence[Sequence[RetrievedTool]]`):
            The retrieved tools of each query, best first; at least 10 for all measures to be meaningful.

    Returns:
        `np.ndarray` of shape `(num_queries, len(MEASURES))`: the measures, between 0 and 1.
    """
    rows = {query.id: row for row, query in enumerate(queries)}
    qrels = {query.id: dict.fromkeys(query.tools, 1) for query in queries}
    # Scores are replaced by ranks, since ir-measures breaks ties by tool id.
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
    """Warn of ground-truth tools that are not ranked.

    They stay in the ground truth and count as missed. ToolBench's queries, for example, name tools that its catalogs
    lack.

    Args:
        queries (`Sequence[Query]`): The queries.
        tool_ids (`Iterable[str]`): Ids of the ranked tools.
        source (`str`): Where they come from, for the message.

    Raises:
        `ValueError`: if none of the ground-truth tools is ranked, as with ids of another catalog.
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
    """Return the rows of each group of queries: `all`, `single` (one ground-truth tool), `multi` (several), and each
    [`Query`] `group`. Empty groups are left out."""
    rows = np.arange(len(queries))
    several = np.array([len(query.tools) > 1 for query in queries], dtype=bool)
    groups = {"all": rows, "single": rows[~several], "multi": rows[several]}
    for name in dict.fromkeys(query.group for query in queries if query.group):
        groups[name] = rows[[query.group == name for query in queries]]
    return {name: members for name, members in groups.items() if len(members)}


def evaluate_rankings(
    queries: Sequence[Query], rankings: Sequence[Sequence[RetrievedTool]]
) -> dict[str, dict[str, float]]:
    """Compute the mean of the measures over each group of queries.

    Args:
        queries, rankings: As for [`measure_queries`].

    Returns:
        `dict[str, dict[str, float]]`: group ([`query_groups`]) -> measure -> its mean, between 0 and 1; and the
        group's number of `queries`.
    """
    values = measure_queries(queries, rankings)
    return {
        group: {"queries": len(members), **_named(values[members].mean(0))}
        for group, members in query_groups(queries).items()
    }


def ranking_metrics(queries: Sequence[Query], rankings: Sequence[Sequence[RetrievedTool]]) -> dict[str, float]:
    """Return nDCG@1 and nDCG@5 over all queries, for the training log.

    Args:
        queries, rankings: As for [`measure_queries`].
    """
    measured = evaluate_rankings(queries, rankings)["all"]
    return {name: measured[name] for name in ("nDCG@1", "nDCG@5")}


def compare_rankings(
    queries: Sequence[Query], rankings: Mapping[str, Sequence[Sequence[RetrievedTool]]], seed: int = 0
) -> dict[str, Any]:
    """Evaluate several systems on the same queries, with confidence intervals and significance tests.

    Args:
        queries (`Sequence[Query]`):
            The queries with their ground-truth tools.
        rankings (`Mapping[str, Sequence[Sequence[RetrievedTool]]]`):
            The rankings of each system, as for [`evaluate_rankings`]. The first system is the one that the others are
            compared with.
        seed (`int`, *optional*, defaults to 0):
            Seed of the bootstrap.

    Returns:
        `dict`: `results`, system -> result of [`evaluate_rankings`]; `intervals`, system -> group -> measure -> ends
        of the 95 % interval (percentiles of 1,000 bootstrap samples of the queries); `p_values`, system -> group ->
        measure -> p-value of the difference to the first system (two-sided paired t-test over the queries).
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
    # How often each query occurs in a sample; the samples are the same for all systems.
    draws = np.random.default_rng(seed).multinomial(
        num_queries, np.full(num_queries, 1 / num_queries), size=NUM_RESAMPLES
    )
    means = np.tensordot(draws / num_queries, scores, axes=1)
    return np.percentile(means, [2.5, 97.5], axis=0)


def _paired_p_values(scores: np.ndarray) -> np.ndarray:
    """Return the p-values of every system's difference to the first, of shape `scores.shape[1:]`."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # for systems whose difference is the same for all queries
        p_values = ttest_rel(scores[:, :1], scores, axis=0).pvalue
    return np.nan_to_num(p_values, nan=1.0)


def markdown_table(
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
    group: str = "all",
    intervals: Mapping[str, Any] | None = None,
    p_values: Mapping[str, Any] | None = None,
) -> str:
    """Format the results of several systems on one group of queries as a Markdown table.

    Args:
        results (`Mapping`):
            System -> result of [`evaluate_rankings`].
        group (`str`, *optional*, defaults to `"all"`):
            The group of queries.
        intervals, p_values (`Mapping`, *optional*):
            As returned by [`compare_rankings`]. With intervals, each value is followed by ± half the width of its
            interval. With p-values, † marks a significant difference to the first system (p < 0.05,
            Bonferroni-corrected).

    Returns:
        `str`: the table, in percent, with the best value of each measure in bold.
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
