"""Codes of tools that exist, in vLLM.

It works from a model's folder, where this package is not installed:

```bash
PYTHONPATH=out/agent vllm serve out/agent --trust-remote-code \\
    --logits-processors custom_generate.vllm:VLLMToolCodeLogitsProcessor
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from .logits_process import ToolCodeLogitsProcessor
from .tokenization_toolweaver import ToolWeaverTokenizer


if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState


class VLLMToolCodeLogitsProcessor(LogitsProcessor):
    """Free text with whole codes in every request, as [`logits_process.ToolCodeLogitsProcessor`] in its mode
    `"trajectory"`, for vLLM's model runner 2.

    Where a row stands in the trie is read from the tokens of its request, those of a draft included, so that rows may
    change places and requests come and go.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState):
        tokenizer = ToolWeaverTokenizer.from_pretrained(vllm_config.model_config.tokenizer)
        trie = tokenizer.trie.to(req_states.device)
        self.req_states = req_states
        self.processor = ToolCodeLogitsProcessor(
            trie, mode="trajectory", code_token_ids=tokenizer.code_token_ids, vocab_size=len(tokenizer)
        )
        self._back = torch.arange(trie.num_levels - 2, -1, -1, device=req_states.device)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Mask the logits of the tokens that may not come next.

        Args:
            logits (`torch.Tensor` of shape `(num_rows, vocab_size)`): Scores of the next token of each row.
            ctx (`LogitsContext`): Which request and position each row belongs to.
        """
        request = ctx.expanded_idx_mapping.long()[:, None]
        position = ctx.pos.long()[:, None] - self._back
        history = self.req_states.all_token_ids.gpu[request, position.clamp(min=0)].long()
        # The rows of a request follow one another; a token of its draft is the input of one of them.
        row = torch.arange(len(logits), device=logits.device)[:, None] - self._back
        drafted = ctx.expanded_local_pos.long()[:, None] >= self._back
        tokens = torch.where(drafted, ctx.input_ids[row.clamp(min=0)].long(), history)
        generated = position >= self.req_states.prompt_len.gpu[request]
        return self.processor(torch.where(generated, tokens, -1), logits)
