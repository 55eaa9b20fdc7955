"""The benchmarks measure what they claim, on tiny models."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import small_llama
from safetensors.numpy import save_file
from transformers import AutoConfig

from toolweaver_hf import RQVAEConfig, RQVAEModel, Tool, ToolCatalog, ToolCodes
from toolweaver_hf.demo import DEMO_FOLDER
from toolweaver_hf.recipes.benchmarks import decoding as benchmark_decoding
from toolweaver_hf.recipes.benchmarks import forgetting as benchmark_forgetting
from toolweaver_hf.recipes.benchmarks import latency as benchmark_latency
from toolweaver_hf.recipes.benchmarks import replay as benchmark_replay
from toolweaver_hf.recipes.benchmarks import scale as benchmark_scale
from toolweaver_hf.recipes.benchmarks import tokenization as benchmark_tokenization
from toolweaver_hf.recipes.benchmarks import training as benchmark_training
from toolweaver_hf.recipes.results import render_tables
from toolweaver_hf.text_expert import TextExpert


@pytest.fixture
def base(base_tokenizer, tmp_path):
    small_llama(len(base_tokenizer)).save_pretrained(tmp_path / "base")
    base_tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_perplexity_is_that_of_transformers_loss():
    model = small_llama(50).eval()
    windows = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(0))
    losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    assert benchmark_forgetting.perplexity(model, windows) == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


def test_new_rows_and_training_cost_perplexity(base, tmp_path):
    catalog = ToolCatalog([Tool(f"tool {i}", f"Does the thing number {i}.") for i in range(16)])
    catalog.save_pretrained(tmp_path / "codes")
    ToolCodes([4, 4], {tool.id: [i // 4, i % 4] for i, tool in enumerate(catalog)}).save_pretrained(tmp_path / "codes")
    RQVAEModel(RQVAEConfig(input_dim=8, codebook_sizes=[4, 4])).save_pretrained(tmp_path / "codes")
    queries = [{"id": str(i), "text": f"Do thing {i}", "tools": [f"tool {i}"]} for i in range(16)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    chat = [{"role": "user", "content": "Good morning"}, {"role": "assistant", "content": "Good morning to you."}]
    (tmp_path / "replay.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    args = {"max_steps": 2, "batch_size": 4, "num_tokens": 500, "window": 64, "output_dir": str(tmp_path / "out")}
    args |= {"queries": str(tmp_path / "queries.jsonl"), "replay": str(tmp_path / "replay.jsonl")}
    args |= {"text": str(DEMO_FOLDER / "__init__.py"), "codes_dir": str(tmp_path / "codes"), "model": base}
    results = benchmark_forgetting.main(benchmark_forgetting.ForgettingArguments(**args))
    assert results["base"]["of the base"] == 1
    for name in ("codes, untrained rows (codebook)", "atomic tokens, untrained rows (random)"):
        assert results[name]["of the base"] > 1  # what the new tokens take of the probability
    for name in ("codes, LoRA, new rows, replay", "atomic tokens, all weights, no replay"):
        assert results[name]["perplexity"] not in (results["base"]["perplexity"], math.inf)
        assert results[name]["training loss"] > 0
    saved = json.loads((tmp_path / "out" / "benchmark_forgetting.json").read_text())
    assert saved["results"] == results and saved["tokens"] % 64 == 0
    # Cut off before the last was measured, it is gone on with: the model is not trained again
    path, last = tmp_path / "out" / "benchmark_forgetting.json", list(results)[-1]
    path.write_text(json.dumps(saved | {"results": {name: results[name] for name in results if name != last}}))
    model = tmp_path / "out" / "atomic-tokens-full" / "model.safetensors"
    written = model.stat().st_mtime_ns
    assert benchmark_forgetting.main(benchmark_forgetting.ForgettingArguments(**args)) == results
    assert model.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="fewer than the 4096"):
        benchmark_forgetting.main(benchmark_forgetting.ForgettingArguments(**args | {"window": 4096}))


def test_scale(base, tmp_path, capsys):
    config = AutoConfig.from_pretrained(base)
    results = {}
    for size, code_tokens in ((20, 2 * 32), (600, 2 * 128)):
        results[str(size)] = {}
        for method, tokens in (("codes", code_tokens), ("atomic tokens", size)):
            row = benchmark_scale.new_rows(config, size, method)
            assert row["new_tokens"] == tokens
            assert row["new_parameters"] == 2 * 32 * tokens  # an untied head has its own rows
            measured = benchmark_scale.measure(base, size, method, 1)
            assert measured["new_parameters"] == row["new_parameters"] and min(measured.values()) > 0
            results[str(size)][method] = row | measured
    # More than any machine holds: counted, but not run
    too_many = benchmark_scale.main(benchmark_scale.ScaleArguments(base, [10**9], output_dir=str(tmp_path)))
    assert "| 64,000,000,000 | 976,562 | not run" in capsys.readouterr().out
    benchmark_scale.draw(results | too_many, str(tmp_path / "scale.png"))
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_tokenization_of_synthetic_tools_and_of_a_catalog(tmp_path, capsys):
    options = {"codebook_size": 16, "threads": 1, "output_dir": str(tmp_path)}
    args = benchmark_tokenization.BenchmarkArguments(steps=2, **options)
    for way in ("sparse", "dense"):
        result = benchmark_tokenization.measure(way, lambda: benchmark_tokenization.synthetic_tools(100, 6), args)
        assert all(result[name] > 0 for name in ("step", "assignment", "fit", "memory"))

    catalog = ToolCatalog([Tool(f"tool {i}", f"Does the thing number {i}.") for i in range(60)])
    catalog.to_jsonl(tmp_path / "catalog.jsonl")
    pairs = 2 * [[f"tool {i}", f"tool {i // 2}"] for i in range(60)]
    queries = [{"id": str(i), "text": "?", "tools": pair} for i, pair in enumerate(pairs)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    embeddings = np.random.default_rng(0).standard_normal((60, 8), dtype=np.float32)
    key = {"encoder": "none", "catalog": catalog.checksum}
    save_file({"embeddings": embeddings}, tmp_path / "embeddings.safetensors", metadata=key)
    options |= {
        "catalog": str(tmp_path / "catalog.jsonl"),
        "queries": str(tmp_path / "queries.jsonl"),
        "encoder": "none",
    }
    capsys.readouterr()
    results = benchmark_tokenization.main(benchmark_tokenization.BenchmarkArguments(steps=20, **options))
    assert results == json.loads((tmp_path / "benchmark_tokenization.json").read_text())
    assert results["60, sparse"]["collisions"] == 0
    for result in results.values():
        assert result["held_out"]["pairs"] + result["cousage"]["pairs"] == 59
        assert 0 < result["reconstruction_loss"] < 1.5
    assert capsys.readouterr().out.count("\n| 60, ") == 2


def test_a_step_of_decoding_becomes_a_table(tmp_path, capsys):
    args = benchmark_decoding.BenchmarkArguments([500], 3, 1000, repeats=1, output_dir=str(tmp_path))
    steps = benchmark_decoding.main(args)["500"]
    assert [*steps] == ["building", *benchmark_decoding.STATES]
    table = render_tables(tmp_path)
    assert table in capsys.readouterr().out
    assert f"| trajectory, free text | {steps['trajectory, free text']['ToolCodeLogitsProcessor']:.2f} |" in table


def test_search_learns_from_replayed_queries(base, tmp_path, monkeypatch):
    def encode(self, texts, *args, **kwargs):
        counts = torch.tensor([[text.count(3 * letter) + 0.1 for letter in "abcdefgh"] for text in texts])
        return torch.nn.functional.normalize(counts, dim=1)

    monkeypatch.setattr(TextExpert, "_encode", encode)
    ToolCatalog([Tool(f"s.{letter}", "Does a thing.") for letter in "abcdefgh"]).to_jsonl(tmp_path / "catalog.jsonl")
    for name, numbers in (("train", range(12)), ("test", range(20, 24))):
        rows = [{"id": f"{c}{i}", "text": 9 * c + str(i), "tools": [f"s.{c}"]} for c in "abcdefgh" for i in numbers]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / name) for name in ("catalog.jsonl", "train", "test", "out")]
    args = benchmark_replay.ReplayArguments(*files, calls=[0, 10, 1000], k=8, mistakes=0.5)
    results = benchmark_replay.main(args)["results"]
    assert [*results][:2] == ["0 calls", "10 calls"] and [*results][2] == "96 calls"  # all there are
    assert "10 calls, 50% wrong" in results
    quality = {name: measured["all"]["nDCG@1"] for name, measured in results.items()}
    assert quality["0 calls"] < quality["96 calls"] == 1
    assert (tmp_path / "out" / "replay.png").stat().st_size > 10_000


def test_latency_of_every_system(base, tmp_path, monkeypatch):
    monkeypatch.setattr(TextExpert, "_encode", lambda self, texts, *args, **kwargs: torch.ones(len(texts), 4) / 2)
    args = benchmark_latency.LatencyArguments(base, [60], repeats=1, num_threads=[1], batch_size=3)
    args.output_dir = str(tmp_path / "out")
    (rows,) = benchmark_latency.main(args).values()
    assert rows["search"]["passes"] == 0 and rows["one token a tool"]["passes"] == 1
    assert 1 <= rows[benchmark_latency.ONE_PASS]["passes"] <= rows[benchmark_latency.BASELINE]["passes"] == 2
    assert rows[benchmark_latency.BASELINE]["cpu_ratio"] == 1
    assert all(row["p50_ms"] <= row["p99_ms"] for row in rows.values())
    assert "codes, one pass" in render_tables(tmp_path / "out")


@pytest.mark.slow
def test_rows_side_by_side_are_fewer_tokens(base, tmp_path):
    """In batches of the shortest and the longest rows."""
    args = benchmark_training.TrainingBenchmarkArguments(base, 4, steps=2, output_dir=str(tmp_path / "out"))
    results = benchmark_training.main(args)
    for rows in results.values():
        assert rows[benchmark_training.PACKED]["computed"] <= rows[benchmark_training.APART]["computed"]
        assert rows[benchmark_training.TRL]["speedup"] == 1
    assert "rows side by side" in render_tables(tmp_path / "out")
