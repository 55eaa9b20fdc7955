"""Write `recipes/RESULTS.md` and the results table of `README.md` from the runs in `recipes/results/`.

```bash
python recipes/results.py
```

A folder in `recipes/results/` is one section of the page. It holds `run.json` and `metrics.json`, as `toolweaver
evaluate` or `toolweaver evaluate-agent` write them (`toolweaver compare` writes `metrics.json` alone: take `run.json`
from its first run), and `about.json`:

- `title`: the section's heading,
- `command`: the commands that give these figures, to be pasted into a shell,
- `text` (optional): up to three sentences on what the figures show,
- `wall_time` (optional): how long the commands took,
- `picture` (optional): a picture in the folder.

A benchmark's `metrics.json` holds `tables`, a list of `{"title", "columns", "rows"}`
([`~evaluation.runs.save_tables`]). `"recorded_by_hand": true` in a `run.json` says that its figures were copied from
an earlier run.
"""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolweaver_hf.cli import run_command
from toolweaver_hf.files import read_json, write_text


RECIPES = Path(__file__).parent
RESULTS_FOLDER = RECIPES / "results"
RESULTS_PAGE = RECIPES / "RESULTS.md"
README = RECIPES.parent / "README.md"
ABOUT_FILE = "about.json"
ABOUT_VERSION = 1  # its schema_version

INTRODUCTION = """# Results

Written by `python recipes/results.py` from the runs in [`results/`](results); [README.md](README.md#results) says how
to add one. Do not edit this page.
"""


def render_section(folder: str | os.PathLike) -> str:
    """Lay out one run in Markdown: heading, command, circumstances, tables and text.

    Args:
        folder (`str`): Folder with `run.json`, `metrics.json` and `about.json`.

    Raises:
        `ValueError`: naming the file that is wrong.
        `OSError`: if a file is missing.
    """
    from toolweaver_hf.evaluation.runs import RUN_FILE, RUN_VERSION

    about = read_json(Path(folder) / ABOUT_FILE, ABOUT_VERSION)
    for field in ("title", "command"):
        if not isinstance(about.get(field), str) or not about[field].strip():
            raise ValueError(f"{Path(folder) / ABOUT_FILE} needs a {field!r}, a string")
    parts = [
        f"## {about['title']}",
        f"```bash\n{about['command'].strip()}\n```",
        describe_circumstances(read_json(Path(folder) / RUN_FILE, RUN_VERSION), about.get("wall_time")),
        render_tables(folder),
        f"![{about['title']}](results/{Path(folder).name}/{about['picture']})" if "picture" in about else "",
        about.get("text", ""),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def describe_circumstances(run: Mapping[str, Any], wall_time: str | None = None) -> str:
    """Say in one line on what hardware, at which commit and when a run was made.

    Args:
        run (`Mapping[str, Any]`): The content of `run.json`, see [`~evaluation.runs.describe_run`].
        wall_time (`str`, *optional*): How long the commands took.
    """
    hardware = run.get("hardware") or "unknown hardware"
    if isinstance(hardware, Mapping):
        cores, threads = hardware["cores"], hardware["threads"]
        cpu = (
            f"{hardware['cpu']}, {threads} of {cores} cores"
            if threads < cores
            else f"{hardware['cpu']}, {cores} cores"
        )
        hardware = "; ".join([*hardware["gpus"], cpu])
    commit = re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", run.get("commit") or "unknown")
    seed = run.get("config", {}).get("seed")
    parts = [hardware, f"commit {commit}", run["finished"][:10], *([] if seed is None else [f"seed {seed}"])]
    line = " · ".join([*parts, *([wall_time] if wall_time else [])])
    if run.get("recorded_by_hand"):
        line += ". Recorded by hand from an earlier run, whose files were not kept."
    return f"*{line}*"


def render_tables(folder: str | os.PathLike) -> str:
    """Lay out the `metrics.json` of a run in Markdown."""
    from toolweaver_hf.evaluation.rankings import METRICS_FILE, RANKING_METRICS_VERSION
    from toolweaver_hf.evaluation.runs import tables, text_table

    path = Path(folder) / METRICS_FILE
    metrics = read_json(path, RANKING_METRICS_VERSION)
    if "results" in metrics:  # of rankings
        return tables(metrics)
    if "measures" in metrics:  # of an agent
        rows = [
            [name, f"{value:,}" if isinstance(value, int) else f"{value:.3f}"]
            for name, value in metrics["measures"].items()
        ]
        return f"{metrics['tasks']}\n\n{text_table(['measure', ''], rows)}"
    if "tables" in metrics:
        return "\n\n".join(
            "\n\n".join(part for part in (table.get("title"), text_table(table["columns"], table["rows"])) if part)
            for table in metrics["tables"]
        )
    raise ValueError(f"{path} has neither 'results' nor 'measures' nor 'tables'")


def render_page(folder: str | os.PathLike = RESULTS_FOLDER) -> str:
    """Lay out all runs of a folder, ordered by the folders' names."""
    runs = sorted(path.parent for path in Path(folder).glob(f"*/{ABOUT_FILE}"))
    if not runs:
        raise ValueError(f"{folder} holds no run with a file {ABOUT_FILE}")
    return "\n".join([INTRODUCTION, *map(render_section, runs)])


def render_readme(readme: str, folder: str | os.PathLike = RESULTS_FOLDER) -> str:
    """Fill in each table that README asks for.

    Args:
        readme (`str`):
            The text. Between `<!-- results: NAME -->` and `<!-- end of results -->` stand the title, the first table
            and the text of the run `NAME`.
        folder (`str`, *optional*):
            Folder of the runs.
    """

    def fill(match: re.Match) -> str:
        run = Path(folder) / match[1]
        about = read_json(run / ABOUT_FILE, ABOUT_VERSION)
        table = re.search(r"(?m)(^\|.*\n?)+", render_tables(run))[0]
        parts = [f"{about['title']}:", table, about.get("text", "")]
        filling = "\n\n".join(part.strip() for part in parts if part)
        return f"<!-- results: {match[1]} -->\n{filling}\n<!-- end of results -->"

    return re.sub(r"<!-- results: (\S+) -->.*?<!-- end of results -->", fill, readme, flags=re.DOTALL)


def cli(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description="Write recipes/RESULTS.md and the table in README.md.").parse_args(argv)
    write_text(RESULTS_PAGE, render_page())
    write_text(README, render_readme(README.read_text(encoding="utf-8")))


if __name__ == "__main__":
    run_command(cli)
