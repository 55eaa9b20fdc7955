"""`generate` of an aligned model that is loaded with `trust_remote_code=True`: it can only name tools which exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from .logits_process import ToolCodeLogitsProcessor
from .text_expert import TextExpert
from .tokenization_toolweaver import ToolWeaverTokenizer


def generate(
    inputs: torch.LongTensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    *,
    model: PreTrainedModel,
    allowed_tools: Sequence[str] | None = None,
    code_start: str = "allowed",
    query: str | Sequence[str] | None = None,
    **kwargs,
):
    """Generate as [`GenerationMixin.generate`] does, in free text with codes of tools that exist.

    Args:
        inputs, generation_config, logits_processor, kwargs: As for [`GenerationMixin.generate`].
        model ([`PreTrainedModel`]): The aligned model, loaded from a folder or repository that holds its tokenizer.
        allowed_tools (`Sequence[str]`, *optional*): Ids of the only tools that may be named.
        query (`str` or `Sequence[str]`, *optional*):
            What the text expert reads, one for each sequence or one for all, such as the user's last message. With it
            the expert beside the model guides which tool is named; without it the model alone decides.
        code_start (`str`, *optional*, defaults to `"allowed"`): As for [`ToolCodeLogitsProcessor`].

    Raises:
        `ValueError`: naming allowed tools that the model has no codes for.
    """
    if not hasattr(model, "_tool_trie"):
        commit = getattr(model.config, "_commit_hash", None)  # of a repository, the one that the model is from
        tokenizer = ToolWeaverTokenizer.from_pretrained(model.name_or_path, revision=commit)
        model._tool_trie = tokenizer.trie.to(model.device)
        model._tool_rows = {tool_id: row for row, tool_id in enumerate(tokenizer.tool_ids)}
        model._code_token_ids, model._num_tokens = tokenizer.code_token_ids, len(tokenizer)
    unknown = [tool_id for tool_id in allowed_tools or () if tool_id not in model._tool_rows]
    if unknown:
        raise ValueError(f"these allowed tools are unknown: {', '.join(unknown[:5])}")
    prompts = kwargs.get("input_ids") if inputs is None else inputs
    processor = ToolCodeLogitsProcessor(
        model._tool_trie,
        mode="trajectory",
        prompt_length=0 if prompts is None else prompts.shape[1],
        code_start=code_start,
        code_token_ids=model._code_token_ids,
        **({} if query is None else _guidance(model, [query] if isinstance(query, str) else query)),
        allowed_rows=None if allowed_tools is None else [[model._tool_rows[tool_id] for tool_id in allowed_tools]],
        vocab_size=model._num_tokens,
    )
    kwargs.pop("custom_generate", None)
    processors = LogitsProcessorList([*(logits_processor or []), processor])
    return type(model).generate(model, inputs, generation_config, logits_processor=processors, **kwargs)


def _guidance(model: PreTrainedModel, queries: Sequence[str]) -> dict[str, Any]:
    """Score the tools for the queries by the text expert beside the model."""
    if not hasattr(model, "_text_expert"):
        commit = getattr(model.config, "_commit_hash", None)
        model._text_expert = TextExpert.from_pretrained(model.name_or_path, revision=commit)
    expert = model._text_expert
    logits = expert.logits(queries)
    rows = {tool_id: row for row, tool_id in enumerate(expert.tool_ids)}
    known = torch.tensor([rows.get(tool_id, -1) for tool_id in model._tool_rows])
    # A tool that the expert does not know is as unlikely as the last one that it does.
    logits = torch.where(known >= 0, logits[:, known], logits.min(1, keepdim=True).values)
    return {"expert_logits": logits, "model_weight": expert.model_weight}
