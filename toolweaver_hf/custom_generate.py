"""`generate` of an aligned model that is loaded with `trust_remote_code=True`: it can only name tools which exist."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from .logits_process import ToolCodeLogitsProcessor
from .tokenization_toolweaver import ToolWeaverTokenizer


def generate(
    inputs: torch.LongTensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    *,
    model: PreTrainedModel,
    allowed_tools: Sequence[str] | None = None,
    code_start: str = "allowed",
    **kwargs,
):
    """Generate as [`GenerationMixin.generate`] does, in free text with codes of tools that exist.

    Args:
        inputs, generation_config, logits_processor, kwargs: As for [`GenerationMixin.generate`].
        model ([`PreTrainedModel`]): The aligned model, loaded from a folder or repository that holds its tokenizer.
        allowed_tools (`Sequence[str]`, *optional*): Ids of the only tools that may be named.
        code_start (`str`, *optional*, defaults to `"allowed"`): As for [`ToolCodeLogitsProcessor`].
    """
    if not hasattr(model, "_tool_trie"):
        commit = getattr(model.config, "_commit_hash", None)  # of a repository, the one that the model is from
        tokenizer = ToolWeaverTokenizer.from_pretrained(model.name_or_path, revision=commit)
        model._tool_trie = tokenizer.trie.to(model.device)
        model._tool_rows = {tool_id: row for row, tool_id in enumerate(tokenizer.tool_ids)}
        model._code_token_ids = tokenizer.code_token_ids
    prompts = kwargs.get("input_ids") if inputs is None else inputs
    processor = ToolCodeLogitsProcessor(
        model._tool_trie,
        mode="trajectory",
        prompt_length=0 if prompts is None else prompts.shape[1],
        code_start=code_start,
        code_token_ids=model._code_token_ids,
        allowed_rows=None if allowed_tools is None else [[model._tool_rows[tool_id] for tool_id in allowed_tools]],
    )
    kwargs.pop("custom_generate", None)
    processors = LogitsProcessorList([*(logits_processor or []), processor])
    return type(model).generate(model, inputs, generation_config, logits_processor=processors, **kwargs)
