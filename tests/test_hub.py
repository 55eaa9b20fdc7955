"""Artifacts on a Hub: pushed, loaded in a process that knows only transformers, pushed again."""

import subprocess
import sys

import pytest
import torch
from conftest import small_llama
from huggingface_hub import HfApi, RepoCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from toolweaver_hf import (
    RQVAEConfig,
    RQVAEModel,
    Tool,
    ToolAgent,
    ToolCatalog,
    ToolRetriever,
    ToolWeaverTokenizer,
)
from toolweaver_hf.hub import push_folder


QUERY = "Will it rain in Oslo?"


@pytest.fixture
def codes_dir(tmp_path, codes):
    torch.manual_seed(0)
    RQVAEModel(RQVAEConfig(input_dim=8, hidden_sizes=[16], code_dim=4, codebook_sizes=[3, 4])).save_pretrained(
        tmp_path / "codes"
    )
    codes.save_pretrained(tmp_path / "codes")
    ToolCatalog(Tool(tool_id, f"All about {tool_id}.") for tool_id in codes).save_pretrained(tmp_path / "codes")
    return tmp_path / "codes"


@pytest.fixture
def model_dir(tmp_path, tokenizer):
    small_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ToolCatalog(Tool(tool_id, f"All about {tool_id}.") for tool_id in tokenizer.tool_ids).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


def files_of(repo_id, **kwargs):
    return set(HfApi().list_repo_files(repo_id, **kwargs)) - {".gitattributes"}


def test_an_aligned_model(hub, model_dir):
    (model_dir / "training_args.bin").write_bytes(b"a pickle")
    (model_dir / "checkpoint-5").mkdir()
    commit = push_folder(model_dir, "me/aligned", commit_message="First version")
    assert commit.commit_url.startswith(f"{hub.url}/me/aligned/commit/")
    assert hub.repositories["model", "me/aligned"].messages[commit.oid] == "First version"
    assert files_of("me/aligned") == {
        "README.md",
        "catalog.jsonl",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenization_toolweaver.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "tool_codes.json",
    }
    local, remote = ToolRetriever.from_pretrained(model_dir), ToolRetriever.from_pretrained("me/aligned")
    assert remote(QUERY, top_k=4) == local(QUERY, top_k=4)
    agent = ToolAgent.from_pretrained("me/aligned", {"rain": lambda: "no"}, max_new_tokens=3)
    assert agent.catalog.ids == local.tool_ids
    RepoCard.load("me/aligned").validate(repo_type="model")


def test_loads_in_a_process_without_the_package(hub, model_dir, codes_dir, tmp_path):
    """AutoConfig, AutoModel, AutoTokenizer and a model's generations, equal to the bit, at a pinned revision."""
    pinned = push_folder(codes_dir, "me/codes").oid
    push_folder(model_dir, "me/aligned")
    # Whoever loads the pinned commit does not run what came later.
    HfApi().upload_file(path_or_fileobj=b"raise RuntimeError", path_in_repo="modeling_rqvae.py", repo_id="me/codes")
    script = f"""
import sys
sys.modules["toolweaver_hf"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from safetensors.torch import save_file

at = {{"trust_remote_code": True, "revision": "{pinned}", "code_revision": "{pinned}"}}
config = AutoConfig.from_pretrained("me/codes", **at)
model = AutoModel.from_pretrained("me/codes", **at)
assert type(config) is model.config_class and "transformers_modules" in type(model).__module__
output = model(torch.arange(24.0).view(3, 8).sin())
tokenizer = AutoTokenizer.from_pretrained("me/aligned", trust_remote_code=True)
assert "transformers_modules" in type(tokenizer).__module__
inputs = tokenizer("{QUERY}", return_tensors="pt", return_token_type_ids=False)
generated = AutoModelForCausalLM.from_pretrained("me/aligned").generate(**inputs, max_new_tokens=8, do_sample=False)
assert tokenizer.decode_tool(tokenizer.encode_tool("mail")) == "mail"
save_file({{"codes": output.codes, "reconstruction": output.reconstruction, "generated": generated}}, sys.argv[1])
try:
    AutoModel.from_pretrained("me/codes", trust_remote_code=True)
    print("the later code was run")
except RuntimeError:
    print("done")
"""
    path = tmp_path / "outputs.safetensors"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "done", done.stderr
    found = load_file(path)
    output = RQVAEModel.from_pretrained(codes_dir)(torch.arange(24.0).view(3, 8).sin())
    assert torch.equal(found["codes"], output.codes)
    assert torch.equal(found["reconstruction"], output.reconstruction)
    inputs = ToolWeaverTokenizer.from_pretrained(model_dir)(QUERY, return_tensors="pt", return_token_type_ids=False)
    generated = AutoModelForCausalLM.from_pretrained(model_dir).generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(found["generated"], generated)
