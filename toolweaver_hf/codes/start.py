"""Where a fit begins: the linear solution, k-means over the residuals, and codes that no tool has."""

from __future__ import annotations

import scipy.sparse
import torch

from ..modeling_rqvae import RQVAEModel
from .assignment import choose_codes, edges_within_codes, encode_tools, nearest


SAMPLE_SIZE = 32768  # tools that k-means and the revival of codes look at
SMOOTHING = 10.0  # weight of the graph in the start of the codebooks, in units of the collaborative weight


@torch.no_grad()
def start_model(
    model: RQVAEModel,
    embeddings: torch.Tensor,
    generator: torch.Generator | None = None,
    cousage_weights: scipy.sparse.csr_array | None = None,
) -> torch.LongTensor:
    """Set a model to the best linear solution: principal axes, and k-means level by level on the residuals.

    The layers beside the shortcuts add nothing at first. The latents' variance is 1 on average over dimensions. Every
    level but the last starts, where there is a graph, from clusters of the residuals smoothed over it, and from the
    codes that [`choose_codes`] finds for the means of these clusters.

    Args:
        model ([`RQVAEModel`]): Its encoder, decoder and codebooks are changed; its mean and scale must be set.
        embeddings (`torch.Tensor` of shape `(num_tools, input_dim)`): The data, of which a sample is looked at.
        generator (`torch.Generator`, *optional*): Source of randomness, on the CPU.
        cousage_weights (`scipy.sparse.csr_array` of shape `(num_tools, num_tools)`, *optional*): As in [`choose_codes`].

    Returns:
        `torch.LongTensor` of shape `(num_tools, num_levels)`: the codes.
    """
    sample = torch.randperm(len(embeddings), generator=generator)[:SAMPLE_SIZE].to(embeddings.device)
    points = (embeddings[sample] - model.mean) / model.scale
    variances, axes = torch.linalg.eigh(points.T @ points / len(points))
    size = min(model.config.code_dim, model.config.input_dim)
    axes, scale = axes.flip(1)[:, :size], variances.flip(0)[:size].mean().clamp(min=1e-12).sqrt()
    for module, weight in ((model.encoder, axes.T / scale), (model.decoder, axes * scale)):
        module.shortcut.weight.zero_()
        module.shortcut.weight[: weight.shape[0], : weight.shape[1]] = weight
        module.layers[-1].weight.zero_()
        module.layers[-1].bias.zero_()

    residual, codes = encode_tools(model, embeddings), []
    for level, codebook in enumerate(model.quantizer.codebooks):
        collaborative = cousage_weights is not None and level < len(model.quantizer.codebooks) - 1
        smoothed = _smooth(residual, SMOOTHING * cousage_weights) if collaborative else residual
        centers = kmeans(smoothed[sample], len(codebook.weight), generator)
        index, _ = nearest(smoothed, centers)
        if collaborative:
            for _ in range(3):
                centers = _means(residual, index, centers)[0]
                index = torch.from_numpy(choose_codes(residual, centers, cousage_weights, index.cpu().numpy())).to(
                    index.device
                )
            centers, cousage_weights = (
                _means(residual, index, centers)[0],
                edges_within_codes(cousage_weights, index.cpu().numpy()),
            )
        codebook.set_rows(slice(None), centers)
        residual = residual - centers[index]
        codes.append(index)
    return torch.stack(codes, dim=1)


def _smooth(points: torch.Tensor, graph: scipy.sparse.csr_array, rounds: int = 20) -> torch.Tensor:
    """Minimize |z - points|^2 plus the graph Laplacian's form of z, up to what `rounds` of Jacobi's method leave."""
    fixed = points.cpu().numpy()
    smoothed, degree = fixed, graph.sum(1)[:, None]
    for _ in range(rounds):
        smoothed = (fixed + graph @ smoothed) / (1 + degree)
    return torch.from_numpy(smoothed).to(points)


def _means(
    points: torch.Tensor, index: torch.LongTensor, centers: torch.Tensor
) -> tuple[torch.Tensor, torch.LongTensor]:
    """Return the mean of the points of each center, or the center where it has none, and their number."""
    counts = torch.bincount(index, minlength=len(centers))
    sums = torch.zeros_like(centers).index_add_(0, index, points)
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers), counts


def kmeans(
    points: torch.Tensor, num_centers: int, generator: torch.Generator | None = None, iterations: int = 20
) -> torch.Tensor:
    """Lloyd's algorithm from the start of k-means++. Centers that lose all their points move to points far from any center.

    Args:
        points (`torch.Tensor` of shape `(num_points, dim)`): The points.
        num_centers (`int`): May exceed the number of points; centers then coincide but for a slight noise.
        generator (`torch.Generator`, *optional*): Source of randomness, on the CPU.
        iterations (`int`, *optional*, defaults to 20): Number of rounds.

    Returns:
        `torch.Tensor` of shape `(num_centers, dim)`: the centers.
    """
    # As k-means++: each next center, or 1/64 of them all, is drawn from the points far from those before.
    centers = points[torch.randint(len(points), (1,), generator=generator).to(points.device)]
    far = (points - centers).square().sum(1)
    while len(centers) < num_centers:
        count = min(max(1, num_centers // 64), num_centers - len(centers))
        draw = torch.multinomial(far.cpu() + 1e-12, count, replacement=count > len(points), generator=generator)
        new = points[draw.to(points.device)]
        far = torch.minimum(far, torch.cdist(points, new).square().min(1).values)
        centers = torch.cat([centers, new])
    if num_centers > len(points):
        noise = torch.randn(centers.shape, generator=generator).to(centers)
        centers += 1e-2 * points.std().nan_to_num(1.0).clamp(min=1e-3) * noise
    for _ in range(iterations):
        index, _ = nearest(points, centers)
        centers, counts = _means(points, index, centers)
        empty = (counts == 0).nonzero().flatten()[: len(points)]
        if len(empty):
            error = (points - centers[index]).square().sum(1)
            centers[empty] = points[error.topk(len(empty)).indices]
    return centers


@torch.no_grad()
def revive_codes(
    model: RQVAEModel, latents: torch.Tensor, codes: torch.LongTensor, generator: torch.Generator | None = None
) -> list[int]:
    """Move codes that no tool has to residuals that are quantized badly.

    Args:
        model ([`RQVAEModel`]): Its codebooks are changed.
        latents (`torch.Tensor` of shape `(num_tools, code_dim)`): The latent vectors of a sample of the tools.
        codes (`torch.LongTensor` of shape `(num_tools, num_levels)`): Their codes.
        generator (`torch.Generator`, *optional*): Source of randomness, on the CPU.

    Returns:
        `list[int]`: for each level the number of codes that were moved.
    """
    revived, residual = [], latents
    for codebook, index in zip(model.quantizer.codebooks, codes.T, strict=True):
        left = residual - codebook.weight[index].float()
        error = left.square().sum(1)
        dead = (torch.bincount(index, minlength=len(codebook.weight)) == 0).nonzero().flatten()[: len(residual)]
        if len(dead) and error.sum() > 0:
            draw = torch.multinomial(error.cpu() + 1e-12, len(dead), generator=generator).to(residual.device)
            codebook.set_rows(dead, residual[draw])
        revived.append(len(dead))
        residual = left
    return revived
