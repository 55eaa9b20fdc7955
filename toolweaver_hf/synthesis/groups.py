"""Tools that belong together, guessed from a catalog that nobody has used yet."""

from __future__ import annotations

import hashlib

import numpy as np
import scipy.sparse
import torch

from ..data.catalog import ToolCatalog


NUM_NEIGHBORS = 16
TOO_ALIKE = 0.9
"""Tools whose documents are nearer than this do the same: a person needs one of them."""
GROUP_BONUS = 0.3
CHAIN_BONUS = 0.5
CHUNK = 1024


def related_tools(catalog: ToolCatalog, embeddings: torch.Tensor) -> scipy.sparse.csr_array:
    """Score pairs of tools by how likely one errand needs both.

    A score is the cosine of the documents' embeddings, plus a bonus for the same category or server (what an id has
    before its last dot), plus a bonus where an output of one has the name of an input of the other that few other
    tools have.

    Args:
        catalog ([`ToolCatalog`]):
            The tools.
        embeddings (`torch.Tensor` of shape `(num_tools, embedding_dim)`):
            Unit vectors of their documents.

    Returns:
        `scipy.sparse.csr_array` of shape `(num_tools, num_tools)`: for each tool the scores of its neighbors and of
        those that take its output, without tools that are nearly the same.
    """
    chains = _chains(catalog)
    groups = np.unique([tool.category or tool.id.rpartition(".")[0] for tool in catalog], return_inverse=True)[1]
    grouped = np.array([bool(tool.category or tool.id.rpartition(".")[0]) for tool in catalog])
    linked = scipy.sparse.coo_array(chains)
    link_row, link_column = (torch.from_numpy(places).long() for places in linked.coords)
    rows, columns = [link_row], [link_column]
    cosines = [(embeddings[link_row] * embeddings[link_column]).sum(1)]
    for start in range(0, len(catalog), CHUNK):
        chunk = embeddings[start : start + CHUNK] @ embeddings.T
        values, found = chunk.topk(min(NUM_NEIGHBORS + 1, len(catalog)), dim=1)
        rows.append(torch.arange(start, start + len(chunk)).repeat_interleave(found.shape[1]))
        columns.append(found.flatten())
        cosines.append(values.flatten())
    # Each pair once; all linked ones are among them
    pair, first = np.unique((torch.cat(rows) * len(catalog) + torch.cat(columns)).numpy(), return_index=True)
    row, column, cosine = pair // len(catalog), pair % len(catalog), torch.cat(cosines).numpy()[first]
    chained = np.zeros(len(pair))
    chained[np.searchsorted(pair, (link_row * len(catalog) + link_column).numpy())] = linked.data
    scores = cosine + GROUP_BONUS * (groups[row] == groups[column]) * grouped[row] + CHAIN_BONUS * chained
    kept = (row != column) & (cosine < TOO_ALIKE)
    row, column, scores = row[kept], column[kept], scores[kept]
    return scipy.sparse.csr_array((scores, (row, column)), shape=(len(catalog), len(catalog)))


def tool_groups(
    catalog: ToolCatalog, embeddings: torch.Tensor, num_groups: int, seed: int = 0
) -> list[tuple[str, ...]]:
    """Draw groups of two or three tools that belong together, each tool in turn with one of its best partners.

    Args:
        catalog ([`ToolCatalog`]):
            The tools.
        embeddings (`torch.Tensor` of shape `(num_tools, embedding_dim)`):
            Unit vectors of their documents.
        num_groups (`int`):
            How many groups to draw at most; about every third is a triple.
        seed (`int`, *optional*, defaults to 0):
            Seed of the drawing.

    Returns:
        `list[tuple[str, ...]]`: ids of the tools of each group.
    """
    scores = related_tools(catalog, embeddings)
    ids = catalog.ids
    # Drawn from the ids, so that other tools that come or go change few groups
    drawn = [int(hashlib.sha256(f"{seed} {tool_id}".encode()).hexdigest(), 16) for tool_id in ids]
    order = sorted(range(len(catalog)), key=drawn.__getitem__)
    groups: dict[frozenset[int], tuple[int, ...]] = {}
    for rank in range(NUM_NEIGHBORS):  # every tool's best partner first, then every tool's second
        for tool in order:
            if len(groups) >= num_groups:
                break
            partners = _best(scores, tool)
            if rank >= len(partners):
                continue
            members = [tool, partners[rank]]
            if (drawn[tool] + rank) % 3 == 0:
                members += [third for third in _best(scores, partners[rank]) if third not in members][:1]
            groups.setdefault(frozenset(members), tuple(members))
    return [tuple(ids[member] for member in members) for members in groups.values()]


def _best(scores: scipy.sparse.csr_array, tool: int) -> list[int]:
    """Return the partners of a tool, best first."""
    start, end = scores.indptr[tool : tool + 2]
    return scores.indices[start:end][np.argsort(-scores.data[start:end], kind="stable")].tolist()


def _chains(catalog: ToolCatalog) -> scipy.sparse.csr_array:
    """Return for each pair of tools how telling the names are that the first's output shares with the second's input.

    The value is 1 for a name that these two alone have, and 0 for one that more than a twentieth of the catalog has.
    """
    numbers: dict[str, int] = {}
    outputs, inputs = [], []
    for tool in catalog:
        outputs.append(_numbered(_names(tool.metadata.get("output_schema")), numbers))
        inputs.append(_numbered(_names(tool.parameters), numbers))
    given, taken = (_incidence(rows, max(len(numbers), 1)) for rows in (outputs, inputs))
    uses = np.asarray((given + taken).sum(axis=0)).ravel()
    telling = np.where(uses <= max(3, len(catalog) / 20), 2 / np.maximum(uses, 2), 0)
    chains = scipy.sparse.csr_array(given @ scipy.sparse.diags_array(telling) @ taken.T)
    chains.data = np.minimum(chains.data, 1)
    chains.eliminate_zeros()
    return chains


def _names(schema: object) -> set[str]:
    """Return the names of an object schema's properties, also of the objects in a list, in one spelling."""
    if not isinstance(schema, dict):
        return set()
    if isinstance(schema.get("items"), dict):
        return _names(schema["items"])
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return set()
    return {"".join(filter(str.isalnum, name)).lower() for name in properties}


def _numbered(names: set[str], numbers: dict[str, int]) -> list[int]:
    return [numbers.setdefault(name, len(numbers)) for name in sorted(names)]


def _incidence(rows: list[list[int]], num_columns: int) -> scipy.sparse.csr_array:
    indices = [column for row in rows for column in row]
    indptr = np.cumsum([0, *map(len, rows)])
    return scipy.sparse.csr_array((np.ones(len(indices)), indices, indptr), shape=(len(rows), num_columns))
