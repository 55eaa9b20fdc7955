"""What importing the package and asking for help loads, and that the Auto classes know the package all the same."""

import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import toolweaver_hf
from toolweaver_hf import ToolCatalog, ToolCodes
from toolweaver_hf.cli import COMMANDS, main


RECIPES = Path(__file__).parents[1] / "recipes"


def run_python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


HELP = """
import runpy, sys
try:
    runpy.run_path(sys.argv[1], run_name="__main__") if sys.argv[1].endswith(".py") else runpy.run_module(
        "toolweaver_hf.cli", run_name="__main__")
except SystemExit as end:
    assert not end.code
print([name for name in ("torch", "transformers", "trl", "numpy") if name in sys.modules])
"""


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_of_a_command_loads_nothing_heavy(command):
    out = run_python(HELP, *([command] if command else []), "--help")
    assert out.startswith("usage: toolweaver") and out.endswith("\n[]\n")


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("[!_]*.py")), ids=lambda path: path.stem)
def test_help_of_a_recipe_loads_nothing_heavy(recipe):
    out = run_python(HELP, str(recipe), "--help")
    assert out.startswith(f"usage: {recipe.name}") and out.endswith("\n[]\n")


@pytest.mark.parametrize(
    ("command", "of_training"), [("tokenize", "--per_device_train_batch_size"), ("sft", "--lora_r")]
)
def test_help_all_shows_the_arguments_of_training(capsys, command, of_training):
    for option, shown in (("--help", False), ("--help_all", True)):
        with pytest.raises(SystemExit):
            main([command, option])
        assert (of_training in capsys.readouterr().out) == shown


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, toolweaver_hf; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert run_python(code) == "[]\n"


def test_every_public_name_can_be_seen_and_had():
    assert set(toolweaver_hf.__all__) <= set(dir(toolweaver_hf))
    assert all(getattr(toolweaver_hf, name).__name__ == name for name in toolweaver_hf.__all__)
    assert not hasattr(toolweaver_hf, "nothing")
    by_the_earlier_path = importlib.import_module("toolweaver_hf.embeddings").embed_catalog
    assert by_the_earlier_path is toolweaver_hf.embed_catalog


EACH_FIRST = """
import importlib, sys, toolweaver_hf
for name, module in toolweaver_hf._MODULES.items():
    for loaded in [loaded for loaded in sys.modules if loaded.startswith("toolweaver_hf")]:
        del sys.modules[loaded]
    getattr(importlib.import_module(f"toolweaver_hf.{module}"), name)
"""


def test_any_module_of_a_public_name_can_be_imported_first():
    assert set(toolweaver_hf._MODULES) == set(toolweaver_hf.__all__)
    run_python(EACH_FIRST)


def test_classes_and_their_objects_can_be_pickled():
    codes = ToolCodes([2, 2], {"rain": [0, 1]})
    assert pickle.loads(pickle.dumps(ToolCatalog)) is ToolCatalog
    assert dict(pickle.loads(pickle.dumps(codes))) == dict(codes)


AUTO_CLASSES = """
import json, sys
{imports}
codes = AutoModel.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
config = AutoConfig.from_pretrained(sys.argv[1])
print(json.dumps([type(found).__module__ for found in (codes, tokenizer, config)]))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import toolweaver_hf\nfrom transformers import AutoConfig, AutoModel, AutoTokenizer",
        "from transformers import AutoConfig, AutoModel, AutoTokenizer\nimport toolweaver_hf",
        "from toolweaver_hf.modeling_rqvae import RQVAEModel\nfrom transformers import AutoTokenizer, AutoModel, AutoConfig",
    ],
)
def test_the_auto_classes_know_the_package_in_any_order(tmp_path, tokenizer, imports):
    toolweaver_hf.RQVAEModel(toolweaver_hf.RQVAEConfig(input_dim=4, codebook_sizes=[2, 2])).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = run_python(AUTO_CLASSES.format(imports=imports), str(tmp_path), str(tmp_path / "tokenizer"))
    names = ("modeling_rqvae", "tokenization_toolweaver", "configuration_rqvae")
    assert json.loads(out) == [f"toolweaver_hf.{name}" for name in names]
