"""Artifacts are pushed to a Hub, loaded in a process with transformers alone, and pushed again."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from conftest import small_llama
from datasets import load_dataset
from huggingface_hub import DatasetCard, HfApi, ModelCard, RepoCard, constants, hf_hub_download
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from servers.hub_server import MY_TOKEN
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
from trl import ModelConfig

from toolweaver_hf import (
    RQVAEConfig,
    RQVAEModel,
    Tool,
    ToolAgent,
    ToolCatalog,
    ToolCodes,
    ToolRetriever,
    ToolWeaverTokenizer,
)
from toolweaver_hf.alignment.lora import trainable_code_rows
from toolweaver_hf.alignment.trainer import AlignmentTrainingArguments
from toolweaver_hf.cli import main as toolweaver
from toolweaver_hf.data.queries import load_queries
from toolweaver_hf.demo import DEMO_FOLDER
from toolweaver_hf.evaluation.rankings import MEASURES
from toolweaver_hf.files import write_json
from toolweaver_hf.hub.artifacts import push_folder
from toolweaver_hf.hub.cards import create_card
from toolweaver_hf.pipeline_tool_retrieval import ToolRetrievalPipeline
from toolweaver_hf.recipes import sft
from toolweaver_hf.serving import save_inference_code


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
    save_inference_code(tmp_path / "model")
    ToolCatalog(Tool(tool_id, f"All about {tool_id}.") for tool_id in tokenizer.tool_ids).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


def files_of(repo_id, **kwargs):
    return set(HfApi().list_repo_files(repo_id, **kwargs)) - {".gitattributes"}


def test_an_aligned_model(hub, model_dir):
    (model_dir / "training_args.bin").write_bytes(b"a pickle")
    (model_dir / "text_embeddings.safetensors").write_bytes(b"a cache")
    (model_dir / "checkpoint-5").mkdir()
    commit = push_folder(model_dir, "me/aligned", commit_message="First version")
    assert commit.commit_url.startswith(f"{hub.url}/me/aligned/commit/")
    assert hub.repositories["model", "me/aligned"].messages[commit.oid] == "First version"
    written = {path.relative_to(model_dir).as_posix() for path in model_dir.rglob("*.*")}
    assert files_of("me/aligned") == (written | {"README.md"}) - {"training_args.bin", "text_embeddings.safetensors"}
    local, remote = ToolRetriever.from_pretrained(model_dir), ToolRetriever.from_pretrained("me/aligned")
    assert remote(QUERY, top_k=4) == local(QUERY, top_k=4)
    agent = ToolAgent.from_pretrained("me/aligned", {"rain": lambda: "no"}, max_new_tokens=3)
    assert agent.catalog.ids == local.tool_ids
    RepoCard.load("me/aligned").validate(repo_type="model")


def test_loads_in_a_process_without_the_package(hub, model_dir, codes_dir, tmp_path):
    """Auto classes, the pipeline and a model's generations, equal to the bit; code and weights at a pinned revision."""
    pinned = push_folder(codes_dir, "me/codes").oid
    push_folder(model_dir, "me/aligned")
    # Whoever loads the pinned commit does not run what came later.
    HfApi().upload_file(path_or_fileobj=b"raise RuntimeError", path_in_repo="modeling_rqvae.py", repo_id="me/codes")
    script = f"""
import sys
sys.modules["toolweaver_hf"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
from safetensors.torch import save_file

at = {{"trust_remote_code": True, "revision": "{pinned}", "code_revision": "{pinned}"}}
config = AutoConfig.from_pretrained("me/codes", **at)
model = AutoModel.from_pretrained("me/codes", **at)
assert type(config) is model.config_class and "transformers_modules" in type(model).__module__
output = model(torch.arange(24.0).view(3, 8).sin())
tokenizer = AutoTokenizer.from_pretrained("me/aligned", trust_remote_code=True)
assert "transformers_modules" in type(tokenizer).__module__
inputs = tokenizer("{QUERY}", return_tensors="pt", return_token_type_ids=False)
model = AutoModelForCausalLM.from_pretrained("me/aligned", trust_remote_code=True)
generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
retrieve = pipeline("tool-retrieval", model="me/aligned", trust_remote_code=True)
assert "transformers_modules" in type(retrieve).__module__
found = retrieve("{QUERY}", top_k=4)
print([tool["tool_id"] for tool in found])
assert tokenizer.decode_tool(tokenizer.encode_tool("mail")) == "mail"
scores = torch.tensor([tool["score"] for tool in found], dtype=torch.float64)
outputs = {{"codes": output.codes, "reconstruction": output.reconstruction, "generated": generated, "scores": scores}}
save_file(outputs, sys.argv[1])
try:
    AutoModel.from_pretrained("me/codes", trust_remote_code=True)
    print("the later code was run")
except RuntimeError:
    print("done")
"""
    path = tmp_path / "outputs.safetensors"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, cwd=tmp_path)
    *ranking, last = done.stdout.strip().splitlines() or [""]
    assert last == "done", done.stderr
    found = load_file(path)
    (expected,) = ToolRetriever.from_pretrained(model_dir)(QUERY, top_k=4)
    assert ranking == [str([tool.tool_id for tool in expected])]
    assert found["scores"].tolist() == pytest.approx([tool.score for tool in expected], abs=1e-5)
    output = RQVAEModel.from_pretrained(codes_dir)(torch.arange(24.0).view(3, 8).sin())
    assert torch.equal(found["codes"], output.codes)
    assert torch.equal(found["reconstruction"], output.reconstruction)
    inputs = ToolWeaverTokenizer.from_pretrained(model_dir)(QUERY, return_tensors="pt", return_token_type_ids=False)
    model = AutoModelForCausalLM.from_pretrained(model_dir, trust_remote_code=True)
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(found["generated"], generated)


def test_with_the_package_no_remote_code_is_used(hub, model_dir, codes_dir):
    push_folder(model_dir, "me/aligned")
    push_folder(codes_dir, "me/codes")
    assert type(AutoConfig.from_pretrained("me/codes")) is RQVAEConfig
    assert type(AutoModel.from_pretrained("me/codes")) is RQVAEModel
    assert type(AutoModel.from_pretrained("me/codes", trust_remote_code=True)) is RQVAEModel
    assert type(AutoTokenizer.from_pretrained("me/aligned")) is ToolWeaverTokenizer
    pipeline("tool-retrieval", model="me/aligned", pipeline_class=ToolRetrievalPipeline)
    assert not any(path.endswith(".py") for _, path in hub.log if "/resolve/" in path)


def test_code_is_named_in_every_saved_configuration(hub, model_dir, codes_dir, tmp_path):
    """Also where what is saved came from a repository, whose name then stands in no `auto_map`."""
    push_folder(codes_dir, "me/codes")
    push_folder(model_dir, "me/aligned")
    AutoModel.from_pretrained("me/codes").save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained("me/aligned").save_pretrained(tmp_path / "again")
    ToolRetriever.from_pretrained("me/aligned").model.save_pretrained(tmp_path / "aligned")
    for folder in (codes_dir, tmp_path / "again"):
        assert json.loads((folder / "config.json").read_text())["auto_map"] == {
            "AutoConfig": "configuration_rqvae.RQVAEConfig",
            "AutoModel": "modeling_rqvae.RQVAEModel",
        }
    for folder in (model_dir, tmp_path / "again"):
        auto_map = json.loads((folder / "tokenizer_config.json").read_text())["auto_map"]
        assert set(auto_map["AutoTokenizer"]) == {"tokenization_toolweaver.ToolWeaverTokenizer", None}
        assert (folder / "tokenization_toolweaver.py").exists()


def test_every_class_pushes_itself(hub, model_dir, codes_dir):
    """`push_to_hub` with the arguments that it has everywhere, and what comes back."""
    kwargs = {"private": True, "token": MY_TOKEN, "commit_message": "Mine", "create_pr": False}
    codes, catalog = ToolCodes.from_pretrained(codes_dir), ToolCatalog.from_pretrained(codes_dir)
    model, tokenizer = RQVAEModel.from_pretrained(codes_dir), ToolWeaverTokenizer.from_pretrained(model_dir)
    model.push_to_hub("me/codes", **kwargs)
    codes.push_to_hub("me/codes", **kwargs)
    tokenizer.push_to_hub("me/tokenizer", **kwargs)
    catalog.push_to_hub("me/tools", **kwargs)
    assert all(repository.private for repository in hub.repositories.values())
    assert dict(ToolCodes.from_pretrained("me/codes", token=MY_TOKEN)) == dict(codes)
    assert list(ToolCatalog.from_pretrained("me/tools")) == list(catalog)
    assert AutoTokenizer.from_pretrained("me/tokenizer").tool_codes == tokenizer.tool_codes
    assert torch.equal(AutoModel.from_pretrained("me/codes").codebooks()[1], model.codebooks()[1])
    assert "## The codes" in RepoCard.load("me/codes").text


def test_push_again_by_branch_and_pull_request(hub, codes_dir):
    first = push_folder(codes_dir, "me/codes")
    uploads = [path for method, path in hub.log if method == "PUT"]
    assert push_folder(codes_dir, "me/codes").oid == first.oid  # nothing has changed
    codes = ToolCodes.from_pretrained(codes_dir)
    codes.remove("fx")
    codes.save_pretrained(codes_dir)
    push_folder(codes_dir, "me/codes", revision="fewer")
    ToolCodes.from_pretrained(codes_dir).push_to_hub("me/codes", create_pr=True)
    assert [path for method, path in hub.log if method == "PUT"] == uploads  # the weights were not sent again
    assert "fx" in ToolCodes.from_pretrained("me/codes")
    assert "fx" in ToolCodes.from_pretrained("me/codes", revision=first.oid)
    assert "fx" not in ToolCodes.from_pretrained("me/codes", revision="fewer")
    assert "fx" not in ToolCodes.from_pretrained("me/codes", revision="refs/pr/1")
    assert files_of("me/codes", revision="refs/pr/1") == files_of("me/codes")


def test_a_file_in_parts(hub, model_dir):
    hub.part_size = 10_000
    push_folder(model_dir, "me/aligned")
    assert sum(method == "PUT" for method, _ in hub.log) > 3
    path = hf_hub_download("me/aligned", "model.safetensors")
    assert Path(path).read_bytes() == (model_dir / "model.safetensors").read_bytes()


def test_an_interrupted_upload_is_taken_up_again(hub, model_dir):
    """A push is killed between two large files. The next one sends only the second."""
    weights = load_file(model_dir / "model.safetensors")
    index, names = {}, sorted(weights)
    for i, part in enumerate((names[:3], names[3:]), start=1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, model_dir / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    before = {path: path.read_bytes() for path in model_dir.rglob("*.*")}
    second = hashlib.sha256((model_dir / "model-00002-of-00002.safetensors").read_bytes()).hexdigest()
    hub.stall_upload = lambda sha256: sha256 == second
    process = subprocess.Popen([sys.executable, "-m", "toolweaver_hf.cli", "push", str(model_dir), "me/aligned"])
    assert hub.stalled.wait(60)
    for _ in range(1000):
        time.sleep(0 if hub.objects else 0.01)
    process.kill()
    process.wait()
    hub.stall_upload = lambda sha256: False
    assert len(hub.objects) == 1 and files_of("me/aligned") == set()
    assert {path: path.read_bytes() for path in model_dir.rglob("*.*")} == before
    sent = sum(method == "PUT" for method, _ in hub.log)
    push_folder(model_dir, "me/aligned")
    assert sum(method == "PUT" for method, _ in hub.log) - sent == 1
    assert ToolRetriever.from_pretrained("me/aligned")(QUERY) == ToolRetriever.from_pretrained(model_dir)(QUERY)


def test_weights_of_an_earlier_push_are_taken_out(hub, model_dir):
    for name in ("adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors"):
        (model_dir / name).write_text("{}")
    push_folder(model_dir, "me/aligned")
    for path in [*model_dir.glob("adapter*"), *model_dir.glob("model-*")]:
        path.unlink()
    push_folder(model_dir, "me/aligned")
    weights = {name for name in files_of("me/aligned") if name.endswith((".safetensors", "adapter_config.json"))}
    assert weights == {"model.safetensors"}


def test_adapters(hub, tokenizer, model_dir, tmp_path):
    """Adapters alone: the base is found on the Hub by its name, and stands on the card."""
    base = small_llama(tokenizer.level_offsets[0])
    base.push_to_hub("me/base")
    base = AutoModelForCausalLM.from_pretrained("me/base")
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, trainable_token_indices=trainable_code_rows(base, tokenizer))
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    push_folder(tmp_path / "adapter", "me/adapter")
    card = ModelCard.load("me/adapter")
    assert card.data.base_model == "me/base" and "LoRA adapters" in card.text
    found, expected = ToolRetriever.from_pretrained("me/adapter")(QUERY, top_k=4), ToolRetriever(model, tokenizer)
    assert [tool.tool_id for tool in found[0]] == [tool.tool_id for tool in expected(QUERY, top_k=4)[0]]


def test_a_dataset(hub, tmp_path):
    """Catalog, queries and trajectories: `load_dataset` reads the splits by the card's configurations."""
    for path in DEMO_FOLDER.glob("*.jsonl"):
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)[:20]
        (tmp_path / path.name).write_text("".join(rows), encoding="utf-8")
    for kind in ("queries", "trajectories"):
        (tmp_path / f"{kind}.candidates.jsonl").write_text('{"texts": ["All that was written"]}\n')
    push_folder(tmp_path, "me/demo", license="apache-2.0")
    assert not [name for name in files_of("me/demo", repo_type="dataset") if "candidates" in name]
    assert list(ToolCatalog.from_pretrained("me/demo")) == list(ToolCatalog.from_file(tmp_path / "catalog.jsonl"))
    name = "queries.test.jsonl"
    assert load_queries(f"hf://datasets/me/demo/{name}") == load_queries(tmp_path / name)
    assert (
        ToolCatalog.from_file("hf://datasets/me/demo/catalog.jsonl").ids == ToolCatalog.from_pretrained(tmp_path).ids
    )
    queries = load_dataset("me/demo", "queries")
    assert {*queries} == {"train", "validation", "test"} and queries["test"][0]["tools"]
    trajectories = load_dataset("me/demo", "trajectories", split="train")
    assert trajectories[0]["messages"][0]["role"] == "user"
    card = DatasetCard.load("me/demo")
    card.validate(repo_type="dataset")
    assert card.data.license == "apache-2.0" and "ToolCatalog.from_pretrained" in card.text


def test_alignment_pushes_at_its_end(hub, codes_dir, base_tokenizer, tmp_path, capfd):
    """`--push_to_hub` of the recipe: the folder with its card; the token is written nowhere."""
    small_llama(len(base_tokenizer)).save_pretrained(tmp_path / "base")
    base_tokenizer.save_pretrained(tmp_path / "base")
    training_args = AlignmentTrainingArguments(
        output_dir=str(tmp_path / "aligned"),
        max_steps=2,
        save_steps=1,
        report_to="none",
        activation_checkpointing=False,
        push_to_hub=True,
        hub_model_id="aligned",
        hub_token=MY_TOKEN,
        hub_private_repo=True,
    )
    arguments = sft.AlignmentArguments(codes_dir=str(codes_dir), stages=["memorization"])
    sft.main(arguments, training_args, ModelConfig(model_name_or_path=str(tmp_path / "base")))
    assert files_of("me/aligned") >= {"README.md", "model.safetensors", "tool_codes.json", "training.json"}
    assert not [name for name in files_of("me/aligned") if name.endswith(".bin") or "checkpoint" in name]
    card = ModelCard.load("me/aligned")
    assert "stages: memorization; rows: 4; epochs: 2.0; steps: 2;" in card.text
    assert 'from_pretrained("me/aligned")' in card.text and str(tmp_path) not in card.text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)  # of the checkpoints, which stay here
    assert not [path for path in written if MY_TOKEN.encode() in path.read_bytes()]
    assert not [stream for stream in capfd.readouterr() if MY_TOKEN in stream]


# Refusals and accidents


def test_who_may_not_write_is_told_so(hub, codes_dir, capfd):
    unknown = "hf_aTokenThatIsNotKnown"
    for token, repo_id in ((unknown, "me/codes"), (MY_TOKEN, "other/codes")):
        with pytest.raises(SystemExit) as stop:
            toolweaver(["push", str(codes_dir), repo_id, "--token", token])
        assert stop.value.code == 2
        error = capfd.readouterr().err
        assert f"did not let you write to {repo_id}" in error and "hf auth login" in error
        assert token not in error
    assert not hub.repositories
    with pytest.raises(OSError, match="401") as refusal:
        push_folder(codes_dir, "me/codes", token=unknown)
    assert unknown not in "".join(traceback.format_exception(refusal.value))


def test_what_is_not_there(hub, codes_dir, tmp_path):
    for load in (ToolCodes, ToolCatalog, ToolRetriever, ToolWeaverTokenizer, RQVAEModel):
        with pytest.raises(OSError, match="me/nothing"):
            load.from_pretrained("me/nothing")
    push_folder(codes_dir, "me/codes")
    for path in ("hf://datasets/me/nothing/queries.jsonl", "hf://me/nothing/queries.jsonl", "hf://queries.jsonl"):
        with pytest.raises(OSError, match=f"cannot get {path} from the Hub"):
            load_queries(path)
    with pytest.raises(OSError, match="nowhere"):
        ToolCodes.from_pretrained("me/codes", revision="nowhere")
    hub.repositories["model", "me/codes"].private = True
    with pytest.raises(OSError, match="me/codes"):
        ToolCodes.from_pretrained("me/codes", token=False, cache_dir=tmp_path / "empty")


def test_no_network(hub, codes_dir, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    before = {path.name: path.read_bytes() for path in codes_dir.iterdir()}
    with pytest.raises(OSError, match=r"cannot reach the Hub at http://127\.0\.0\.1.*is as it was"):
        push_folder(codes_dir, "me/codes")
    assert {path.name: path.read_bytes() for path in codes_dir.iterdir()} == before


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tool_codes.json", "{}", "tool_codes.json"),
        ("tool_codes.json", '{"schema_version": 99}', "newer"),
        ("metrics.json", "[]", "metrics.json"),
        ("tool_codes.json", None, "holds nothing to push"),
    ],
)
def test_nothing_broken_is_pushed(hub, codes_dir, file, content, says):
    (codes_dir / "catalog.jsonl").unlink()
    (codes_dir / file).unlink(missing_ok=True)
    if content is not None:
        (codes_dir / file).write_text(content)
    with pytest.raises(ValueError, match=says):
        push_folder(codes_dir, "me/codes")
    assert not hub.log


# Cards


def test_the_card_says_what_the_run_recorded(hub, model_dir):
    runs = [{"stages": ["memorization", "retrieval"], "rows": 12, "learning_rate": 0.001, "versions": {"trl": "1.16"}}]
    write_json(model_dir / "training.json", {"base_model": "someone/base", "runs": runs}, 1)
    measured = {"all": {"queries": 3, **dict.fromkeys(MEASURES, 0.5)}}
    rival = {"all": {"queries": 3, **dict.fromkeys(MEASURES, 0.25)}}
    (model_dir / "evaluation").mkdir()
    metrics = {"queries": "queries.test.jsonl", "results": {"ToolWeaver": measured, "BM25": rival}}
    write_json(model_dir / "evaluation" / "metrics.json", metrics, 1)
    toolweaver(["push", str(model_dir), "me/aligned", "--license", "mit", "--datasets", "me/demo"])
    card = ModelCard.load("me/aligned")
    card.validate()
    data = card.data
    assert (data.library_name, data.license, data.base_model) == ("transformers", "mit", "someone/base")
    assert (data.datasets, data.pipeline_tag) == (["me/demo"], "text-generation")
    assert {"toolweaver", "tool-use"} <= {*data.tags}
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert results == dict.fromkeys(MEASURES, 0.5)
    assert "\n\n\n" not in card.text
    for text in (
        "stages: memorization, retrieval; rows: 12; learning rate: 0.001",
        "| BM25 | 25.0 |",
        "`rain` is `<a_0><b_0>`",
    ):
        assert text in card.text
    assert MY_TOKEN not in str(card)


def test_what_is_not_known_is_not_on_the_card(hub, model_dir, codes_dir):
    for folder in (model_dir, codes_dir):
        card = create_card(folder, "me/repository")
        card.validate()
        assert {*card.data.to_dict()} <= {"library_name", "pipeline_tag", "tags"}
        for word in ("None", "Undefined", "[More", "{{", "## Training", "## Evaluation", "\n\n\n"):
            assert word not in card.text
        assert card.text.count("\n## ") == 4


def test_a_card_of_ones_own_is_kept(hub, model_dir):
    card = create_card(model_dir, "me/aligned")
    card.text += "\nMore of mine.\n"
    card.save(model_dir / "README.md")
    push_folder(model_dir, "me/aligned")
    assert "More of mine." in ModelCard.load("me/aligned").text
    (model_dir / "README.md").write_text("---\ntags: [trl, sft]\n---\nWritten by a machine")
    push_folder(model_dir, "me/aligned")
    assert "## The codes" in ModelCard.load("me/aligned").text


@pytest.mark.slow
def test_an_adapter_finds_the_revision_of_its_base_also_offline(hub, codes_dir, base_tokenizer, tmp_path):
    old = small_llama(len(base_tokenizer))
    old.push_to_hub("me/base")
    base_tokenizer.push_to_hub("me/base")
    HfApi().create_branch("me/base", branch="v1")
    for weight in old.parameters():
        weight.data.mul_(-1)
    old.push_to_hub("me/base")  # main goes on
    training_args = AlignmentTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, report_to="none", activation_checkpointing=False
    )
    arguments = sft.AlignmentArguments(codes_dir=str(codes_dir), stages=["memorization"])
    model_args = ModelConfig(model_name_or_path="me/base", model_revision="v1", use_peft=True)
    sft.main(arguments, training_args, model_args)
    commit = HfApi().model_info("me/base", revision="v1").sha
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] == commit
    assert json.loads((tmp_path / "out" / "training.json").read_text())["runs"][0]["base_revision"] == commit
    push_folder(tmp_path / "out", "me/adapter")
    expected = ToolRetriever.from_pretrained("me/adapter")(QUERY)
    assert expected == ToolRetriever.from_pretrained(tmp_path / "out")(QUERY)
    code = f"from toolweaver_hf import ToolRetriever; print(ToolRetriever.from_pretrained('me/adapter')({QUERY!r}))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    offline = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert offline.stdout.strip() == str(expected), offline.stderr
