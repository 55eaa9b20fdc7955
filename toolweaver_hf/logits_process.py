"""`ToolCodeLogitsProcessor`: generation that can only name tools which exist."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from .trie import CodeTrie


class ToolCodeLogitsProcessor(LogitsProcessor):
    r"""
    [`LogitsProcessor`] that constrains generation to the codes of a trie.

    It keeps no state: where a row stands in the trie is read from its `input_ids`, so that beams may be reordered,
    repeated and dropped freely.

    Args:
        trie ([`CodeTrie`]):
            The codes of the tools.
        mode (`str`, *optional*, defaults to `"retrieval"`):
            `"retrieval"`: the new tokens are one code, then the end of the sequence. `"trajectory"`: free text; once
            the first token of a code has been generated, the other levels follow, then free text again.
        prompt_length (`int`, *optional*):
            Number of tokens in the (padded) prompt. Needed in the mode `"retrieval"`; in `"trajectory"` it keeps code
            tokens at the end of a prompt from being gone on with.
        eos_token_id (`int`, *optional*):
            The token that follows a whole code in the mode `"retrieval"`, where it is needed.
        code_start (`str`, *optional*, defaults to `"allowed"`):
            Whether a code may start in free text: `"allowed"`, `"forbidden"` or `"forced"` (it must, at once).
        code_token_ids (`Sequence[int]`, *optional*):
            All tokens of codes, such as [`ToolWeaverTokenizer.code_token_ids`], to keep those that no tool uses out of
            free text. Defaults to the tokens in the trie.
        allowed_tools (`Sequence[Sequence[int]]`, *optional*):
            For each sequence of the batch the tools that it may name, as rows of the trie's `tool_code_ids`. One set
            alone holds for all sequences. Defaults to every tool.

    Raises:
        `ValueError`: for an unknown mode, or a missing argument of the mode.

    Example:

    ```python
    >>> processor = ToolCodeLogitsProcessor(
    ...     CodeTrie(tokenizer.tool_code_ids), prompt_length=inputs.input_ids.shape[1], eos_token_id=tokenizer.eos_token_id
    ... )
    >>> output = model.generate(**inputs, num_beams=5, num_return_sequences=5, logits_processor=[processor])
    ```
    """

    def __init__(
        self,
        trie: CodeTrie,
        mode: str = "retrieval",
        prompt_length: int | None = None,
        eos_token_id: int | None = None,
        code_start: str = "allowed",
        code_token_ids: Sequence[int] | None = None,
        allowed_tools: Sequence[Sequence[int]] | None = None,
    ):
        if mode not in ("retrieval", "trajectory"):
            raise ValueError(f"mode must be 'retrieval' or 'trajectory', not {mode!r}")
        if code_start not in ("allowed", "forbidden", "forced"):
            raise ValueError(f"code_start must be 'allowed', 'forbidden' or 'forced', not {code_start!r}")
        if mode == "retrieval" and (prompt_length is None or eos_token_id is None):
            raise ValueError("the mode 'retrieval' needs prompt_length and eos_token_id")
        self.trie = trie
        self.mode = mode
        self.prompt_length = prompt_length
        self.eos_token_id = eos_token_id
        self.code_start = code_start
        self.code_tokens = trie.tokens[1:].unique() if code_token_ids is None else torch.as_tensor(code_token_ids)
        self.allowed = None if allowed_tools is None else trie.allow(allowed_tools)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Mask the scores of the tokens that may not come next.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size * num_beams, sequence_length)`): The tokens so far.
            scores (`torch.FloatTensor` of shape `(batch_size * num_beams, vocab_size)`): Scores of the next token.

        Returns:
            `torch.FloatTensor` of the shape of `scores`, with `-inf` for every token that is not allowed.
        """
        self.trie = self.trie.to(scores.device)
        self.code_tokens = self.code_tokens.to(scores.device)
        allowed = None
        if self.allowed is not None:
            self.allowed = self.allowed.to(scores.device)
            # The beams of a sequence stand together, in the order of the batch.
            allowed = self.allowed.repeat_interleave(len(scores) // len(self.allowed), dim=0)
        if self.mode == "retrieval":
            return self._retrieval(input_ids, scores, allowed)
        return self._trajectory(input_ids, scores, allowed)

    def _retrieval(self, input_ids, scores, allowed):
        depth = input_ids.shape[1] - self.prompt_length
        masked = torch.full_like(scores, float("-inf"))
        if depth >= self.trie.num_levels:
            masked[:, self.eos_token_id] = scores[:, self.eos_token_id]
            return masked
        nodes = self.trie.walk(input_ids[:, self.prompt_length :])
        tokens, present = self.trie.children(nodes, self.trie.max_children[depth], allowed)
        _keep_(masked, scores, tokens, present)
        # A row that left the trie, such as a spare beam of probability zero, can only end.
        lost = ~present.any(1)
        masked[:, self.eos_token_id] = torch.where(lost, scores[:, self.eos_token_id], masked[:, self.eos_token_id])
        return masked

    def _trajectory(self, input_ids, scores, allowed):
        trie = self.trie
        # An unfinished code at the end of a row has at most num_levels - 1 tokens; only one suffix can be one, for
        # the tokens of the levels differ. Free text stands at the root.
        start = 0 if self.prompt_length is None else self.prompt_length
        nodes = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        for length in range(1, min(trie.num_levels, input_ids.shape[1] - start + 1)):
            reached = trie.walk(input_ids[:, -length:])
            nodes = torch.where(reached > 0, reached, nodes)
        inside = (nodes > 0)[:, None]
        tokens, present = trie.children(nodes, max(trie.max_children), allowed)
        if self.code_start == "forced":
            masked = torch.full_like(scores, float("-inf"))
        else:
            masked = scores.index_fill(1, self.code_tokens, float("-inf"))
            masked.masked_fill_(inside, float("-inf"))
        if self.code_start == "forbidden":
            present = present & inside
        return _keep_(masked, scores, tokens, present)


def _keep_(
    masked: torch.FloatTensor, scores: torch.FloatTensor, tokens: torch.LongTensor, present: torch.BoolTensor
) -> torch.FloatTensor:
    """Copy the scores of the tokens that are present into `masked`, row by row, in place."""
    # Absent entries repeat the row's first token, so that writing them again changes nothing.
    first = present.to(torch.uint8).argmax(1, keepdim=True)
    tokens = torch.where(present, tokens, tokens.gather(1, first))
    values = torch.where(present.any(1, keepdim=True), scores.gather(1, tokens), masked.gather(1, tokens))
    return masked.scatter_(1, tokens, values)
