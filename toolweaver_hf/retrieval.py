"""`ToolRetriever`: ranked tools for a query, by beam search over the codes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from .tokenization_toolweaver import HUB_KWARGS, ToolWeaverTokenizer
from .trie import CodeTrie


class RetrievedTool(NamedTuple):
    """A tool and its score, the larger the better."""

    tool_id: str
    score: float


def load_aligned_model(folder: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """Load a model that was aligned, from a folder or a repository of the Hub.

    Where it holds a LoRA adapter alone, the base model is loaded, gets room for the code tokens, and takes the adapter
    into its weights.

    Args:
        folder (`str`): The folder or repository.
        kwargs: Passed on to [`AutoModelForCausalLM.from_pretrained`], such as `dtype` and `device_map`.
    """
    hub_kwargs = {name: value for name, value in kwargs.items() if name in HUB_KWARGS}
    if find_adapter_config_file(os.fspath(folder), **hub_kwargs) is None:
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(folder, **kwargs).merge_and_unload()


class ToolRetriever:
    r"""
    Ranks the tools of a catalogue for a query with an aligned language model.

    The model reads the query as a user's message and is asked for the code that answers it. A beam search over the
    trie of the codes finds the most probable ones; the score of a tool is the log-probability of its code given the
    query, summed over the levels, with the probabilities of the model's whole vocabulary.

    Args:
        model ([`PreTrainedModel`]):
            The aligned causal language model.
        tokenizer ([`ToolWeaverTokenizer`]):
            Its tokenizer.

    Example:

    ```python
    >>> from toolweaver_hf import ToolRetriever

    >>> retriever = ToolRetriever.from_pretrained("out/retrieval")
    >>> retriever("Is it a good day for the park?", top_k=2)
    [[RetrievedTool(tool_id='weather', score=-0.3), RetrievedTool(tool_id='air_quality', score=-1.5)]]
    ```
    """

    def __init__(self, model: PreTrainedModel, tokenizer: ToolWeaverTokenizer):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tool_ids = tokenizer.tool_ids
        self.trie = CodeTrie(tokenizer.tool_code_ids).to(model.device)
        self._row_of_tool = {tool_id: row for row, tool_id in enumerate(self.tool_ids)}

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **model_kwargs) -> ToolRetriever:
        """Load an aligned model and its tokenizer from a folder or a repository of the Hub.

        Args:
            folder (`str`): The folder or repository.
            model_kwargs: Passed on to [`AutoModelForCausalLM.from_pretrained`], such as `dtype` and `device_map`.
                Those that say where from, such as `revision` and `token`, hold for the tokenizer, too.
        """
        model = load_aligned_model(folder, **model_kwargs)
        hub_kwargs = {name: value for name, value in model_kwargs.items() if name in HUB_KWARGS}
        return cls(model, ToolWeaverTokenizer.from_pretrained(folder, **hub_kwargs))

    def __call__(
        self,
        queries: str | Sequence[str],
        top_k: int = 5,
        num_beams: int | None = None,
        allowed_tools: Iterable[str] | None = None,
        batch_size: int = 32,
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
            allowed_tools (`Iterable[str]`, *optional*):
                Ids of the only tools that may be retrieved.
            batch_size (`int`, *optional*, defaults to 32):
                Queries in one forward pass.
            show_progress_bar (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar over the batches.

        Returns:
            `list[list[RetrievedTool]]`: for each query its tools, best first.

        Raises:
            `ValueError`: if an allowed tool has no code.
        """
        queries = [queries] if isinstance(queries, str) else list(queries)
        num_beams = max(2 * top_k, 10) if num_beams is None else max(num_beams, top_k)
        allowed = None
        if allowed_tools is not None:
            allowed_tools = list(allowed_tools)
            unknown = [tool_id for tool_id in allowed_tools if tool_id not in self._row_of_tool]
            if unknown:
                raise ValueError(f"these allowed tools have no code: {', '.join(unknown[:5])}")
            allowed = self.trie.allow([[self._row_of_tool[tool_id] for tool_id in allowed_tools]])
        prompts = [
            self.tokenizer.encode_conversation([{"role": "user", "content": query}], add_generation_prompt=True)
            for query in queries
        ]
        # Queries of like length share a batch, so that little of it is padding.
        by_length = sorted(range(len(queries)), key=lambda i: len(prompts[i]["input_ids"]))
        results: list[list[RetrievedTool]] = [[] for _ in queries]
        starts = range(0, len(queries), batch_size)
        for start in tqdm(starts, desc="Retrieving", disable=not show_progress_bar):
            batch = by_length[start : start + batch_size]
            rows, scores = self._beam_search([prompts[i]["input_ids"] for i in batch], num_beams, allowed)
            for i, row, score in zip(batch, rows.tolist(), scores.tolist(), strict=True):
                found = [RetrievedTool(self.tool_ids[r], s) for r, s in zip(row, score, strict=True) if s > -torch.inf]
                results[i] = found[:top_k]
        return results

    @torch.inference_mode()
    def _beam_search(
        self, prompts: list[list[int]], num_beams: int, allowed: torch.Tensor | None
    ) -> tuple[torch.LongTensor, torch.FloatTensor]:
        """Search the codes for a batch of prompts.

        Returns:
            `tuple` of two tensors of shape `(batch, beams)`: the tools, as rows of `tool_ids`, and their
            log-probabilities, descending; `-inf` where there is no further tool.
        """
        device, trie, batch = self.model.device, self.trie, len(prompts)
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id or 0
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        nodes = torch.zeros((batch, 1), dtype=torch.long, device=device)
        scores = torch.zeros((batch, 1), device=device)
        cache = DynamicCache(config=self.model.config)
        for level in range(trie.num_levels):
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            output = self.model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            log_probs = output.logits[:, -1].float().log_softmax(-1)
            width = trie.max_children[level]
            permitted = None if allowed is None else allowed.expand(nodes.numel(), -1)
            tokens, present = trie.children(nodes.flatten(), width, permitted)
            candidates = log_probs.gather(1, tokens).masked_fill(~present, -torch.inf)
            candidates = (scores.flatten()[:, None] + candidates).view(batch, -1)
            scores, best = candidates.topk(min(num_beams, candidates.shape[1]), dim=1)
            beam = best // width  # the beam that each candidate goes on from
            tokens = tokens.view(batch, -1).gather(1, best)
            nodes = trie.step(nodes.gather(1, beam).flatten(), tokens.flatten()).view(batch, -1)
            if level + 1 < trie.num_levels:
                rows = (torch.arange(batch, device=device)[:, None] * (len(mask) // batch) + beam).flatten()
                cache.batch_select_indices(rows)
                mask = torch.cat([mask[rows], mask.new_ones((len(rows), 1))], dim=1)
                input_ids = tokens.view(-1, 1)
        first_leaf = trie.num_nodes - len(trie)
        return trie.tools[(nodes - first_leaf).clamp(min=0)], scores
