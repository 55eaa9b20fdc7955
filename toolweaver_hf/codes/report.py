"""A report of learned codes, as one page of plots and as JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

from ..data.catalog import ToolCatalog
from ..files import read_json, write_json
from ..modeling_rqvae import LOSSES, RQVAEModel
from .measures import CODES_METRICS_VERSION, METRICS_FILE, main_axes
from .tool_codes import ToolCodes


if TYPE_CHECKING:
    from matplotlib.axes import Axes


def inspect_codes(folder: str | os.PathLike, catalog: str | os.PathLike | None = None) -> Path:
    """Draw a report of the codes in an output folder of `recipes/tokenize_tools.py`.

    The page shows the training losses, the use of each level's codes, a map of the tools colored by their first code,
    and the tools of the largest prefixes. `report.json` has the measures and the tools of all prefixes.

    Args:
        folder (`str`): The folder.
        catalog (`str`, *optional*): The current catalog. `report.json` then lists as `changes` the names of the tools
            that were `added`, `removed` or `changed` since the codes were learned.

    Returns:
        `Path`: the path of the page, `report.png` in the folder.
    """
    folder = Path(folder)
    codes = ToolCodes.from_pretrained(folder)
    learned = ToolCatalog.from_pretrained(folder)
    metrics = read_json(folder / METRICS_FILE, CODES_METRICS_VERSION)
    codebooks = [codebook.numpy() for codebook in RQVAEModel.from_pretrained(folder).codebooks()]
    names = [_name(tool_id, learned) for tool_id in codes]

    groups: dict[int, list[str]] = {}
    for first, name in zip(codes.matrix[:, 0].tolist(), names, strict=True):
        groups.setdefault(first, []).append(name)
    largest = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    report = {name: value for name, value in metrics.items() if name not in ("schema_version", "history")}
    report["groups"] = [{"first_code": first, "tools": tools} for first, tools in largest]
    if catalog is not None:
        present = ToolCatalog.from_file(catalog)
        report["changes"] = {
            kind: [_name(tool_id, present, learned) for tool_id in tool_ids]
            for kind, tool_ids in codes.compare(present)._asdict().items()
        }
    write_json(folder / "report.json", report, CODES_METRICS_VERSION)

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(15, 11), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(1, 1.25, 1.25), width_ratios=(1, 1.25))
    figure.suptitle(f"{len(codes):,} tools, codebooks {' x '.join(map(str, codes.codebook_sizes))}", fontsize=15)
    _draw_losses(figure.add_subplot(grid[0, 0]), metrics["history"])
    _draw_use(figure.add_subplot(grid[0, 1]), codes, metrics["levels"])
    _draw_map(figure.add_subplot(grid[1:, 0]), codes.matrix, codebooks, [first for first, _ in largest])
    _draw_prefixes(figure.add_subplot(grid[1:, 1]), largest[:26])

    picture = folder / "report.png"
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture


def _name(tool_id: str, *catalogs: ToolCatalog) -> str:
    """Return the name of a tool by the first catalog that has it, or its id if none has."""
    return next((catalog[tool_id].name for catalog in catalogs if tool_id in catalog), tool_id)


def _draw_losses(axes: Axes, history: list[dict[str, float]]) -> None:
    for name in LOSSES:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.removesuffix("_loss"))
    axes.set(title="Losses", xlabel="step", yscale="log")
    axes.legend(frameon=False)


def _draw_use(axes: Axes, codes: ToolCodes, levels: list[dict[str, Any]]) -> None:
    """Draw how many tools are on each code of a level, given the level's measures."""
    for level, (size, measured) in enumerate(zip(codes.codebook_sizes, levels, strict=True)):
        axes.step(
            np.linspace(0, 1, size),
            np.sort(np.bincount(codes.matrix[:, level], minlength=size))[::-1],
            where="mid",
            label=f"level {level + 1}: {measured['used']}/{size} used, perplexity {measured['perplexity']:.0f}",
        )
    axes.set(title="Tools on each code, most first", xlabel="share of the level's codes", ylabel="tools")
    axes.legend(frameon=False)


def _draw_map(axes: Axes, matrix: np.ndarray, codebooks: list[np.ndarray], first_codes: list[int]) -> None:
    """Draw the tools' quantized vectors on their first two principal axes; `first_codes` have the most tools first."""
    points = np.sum([codebook[matrix[:, level]] for level, codebook in enumerate(codebooks)], axis=0)
    points = points - points.mean(0)
    plane = points @ main_axes(points).T
    size = max(2, min(40, 8000 / len(plane)))
    # Beyond a hundred, colors cannot be told apart
    colored = np.isin(matrix[:, 0], first_codes if len(first_codes) <= 100 else first_codes[:10])
    axes.scatter(*plane[~colored].T, c="0.85", s=size)
    axes.scatter(*plane[colored].T, c=matrix[colored, 0], cmap="gist_rainbow", s=size, alpha=0.8)
    axes.set(title="Tools by their quantized vectors, colored by first code", xticks=[], yticks=[])
    for first in first_codes[:10]:
        axes.annotate(f"a_{first}", plane[matrix[:, 0] == first].mean(0), fontsize=9, weight="bold", ha="center")


def _draw_prefixes(axes: Axes, groups: list[tuple[int, list[str]]]) -> None:
    """Draw a table of first codes and the names of their tools."""
    axes.axis("off")
    axes.set_title("The largest prefixes")
    cells = [(f"<a_{first}>", str(len(tools)), _shortened(tools, 86)) for first, tools in groups]
    table = axes.table(
        cells, colLabels=("prefix", "tools", "names"), colWidths=(0.09, 0.07, 0.84), cellLoc="left", bbox=(0, 0, 1, 1)
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for cell in table.get_celld().values():
        cell.set_linewidth(0.3)
        cell.PAD = 0.01 if cell.get_width() > 0.5 else 0.1


def _shortened(names: list[str], length: int) -> str:
    text = ", ".join(names)
    return text if len(text) <= length else text[: length - 1] + "…"


def print_report(folder: str | os.PathLike, catalog: str | os.PathLike | None = None) -> None:
    """Draw the report of [`inspect_codes`]; print its path and, given a catalog, the changed tools."""
    picture = inspect_codes(folder, catalog)
    if catalog:
        for kind, names in read_json(picture.with_suffix(".json"), CODES_METRICS_VERSION)["changes"].items():
            print(f"{kind:<9}{len(names):>6}  {_shortened(names, 200)}")
    print(picture)
