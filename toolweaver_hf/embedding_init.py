"""From codebook vectors to rows of the language model's embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .catalog import ToolCatalog
from .tokenization_toolweaver import ToolWeaverTokenizer


@torch.no_grad()
def initialize_code_embeddings(
    model: PreTrainedModel,
    tokenizer: ToolWeaverTokenizer,
    codebooks: Sequence[torch.Tensor] | None = None,
    method: str = "codebook",
    catalog: ToolCatalog | None = None,
    seed: int = 0,
) -> None:
    """Make room for the code tokens in a model's input and output embeddings, and fill their rows.

    The rows that the base model's tokens use are not touched.

    Args:
        model ([`PreTrainedModel`]):
            The base model; changed in place.
        tokenizer ([`ToolWeaverTokenizer`]):
            The tokenizer, whose last tokens are the code tokens.
        codebooks (`Sequence[torch.Tensor]`, *optional*):
            For each level the codebook, of shape `(codebook_size, code_dim)`, for `"codebook"`.
        method (`str`, *optional*, defaults to `"codebook"`):
            `"codebook"`: a projection of the codebook vectors that keeps their distances, brought to the mean and
            scale of the embeddings that are there (ToolWeaver, section 3.2). `"mean_description"`: the mean embedding
            of the documents of the tools under the code. `"random"`: random directions of the same mean and scale.
        catalog ([`ToolCatalog`], *optional*):
            The tools' documents, for `"mean_description"`.
        seed (`int`, *optional*, defaults to 0):
            Seed of the projection and of random directions.

    Raises:
        `ValueError`: for an unknown method, what a method needs and lacks, or codebooks of other sizes than the
            tokenizer's.
    """
    if method not in ("codebook", "mean_description", "random"):
        raise ValueError(f"method must be 'codebook', 'mean_description' or 'random', not {method!r}")
    if method == "mean_description" and catalog is None:
        raise ValueError("the method 'mean_description' needs the catalogue")
    if method == "codebook":
        if codebooks is None:
            raise ValueError("the method 'codebook' needs the codebooks")
        sizes = [len(codebook) for codebook in codebooks]
        if sizes != tokenizer.codebook_sizes:
            raise ValueError(f"the codebooks have the sizes {sizes}, the tokenizer's codes {tokenizer.codebook_sizes}")

    num_base = tokenizer.level_offsets[0]
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # a padded matrix may have room already
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight.data_ptr() != matrices[0].data_ptr():
        matrices.append(head.weight)
    for matrix in matrices:
        base = matrix[:num_base].float()
        if method == "mean_description":
            rows = _mean_descriptions(base, tokenizer, catalog)
        else:
            generator = torch.Generator().manual_seed(seed)
            if method == "random":
                shape = (len(tokenizer.code_token_ids), base.shape[1])
                rows = _unit_scale(torch.randn(shape, generator=generator))
            else:
                rows = torch.cat([_project(codebook, base.shape[1], generator) for codebook in codebooks])
            center = base.mean(0)
            # Half the length of a row: at full length a direction that was never trained scores so high by chance
            # that the base model's predictions on plain text suffer.
            length = (base - center).norm(dim=1).median()
            rows = center + 0.5 * length * rows.to(base.device)
        matrix[tokenizer.code_token_ids] = rows.to(matrix)


def trainable_code_rows(model: PreTrainedModel, tokenizer: ToolWeaverTokenizer) -> dict[str, list[int]]:
    """Name the embedding matrices of a model and the rows of the code tokens, for `trainable_token_indices` of LoRA."""
    names = {id(module): name for name, module in model.named_modules()}
    matrices = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0].weight:  # PEFT finds tied heads by itself
        matrices.append(head)
    return {names[id(matrix)].split(".")[-1]: tokenizer.code_token_ids for matrix in matrices}


def _project(codebook: torch.Tensor, dim: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random projection of a codebook, of shape `(codebook_size, dim)`, that keeps its distances' ratios."""
    vectors = codebook.float().cpu()
    projection = torch.randn((vectors.shape[1], dim), generator=generator)
    return _unit_scale((vectors - vectors.mean(0)) @ projection)


def _unit_scale(vectors: torch.Tensor) -> torch.Tensor:
    """Scale vectors so that their mean squared length is 1."""
    return vectors / vectors.square().sum(1).mean().sqrt().clamp(min=1e-12)


def _mean_descriptions(base: torch.Tensor, tokenizer: ToolWeaverTokenizer, catalog: ToolCatalog) -> torch.Tensor:
    """Return for each code token the mean embedding of its tools' documents; the mean of all where it has none."""
    first = tokenizer.level_offsets[0]
    sums = base.new_zeros((len(tokenizer.code_token_ids), base.shape[1]))
    counts = base.new_zeros(len(sums))
    documents = tokenizer([catalog[tool_id].document for tool_id in tokenizer.tool_ids], add_special_tokens=False)
    for ids, code in zip(documents["input_ids"], tokenizer.tool_code_ids - first, strict=True):
        sums[code] += base[ids].mean(0)
        counts[code] += 1
    rows = sums / counts.clamp(min=1)[:, None]
    return torch.where(counts[:, None] > 0, rows, base.mean(0))
