"""The rivals: retrievers that rank the documents of tools, called like [`ToolRetriever`], and other identifiers than codes."""

from __future__ import annotations

import bm25s
from sentence_transformers import SentenceTransformer, util

from .catalog import ToolCatalog
from .codes import ToolCodes
from .retrieval import RetrievedTool


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
    """Cosine similarity between the embeddings of query and document, as the encoder gives them (zero-shot).

    Args:
        catalog ([`ToolCatalog`]): The tools to rank.
        encoder (`str`): Id or path of a sentence-transformers model.
    """

    def __init__(self, catalog: ToolCatalog, encoder: str):
        self.tool_ids = catalog.ids
        self.encoder = SentenceTransformer(encoder)
        self.documents = self.encoder.encode(catalog.documents, convert_to_tensor=True)

    def __call__(self, queries: list[str], top_k: int = 5) -> list[list[RetrievedTool]]:
        """Rank the tools for each query, best first."""
        embeddings = self.encoder.encode(queries, convert_to_tensor=True)
        hits = util.semantic_search(embeddings, self.documents, top_k=top_k)  # by cosine similarity, in chunks
        return [[RetrievedTool(self.tool_ids[hit["corpus_id"]], hit["score"]) for hit in row] for row in hits]


def atomic_codes(catalog: ToolCatalog) -> ToolCodes:
    """Give each tool one token of its own, as ToolGen (arXiv 2410.03439) does: codes of one level, without an RQ-VAE.

    To align a model with them, save them and the catalogue in one folder and pass it to `recipes/sft.py` as
    `--codes_dir`, with `--embedding_init mean_description`.

    Args:
        catalog ([`ToolCatalog`]): The tools.
    """
    return ToolCodes(
        [len(catalog)],
        {tool.id: [position] for position, tool in enumerate(catalog)},
        checksums={tool.id: tool.checksum for tool in catalog},
    )
