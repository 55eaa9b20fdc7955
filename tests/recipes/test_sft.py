"""The alignment recipe on tiny models: losses, LoRA, evaluation while training, what stops a run, configurations."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, is_deepspeed_available
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from architectures import tiny_model
from bases import CHATML, build
from conftest import small_llama
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from transformers import AutoModelForCausalLM, TrainerState
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config

from toolweaver_hf import TextExpert, Tool, ToolCatalog, ToolCodes, ToolRetriever, ToolWeaverTokenizer
from toolweaver_hf.alignment.checkpoints import check_disk_space, last_checkpoint
from toolweaver_hf.alignment.embedding_init import initialize_code_embeddings
from toolweaver_hf.alignment.lora import trainable_code_rows
from toolweaver_hf.alignment.rows import retrieval_rows, tokenize_rows
from toolweaver_hf.alignment.trainer import CODE_START_WEIGHT, AlignmentTrainer, AlignmentTrainingArguments
from toolweaver_hf.data.queries import Query, load_queries
from toolweaver_hf.demo import DEMO_FOLDER
from toolweaver_hf.recipes import sft
from toolweaver_hf.text_expert import fast_dtype


RECIPES = Path(__file__).parents[2] / "recipes"
ARGUMENTS = (sft.AlignmentArguments, AlignmentTrainingArguments, ModelConfig)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """30 tools with codes, 64 queries, and a tied and an untied base model whose matrices are padded."""
    folder = tmp_path_factory.mktemp("world")
    catalog = ToolCatalog([Tool(f"t{i}", f"Tool number {i}, for thing {i * 7}.") for i in range(30)])
    checksums = {tool.id: tool.checksum for tool in catalog}
    ToolCodes([8, 8], {f"t{i}": divmod(i, 8) for i in range(30)}, checksums).save_pretrained(folder / "codes")
    catalog.to_jsonl(folder / "codes" / "catalog.jsonl")
    with open(folder / "queries.jsonl", "w") as file:
        for i in range(64):
            row = {"id": f"q{i}", "text": f"Please do thing {i % 30 * 7}, {i}", "tools": [f"t{i % 30}"]}
            file.write(json.dumps(row) + "\n")
    base = build("smollm2")
    for tied in (True, False):
        name = folder / ("tied" if tied else "untied")
        small_llama(len(base) + 9, tie_word_embeddings=tied).save_pretrained(name)
        base.save_pretrained(name)
    return folder


def run(world, output, model="tied", model_args=None, **kwargs):
    names = set(sft.AlignmentArguments.__dataclass_fields__)
    arguments = {
        "codes_dir": str(world / "codes"),
        "queries": str(world / "queries.jsonl"),
        "embedding_init": "random",
    }
    arguments |= {name: kwargs.pop(name) for name in list(kwargs) if name in names}
    settings = {
        "output_dir": str(output),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "bf16": False,  # losses are compared
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    model = world / model if isinstance(model, str) else model
    sft.main(
        sft.AlignmentArguments(**arguments),
        AlignmentTrainingArguments(**(settings | kwargs)),
        ModelConfig(str(model), **(model_args or {})),
    )
    return output


def test_an_aligned_model_is_guided_and_its_weights_are_fitted(world, tmp_path):
    """Also where the training computes in bf16, whose rounding must not be taken for another model."""
    asked = [f"Please do thing {2 * i * 7} now." for i in range(12)]
    rows = [{"id": str(i), "text": text, "tools": [f"t{2 * i}"]} for i, text in enumerate(asked)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = {"eval_queries": str(tmp_path / "held_out.jsonl"), "eval_strategy": "steps", "eval_steps": 4}
    folder = run(world, tmp_path / "out", bf16=True, **held_out)
    retriever = ToolRetriever.from_pretrained(folder)
    expert, queries = retriever.text_expert, load_queries(world / "queries.jsonl")
    assert expert.learned == {tool for query in queries for tool in query.tools}
    assert len(expert.memory) == len(queries)
    assert expert.cosine_weight != TextExpert(["x"], ["y"]).cosine_weight  # fitted
    found = retriever(asked, top_k=1)
    hits = sum(tools[0].tool_id == row["tools"][0] for tools, row in zip(found, rows, strict=True))
    alone = ToolRetriever(retriever.model, retriever.tokenizer)(asked, top_k=1)
    assert hits > sum(tools[0].tool_id == row["tools"][0] for tools, row in zip(alone, rows, strict=True))


def test_a_model_learns_how_many_tools_a_query_needs(world, tmp_path):
    """And it is found out on the validation queries whether it has."""
    singles = [{"text": f"Please do thing {i * 7}", "tools": [f"t{i}"]} for i in range(24)]
    pairs = [
        {"text": f"Please do {i * 7} and {j * 7}", "tools": [f"t{i}", f"t{j}"]} for i in range(24) for j in (1, 5)
    ]
    pairs = [row for row in pairs if len(set(row["tools"])) == 2]
    rows = [{"id": str(i)} | row for i, row in enumerate(singles + pairs)]
    for name, part in (("train", 1), ("held_out", 0)):
        chosen = [row for i, row in enumerate(rows) if (i % 3 > 0) == part]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    files = {"queries": str(tmp_path / "train.jsonl"), "eval_queries": str(tmp_path / "held_out.jsonl")}
    folder = run(world, tmp_path / "out", max_steps=60, **files)
    retriever = ToolRetriever.from_pretrained(folder)
    assert retriever.text_expert.tells_end
    told = [
        bool(retriever.more_log_odds(retriever.read_answers([query.text], [query.tools[:1]])[1]) > 0)
        == (len(query.tools) > 1)
        for query in load_queries(tmp_path / "held_out.jsonl")
    ]
    assert sum(told) > 0.8 * len(told)
    singles_alone = tmp_path / "singles.jsonl"
    singles_alone.write_text("".join(json.dumps({"id": row["text"]} | row) + "\n" for row in singles))
    folder = run(world, tmp_path / "untold", queries=files["queries"], eval_queries=str(singles_alone), max_steps=2)
    assert not TextExpert.from_pretrained(folder).tells_end  # where all need one tool there is nothing to tell


CALL = 'I look.\n<a_0><b_0>{"city": "Oslo", "code": "<a_1>"}'


def trainer_of(world, model_name, tmp_path, lora=False, codes=None, queries=None, **kwargs):
    codes = ToolCodes.from_pretrained(codes or world / "codes")
    tokenizer = ToolWeaverTokenizer.from_base(build("smollm2"), codes)
    model = AutoModelForCausalLM.from_pretrained(world / model_name)
    initialize_code_embeddings(model, tokenizer, method="random")
    queries = load_queries(queries or world / "queries.jsonl")
    rows = retrieval_rows([*queries, Query("two", "Both?", (queries[0].tools[0], queries[1].tools[0]))], tokenizer)
    rows.append({"id": "call", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": CALL}]})
    dataset, _ = tokenize_rows(rows, tokenizer)
    settings = {"activation_checkpointing": False, "report_to": "none", "max_length": None} | kwargs
    peft_config = get_peft_config(ModelConfig(use_peft=True, lora_r=4)) if lora else None
    if lora:
        peft_config.trainable_token_indices = trainable_code_rows(model, tokenizer)
    return AlignmentTrainer(
        model=model,
        args=AlignmentTrainingArguments(str(tmp_path), per_device_train_batch_size=8, **settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def loss_token_by_token(model, tokenizer, batch):
    """The mean cross-entropy of the labels over the valid continuations, by brute force over all codes; in a call, a
    code's first token counts for several. An answer of codes ends, or goes on with another, where a code does."""
    labels = batch["labels"]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    codes = [tokenizer.encode_tool(tool_id) for tool_id in tokenizer.tool_ids]
    losses = []
    for row, learned in enumerate(labels.tolist()):
        answer = [label for label in learned if label != -100]
        only_codes = not set(answer) - set(tokenizer.code_token_ids) - {tokenizer.eos_token_id}
        for i, label in enumerate(learned):
            if label == -100:
                continue
            allowed = range(len(tokenizer))  # the rest is padding of the matrix
            for code in codes:
                for depth in range(1, len(code)):
                    if learned[i - depth : i + 1] == code[: depth + 1]:
                        allowed = sorted({other[depth] for other in codes if other[:depth] == code[:depth]})
            if only_codes and label in {tokenizer.eos_token_id, *(code[0] for code in codes)}:
                end = set() if learned[i - 1] == -100 else {tokenizer.eos_token_id}
                allowed = sorted({code[0] for code in codes} | end)
            scores = logits[row, i - 1, list(allowed)]
            loss = scores.logsumexp(0) - scores[list(allowed).index(label)]
            begins = not only_codes and label in {code[0] for code in codes}
            losses.append(CODE_START_WEIGHT * loss if begins else loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("rows", [(0, 1, -3, -2, -1), (0, 1, -3, -2)], ids=["codes and text", "codes alone"])
def test_the_loss_is_among_what_decoding_leaves(world, tmp_path, model, lora, rows):
    """Codes alone from their first token on, a call from its second; all else in the whole vocabulary."""
    trainer = trainer_of(world, model, tmp_path, lora)
    rows = [trainer.train_dataset[i] for i in rows]
    batch = trainer.data_collator([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
    trainer.model.eval()  # no dropout
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    loss = trainer.compute_loss(trainer.model, dict(batch))
    expected = loss_token_by_token(trainer.model, trainer.processing_class, batch)
    torch.testing.assert_close(loss, expected)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    for name, gradient in zip(names, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)
    if lora:  # the rows of the code tokens learn in every embedding matrix, and no other row does
        rows = [gradient for name, gradient in gradients.items() if "trainable_tokens" in name]
        assert len(rows) == (1 if model == "tied" else 2)
        assert all(gradient.shape == (16, 32) and gradient.abs().sum() > 0 for gradient in rows)


def test_the_loss_over_the_whole_vocabulary_is_that_of_transformers(world, tmp_path):
    trainer = trainer_of(world, "tied", tmp_path, lora=False, constrained_loss=False)
    rows = [trainer.train_dataset[i] for i in (0, 1, 2, -1)]
    batch = trainer.data_collator([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
    trainer.model.eval()
    logits = trainer.model(**batch).logits[..., : len(trainer.processing_class)]  # the rest is padding of the matrix
    expected = trainer.model.loss_function(logits, batch["labels"], vocab_size=logits.shape[-1])
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_embeddings_have_a_learning_rate_of_their_own(world, tmp_path, model, lora):
    """Each of the two alone moves what is its own, and nothing else."""
    for own, other in ((1e-2, 0.0), (0.0, 1e-2)):
        trainer = trainer_of(
            world, model, tmp_path, lora, max_steps=2, learning_rate=other, embedding_learning_rate=own, warmup_steps=0
        )
        before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()
        moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
        assert moved
        embeddings = ("embed_tokens", "lm_head")
        assert all(any(part in name for part in embeddings) == (own > 0) for name in moved), moved


@pytest.mark.parametrize(
    "kwargs",
    [
        {"padding_free": True},
        {"activation_checkpointing": True},
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_ways_to_save_memory_learn_the_same(world, tmp_path, kwargs):
    losses = [
        losses_of(run(world, tmp_path / name, save_strategy="steps", save_steps=4, **settings))
        for name, settings in (("plain", {}), ("other", kwargs))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if "bf16" in kwargs else 1e-3)


def test_packed_rows_are_learned(world, tmp_path):
    settings = {"packing": True, "max_length": 256, "save_strategy": "steps", "save_steps": 30, "max_steps": 30}
    losses = losses_of(run(world, tmp_path, **settings))
    assert losses[-1] < 0.7 * losses[0]


def losses_of(output):
    (checkpoint,) = output.glob("checkpoint-*")
    state = TrainerState.load_from_json(checkpoint / "trainer_state.json")
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


def test_wrapped_packing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cuts rows"):
        AlignmentTrainingArguments(str(tmp_path), packing=True, packing_strategy="wrapped")


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_lora_adapter_is_small_loads_and_is_trained_on(world, tmp_path, model):
    lora = {"use_peft": True, "lora_r": 4}
    first = run(world, tmp_path / "first", model, lora)
    with safe_open(first / "adapter_model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys() if "lora" not in name}  # noqa: SIM118
    assert sorted(shapes.values()) == [[16, 32]] * (1 if model == "tied" else 2)

    # One call opens it; merged, it gives the same logits, and the base model's rows are as they were.
    adapted = AutoPeftModelForCausalLM.from_pretrained(first).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(world / model)
    num_base = ToolWeaverTokenizer.from_pretrained(first).level_offsets[0]
    for matrices in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(merged, matrices)().weight[:num_base], getattr(base, matrices)().weight[:num_base])
    merged.save_pretrained(tmp_path / "merged")
    ToolWeaverTokenizer.from_pretrained(first).save_pretrained(tmp_path / "merged")
    folders = (first, tmp_path / "merged")
    rankings = [ToolRetriever.from_pretrained(folder, guided=False)("Do thing 21") for folder in folders]
    assert [tool.tool_id for tool in rankings[0][0]] == [tool.tool_id for tool in rankings[1][0]]

    # The next stage goes on with the adapter, or, without LoRA, with it in the weights.
    second = run(world, tmp_path / "second", first, lora, stages=["memorization"], learning_rate=0.0)
    assert (second / "adapter_model.safetensors").read_bytes() == (first / "adapter_model.safetensors").read_bytes()
    whole = run(world, tmp_path / "whole", first, stages=["memorization"], learning_rate=0.0)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(whole)(ids).logits[..., : expected.shape[-1]]  # without padding
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_evaluation_while_training_keeps_the_best(world, tmp_path, lora):
    output = run(
        world,
        tmp_path,
        model_args={"use_peft": lora},
        eval_queries=str(world / "queries.jsonl"),
        max_eval_queries=40,
        early_stopping_patience=2,
        max_steps=60,
        learning_rate=2e-2,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="steps",
        save_steps=10,
        load_best_model_at_end=True,
    )
    state = TrainerState.load_from_json(Path(last_checkpoint(output)) / "trainer_state.json")
    measured = {entry["step"]: entry["eval_nDCG@1"] for entry in state.log_history if "eval_nDCG@1" in entry}
    assert state.best_metric == max(measured.values()) == measured[state.best_global_step] > 0
    assert all("eval_loss" in entry for entry in state.log_history if "eval_nDCG@1" in entry)
    saved, best = (next(folder.glob("*model.safetensors")) for folder in (output, Path(state.best_model_checkpoint)))
    assert saved.read_bytes() == best.read_bytes()


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-20", "checkpoint-best"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-20":  # as if a kill had come while it was written
            TrainerState().save_to_json(tmp_path / name / "trainer_state.json")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_held_out_rows_end_as_those_learned(world, tmp_path):
    """Also where a turn ends with another token than the tokenizer's own, as the base's generation_config says."""
    base = build("smollm2")
    base.eos_token = "<|endoftext|>"
    model = small_llama(len(base))
    model.generation_config.eos_token_id = base.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    model.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    output = run(
        world,
        tmp_path / "out",
        model=tmp_path / "base",
        stages=["retrieval"],
        eval_queries=str(world / "queries.jsonl"),
        guided=False,
        per_device_train_batch_size=64,
        max_steps=1,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    history = TrainerState.load_from_json(Path(last_checkpoint(output)) / "trainer_state.json").log_history
    logged = {name: value for entry in history for name, value in entry.items()}
    assert logged["eval_loss"] == pytest.approx(logged["loss"], rel=1e-3)


def test_stages_are_weighed_and_long_rows_reported(world, tmp_path, caplog):
    (world / "chat.jsonl").write_text(
        json.dumps({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello. " * 200}]})
        + "\n"
        + json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]})
    )
    tokenizer = ToolWeaverTokenizer.from_base(build("smollm2"), ToolCodes.from_pretrained(world / "codes"))
    arguments = sft.AlignmentArguments(
        codes_dir=str(world / "codes"),
        stages=["memorization", "retrieval", "replay"],
        stage_weights=[2, 0.5, 3],
        queries=str(world / "queries.jsonl"),
        replay=str(world / "chat.jsonl"),
    )
    catalog = ToolCatalog.from_file(world / "codes" / "catalog.jsonl")
    AlignmentTrainingArguments(str(tmp_path))  # the logger needs its state
    with caplog.at_level("WARNING"):
        dataset, asked = sft.load_rows(arguments, catalog, tokenizer, 128, seed=0)
    assert len(asked) == 64 and {tool for _, tools in asked for tool in tools} <= set(catalog.ids)
    assert len(dataset) == 2 * 30 + 32 + 3 * 1
    assert "replay: 1 of 2 rows have more than 128 tokens: left out" in caplog.text
    with pytest.raises(ValueError, match="one for each stage"):
        sft.AlignmentArguments(codes_dir="x", stages=["memorization"], stage_weights=[1, 2])


def test_bad_rows_are_named_and_left_out_up_to_a_fraction(world, tmp_path, caplog):
    """A tool without a code, a result without a call, a content that is no text: each such row is left out."""
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    call = {"type": "function", "function": {"name": "t99", "arguments": {}}}
    rows = [{"messages": [user, answer]} for _ in range(27)]
    rows.insert(3, {"messages": [user, {**answer, "tool_calls": [call]}]})
    rows.insert(5, {"messages": [user, {"role": "tool", "content": "x"}, answer]})
    rows.insert(7, {"messages": [user, {**answer, "content": [{"type": "image"}]}]})
    path = tmp_path / "trajectories.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = ToolWeaverTokenizer.from_base(build("smollm2"), ToolCodes.from_pretrained(world / "codes"))
    catalog = ToolCatalog.from_file(world / "codes" / "catalog.jsonl")
    AlignmentTrainingArguments(str(tmp_path))  # the logger needs its state

    def load(stage, max_bad_rows):
        arguments = {"codes_dir": str(world / "codes"), "stages": [stage], "max_bad_rows": max_bad_rows}
        paths = {"trajectories": str(path), "replay": str(path)}
        return sft.load_rows(sft.AlignmentArguments(**arguments, **paths), catalog, tokenizer, 128, seed=0)[0]

    for stage in ("trajectory", "replay"):
        caplog.clear()
        with caplog.at_level("WARNING"):
            assert len(load(stage, 0.1)) == 27
        assert f"{stage}: 3 of 30 rows cannot be learned and are left out" in caplog.text
        for line, what in ((4, "'t99' has no code"), (6, "without a call before it"), (8, "type 'image'")):
            assert re.search(rf"trajectories\.jsonl, line {line}: .*{what}", caplog.text)
        with pytest.raises(ValueError, match=r"3 of 30 rows cannot be learned, more than --max_bad_rows 0\.09"):
            load(stage, 0.09)
    queries = [{"id": str(i), "text": "?", "tools": ["t1" if i else "t99"]} for i in range(3)] + [{"id": "9"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in queries))
    arguments = {"codes_dir": str(world / "codes"), "queries": str(path)}
    dataset, _ = sft.load_rows(sft.AlignmentArguments(**arguments, max_bad_rows=0.5), catalog, tokenizer, 128, 0)
    assert len(dataset) == 2
    with pytest.raises(ValueError, match=r"2 of 4 rows .*(?s:.*)line 4: a query needs.*(?s:.*)line 1: the tool 't99'"):
        sft.load_rows(sft.AlignmentArguments(**arguments), catalog, tokenizer, 128, 0)


def test_what_stops_a_run_before_training(world, tmp_path):
    catalog = ToolCatalog.from_file(world / "codes" / "catalog.jsonl")
    changed = ToolCatalog([Tool(tool.id, tool.description + (" New." if tool.id == "t3" else "")) for tool in catalog])
    ToolCodes.from_pretrained(world / "codes").save_pretrained(tmp_path / "codes")
    changed.to_jsonl(tmp_path / "codes" / "catalog.jsonl")
    with pytest.raises(ValueError, match="learned for: changed: t3"):
        run(world, tmp_path / "out", codes_dir=str(tmp_path / "codes"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        run(world, tmp_path / "file" / "out")
    with pytest.raises(OSError, match="GB free, but this run writes at least 1000000"):
        check_disk_space(tmp_path, 10**15)
    assert not (tmp_path / "out").exists()


def test_a_changed_catalog_is_taken_in(world, tmp_path):
    """A model that was aligned before is aligned further with tools added, removed and described anew."""
    first = run(world, tmp_path / "first", max_steps=1)
    catalog, codes = (
        ToolCatalog.from_file(world / "codes" / "catalog.jsonl"),
        ToolCodes.from_pretrained(world / "codes"),
    )
    new = Tool("new", "A new tool.")
    described = Tool("t3", "Another description.")
    checksums = codes.checksums | {"new": new.checksum, "t3": described.checksum}
    changed = ToolCodes(codes.codebook_sizes, {**codes, "new": (7, 7)}, checksums)
    changed.remove("t29")
    changed.save_pretrained(tmp_path / "codes")
    kept = [described if tool.id == "t3" else tool for tool in catalog if tool.id != "t29"]
    ToolCatalog([*kept, new]).to_jsonl(tmp_path / "codes" / "catalog.jsonl")
    asked = [query for query in (world / "queries.jsonl").read_text().splitlines(True) if '"t29"' not in query]
    (tmp_path / "queries.jsonl").write_text("".join(asked))
    options = {"codes_dir": str(tmp_path / "codes"), "queries": str(tmp_path / "queries.jsonl")}
    second = run(world, tmp_path / "second", first, max_steps=1, **options)
    assert TextExpert.from_pretrained(second).learned == {f"t{i}" for i in range(29)}
    assert (
        ToolWeaverTokenizer.from_pretrained(second).decode_tool(
            ToolWeaverTokenizer.from_pretrained(second).encode("<a_7><b_7>")
        )
        == "new"
    )
    assert "tool_codes" not in json.loads((second / "tokenizer_config.json").read_text())


def test_a_loss_that_is_no_number_names_the_rows(world, tmp_path):
    trainer = trainer_of(world, "tied", tmp_path, max_steps=20)
    rows = trainer.train_dataset
    token = (
        set(rows[17]["input_ids"]) - {i for n, row in enumerate(rows) if n != 17 for i in row["input_ids"]}
    ) or None
    with torch.no_grad():
        if token is None:  # no token of the row's own: its code's last level then
            trainer.model.get_input_embeddings().weight[rows[17]["labels"][-3]] = float("nan")
        else:
            trainer.model.get_input_embeddings().weight[token.pop()] = float("nan")
    with pytest.raises(ValueError, match=r"the loss became nan in step \d+, on the rows .*q\d+"):
        trainer.train()


def launch(world, output, *options):
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(RECIPES / "accelerate/cpu_2proc.yaml"), str(RECIPES / "sft.py")]
    settings = {
        "model_name_or_path": str(world / "tied"),
        "codes_dir": str(world / "codes"),
        "embedding_init": "random",
        "queries": str(world / "queries.jsonl"),
        "eval_queries": str(world / "queries.jsonl"),
        "eval_strategy": "steps",
        "eval_steps": 30,
        "output_dir": str(output),
        "max_steps": 60,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_steps": 10,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    (world / "config.yaml").write_text(yaml.safe_dump(settings))
    return subprocess.Popen(
        [*command, "--config", str(world / "config.yaml"), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_two_processes_train_as_one_through_a_kill(world, tmp_path):
    """Two processes are killed without warning and go on from the last checkpoint, to what one process reaches."""
    process = launch(world, tmp_path / "two")
    state = tmp_path / "two" / "checkpoint-10" / "trainer_state.json"
    deadline = time.monotonic() + 240
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "two" / "model.safetensors").exists(), process.communicate()[0][-3000:]
    process.communicate()
    (tmp_path / "two" / "checkpoint-999").mkdir()  # as if a kill had come while a checkpoint was written
    assert Path(last_checkpoint(tmp_path / "two")).name != "checkpoint-999"

    process = launch(world, tmp_path / "two", "--resume_from_checkpoint", "last")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    assert output.count("Aligned model saved") == 1
    one = run(
        world,
        tmp_path / "one",
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        save_strategy="steps",
        save_steps=60,
        eval_queries=str(world / "queries.jsonl"),
        eval_strategy="steps",
        eval_steps=30,
    )
    curves = []
    for folder in (tmp_path / "two", one):
        history = TrainerState.load_from_json(folder / "checkpoint-60" / "trainer_state.json").log_history
        curves.append([entry["loss"] for entry in history if "loss" in entry])
        curves.append([entry["eval_nDCG@5"] for entry in history if "eval_nDCG@5" in entry])
    assert len(curves[0]) == 60
    assert curves[0] == pytest.approx(curves[2], rel=1e-2)
    assert curves[1] == pytest.approx(curves[3], abs=0.05)
    assert not list((tmp_path / "two").glob("*.bin"))


@pytest.mark.parametrize("path", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_valid(path):
    args, training_args, model_args = TrlParser(ARGUMENTS).parse_args_and_config(["--config", str(path)])
    assert args.stages and model_args.model_name_or_path
    if path.stem.startswith("llama3_8b"):  # the paper's setting, on 8 GPUs
        batch = 8 * training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
        assert (training_args.learning_rate, batch, training_args.warmup_steps) == (2e-5, 128, 0.03)
        assert training_args.max_length == (6144 if path.stem.endswith("trajectory") else 1024)


def test_smoke_configuration_runs(world, tmp_path, monkeypatch):
    """On the demo's own files, with fewer steps, codes by number and an untrained model in place of the quick start's."""
    monkeypatch.chdir(RECIPES.parent)
    catalog = ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl")
    ToolCodes([16, 16], {tool.id: divmod(i, 16) for i, tool in enumerate(catalog)}).save_pretrained(tmp_path / "codes")
    catalog.to_jsonl(tmp_path / "codes" / "catalog.jsonl")
    options = {
        "model_name_or_path": world / "tied",
        "codes_dir": tmp_path / "codes",
        "embedding_init": "random",
        "output_dir": tmp_path / "out",
        "max_steps": 4,
        "eval_steps": 2,
        "save_steps": 2,
    }
    options = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    sft.cli(["--config", str(RECIPES / "configs/smoke.yaml"), *options])
    history = TrainerState.load_from_json(tmp_path / "out/checkpoint-4/trainer_state.json").log_history
    assert [entry["step"] for entry in history if "eval_nDCG@1" in entry] == [2, 4]


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_settings_build_their_plugin(path, monkeypatch):
    """What `accelerate launch` hands to the processes makes the plugin, as far as it is installed."""
    config = load_config_from_file(str(path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # this machine need not have what the file needs
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "sft.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == config.num_processes == (2 if path.stem == "cpu_2proc" else 8)
    if path.stem.startswith("deepspeed"):
        assert set(config.deepspeed_config) <= set(vars(arguments))
        if not is_deepspeed_available():
            pytest.skip("its plugin needs DeepSpeed")
        from accelerate.utils import DeepSpeedPlugin

        arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        plugin = DeepSpeedPlugin()
        assert plugin.zero_stage == int(path.stem[-1])
        assert not plugin.zero3_init_flag
    else:
        environment = prepare_multi_gpu_env(arguments)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if path.stem == "fsdp2":
            plugin = FullyShardedDataParallelPlugin()
            assert plugin.fsdp_version == 2 and not plugin.cpu_ram_efficient_loading


LORA = {"use_peft": True, "lora_r": 4}


def test_an_adapter_is_merged_into_its_own_base_alone(world, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(world / "untied", base)
    output = run(world, tmp_path / "out", base, LORA)
    expected = ToolRetriever.from_pretrained(output)("Do thing 21")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.to(torch.bfloat16).float().save_pretrained(base)  # what bfloat16 rounds alike is the same base
    ToolRetriever.from_pretrained(output)
    model.get_input_embeddings().weight.data[::2] += 0.1
    model.save_pretrained(base)
    with pytest.raises(ValueError, match="the embeddings differ"):
        ToolRetriever.from_pretrained(output)
    shutil.rmtree(base)
    shutil.copytree(world / "untied", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))
    with pytest.raises(ValueError, match="the config differ"):
        ToolRetriever.from_pretrained(output)
    (base / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    assert ToolRetriever.from_pretrained(output)("Do thing 21") == expected


def test_a_run_is_resumed_within_a_later_epoch(world, tmp_path):
    """Two steps are an epoch: the rows of the fourth are those that the third has left."""
    settings = {"per_device_train_batch_size": 32, "save_strategy": "steps", "save_steps": 3, "guided": False}
    whole = run(world, tmp_path / "whole", model_args=LORA, **settings)
    (tmp_path / "again").mkdir()
    (whole / "checkpoint-3").rename(tmp_path / "again" / "checkpoint-3")
    again = run(world, tmp_path / "again", model_args=LORA, resume_from_checkpoint="last", **settings)
    assert (whole / "adapter_model.safetensors").read_bytes() == (again / "adapter_model.safetensors").read_bytes()


def test_no_run_is_resumed_with_other_codes(world, tmp_path):
    run(world, tmp_path / "out", save_strategy="steps", save_steps=2)
    codes = ToolCodes.from_pretrained(world / "codes")
    swapped = dict(zip(codes.ids, reversed([*codes.values()]), strict=True))
    ToolCodes(codes.codebook_sizes, swapped, codes.checksums).save_pretrained(tmp_path / "codes")
    shutil.copy(world / "codes" / "catalog.jsonl", tmp_path / "codes")
    with pytest.raises(ValueError, match="checkpoint-4 was aligned with other codes"):
        run(world, tmp_path / "out", codes_dir=str(tmp_path / "codes"), resume_from_checkpoint="true")


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_a_mixture_of_experts_adds_its_auxiliary_loss(world, tmp_path, model_type):
    base = build("smollm2")
    tiny_model(model_type, len(base)).save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    trainer = trainer_of(tmp_path, "base", tmp_path / "out", codes=world / "codes", queries=world / "queries.jsonl")
    batch = trainer.data_collator(
        [{k: trainer.train_dataset[i][k] for k in ("input_ids", "labels")} for i in range(3)]
    )
    model = trainer.model.eval()
    loss = trainer.compute_loss(model, dict(batch))
    output = model(**{name: value for name, value in batch.items() if name != "labels"}, output_router_logits=True)
    constrained = loss_token_by_token(model, trainer.processing_class, batch)
    coefficient = model.config.router_aux_loss_coef
    assert coefficient > 0 and output.aux_loss > 0
    torch.testing.assert_close(loss, constrained + coefficient * output.aux_loss)
    run(world, tmp_path / "run", tmp_path / "base", max_steps=1)  # rows that share a prompt, by default


def test_arguments_are_honored_or_refused(world, tmp_path):
    with pytest.raises(ValueError, match="add --use_peft"):
        run(world, tmp_path, model_args={"load_in_4bit": True})
    with pytest.raises(ValueError, match="dataset_text_field, eos_token"):
        AlignmentTrainingArguments(str(tmp_path), dataset_text_field="x", eos_token="y")
    with pytest.raises(ValueError, match="--constrained_loss false"):
        AlignmentTrainingArguments(str(tmp_path), label_smoothing_factor=0.1)
    assert AlignmentTrainingArguments(str(tmp_path)).bf16 == (fast_dtype() == torch.bfloat16)
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("Be helpful.", "Be brief."))
    output = run(world, tmp_path / "out", max_steps=1, chat_template_path=str(template))
    tokenizer = ToolWeaverTokenizer.from_pretrained(output)
    assert "Be brief." in tokenizer.decode(tokenizer.encode_query("?"))
    with pytest.raises(ValueError, match="must be a file"):
        run(world, tmp_path / "out", chat_template_path="org/model")


@pytest.mark.parametrize("bits", [4, 8])
def test_lora_on_a_quantized_base(world, tmp_path, bits, caplog):
    pytest.importorskip("bitsandbytes", reason="quantizes")
    model_args = LORA | {f"load_in_{bits}bit": True, "dtype": "bfloat16"}
    output = run(world, tmp_path, "untied", model_args)
    with safe_open(output / "adapter_model.safetensors", "pt") as file:
        rows = [file.get_tensor(name) for name in file.keys() if "lora" not in name]  # noqa: SIM118
    assert {row.dtype for row in rows} == {torch.float32}  # the rows of the codes are learned in full precision
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert len(ToolRetriever.from_pretrained(output)("Do thing 21")[0]) == 5
        assert caplog.text.count("merged into that model in full precision") == 1
    finally:
        logger.removeHandler(caplog.handler)


def write_gguf(path, model, tokenizer):
    """Write a small Llama and its tokenizer as llama.cpp does, with the matrices in 8 bits."""
    gguf = pytest.importorskip("gguf", reason="writes GGUF files")
    config, backend = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        kind = gguf.GGMLQuantizationType.F32 if weight.ndim == 1 else gguf.GGMLQuantizationType.Q8_0
        data = gguf.quants.quantize(weight.numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_base(world, tmp_path):
    base = build("smollm2")
    model = small_llama(len(base), tie_word_embeddings=False)
    write_gguf(tmp_path / "base.gguf", model, base)
    with pytest.raises(ValueError, match=r'--model_init_kwargs .*"base.gguf"'):
        run(world, tmp_path / "out", tmp_path / "base.gguf")
    init = {"gguf_file": "base.gguf"}
    output = run(world, tmp_path / "out", tmp_path, max_steps=1, learning_rate=0.0, model_init_kwargs=init)
    weight = ToolRetriever.from_pretrained(output).model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(weight, model.model.layers[0].mlp.up_proj.weight, atol=5e-3, rtol=0)  # 8 bits


def test_a_model_in_several_files_is_read_and_trained_on(world, tmp_path):
    first = run(world, tmp_path / "first", max_steps=1, guided=False)
    expected = ToolRetriever.from_pretrained(first)("Do thing 21")[0]
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    (first / "model.safetensors").unlink()
    for path in (tmp_path / "sharded").glob("model*"):
        shutil.copy(path, first)
    assert len(list(first.glob("*.safetensors"))) > 1
    assert ToolRetriever.from_pretrained(first)("Do thing 21")[0] == expected
    kwargs = {"max_steps": 1, "guided": False, "learning_rate": 0.0, "stages": ["memorization"]}
    second = run(world, tmp_path / "second", first, **kwargs)
    assert ToolRetriever.from_pretrained(second)("Do thing 21")[0] == expected
    adapter = run(world, tmp_path / "adapter", first, LORA, **kwargs)
    assert ToolRetriever.from_pretrained(adapter)("Do thing 21")[0] == expected
