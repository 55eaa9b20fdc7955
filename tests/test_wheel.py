"""The built wheel, installed where there is no source tree."""

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from toolweaver_hf import ToolCatalog
from toolweaver_hf.demo import DEMO_FOLDER


ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command, **kwargs):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    for package in ("build", "setuptools"):
        pytest.importorskip(package, reason=f"needs {package} to build the wheel")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    # A copy, since setuptools leaves a folder behind that a later build would take files from
    names = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The scripts of a fresh environment with the wheel, which takes all other packages from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Of a folder that a .pth file names, the .pth files, such as that of an editable install, are not read
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
    where = run(python, "-c", "import toolweaver_hf; print(toolweaver_hf.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(site)
    return python.parent


def test_the_wheel_holds_every_module_and_all_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT) for folder in ("toolweaver_hf", "recipes") for path in (ROOT / folder).rglob("*.py")
    }
    expected |= {path.relative_to(ROOT) for path in (ROOT / "recipes").glob("*/*.yaml")}
    expected |= {path.relative_to(ROOT) for path in DEMO_FOLDER.glob("*.jsonl")}
    expected |= {Path("toolweaver_hf", name) for name in ("py.typed", "model_card_template.md", "ui/style.css")}
    packaged = {f"toolweaver_hf/{path}" if path.parts[0] == "recipes" else str(path) for path in expected}
    assert packaged <= names


def test_a_recipe_runs_from_the_wheel(environment, tmp_path):
    assert "usage: toolweaver" in run(environment / "toolweaver", "--help", cwd=tmp_path)
    lines = (DEMO_FOLDER / "catalog.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:8]
    (tmp_path / "tools.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "out").mkdir()
    key = {"encoder": "none", "catalog": ToolCatalog.from_file(tmp_path / "tools.jsonl").checksum}
    embeddings = np.random.default_rng(0).standard_normal((8, 16), dtype=np.float32)
    save_file({"embeddings": embeddings}, tmp_path / "out" / "embeddings.safetensors", metadata=key)
    options = ["--catalog", "tools.jsonl", "--encoder", "none", "--output_dir", "out", "--max_steps", "5"]
    run(environment / "toolweaver", "tokenize", *options, cwd=tmp_path)
    assert len(json.loads((tmp_path / "out" / "tool_codes.json").read_text(encoding="utf-8"))["codes"]) == 8


def test_a_configuration_is_found_by_its_name(environment, tmp_path):
    code = "from toolweaver_hf.cli import find_config; print(find_config('smollm2_135m').read_text())"
    assert "model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct" in run(
        environment / "python", "-c", code, cwd=tmp_path
    )
