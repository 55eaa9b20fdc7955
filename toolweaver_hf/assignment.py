"""From latent vectors to codes, one code for one tool."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment


def check_capacity(num_tools: int, codebook_sizes: Sequence[int]) -> None:
    """Raise a `ValueError` if there are more tools than codes."""
    capacity = math.prod(codebook_sizes)
    if num_tools > capacity:
        sizes = " x ".join(map(str, codebook_sizes))
        raise ValueError(
            f"{num_tools} tools do not fit into {sizes} = {capacity} codes: give larger codebook_sizes or one level more"
        )


@torch.no_grad()
def assign_codes(
    latents: torch.Tensor, codebooks: Sequence[torch.Tensor], taken: np.ndarray | None = None
) -> np.ndarray:
    """Give every tool a code of its own.

    Every level takes the nearest codebook vector. A prefix that would hold more tools than it has codes passes the
    ones that lose least on to the nearest prefix with room. Of the tools that share a whole code the nearest keeps it;
    the others get free codes of their prefix by an exact assignment of least total squared distance. No other tool is
    moved.

    Args:
        latents (`torch.Tensor` of shape `(num_tools, code_dim)`):
            The tools' latent vectors.
        codebooks (`Sequence[torch.Tensor]`):
            For each level the codebook, of shape `(codebook_size, code_dim)`.
        taken (`np.ndarray` of shape `(num_taken, num_levels)`, *optional*):
            Codes that are not to be given.

    Returns:
        `np.ndarray` of shape `(num_tools, num_levels)`: the codes, no two alike.

    Raises:
        `ValueError`: if there are more tools than codes, or a latent vector is not finite.
    """
    sizes = [len(codebook) for codebook in codebooks]
    taken = np.zeros((0, len(sizes)), dtype=np.int64) if taken is None else np.asarray(taken, dtype=np.int64)
    check_capacity(len(latents) + len(taken), sizes)
    if not torch.isfinite(latents).all():
        raise ValueError("a latent vector holds NaN or infinity; check the embeddings and the training's loss")
    latents = latents.float()
    codebooks = [codebook.float() for codebook in codebooks]

    residual = latents
    prefix = np.zeros(len(latents), dtype=np.int64)  # of the levels so far, as one number
    taken_prefix = np.zeros(len(taken), dtype=np.int64)
    codes = np.empty((len(latents), len(sizes)), dtype=np.int64)
    for level, codebook in enumerate(codebooks[:-1]):
        below = math.prod(sizes[level + 1 :])
        cell_taken = taken_prefix * sizes[level] + taken[:, level]
        index = _nearest_with_room(residual, codebook, prefix, cell_taken, below)
        codes[:, level] = index
        prefix = prefix * sizes[level] + index
        taken_prefix = cell_taken
        residual = residual - codebook[torch.from_numpy(index).to(codebook.device)]

    codes[:, -1] = _last_level(residual, codebooks[-1], prefix, taken_prefix, taken[:, -1])
    return codes


def _nearest_with_room(
    residual: torch.Tensor, codebook: torch.Tensor, prefix: np.ndarray, cell_taken: np.ndarray, room: int
) -> np.ndarray:
    """Choose for each tool the nearest code of a level under which there is still room below its prefix."""
    size = len(codebook)
    index = np.concatenate([torch.cdist(c, codebook).argmin(1).cpu().numpy() for c in residual.split(8192)])
    cell = prefix * size + index
    cells, counts = np.unique(np.concatenate([cell, cell_taken]), return_counts=True)
    for full_prefix in np.unique(cells[counts > room] // size):
        members = np.flatnonzero(prefix == full_prefix)
        left = room - np.bincount(cell_taken[cell_taken // size == full_prefix] % size, minlength=size)
        cost = torch.cdist(residual[torch.from_numpy(members).to(residual.device)], codebook).square().cpu().numpy()
        index[members] = _capacitated(cost, left)
    return index


def _capacitated(cost: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Assign rows to columns that hold at most `room` rows each; rows that lose least move, to the nearest with room.

    Args:
        cost (`np.ndarray` of shape `(rows, columns)`): The cost of each assignment.
        room (`np.ndarray` of shape `(columns,)`): Rows that each column can hold; in sum at least `rows`.
    """
    open_cost = np.where(room > 0, cost, np.inf)
    choice = open_cost.argmin(1)
    while True:
        counts = np.bincount(choice, minlength=len(room))
        over = np.flatnonzero(counts > room)
        if not len(over):
            return choice
        # Fill the crowded columns with those who would lose most elsewhere; nobody may enter them any more.
        open_cost[:, counts >= room] = np.inf
        for column in over:
            members = np.flatnonzero(choice == column)
            loss = open_cost[members].min(1) - cost[members, column]
            leaving = members[np.argsort(loss, kind="stable")[: counts[column] - room[column]]]
            choice[leaving] = open_cost[leaving].argmin(1)


def _last_level(
    residual: torch.Tensor,
    codebook: torch.Tensor,
    prefix: np.ndarray,
    taken_prefix: np.ndarray,
    taken_last: np.ndarray,
) -> np.ndarray:
    """Choose for each tool a code of the last level that no other tool of its prefix has."""
    size = len(codebook)
    nearest = [torch.cdist(chunk, codebook).min(1) for chunk in residual.split(8192)]
    index = torch.cat([chunk.indices for chunk in nearest]).cpu().numpy()
    distance = torch.cat([chunk.values for chunk in nearest]).cpu().numpy()

    # The nearest tool of each cell keeps it, unless it was taken before; sorted by cell, then by distance.
    cell = prefix * size + index
    order = np.lexsort((distance, cell))
    moves = np.ones(len(cell), dtype=bool)
    moves[order[np.append(True, cell[order[1:]] != cell[order[:-1]])]] = False
    moves |= np.isin(cell, taken_prefix * size + taken_last)

    by_prefix = np.argsort(prefix, kind="stable")
    sorted_prefix = prefix[by_prefix]
    for group in np.unique(prefix[moves]):
        members = by_prefix[slice(*np.searchsorted(sorted_prefix, [group, group + 1]))]
        moving = members[moves[members]]
        held = np.concatenate([index[members[~moves[members]]], taken_last[taken_prefix == group]])
        free = np.setdiff1d(np.arange(size), held)
        rows = residual[torch.from_numpy(moving).to(residual.device)].double()
        cost = torch.cdist(rows, codebook[torch.from_numpy(free).to(codebook.device)].double()).square()
        row, column = linear_sum_assignment(cost.cpu().numpy())
        index[moving[row]] = free[column]
    return index
