"""The residual-quantized variational autoencoder (RQ-VAE) that turns tools' embeddings into codes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from safetensors import SafetensorError, safe_open
from torch import distributed, nn
from torch.nn.functional import cross_entropy, mse_loss, silu
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, ModelOutput, cached_file

from .configuration_rqvae import RQVAEConfig


HUB_KWARGS = ("revision", "token", "cache_dir", "subfolder", "force_download", "local_files_only")
LOSSES = ("reconstruction_loss", "codebook_loss", "commitment_loss", "assignment_loss", "collaborative_loss")


@dataclass
class RQVAEOutput(ModelOutput):
    """Output of [`RQVAEModel`]. Every loss is a mean over the batch and over dimensions.

    Args:
        loss (`torch.FloatTensor` of shape `()`):
            reconstruction + codebook + commitment_weight * commitment + assignment_weight * assignment +
            collaborative_weight * collaborative loss; without the codebook loss where the codebooks are moving averages.
        reconstruction_loss (`torch.FloatTensor` of shape `()`):
            Squared error of the reconstruction, as a share of the embeddings' variance.
        codebook_loss (`torch.FloatTensor` of shape `()`):
            Squared distance of the chosen codebook vectors to the residuals, which are held fixed; summed over levels.
        commitment_loss (`torch.FloatTensor` of shape `()`):
            Squared distance of the latent vectors to the sum of the chosen codebook vectors, which are held fixed.
        assignment_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Cross-entropy of the codes, where they are given, among all codes of their level by squared distance; the mean
            over levels.
        collaborative_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Squared distance of the quantized vectors of co-used tools, as a share of that of tools drawn at random;
            the mean over all levels but the last of the sums of vectors up to each.
        codes (`torch.LongTensor` of shape `(batch_size, num_levels)`):
            The index that each level chose.
        reconstruction (`torch.FloatTensor` of shape `(batch_size, input_dim)`):
            The decoded embeddings.
    """

    loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    assignment_loss: torch.FloatTensor | None = None
    collaborative_loss: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    reconstruction: torch.FloatTensor | None = None


def uniform_mapping(distances: torch.Tensor, epsilon: float = 0.05, iterations: int = 10) -> torch.Tensor:
    r"""
    The uniform mapping of a level by Sinkhorn-Knopp (ToolWeaver, section 3.1): entropic optimal transport from
    residuals to codes in which every code receives the same mass.

    It runs in log space in float32, so that no `epsilon` over- or underflows, and without a round trip to the host.

    Args:
        distances (`torch.Tensor` of shape `(..., num_residuals, codebook_size)`):
            Squared distances, up to a constant in each row; one problem for each index of the leading dimensions.
        epsilon (`float`, *optional*, defaults to 0.05):
            Entropic regularization, in units of the mean distance to the nearest code and above.
        iterations (`int`, *optional*, defaults to 10):
            Number of Sinkhorn-Knopp rounds.

    Returns:
        `torch.Tensor` of the shape of `distances`: logarithms of the transport plan; each row sums to
        `1 / num_residuals`, each column to `1 / codebook_size` as far as the rounds converged.
    """
    cost = distances.float()
    cost = cost - cost.amin(-1, keepdim=True)
    plan = -cost / (epsilon * cost.mean((-2, -1), keepdim=True)).clamp(min=1e-12)
    rows, columns = math.log(plan.shape[-2]), math.log(plan.shape[-1])
    row = torch.zeros_like(plan[..., :1])
    column = torch.zeros_like(plan[..., :1, :])
    for _ in range(iterations):
        column = -(plan + row).logsumexp(-2, keepdim=True) - columns
        row = -(plan + column).logsumexp(-1, keepdim=True) - rows
    return (plan + column).log_softmax(-1) - rows


def _num_processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Sum over the processes of a distributed training.

    A loss made of such sums is the same on all processes; its gradients are scaled for their mean over processes, which
    `DistributedDataParallel` takes, to be that of the whole.
    """
    if _num_processes() == 1:
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total + _num_processes() * (values - values.detach())


class RQVAEMLP(nn.Module):
    """Linear layers with SiLU between them, and a linear shortcut past them all."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True))
        self.shortcut = nn.Linear(sizes[0], sizes[-1], bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden_states = inputs
        for i, layer in enumerate(self.layers):
            hidden_states = layer(silu(hidden_states) if i else hidden_states)
        return hidden_states + self.shortcut(inputs)


class RQVAECodebook(nn.Module):
    """The vectors of one level, learned by gradients or as moving averages of the residuals that chose them."""

    def __init__(self, size: int, config: RQVAEConfig):
        super().__init__()
        self.ema = config.codebook_update == "ema"
        self.decay = config.ema_decay
        self.weight = nn.Parameter(torch.empty(size, config.code_dim), requires_grad=not self.ema)
        if self.ema:
            self.register_buffer("ema_count", torch.ones(size))
            self.register_buffer("ema_sum", torch.zeros(size, config.code_dim))

    def distances(self, residual: torch.Tensor) -> torch.Tensor:
        """Return squared distances of shape `(batch_size, codebook_size)`, less the squared norm of the residual."""
        weight = self.weight.detach().float()
        return torch.addmm(weight.square().sum(1), residual, weight.T, alpha=-2)

    @torch.no_grad()
    def set_rows(self, rows: torch.LongTensor | slice, vectors: torch.Tensor) -> None:
        """Put vectors in rows of the codebook, and start their moving averages anew."""
        self.weight[rows] = vectors.to(self.weight.dtype)
        if self.ema:
            self.ema_count[rows] = 1.0
            self.ema_sum[rows] = vectors.to(self.ema_sum.dtype)

    @torch.no_grad()
    def update(self, residual: torch.Tensor, index: torch.LongTensor) -> None:
        """Take a step of the moving averages over the residuals of all processes."""
        count = torch.zeros_like(self.ema_count).index_add_(0, index, torch.ones_like(residual[:, 0]))
        total = torch.zeros_like(self.ema_sum).index_add_(0, index, residual)
        self.ema_count.lerp_(_sum_over_processes(count), 1 - self.decay)
        self.ema_sum.lerp_(_sum_over_processes(total), 1 - self.decay)
        # A code whose average has all but vanished keeps its vector.
        kept = self.ema_count[:, None] < 1e-3
        mean = self.ema_sum / self.ema_count.clamp(min=1e-3)[:, None]
        self.weight.copy_(torch.where(kept, self.weight, mean))


class RQVAEQuantizer(nn.Module):
    """One codebook a level; each level quantizes the residual that the levels before it left. Runs in float32."""

    def __init__(self, config: RQVAEConfig):
        super().__init__()
        self.codebooks = nn.ModuleList(RQVAECodebook(size, config) for size in config.codebook_sizes)
        self.epsilon = config.sinkhorn_epsilon
        self.iterations = config.sinkhorn_iterations

    def choose(self, level: int, residual: torch.Tensor, uniform: bool) -> torch.LongTensor:
        """Choose a code for each residual: the nearest one or, on the last level, by the uniform mapping."""
        codebook = self.codebooks[level]
        if not uniform or not self.epsilon or level < len(self.codebooks) - 1:
            return codebook.distances(residual).argmin(1)
        batch_size, rank = len(residual), 0
        if _num_processes() > 1:  # the mapping is uniform over the batch of all processes
            gathered = [torch.empty_like(residual) for _ in range(_num_processes())]
            distributed.all_gather(gathered, residual.contiguous())
            residual, rank = torch.cat(gathered), distributed.get_rank()
        plan = uniform_mapping(codebook.distances(residual), self.epsilon, self.iterations)
        return plan[rank * batch_size : (rank + 1) * batch_size].argmax(1)

    def forward(
        self,
        latents: torch.Tensor,
        codes: torch.LongTensor | None = None,
        uniform: bool = False,
        num_levels: int | None = None,
    ) -> tuple[torch.LongTensor, list[torch.Tensor], list[torch.Tensor]]:
        """Quantize latents, or look codes up.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, code_dim)`): The encoder's output.
            codes (`torch.LongTensor` of shape `(batch_size, num_levels)`, *optional*): Codes to use instead of the
                nearest ones.
            uniform (`bool`, *optional*, defaults to `False`): Whether the last level chooses by the uniform mapping,
                as it does in training.
            num_levels (`int`, *optional*): Number of levels to quantize by. Defaults to all.

        Returns:
            `tuple`: the codes of shape `(batch_size, num_levels)`; for each level the residual that it quantized, and
            the codebook vectors that it chose, of shape `(batch_size, code_dim)`.
        """
        chosen, residuals, vectors = [], [], []
        residual = latents
        for level, codebook in enumerate(self.codebooks[:num_levels]):
            index = self.choose(level, residual.detach(), uniform) if codes is None else codes[:, level]
            vector = codebook.weight[index].float()
            chosen.append(index)
            residuals.append(residual)
            vectors.append(vector)
            residual = residual - vector.detach()
        return torch.stack(chosen, dim=1), residuals, vectors

    def assignment_loss(self, residuals: list[torch.Tensor], codes: torch.LongTensor) -> torch.Tensor:
        """Return the cross-entropy of given codes among all of their level, averaged over the batch and the levels.

        A code's logit is the squared distance of the residual to its vector, which is held fixed, in units of twice the
        variance of the codebook's vectors in a dimension.
        """
        losses = []
        for level, codebook in enumerate(self.codebooks):
            variance = codebook.weight.detach().float().var(0, correction=0).mean().clamp(min=1e-8)
            logits = codebook.distances(residuals[level]) / (-2 * variance)
            losses.append(cross_entropy(logits, codes[:, level]))
        return sum(losses) / len(losses)

    def update(self, residuals: list[torch.Tensor], codes: torch.LongTensor) -> None:
        """Take a step of the codebooks' moving averages."""
        for level, codebook in enumerate(self.codebooks):
            codebook.update(residuals[level].detach(), codes[:, level])


class RQVAEPreTrainedModel(PreTrainedModel):
    config_class = RQVAEConfig
    base_model_prefix = "rqvae"
    main_input_name = "embeddings"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Load a model as every model, from safetensors alone.

        Raises:
            `ValueError`: if a file is not valid, or the weights do not have the shapes of the configuration.
            `OSError`: if a file is missing.
        """
        hub_kwargs = {name: value for name, value in kwargs.items() if name in HUB_KWARGS}
        try:
            if config is None:
                config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
            cls._check_weights(cached_file(pretrained_model_name_or_path, SAFE_WEIGHTS_NAME, **hub_kwargs), config)
            kwargs["use_safetensors"] = True
            return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        except (TypeError, AttributeError, LookupError) as error:  # what a configuration of the wrong types leads to
            raise ValueError(f"{pretrained_model_name_or_path} holds no valid RQ-VAE: {error}") from error

    @classmethod
    def _check_weights(cls, path: str, config: RQVAEConfig) -> None:
        """Compare the shapes in a file with the configuration's, before memory is taken for what that declares."""
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a valid safetensors file: {error}") from None
        with torch.device("meta"):
            declared = cls(config)
        expected = {name: tuple(parameter.shape) for name, parameter in declared.named_parameters()}
        expected |= {name: tuple(buffer.shape) for name, buffer in declared.named_buffers() if name in shapes}
        for name, shape in expected.items():
            if shapes.get(name) != shape:
                raise ValueError(
                    f"{path}: by the configuration {name} has the shape {shape}, in the file {shapes.get(name)}"
                )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RQVAECodebook):
            nn.init.normal_(module.weight)
            if module.ema:
                nn.init.ones_(module.ema_count)
                module.ema_sum.copy_(module.weight)
        elif isinstance(module, RQVAEModel):
            nn.init.zeros_(module.mean)
            nn.init.ones_(module.scale)


class RQVAEModel(RQVAEPreTrainedModel):
    r"""
    Residual-quantized variational autoencoder over tools' embeddings (ToolWeaver, arXiv 2601.21947, section 3.1).

    An encoder maps an embedding to a latent vector; level by level the nearest vector of a codebook is taken from what
    is left of it; a decoder reconstructs the embedding from the sum of these vectors. Gradients pass the quantization
    straight through.

    Args:
        config ([`RQVAEConfig`]): The model's configuration.

    Example:

    ```python
    >>> from toolweaver_hf import RQVAEConfig, RQVAEModel
    >>> import torch

    >>> model = RQVAEModel(RQVAEConfig(input_dim=384, codebook_sizes=[16, 16]))
    >>> model(torch.randn(5, 384)).codes.shape
    torch.Size([5, 2])
    ```
    """

    def __init__(self, config: RQVAEConfig):
        super().__init__(config)
        self.encoder = RQVAEMLP([config.input_dim, *config.hidden_sizes, config.code_dim])
        self.quantizer = RQVAEQuantizer(config)
        self.decoder = RQVAEMLP([config.code_dim, *reversed(config.hidden_sizes), config.input_dim])
        # The embeddings are standardized by their mean vector and one scale for all dimensions.
        self.register_buffer("mean", torch.zeros(config.input_dim))
        self.register_buffer("scale", torch.ones(()))
        self.post_init()

    def codebooks(self) -> list[torch.Tensor]:
        """Return for each level its codebook, of shape `(codebook_size, code_dim)`."""
        return [codebook.weight.detach() for codebook in self.quantizer.codebooks]

    def encode(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the latent vectors, of shape `(batch_size, code_dim)`, of embeddings `(batch_size, input_dim)`."""
        dtype = self.encoder.layers[0].weight.dtype
        return self.encoder((embeddings.to(dtype) - self.mean) / self.scale)

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, of shape `(batch_size, input_dim)`, of latent vectors `(batch_size, code_dim)`."""
        return self.decoder(quantized) * self.scale + self.mean

    def quantize(self, latents: torch.Tensor) -> torch.LongTensor:
        """Return the codes, of shape `(batch_size, num_levels)`, nearest to latent vectors `(batch_size, code_dim)`."""
        return self.quantizer(latents.float())[0]

    def forward(
        self,
        embeddings: torch.Tensor,
        neighbor_codes: torch.LongTensor | None = None,
        neighbor_weights: torch.Tensor | None = None,
        codes: torch.LongTensor | None = None,
    ) -> RQVAEOutput:
        """Quantize and reconstruct embeddings.

        The reconstruction's gradients reach the codebook vectors that are used, and the encoder straight through, unless
        `codes` are given: the encoder cannot change these, and learns to find them by the commitment and the assignment
        loss. The commitment is to the whole code. (To commit the latents to the sum of each level and those before it as
        well would draw them towards the first level's vectors, and leave little for the levels after it to tell apart.)
        With squared distance alone, many latents stay closer to another tool's code, mostly for near-duplicate
        documents; the assignment loss acts on those. The gradients of the collaborative loss reach the codebook vectors
        alone: an encoder that had to give the latents of co-used tools, whose documents differ, would lose both the
        nearest codes and the reconstruction.

        Args:
            embeddings (`torch.Tensor` of shape `(batch_size, input_dim)`):
                Embeddings of tools.
            neighbor_codes (`torch.LongTensor` of shape `(batch_size, num_levels)`, *optional*):
                For each tool the code of one that is used together with it, for the collaborative loss.
            neighbor_weights (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Weight of each of these pairs; 0 for a tool without a neighbor.
            codes (`torch.LongTensor` of shape `(batch_size, num_levels)`, *optional*):
                Codes to use instead of the nearest ones.
        """
        latents = self.encode(embeddings)
        given, collaborative_loss, assignment_loss = codes is not None, None, None
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            codes, residuals, vectors = self.quantizer(latents, codes, uniform=self.training)
            codebook_loss = sum(mse_loss(v, r.detach()) for r, v in zip(residuals, vectors, strict=True))
            commitment_loss = mse_loss(residuals[-1], vectors[-1].detach())
            if self.training and self.config.codebook_update == "ema":
                self.quantizer.update(residuals, codes)
            if given:
                assignment_loss = self.quantizer.assignment_loss(residuals, codes)
            quantized = sum(vectors) if given else latents - latents.detach() + sum(vectors)
            if neighbor_codes is not None:
                # The last level separates near-duplicates, so it is skipped unless it is the only one.
                levels = max(1, len(vectors) - 1)
                others = self.quantizer(latents, neighbor_codes, num_levels=levels)[2]
                losses = [
                    self.collaborative_loss(vector, other, neighbor_weights)
                    for vector, other in zip(accumulate(vectors[:levels]), accumulate(others), strict=True)
                ]
                collaborative_loss = sum(losses) / levels
        reconstruction = self.decode(quantized)
        reconstruction_loss = (reconstruction - embeddings).square().mean() / self.scale.square()

        loss = reconstruction_loss + self.config.commitment_weight * commitment_loss
        if self.config.codebook_update == "gradient":
            loss = loss + codebook_loss
        if assignment_loss is not None:
            loss = loss + self.config.assignment_weight * assignment_loss
        if collaborative_loss is not None:
            loss = loss + self.config.collaborative_weight * collaborative_loss
        return RQVAEOutput(
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
            assignment_loss=assignment_loss,
            collaborative_loss=collaborative_loss,
            codes=codes,
            reconstruction=reconstruction,
        )

    @staticmethod
    def collaborative_loss(
        quantized: torch.Tensor, others: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        r"""
        The graph Laplacian's quadratic form over the pairs drawn (ToolWeaver, the collaborative regularization).

        It is the mean of \\(w \|z_u - z_v\|^2\\) over the batch, divided by the mean of \\(\|z_u - z_v\|^2\\) over pairs
        drawn at random. With weights that are 1 on average it is 1 where co-use has no influence and 0 where co-used
        tools coincide, whatever the number of tools and edges, the dimension and the scale of the latent space.

        Args:
            quantized (`torch.Tensor` of shape `(batch_size, code_dim)`): One end of each pair.
            others (`torch.Tensor` of shape `(batch_size, code_dim)`): The other end.
            weights (`torch.Tensor` of shape `(batch_size,)`, *optional*): The pairs' weights.
        """
        together = (quantized - others).square().sum(1)
        if weights is not None:
            together = weights.to(together.dtype) * together
        sums = torch.cat([torch.stack([together.sum(), quantized.square().sum()]), quantized.sum(0)])
        means = _sum_over_processes(sums) / (len(quantized) * _num_processes())
        apart = 2 * (means[1] - means[2:].square().sum())
        return means[0] / apart.clamp(min=1e-8)


RQVAEModel.register_for_auto_class("AutoModel")
