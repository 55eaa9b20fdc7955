"""`ToolRetriever`: ranked tools for a query, by search, by an aligned model's codes, or by the product of both."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import cached_file, logging

from .cache import DecodingState, can_use_cache
from .loading import load_aligned_model, split_hub_kwargs
from .text_expert import TEXT_EXPERT_FILE, TextExpert
from .tokenization_toolweaver import ToolWeaverTokenizer
from .tool_codes_file import TOOL_CODES_FILE
from .trie import CodeTrie


logger = logging.get_logger(__name__)

OUT_OF_REACH = 1e6
"""What a prefix without an allowed tool ranks below the others."""


class RetrievedTool(NamedTuple):
    """A tool and its score, the larger the better."""

    tool_id: str
    score: float


class ToolRetriever:
    r"""
    Ranks the tools of a catalog for a query: by search alone, by an aligned language model, or by both.

    - **Search** ([`ToolRetriever.from_catalog`]) needs no training: a [`TextExpert`] scores every tool by its
      document.
    - **An aligned model** reads the query as a user's message and is asked for the code that answers it. A beam search
      over the trie of the codes finds the most probable ones.
    - **Guided decoding**, where a model comes with a text expert, ranks by the normalized product

      \\(\log p(tool | query) = w \log p_{LM}(code | query) + \tau \cos(query, tool) + \nu \mathrm{BM25}(query, tool)
      - \log Z\\).

      The beam search adds to what the model says of a prefix what the expert says of the tools below it. On tools
      that the model has not learned it abstains, at the log-probability of one among all, so that they are found as
      by search.

    Scores are log-probabilities: those of all tools add up to 1, and an allow list leaves the scores of its tools as
    they are. With guidance, tools below prefixes that the beams leave aside count by an estimate, so that sums are
    exact if the beams hold all prefixes (`exhaustive=True`).

    Args:
        model ([`PreTrainedModel`], *optional*):
            The aligned causal language model. Without it the text expert ranks alone.
        tokenizer ([`ToolWeaverTokenizer`], *optional*):
            The model's tokenizer.
        text_expert ([`TextExpert`], *optional*):
            What guides the model. Without it the codes alone are ranked.
        full_head (`bool`, *optional*):
            Whether to apply the model's whole output embeddings to every beam. With `False` these are the rows of the
            level's codebook alone, with the same scores, for models whose logits are their output embeddings applied
            to the last hidden state. Defaults to `False` where that is so.

    Raises:
        `ValueError`: without model and text expert, for a model that is not causal or a tokenizer of another one, for
            codes of tools that the text expert lacks, or with `full_head=False` for a model whose logits are something
            else.

    Example:

    ```python
    >>> from toolweaver_hf import ToolCatalog, ToolRetriever

    >>> retriever = ToolRetriever.from_catalog(ToolCatalog.from_file("tools.jsonl"))  # search
    >>> retriever = ToolRetriever.from_pretrained("out/retrieval")  # an aligned model
    >>> retriever("Is it a good day for the park?", top_k=2)
    [[RetrievedTool(tool_id='weather', score=-0.3), RetrievedTool(tool_id='air_quality', score=-1.5)]]
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        tokenizer: ToolWeaverTokenizer | None = None,
        text_expert: TextExpert | None = None,
        full_head: bool | None = None,
    ):
        if (model is None) != (tokenizer is None) or (model is None and text_expert is None):
            raise ValueError("give a model with its tokenizer, a text expert, or all three")
        self.model, self.tokenizer, self.text_expert = model, tokenizer, text_expert
        if model is not None:
            rows = model.get_input_embeddings().weight.shape[0]
            if rows <= max(tokenizer.code_token_ids):
                raise ValueError(
                    f"the model has embeddings of {rows} tokens, too few for the tokenizer's codes: the two do not "
                    "belong together"
                )
            can_use_cache(model.eval())  # refuses what is no causal language model
            exact = full_head is not True and self._head_is_exact()
            if full_head is False and not exact:
                raise ValueError(
                    f"the logits of {type(model).__name__} are more than its output embeddings applied to the last "
                    "hidden state: use full_head=True"
                )
            self.full_head = not exact if full_head is None else full_head
        self._lay_out()

    def _lay_out(self) -> None:
        """Number the tools, and build the trie of those that the model ranks."""
        expert, tokenizer = self.text_expert, self.tokenizer
        self.tool_ids = tokenizer.tool_ids if expert is None else expert.tool_ids
        self._row_of_tool = {tool_id: row for row, tool_id in enumerate(self.tool_ids)}
        self.trie = None
        if self.model is None:
            return
        device = self.model.device
        coded = tokenizer.tool_ids
        if expert is not None:
            known = self._row_of_tool.keys() if expert.learned is None else self._row_of_tool.keys() & expert.learned
            coded = [tool_id for tool_id in coded if tool_id in known]
        unlearned = self._row_of_tool.keys() - set(coded)
        self._unlearned = torch.tensor(
            sorted(self._row_of_tool[i] for i in unlearned), device=device, dtype=torch.long
        )
        if not coded:
            return  # the model has learned none of the tools, and abstains
        if coded == tokenizer.tool_ids:
            self.trie = tokenizer.trie.to(device)
        else:
            code_of_tool = dict(zip(tokenizer.tool_ids, tokenizer.tool_code_ids, strict=True))
            self.trie = CodeTrie(torch.tensor([code_of_tool[tool_id].tolist() for tool_id in coded])).to(device)
        rows = torch.tensor([self._row_of_tool[tool_id] for tool_id in coded], device=device)
        self._row_of_leaf = rows[self.trie.tools]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        full_head: bool | None = None,
        guided: bool = True,
        **model_kwargs,
    ) -> ToolRetriever:
        """Load an aligned model, its tokenizer and, where there is one, its text expert.

        Args:
            pretrained_model_name_or_path (`str`): A folder or a repository of the Hub. It may hold a text expert
                alone, as [`ToolRetriever.save_pretrained`] writes it for search.
            full_head (`bool`, *optional*): As for the class.
            guided (`bool`, *optional*, defaults to `True`): Whether to load the text expert.
            model_kwargs: Passed on to [`AutoModelForCausalLM.from_pretrained`], such as `dtype` and `device_map`.
                Those that say where from, such as `revision` and `token`, hold for the other files, too.
        """
        name = pretrained_model_name_or_path
        hub_kwargs, _ = split_hub_kwargs(model_kwargs)

        def has(file: str) -> bool:
            return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub_kwargs) is not None

        expert = TextExpert.from_pretrained(name, **hub_kwargs) if guided and has(TEXT_EXPERT_FILE) else None
        if expert is not None and not has(TOOL_CODES_FILE):
            return cls(text_expert=expert)
        model = load_aligned_model(name, **model_kwargs)
        return cls(model, ToolWeaverTokenizer.from_pretrained(name, **hub_kwargs), expert, full_head=full_head)

    @classmethod
    def from_catalog(
        cls,
        catalog: Any,
        encoder: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        embed: bool = True,
        show_progress_bar: bool = False,
    ) -> ToolRetriever:
        """Search a catalog without any training.

        Args:
            catalog ([`ToolCatalog`]):
                The tools.
            encoder (`str`, *optional*):
                Id or path of a sentence-transformers model. Defaults to all-MiniLM-L6-v2.
            cache_dir (`str`, *optional*):
                Folder that keeps embeddings, so that of a changed catalog only what changed is embedded.
            embed (`bool`, *optional*, defaults to `True`):
                Whether to embed the tools at once. With `False` BM25 answers, in a second also for thousands of tools,
                until `retriever.text_expert.embed()` has been called, in a thread if you like.
            show_progress_bar (`bool`, *optional*, defaults to `False`):
                Whether to show the progress of embedding.
        """
        expert = TextExpert([tool.id for tool in catalog], [tool.document for tool in catalog], encoder)
        if embed:
            expert.embed(cache_dir, show_progress_bar)
        return cls(text_expert=expert)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write model, tokenizer and text expert, as far as there are any, into a folder."""
        for part in (self.model, self.tokenizer, self.text_expert):
            if part is not None:
                part.save_pretrained(folder)

    def add(self, tools: Iterable[Any]) -> None:
        """Add tools, which are found from the next call on. A model that has not learned them abstains on them.

        Args:
            tools (`Iterable[Tool]`): The tools.

        Raises:
            `ValueError`: without a text expert, or naming a tool that is there already.
        """
        tools = list(tools)
        if self.text_expert is None:
            raise ValueError("tools are added to a retriever with a text expert: codes alone know what was learned")
        self.text_expert.add([tool.id for tool in tools], [tool.document for tool in tools])
        self._lay_out()

    def remove(self, *tool_ids: str) -> None:
        """Remove tools, which are not found any more.

        Raises:
            `ValueError`: without a text expert, or naming a tool that is not there.
        """
        if self.text_expert is None:
            raise ValueError("tools are removed from a retriever with a text expert: give an allow list instead")
        self.text_expert.remove(*tool_ids)
        self._lay_out()

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
            `ValueError`: if a query is not a text, an allowed tool is unknown, or the sets of allowed tools are not one
                for each query.
        """
        queries = list(queries) if isinstance(queries, Iterable) and not isinstance(queries, str) else [queries]
        for query in queries:
            if not isinstance(query, str):
                raise ValueError(f"a query must be a text, not {query!r}")
        allowed = self._allowed_rows(allowed_tools, len(queries))
        num_beams = self._num_beams(top_k, num_beams)
        if exhaustive and self.trie is not None:
            num_beams, batch_size = max(self.trie.level_sizes), 1
        prompts = [[] if self.trie is None else self.encode_query(query) for query in queries]
        # Queries of like length share a batch, so that little of it is padding.
        by_length = sorted(range(len(queries)), key=lambda i: len(prompts[i]))
        results: list[list[RetrievedTool]] = [[] for _ in queries]
        starts = range(0, len(queries), batch_size)
        for start in tqdm(starts, desc="Retrieving", disable=not show_progress_bar):
            batch = by_length[start : start + batch_size]
            logits = None if self.text_expert is None else self.text_expert.logits([queries[i] for i in batch])
            mask = None if allowed is None else self._allowed_mask([allowed[i] for i in batch])
            if self.trie is None:
                found = self._search(logits, mask, top_k)
            else:
                longest = max(len(prompts[i]) for i in batch)
                pad = self.tokenizer.pad_token_id or 0
                input_ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in batch])
                attended = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
                found = self._beam_search(input_ids, attended, logits, mask, num_beams, top_k)
            for i, tools in zip(batch, self.name_tools(*found), strict=True):
                results[i] = tools
        return results

    @torch.inference_mode()
    def model_log_probs(self, queries: Sequence[str], show_progress_bar: bool = False) -> torch.Tensor:
        """Return what the model alone says of every tool, by exhaustive search: where it abstains, one among all.

        Args:
            queries (`Sequence[str]`): The queries.
            show_progress_bar (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

        Returns:
            `torch.Tensor` of shape `(num_queries, num_tools)`: log-probabilities, in the order of `tool_ids`.
        """
        log_probs = torch.full((len(queries), len(self.tool_ids)), -math.log(len(self.tool_ids)))
        if self.trie is None:
            return log_probs
        log_share = math.log(len(self.trie) / len(self.tool_ids))
        beams = max(self.trie.level_sizes)
        for row, query in enumerate(tqdm(queries, desc="Scoring", disable=not show_progress_bar)):
            ids = torch.tensor([self.encode_query(query)])
            tools, scores = self._beam_search(ids, torch.ones_like(ids), None, None, beams, len(self.trie))
            log_probs[row, tools[0].cpu()] = scores[0].cpu() + log_share
        return log_probs

    def encode_query(self, query: str) -> list[int]:
        """Return the token ids of the prompt that asks for a query's tools.

        Of a query that is longer than the model reads, the beginning is cut, with a warning.
        """
        positions = getattr(self.model.config, "max_position_embeddings", None)
        room = None if positions is None else positions - len(self.tokenizer.codebook_sizes)
        return cut_prompt(self.tokenizer.encode_query(query), self.tokenizer.encode_query(""), room)

    def rank(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        top_k: int = 5,
        num_beams: int | None = None,
        allowed_tools: Iterable[str] | Sequence[Iterable[str]] | None = None,
        expert_logits: torch.Tensor | None = None,
    ) -> tuple[torch.LongTensor, torch.FloatTensor]:
        """Rank the tools for a batch of prompts that are tokenized and padded on the left.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): The prompts, as `encode_query` gives them.
            attention_mask (`torch.LongTensor` of shape `(batch, length)`): 0 for the padding.
            top_k, num_beams, allowed_tools: As for `__call__`.
            expert_logits (`torch.Tensor` of shape `(batch, num_tools)`, *optional*): What [`TextExpert.logits`] says of
                the queries. Without it the codes alone are ranked.

        Returns:
            `tuple` of two tensors of shape `(batch, top_k)` or less: the tools, as rows of `tool_ids`, and their
            log-probabilities, descending; `-inf` where there is no further tool.
        """
        allowed = self._allowed_rows(allowed_tools, len(input_ids))
        mask = None if allowed is None else self._allowed_mask(allowed)
        if self.trie is None:
            return self._search(expert_logits, mask, top_k)
        num_beams = self._num_beams(top_k, num_beams)
        return self._beam_search(input_ids, attention_mask, expert_logits, mask, num_beams, top_k)

    def choose(
        self,
        state: DecodingState,
        logits: torch.Tensor,
        query: str,
        allowed_tools: Iterable[str] | None = None,
        num_beams: int = 10,
        top_k: int = 10,
    ) -> list[RetrievedTool]:
        """Rank the tools that may come next in a conversation, for one sequence whose next token opens a code.

        Args:
            state ([`DecodingState`]): What the model has read of the conversation; it stays as it is.
            logits (`torch.Tensor` of shape `(1, vocab_size)`): The logits of the next token.
            query (`str`): What the text expert reads.
            allowed_tools (`Iterable[str]`, *optional*): Ids of the only tools to choose from.
            num_beams (`int`, *optional*, defaults to 10): Prefixes kept at each level.
            top_k (`int`, *optional*, defaults to 10): Number of tools.
        """
        allowed = self._allowed_rows(None if allowed_tools is None else [list(allowed_tools)], 1)
        mask = None if allowed is None else self._allowed_mask(allowed)
        expert_logits = None if self.text_expert is None else self.text_expert.logits([query])
        if self.trie is None:
            return self.name_tools(*self._search(expert_logits, mask, top_k))[0]
        found = self._beam_search(None, None, expert_logits, mask, num_beams, top_k, state.fork(), logits)
        return self.name_tools(*found)[0]

    def name_tools(self, rows: torch.LongTensor, scores: torch.FloatTensor) -> list[list[RetrievedTool]]:
        """Turn what `rank` returns into lists of tools."""
        return [
            [RetrievedTool(self.tool_ids[r], s) for r, s in zip(row, score, strict=True) if s > -torch.inf]
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    @staticmethod
    def _num_beams(top_k: int, num_beams: int | None) -> int:
        return max(2 * top_k, 10) if num_beams is None else max(num_beams, top_k)

    def _allowed_rows(self, allowed_tools, num_queries: int) -> list[list[int]] | None:
        """The rows of the tools that each query may retrieve."""
        if allowed_tools is None:
            return None
        sets = list(allowed_tools)
        if not sets or isinstance(sets[0], str):
            sets = [sets]
        sets = [list(tools) for tools in sets]
        if len(sets) not in (1, num_queries):
            raise ValueError(f"{len(sets)} sets of allowed tools are given for {num_queries} queries")
        unknown = [tool_id for tools in sets for tool_id in tools if tool_id not in self._row_of_tool]
        if unknown:
            raise ValueError(f"these allowed tools are unknown: {', '.join(unknown[:5])}")
        rows = [[self._row_of_tool[tool_id] for tool_id in tools] for tools in sets]
        return rows * num_queries if len(rows) == 1 else rows

    def _allowed_mask(self, allowed: list[list[int]]) -> torch.Tensor:
        """Return a boolean mask of shape `(batch, num_tools)`, `True` for allowed tools."""
        mask = torch.zeros((len(allowed), len(self.tool_ids)), dtype=torch.bool)
        batch = torch.arange(len(allowed)).repeat_interleave(torch.tensor([len(rows) for rows in allowed]))
        mask[batch, torch.tensor([row for rows in allowed for row in rows], dtype=torch.long)] = True
        return mask

    def _search(
        self, logits: torch.Tensor, allowed: torch.Tensor | None, top_k: int
    ) -> tuple[torch.LongTensor, torch.FloatTensor]:
        scores = logits.log_softmax(1)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        scores, rows = scores.topk(min(top_k, scores.shape[1]))
        return rows, scores

    @torch.inference_mode()
    def _beam_search(
        self,
        input_ids: torch.LongTensor,
        mask: torch.LongTensor,
        expert_logits: torch.Tensor | None,
        allowed: torch.Tensor | None,
        num_beams: int,
        top_k: int,
        state: DecodingState | None = None,
        first_logits: torch.Tensor | None = None,
    ) -> tuple[torch.LongTensor, torch.FloatTensor]:
        trie, device = self.trie, self.model.device
        if state is None:
            state, batch = DecodingState(self.model), len(input_ids)
            input_ids, mask = input_ids.to(device), mask.to(device)
        else:  # the prompts were read already, up to the logits of the first level
            batch = len(first_logits)
        weight, below, reachable, rest = 1.0, None, None, []
        log_share = 0.0  # of the tools that the model has learned
        if allowed is not None:
            allowed = allowed.to(device)
        if expert_logits is not None:
            weight = self.text_expert.model_weight
            expert = expert_logits.to(device, torch.float32).log_softmax(1)
            below = trie.look_ahead(expert[:, self._row_of_leaf], weight)
            if len(self._unlearned):
                log_share = math.log(len(self._row_of_leaf) / len(self.tool_ids))
                abstained = expert[:, self._unlearned] - weight * math.log(len(self.tool_ids))
                rest.append(abstained.logsumexp(1))
        reachable = below
        if allowed is not None:
            leaves = torch.zeros_like(allowed, dtype=torch.float32) if below is None else expert
            leaves = leaves.masked_fill(~allowed, -torch.inf)[:, self._row_of_leaf]
            reachable = trie.look_ahead(leaves, weight) if below is not None else trie.sum_below(leaves)

        nodes = torch.zeros((batch, 1), dtype=torch.long, device=device)
        scores = torch.full((batch, 1), log_share, device=device)  # of the model
        first_node = 1
        for level in range(trie.num_levels):
            if level == 0 and first_logits is not None:
                logits, first = first_logits.float(), 0
            else:
                logits, first = self._logits(state, input_ids, mask, level)
            children, present = trie.child_nodes(nodes.flatten(), trie.max_children[level])
            tokens = trie.tokens_of(children)
            logits = logits.gather(1, torch.where(present, tokens - first, 0)).masked_fill(~present, -torch.inf)
            log_probs = logits - logits.logsumexp(1, keepdim=True).nan_to_num(neginf=0.0)
            num_rows = scores.shape[1]  # beams of each query so far
            scores = (scores.view(-1, 1) + log_probs).view(batch, -1)
            children, tokens = children.view(batch, -1), tokens.view(batch, -1)
            place = (children - first_node).clamp(0, trie.level_sizes[level] - 1)
            ranked = weight * scores
            mass = None if below is None else weight * scores + below[level].gather(1, place)
            last = level + 1 == trie.num_levels
            if reachable is not None:
                hope = reachable[level].gather(1, place)
                # Beams to spare make the normalization exact: they go to prefixes without an allowed tool.
                other = -torch.inf if mass is None or last else mass - OUT_OF_REACH
                ranked = torch.where(hope > -torch.inf, ranked if below is None else ranked + hope, other)
            if last:
                break
            ranked, best = ranked.topk(min(num_beams, ranked.shape[1]))
            if mass is not None:  # what the beams leave aside counts by the estimate
                left = mass.scatter(1, best, mass.gather(1, best).masked_fill(ranked > -torch.inf, -torch.inf))
                rest.append(left.logsumexp(1))
            width = trie.max_children[level]
            nodes = torch.where(ranked > -torch.inf, children.gather(1, best), -1)
            scores = scores.gather(1, best)
            beams = torch.arange(batch, device=device)[:, None] * num_rows + best // width
            state.select(beams.flatten())
            input_ids, mask = tokens.gather(1, best).view(-1, 1), None
            first_node += trie.level_sizes[level]

        rows = self._row_of_leaf[place]
        if mass is not None:
            total = torch.stack([mass.logsumexp(1), *rest], dim=1).logsumexp(1, keepdim=True)
            if len(self._unlearned):
                if allowed is not None:
                    abstained = abstained.masked_fill(~allowed[:, self._unlearned], -torch.inf)
                ranked = torch.cat([ranked, abstained], dim=1)
                rows = torch.cat([rows, self._unlearned.expand(batch, -1)], dim=1)
            ranked = ranked - total
        ranked, best = ranked.topk(min(top_k, ranked.shape[1]))
        return rows.gather(1, best), ranked

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
    def _head_is_exact(self) -> bool:
        """Whether the model's logits are its output embeddings applied to the last hidden state."""
        ids = torch.tensor([self.encode_query("?")], device=self.model.device)
        head = self.model.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            return False
        logits = self.model(input_ids=ids).logits[:, -1]
        hidden = self.model.base_model(input_ids=ids)[0][:, -1]
        return hidden.shape[1] == head.in_features and torch.allclose(head(hidden), logits, rtol=1e-3, atol=1e-3)


def cut_prompt(input_ids: list[int], frame: list[int], max_length: int | None) -> list[int]:
    """Cut a prompt that is longer than the model reads: the beginning of what the user says is left out, never its end.

    Args:
        input_ids (`list[int]`): The prompt.
        frame (`list[int]`): The prompt of an empty text. What both begin with, such as a system message, is kept.
        max_length (`int`, *optional*): Most tokens of a prompt.
    """
    if max_length is None or len(input_ids) <= max_length:
        return input_ids
    logger.warning_once(
        f"A prompt has {len(input_ids)} tokens, and the model reads {max_length} before what it writes: the beginning of "
        "the user's text is cut."
    )
    same = (i for i, (one, other) in enumerate(zip(input_ids, frame, strict=False)) if one != other)
    head = min(next(same, len(frame)), max_length // 2)
    return [*input_ids[:head], *input_ids[head - max_length :]]
