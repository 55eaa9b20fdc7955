"""The demo: 200 everyday tools with queries, trajectories and functions that compute their answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..data.catalog import ToolCatalog
from .functions import FUNCTIONS


DEMO_FOLDER = Path(__file__).parent
"""Folder with `catalog.jsonl`, `queries.{train,validation,test}.jsonl` and `trajectories.{train,validation,test}.jsonl`."""


def demo_functions(catalog: ToolCatalog) -> dict[str, Callable[..., dict]]:
    """Return the Python function of each tool, by the tool's id.

    A tool's `metadata["function"]` names its function in [`FUNCTIONS`]; tools that name none there are left out, so
    that the demo may be renamed and re-described freely.
    """
    named = {tool.id: tool.metadata.get("function") for tool in catalog}
    return {tool_id: FUNCTIONS[name] for tool_id, name in named.items() if name in FUNCTIONS}
