"""Embed the documents of tools."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer

from ..data.catalog import ToolCatalog
from ..files import atomic_write
from ..text_expert import default_encoder


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
    embeddings = SentenceTransformer(encoder).encode(
        catalog.documents, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=True
    )
    broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(broken):
        raise ValueError(f"{encoder} gives NaN or infinity for the tool {catalog[int(broken[0])].id!r}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            save_file({"embeddings": embeddings}, partial, metadata=key)
    return embeddings
