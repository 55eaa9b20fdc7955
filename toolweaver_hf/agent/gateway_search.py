"""`GatewaySearch`: search over the changing tools of a gateway."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread


if TYPE_CHECKING:
    from ..data.catalog import Tool
    from ..retrieval import RetrievedTool, ToolRetriever


logger = logging.getLogger(__name__)

MAX_BATCH = 32


class GatewaySearch:
    """Ranks the tools of a gateway, which may change at any time.

    Tools are ranked by BM25 immediately, and additionally by embeddings once they are computed in the background (see
    [`GatewaySearch.keep_embedded`]). An aligned model also contributes to the ranking, and abstains on tools that it
    was not trained on.

    Args:
        model (`str`, *optional*):
            Folder or repository of an aligned model.
        encoder (`str`, *optional*):
            The sentence-transformers model, used without an aligned model. Defaults to
            [`~text_expert.default_encoder`].
        cache_dir (`str`, *optional*):
            Cache folder of the embeddings.
        embed (`bool`, *optional*, defaults to `True`):
            Whether to embed the tools. If `False`, tools are ranked without embeddings.
    """

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        encoder: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        embed: bool = True,
    ):
        self.model, self.encoder, self.cache_dir, self.embed = model, encoder, cache_dir, embed
        self.retriever: ToolRetriever | None = None
        self._lock = anyio.Lock()  # one search or one update at a time
        self._changed = anyio.Event()
        self._waiting: list[_Query] = []

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
                await to_thread.run_sync(self._update, tools)
            self._changed.set()

    def _update(self, tools: Sequence[Tool]) -> None:
        from ..retrieval import ToolRetriever

        if self.retriever is None and self.model is not None:
            self.retriever = ToolRetriever.from_pretrained(self.model)
        expert = None if self.retriever is None else self.retriever.text_expert
        if self.retriever is not None and expert is None:
            return  # without a text expert, only the tools with codes can be ranked
        known = {} if expert is None else dict(zip(expert.tool_ids, expert.documents, strict=True))
        documents = {tool.id: tool.document for tool in tools}
        gone = [tool_id for tool_id, document in known.items() if documents.get(tool_id) != document]
        if self.model is None and len(gone) == len(known):
            self.retriever = ToolRetriever.from_catalog(tools, self.encoder, embed=False)
        else:
            expert.embeddings = None  # until they are computed or read from the cache
            self.retriever.add([tool for tool in tools if tool.id not in known])
            if len(expert) > len(gone):
                self.retriever.remove(*gone)
                self.retriever.add([tool for tool in tools if tool.id in gone])
        self.retriever([""], top_k=1)  # builds the index before the first query

    async def keep_embedded(self) -> None:
        """Embed changed tools in the background, until cancelled."""
        while self.embed:
            await self._changed.wait()
            self._changed = anyio.Event()
            expert = None if self.retriever is None else self.retriever.text_expert
            if expert is None or expert.embeddings is not None:
                continue
            try:
                await to_thread.run_sync(expert.embed, self.cache_dir, abandon_on_cancel=True)
                logger.info("%d tools are embedded", len(expert))
            except (ValueError, OSError, ImportError, RuntimeError) as error:
                logger.warning("the tools are ranked without embeddings: %s", error)

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
