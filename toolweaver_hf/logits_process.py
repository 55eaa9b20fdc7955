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
    repeated and dropped freely. What a step costs depends on the batch and the vocabulary, not on the number of tools.
    The scores that stay are as they were; with beams, `renormalize_logits=True` makes `generate` rank by their
    probabilities among each other, which is what the models are trained for.

    Args:
        trie ([`CodeTrie`]):
            The codes of the tools. The tokens of each level differ from those of the others.
        mode (`str`, *optional*, defaults to `"retrieval"`):
            `"retrieval"`: the new tokens are one code, then the end of the sequence. `"trajectory"`: free text; once
            the first token of a code has been generated, the other levels follow, then free text again.
        prompt_length (`int`, *optional*):
            Number of tokens in the (padded) prompt. Needed in the mode `"retrieval"`; in `"trajectory"` it keeps code
            tokens at the end of a prompt from being gone on with.
        eos_token_id (`int`, `Sequence[int]` or `torch.Tensor`, *optional*):
            The tokens of which one follows a whole code in the mode `"retrieval"`, where it is needed.
        code_start (`str`, *optional*, defaults to `"allowed"`):
            Whether a code may start in free text: `"allowed"`, `"forbidden"` or `"forced"` (it must, at once).
        code_token_ids (`Sequence[int]`, *optional*):
            All tokens of codes, such as [`ToolWeaverTokenizer.code_token_ids`], to keep those that no tool uses out of
            free text. Defaults to the tokens in the trie.
        expert_logits (`torch.Tensor` of shape `(num_sequences, num_tools)`, *optional*):
            What a [`TextExpert`] says of the tools, in the order of the trie's `tool_code_ids`, for each sequence of the
            batch or once for all. It guides which code is written, and leaves how probable it is that one is written as
            it was: among the tokens that go on to a tool, scores become those of the product of model and expert.
        model_weight (`float`, *optional*, defaults to 0.5):
            The weight of the model's log-probabilities in that product.
        allowed_rows (`Sequence[Sequence[int]]`, *optional*):
            For each sequence of the batch the tools that it may name, as rows of the trie's `tool_code_ids`. One set
            alone holds for all sequences. Defaults to every tool.
        vocab_size (`int`, *optional*):
            Number of tokens of the tokenizer. What scores a model has beyond them, where its embeddings are padded, are
            masked. Defaults to all scores.

    Raises:
        `ValueError`: for an unknown mode, a missing argument of the mode, or no tool where one is forced; in a step,
            for rows that the sets of allowed tools do not divide, or scores of too few tokens.

    Example:

    ```python
    >>> processor = ToolCodeLogitsProcessor(
    ...     tokenizer.trie, prompt_length=inputs.input_ids.shape[1], eos_token_id=tokenizer.eos_token_id
    ... )
    >>> output = model.generate(**inputs, num_beams=5, num_return_sequences=5, logits_processor=[processor])
    ```
    """

    supports_continuous_batching = False  # there, a step sees one token of a row, not the row

    def __init__(
        self,
        trie: CodeTrie,
        mode: str = "retrieval",
        prompt_length: int | None = None,
        eos_token_id: int | Sequence[int] | torch.Tensor | None = None,
        code_start: str = "allowed",
        code_token_ids: Sequence[int] | None = None,
        allowed_rows: Sequence[Sequence[int]] | None = None,
        expert_logits: torch.Tensor | None = None,
        model_weight: float = 0.5,
        vocab_size: int | None = None,
    ):
        if mode not in ("retrieval", "trajectory"):
            raise ValueError(f"mode must be 'retrieval' or 'trajectory', not {mode!r}")
        if code_start not in ("allowed", "forbidden", "forced"):
            raise ValueError(f"code_start must be 'allowed', 'forbidden' or 'forced', not {code_start!r}")
        if mode == "retrieval" and (prompt_length is None or eos_token_id is None):
            raise ValueError("the mode 'retrieval' needs prompt_length and eos_token_id")
        self.mode, self.vocab_size = mode, vocab_size
        self.prompt_length = prompt_length or 0
        self.eos_token_ids = [] if eos_token_id is None else torch.as_tensor(eos_token_id).flatten().tolist()
        self.code_start = code_start
        self.trie = trie if allowed_rows is None else trie.restrict(allowed_rows)
        if code_start == "forced" and (self.trie.roots < 0).any():
            raise ValueError("a sequence that must name a tool has an empty set of allowed tools")
        # What may follow where no code has begun: added to the scores of a slice of the vocabulary, for each root.
        tokens, present = self.trie.children(self.trie.roots, self.trie.max_children[0])
        starts = tokens[present].cpu()
        codes = torch.as_tensor(trie.code_tokens if code_token_ids is None else code_token_ids)
        masked = codes if self._keeps_text else starts
        low, high = (int(masked.min()), int(masked.max()) + 1) if len(masked) else (0, 1)
        self._slice = slice(low, high)
        self._bias = torch.full((len(tokens), high - low), 0.0 if self._keeps_text else float("-inf"))
        self._bias[:, masked - low] = float("-inf")
        if mode == "retrieval" or code_start != "forbidden":
            self._bias[present.nonzero()[:, 0].cpu(), starts - low] = 0.0

        self.model_weight = model_weight
        self._hopes = None if expert_logits is None else self.look_ahead(expert_logits, model_weight)

    def look_ahead(self, expert_logits: torch.Tensor, model_weight: float) -> torch.Tensor:
        """Return what an expert lets hope for below each node, of shape `(num_sequences, num_nodes)`, for [`guide`].

        Args:
            expert_logits (`torch.Tensor` of shape `(num_sequences, num_tools)`), model_weight (`float`):
                As for the constructor.
        """
        leaves = expert_logits.float().log_softmax(1)[:, self.trie.tools.to(expert_logits.device)]
        roots = leaves.new_zeros((len(leaves), self.trie.num_nodes - sum(self.trie.level_sizes)))
        return torch.cat([roots, *self.trie.to(leaves.device).look_ahead(leaves, model_weight)[1]], dim=1)

    @property
    def _keeps_text(self) -> bool:
        return self.mode == "trajectory" and self.code_start != "forced"

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the scores of the tokens that may not come next.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size * num_beams, sequence_length)`): The tokens so far.
            scores (`torch.FloatTensor` of shape `(batch_size * num_beams, vocab_size)`): Scores of the next token.

        Returns:
            `torch.FloatTensor` of the shape of `scores`, with `-inf` for every token that is not allowed.
        """
        masked, nodes = self.mask(input_ids, scores)
        if self._hopes is None:
            return masked
        if len(masked) % len(self._hopes):
            raise ValueError(f"the expert's logits of {len(self._hopes)} sequences cannot hold for {len(masked)} rows")
        sequences = torch.arange(len(masked), device=nodes.device) // (len(masked) // len(self._hopes))
        return self.guide(masked, nodes, self._hopes, sequences, self.model_weight)

    def mask(self, input_ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.LongTensor]:
        """Mask the scores, without an expert's guidance.

        Returns:
            `tuple[torch.FloatTensor, torch.LongTensor]`: the scores, and the node of the trie whose children may come
            next in each row, of shape `(batch_size * num_beams,)`; -1 where none may.
        """
        if self._bias.device != scores.device:
            self.trie, self._bias = self.trie.to(scores.device), self._bias.to(scores.device)
            self._hopes = None if self._hopes is None else self._hopes.to(scores.device)
        num_sets = len(self.trie.roots)
        if len(scores) % num_sets:
            raise ValueError(f"{num_sets} sets of allowed tools cannot hold for {len(scores)} rows")
        if self._slice.stop > scores.shape[1] or self.trie.vocab_size > scores.shape[1]:
            raise ValueError(
                f"the scores are of {scores.shape[1]} tokens, but codes have tokens up to {self.trie.vocab_size - 1}: "
                "resize the model's embeddings to the tokenizer"
            )
        # The beams of a sequence stand together, in the order of the batch.
        beams = len(scores) // num_sets
        if num_sets == 1:
            roots, bias = self.trie.roots.expand(beams), self._bias
        else:
            roots, bias = self.trie.roots.repeat_interleave(beams), self._bias.repeat_interleave(beams, dim=0)
        step = self._retrieval if self.mode == "retrieval" else self._trajectory
        return step(input_ids[:, self.prompt_length :], scores, roots, bias)

    def guide(
        self,
        masked: torch.Tensor,
        nodes: torch.LongTensor,
        hopes: torch.Tensor,
        sequences: torch.Tensor,
        model_weight: float | torch.Tensor,
    ) -> torch.Tensor:
        """Move scores among the children of each row's node, so that they follow the product of model and expert.

        Args:
            masked, nodes: What [`mask`] returns.
            hopes (`torch.Tensor` of shape `(num_sequences, num_nodes)`):
                What [`look_ahead`] returns.
            sequences (`torch.LongTensor` of shape `(num_rows,)`): The row of `hopes` that holds for each row.
            model_weight (`float` or `torch.Tensor` of shape `(num_rows, 1)`): The weight that they were made with.
        """
        trie = self.trie
        children, present = trie.child_nodes(nodes, max(trie.max_children))
        tokens = torch.where(present, trie.tokens_of(children), 0)
        scores = masked.gather(1, tokens).masked_fill(~present, -torch.inf)
        total = scores.logsumexp(1, keepdim=True)
        ahead = hopes[sequences[:, None], children.clamp(max=trie.num_nodes - 1)]
        # Also with a weight of 0, whose product with -inf is NaN
        guided = (model_weight * (scores - total) + ahead).masked_fill(scores == -torch.inf, -torch.inf)
        guided = total + guided - guided.logsumexp(1, keepdim=True)
        guided = torch.where((scores > -torch.inf) & (guided == guided), guided, masked.gather(1, tokens))
        # A place without a child repeats the first token's value, whatever that is.
        first = torch.where(present[:, :1], tokens[:, :1], 0)
        value = torch.where(present[:, :1], guided[:, :1], masked[:, :1])
        return masked.scatter(1, torch.where(present, tokens, first), torch.where(present, guided, value))

    def _retrieval(self, new_ids, scores, roots, bias):
        trie, depth, nodes = self.trie, new_ids.shape[1], torch.full_like(roots, -1)
        masked = torch.full_like(scores, float("-inf"))
        if depth >= trie.num_levels:
            masked[:, self.eos_token_ids] = scores[:, self.eos_token_ids]
        elif depth == 0:
            masked[:, self._slice] = scores[:, self._slice] + bias
            nodes = roots
            ends = scores[:, self.eos_token_ids].masked_fill((roots >= 0)[:, None], float("-inf"))
            masked[:, self.eos_token_ids] = ends
        else:
            nodes = trie.walk(new_ids, roots)
            tokens, present = trie.children(nodes, trie.max_children[depth])
            # A place without a child repeats the first one. A row that left the trie, such as a spare beam of
            # probability zero, can only end.
            first = torch.where(present[:, :1], tokens[:, :1], self.eos_token_ids[0])
            tokens = torch.where(present, tokens, first)
            masked.scatter_(1, tokens, scores.gather(1, tokens))
        return masked, nodes

    def _trajectory(self, new_ids, scores, roots, bias):
        trie = self.trie
        # A code that has begun and not ended has at most num_levels - 1 tokens. The node is -1 in free text.
        nodes = torch.full_like(roots, -1)
        for tokens in new_ids[:, max(0, new_ids.shape[1] - trie.num_levels + 1) :].unbind(1):
            further = trie.step(nodes, tokens)
            nodes = torch.where(further >= 0, further, trie.step(roots, tokens))
        inside = (nodes >= 0)[:, None]
        closed = torch.zeros_like(scores[:, :1]).masked_fill_(inside, float("-inf"))
        if self._keeps_text:
            masked = scores + closed
            masked[:, self._slice] += bias
            if self.vocab_size is not None:
                masked[:, self.vocab_size :] = float("-inf")
        else:
            masked = torch.full_like(scores, float("-inf"))
            masked[:, self._slice] = scores[:, self._slice] + (bias + closed)
        if trie.num_levels > 1:
            tokens, present = trie.children(nodes, max(trie.max_children[1:]))
            tokens = torch.where(present, tokens, tokens[:, :1])
            values = torch.where(inside, scores.gather(1, tokens), masked.gather(1, tokens))
            masked.scatter_(1, tokens, values)
        return masked, torch.where(nodes >= 0, nodes, roots)
