"""From codebook vectors to rows of the language model's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from peft.utils.integrations import gather_params_ctx
from torch.nn.functional import embedding_bag
from transformers import PreTrainedModel

from ..adapter import EMBEDDING_MULTIPLE, embedding_modules, make_room
from ..data.catalog import ToolCatalog
from ..tokenization_toolweaver import ToolWeaverTokenizer


@torch.no_grad()
def initialize_code_embeddings(
    model: PreTrainedModel,
    tokenizer: ToolWeaverTokenizer,
    codebooks: Sequence[torch.Tensor] | None = None,
    method: str = "codebook",
    catalog: ToolCatalog | None = None,
    seed: int = 0,
    pad_to_multiple_of: int | None = EMBEDDING_MULTIPLE,
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
            `"codebook"`: a projection of the codebook vectors (ToolWeaver, section 3.2), around the mean of the
            embeddings that are there. With a catalog it is the least-squares projection: the rows of a tool's code sum
            to its document's IDF-weighted mean embedding minus the mean over tools. Without one it is a random
            projection that keeps distances, at half an embedding's length.
            `"mean_description"`: the mean embedding of the documents under a code. `"random"`: random directions, at
            half an embedding's length.
        catalog ([`ToolCatalog`], *optional*):
            The tools' documents. `"mean_description"` needs them.
        seed (`int`, *optional*, defaults to 0):
            Seed of the projection and of random directions.
        pad_to_multiple_of (`int`, *optional*, defaults to 64):
            Where the matrices grow, they get a multiple of so many rows. What is more than the tokens is padding, with
            the mean of the base's rows.

    Raises:
        `ValueError`: for an unknown method, what a method needs and lacks, or codebooks of other sizes than the
            tokenizer's.
    """
    if method not in ("codebook", "mean_description", "random"):
        raise ValueError(f"method must be 'codebook', 'mean_description' or 'random', not {method!r}")
    if method == "mean_description" and catalog is None:
        raise ValueError("the method 'mean_description' needs the catalog")
    if method == "codebook":
        if codebooks is None:
            raise ValueError("the method 'codebook' needs the codebooks")
        sizes = [len(codebook) for codebook in codebooks]
        if sizes != tokenizer.codebook_sizes:
            raise ValueError(f"the codebooks have the sizes {sizes}, the tokenizer's codes {tokenizer.codebook_sizes}")

    before = model.get_input_embeddings().num_embeddings
    make_room(model, len(tokenizer), pad_to_multiple_of)
    token_weights = None
    if method != "random" and catalog is not None:
        documents = [tokenizer.encode_data(catalog[tool_id].document) for tool_id in tokenizer.tool_ids]
        token_weights = _token_weights(documents, tokenizer.level_offsets[0], by_rarity=method == "codebook")
    for module in embedding_modules(model):
        with gather_params_ctx(module.weight):  # where DeepSpeed's ZeRO-3 loaded the model in parts
            if module.weight.numel():
                base = module.weight[: tokenizer.level_offsets[0]].float()
                rows = _code_rows(base, tokenizer, codebooks, method, token_weights, seed)
                module.weight[max(before, len(tokenizer)) :] = base.mean(0).to(module.weight)  # padding
                module.weight[tokenizer.code_token_ids] = rows.to(module.weight)


def _code_rows(
    base: torch.Tensor,
    tokenizer: ToolWeaverTokenizer,
    codebooks: Sequence[torch.Tensor] | None,
    method: str,
    token_weights: torch.Tensor | None,
    seed: int,
) -> torch.Tensor:
    """Return the rows of the code tokens, of shape `(num_code_tokens, dim)`, for a matrix whose other rows are `base`."""
    center = base.mean(0)
    codes = torch.as_tensor(tokenizer.tool_code_ids - tokenizer.level_offsets[0], device=base.device)
    documents = None if token_weights is None else token_weights.to(base.device) @ base
    if method == "mean_description":
        counts = torch.bincount(codes.flatten(), minlength=len(tokenizer.code_token_ids))[:, None]
        sums = base.new_zeros((len(counts), base.shape[1]))
        for level in codes.T:
            sums.index_add_(0, level, documents)
        return torch.where(counts > 0, sums / counts.clamp(min=1), center)
    if method == "codebook":
        codebooks = [codebook.to(base.device, torch.float64) for codebook in codebooks]
        codebooks = [codebook - codebook.mean(0) for codebook in codebooks]
        if documents is not None:
            return center + _fit(codebooks, codes, documents)
    generator = torch.Generator().manual_seed(seed)
    if method == "random":
        rows = _unit_scale(torch.randn((len(tokenizer.code_token_ids), base.shape[1]), generator=generator))
    else:
        shape = (codebooks[0].shape[1], base.shape[1])
        projections = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in codebooks)
        rows = torch.cat([_unit_scale(codebook.cpu() @ p) for codebook, p in zip(codebooks, projections, strict=True)])
    # Half the length of a row: at full length a direction that was never trained scores so high by chance that the
    # base model's predictions on plain text suffer.
    length = (base - center).norm(dim=1).median()
    return center + 0.5 * length * rows.to(base)


def _fit(codebooks: list[torch.Tensor], codes: torch.LongTensor, documents: torch.Tensor) -> torch.Tensor:
    """Return linear images of the codebook vectors, of shape `(num_code_tokens, dim)`: those whose sum over a tool's
    code is nearest to what its document's vector has apart from all tools', by least squares over the tools."""
    blocks = torch.block_diag(*codebooks)  # a projection of each level is one of these rows
    vectors = embedding_bag(codes, blocks, mode="sum")
    offsets = (documents - documents.mean(0)).double()
    moments = vectors.T @ vectors
    # One tool's worth of ridge, or directions in which the codebook hardly varies would take rows far away.
    moments.diagonal().add_(moments.diagonal().mean() / len(codes))
    return (blocks @ (torch.linalg.pinv(moments, hermitian=True) @ (vectors.T @ offsets))).float()


def _unit_scale(vectors: torch.Tensor) -> torch.Tensor:
    """Scale vectors so that their mean squared length is 1."""
    return vectors / vectors.square().sum(1).mean().sqrt().clamp(min=1e-12)


def _token_weights(documents: list[list[int]], vocab_size: int, by_rarity: bool) -> torch.Tensor:
    """Return what each token weighs in each document's mean, sparse, of shape `(num_tools, vocab_size)`. By rarity it
    is its inverse document frequency: what every document has, such as the names of its fields, next to nothing."""
    tools = torch.arange(len(documents)).repeat_interleave(torch.tensor([len(ids) for ids in documents]))
    tokens = torch.tensor([*chain.from_iterable(documents)])
    weights = torch.ones(len(tokens))
    if by_rarity:
        pairs = (tools * vocab_size + tokens).unique()
        frequencies = torch.bincount(pairs % vocab_size, minlength=vocab_size)
        weights = ((len(documents) + 1) / frequencies[tokens]).log()
    weights = weights / torch.zeros(len(documents)).index_add_(0, tools, weights)[tools]
    shape = (len(documents), vocab_size)
    return torch.sparse_coo_tensor(torch.stack([tools, tokens]), weights, shape, check_invariants=True)
