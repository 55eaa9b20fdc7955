"""The package's structure: which files travel with a model, and in which direction modules import each other."""

import ast
import graphlib
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from toolweaver_hf.serving import GENERATE_FILES, PIPELINE_FILES


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "toolweaver_hf"
# What is saved with a model: by transformers, with the class that is registered for an Auto class, and by `serving`.
ENTRIES = {
    "modeling_rqvae.py",
    "tokenization_toolweaver.py",
    "pipeline_tool_retrieval.py",
    "custom_generate.py",
    "vllm.py",
}
# The order of the rooms; no module imports from a later one. What lies flat is below all of them, but for the doors.
ROOMS = (
    "",
    "data",
    "codes",
    "alignment",
    "agent",
    "evaluation",
    "synthesis",
    "hub",
    "demo",
    "ui",
    "cli",
    "recipes",
    "doors",
)
DOORS = ("toolweaver_hf", "toolweaver_hf.embeddings")


def files_needed_by(*names):
    """Return the names of the files that transformers finds by the relative imports of these, and of these."""
    found = {Path(path).name for name in names for path in get_relative_import_files(PACKAGE / name)}
    return found | set(names)


TRAVELLING = files_needed_by(*ENTRIES)


@pytest.mark.parametrize("name", sorted(TRAVELLING))
def test_a_file_that_travels_imports_only_files_that_travel(name):
    """transformers copies files flat, and finds them by `from .name import`: other forms break where they arrive."""
    for node in ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in TRAVELLING, f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not [module for module in modules if module.split(".")[0] == "toolweaver_hf"], f"line {node.lineno}"


def test_a_model_takes_along_what_its_code_imports():
    assert {*PIPELINE_FILES} == files_needed_by("pipeline_tool_retrieval.py")
    assert {*GENERATE_FILES} == files_needed_by("custom_generate.py", "vllm.py") - {"custom_generate.py"}


def modules():
    """Return the modules of the package and of its recipes, by name."""
    paths = {}
    for folder, prefix in ((PACKAGE, ("toolweaver_hf",)), (ROOT / "recipes", ("toolweaver_hf", "recipes"))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


MODULES = modules()


def imports_of(name, with_types):
    """Return the modules of the package that one imports anywhere; those for its type hints alone if `with_types`."""
    found = set()
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    left_out = set() if with_types else {inner for hint in hints for inner in ast.walk(hint)}
    for node in ast.walk(tree):
        if node in left_out or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in MODULES)
            continue
        package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
        base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
        target = ".".join(part for part in (base if node.level else "", node.module) if part)
        for alias in node.names:
            found.update(module for module in (f"{target}.{alias.name}", target) if module in MODULES)
    return found - {name}


def room(name):
    if name in DOORS:
        return "doors"
    first, *rest = name.removeprefix("toolweaver_hf.").split(".")
    return first if rest or first in ROOMS else ""


def test_no_module_imports_from_a_later_room():
    upward = [
        f"{name} imports {target}"
        for name in MODULES
        for target in imports_of(name, with_types=True)
        if ROOMS.index(room(target)) > ROOMS.index(room(name))
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle():
    graphlib.TopologicalSorter({name: imports_of(name, with_types=False) for name in MODULES}).prepare()
