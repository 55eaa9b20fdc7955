"""The residual-quantized variational autoencoder (RQ-VAE) that turns tools' embeddings into codes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import mse_loss, silu
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_rqvae import RQVAEConfig


@dataclass
class RQVAEOutput(ModelOutput):
    """Output of [`RQVAEModel`]. Every loss is a mean over the batch and over dimensions.

    Args:
        loss (`torch.FloatTensor` of shape `()`):
            reconstruction + codebook + commitment_weight * commitment + collaborative_weight * collaborative loss.
        reconstruction_loss (`torch.FloatTensor` of shape `()`):
            Squared error of the reconstruction, as a share of the embeddings' variance.
        codebook_loss (`torch.FloatTensor` of shape `()`):
            Squared distance of the chosen codebook vectors to the residuals, which are held fixed; summed over levels.
        commitment_loss (`torch.FloatTensor` of shape `()`):
            The same with the codebook vectors held fixed.
        collaborative_loss (`torch.FloatTensor` of shape `()`, *optional*):
            Squared distance of the quantized vectors of co-used tools, as a share of that of tools drawn at random.
        codes (`torch.LongTensor` of shape `(batch_size, num_levels)`):
            The index that each level chose.
        reconstruction (`torch.FloatTensor` of shape `(batch_size, input_dim)`):
            The decoded embeddings.
    """

    loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    collaborative_loss: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    reconstruction: torch.FloatTensor | None = None


class RQVAEMLP(nn.Module):
    """Linear layers with SiLU between them."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            hidden_states = layer(silu(hidden_states) if i else hidden_states)
        return hidden_states


def uniform_mapping(distances: torch.Tensor, epsilon: float = 0.05, iterations: int = 20) -> torch.Tensor:
    r"""
    The uniform mapping of a level by Sinkhorn-Knopp (ToolWeaver, section 3.1): entropic optimal transport from
    residuals to codes in which every code receives the same mass.

    It runs in log space in float32, so that no `epsilon` over- or underflows.

    Args:
        distances (`torch.Tensor` of shape `(batch_size, codebook_size)`):
            Squared distances, up to a constant in each row.
        epsilon (`float`, *optional*, defaults to 0.05):
            Entropic regularization, in units of the mean distance to the nearest code and above.
        iterations (`int`, *optional*, defaults to 20):
            Number of Sinkhorn-Knopp rounds.

    Returns:
        `torch.Tensor` of shape `(batch_size, codebook_size)`: logarithms of the transport plan; each row sums to
        `1 / batch_size`, each column to `1 / codebook_size` as far as the rounds converged.
    """
    cost = distances.float()
    cost = cost - cost.min(1, keepdim=True).values
    plan = -cost / (epsilon * cost.mean()).clamp(min=1e-12)
    rows, columns = math.log(plan.shape[0]), math.log(plan.shape[1])
    for _ in range(iterations):
        plan = plan - plan.logsumexp(0, keepdim=True) - columns
        plan = plan - plan.logsumexp(1, keepdim=True) - rows
    return plan


class RQVAEQuantizer(nn.Module):
    """One codebook a level; each level quantizes the residual that the levels before it left."""

    def __init__(self, config: RQVAEConfig):
        super().__init__()
        self.codebooks = nn.ParameterList(nn.Parameter(torch.empty(k, config.code_dim)) for k in config.codebook_sizes)

    @staticmethod
    def distances(residual: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        """Squared distances of shape `(batch_size, codebook_size)`, less the squared norm of the residual."""
        return codebook.square().sum(1) - 2 * residual @ codebook.T

    def choose(self, level: int, residual: torch.Tensor) -> torch.LongTensor:
        """Choose a code for each residual: the nearest one; in training, on the last level, by the uniform mapping."""
        distances = self.distances(residual, self.codebooks[level].detach())
        if self.training and level == len(self.codebooks) - 1:
            return uniform_mapping(distances).argmax(1)
        return distances.argmin(1)

    def forward(
        self, latents: torch.Tensor, codes: torch.LongTensor | None = None
    ) -> tuple[torch.LongTensor, list[torch.Tensor], list[torch.Tensor]]:
        """Quantize latents, or look codes up.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, code_dim)`): The encoder's output.
            codes (`torch.LongTensor` of shape `(batch_size, num_levels)`, *optional*): Codes to use instead of the
                nearest ones.

        Returns:
            `tuple`: the codes of shape `(batch_size, num_levels)`; for each level the residual that it quantized, and
            the codebook vectors that it chose, of shape `(batch_size, code_dim)`.
        """
        chosen, residuals, vectors = [], [], []
        residual = latents
        for level, codebook in enumerate(self.codebooks):
            index = self.choose(level, residual.detach()) if codes is None else codes[:, level]
            vector = codebook[index]
            chosen.append(index)
            residuals.append(residual)
            vectors.append(vector)
            residual = residual - vector.detach()
        return torch.stack(chosen, dim=1), residuals, vectors


class RQVAEPreTrainedModel(PreTrainedModel):
    config_class = RQVAEConfig
    base_model_prefix = "rqvae"
    main_input_name = "embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(
            module, nn.ParameterList
        ):  # the codebooks; a module without parameters of its own is passed over
            for codebook in module:
                nn.init.normal_(codebook)
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
        return [codebook.detach() for codebook in self.quantizer.codebooks]

    def encode(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the latent vectors, of shape `(batch_size, code_dim)`, of embeddings `(batch_size, input_dim)`."""
        dtype = self.encoder.layers[0].weight.dtype
        return self.encoder((embeddings.to(dtype) - self.mean) / self.scale)

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, of shape `(batch_size, input_dim)`, of latent vectors `(batch_size, code_dim)`."""
        return self.decoder(quantized) * self.scale + self.mean

    def quantize(self, latents: torch.Tensor) -> torch.LongTensor:
        """Return the codes, of shape `(batch_size, num_levels)`, nearest to latent vectors `(batch_size, code_dim)`."""
        return self.quantizer(latents)[0]

    def forward(
        self,
        embeddings: torch.Tensor,
        neighbors: torch.Tensor | None = None,
        neighbor_weights: torch.Tensor | None = None,
        codes: torch.LongTensor | None = None,
    ) -> RQVAEOutput:
        """Quantize and reconstruct embeddings.

        Args:
            embeddings (`torch.Tensor` of shape `(batch_size, input_dim)`):
                Embeddings of tools.
            neighbors (`torch.Tensor` of shape `(batch_size, input_dim)`, *optional*):
                For each tool the embedding of one that is used together with it, for the collaborative loss.
            neighbor_weights (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Weight of each of these pairs; 0 for a tool without a neighbor.
            codes (`torch.LongTensor` of shape `(batch_size, num_levels)`, *optional*):
                Codes to use instead of the nearest ones.
        """
        latents = self.encode(embeddings)
        codes, residuals, vectors = self.quantizer(latents, codes)
        codebook_loss = sum(mse_loss(v, r.detach()) for r, v in zip(residuals, vectors, strict=True))
        commitment_loss = sum(mse_loss(r, v.detach()) for r, v in zip(residuals, vectors, strict=True))
        quantized = latents + (sum(vectors) - latents).detach()
        reconstruction = self.decode(quantized)
        reconstruction_loss = (reconstruction - embeddings).square().mean() / self.scale.square()
        loss = reconstruction_loss + codebook_loss + self.config.commitment_weight * commitment_loss

        collaborative_loss = None
        if neighbors is not None:
            others = self.encode(neighbors)
            _, _, other_vectors = self.quantizer(others)
            others = others + (sum(other_vectors) - others).detach()
            collaborative_loss = self.collaborative_loss(quantized, others, neighbor_weights)
            loss = loss + self.config.collaborative_weight * collaborative_loss
        return RQVAEOutput(
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
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

        It is the weighted mean of \\(\|z_u - z_v\|^2\\) over co-used pairs, divided by the same mean over pairs drawn
        at random. So it is 1 where co-use has no influence and 0 where co-used tools coincide, whatever the number of
        tools and edges, the dimension and the scale of the latent space.

        Args:
            quantized (`torch.Tensor` of shape `(batch_size, code_dim)`): One end of each pair.
            others (`torch.Tensor` of shape `(batch_size, code_dim)`): The other end.
            weights (`torch.Tensor` of shape `(batch_size,)`, *optional*): The pairs' weights.
        """
        weights = torch.ones_like(quantized[:, 0]) if weights is None else weights.to(quantized.dtype)
        together = (weights * (quantized - others).square().sum(1)).sum() / weights.sum().clamp(min=1e-8)
        apart = 2 * (quantized - quantized.mean(0)).square().sum(1).mean()
        return together / apart.clamp(min=1e-8)


RQVAEModel.register_for_auto_class("AutoModel")
