"""Loading an untrusted repository works or raises a clear error: no pickles, no other files, no excess memory."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import struct
from pathlib import Path

import pytest
from conftest import small_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from toolweaver_hf import RQVAEConfig, RQVAEModel, ToolCatalog, ToolCodes, ToolRetriever, ToolWeaverTokenizer
from toolweaver_hf.data.queries import load_queries
from toolweaver_hf.data.trajectories import load_trajectories
from toolweaver_hf.files import read_json
from toolweaver_hf.hub.cards import create_card


REFUSALS = (ValueError, OSError)
FIXTURES = Path(__file__).parent / "fixtures"

fuzz = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**12, -1])
values = st.recursive(scalars, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4))


@pytest.fixture(scope="module")
def folder(base_tokenizer, tmp_path_factory):
    """An aligned model's folder, and in `codes` an RQ-VAE with its codes."""
    folder = tmp_path_factory.mktemp("hostile")
    codes = ToolCodes([3, 4], {"rain": [0, 0], "wind": [0, 1], "fx": [2, 3]})
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    tokenizer.save_pretrained(folder)
    small_llama(len(tokenizer)).save_pretrained(folder)
    RQVAEModel(RQVAEConfig(input_dim=8, hidden_sizes=[16], code_dim=4, codebook_sizes=[3, 4])).save_pretrained(
        folder / "codes"
    )
    codes.save_pretrained(folder / "codes")
    return folder


def attempt(load, *args, megabytes=300):
    """Load; only a refusal may be raised, no file may appear, and memory may not grow by much."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    here = sorted(os.listdir())
    with contextlib.suppress(*REFUSALS):
        load(*args)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes << 10
    assert sorted(os.listdir()) == here


def mutations(document):
    """Strategy for documents of which one value, at any depth, is replaced or taken out."""
    paths = []

    def collect(value, path):
        if path:
            paths.append(path)
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value[:3]):
            if isinstance(inner, (dict, list)):
                collect(inner, (*path, key))
            else:
                paths.append((*path, key))

    collect(document, ())

    def mutate(path, value, remove):
        copy = json.loads(json.dumps(document))
        holder = copy
        for key in path[:-1]:
            holder = holder[key]
        if remove:
            del holder[path[-1]]
        else:
            holder[path[-1]] = value
        return copy

    return st.builds(mutate, st.sampled_from(paths), values, st.booleans())


CATALOGS = {path.name: path.read_bytes() for path in FIXTURES.glob("*.*") if path.suffix in (".json", ".yaml")}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".yaml"])
@fuzz
@given(data=st.data())
def test_fuzz_catalog(tmp_path_factory, suffix, data):
    row = {"id": "a", "name": "b", "description": "c", "parameters": {"properties": {"d": {}}}, "metadata": {}}
    api = {"tool_name": "a", "api_name": "b", "required_parameters": [{"name": "c", "type": "d"}]}
    operation = {"parameters": [{"name": "a", "in": "query", "schema": {"$ref": "#/components/schemas/S"}}]}
    operation["requestBody"] = {
        "content": {"application/json": {"schema": {"properties": {"b": {}}}}},
        "required": True,
    }
    openapi = {"openapi": "3.0.0", "paths": {"/a": {"get": operation}}, "components": {"schemas": {"S": {}}}}
    documents = [{"result": {"tools": [row]}}, {"tool_name": "a", "api_list": [api]}, openapi, [row, api]]
    document = data.draw(values | st.sampled_from(documents).flatmap(mutations))
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_text(json.dumps(document))
    attempt(ToolCatalog.from_file, path)
    path.write_bytes(
        data.draw(st.binary(max_size=50)) + json.dumps(document).encode()[: data.draw(st.integers(0, 80))]
    )
    attempt(ToolCatalog.from_file, path)


@fuzz
@given(data=st.data())
def test_fuzz_rows(tmp_path_factory, data):
    query = {"id": "q", "text": "t", "tools": ["a"]}
    calls = [{"type": "function", "function": {"name": "a", "arguments": {"b": 1}}}]
    messages = [{"role": "user", "content": "t"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    for load, row in ((load_queries, query), (load_trajectories, {"messages": messages})):
        path.write_text(json.dumps(data.draw(values | mutations(row))))
        attempt(load, path)


@fuzz
@given(data=st.data())
def test_fuzz_codes_and_tokenizer(folder, tmp_path_factory, data):
    """Each JSON file of a tokenizer in turn, its values changed or its text cut."""
    name = data.draw(st.sampled_from(["tool_codes.json", "tokenizer_config.json", "tokenizer.json"]))
    text = (folder / name).read_text()
    hostile = tmp_path_factory.getbasetemp() / "tokenizer"
    shutil.rmtree(hostile, ignore_errors=True)
    shutil.copytree(folder, hostile, ignore=shutil.ignore_patterns("*.safetensors", "codes"))
    changed = json.dumps(data.draw(values | mutations(json.loads(text))))
    (hostile / name).write_text(data.draw(st.sampled_from([changed, changed[: len(changed) // 2]])))
    attempt(ToolWeaverTokenizer.from_pretrained, hostile)
    attempt(ToolCodes.from_pretrained, hostile)
    attempt(read_json, hostile / name, 1)
    attempt(create_card, hostile, "me/hostile")


@fuzz
@given(data=st.data())
def test_fuzz_rqvae(folder, tmp_path_factory, data):
    hostile = tmp_path_factory.getbasetemp() / "rqvae"
    shutil.rmtree(hostile, ignore_errors=True)
    shutil.copytree(folder / "codes", hostile)
    config = json.loads((hostile / "config.json").read_text())
    sizes = st.sampled_from(["input_dim", "hidden_sizes", "code_dim", "codebook_sizes"])
    large = st.sampled_from([1 << 20, [1 << 20], [1 << 20] * 8, [3] * 65, 0, -1, [], True, 1.5, [3, "4"]])
    larger = st.builds(lambda name, size: config | {name: size}, sizes, large)
    (hostile / "config.json").write_text(json.dumps(data.draw(larger | mutations(config))))
    attempt(RQVAEModel.from_pretrained, hostile)
    weights = bytearray((hostile / "model.safetensors").read_bytes())
    weights[data.draw(st.integers(0, 300))] = data.draw(st.integers(0, 255))
    (hostile / "model.safetensors").write_bytes(weights)
    (hostile / "config.json").write_text(json.dumps(config))
    attempt(RQVAEModel.from_pretrained, hostile)


@fuzz
@given(data=st.data())
def test_fuzz_model(folder, tmp_path_factory, data):
    hostile = tmp_path_factory.getbasetemp() / "model"
    shutil.rmtree(hostile, ignore_errors=True)
    shutil.copytree(folder, hostile, ignore=shutil.ignore_patterns("codes"))
    config = json.loads((hostile / "config.json").read_text())
    large = st.sampled_from([1 << 40, 1 << 20, 1 << 16, 3000, 0, -1, 7])
    whole_numbers = [name for name, value in config.items() if type(value) is int]
    larger = st.builds(lambda name, size: config | {name: size}, st.sampled_from(whole_numbers), large)
    (hostile / "config.json").write_text(json.dumps(data.draw(larger | mutations(config))))
    attempt(ToolRetriever.from_pretrained, hostile)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_no_pickle_is_opened(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, load in ((folder, ToolRetriever), (folder / "codes", RQVAEModel)):
        hostile = tmp_path / load.__name__
        shutil.copytree(source, hostile, ignore=shutil.ignore_patterns("*.safetensors", "codes"))
        for name in ("pytorch_model.bin", "model.bin", "training_args.bin", "tool_codes.pkl"):
            (hostile / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(OSError, match=r"model\.safetensors"):
            load.from_pretrained(hostile)
    (tmp_path / "ToolRetriever/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(folder)})
    )
    (tmp_path / "ToolRetriever/adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        ToolRetriever.from_pretrained(tmp_path / "ToolRetriever")
    assert not (tmp_path / "exploded").exists()


def test_shards_outside_the_folder_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("codes"))
    (tmp_path / "model/model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'\.\./outside\.safetensors', which is not of its folder"):
        ToolRetriever.from_pretrained(tmp_path / "model")


def test_huge_shapes_are_refused_before_memory_is_taken(folder, tmp_path):
    shutil.copytree(folder / "codes", tmp_path / "codes")
    config = json.loads((tmp_path / "codes/config.json").read_text())
    (tmp_path / "codes/config.json").write_text(json.dumps(config | {"input_dim": 1 << 20, "hidden_sizes": [1 << 20]}))
    with pytest.raises(ValueError, match=r"model\.safetensors: encoder.* has the shape"):
        RQVAEModel.from_pretrained(tmp_path / "codes")
    # The same where the file leaves the large ones out, or declares them without holding them.
    weights = load_file(tmp_path / "codes/model.safetensors")
    save_file({"mean": weights["mean"]}, tmp_path / "codes/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has the shape None"):
        RQVAEModel.from_pretrained(tmp_path / "codes")
    header = json.dumps({"mean": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "codes/model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        RQVAEModel.from_pretrained(tmp_path / "codes")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"codebook_sizes": [1 << 20] * 8}, "8388608 code tokens"),
        ({"codebook_sizes": [3, 5]}, "belong to different tokenizers"),
        ({"codes": {"rain": [0, 4]}}, "'rain'"),
        ({"codes": {"rain": [0, -1]}}, "'rain'"),
        ({"retired": [[9, 9]]}, "retired"),
        ({"checksums": {"rain": 1}}, "checksums"),
    ],
)
def test_codes_outside_the_vocabulary(folder, tmp_path, change, says):
    shutil.copytree(folder, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "codes"))
    path = tmp_path / "tokenizer" / "tool_codes.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"codes": {"rain": [0] * len(change.get("codebook_sizes", "ab"))}} | change))
    with pytest.raises(ValueError, match=says):
        ToolWeaverTokenizer.from_pretrained(tmp_path / "tokenizer")


def test_a_model_that_lacks_the_code_tokens_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("codes"))
    small_llama(20).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="embeddings"):
        ToolRetriever.from_pretrained(tmp_path / "model")


def test_no_file_beside_the_repository_is_read(folder, tmp_path):
    """Paths in JSON lead nowhere: what is read is what lies in the folder."""
    shutil.copytree(folder, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "codes"))
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps({"schema_version": 1, "codebook_sizes": [3, 4], "codes": {"secret": [0, 0]}}))
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tool_codes_file": str(outside), "tokenizer_file": "../outside.json"}))
    assert "rain" in ToolWeaverTokenizer.from_pretrained(tmp_path / "tokenizer").tool_ids
    (tmp_path / "tokenizer" / "tool_codes.json").unlink()
    with pytest.raises(ValueError, match=r"no tool_codes\.json"):
        ToolWeaverTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('mkdir exploded') }}",
        "{% for m in messages %}{{ raise_exception('no') }}{% endfor %}",
        "{{ messages.append(1) }}",
        "{% for %}",
    ],
)
def test_templates_stay_in_their_sandbox(folder, tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "codes"))
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    tokenizer = ToolWeaverTokenizer.from_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="chat template"):
        tokenizer.encode_conversation([{"role": "user", "content": "Rain?"}], add_generation_prompt=True)
    assert not (tmp_path / "exploded").exists()
