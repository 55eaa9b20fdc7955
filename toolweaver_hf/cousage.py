"""Which tools are used together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import scipy.sparse

from .catalog import ToolCatalog


def cousage_graph(catalog: ToolCatalog, uses: Iterable[Sequence[str]]) -> scipy.sparse.csr_array:
    r"""
    Build the collaborative similarity \\(A_{uv} = C_{uv} / \sqrt{C_{uu} C_{vv}}\\) of a catalogue's tools, where
    \\(C_{uv}\\) counts how often \\(u\\) and \\(v\\) are used together (ToolWeaver, section 3.1).

    Args:
        catalog ([`ToolCatalog`]):
            The tools.
        uses (`Iterable[Sequence[str]]`):
            For each query or trajectory the ids of the tools that it uses.

    Returns:
        `scipy.sparse.csr_array` of shape `(num_tools, num_tools)`: symmetric, with an empty diagonal.

    Raises:
        `ValueError`: if a tool is not in the catalogue.
    """
    position = {tool_id: i for i, tool_id in enumerate(catalog.ids)}
    tools, lengths = [], []
    for use in uses:
        unknown = [tool_id for tool_id in use if tool_id not in position]
        if unknown:
            raise ValueError(f"the catalogue lacks the tool {unknown[0]!r}, which is used in {list(use)}")
        members = {position[tool_id] for tool_id in use}
        tools.extend(members)
        lengths.append(len(members))
    incidence = scipy.sparse.csr_array(
        (np.ones(len(tools), dtype=np.float32), tools, np.concatenate([[0], np.cumsum(lengths)])),
        shape=(len(lengths), len(catalog)),
    )
    together = scipy.sparse.coo_array(incidence.T @ incidence)
    row, column = together.coords
    count = together.diagonal()
    off_diagonal = row != column
    row, column, data = row[off_diagonal], column[off_diagonal], together.data[off_diagonal]
    return scipy.sparse.csr_array((data / np.sqrt(count[row] * count[column]), (row, column)), shape=together.shape)
