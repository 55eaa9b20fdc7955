"""`GatewaySearch`: search over the changing tools of a gateway."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread


if TYPE_CHECKING:
    from ..data.catalog import Tool
    from ..retrieval import RetrievedTool, ToolRetriever


logger = logging.getLogger(__name__)

MAX_BATCH = 32
MAX_LEARNED = 10_000  # pairs of a query and a tool that are taken from a log
LEARNED_AT_ONCE = 32  # queries that are embedded while searches wait


class GatewaySearch:
    """Ranks the tools of a gateway, which may change at any time.

    Tools are ranked by BM25 immediately, and additionally by embeddings once they are computed in the background (see
    [`GatewaySearch.keep_up`]). An aligned model also contributes to the ranking, and abstains on tools that it
    was not trained on. Queries whose tools are known from use are remembered, which makes search better without any
    training (see [`TextExpert.remember`]); tools that are added after [`GatewaySearch.settle`] count as new to it.

    Args:
        model (`str`, *optional*):
            Folder or repository of an aligned model.
        encoder (`str`, *optional*):
            The sentence-transformers model, used without an aligned model. Defaults to
            [`~text_expert.default_encoder`].
        cache_dir (`str`, *optional*):
            Cache folder of the embeddings.
        embed (`bool`, *optional*, defaults to `True`):
            Whether to embed the tools. If `False`, tools are ranked without embeddings, and nothing is learned.
        usage (`Iterable[tuple[str, str]]`, *optional*):
            Queries, each with the id of a tool that was called for it, the latest last. The last 10,000 are remembered.
    """

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        encoder: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        embed: bool = True,
        usage: Iterable[tuple[str, str]] = (),
    ):
        self.model, self.encoder, self.cache_dir, self.embed = model, encoder, cache_dir, embed
        self.retriever: ToolRetriever | None = None
        self._lock = anyio.Lock()  # one search or one update at a time
        self._changed = anyio.Event()
        self._waiting: list[_Query] = []
        self._usage: dict[str, dict[str, None]] = {}  # the queries for which each tool was called
        self._to_learn: dict[tuple[str, str], None] = {}
        self._settled = False
        for query, tool_id in list(usage)[-MAX_LEARNED:]:
            self.learn(query, tool_id)

    @property
    def is_embedded(self) -> bool:
        """`bool`: Whether all tools are embedded."""
        expert = None if self.retriever is None else self.retriever.text_expert
        return expert is not None and expert.embeddings is not None

    async def update(self, tools: Sequence[Tool]) -> None:
        """Replace the searchable tools.

        Args:
            tools (`Sequence[Tool]`): All tools.

        Raises:
            `ValueError` or `OSError`: if the model or the encoder cannot be loaded.
        """
        if tools:
            async with self._lock:
                added = await to_thread.run_sync(self._update, tools)
            self._to_learn |= {(query, tool_id): None for tool_id in added for query in self._usage.get(tool_id, ())}
            self._changed.set()

    def learn(self, query: str, tool_id: str) -> None:
        """Remember that a tool was called for a query, from the next pass of [`GatewaySearch.keep_up`] on."""
        if self.embed and query not in self._usage.setdefault(tool_id, {}):
            self._usage[tool_id][query] = None
            self._to_learn[query, tool_id] = None
            self._changed.set()

    def settle(self) -> None:
        """Begin to remember: all servers have started or failed."""
        self._settled = True
        self._changed.set()

    def _update(self, tools: Sequence[Tool]) -> Iterable[str]:
        """Replace the searchable tools, and return the ids of the new ones."""
        from ..retrieval import ToolRetriever
        from ..text_expert import fast_dtype

        if self.retriever is None and self.model is not None:
            self.retriever = ToolRetriever.from_pretrained(self.model, dtype=fast_dtype())
        expert = None if self.retriever is None else self.retriever.text_expert
        if self.retriever is not None and expert is None:
            return ()  # without a text expert, only the tools with codes can be ranked
        known = {} if expert is None else dict(zip(expert.tool_ids, expert.documents, strict=True))
        documents = {tool.id: tool.document for tool in tools}
        new = [tool for tool in tools if tool.id not in known]
        gone = known.keys() - documents.keys()
        if self.model is None and len(gone) == len(known):
            self.retriever = ToolRetriever.from_catalog(tools, self.encoder, embed=False)
        else:
            changed = {i: text for i, text in documents.items() if known.get(i, text) != text}
            if new or changed:
                expert.embeddings = None  # until they are computed or read from the cache
            expert.describe(changed)
            self.retriever.add(new)
            if len(expert) > len(gone):
                self.retriever.remove(*gone)
        self.retriever([""], top_k=1)  # builds the index before the first query
        return [tool.id for tool in new]

    async def keep_up(self) -> None:
        """Embed changed tools and remember queries that were learned, in the background until cancelled."""
        while True:
            await self._changed.wait()
            self._changed = anyio.Event()
            try:
                await self.catch_up()
            except (ValueError, OSError, ImportError, RuntimeError) as error:
                logger.warning("the tools are ranked without embeddings: %s", error)

    async def catch_up(self) -> None:
        """Embed changed tools, and remember the queries that were learned since the last time.

        Raises:
            `ValueError`, `OSError` or `ImportError`: if the encoder cannot be loaded or used.
        """
        expert = None if self.retriever is None else self.retriever.text_expert
        if expert is None or not self.embed:
            return
        if expert.embeddings is None:
            # Loads the encoder, which takes seconds; queries are ranked by BM25 meanwhile.
            await to_thread.run_sync(expert.encode_queries, ["?"], abandon_on_cancel=True)
            await to_thread.run_sync(expert.embed, self.cache_dir, abandon_on_cancel=True)
            logger.info("%d tools are embedded", len(expert))
        number = 0
        while self._settled and self._to_learn:
            batch = list(self._to_learn)[:LEARNED_AT_ONCE]
            for pair in batch:
                del self._to_learn[pair]
            queries, tools = [query for query, _ in batch], [[tool_id] for _, tool_id in batch]
            async with self._lock:
                remember = self.retriever.text_expert.remember
                await to_thread.run_sync(partial(remember, queries, tools, keep=True))
            number += len(batch)
        if number > 1:
            logger.info("%d queries are remembered from use", number)

    async def __call__(self, query: str, k: int, tool_ids: Sequence[str]) -> list[RetrievedTool]:
        """Rank tools for a query. Concurrent queries are batched.

        Args:
            query (`str`): The query.
            k (`int`): Maximum number of tools to return.
            tool_ids (`Sequence[str]`): The candidate tools.

        Returns:
            `list[RetrievedTool]`: the tools, best first.
        """
        waiting = _Query(query, k, tool_ids)
        self._waiting.append(waiting)
        try:
            async with self._lock:
                if waiting in self._waiting:
                    batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                    with anyio.CancelScope(shield=True):  # other queries wait for the batch
                        await to_thread.run_sync(self._answer, batch)
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
        if waiting.error is not None:
            raise waiting.error
        return waiting.found

    def _answer(self, batch: Sequence[_Query]) -> None:
        try:
            for query, tools in zip(batch, self._rank(batch), strict=True):
                query.found = tools
        except Exception as error:  # raised to every query of the batch
            for query in batch:
                query.error = error

    def _rank(self, batch: Sequence[_Query]) -> list[list[RetrievedTool]]:
        if self.retriever is None:
            return [[] for _ in batch]
        known = self.retriever.tool_ids
        everything = set(known)
        allowed = [list(everything.intersection(query.tool_ids)) for query in batch]
        found = self.retriever(
            [query.text for query in batch],
            top_k=max(query.k for query in batch),
            allowed_tools=None if all(len(ids) == len(known) for ids in allowed) else allowed,
        )
        return [tools[: query.k] for query, tools in zip(batch, found, strict=True)]


class _Query:
    def __init__(self, text: str, k: int, tool_ids: Sequence[str]):
        self.text, self.k, self.tool_ids = text, k, tool_ids
        self.found: list[RetrievedTool] = []
        self.error: Exception | None = None
