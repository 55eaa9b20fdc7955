"""Configuration of the residual-quantized variational autoencoder (RQ-VAE)."""

import math
from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedConfig


class RQVAEConfig(PreTrainedConfig):
    r"""
    Configuration of an [`RQVAEModel`] (ToolWeaver, arXiv 2601.21947, section 3.1).

    Args:
        input_dim (`int`, *optional*, defaults to 384):
            Dimension of the tools' embeddings.
        hidden_sizes (`Sequence[int]`, *optional*, defaults to `(512, 256)`):
            Sizes of the encoder's hidden layers; the decoder uses them in reverse.
        code_dim (`int`, *optional*, defaults to 64):
            Dimension of the latent vectors and of the codebooks' vectors.
        codebook_sizes (`Sequence[int]`, *optional*, defaults to `(256, 256)`):
            Number of codes of each level, 1 to 8 levels.
        commitment_weight (`float`, *optional*, defaults to 0.25):
            Weight of the commitment loss, relative to the codebook loss.
        assignment_weight (`float`, *optional*, defaults to 1.0):
            Weight of the assignment loss, a cross-entropy that makes each tool's assigned code its nearest one.
        collaborative_weight (`float`, *optional*, defaults to 1.0):
            Weight of the collaborative loss, which draws co-used tools to shared codes.
        codebook_update (`str`, *optional*, defaults to `"gradient"`):
            How the codebooks learn: `"gradient"`, by the codebook loss, or `"ema"`, as exponential moving averages of
            the residuals assigned to each code. With `"ema"`, the codebook loss is reported but not added to the loss.
        ema_decay (`float`, *optional*, defaults to 0.99):
            Decay rate of the moving averages.
        sinkhorn_epsilon (`float`, *optional*, defaults to 0.05):
            Entropic regularization of the last level's uniform mapping in training; 0 disables the mapping.
        sinkhorn_iterations (`int`, *optional*, defaults to 3):
            Number of Sinkhorn-Knopp rounds of the uniform mapping.

    Raises:
        `ValueError`: if a size is not a positive integer, there are not 1 to 8 levels, or another value is out of
            range.
    """

    model_type = "toolweaver_rqvae"

    def __init__(
        self,
        input_dim: int = 384,
        hidden_sizes: Sequence[int] = (512, 256),
        code_dim: int = 64,
        codebook_sizes: Sequence[int] = (256, 256),
        commitment_weight: float = 0.25,
        assignment_weight: float = 1.0,
        collaborative_weight: float = 1.0,
        codebook_update: Literal["gradient", "ema"] = "gradient",
        ema_decay: float = 0.99,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        **kwargs,
    ):
        for name, sizes in (("hidden_sizes", hidden_sizes), ("codebook_sizes", codebook_sizes)):
            if not isinstance(sizes, (list, tuple)) or len(sizes) > 64:
                raise ValueError(f"{name} must be a list of at most 64 sizes, not {sizes}")
        if not 1 <= len(codebook_sizes) <= 8:
            raise ValueError(f"codebook_sizes must have 1 to 8 levels, not {len(codebook_sizes)}")
        for name, sizes in (
            ("input_dim", [input_dim]),
            ("hidden_sizes", hidden_sizes),
            ("code_dim", [code_dim]),
            ("codebook_sizes", codebook_sizes),
        ):
            if not all(type(size) is int and 1 <= size <= 1 << 20 for size in sizes):
                raise ValueError(f"{name} must be whole numbers from 1 to {1 << 20}, not {sizes}")
        for name, value in (
            ("commitment_weight", commitment_weight),
            ("assignment_weight", assignment_weight),
            ("collaborative_weight", collaborative_weight),
            ("sinkhorn_epsilon", sinkhorn_epsilon),
            ("sinkhorn_iterations", sinkhorn_iterations),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number from 0 up, not {value}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be from 0 to below 1, not {ema_decay}")
        if codebook_update not in ("gradient", "ema"):
            raise ValueError(f"codebook_update must be 'gradient' or 'ema', not {codebook_update!r}")
        self.input_dim = input_dim
        self.hidden_sizes = list(hidden_sizes)
        self.code_dim = code_dim
        self.codebook_sizes = list(codebook_sizes)
        self.commitment_weight = commitment_weight
        self.assignment_weight = assignment_weight
        self.collaborative_weight = collaborative_weight
        self.codebook_update = codebook_update
        self.ema_decay = ema_decay
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_iterations = sinkhorn_iterations
        super().__init__(**kwargs)


RQVAEConfig.register_for_auto_class()
