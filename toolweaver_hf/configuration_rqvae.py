"""Configuration of the residual-quantized variational autoencoder (RQ-VAE)."""

from collections.abc import Sequence

from transformers import PreTrainedConfig


class RQVAEConfig(PreTrainedConfig):
    r"""
    Configuration of an [`RQVAEModel`] (ToolWeaver, arXiv 2601.21947, section 3.1).

    Args:
        input_dim (`int`, *optional*, defaults to 384):
            Dimension of the tools' embeddings.
        hidden_sizes (`Sequence[int]`, *optional*, defaults to `(512, 256)`):
            Sizes of the encoder's hidden layers; the decoder has them in reverse.
        code_dim (`int`, *optional*, defaults to 64):
            Dimension of the latent vectors and of the codebooks' vectors.
        codebook_sizes (`Sequence[int]`, *optional*, defaults to `(256, 256)`):
            Number of codes of each level, 1 to 8 levels.
        commitment_weight (`float`, *optional*, defaults to 0.25):
            Weight of the commitment loss beside the codebook loss.
        collaborative_weight (`float`, *optional*, defaults to 1.0):
            Weight of the collaborative loss, which draws tools that are used together to common codes.

    Raises:
        `ValueError`: if a size is not a positive whole number, or there are not 1 to 8 levels.
    """

    model_type = "toolweaver_rqvae"

    def __init__(
        self,
        input_dim: int = 384,
        hidden_sizes: Sequence[int] = (512, 256),
        code_dim: int = 64,
        codebook_sizes: Sequence[int] = (256, 256),
        commitment_weight: float = 0.25,
        collaborative_weight: float = 1.0,
        **kwargs,
    ):
        if not 1 <= len(codebook_sizes) <= 8:
            raise ValueError(f"codebook_sizes must have 1 to 8 levels, not {len(codebook_sizes)}")
        for name, sizes in (
            ("input_dim", [input_dim]),
            ("hidden_sizes", hidden_sizes),
            ("code_dim", [code_dim]),
            ("codebook_sizes", codebook_sizes),
        ):
            if not all(isinstance(size, int) and 1 <= size <= 1 << 20 for size in sizes):
                raise ValueError(f"{name} must be whole numbers from 1 to {1 << 20}, not {sizes}")
        self.input_dim = input_dim
        self.hidden_sizes = list(hidden_sizes)
        self.code_dim = code_dim
        self.codebook_sizes = list(codebook_sizes)
        self.commitment_weight = commitment_weight
        self.collaborative_weight = collaborative_weight
        super().__init__(**kwargs)


RQVAEConfig.register_for_auto_class()
