"""`ToolRetriever`: ranked tools for a query, by search, by an aligned model's codes, or by the product of both."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import linear
from tqdm.auto import tqdm
from transformers.utils import cached_file, logging

from .text_expert import NEW_TOOL_SHARE, TEXT_EXPERT_FILE, TextExpert
from .tool_codes_file import TOOL_CODES_FILE
from .trie import CodeTrie


if TYPE_CHECKING:  # what only a model needs is imported with it: search alone starts seconds sooner
    from transformers import PreTrainedModel

    from .cache import DecodingState, DecodingTree
    from .node_states import NodeStates
    from .tokenization_toolweaver import ToolWeaverTokenizer


logger = logging.get_logger(__name__)

OUT_OF_REACH = 1e6
"""What a prefix without an allowed tool ranks below the others."""
BATCH_TOKENS = 2048
"""Tokens of a batch, beams included, where no batch size is given."""
SCORES_OF_A_TOKEN = 1024
"""How many scores of tools take about as much memory as what is kept of a token."""
NEGLIGIBLE = 1e-4
"""The share of the sum over all tools that a prefix may have at most to count in it by an estimate."""
MAX_DRAFTED_QUERIES = 4
"""The largest batch for which first codes are drafted: in larger ones, some query needs a second pass anyway."""
MAX_DRAFTED_BEAMS = 32
"""The most beams for which first codes are drafted."""
LIKELY = 0.9
"""The share of what was found of late that drafts have to cover to be worth reading, without a text expert."""
FORGETTING = 0.95
"""What is left after a query of what was found before."""
WORTHWHILE = 0.2
"""How often drafts have to spare a pass to be read with every query; otherwise they are tried with a few."""
TRIED_QUERIES = 16
"""Where drafts are not worthwhile, one query in as many is drafted, in case the next queries are of another kind."""
CALLED_PENALTY = 3.0
"""By how much a text expert's logit of a tool falls once it has answered: few queries need the same tool again."""


class RetrievedTool(NamedTuple):
    """A tool and its score, the larger the better."""

    tool_id: str
    score: float


class _Guide(NamedTuple):
    """What is known of the nodes before the model is asked: for each level a tensor of shape `(batch, level_size)`."""

    weight: float = 1.0  # of the model
    plain: list[torch.Tensor] | None = None  # what the expert says of the tools below a node
    allowed_plain: list[torch.Tensor] | None = None  # the same of the allowed ones
    below: list[torch.Tensor] | None = None  # the estimate of what model and expert say of them together
    reachable: list[torch.Tensor] | None = None  # the same of the allowed ones


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
      that the model has not learned it abstains: they count for a fifth of the tool that it thinks best, and for one
      among all at least, so that the expert decides.

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
            from .cache import can_branch, can_use_cache

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
            # The processes of a sharded model have to call it equally often, whatever their queries are.
            together = torch.distributed.is_available() and torch.distributed.is_initialized()
            self._one_row = can_branch(model)
            self._drafts = self._one_row and not (together and torch.distributed.get_world_size() > 1)
            self._prefix: tuple[Any, DecodingTree | None] = (None, None)
            self._spared, self._since_drafted = 1.0, 0  # how often drafts spared a pass of late
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
        self._first_nodes = [1 + sum(self.trie.level_sizes[:level]) for level in range(self.trie.num_levels)]
        self._recent = torch.zeros(len(self.trie), device=device)  # the probabilities of the tools found of late

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
        from .loading import load_aligned_model, split_hub_kwargs
        from .tokenization_toolweaver import ToolWeaverTokenizer

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
        batch_size: int | None = None,
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
            batch_size (`int`, *optional*):
                Queries in one forward pass. Defaults to as many as make about 2,048 tokens with their beams, so that
                long queries take no more memory than short ones.
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
        searches = self._searches()
        prompts = [[] if searches else self.encode_query(query) for query in queries]
        # Queries of like length share a batch, so that little of it is padding.
        by_length = sorted(range(len(queries)), key=lambda i: len(prompts[i]))
        results: list[list[RetrievedTool]] = [[] for _ in queries]
        batches = self._batches(by_length, [len(prompt) for prompt in prompts], batch_size, num_beams)
        for batch in tqdm(batches, desc="Retrieving", disable=not show_progress_bar):
            logits = None if self.text_expert is None else self.text_expert.logits([queries[i] for i in batch])
            mask = None if allowed is None else self._allowed_mask([allowed[i] for i in batch])
            if searches:
                found = self._search(logits, mask, top_k)
            else:
                found = self._beam_search(*self._pad([prompts[i] for i in batch]), logits, mask, num_beams, top_k)
            for i, tools in zip(batch, self.name_tools(*found), strict=True):
                results[i] = tools
        return results

    def _batches(
        self, by_length: list[int], lengths: list[int], batch_size: int | None, num_beams: int
    ) -> list[list[int]]:
        """Cut queries, in ascending order of their lengths, into batches of a size or of a number of tokens."""
        if batch_size is not None:
            return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
        batches: list[list[int]] = []
        for i in by_length:
            # What the longest of a batch takes, each does: keys and values of its tokens, or scores of all tools.
            beams_apart = self.trie is not None and not self._one_row
            tokens = lengths[i] * num_beams if beams_apart else lengths[i] + num_beams
            room = BATCH_TOKENS // max(tokens, len(self.tool_ids) // SCORES_OF_A_TOKEN, 1)
            if not batches or len(batches[-1]) >= room:
                batches.append([])
            batches[-1].append(i)
        return batches

    @torch.inference_mode()
    def model_log_probs(self, queries: Sequence[str], show_progress_bar: bool = False) -> torch.Tensor:
        """Return what the model alone says of every tool, by exhaustive search, with what tools count for on which it
        abstains.

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
            log_probs[row] = log_probs[row].clamp(min=float(scores.max()) + log_share + math.log(NEW_TOOL_SHARE))
            log_probs[row, tools[0].cpu()] = scores[0].cpu() + log_share
        return log_probs

    def encode_query(self, query: str, answered: Sequence[str] = ()) -> list[int]:
        """Return the token ids of the prompt that asks for a query's tools.

        Of a query that is longer than the model reads, the beginning is cut, with a warning.

        Args:
            query (`str`): The query.
            answered (`Sequence[str]`, *optional*): Ids of tools whose codes the answer begins with.
        """
        codes = [token_id for tool_id in answered for token_id in self.tokenizer.encode_tool(tool_id)]
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = None if positions is None else positions - len(self.tokenizer.codebook_sizes) - len(codes)
        return cut_prompt(self.tokenizer.encode_query(query), self.tokenizer.encode_query(""), room) + codes

    @torch.inference_mode()
    def read_answers(
        self, queries: Sequence[str], answered: Sequence[Sequence[str]]
    ) -> tuple[DecodingState, torch.Tensor]:
        """Read queries with the beginnings of their answers, for [`ToolRetriever.more_log_odds`] and, where it is one,
        [`ToolRetriever.choose`].

        Args:
            queries (`Sequence[str]`): The queries.
            answered (`Sequence[Sequence[str]]`): For each query the ids of the tools that its answer begins with.

        Returns:
            `tuple[DecodingState, torch.Tensor]`: what the model has read, and the logits of the next tokens, of shape
            `(batch, vocab_size)`.
        """
        from .cache import DecodingState

        prompts = [self.encode_query(*pair) for pair in zip(queries, answered, strict=True)]
        input_ids, mask = self._pad(prompts)
        state = DecodingState(self.model)
        return state, state.read(input_ids.to(self.model.device), mask.to(self.model.device))

    def _pad(self, prompts: Sequence[list[int]]) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Pad prompts on the left; return the tokens and the mask of what is no padding."""
        longest, pad = max(map(len, prompts)), self.tokenizer.pad_token_id or 0
        input_ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        return input_ids, torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def more_log_odds(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the log-odds that answers go on with a further tool rather than end, of shape `(batch,)`.

        Models learn it with the tools of queries. Whether they know it is told by [`TextExpert.tells_end`].

        Args:
            logits (`torch.Tensor` of shape `(batch, vocab_size)`): What [`ToolRetriever.read_answers`] returns.
        """
        ends = self.tokenizer.end_token_ids(self.model.generation_config.eos_token_id)
        begins, _ = self.trie.children(self.trie.roots[:1], self.trie.max_children[0])
        return logits[:, begins[0]].float().logsumexp(1) - logits[:, ends].float().logsumexp(1)

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
        if self.trie is None or (expert_logits is not None and self._searches()):
            return self._search(expert_logits, mask, top_k)
        num_beams = self._num_beams(top_k, num_beams)
        return self._beam_search(input_ids, attention_mask, expert_logits, mask, num_beams, top_k)

    def choose(
        self,
        state: DecodingState,
        logits: torch.Tensor,
        query: str,
        allowed_tools: Iterable[str] | None = None,
        called_tools: Iterable[str] = (),
        num_beams: int = 10,
        top_k: int = 10,
    ) -> list[RetrievedTool]:
        """Rank the tools that may come next in a conversation, for one sequence whose next token opens a code.

        Args:
            state ([`DecodingState`]): What the model has read of the conversation; it stays as it is.
            logits (`torch.Tensor` of shape `(1, vocab_size)`): The logits of the next token.
            query (`str`): What the text expert reads.
            allowed_tools (`Iterable[str]`, *optional*): Ids of the only tools to choose from.
            called_tools (`Iterable[str]`, *optional*):
                Ids of the tools that have answered this query. The text expert does not know of their answers and would
                name them again, so their logits are lowered by `CALLED_PENALTY`.
            num_beams (`int`, *optional*, defaults to 10): Prefixes kept at each level.
            top_k (`int`, *optional*, defaults to 10): Number of tools.
        """
        allowed = self._allowed_rows(None if allowed_tools is None else [list(allowed_tools)], 1)
        mask = None if allowed is None else self._allowed_mask(allowed)
        expert_logits = None if self.text_expert is None else self.text_expert.logits([query])
        if expert_logits is not None:
            expert_logits[:, [self._row_of_tool[tool_id] for tool_id in called_tools]] -= CALLED_PENALTY
        if self._searches():
            return self.name_tools(*self._search(expert_logits, mask, top_k))[0]
        found = self._beam_search(None, None, expert_logits, mask, num_beams, top_k, state.fork(), logits)
        return self.name_tools(*found)[0]

    def name_tools(self, rows: torch.LongTensor, scores: torch.FloatTensor) -> list[list[RetrievedTool]]:
        """Turn what `rank` returns into lists of tools."""
        return [
            [RetrievedTool(self.tool_ids[r], s) for r, s in zip(row, score, strict=True) if s > -torch.inf]
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def _searches(self) -> bool:
        """Whether the text expert ranks alone: without a model, or with one that is not to be trusted."""
        return self.trie is None or (self.text_expert is not None and self.text_expert.model_weight == 0)

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
            scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
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
        from .node_states import NodeStates

        trie, device = self.trie, self.model.device
        batch = len(input_ids if state is None else first_logits)
        guide, rest = _Guide(), []
        log_share = 0.0  # of the tools that the model has learned
        if allowed is not None:
            allowed = allowed.to(device)
        if expert_logits is not None:
            weight = self.text_expert.model_weight
            expert = expert_logits.to(device, torch.float32).log_softmax(1)
            plain, below = trie.look_ahead(expert[:, self._row_of_leaf], weight)
            guide = _Guide(weight, plain, plain, below, below)
            if len(self._unlearned):
                log_share = math.log(len(self._row_of_leaf) / len(self.tool_ids))
                abstained = expert[:, self._unlearned] - weight * math.log(len(self.tool_ids))
                rest.append(abstained.logsumexp(1))
                if allowed is not None:
                    abstained = abstained.masked_fill(~allowed[:, self._unlearned], -torch.inf)
        if allowed is not None:
            leaves = torch.zeros_like(allowed, dtype=torch.float32) if expert_logits is None else expert
            leaves = leaves.masked_fill(~allowed, -torch.inf)[:, self._row_of_leaf]
            if expert_logits is None:
                guide = guide._replace(reachable=trie.sum_below(leaves))
            else:
                allowed_plain, reachable = trie.look_ahead(leaves, guide.weight)
                guide = guide._replace(allowed_plain=allowed_plain, reachable=reachable)

        if state is None:
            states = self._read_prompts(input_ids.to(device), mask.to(device), guide, num_beams)
        else:  # the prompts were read already, up to the logits of the first level
            states = NodeStates(self.model, state=state)
            states.begin(first_logits[:, None])
        nodes = tokens = parents = torch.zeros((batch, 1), dtype=torch.long, device=device)
        scores = torch.full((batch, 1), log_share, device=device)  # of the model
        drafted, spared = states.num_nodes > 1, True
        beam_mass = None
        for level in range(trie.num_levels):
            last = level + 1 == trie.num_levels
            if level:
                wanted = nodes
                if last and (states.place(nodes) >= 0).any():
                    expanded = self._expand(states, level, nodes, scores, guide)
                    needed = self._needed(nodes, scores, level, expanded, guide, rest, top_k)
                    wanted = torch.where(needed, nodes, -1)
                if ((wanted >= 0) & (states.place(wanted) < 0)).any():
                    states.read(wanted, tokens, parents)
                    spared = False
                if beam_mass is not None:  # so does what need not be read
                    unread = (nodes >= 0) & (states.place(nodes) < 0)
                    rest.append(beam_mass.masked_fill(~unread, -torch.inf).logsumexp(1))
            children, tokens, scores, ranked, mass = self._expand(states, level, nodes, scores, guide)
            if last:
                break
            ranked, best = ranked.topk(min(num_beams, ranked.shape[1]))
            if mass is not None:  # what the beams leave aside counts by the estimate
                left = mass.scatter(1, best, mass.gather(1, best).masked_fill(ranked > -torch.inf, -torch.inf))
                rest.append(left.logsumexp(1))
                beam_mass = mass.gather(1, best)
            parents = nodes.gather(1, best // trie.max_children[level])
            nodes = torch.where(ranked > -torch.inf, children.gather(1, best), -1)
            scores, tokens = scores.gather(1, best), tokens.gather(1, best)

        leaves = (children - self._first_nodes[-1]).clamp(0, len(trie) - 1)
        rows = self._row_of_leaf[leaves]
        if drafted:
            self._spared = 0.9 * self._spared + 0.1 * spared
        if mass is None:
            self._remember(leaves, ranked)
        else:
            if len(self._unlearned):
                most = scores.max(1, keepdim=True).values
                above = guide.weight * (most + math.log(NEW_TOOL_SHARE * len(self.tool_ids))).clamp(min=0)
                rest[0] = rest[0] + above[:, 0]
                ranked = torch.cat([ranked, abstained + above], dim=1)
                rows = torch.cat([rows, self._unlearned.expand(batch, -1)], dim=1)
            total = torch.stack([mass.logsumexp(1), *rest], dim=1).logsumexp(1, keepdim=True)
            ranked = ranked - total
        ranked, best = ranked.topk(min(top_k, ranked.shape[1]))
        return rows.gather(1, best), ranked

    def _expand(
        self, states: NodeStates, level: int, nodes: torch.LongTensor, scores: torch.Tensor, guide: _Guide
    ) -> tuple[torch.Tensor, ...]:
        """Score the children of all beams.

        Args:
            nodes, scores (`torch.Tensor` of shape `(batch, num_beams)`): The beams and what the model says of them.

        Returns:
            `tuple` of tensors of shape `(batch, num_beams * width)`: the children, their tokens, what the model says of
            them, what they are ranked by and, with guidance, the estimate of the sum over the tools below them. All
            scores are `-inf` where there is no child, or the beam was not read.
        """
        trie, batch = self.trie, len(nodes)
        logits, first = self._logits(states.values(nodes).flatten(0, 1), level, states.module is None)
        children, present = trie.child_nodes(nodes.flatten(), trie.max_children[level])
        tokens = trie.tokens_of(children)
        present = present & (states.place(nodes).view(-1, 1) >= 0)
        logits = logits.gather(1, torch.where(present, tokens - first, 0)).masked_fill(~present, -torch.inf)
        log_probs = logits - logits.logsumexp(1, keepdim=True).nan_to_num(neginf=0.0)
        scores = (scores.view(-1, 1) + log_probs).view(batch, -1)
        children, tokens = children.view(batch, -1), tokens.view(batch, -1)
        place = (children - self._first_nodes[level]).clamp(0, trie.level_sizes[level] - 1)
        ranked, mass = guide.weight * scores, None
        if guide.below is not None:
            mass = ranked + guide.below[level].gather(1, place)
        if guide.reachable is not None:
            hope = guide.reachable[level].gather(1, place)
            # Beams to spare make the normalization exact: they go to prefixes without an allowed tool.
            other = -torch.inf if mass is None or level + 1 == trie.num_levels else mass - OUT_OF_REACH
            ranked = torch.where(hope > -torch.inf, ranked if mass is None else ranked + hope, other)
        return children, tokens, scores, ranked, mass

    def _needed(
        self,
        nodes: torch.LongTensor,
        scores: torch.Tensor,
        level: int,
        expanded: tuple[torch.Tensor, ...],
        guide: _Guide,
        rest: list[torch.Tensor],
        top_k: int,
    ) -> torch.BoolTensor:
        """Tell which of the last beams can hold one of the `top_k` tools, count in the normalization, or hold the tool
        that the model thinks best where tools that it has not learned count by that.

        By the model a tool has at most the probability of its prefix. So what was found below the beams that have been
        read says of the others that they need not be read.
        """
        trie, (_, _, by_model, ranked, mass) = self.trie, expanded
        found = ranked.topk(min(top_k, ranked.shape[1])).values[:, -1:]
        if ranked.shape[1] < top_k:
            found = torch.full_like(found, -torch.inf)
        if mass is None:
            return scores >= found
        place = (nodes - self._first_nodes[level - 1]).clamp(0, trie.level_sizes[level - 1] - 1)
        at_most = guide.weight * scores
        best = torch.full_like(guide.allowed_plain[level - 1], -torch.inf).scatter_reduce(
            1, trie.node_of_leaf[level - 1].expand(len(nodes), -1), guide.allowed_plain[-1], "amax"
        )
        allowed = at_most + best.gather(1, place)
        total = torch.stack([mass.logsumexp(1), *rest], dim=1).logsumexp(1, keepdim=True)
        counts = at_most + guide.plain[level - 1].gather(1, place) >= total + math.log(NEGLIGIBLE)
        needed = counts | ((allowed >= found) & (allowed > -torch.inf))
        return needed | (scores > by_model.max(1, keepdim=True).values) if len(self._unlearned) else needed

    def _read_prompts(
        self, input_ids: torch.LongTensor, mask: torch.LongTensor, guide: _Guide, num_beams: int
    ) -> NodeStates:
        """Read the prompts and, where it may spare a pass, the nodes that their beams are expected to reach."""
        from .node_states import NodeStates, NodeTree

        module = None if self.full_head else self.model.base_model
        if not self._one_row:
            states = NodeStates(self.model, module)
            states.start(input_ids, mask)
            return states
        prefix = self._kept_prefix(module)
        if prefix is not None:
            length = prefix.attention_mask.shape[1]
            place = mask.cumsum(1) - 1
            begins = (mask > 0) & (place < length)
            alike = input_ids == self._prefix_ids[place.clamp(0, length - 1)]
            if bool((alike | ~begins).all()) and int(mask.sum(1).min()) > length:
                input_ids, mask = input_ids[:, length:], mask.masked_fill(begins, 0)[:, length:]
            else:
                prefix = None
        nodes = self._draft(guide, num_beams, len(input_ids))
        states = NodeTree(self.model, module, prefix)
        states.start(input_ids, mask, *nodes)
        return states

    def _kept_prefix(self, module: torch.nn.Module | None) -> DecodingTree | None:
        """Return what the model has read of the tokens that every prompt begins with, from its present weights."""
        if hasattr(self.model, "peft_config"):
            return None  # adapters are switched without a trace in the weights
        weights = [(id(weight), 0 if weight.is_inference() else weight._version) for weight in self.model.parameters()]
        state = (self.model.dtype, self.model.device, weights)
        if self._prefix[0] != state:
            prompts = [self.encode_query(query) for query in ("Will it rain?", "a euro in dollars")]
            ids = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*prompts, strict=False))]
            self._prefix_ids = torch.tensor(ids, dtype=torch.long, device=self.model.device)
            tree = None
            if ids:
                from .cache import DecodingTree

                tree = DecodingTree(self.model)
                tree.read(self._prefix_ids[None], module=module)
            self._prefix = (state, tree)
        return self._prefix[1]

    def _draft(self, guide: _Guide, num_beams: int, batch: int) -> tuple[torch.LongTensor, ...]:
        """Guess the inner nodes that the beams will reach: by the expert, without it by the tools found of late.

        Returns:
            `tuple` of three tensors of shape `(batch, num_drafts)`: the nodes, -1 for none, their tokens and the nodes
            above them.
        """
        trie, device = self.trie, self._row_of_leaf.device
        drafts = [torch.zeros((batch, 0), dtype=torch.long, device=device)] * 3
        if not self._drafts or batch > MAX_DRAFTED_QUERIES or num_beams > MAX_DRAFTED_BEAMS:
            return tuple(drafts)
        self._since_drafted += 1
        if self._spared < WORTHWHILE and self._since_drafted < TRIED_QUERIES:
            return tuple(drafts)
        if guide.below is not None:
            weights = [
                hope + guide.weight * plain for hope, plain in zip(guide.reachable, guide.allowed_plain, strict=True)
            ]
        else:
            weights = trie.sum_below(self._recent.log()[None])
            likely = weights[0].topk(min(num_beams, weights[0].shape[1])).values.exp().sum()
            if likely < LIKELY * self._recent.sum() or not likely:
                return tuple(drafts)
            weights = [weight.expand(batch, -1) for weight in weights]
        self._since_drafted = 0
        drafted = torch.ones((batch, 1), dtype=torch.bool, device=device)  # of the nodes of the level above
        for level in range(trie.num_levels - 1):
            above = torch.zeros(trie.level_sizes[level], dtype=torch.long, device=device)
            if level:
                above[trie.node_of_leaf[level]] = trie.node_of_leaf[level - 1]
            weight = weights[level].masked_fill(~drafted[:, above], -torch.inf)
            values, best = weight.topk(min(num_beams, weight.shape[1]))
            drafted = torch.zeros_like(weight, dtype=torch.bool).scatter(1, best, values > -torch.inf)
            nodes = torch.where(values > -torch.inf, best + self._first_nodes[level], -1)
            parents = above[best] + (self._first_nodes[level - 1] if level else 0)
            new = nodes, trie.tokens_of(nodes.clamp(min=0)), parents
            drafts = [torch.cat(pair, dim=1) for pair in zip(drafts, new, strict=True)]
        return tuple(drafts)

    def _remember(self, leaves: torch.LongTensor, log_probs: torch.Tensor) -> None:
        """Note what was found, for the drafts of the next queries."""
        found = torch.zeros_like(self._recent).index_add(0, leaves.flatten(), log_probs.exp().flatten())
        self._recent = self._recent * FORGETTING ** len(leaves) + found

    def _logits(self, values: torch.Tensor, level: int, full_head: bool) -> tuple[torch.Tensor, int]:
        """Turn what `NodeStates` returns into logits of a level's tokens, and tell the token that they begin with."""
        if full_head:
            return values.float(), 0
        head, first = self.model.get_output_embeddings(), self.tokenizer.level_offsets[level]
        rows = slice(first, first + self.tokenizer.codebook_sizes[level])
        return linear(values, head.weight[rows], None if head.bias is None else head.bias[rows]).float(), first

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
