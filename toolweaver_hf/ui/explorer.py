"""What the page shows of an artifact: the probabilities of a query's prefixes and tools, and a map of the tools."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.utils import cached_file

from ..agent.loop import ToolAgent
from ..alignment.record import TRAINING_FILE, TRAINING_VERSION
from ..codes.measures import main_axes
from ..codes.tool_codes import ToolCodes
from ..configuration_rqvae import RQVAEConfig
from ..data.catalog import CATALOG_FILE, Tool, ToolCatalog
from ..demo import demo_functions
from ..files import read_json, read_object
from ..retrieval import ToolRetriever
from ..text_expert import TEXT_EXPERT_FILE
from ..tool_codes_file import LEVEL_LETTERS, TOOL_CODES_FILE


EXHAUSTIVE = 500
"""Up to this many inner prefixes, every tool is scored; beyond, those that a beam search reaches."""
REACHED = 200
"""How many tools a beam search is asked for."""
MIN_PROBABILITY = 0.01
"""Prefixes that no measure gives this much are not shown."""


@dataclass(frozen=True)
class Branch:
    """A prefix of the code tree.

    Args:
        token (`str`): The last token of the prefix, such as `<b_5>`.
        label (`str`): The most frequent category of the tools below; of a whole code the tool's name.
        num_tools (`int`): Number of tools below.
        parent (`int`): Position of its parent among the shown branches of the level above; -1 on the first level.
        probabilities (`tuple[float, ...]`): By each measure, the sum over the tools below.
    """

    token: str
    label: str
    num_tools: int
    parent: int
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class FoundTool:
    """A tool, its code (`None` without one), and its probability by each measure."""

    tool: Tool
    code: str | None
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Explanation:
    """How the tools of a query are found.

    Args:
        query (`str`): The query.
        tools (`list[FoundTool]`): The tools, best first.
        levels (`list[list[Branch]]`): The shown prefixes of each level of the code tree, children of one parent
            together.
        place (`tuple[float, float]`, *optional*): Where the query lies on the map of the tools.
    """

    query: str
    tools: list[FoundTool]
    levels: list[list[Branch]]
    place: tuple[float, float] | None


class ToolExplorer:
    """Explains how a retriever finds tools.

    Args:
        retriever ([`ToolRetriever`]): The retriever.
        catalog ([`ToolCatalog`], *optional*): Names, descriptions and schemas of its tools.
        codes ([`ToolCodes`], *optional*): The tools' codes.
        agent ([`ToolAgent`], *optional*): An agent that calls the tools.

    Attributes:
        tools (`list[Tool]`): The tools, in the order of `retriever.tool_ids`.
        measures (`tuple[str, ...]`): Those of `"model"`, `"expert"` and `"product"` that there are. Tools are ranked by
            the last one.
        groups (`np.ndarray` of shape `(num_tools,)`): The first code of each tool, -1 for a tool without a code.
        positions (`np.ndarray` of shape `(num_tools, 2)`, *optional*): The places of the tools on a map, from 0 to 1;
            `None` if there are neither embeddings nor codes alone to place them by.
    """

    def __init__(
        self,
        retriever: ToolRetriever,
        catalog: ToolCatalog | None = None,
        codes: ToolCodes | None = None,
        agent: ToolAgent | None = None,
    ):
        self.retriever, self.codes, self.agent = retriever, codes, agent
        expert = retriever.text_expert
        documents = retriever.tool_ids if expert is None else expert.documents
        self.tools = [
            catalog[tool_id] if catalog is not None and tool_id in catalog else Tool(tool_id, document)
            for tool_id, document in zip(retriever.tool_ids, documents, strict=True)
        ]
        self._row_of_tool = {tool.id: row for row, tool in enumerate(self.tools)}
        self._codes_alone = None
        self.measures: tuple[str, ...] = ("expert",)
        if retriever.trie is not None:
            self._codes_alone = ToolRetriever(retriever.model, retriever.tokenizer, full_head=retriever.full_head)
            self.measures = ("model",) if expert is None else ("model", "expert", "product")
        self._lay_out_tree()
        self._lay_out_map()

    @classmethod
    def open(cls, source: str | os.PathLike) -> ToolExplorer:
        """Open an aligned model, learned codes or a catalog.

        Codes without a model, and catalogs, are searched by their text (see [`ToolRetriever.from_catalog`]). A model
        that was aligned with trajectories comes with an agent. The demo's functions answer its calls of the demo's
        tools; no other tool has a function.

        Args:
            source (`str`): A folder, a repository of the Hub, or a catalog's file.

        Raises:
            `ValueError`: naming a file that is not valid.
            `OSError`: if there is nothing to open, or the Hub cannot be reached.
        """
        source = os.fspath(source)
        if os.path.isfile(source) or source.startswith("hf://"):
            catalog = ToolCatalog.from_file(source)
            return cls(ToolRetriever.from_catalog(catalog, show_progress_bar=True), catalog)
        codes = ToolCodes.from_pretrained(source) if _find(source, TOOL_CODES_FILE) else None
        if not (_find(source, TEXT_EXPERT_FILE) or (codes is not None and _is_model(source))):
            catalog = ToolCatalog.from_pretrained(source, repo_type="dataset" if codes is None else "model")
            return cls(ToolRetriever.from_catalog(catalog, show_progress_bar=True), catalog, codes)
        retriever = ToolRetriever.from_pretrained(source)
        path = _find(source, CATALOG_FILE)
        catalog = None if path is None else ToolCatalog.from_file(path)
        return cls(retriever, catalog, codes, None if catalog is None else _make_agent(source, retriever, catalog))

    def explain(self, query: str, top_k: int = 8, width: int = 6) -> Explanation:
        """Rank the tools for a query, and add up the probabilities over the code tree.

        Up to 500 inner prefixes, all tools are scored. In a larger tree, model and product are those of the tools that
        a beam search reaches, and 0 elsewhere.

        Args:
            query (`str`): The query.
            top_k (`int`, *optional*, defaults to 8): Number of tools.
            width (`int`, *optional*, defaults to 6): Number of prefixes on the first level; below, there are two more.
        """
        found = self._probabilities(query)
        best = np.argsort(-found[-1], kind="stable")[:top_k]
        tools = [
            FoundTool(self.tools[row], self.code_of(self.tools[row].id), tuple(found[:, row].tolist()))
            for row in best
            if found[-1, row] > 0
        ]
        return Explanation(query, tools, self._branches(found, width), self._place(query))

    def code_of(self, tool_id: str) -> str | None:
        """Return the code of a tool as text, such as `<a_12><b_5>`; `None` if it has none."""
        if self.codes is None or tool_id not in self.codes:
            return None
        return "".join(f"<{letter}_{i}>" for letter, i in zip(LEVEL_LETTERS, self.codes[tool_id], strict=False))

    def _probabilities(self, query: str) -> np.ndarray:
        """Return the probability of each tool by each measure, of shape `(num_measures, num_tools)`."""
        found = np.zeros((len(self.measures), len(self.tools)))
        for row, measure in enumerate(self.measures):
            if measure == "expert":
                found[row] = self.retriever.text_expert.log_probs([query])[0].exp().numpy()
                continue
            retriever = self._codes_alone if measure == "model" else self.retriever
            whole = sum(retriever.trie.level_sizes[:-1]) <= EXHAUSTIVE
            top_k = len(self.tools) if whole else REACHED
            for tool_id, score in retriever(query, top_k=top_k, exhaustive=whole)[0]:
                if tool_id in self._row_of_tool:
                    found[row, self._row_of_tool[tool_id]] = math.exp(score)
        return found

    def _lay_out_tree(self) -> None:
        """Number the prefixes of each level."""
        codes = self.codes or {}
        self._coded = np.array([row for row, tool in enumerate(self.tools) if tool.id in codes], dtype=np.int64)
        self.groups = np.full(len(self.tools), -1)
        self._nodes: list[
            tuple[np.ndarray, np.ndarray]
        ] = []  # of each coded tool its node, of each node its first tool
        if len(self._coded):
            matrix = np.array([codes[self.tools[row].id] for row in self._coded])
            self.groups[self._coded] = matrix[:, 0]
            for level in range(matrix.shape[1]):
                _, first, node = np.unique(matrix[:, : level + 1], axis=0, return_index=True, return_inverse=True)
                self._nodes.append((node.reshape(-1), first))

    def _branches(self, found: np.ndarray, width: int) -> list[list[Branch]]:
        levels: list[list[Branch]] = []
        shown = np.zeros(1, dtype=np.int64)  # the nodes of the level above, in order
        for level, (node_of_tool, first) in enumerate(self._nodes):
            sums = np.stack(
                [np.bincount(node_of_tool, weights=row, minlength=len(first)) for row in found[:, self._coded]]
            )
            above = self._nodes[level - 1][0][first] if level else np.zeros(len(first), dtype=np.int64)
            place = np.full(above.max() + 1, -1)  # among the shown nodes of the level above
            place[shown] = np.arange(len(shown))
            parent = place[above]
            # Whatever one of the measures holds probable is shown, so that one sees where they differ.
            most = np.where(parent < 0, -1, sums.max(0))
            best = np.argsort(-most, kind="stable")[: width + (2 if level else 0)]
            best = best[most[best] >= MIN_PROBABILITY]
            shown = best[np.lexsort((-sums[-1, best], parent[best]))]
            levels.append([self._branch(level, node, parent[node] if level else -1, sums[:, node]) for node in shown])
        return levels

    def _branch(self, level: int, node: int, parent: int, sums: np.ndarray) -> Branch:
        node_of_tool, first = self._nodes[level]
        tool = self.tools[self._coded[first[node]]]
        token = f"<{LEVEL_LETTERS[level]}_{self.codes[tool.id][level]}>"
        below = [self.tools[row] for row in self._coded[node_of_tool == node]]
        label = tool.name
        if level + 1 < len(self._nodes):
            label = Counter(tool.category or tool.name for tool in below).most_common(1)[0][0]
        return Branch(token, label, len(below), int(parent), tuple(sums.tolist()))

    def _lay_out_map(self) -> None:
        """Place the tools by the two main axes of their embeddings or, without a text expert, of their codes'."""
        expert, retriever = self.retriever.text_expert, self.retriever
        self.positions = None
        if expert is not None and expert.embeddings is not None:
            vectors = expert.embeddings.numpy()
        elif expert is None:
            rows = retriever.model.get_input_embeddings().weight.detach()
            vectors = (
                rows[torch.from_numpy(retriever.tokenizer.tool_code_ids).to(rows.device)].sum(1).float().cpu().numpy()
            )
        else:
            return
        self._center = vectors.mean(0)
        self._axes = main_axes(vectors - self._center)
        plane = (vectors - self._center) @ self._axes.T
        self._low, self._span = plane.min(0), np.maximum(np.ptp(plane, axis=0), 1e-9)
        self.positions = (plane - self._low) / self._span

    def _place(self, query: str) -> tuple[float, float] | None:
        if self.positions is None or self.retriever.text_expert is None:
            return None
        vector = self.retriever.text_expert.encode_queries([query])[0].numpy()
        place = ((vector - self._center) @ self._axes.T - self._low) / self._span
        x, y = np.clip(place, 0, 1).tolist()
        return x, y


def _find(source: str, file: str) -> str | None:
    """Return the path of a file of a folder or of a model repository; `None` if it is not there."""
    try:
        return cached_file(source, file, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None  # no model repository of this name: it may be a dataset


def _is_model(source: str) -> bool:
    """Whether a folder with codes holds an aligned model, or its adapter, rather than the RQ-VAE."""
    if _find(source, "adapter_config.json"):
        return True
    path = _find(source, "config.json")
    return path is not None and read_object(path).get("model_type") != RQVAEConfig.model_type


def _make_agent(source: str, retriever: ToolRetriever, catalog: ToolCatalog) -> ToolAgent | None:
    """Make an agent of a model, unless its record says that it was not aligned with trajectories."""
    path = _find(source, TRAINING_FILE)
    runs = [{"stages": ["trajectory"]}] if path is None else read_json(path, TRAINING_VERSION).get("runs", [])
    if retriever.model is None or not any("trajectory" in run.get("stages", ()) for run in runs):
        return None
    functions = dict.fromkeys((tool.id for tool in catalog if retriever.tokenizer.has_tool(tool.id)), no_function)
    functions |= {tool_id: run for tool_id, run in demo_functions(catalog).items() if tool_id in functions}
    return ToolAgent(
        retriever.model, retriever.tokenizer, catalog, functions, time_limit=10, text_expert=retriever.text_expert
    )


def no_function(**arguments: Any) -> None:
    """Stand for the function of a tool that has none here: the page asks its user for the result instead."""
    raise NotImplementedError("this tool has no function here")
