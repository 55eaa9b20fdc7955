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
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState


MODEL_WEIGHT = 0.5


class VLLMToolCodeLogitsProcessor(LogitsProcessor):
    """Free text with whole codes in every request, as [`logits_process.ToolCodeLogitsProcessor`] in its mode
    `"trajectory"`, for vLLM's model runner 2.

    Where a row stands in the trie is read from the tokens of its request, those of a draft included, so that rows may
    change places and requests come and go.

    A request may bring what a [`TextExpert`] says of the tools, to guide which of them is named, in
    `SamplingParams.extra_args` (`vllm_xargs` of a request over HTTP): a list of tool ids, `scored_tools`, and one of
    their log-probabilities, `tool_scores`. A tool that they leave out is as probable as the last of them. The expert's
    `model_weight` may stand beside them, 0.5 by default.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState):
        tokenizer = ToolWeaverTokenizer.from_pretrained(vllm_config.model_config.tokenizer)
        trie = tokenizer.trie.to(req_states.device)
        self.req_states = req_states
        self.processor = ToolCodeLogitsProcessor(
            trie, mode="trajectory", code_token_ids=tokenizer.code_token_ids, vocab_size=len(tokenizer)
        )
        self._back = torch.arange(trie.num_levels - 2, -1, -1, device=req_states.device)
        self._tool_rows = {tool_id: row for row, tool_id in enumerate(tokenizer.tool_ids)}
        self._guided = torch.zeros((req_states.max_num_reqs, 1), dtype=torch.bool, device=req_states.device)
        self._weights = torch.ones((req_states.max_num_reqs, 1), device=req_states.device)
        self._hopes: torch.Tensor | None = None  # made with the first request that brings scores

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Check the scores of a request before it is taken.

        Raises:
            `ValueError`: where they are not as the class describes them.
        """
        tool_ids, scores, weight = _read_guidance(params)
        if tool_ids is None and scores is None:
            return
        largest = torch.finfo(torch.float).max
        if not (
            isinstance(tool_ids, list)
            and isinstance(scores, list)
            and len(tool_ids) == len(scores) > 0
            and all(isinstance(tool_id, str) for tool_id in tool_ids)
            and all(isinstance(number, int | float) and abs(number) <= largest for number in (weight, *scores))
        ):
            raise ValueError(
                "scored_tools must be a list of tool ids, tool_scores one of as many log-probabilities, and model_weight "
                "a number"
            )

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take in a request, with the scores of the tools that it may bring."""
        tool_ids, scores, weight = _read_guidance(sampling_params)
        self._guided[req_idx] = scores is not None
        if tool_ids is not None and scores is not None:
            rows = [self._tool_rows.get(tool_id, -1) for tool_id in tool_ids]
            known = {row: score for row, score in zip(rows, scores, strict=True) if row >= 0}
            logits = torch.full((1, len(self._tool_rows)), float(min(scores)), device=self._guided.device)
            logits[0, list(known)] = torch.tensor(list(known.values()), dtype=torch.float, device=logits.device)
            hopes = self.processor.look_ahead(logits, weight)
            if self._hopes is None:
                self._hopes = hopes.new_zeros((len(self._guided), hopes.shape[1]))
            self._hopes[req_idx], self._weights[req_idx] = hopes[0], weight
        return True

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
        masked, nodes = self.processor.mask(torch.where(generated, tokens, -1), logits)
        if self._hopes is None:
            return masked
        request = request[:, 0]
        guided = self.processor.guide(masked, nodes, self._hopes, request, self._weights[request])
        return torch.where(self._guided[request], guided, masked)


def _read_guidance(params: SamplingParams) -> tuple[list[str] | None, list[float] | None, float]:
    given = params.extra_args or {}
    return given.get("scored_tools"), given.get("tool_scores"), given.get("model_weight", MODEL_WEIGHT)
