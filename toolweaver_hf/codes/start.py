"""Initialization of an RQ-VAE: the linear solution, k-means on the residuals, and the revival of unused codes."""

from __future__ import annotations

import scipy.sparse
import torch

from ..modeling_rqvae import RQVAEModel
from .assignment import choose_codes, edges_within_codes, encode_tools, nearest


SAMPLE_SIZE = 32768  # tools that k-means and the revival of codes sample
SMOOTHING = 10.0  # weight of the graph when codebooks are initialized, in units of the collaborative weight


@torch.no_grad()
def start_model(
    model: RQVAEModel,
    embeddings: torch.Tensor,
    generator: torch.Generator | None = None,
    cousage_weights: scipy.sparse.csr_array | None = None,
) -> torch.LongTensor:
    """Initialize a model with the best linear solution: principal axes, and k-means on the residuals of each level.

    The output of the MLPs beside their shortcuts is zero at first, and the latents have a mean variance of 1 per
    dimension. With a co-usage graph, all levels but the last start from clusters of the residuals smoothed over the
    graph, refined by [`choose_codes`].

    Args:
        model ([`RQVAEModel`]): The model. Its encoder, decoder and codebooks are changed; its mean and scale must be
            set.
        embeddings (`torch.Tensor` of shape `(num_tools, input_dim)`): The tools' embeddings, of which a sample is
            used.
        generator (`torch.Generator`, *optional*): Source of randomness, on the CPU.
        cousage_weights (`scipy.sparse.csr_array` of shape `(num_tools, num_tools)`, *optional*): As in
            [`choose_codes`].

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
    """Minimize |z - points|^2 plus the graph Laplacian's quadratic form of z, by `rounds` of Jacobi's method."""
    fixed = points.cpu().numpy()
    smoothed, degree = fixed, graph.sum(1)[:, None]
    for _ in range(rounds):
        smoothed = (fixed + graph @ smoothed) / (1 + degree)
    return torch.from_numpy(smoothed).to(points)


def _means(
    points: torch.Tensor, index: torch.LongTensor, centers: torch.Tensor
) -> tuple[torch.Tensor, torch.LongTensor]:
    """Return the mean and the number of the points of each center; a center without points stays where it is."""
    counts = torch.bincount(index, minlength=len(centers))
    sums = torch.zeros_like(centers).index_add_(0, index, points)
    return torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers), counts


def kmeans(
    points: torch.Tensor, num_centers: int, generator: torch.Generator | None = None, iterations: int = 20
) -> torch.Tensor:
    """Lloyd's algorithm with k-means++ initialization. Centers without points move to the points farthest from any
    center.

    Args:
        points (`torch.Tensor` of shape `(num_points, dim)`): The points.
        num_centers (`int`): Number of centers. If it exceeds the number of points, centers coincide up to slight
            noise.
        generator (`torch.Generator`, *optional*): Source of randomness, on the CPU.
        iterations (`int`, *optional*, defaults to 20): Number of rounds.

    Returns:
        `torch.Tensor` of shape `(num_centers, dim)`: the centers.
    """
    # As in k-means++, with 1/64 of the centers drawn at a time, in proportion to the squared distance.
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
    """Move the vectors of unused codes to residuals with a large quantization error.

    Args:
        model ([`RQVAEModel`]): The model. Its codebooks are changed.
        latents (`torch.Tensor` of shape `(num_tools, code_dim)`): The latent vectors of a sample of the tools.
        codes (`torch.LongTensor` of shape `(num_tools, num_levels)`): Their codes.
        generator (`torch.Generator`, *optional*): Source of randomness, on the CPU.

    Returns:
        `list[int]`: the number of moved codes of each level.
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
