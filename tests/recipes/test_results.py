"""RESULTS.md and README's table match the runs in recipes/results."""

import json
import os
import re
from pathlib import Path

import pytest
from trl import ModelConfig

import toolweaver_hf
from toolweaver_hf.alignment.trainer import AlignmentTrainingArguments
from toolweaver_hf.codes.trainer import RQVAETrainingArguments
from toolweaver_hf.data.queries import Query
from toolweaver_hf.evaluation.runs import save_run
from toolweaver_hf.recipes import align, evaluate, evaluate_agent, queries, quickstart, results, sft, tokenize_tools
from toolweaver_hf.recipes.benchmarks import retrieval
from toolweaver_hf.retrieval import RetrievedTool


def write_about(folder, **about):
    folder.mkdir(exist_ok=True)
    (folder / "about.json").write_text(json.dumps({"schema_version": 1, **about}))


def test_the_pages_are_up_to_date():
    assert results.RESULTS_PAGE.read_text(encoding="utf-8") == results.render_page(), "run python recipes/results.py"
    readme = results.README.read_text(encoding="utf-8")
    assert readme == results.render_readme(readme), "run python recipes/results.py"


def test_no_committed_run_names_a_path_of_a_machine():
    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from strings(item)

    for path in results.RESULTS_FOLDER.glob("*/*.json"):
        for text in strings(json.loads(path.read_text(encoding="utf-8"))):
            assert not os.path.isabs(text), f"{path}: {text}"


def test_a_run_is_taken_as_it_was_saved(tmp_path):
    queries = [Query("1", "Is it warm?", ("weather",)), Query("2", "Is it?", ("air_quality",))]
    both = [RetrievedTool("weather", -0.1), RetrievedTool("air_quality", -0.2)]
    rankings = {"ours": [both, both[::-1]], "BM25": [both, both]}
    config = {"queries": ["queries.test.jsonl"], "seed": 7}
    run = tmp_path / "park"
    save_run(run, queries, rankings, ["weather", "air_quality"], config, "queries.test.jsonl")
    about = {"title": "The park", "command": "toolweaver evaluate", "text": "Two queries.", "wall_time": "3 s"}
    write_about(run, **about, picture="results.png")
    page = results.render_page(tmp_path)
    assert "## The park\n\n```bash\ntoolweaver evaluate\n```\n" in page
    line = next(line for line in page.splitlines() if line.startswith("*"))
    assert re.search(r"commit \S+ · \d{4}-\d\d-\d\d · seed 7 · 3 s\*$", line)
    assert "| ours | **100.0**" in page and "| BM25 | 50.0" in page
    assert page.endswith("Two queries.\n")
    readme = results.render_readme("Before\n<!-- results: park -->\nold\n<!-- end of results -->\nAfter\n", tmp_path)
    assert readme.startswith("Before\n<!-- results: park -->\nThe park:\n\n| | nDCG@1 |")
    assert "![The park](results/park/results.png)" in page and "![" not in readme
    assert readme.endswith("Two queries.\n<!-- end of results -->\nAfter\n") and "old" not in readme
    assert readme.count("| BM25 |") == 1  # one group of queries
    assert results.render_readme(readme, tmp_path) == readme


def test_figures_copied_from_an_earlier_run_say_so(tmp_path):
    run = tmp_path / "old"
    write_about(run, title="Old", command="python old.py")
    document = {"finished": "2026-01-02", "commit": None, "hardware": "one core", "recorded_by_hand": True}
    (run / "run.json").write_text(json.dumps(document))
    table = {"title": "Times:", "columns": ["step", "ms"], "rows": [["first", "1.5"]]}
    (run / "metrics.json").write_text(json.dumps({"tables": [table]}))
    section = results.render_section(run)
    assert "*one core · commit unknown · 2026-01-02. Recorded by hand from an earlier run" in section
    assert section.endswith("Times:\n\n| step | ms |\n| --- | ---: |\n| first | 1.5 |\n")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run"):
        results.render_page(tmp_path)
    write_about(tmp_path / "run", title="A run")
    with pytest.raises(ValueError, match=r"about\.json needs a 'command'"):
        results.render_page(tmp_path)
    write_about(tmp_path / "run", title="A run", command="run it")
    with pytest.raises(OSError, match=r"run\.json"):
        results.render_page(tmp_path)
    (tmp_path / "run" / "run.json").write_text('{"finished": "2026-01-02"}')
    (tmp_path / "run" / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match=r"metrics\.json has neither"):
        results.render_page(tmp_path)


def test_the_recipes_page_names_every_file_and_no_option_that_is_gone():
    page = (results.RECIPES / "README.md").read_text(encoding="utf-8")
    files = {path.name for pattern in ("*.py", "*.yaml") for path in results.RECIPES.rglob(pattern)}
    assert {name for name in files if name not in page} == {"__init__.py"}
    arguments = [
        *(quickstart.QuickstartArguments, align.AlignArguments, queries.QueryArguments),
        *(tokenize_tools.TokenizationArguments, RQVAETrainingArguments),
        *(sft.AlignmentArguments, AlignmentTrainingArguments, ModelConfig),
        *(evaluate.EvaluationArguments, evaluate_agent.AgentEvaluationArguments),
        retrieval.BenchmarkArguments,
    ]
    known = {name for kind in arguments for name in kind.__dataclass_fields__}
    for path in Path(toolweaver_hf.__file__).parent.rglob("*.py"):  # options of the commands that are no recipe
        known.update(re.findall(r'"--([a-z][\w-]+)"', path.read_text(encoding="utf-8")))
    known = {name.replace("-", "_") for name in known}
    outside = {"help", "config_file", "trust_remote_code", "logits_processors", "continuous_batching", "no_deps"}
    options = {name.replace("-", "_") for name in re.findall(r"--([a-z][\w-]+)", page)}
    assert options - known - outside == set()
