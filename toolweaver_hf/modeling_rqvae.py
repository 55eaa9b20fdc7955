"""The residual-quantized variational autoencoder (RQ-VAE), which turns embeddings of tools into codes."""

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


# As in adapter.py: this file goes to the Hub with its configuration alone, so it can import nothing from there.
HUB_KWARGS = ("revision", "token", "cache_dir", "subfolder", "force_download", "local_files_only")
LOSSES = ("reconstruction_loss", "codebook_loss", "commitment_loss", "assignment_loss", "collaborative_loss")


@dataclass
class RQVAEOutput(ModelOutput):
    """Output of [`RQVAEModel`]. Every loss is a mean over the batch and over dimensions.

    Args:
        loss (`torch.FloatTensor` of shape `()`):
            reconstruction + codebook + commitment_weight * commitment + assignment_weight * assignment +
            collaborative_weight * collaborative loss; without the codebook loss if the codebooks are moving averages.
        reconstruction_loss (`torch.FloatTensor` of shape `()`):
            Squared error of the reconstruction, as a share of the embeddings' variance.
        codebook_loss (`torch.FloatTensor` of shape `()`):
            Squared distance of the chosen codebook vectors to the detached residuals, summed over levels.
        commitment_loss (`torch.FloatTensor` of shape `()`):
            Squared distance of the latent vectors to the detached sum of the chosen codebook vectors.
        assignment_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Cross-entropy of the given codes over all codes of their level, with squared distances as logits; the mean
            over levels.
        collaborative_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Squared distance between the partial sums of codebook vectors of co-used tools, relative to random pairs of
            tools; the mean over all levels but the last.
        codes (`torch.LongTensor` of shape `(batch_size, num_levels)`):
            The chosen index of each level.
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

    It runs in log space in float32, so that no `epsilon` over- or underflows, and does not synchronize with the host.

    Args:
        distances (`torch.Tensor` of shape `(..., num_residuals, codebook_size)`):
            Squared distances, up to a constant per row. Leading dimensions are batch dimensions.
        epsilon (`float`, *optional*, defaults to 0.05):
            Entropic regularization, in units of the mean distance after each row's minimum is subtracted.
        iterations (`int`, *optional*, defaults to 10):
            Number of Sinkhorn-Knopp rounds.

    Returns:
        `torch.Tensor` of the shape of `distances`: the logarithm of the transport plan, whose rows sum to
        `1 / num_residuals` and whose columns sum to `1 / codebook_size` once the rounds have converged.
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
    """Sum over the processes of a distributed run.

    A loss of such sums is the same on all processes. Its gradients are scaled so that their mean over processes, as
    `DistributedDataParallel` computes it, is the gradient of the global loss.
    """
    if _num_processes() == 1:
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total + _num_processes() * (values - values.detach())


class RQVAEMLP(nn.Module):
    """Linear layers with SiLU activations, plus a linear shortcut from input to output."""

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
    """The codebook of one level, learned by gradients or as moving averages of the residuals assigned to each code."""

    def __init__(self, size: int, config: RQVAEConfig):
        super().__init__()
        self.ema = config.codebook_update == "ema"
        self.decay = config.ema_decay
        self.weight = nn.Parameter(torch.empty(size, config.code_dim), requires_grad=not self.ema)
        if self.ema:
            self.register_buffer("ema_count", torch.ones(size))
            self.register_buffer("ema_sum", torch.zeros(size, config.code_dim))

    def distances(self, residual: torch.Tensor) -> torch.Tensor:
        """Return squared distances of shape `(batch_size, codebook_size)`, without the residual's squared norm."""
        weight = self.weight.detach().float()
        return torch.addmm(weight.square().sum(1), residual, weight.T, alpha=-2)

    @torch.no_grad()
    def set_rows(self, rows: torch.LongTensor | slice, vectors: torch.Tensor) -> None:
        """Set rows of the codebook and reset their moving averages."""
        self.weight[rows] = vectors.to(self.weight.dtype)
        if self.ema:
            self.ema_count[rows] = 1.0
            self.ema_sum[rows] = vectors.to(self.ema_sum.dtype)

    @torch.no_grad()
    def update(self, residual: torch.Tensor, index: torch.LongTensor) -> None:
        """Update the moving averages with the residuals of all processes."""
        count = torch.zeros_like(self.ema_count).index_add_(0, index, torch.ones_like(residual[:, 0]))
        total = torch.zeros_like(self.ema_sum).index_add_(0, index, residual)
        self.ema_count.lerp_(_sum_over_processes(count), 1 - self.decay)
        self.ema_sum.lerp_(_sum_over_processes(total), 1 - self.decay)
        # A code whose count has decayed to almost zero keeps its vector.
        kept = self.ema_count[:, None] < 1e-3
        mean = self.ema_sum / self.ema_count.clamp(min=1e-3)[:, None]
        self.weight.copy_(torch.where(kept, self.weight, mean))


class RQVAEQuantizer(nn.Module):
    """Residual quantizer: each level's codebook quantizes the residual of the previous levels. Runs in float32."""

    def __init__(self, config: RQVAEConfig):
        super().__init__()
        self.codebooks = nn.ModuleList(RQVAECodebook(size, config) for size in config.codebook_sizes)
        self.epsilon = config.sinkhorn_epsilon
        self.iterations = config.sinkhorn_iterations

    def choose(self, level: int, residual: torch.Tensor, uniform: bool) -> torch.LongTensor:
        """Choose a code for each residual: the nearest one or, on the last level, that of the uniform mapping."""
        codebook = self.codebooks[level]
        if not uniform or not self.epsilon or level < len(self.codebooks) - 1:
            return codebook.distances(residual).argmin(1)
        batch_size, rank = len(residual), 0
        if _num_processes() > 1:  # the mapping is uniform over the global batch
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
        """Quantize latent vectors, or look up given codes.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, code_dim)`): The encoder's output.
            codes (`torch.LongTensor` of shape `(batch_size, num_levels)`, *optional*): Codes to use instead of the
                nearest ones.
            uniform (`bool`, *optional*, defaults to `False`): Whether the last level uses the uniform mapping, as in
                training.
            num_levels (`int`, *optional*): Number of levels to use. Defaults to all.

        Returns:
            `tuple`: the codes of shape `(batch_size, num_levels)`, and for each level its input residuals and its
            chosen codebook vectors, each of shape `(batch_size, code_dim)`.
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
        """Return the cross-entropy of the given codes over all codes of their level, averaged over batch and levels.

        The logit of a code is the negative squared distance between the residual and the detached codebook vector, in
        units of twice the codebook's mean variance per dimension.
        """
        losses = []
        for level, codebook in enumerate(self.codebooks):
            variance = codebook.weight.detach().float().var(0, correction=0).mean().clamp(min=1e-8)
            logits = codebook.distances(residuals[level]) / (-2 * variance)
            losses.append(cross_entropy(logits, codes[:, level]))
        return sum(losses) / len(losses)

    def update(self, residuals: list[torch.Tensor], codes: torch.LongTensor) -> None:
        """Update the moving averages of all codebooks."""
        for level, codebook in enumerate(self.codebooks):
            codebook.update(residuals[level].detach(), codes[:, level])


class RQVAEPreTrainedModel(PreTrainedModel):
    config_class = RQVAEConfig
    base_model_prefix = "rqvae"
    main_input_name = "embeddings"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Load a model as in [`~PreTrainedModel.from_pretrained`], but only from safetensors.

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
        except (TypeError, AttributeError, LookupError) as error:  # raised by a configuration with wrong types
            raise ValueError(f"{pretrained_model_name_or_path} holds no valid RQ-VAE: {error}") from error

    @classmethod
    def _check_weights(cls, path: str, config: RQVAEConfig) -> None:
        """Compare the shapes in a file with the configuration's, before memory is allocated."""
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
                    f"{path}: {name} has the shape {shapes.get(name)}, but the configuration declares {shape}"
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

    An encoder maps an embedding to a latent vector. Each level quantizes the residual of the previous levels with the
    nearest vector of its codebook. A decoder reconstructs the embedding from the sum of these vectors. Gradients pass
    through the quantization by the straight-through estimator.

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
        # Embeddings are standardized by their mean vector and one scale for all dimensions.
        self.register_buffer("mean", torch.zeros(config.input_dim))
        self.register_buffer("scale", torch.ones(()))
        self.post_init()

    def codebooks(self) -> list[torch.Tensor]:
        """Return the codebook of each level, of shape `(codebook_size, code_dim)`."""
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

        Which parameters each loss trains:

        - The reconstruction loss trains decoder, chosen codebook vectors and, by the straight-through estimator, the
          encoder. With given `codes` it does not reach the encoder, which cannot change them.
        - The commitment loss draws a latent vector to its whole code. Committing it to the partial sum of each level
          as well would draw it to the first level's vector and leave little for the later levels to distinguish.
        - The assignment loss acts on latent vectors that stay closer to another tool's code, mostly those of
          near-duplicate documents.
        - The collaborative loss trains the codebooks alone. Drawing together the latent vectors of co-used tools,
          whose documents differ, would harm both the assignment and the reconstruction.

        Args:
            embeddings (`torch.Tensor` of shape `(batch_size, input_dim)`):
                Embeddings of tools.
            neighbor_codes (`torch.LongTensor` of shape `(batch_size, num_levels)`, *optional*):
                The code of a co-used tool for each tool, for the collaborative loss.
            neighbor_weights (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Weight of each pair; 0 for a tool without a neighbor.
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
        The graph Laplacian's quadratic form over sampled pairs (ToolWeaver's collaborative regularization).

        It is the mean of \\(w \|z_u - z_v\|^2\\) over the batch, divided by the mean of \\(\|z_u - z_v\|^2\\) over
        random pairs. With weights of mean 1, it is 1 if co-used tools are as far apart as random ones and 0 if they
        coincide, for any number of tools and edges and any dimension and scale of the latent space.

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
