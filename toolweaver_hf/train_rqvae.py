"""Fitting an RQ-VAE: a `Trainer` that draws co-used pairs, starts codebooks by k-means and revives dead codes."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from .modeling_rqvae import RQVAEModel


SAMPLE_SIZE = 32768  # tools that k-means and the revival of codes look at


class _ToolIndices(Dataset):
    """The dataset of the tools' positions; their embeddings stay on the device."""

    def __init__(self, num_tools: int):
        self.num_tools = num_tools

    def __len__(self) -> int:
        return self.num_tools

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"index": index}


class RQVAETrainer(Trainer):
    """[`Trainer`] of an [`RQVAEModel`].

    The first part of the training reconstructs without quantization. Then the codebooks are started by k-means, level
    by level on the residuals, and the whole loss is trained; codes that no tool chooses are revived on the way.

    Args:
        model ([`RQVAEModel`]):
            The model to fit.
        args ([`TrainingArguments`]):
            Training arguments.
        embeddings (`np.ndarray` or `torch.Tensor` of shape `(num_tools, input_dim)`):
            The tools' embeddings.
        cousage (`scipy.sparse.csr_array` of shape `(num_tools, num_tools)`, *optional*):
            Collaborative similarity of the tools. Each step draws one neighbor for every tool of its batch, so its
            cost does not grow with the number of edges.
        kwargs:
            Passed on to [`Trainer`].

    Raises:
        `ValueError`: if an embedding is not finite, or the shapes do not fit together.
    """

    def __init__(
        self,
        model: RQVAEModel,
        args: TrainingArguments,
        embeddings: np.ndarray | torch.Tensor,
        cousage: scipy.sparse.csr_array | None = None,
        **kwargs,
    ):
        embeddings = torch.as_tensor(embeddings, dtype=torch.float32)
        if embeddings.ndim != 2 or embeddings.shape[1] != model.config.input_dim:
            raise ValueError(f"embeddings must have the shape (num_tools, {model.config.input_dim})")
        broken = ~torch.isfinite(embeddings).all(1)
        if broken.any():
            raise ValueError(f"the embedding of the tool in row {int(broken.nonzero()[0])} holds NaN or infinity")
        if cousage is not None and cousage.shape != (len(embeddings), len(embeddings)):
            raise ValueError(f"cousage must have the shape {(len(embeddings), len(embeddings))}, not {cousage.shape}")
        args.remove_unused_columns = False  # the batches hold the tools' positions alone
        model.mean.copy_(embeddings.mean(0))
        model.scale.copy_((embeddings - model.mean).square().mean().sqrt().clamp(min=1e-6))
        super().__init__(model=model, args=args, train_dataset=_ToolIndices(len(embeddings)), **kwargs)
        self.embeddings = embeddings.to(args.device)
        self.neighbors = None
        if cousage is not None and cousage.nnz and model.config.collaborative_weight > 0:
            self.neighbors = _Neighbors(cousage, args.device)
        self._sums: dict[str, torch.Tensor] = {}
        self._steps_summed = 0
        self.quantizing = False
        self.add_callback(_CodebookCallback(self))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        index = inputs["index"]
        embeddings = self.embeddings[index]
        if not self.quantizing:
            module = self.accelerator.unwrap_model(model)
            reconstruction = module.decode(module.encode(embeddings))
            return (reconstruction - embeddings).square().mean() / module.scale.square()
        neighbors, weights = (None, None) if self.neighbors is None else self.neighbors.draw(index)
        output = model(embeddings, None if neighbors is None else self.embeddings[neighbors], weights)
        for name in ("reconstruction_loss", "codebook_loss", "commitment_loss", "collaborative_loss"):
            value = getattr(output, name)
            if value is not None:
                self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._steps_summed += 1
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self._sums:
            logs = logs | {name: float(total) / self._steps_summed for name, total in self._sums.items()}
            self._sums, self._steps_summed = {}, 0
        super().log(logs, *args, **kwargs)


class _Neighbors:
    """Draws for each tool a co-used one, with a probability in proportion to their similarity."""

    def __init__(self, cousage: scipy.sparse.csr_array, device: torch.device):
        self.indices = torch.from_numpy(cousage.indices.astype(np.int64)).to(device)
        # One cumulative sum over all edges: an edge of tool i is found between start[i] and start[i + 1].
        cumulative = np.concatenate([[0.0], np.cumsum(cousage.data, dtype=np.float64)])
        self.cumulative = torch.from_numpy(cumulative[1:]).to(device)
        self.start = torch.from_numpy(cumulative[cousage.indptr]).to(device)

    def draw(self, index: torch.LongTensor) -> tuple[torch.LongTensor, torch.Tensor]:
        """Return for each tool a neighbor, and the sum of its similarities as the weight of the pair."""
        start, weight = self.start[index], self.start[index + 1] - self.start[index]
        target = start + weight * torch.rand(len(index), dtype=weight.dtype, device=weight.device)
        edge = torch.searchsorted(self.cumulative, target, right=True).clamp(max=len(self.indices) - 1)
        return self.indices[edge], weight.float()


class _CodebookCallback(TrainerCallback):
    """Starts the codebooks after a tenth of the training, and revives dead codes until the last fifth."""

    def __init__(self, trainer: RQVAETrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = state.max_steps // 10
        self.every = max(1, state.max_steps // 40)
        self.trainer.quantizing = state.global_step > self.start
        if self.start == 0:
            self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step < self.start or step > 0.8 * state.max_steps or (step - self.start) % self.every:
            return
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        # Every process draws the same sample and comes to the same codebooks.
        generator = torch.Generator().manual_seed(args.seed + step)
        sample = torch.randperm(len(trainer.embeddings), generator=generator)[:SAMPLE_SIZE].to(
            trainer.embeddings.device
        )
        with torch.no_grad():
            latents = model.encode(trainer.embeddings[sample])
            if step == self.start:
                start_codebooks(model, latents, generator)
                trainer.quantizing = True
            else:
                revive_codes(model, latents, generator)


@torch.no_grad()
def start_codebooks(model: RQVAEModel, latents: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """Set each codebook to the k-means centers of the residuals that the levels before it leave.

    Args:
        model ([`RQVAEModel`]): Its codebooks are overwritten.
        latents (`torch.Tensor` of shape `(num_tools, code_dim)`): A sample of the data's latent vectors.
        generator (`torch.Generator`, *optional*): Source of randomness, on the CPU.
    """
    residual = latents
    for codebook in model.quantizer.codebooks:
        codebook.copy_(kmeans(residual, len(codebook), generator))
        residual = residual - codebook[_nearest(residual, codebook)]


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
        nearest = _nearest(points, centers)
        counts = torch.bincount(nearest, minlength=num_centers)
        sums = torch.zeros_like(centers).index_add_(0, nearest, points)
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers)
        empty = (counts == 0).nonzero().flatten()[: len(points)]
        if len(empty):
            error = (points - centers[nearest]).square().sum(1)
            centers[empty] = points[error.topk(len(empty)).indices]
    return centers


@torch.no_grad()
def revive_codes(model: RQVAEModel, latents: torch.Tensor, generator: torch.Generator | None = None) -> list[int]:
    """Move codes that no latent chooses to residuals that are quantized badly.

    Args:
        model ([`RQVAEModel`]): Its codebooks are changed.
        latents (`torch.Tensor` of shape `(num_tools, code_dim)`): A sample of the data's latent vectors.
        generator (`torch.Generator`, *optional*): Source of randomness, on the CPU.

    Returns:
        `list[int]`: for each level the number of codes that were moved.
    """
    revived, residual = [], latents
    for codebook in model.quantizer.codebooks:
        nearest = _nearest(residual, codebook)
        dead = (torch.bincount(nearest, minlength=len(codebook)) == 0).nonzero().flatten()
        dead = dead[: len(residual)]
        error = (residual - codebook[nearest]).square().sum(1)
        if len(dead) and error.sum() > 0:
            draw = torch.multinomial(error.cpu() + 1e-12, len(dead), generator=generator).to(residual.device)
            codebook[dead] = residual[draw]
            nearest = _nearest(residual, codebook)
        revived.append(len(dead))
        residual = residual - codebook[nearest]
    return revived


def _nearest(points: torch.Tensor, centers: torch.Tensor, chunk_size: int = 16384) -> torch.LongTensor:
    norms = centers.square().sum(1)
    return torch.cat([(norms - 2 * chunk @ centers.T).argmin(1) for chunk in points.split(chunk_size)])
