"""What codes are worth: reconstruction, collisions, and agreement with the co-usage graph."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch

from ..modeling_rqvae import RQVAEModel
from .assignment import uniform_codes


METRICS_FILE = "metrics.json"


METRICS_VERSION = 1  # schema_version of metrics.json and report.json


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
        assigned (`np.ndarray` of shape `(num_tools, num_levels)`): The codes after the assignment.
        cousage (`scipy.sparse.csr_array` of shape `(num_tools, num_tools)`): Which tools are used together.
        held_out (`np.ndarray` of shape `(num_pairs, 2)`, *optional*): Pairs used together that training has not seen.

    Returns:
        `dict`: `reconstruction_loss` with the assigned codes, as a share of the embeddings' variance; for each of
        `levels` the codes used and their perplexity; `collisions_before`, `collisions_uniform` and `collisions`, the
        tools beyond the first on a code: for the nearest codes, for those of the uniform mapping inside each prefix,
        and for the assigned ones; for `cousage` and `held_out` how often these pairs
        share their first code, and how often any pair does.
    """
    num_tools = len(assigned)
    codes = torch.from_numpy(assigned).to(embeddings.device)
    losses, latents = [], []
    for rows, index in zip(embeddings.split(8192), codes.split(8192), strict=True):
        losses.append(model(rows, codes=index).reconstruction_loss * len(rows))
        latents.append(model.encode(rows))
    latents = torch.cat(latents)
    nearest = torch.cat([model.quantize(rows) for rows in latents.split(8192)]).cpu().numpy()
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
        "reconstruction_loss": float(sum(losses) / num_tools),
        "levels": levels,
        "collisions_before": num_tools - len(np.unique(nearest, axis=0)),
        "collisions_uniform": num_tools - len(np.unique(uniform, axis=0)),
        "collisions": num_tools - len(np.unique(assigned, axis=0)),
        "cousage": sharing(*scipy.sparse.triu(cousage).nonzero()),
        "held_out": None if held_out is None else sharing(*held_out.T),
    }
