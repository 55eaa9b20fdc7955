"""How good a ranking of tools is."""

from __future__ import annotations

from collections.abc import Sequence

import ir_measures
from ir_measures import R, nDCG

from .data import Query
from .retrieval import RetrievedTool


METRICS_FILE = "metrics.json"
METRICS_VERSION = 1  # its schema_version

MEASURES = ("nDCG@1", "nDCG@3", "nDCG@5", "R@1", "R@3", "R@5", "COMP@3")
"""The measures of a report. COMP@k (COLT, CIKM 2024) is the share of queries whose tools are all among the first k."""


def evaluate_rankings(
    queries: Sequence[Query], rankings: Sequence[Sequence[RetrievedTool]]
) -> dict[str, dict[str, float]]:
    """Score the tools that were retrieved for each query.

    Args:
        queries (`Sequence[Query]`):
            The queries with their ground-truth tools.
        rankings (`Sequence[Sequence[RetrievedTool]]`):
            For each query the tools retrieved, best first; at least 5 for every measure to be meaningful.

    Returns:
        `dict[str, dict[str, float]]`: the means of `MEASURES`, each between 0 and 1, for the groups `all`, `single`
        (queries with one ground-truth tool) and `multi` (with several), with the group's number of `queries`. A group
        without a query is left out.
    """
    qrels = {query.id: dict.fromkeys(query.tools, 1) for query in queries}
    # A rank, not the score, decides: equal scores would otherwise be ordered by the tools' ids.
    run = {
        query.id: {tool.tool_id: -float(rank) for rank, tool in enumerate(ranking)}
        for query, ranking in zip(queries, rankings, strict=True)
    }
    measures = [nDCG @ 1, nDCG @ 3, nDCG @ 5, R @ 1, R @ 3, R @ 5]
    values: dict[str, dict[str, float]] = {query.id: {} for query in queries}
    for value in ir_measures.iter_calc(measures, qrels, run):
        values[value.query_id][str(value.measure)] = value.value
    for measured in values.values():
        measured["COMP@3"] = float(measured["R@3"] == 1)
    groups = {
        "all": queries,
        "single": [query for query in queries if len(query.tools) == 1],
        "multi": [query for query in queries if len(query.tools) > 1],
    }
    return {
        group: {
            "queries": len(members),
            **{name: sum(values[query.id][name] for query in members) / len(members) for name in MEASURES},
        }
        for group, members in groups.items()
        if members
    }


def markdown_table(results: dict[str, dict[str, dict[str, float]]], group: str = "all") -> str:
    """Lay out one group of the results of several systems (name -> what [`evaluate_rankings`] returned) in Markdown.

    Measures are in percent, the best value of each in bold.
    """
    systems = {name: result[group] for name, result in results.items() if group in result}
    best = {measure: max(result[measure] for result in systems.values()) for measure in MEASURES}
    lines = [f"| | {' | '.join(MEASURES)} |", "|---|" + "---:|" * len(MEASURES)]
    for name, result in systems.items():
        cells = (f"{100 * result[measure]:.1f}" for measure in MEASURES)
        marked = (
            f"**{cell}**" if result[measure] == best[measure] else cell
            for cell, measure in zip(cells, MEASURES, strict=True)
        )
        lines.append(f"| {name} | {' | '.join(marked)} |")
    return "\n".join(lines)
