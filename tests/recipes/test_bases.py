"""Bases of several kinds: trained whole and by LoRA, resumed, loaded, asked as an agent, and its adapter pushed."""

import json
import math

import pytest
import torch
from architectures import tiny_config, tiny_model
from bases import build
from huggingface_hub import HfApi
from test_architectures import NOT_CAUSAL
from test_retrieval import score
from transformers import AutoModelForImageTextToText
from trl import ModelConfig

from toolweaver_hf import Tool, ToolAgent, ToolCatalog, ToolCodes, ToolRetriever
from toolweaver_hf.adapter import auto_class
from toolweaver_hf.alignment.trainer import AlignmentTrainingArguments
from toolweaver_hf.hub.artifacts import push_folder
from toolweaver_hf.recipes import sft


# A mixture of experts, a hybrid, one whose gradient is infinite at a row of zeros, a model that reads images, too, one
# that is not causal, and one that takes no tokens
BASES = ("mixtral", "qwen3_5", "gemma3n_text", "smolvlm", "xlnet", "cpmant")
PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
PROBE = torch.arange(5, 25)[None]
QUERY = "Please do thing 21"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """12 tools with codes, and 8 queries and trajectories that ask for them."""
    folder = tmp_path_factory.mktemp("world")
    catalog = ToolCatalog([Tool(f"t{i}", f"Tool number {i}, for thing {i * 7}.", parameters=PLACE) for i in range(12)])
    checksums = {tool.id: tool.checksum for tool in catalog}
    ToolCodes([4, 4], {f"t{i}": divmod(i, 4) for i in range(12)}, checksums).save_pretrained(folder / "codes")
    catalog.to_jsonl(folder / "codes" / "catalog.jsonl")
    queries, trajectories = [], []
    for i in range(8):
        queries.append({"id": f"q{i}", "text": f"Do thing {i * 7}", "tools": [f"t{i}", f"t{i + 3}"][: 1 + i % 2]})
        call = {"type": "function", "function": {"name": f"t{i}", "arguments": {"place": "Oslo"}}}
        messages = [
            {"role": "user", "content": f"Thing {i}?"},
            {"role": "assistant", "content": "I look.", "tool_calls": [call]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "Done."},
        ]
        trajectories.append({"messages": messages})
    for name, rows in (("queries", queries), ("trajectories", trajectories)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(world, base, output, lora, **kwargs):
    arguments = {"stages": ["retrieval", "trajectory"], "embedding_init": "random", "guided": False}
    arguments |= {name: str(world / f"{name}.jsonl") for name in ("queries", "trajectories")}
    settings = {"max_steps": 3, "save_steps": 2, "per_device_train_batch_size": 6, "learning_rate": 1e-3}
    settings |= {"report_to": "none", "disable_tqdm": True, "activation_checkpointing": False, "bf16": False}
    sft.main(
        sft.AlignmentArguments(codes_dir=str(world / "codes"), **arguments),
        AlignmentTrainingArguments(str(output), **(settings | kwargs)),
        ModelConfig(str(base), use_peft=lora, lora_r=4),
    )
    return ToolRetriever.from_pretrained(output)


@torch.no_grad()
def logits(retriever):
    return retriever.model(input_ids=PROBE, use_cache=False).logits


@pytest.mark.parametrize("model_type", ["emu3", "mllama"])
def test_a_model_whose_text_part_no_auto_class_knows_is_taken_whole(model_type):
    assert auto_class(tiny_config(model_type, 64)) is AutoModelForImageTextToText


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("model_type", BASES)
def test_a_base_of_any_kind(hub, world, tmp_path, model_type, lora):
    base, tokenizer = tmp_path / "base", build("smollm2")
    if model_type in NOT_CAUSAL:
        tiny_model(model_type, len(tokenizer)).save_pretrained(base)
        tokenizer.save_pretrained(base)
        with pytest.raises(ValueError, match=r"no causal language model|cannot be resized"):
            train(world, base, tmp_path / "out", lora)
        return
    model = tiny_model(model_type, len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    if lora:
        base = f"me/{model_type}"
        HfApi().create_repo(base)
        HfApi().upload_folder(repo_id=base, folder_path=tmp_path / "base")
    retriever = train(world, base, tmp_path / "out", lora)
    weights = ("adapter_model" if lora else "model") + ".safetensors"
    assert (tmp_path / "out" / weights).exists()
    (tools,) = retriever(QUERY, top_k=12, num_beams=12)
    assert math.isclose(sum(math.exp(tool.score) for tool in tools), 1, abs_tol=1e-3)
    for tool in tools[:3]:
        expected = score(retriever.model, retriever.tokenizer, QUERY, tool.tool_id)
        assert math.isclose(tool.score, expected, abs_tol=5e-3)

    (tmp_path / "again").mkdir()
    (tmp_path / "out" / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    again = train(world, base, tmp_path / "again", lora, resume_from_checkpoint="last")
    torch.testing.assert_close(logits(again), logits(retriever), atol=1e-4, rtol=1e-3)

    torch.manual_seed(0)
    functions = {tool_id: lambda place: place for tool_id in retriever.tool_ids}
    agent = ToolAgent.from_pretrained(tmp_path / "out", functions, do_sample=True, max_steps=2, max_new_tokens=12)
    assert agent(QUERY).stop_reason
    if lora:
        push_folder(tmp_path / "out", "me/adapter")
        pushed = ToolRetriever.from_pretrained("me/adapter")
        torch.testing.assert_close(logits(pushed), logits(retriever), atol=1e-5, rtol=1e-4)
