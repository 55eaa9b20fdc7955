"""Assign a unique code to every tool, from its latent vector."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.sparse
import torch
from scipy.optimize import linear_sum_assignment

from ..modeling_rqvae import RQVAEModel, uniform_mapping


CHUNK_SIZE = 8192  # tools per forward pass over the catalog, rows per distance matrix
ROUNDS = 6  # rounds in which tools adopt codes of their neighbors
LARGEST_EXACT = 1 << 26  # entries of the largest cost matrix that is solved exactly


def check_capacity(num_tools: int, codebook_sizes: Sequence[int]) -> None:
    """Raise a `ValueError` if there are more tools than codes."""
    capacity = math.prod(codebook_sizes)
    if num_tools > capacity:
        sizes = " x ".join(map(str, codebook_sizes))
        raise ValueError(
            f"{num_tools} tools do not fit into {sizes} = {capacity} codes: increase codebook_sizes or add a level"
        )


@torch.no_grad()
def encode_tools(model: RQVAEModel, embeddings: torch.Tensor) -> torch.Tensor:
    """Encode the embeddings of a whole catalog, in chunks.

    Args:
        model ([`RQVAEModel`]): The model.
        embeddings (`torch.Tensor` of shape `(num_tools, input_dim)`): The tools' embeddings.

    Returns:
        `torch.Tensor` of shape `(num_tools, code_dim)`: the latent vectors, float32.
    """
    return torch.cat([model.encode(rows).float() for rows in embeddings.split(CHUNK_SIZE)])


@torch.no_grad()
def assign_codes(
    latents: torch.Tensor,
    codebooks: Sequence[torch.Tensor],
    taken: np.ndarray | None = None,
    cousage_weights: scipy.sparse.csr_array | None = None,
    codes: np.ndarray | None = None,
) -> np.ndarray:
    """Assign a unique code to every tool.

    Each level takes the nearest codebook vector. With `cousage_weights`, all levels but the last take the codes of
    [`choose_codes`] instead. Tools then move for two reasons only:

    - **Overfull prefixes.** If a prefix has more tools than codes, the tools that lose least move to the nearest
      prefix with free codes.
    - **Collisions.** If several tools share a whole code, one keeps it and the others move to free codes of the same
      prefix. This is an optimal transport problem in which each code holds one tool: among the assignments that move
      the fewest tools, the one with the least total squared distance is taken. Prefixes of more than about 8,000
      tools use the rule for overfull prefixes instead.

    Args:
        latents (`torch.Tensor` of shape `(num_tools, code_dim)`):
            The tools' latent vectors.
        codebooks (`Sequence[torch.Tensor]`):
            For each level the codebook, of shape `(codebook_size, code_dim)`.
        taken (`np.ndarray` of shape `(num_taken, num_levels)`, *optional*):
            Codes that must not be assigned.
        cousage_weights (`scipy.sparse.csr_array` of shape `(num_tools, num_tools)`, *optional*):
            The weighted co-usage graph, as in [`choose_codes`].
        codes (`np.ndarray` of shape `(num_tools, num_levels)`, *optional*):
            The current codes, from which [`choose_codes`] starts. Defaults to the nearest codes.

    Returns:
        `np.ndarray` of shape `(num_tools, num_levels)`: the codes, all distinct.

    Raises:
        `ValueError`: if there are more tools than codes, or a latent vector is not finite.
    """
    sizes = [len(codebook) for codebook in codebooks]
    taken = np.zeros((0, len(sizes)), dtype=np.int64) if taken is None else np.asarray(taken, dtype=np.int64)
    check_capacity(len(latents) + len(taken), sizes)
    if not torch.isfinite(latents.sum(1)).all():
        raise ValueError("a latent vector holds NaN or infinity; check the embeddings and the training loss")

    residual = latents.float()
    codebooks = [codebook.float() for codebook in codebooks]
    prefix = np.zeros(len(latents), dtype=np.int64)  # the code up to this level, as one number
    taken_prefix = np.zeros(len(taken), dtype=np.int64)
    before, codes = codes, np.empty((len(latents), len(sizes)), dtype=np.int64)
    for level, codebook in enumerate(codebooks):
        taken_index = taken[:, level]
        if level < len(sizes) - 1 and cousage_weights is not None and cousage_weights.nnz:
            index = choose_codes(residual, codebook, cousage_weights, None if before is None else before[:, level])
            cousage_weights = edges_within_codes(cousage_weights, index)
        else:
            index = nearest(residual, codebook)[0].cpu().numpy()
        if level < len(sizes) - 1:
            room = math.prod(sizes[level + 1 :])
            _make_room(index, residual, codebook, prefix, taken_prefix, taken_index, room)
            residual = residual - codebook[torch.from_numpy(index).to(codebook.device)]
        else:
            _separate(index, residual, codebook, prefix, taken_prefix, taken_index)
        codes[:, level] = index
        prefix = prefix * sizes[level] + index
        taken_prefix = taken_prefix * sizes[level] + taken_index
    return codes


def nearest(points: torch.Tensor, centers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest center of each point and their squared distance, without the term for the point's norm."""
    norms = centers.square().sum(1)
    distances = [torch.addmm(norms, rows, centers.T, alpha=-2).min(1) for rows in points.split(CHUNK_SIZE)]
    return torch.cat([part.indices for part in distances]), torch.cat([part.values for part in distances])


@torch.no_grad()
def choose_codes(
    residual: torch.Tensor,
    codebook: torch.Tensor,
    cousage_weights: scipy.sparse.csr_array,
    index: np.ndarray | None = None,
) -> np.ndarray:
    r"""
    Choose the codes of one level so that tools that are used together tend to share a code.

    Coordinate descent on \\(\sum_u \|r_u - e_{c_u}\|^2 / \sigma^2 + \frac12 \sum_{uv} A_{uv} [c_u \ne c_v]\\). The
    first term is the quantization error as a share of the residuals' variance \\(\sigma^2\\). The second is the graph
    Laplacian's quadratic form (ToolWeaver's collaborative regularization), in which two different codes count as far
    apart as two random tools. In each round, a random half of the tools take their best code given the current codes
    of their neighbors.

    Args:
        residual (`torch.Tensor` of shape `(num_tools, code_dim)`): The residuals of the previous levels.
        codebook (`torch.Tensor` of shape `(codebook_size, code_dim)`): The level's codebook.
        cousage_weights (`scipy.sparse.csr_array` of shape `(num_tools, num_tools)`):
            \\(A\\): a graph of mean degree 1 ([`~codes.cousage.unit_degree`]) times the collaborative weight.
        index (`np.ndarray` of shape `(num_tools,)`, *optional*): Codes to start from. Defaults to the nearest ones.

    Returns:
        `np.ndarray` of shape `(num_tools,)`: the codes.
    """
    alone, alone_cost = (part.cpu().numpy() for part in nearest(residual, codebook))
    degree = np.diff(cousage_weights.indptr)
    index = np.where(degree > 0, alone if index is None else index, alone)
    norms, variance = codebook.square().sum(1), float(residual.var(0, correction=0).sum())
    draw = np.random.default_rng(0)
    everyone = np.arange(len(index) + 1)
    for _ in range(ROUNDS):
        # Copied, so that all tools of a round see the codes from before the round.
        held = scipy.sparse.csr_array(
            (np.ones(len(index), dtype=np.float32), index.copy(), everyone), shape=(len(index), len(codebook))
        )
        chosen = np.flatnonzero((degree > 0) & (draw.random(len(index)) < 0.5))
        best = alone_cost.astype(np.float64)
        for tools in np.split(chosen, range(CHUNK_SIZE, len(chosen), CHUNK_SIZE)):
            # Candidates are the tool's nearest code and the codes its neighbors hold; any other code is farther
            # and gains no agreement.
            votes = cousage_weights[tools] @ held
            row, column = np.repeat(tools, np.diff(votes.indptr)), votes.indices.astype(np.int64)
            points, centers = (torch.from_numpy(i).to(residual.device) for i in (row, column))
            distance = norms[centers] - 2 * (residual[points] * codebook[centers]).sum(1)
            cost = distance.cpu().numpy() - variance * votes.data
            np.minimum.at(best, row, cost)
            at_best = cost == best[row]
            index[tools] = alone[tools]
            index[row[at_best]] = column[at_best]
    return index


def edges_within_codes(graph: scipy.sparse.csr_array, index: np.ndarray) -> scipy.sparse.csr_array:
    """Return the subgraph of the edges between tools with the same code."""
    graph = graph.tocoo()
    row, column = graph.coords
    same = index[row] == index[column]
    return scipy.sparse.csr_array((graph.data[same], (row[same], column[same])), shape=graph.shape)


@torch.no_grad()
def uniform_codes(
    latents: torch.Tensor, codebooks: Sequence[torch.Tensor], epsilon: float = 0.05, iterations: int = 5
) -> np.ndarray:
    """Assign codes by the paper's uniform mapping: Sinkhorn-Knopp on the last level, within each prefix.

    This is the entropic relaxation of the problem that [`assign_codes`] solves exactly; a few tools still share a
    code.

    Args:
        latents (`torch.Tensor` of shape `(num_tools, code_dim)`): The tools' latent vectors.
        codebooks (`Sequence[torch.Tensor]`): For each level the codebook, of shape `(codebook_size, code_dim)`.
        epsilon (`float`, *optional*, defaults to 0.05): As in [`uniform_mapping`].
        iterations (`int`, *optional*, defaults to 5): As in [`uniform_mapping`].

    Returns:
        `np.ndarray` of shape `(num_tools, num_levels)`: the codes.
    """
    residual = latents.float()
    *upper, last = [codebook.float() for codebook in codebooks]
    codes = np.zeros((len(latents), len(codebooks)), dtype=np.int64)
    prefix = np.zeros(len(latents), dtype=np.int64)
    for level, codebook in enumerate(upper):
        index, _ = nearest(residual, codebook)
        codes[:, level] = index.cpu().numpy()
        prefix = prefix * len(codebook) + codes[:, level]
        residual = residual - codebook[index]

    order = np.argsort(prefix, kind="stable")
    _, starts, sizes = np.unique(prefix[order], return_index=True, return_counts=True)
    for size in np.unique(sizes):  # prefixes with equally many tools form a batch
        tools = order[starts[sizes == size][:, None] + np.arange(size)]
        for rows in np.array_split(tools, -(-tools.size * len(last) // (1 << 24))):
            points = residual[torch.from_numpy(rows).to(residual.device)]
            distances = last.square().sum(1) - 2 * points @ last.T
            codes[rows, -1] = uniform_mapping(distances, epsilon, iterations).argmax(-1).cpu().numpy()
    return codes


def _members(prefix: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
    """Return the positions of the tools with each of the given prefixes."""
    order = np.argsort(prefix, kind="stable")
    ordered = prefix[order]
    starts, ends = np.searchsorted(ordered, wanted), np.searchsorted(ordered, wanted, side="right")
    return [order[start:end] for start, end in zip(starts, ends, strict=True)]


def _make_room(
    index: np.ndarray,
    residual: torch.Tensor,
    codebook: torch.Tensor,
    prefix: np.ndarray,
    taken_prefix: np.ndarray,
    taken_index: np.ndarray,
    room: int,
) -> None:
    """Change the codes of a level in place, so that at most `room` tools of a prefix share one."""
    size = len(codebook)
    cells, counts = np.unique(
        np.concatenate([prefix * size + index, taken_prefix * size + taken_index]), return_counts=True
    )
    crowded = np.unique(cells[counts > room] // size)
    for tools, held in zip(_members(prefix, crowded), _members(taken_prefix, crowded), strict=True):
        left = room - np.bincount(taken_index[held], minlength=size)
        index[tools] = _spill(residual[torch.from_numpy(tools).to(residual.device)], codebook, index[tools], left)


def _spill(points: torch.Tensor, centers: torch.Tensor, choice: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Move points from overfull centers to the nearest center with room; the points that lose least move first.

    Args:
        points (`torch.Tensor` of shape `(num_points, dim)`): The points.
        centers (`torch.Tensor` of shape `(num_centers, dim)`): The centers.
        choice (`np.ndarray` of shape `(num_points,)`): The nearest center of each point.
        room (`np.ndarray` of shape `(num_centers,)`): Capacity of each center; at least `num_points` in total.
    """
    choice = choice.copy()
    norms = centers.square().sum(1)
    open_centers = np.ones(len(centers), dtype=bool)
    while True:
        counts = np.bincount(choice, minlength=len(centers))
        rows = np.flatnonzero((counts > room)[choice])
        if not len(rows):
            return choice
        # Full centers accept no more points; they keep the points whose next-best center is farthest.
        open_centers &= counts < room
        elsewhere = np.flatnonzero(open_centers)
        moving = points[torch.from_numpy(rows).to(points.device)]
        other = centers[torch.from_numpy(elsewhere).to(centers.device)]
        own = torch.from_numpy(choice[rows]).to(centers.device)
        best, distance = nearest(moving, other)
        loss = (distance - norms[own] + 2 * (moving * centers[own]).sum(1)).cpu().numpy()
        order = np.lexsort((-loss, choice[rows]))
        crowded = choice[rows[order]]
        rank = np.arange(len(order)) - np.searchsorted(crowded, crowded)
        leaving = order[rank >= room[crowded]]
        choice[rows[leaving]] = elsewhere[best.cpu().numpy()[leaving]]


def _separate(
    index: np.ndarray,
    residual: torch.Tensor,
    codebook: torch.Tensor,
    prefix: np.ndarray,
    taken_prefix: np.ndarray,
    taken_index: np.ndarray,
) -> None:
    """Change the codes of the last level in place, so that no two tools of a prefix share one."""
    size = len(codebook)
    cell, taken_cell = prefix * size + index, taken_prefix * size + taken_index
    _, cell_number, counts = np.unique(cell, return_inverse=True, return_counts=True)
    crowded = (counts[cell_number] > 1) | np.isin(cell, taken_cell)
    groups = np.unique(prefix[crowded])
    for tools, held in zip(_members(prefix, groups), _members(taken_prefix, groups), strict=True):
        rows = tools[crowded[tools]]
        taken = np.zeros(size, dtype=bool)
        taken[taken_index[held]] = True
        if len(rows) * size > LARGEST_EXACT:
            points = residual[torch.from_numpy(tools).to(residual.device)]
            index[tools] = _spill(points, codebook, index[tools], 1 - taken)
            continue
        used = taken.copy()
        used[index[tools]] = True
        own = np.unique(index[rows])
        own = own[~taken[own]]
        columns = np.concatenate([own, np.flatnonzero(~used)])
        points = residual[torch.from_numpy(rows).to(residual.device)].double()
        centers = codebook[torch.from_numpy(columns).to(codebook.device)].double()
        cost = torch.addmm(centers.square().sum(1), points, centers.T, alpha=-2).cpu().numpy()
        index[rows] = columns[_fewest_moves(cost, index[rows], columns[: len(own)])]


def _fewest_moves(cost: np.ndarray, choice: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Assign a distinct column to each tool: as few tools as possible move, at the least total cost.

    Args:
        cost (`np.ndarray` of shape `(num_tools, num_columns)`): Cost of each column, up to a constant per row. The
            first columns are the tools' current codes, the others are free.
        choice (`np.ndarray` of shape `(num_tools,)`): The current code of each tool.
        own (`np.ndarray` of shape `(num_own,)`): The codes of the first columns; each can be kept by one tool.
    """
    num_tools, num_own = len(choice), len(own)
    # Of the free columns, a tool needs at most the `num_moving` nearest.
    num_moving = num_tools - num_own
    free = cost[:, num_own:]
    if num_moving < free.shape[1]:
        wanted = np.argpartition(free, num_moving - 1, axis=1)[:, :num_moving] if num_moving else np.zeros(0, int)
        kept = np.concatenate([np.arange(num_own), num_own + np.unique(wanted)])
    else:
        kept = np.arange(cost.shape[1])
    cost = cost[:, kept]
    # The reward for keeping a code exceeds any sum of distances; no tool can take the current code of another.
    reward = 1 + np.ptp(cost, axis=1).sum()
    keeps = choice[:, None] == own
    cost[:, :num_own] = np.where(keeps, cost[:, :num_own] - reward, cost.max() + reward)
    return kept[_linear_sum_assignment(cost)]


def _linear_sum_assignment(cost: np.ndarray) -> np.ndarray:
    """Return the column of each row in the assignment of least total cost.

    Near-duplicate tools give similar rows that compete for the same few columns. Padding the matrix to a square and
    centering its columns gives the same solution an order of magnitude faster.
    """
    rows, columns = cost.shape
    if rows > 64 and columns <= 1.25 * rows:
        cost = np.concatenate([cost, np.zeros((columns - rows, columns))]) - cost.mean(0)
    return linear_sum_assignment(cost)[1][:rows]
