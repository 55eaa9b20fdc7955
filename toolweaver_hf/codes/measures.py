"""Measures of codes: reconstruction, use of the codebooks, collisions, agreement with the co-usage graph."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch

from ..modeling_rqvae import RQVAEModel
from .assignment import CHUNK_SIZE, encode_tools, uniform_codes


METRICS_FILE = "metrics.json"
CODES_METRICS_VERSION = 1  # schema_version of metrics.json and report.json


@torch.no_grad()
def nearest_codes(model: RQVAEModel, latents: torch.Tensor) -> torch.Tensor:
    """Quantize the latent vectors of a whole catalog, in chunks.

    Args:
        model ([`RQVAEModel`]): The model.
        latents (`torch.Tensor` of shape `(num_tools, code_dim)`): The tools' latent vectors.

    Returns:
        `torch.Tensor` of shape `(num_tools, num_levels)`: the nearest codes, which tools may share.
    """
    return torch.cat([model.quantize(rows) for rows in latents.split(CHUNK_SIZE)])


@torch.no_grad()
def reconstruction_loss(model: RQVAEModel, embeddings: torch.Tensor, codes: torch.Tensor) -> float:
    """Measure how well codes reconstruct the embeddings of a whole catalog, in chunks.

    Args:
        model ([`RQVAEModel`]): The model.
        embeddings (`torch.Tensor` of shape `(num_tools, input_dim)`): The tools' embeddings.
        codes (`torch.Tensor` of shape `(num_tools, num_levels)`): The tools' codes.

    Returns:
        `float`: the mean squared error as a share of the embeddings' variance.
    """
    losses = [
        model(rows, codes=index).reconstruction_loss * len(rows)
        for rows, index in zip(embeddings.split(CHUNK_SIZE), codes.split(CHUNK_SIZE), strict=True)
    ]
    return float(sum(losses)) / len(embeddings)


@torch.no_grad()
def measure_codes(
    model: RQVAEModel,
    embeddings: torch.Tensor,
    assigned: np.ndarray,
    cousage: scipy.sparse.csr_array,
    held_out: np.ndarray | None = None,
) -> dict:
    """Measure the codes of a catalog.

    Args:
        model ([`RQVAEModel`]): The fitted model.
        embeddings (`torch.Tensor` of shape `(num_tools, input_dim)`): The tools' embeddings.
        assigned (`np.ndarray` of shape `(num_tools, num_levels)`): The tools' codes.
        cousage (`scipy.sparse.csr_array` of shape `(num_tools, num_tools)`): The co-usage graph.
        held_out (`np.ndarray` of shape `(num_pairs, 2)`, *optional*): Co-used pairs that were held out.

    Returns:
        `dict`: `reconstruction_loss` of the assigned codes, as a share of the embeddings' variance; `levels`, with the
        number of used codes and their perplexity; `collisions`, `collisions_before` and `collisions_uniform`, the
        number of tools minus the number of distinct codes, for the assigned codes, for the nearest codes and for those
        of the uniform mapping; `cousage` and `held_out`, how often these pairs share their first code, and how often
        any pair does.
    """
    num_tools = len(assigned)
    latents = encode_tools(model, embeddings)
    nearest = nearest_codes(model, latents).cpu().numpy()
    uniform = uniform_codes(latents, model.codebooks())
    levels = []
    for level, size in enumerate(model.config.codebook_sizes):
        counts = np.bincount(assigned[:, level], minlength=size)
        share = counts[counts > 0] / num_tools
        perplexity = float(np.exp(-(share * np.log(share)).sum()))
        levels.append({"level": level + 1, "codes": size, "used": int((counts > 0).sum()), "perplexity": perplexity})
    counts = np.bincount(assigned[:, 0])
    chance = float((counts * (counts - 1)).sum() / max(1, num_tools * (num_tools - 1)))

    def sharing(row: np.ndarray, column: np.ndarray) -> dict | None:
        if not len(row):
            return None
        same = float((assigned[row, 0] == assigned[column, 0]).mean())
        return {"pairs": len(row), "same_first_code": same, "chance": chance}

    return {
        "tools": num_tools,
        "reconstruction_loss": reconstruction_loss(
            model, embeddings, torch.from_numpy(assigned).to(embeddings.device)
        ),
        "levels": levels,
        "collisions_before": num_tools - len(np.unique(nearest, axis=0)),
        "collisions_uniform": num_tools - len(np.unique(uniform, axis=0)),
        "collisions": num_tools - len(np.unique(assigned, axis=0)),
        "cousage": sharing(*scipy.sparse.triu(cousage).nonzero()),
        "held_out": None if held_out is None else sharing(*held_out.T),
    }


def main_axes(points: np.ndarray) -> np.ndarray:
    """Return the directions in which centered points vary most, for a picture of them.

    Args:
        points (`np.ndarray` of shape `(num_points, dim)`): The points. Of more than 20,000, some are used.

    Returns:
        `np.ndarray` of shape `(2, dim)`: two unit vectors, of zeros where the points vary in fewer directions.
    """
    _, _, axes = np.linalg.svd(points[:: -(-len(points) // 20000)], full_matrices=False)
    return np.pad(axes[:2], ((0, max(0, 2 - len(axes))), (0, 0)))
