"""Embed the documents of tools."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer
from transformers.utils import logging

from ..data.catalog import ToolCatalog, encoder_texts
from ..files import atomic_write
from ..text_expert import default_encoder


logger = logging.get_logger(__name__)

EMBEDDINGS_FILE = "embeddings.safetensors"


def embed_catalog(
    catalog: ToolCatalog,
    encoder: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Embed the documents of a catalog's tools.

    Args:
        catalog ([`ToolCatalog`]):
            The tools.
        encoder (`str`, *optional*):
            Id or path of a sentence-transformers model. Defaults to [`default_encoder`].
        cache_dir (`str`, *optional*):
            Folder of the cache, `embeddings.safetensors`. The cache is valid for one encoder and one catalog.
        batch_size (`int`, *optional*, defaults to 64):
            Number of documents per forward pass.

    Returns:
        `np.ndarray` of shape `(num_tools, embedding_dim)`, float32, normalized to unit length.

    Raises:
        `ValueError`: naming the tool whose embedding is not finite.
    """
    encoder = encoder or default_encoder()
    key = {"encoder": encoder, "catalog": catalog.checksum}
    path = None if cache_dir is None else Path(cache_dir) / EMBEDDINGS_FILE
    if path is not None and path.exists():
        try:
            with safe_open(path, framework="numpy") as file:
                if file.metadata() == key:
                    return file.get_tensor("embeddings")
        except SafetensorError:
            pass  # a broken cache is computed again
    model = SentenceTransformer(encoder)
    texts, tokenizer = catalog.documents, getattr(model.tokenizer, "backend_tokenizer", None)
    if tokenizer is not None and model.max_seq_length:
        texts, cut = encoder_texts(catalog, tokenizer, model.max_seq_length)
        if cut:
            logger.warning(
                f"{len(cut):,} of {len(catalog):,} documents are longer than the {model.max_seq_length} tokens that "
                f"{encoder} reads, such as {cut[0]!r}: their descriptions are cut, and arguments stand by name alone"
            )
    embeddings = model.encode(texts, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=True)
    broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(broken):
        raise ValueError(f"{encoder} gives NaN or infinity for the tool {catalog[int(broken[0])].id!r}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            save_file({"embeddings": embeddings}, partial, metadata=key)
    return embeddings
