"""The co-usage graph: which tools are used together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import scipy.sparse

from ..data.catalog import ToolCatalog


def cousage_graph(catalog: ToolCatalog, uses: Iterable[Sequence[str]], min_cousage: int = 2) -> scipy.sparse.csr_array:
    r"""
    Build the collaborative similarity \\(A_{uv} = C_{uv} / \sqrt{C_{uu} C_{vv}}\\) of a catalog's tools, where
    \\(C_{uv}\\) counts how often \\(u\\) and \\(v\\) are used together (ToolWeaver, section 3.1).

    Args:
        catalog ([`ToolCatalog`]):
            The tools.
        uses (`Iterable[Sequence[str]]`):
            The ids of the tools that each query or trajectory uses.
        min_cousage (`int`, *optional*, defaults to 2):
            How often two tools must be used together to get an edge. A single shared query is often chance, and the
            normalization gives it full weight for rare tools. The paper uses 1.

    Returns:
        `scipy.sparse.csr_array` of shape `(num_tools, num_tools)`: symmetric, with an empty diagonal.

    Raises:
        `ValueError`: if a tool is not in the catalog, or `min_cousage` is below 1.
    """
    if min_cousage < 1:
        raise ValueError(f"min_cousage must be at least 1, not {min_cousage}")
    position = {tool_id: i for i, tool_id in enumerate(catalog.ids)}
    tools: list[int] = []
    lengths: list[int] = []
    for use in uses:
        unknown = [tool_id for tool_id in use if tool_id not in position]
        if unknown:
            raise ValueError(f"the catalog lacks the tool {unknown[0]!r}, which is used in {list(use)}")
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
    often = (row != column) & (together.data >= min_cousage)
    row, column, data = row[often], column[often], together.data[often]
    return scipy.sparse.csr_array((data / np.sqrt(count[row] * count[column]), (row, column)), shape=together.shape)


def unit_degree(cousage: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Scale a graph to a mean degree of 1 over the tools that have edges.

    The strength of the regularization then does not depend on the number or the scale of the edges, nor on the number
    of tools without any.
    """
    with_edges = np.count_nonzero(np.diff(cousage.indptr))
    scale = np.float32(with_edges / max(float(cousage.data.sum(dtype=np.float64)), 1e-12))
    return scipy.sparse.csr_array(cousage.astype(np.float32) * scale)


def hold_out_edges(
    cousage: scipy.sparse.csr_array, share: float, seed: int = 0
) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """Split a graph into training edges and held-out edges, to measure whether codes generalize to unseen pairs.

    Args:
        cousage (`scipy.sparse.csr_array` of shape `(num_tools, num_tools)`):
            A symmetric graph.
        share (`float`):
            Share of the edges to hold out, at least 0 and below 1.
        seed (`int`, *optional*, defaults to 0):
            Seed of the split.

    Returns:
        `tuple`: the training graph; the held-out pairs, of shape `(num_held_out, 2)`.

    Raises:
        `ValueError`: if the share is out of range.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share of edges to hold out must be from 0 to below 1, not {share}")
    edges = scipy.sparse.coo_array(scipy.sparse.triu(cousage))
    row, column = edges.coords
    hidden = np.random.default_rng(seed).random(edges.nnz) < share
    kept = scipy.sparse.coo_array((edges.data[~hidden], (row[~hidden], column[~hidden])), shape=cousage.shape)
    return scipy.sparse.csr_array(kept + kept.T), np.stack([row[hidden], column[hidden]], axis=1)
