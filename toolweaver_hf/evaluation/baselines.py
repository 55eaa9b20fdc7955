"""The rivals: retrievers that rank the documents of tools, called like [`ToolRetriever`], and other identifiers than codes."""

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
    """Lexical retrieval over the tools' documents (BM25 with bm25s' defaults and English stop words).

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
    """Cosine similarity between the embeddings of query and document, as the encoder gives them.

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
        return [[RetrievedTool(self.tool_ids[hit["corpus_id"]], hit["score"]) for hit in row] for row in hits]


def fine_tune_encoder(
    encoder: str, catalog: ToolCatalog, queries: Sequence[Query], args: SentenceTransformerTrainingArguments
) -> SentenceTransformer:
    """Fine-tune an encoder on the pairs of query and tool that an aligned model learns, with in-batch negatives.

    Args:
        encoder (`str`): Id or path of a sentence-transformers model.
        catalog ([`ToolCatalog`]): The tools.
        queries (`Sequence[Query]`): The training queries with their ground-truth tools.
        args (`SentenceTransformerTrainingArguments`): The budget. `batch_sampler="no_duplicates"` keeps a document
            from being its own negative.

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
    """Give each tool one token of its own, as ToolGen (arXiv 2410.03439) does: codes of one level, without an RQ-VAE.

    To align a model with them, save them and the catalog in one folder and pass it to `recipes/sft.py` as
    `--codes_dir`, with `--embedding_init mean_description`.

    Args:
        catalog ([`ToolCatalog`]): The tools.
    """
    return _numbered(catalog, [len(catalog)], np.arange(len(catalog)))


def numeric_codes(catalog: ToolCatalog) -> ToolCodes:
    """Give each tool the digits of its place in the catalog, a level for each, as in ToolGen's ablation.

    Args:
        catalog ([`ToolCatalog`]): The tools.
    """
    num_digits = len(str(len(catalog) - 1))
    return _numbered(catalog, [10] * num_digits, np.arange(len(catalog)))


def random_codes(catalog: ToolCatalog, codebook_sizes: Sequence[int], seed: int = 0) -> ToolCodes:
    """Give each tool a code of the same shape as ToolWeaver's, drawn at random.

    Args:
        catalog ([`ToolCatalog`]): The tools.
        codebook_sizes (`Sequence[int]`): Codes of each level.
        seed (`int`, *optional*, defaults to 0): Seed of the drawing.
    """
    numbers = np.random.default_rng(seed).choice(math.prod(codebook_sizes), len(catalog), replace=False)
    return _numbered(catalog, codebook_sizes, numbers)


def _numbered(catalog: ToolCatalog, codebook_sizes: Sequence[int], numbers: np.ndarray) -> ToolCodes:
    codes = np.stack(np.unravel_index(numbers, codebook_sizes), axis=1).tolist()
    checksums = {tool.id: tool.checksum for tool in catalog}
    return ToolCodes(codebook_sizes, dict(zip(catalog.ids, codes, strict=True)), checksums=checksums)
