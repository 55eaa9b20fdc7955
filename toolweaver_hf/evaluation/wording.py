"""How people ask: in a tool's own words, in others, or without saying what they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import bm25s

from ..data.catalog import ToolCatalog
from ..data.queries import Query


EXACT_SHARE = 0.5
TIERS = ("exact words", "paraphrase", "vague need")


def group_by_wording(queries: Sequence[Query], catalog: ToolCatalog) -> list[Query]:
    """Group queries by how many of their words the documents of the tools that they need have.

    The words are those of BM25, without English stop words. Search is at its best where they are the document's own;
    people who do not know a tool use others.

    Args:
        queries (`Sequence[Query]`):
            The queries. Their own groups are replaced.
        catalog ([`ToolCatalog`]):
            The tools. A tool that it lacks has no words.

    Returns:
        `list[Query]`: the queries in the groups `"exact words"`, where half of a query's words or more are in the
        documents, `"paraphrase"`, where some are, and `"vague need"`, where none is.
    """

    def split(texts: list[str]) -> list[set[str]]:
        tokens = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
        return [set(words) for words in tokens]

    words_of_tool = dict(zip(catalog.ids, split(catalog.documents), strict=True))
    grouped = []
    for query, said in zip(queries, split([query.text for query in queries]), strict=True):
        known = set().union(*(words_of_tool.get(tool_id, ()) for tool_id in query.tools))
        shared = len(said & known) / max(len(said), 1)
        tier = TIERS[0] if shared >= EXACT_SHARE else TIERS[1] if shared > 0 else TIERS[2]
        grouped.append(replace(query, group=tier))
    return grouped
