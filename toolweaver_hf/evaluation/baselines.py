"""Baselines: retrievers with the interface of [`ToolRetriever`] that rank documents, and other tool identifiers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import bm25s
import numpy as np
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    util,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from ..codes.tool_codes import ToolCodes
from ..data.catalog import ToolCatalog
from ..data.queries import Query
from ..retrieval import RetrievedTool


class BM25Retriever:
    """Lexical retrieval over the tools' documents (BM25 with the defaults of bm25s and English stop words).

    Args:
        catalog ([`ToolCatalog`]): The tools to rank.
    """

    def __init__(self, catalog: ToolCatalog):
        self.tool_ids = catalog.ids
        self.index = bm25s.BM25()
        self.index.index(bm25s.tokenize(catalog.documents, stopwords="en", show_progress=False), show_progress=False)

    def __call__(self, queries: list[str], top_k: int = 5) -> list[list[RetrievedTool]]:
        """Rank the tools for each query, best first."""
        top_k = min(top_k, len(self.tool_ids))
        tokens = bm25s.tokenize(queries, stopwords="en", show_progress=False)
        positions, scores = self.index.retrieve(tokens, k=top_k, show_progress=False)
        return [
            [RetrievedTool(self.tool_ids[position], float(score)) for position, score in zip(*hits, strict=True)]
            for hits in zip(positions, scores, strict=True)
        ]


class DenseRetriever:
    """Dense retrieval: cosine similarity between the embeddings of query and document.

    Args:
        catalog ([`ToolCatalog`]): The tools to rank.
        encoder (`str` or `SentenceTransformer`): A sentence-transformers model, or its id or path.
    """

    def __init__(self, catalog: ToolCatalog, encoder: str | SentenceTransformer):
        self.tool_ids = catalog.ids
        self.encoder = SentenceTransformer(encoder) if isinstance(encoder, str) else encoder
        self.documents = self.encoder.encode(catalog.documents, convert_to_tensor=True)

    def __call__(self, queries: list[str], top_k: int = 5) -> list[list[RetrievedTool]]:
        """Rank the tools for each query, best first."""
        embeddings = self.encoder.encode(queries, convert_to_tensor=True)
        hits = util.semantic_search(embeddings, self.documents, top_k=top_k)  # by cosine similarity, in chunks
        return [[RetrievedTool(self.tool_ids[int(hit["corpus_id"])], hit["score"]) for hit in row] for row in hits]


def fine_tune_encoder(
    encoder: str, catalog: ToolCatalog, queries: Sequence[Query], args: SentenceTransformerTrainingArguments
) -> SentenceTransformer:
    """Fine-tune an encoder on the query-tool pairs of the training queries, with in-batch negatives.

    Args:
        encoder (`str`): Id or path of a sentence-transformers model.
        catalog ([`ToolCatalog`]): The tools.
        queries (`Sequence[Query]`): The training queries with their ground-truth tools.
        args (`SentenceTransformerTrainingArguments`): The training budget. With `batch_sampler="no_duplicates"`, a
            document is never its own negative.

    Returns:
        `SentenceTransformer`: the encoder, for [`DenseRetriever`].
    """
    pairs = [(query.text, catalog[tool_id].document) for query in queries for tool_id in query.tools]
    anchors, positives = zip(*pairs, strict=True)
    model = SentenceTransformer(encoder)
    SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"anchor": anchors, "positive": positives}),
        loss=MultipleNegativesRankingLoss(model),
    ).train()
    return model


def atomic_codes(catalog: ToolCatalog) -> ToolCodes:
    """Assign one token to each tool, as in ToolGen (arXiv 2410.03439): codes of one level, without an RQ-VAE.

    To align a model, save the codes and the catalog in one folder and pass it to `recipes/sft.py` as `--codes_dir`,
    with `--embedding_init mean_description`.

    Args:
        catalog ([`ToolCatalog`]): The tools.
    """
    return _numbered(catalog, [len(catalog)], np.arange(len(catalog)))


def numeric_codes(catalog: ToolCatalog) -> ToolCodes:
    """Assign the digits of its position in the catalog to each tool, one level per digit, as in ToolGen's ablation.

    Args:
        catalog ([`ToolCatalog`]): The tools.
    """
    num_digits = len(str(len(catalog) - 1))
    return _numbered(catalog, [10] * num_digits, np.arange(len(catalog)))


def random_codes(catalog: ToolCatalog, codebook_sizes: Sequence[int], seed: int = 0) -> ToolCodes:
    """Assign a unique random code to each tool, of the same shape as ToolWeaver's.

    Args:
        catalog ([`ToolCatalog`]): The tools.
        codebook_sizes (`Sequence[int]`): Codes of each level.
        seed (`int`, *optional*, defaults to 0): Random seed.
    """
    numbers = np.random.default_rng(seed).choice(math.prod(codebook_sizes), len(catalog), replace=False)
    return _numbered(catalog, codebook_sizes, numbers)


def _numbered(catalog: ToolCatalog, codebook_sizes: Sequence[int], numbers: np.ndarray) -> ToolCodes:
    codes = np.stack(np.unravel_index(numbers, codebook_sizes), axis=1).tolist()
    checksums = {tool.id: tool.checksum for tool in catalog}
    return ToolCodes(codebook_sizes, dict(zip(catalog.ids, codes, strict=True)), checksums=checksums)
