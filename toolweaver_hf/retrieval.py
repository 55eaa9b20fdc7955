"""`ToolRetriever`: ranked tools for a query, by beam search over the codes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .cache import DecodingState
from .loading import load_aligned_model
from .tokenization_toolweaver import HUB_KWARGS, ToolWeaverTokenizer
from .trie import CodeTrie


class RetrievedTool(NamedTuple):
    """A tool and its score, the larger the better."""

    tool_id: str
    score: float


class ToolRetriever:
    r"""
    Ranks the tools of a catalog for a query with an aligned language model.

    The model reads the query as a user's message and is asked for the code that answers it. A beam search over the
    trie of the codes finds the most probable ones. The score of a tool is the log-probability of its code given the
    query: the sum over the levels, each among the tokens that go on to a tool of the catalog, as in training. So the
    probabilities of all tools add up to 1, and an allow list leaves the scores of its tools as they are.

    Args:
        model ([`PreTrainedModel`]):
            The aligned causal language model.
        tokenizer ([`ToolWeaverTokenizer`]):
            Its tokenizer.
        full_head (`bool`, *optional*, defaults to `True`):
            Whether to apply the model's whole output embeddings to every beam. With `False` these are the rows of the
            level's codebook alone, with the same scores, for models whose logits are their output embeddings applied
            to the last hidden state.

    Raises:
        `ValueError`: with `full_head=False`, for a model whose logits are something else.

    Example:

    ```python
    >>> from toolweaver_hf import ToolRetriever

    >>> retriever = ToolRetriever.from_pretrained("out/retrieval")
    >>> retriever("Is it a good day for the park?", top_k=2)
    [[RetrievedTool(tool_id='weather', score=-0.3), RetrievedTool(tool_id='air_quality', score=-1.5)]]
    ```
    """

    def __init__(self, model: PreTrainedModel, tokenizer: ToolWeaverTokenizer, full_head: bool = True):
        rows = model.get_input_embeddings().weight.shape[0]
        if rows <= max(tokenizer.code_token_ids):
            raise ValueError(
                f"the model has embeddings of {rows} tokens, too few for the tokenizer's codes: the two do not belong "
                "together"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.full_head = full_head
        self.tool_ids = tokenizer.tool_ids
        self.trie = CodeTrie(tokenizer.tool_code_ids).to(model.device)
        self._row_of_tool = {tool_id: row for row, tool_id in enumerate(self.tool_ids)}
        if not full_head:
            self._check_head()

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, full_head: bool = True, **model_kwargs) -> ToolRetriever:
        """Load an aligned model and its tokenizer from a folder or a repository of the Hub.

        Args:
            folder (`str`): The folder or repository.
            full_head (`bool`, *optional*, defaults to `True`): As for the class.
            model_kwargs: Passed on to [`AutoModelForCausalLM.from_pretrained`], such as `dtype` and `device_map`.
                Those that say where from, such as `revision` and `token`, hold for the tokenizer, too.
        """
        model = load_aligned_model(folder, **model_kwargs)
        hub_kwargs = {name: value for name, value in model_kwargs.items() if name in HUB_KWARGS}
        return cls(model, ToolWeaverTokenizer.from_pretrained(folder, **hub_kwargs), full_head=full_head)

    def __call__(
        self,
        queries: str | Sequence[str],
        top_k: int = 5,
        num_beams: int | None = None,
        allowed_tools: Iterable[str] | Sequence[Iterable[str]] | None = None,
        batch_size: int = 32,
        exhaustive: bool = False,
        show_progress_bar: bool = False,
    ) -> list[list[RetrievedTool]]:
        """Rank the tools for each query.

        Args:
            queries (`str` or `Sequence[str]`):
                One query or several.
            top_k (`int`, *optional*, defaults to 5):
                Number of tools for each query; there are fewer where fewer exist or are allowed.
            num_beams (`int`, *optional*):
                Prefixes kept at each level. Defaults to twice `top_k`, and at least 10.
            allowed_tools (`Iterable[str]`, or one for each query, *optional*):
                Ids of the only tools that may be retrieved.
            batch_size (`int`, *optional*, defaults to 32):
                Queries in one forward pass.
            exhaustive (`bool`, *optional*, defaults to `False`):
                Whether to score every tool instead of searching, for small catalogs. Queries go one by one then.
            show_progress_bar (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar over the batches.

        Returns:
            `list[list[RetrievedTool]]`: for each query its tools, best first.

        Raises:
            `ValueError`: if an allowed tool has no code, or the sets of allowed tools are not one for each query.
        """
        queries = [queries] if isinstance(queries, str) else list(queries)
        trie, roots = self._tries(allowed_tools, len(queries))
        num_beams = max(2 * top_k, 10) if num_beams is None else max(num_beams, top_k)
        if exhaustive:
            num_beams, batch_size = len(trie), 1
        prompts = [self.encode_query(query) for query in queries]
        # Queries of like length share a batch, so that little of it is padding.
        by_length = sorted(range(len(queries)), key=lambda i: len(prompts[i]))
        results: list[list[RetrievedTool]] = [[] for _ in queries]
        starts = range(0, len(queries), batch_size)
        for start in tqdm(starts, desc="Retrieving", disable=not show_progress_bar):
            batch = by_length[start : start + batch_size]
            longest = max(len(prompts[i]) for i in batch)
            pad = self.tokenizer.pad_token_id or 0
            input_ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in batch])
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
            found = self._beam_search(input_ids, mask, trie, roots[batch], num_beams, top_k)
            for i, tools in zip(batch, self.name_tools(*found), strict=True):
                results[i] = tools
        return results

    def encode_query(self, query: str) -> list[int]:
        """Return the token ids of the prompt that asks for a query's tools."""
        return self.tokenizer.encode_query(query)

    def rank(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        top_k: int = 5,
        num_beams: int | None = None,
        allowed_tools: Iterable[str] | Sequence[Iterable[str]] | None = None,
    ) -> tuple[torch.LongTensor, torch.FloatTensor]:
        """Rank the tools for a batch of prompts that are tokenized and padded on the left.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): The prompts, as `encode_query` gives them.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`): 0 for the padding.
            top_k, num_beams, allowed_tools: As for `__call__`.

        Returns:
            `tuple` of two tensors of shape `(batch, top_k)` or less: the tools, as rows of `tool_ids`, and their
            log-probabilities, descending; `-inf` where there is no further tool.
        """
        trie, roots = self._tries(allowed_tools, len(input_ids))
        num_beams = max(2 * top_k, 10) if num_beams is None else max(num_beams, top_k)
        return self._beam_search(input_ids, attention_mask, trie, roots, num_beams, top_k)

    def name_tools(self, rows: torch.LongTensor, scores: torch.FloatTensor) -> list[list[RetrievedTool]]:
        """Turn what `rank` returns into lists of tools."""
        return [
            [RetrievedTool(self.tool_ids[r], s) for r, s in zip(row, score, strict=True) if s > -torch.inf]
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def _tries(self, allowed_tools, num_queries: int) -> tuple[CodeTrie, torch.LongTensor]:
        """The trie to search, and where each query starts in it."""
        if allowed_tools is None:
            return self.trie, self.trie.roots.expand(num_queries)
        sets = list(allowed_tools)
        if not sets or isinstance(sets[0], str):
            sets = [sets]
        sets = [list(tools) for tools in sets]
        if len(sets) not in (1, num_queries):
            raise ValueError(f"{len(sets)} sets of allowed tools are given for {num_queries} queries")
        unknown = [tool_id for tools in sets for tool_id in tools if tool_id not in self._row_of_tool]
        if unknown:
            raise ValueError(f"these allowed tools have no code: {', '.join(unknown[:5])}")
        trie = self.trie.restrict([[self._row_of_tool[tool_id] for tool_id in tools] for tools in sets])
        return trie, trie.roots.expand(num_queries)

    @torch.inference_mode()
    def _beam_search(
        self,
        input_ids: torch.LongTensor,
        mask: torch.LongTensor,
        trie: CodeTrie,
        roots: torch.LongTensor,
        num_beams: int,
        top_k: int,
    ) -> tuple[torch.LongTensor, torch.FloatTensor]:
        device, batch = self.model.device, len(input_ids)
        input_ids, mask, nodes = input_ids.to(device), mask.to(device), roots[:, None]
        full_nodes = torch.zeros_like(
            nodes
        )  # the same prefixes in the unrestricted trie, whose children normalize scores
        scores = torch.zeros((batch, 1), device=device)
        state = DecodingState(self.model)
        for level in range(trie.num_levels):
            logits, first = self._logits(state, input_ids, mask, level)
            tokens, present = self.trie.children(full_nodes.flatten(), self.trie.max_children[level])
            of_all = logits.gather(1, torch.where(present, tokens - first, 0)).masked_fill(~present, -torch.inf)
            width = trie.max_children[level]
            tokens, present = trie.children(nodes.flatten(), width)
            candidates = scores.view(-1, 1) + logits.gather(1, torch.where(present, tokens - first, 0))
            candidates = (candidates - of_all.logsumexp(1, keepdim=True)).masked_fill(~present, -torch.inf)
            keep = min(num_beams if level + 1 < trie.num_levels else top_k, nodes.shape[1] * width)
            scores, best = candidates.view(batch, -1).topk(keep)
            beam = best // width  # the beam that each candidate goes on from
            tokens = tokens.view(batch, -1).gather(1, best)
            nodes = trie.step(nodes.gather(1, beam).flatten(), tokens.flatten()).view(batch, -1)
            nodes = torch.where(scores > -torch.inf, nodes, -1)
            full_nodes = self.trie.step(full_nodes.gather(1, beam).flatten(), tokens.flatten()).view(batch, -1)
            if level + 1 < trie.num_levels:
                rows = torch.arange(batch, device=device)[:, None] * (len(input_ids) // batch) + beam
                state.select(rows.flatten())
                input_ids, mask = tokens.view(-1, 1), None
        return trie.tool_of(nodes), scores

    def _logits(
        self, state: DecodingState, input_ids: torch.LongTensor, mask: torch.LongTensor | None, level: int
    ) -> tuple[torch.Tensor, int]:
        """Return the logits of the next token, and the token that they begin with."""
        if self.full_head:
            return state.read(input_ids, mask).float(), 0
        hidden = state.read(input_ids, mask, self.model.base_model)
        head, first = self.model.get_output_embeddings(), self.tokenizer.level_offsets[level]
        rows = slice(first, first + self.tokenizer.codebook_sizes[level])
        return linear(hidden, head.weight[rows], None if head.bias is None else head.bias[rows]).float(), first

    @torch.inference_mode()
    def _check_head(self) -> None:
        ids = torch.tensor([self.encode_query("?")], device=self.model.device)
        head = self.model.get_output_embeddings()
        logits = self.model(input_ids=ids, logits_to_keep=1).logits[:, -1]
        if not isinstance(head, torch.nn.Linear) or not torch.allclose(
            head(self.model.base_model(input_ids=ids).last_hidden_state[:, -1]), logits, rtol=1e-3, atol=1e-3
        ):
            raise ValueError(
                f"the logits of {type(self.model).__name__} are more than its output embeddings applied to the last "
                "hidden state: use full_head=True"
            )
