"""Grammar-constrained decoding of arguments that conform to a tool's JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessor
from transformers.utils import logging

from ..data.grammar import expressible_grammar
from ..tokenization_toolweaver import ToolWeaverTokenizer


if TYPE_CHECKING:
    from ..data.catalog import Tool


logger = logging.get_logger(__name__)

NO_PREFIX = {"add_prefix_space": False, "prepend_scheme": "never", "prepend": ""}
"""Settings of a `tokenizer.json` with which a text, and each piece that a grammar forces, gets no space before it."""


class ToolArgumentsLogitsProcessor(LogitsProcessor):
    r"""
    [`LogitsProcessor`] that constrains the tokens after a tool's code to one JSON object that conforms to the tool's
    JSON Schema, followed by the end of the turn.

    Use it together with a [`ToolCodeLogitsProcessor`] in the mode `"trajectory"`. Properties are generated in the order
    of the schema, without undeclared ones. Keywords that a grammar cannot express, such as `uniqueItems` or `not`, are
    not enforced (see [`ToolArgumentsLogitsProcessor.is_exact`]). The state is derived from the `input_ids`, as in
    [`ToolCodeLogitsProcessor`].

    Needs llguidance: `pip install "toolweaver-hf[grammar]"`.

    Args:
        tokenizer ([`ToolWeaverTokenizer`]):
            The tokenizer.
        tools (`Mapping[str, Tool]`):
            The tools by id, such as a [`ToolCatalog`]. The arguments of other tools may be any JSON object.
        eos_token_id (`int` or `Sequence[int]`):
            The tokens that end a turn; one of them follows the object.
        prompt_length (`int`, *optional*, defaults to 0):
            Number of tokens in the (padded) prompt, which is not searched for codes.

    Raises:
        `ImportError`: if llguidance is not installed.
        `ValueError`: if llguidance does not support the tokenizer.

    Example:

    ```python
    >>> codes = ToolCodeLogitsProcessor(tokenizer.trie, mode="trajectory", prompt_length=length)
    >>> arguments = ToolArgumentsLogitsProcessor(tokenizer, catalog, tokenizer.eos_token_id, prompt_length=length)
    >>> output = model.generate(**inputs, logits_processor=[codes, arguments])
    ```
    """

    supports_continuous_batching = False

    def __init__(
        self,
        tokenizer: ToolWeaverTokenizer,
        tools: Mapping[str, Tool],
        eos_token_id: int | Sequence[int],
        prompt_length: int = 0,
    ):
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            raise ImportError('constrained arguments need llguidance: pip install "toolweaver-hf[grammar]"') from None
        self.tokenizer = tokenizer
        self.tools = tools
        self.eos_token_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        self.prompt_length = prompt_length
        self._matcher_class = LLMatcher
        try:
            self._vocabulary = LLTokenizer(
                json.dumps(text_tokenizer(tokenizer)), n_vocab=len(tokenizer), eos_token=tokenizer.eos_token_id
            )
        except Exception as error:
            raise ValueError(f"llguidance does not support this tokenizer: {error}") from None
        self._grammars: dict[str, tuple[str, bool]] = {}
        self._matchers: dict[tuple[int, ...], Any] = {}  # matchers of the last step's rows: a cache, not state

    def is_exact(self, tool_id: str) -> bool:
        """Whether the grammar of a tool's arguments expresses its whole JSON Schema."""
        return self._grammar(tool_id)[1]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Mask the scores of invalid continuations.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size * num_beams, sequence_length)`): The tokens so far.
            scores (`torch.FloatTensor` of shape `(batch_size * num_beams, vocab_size)`): Scores of the next token.

        Returns:
            `torch.FloatTensor` of the shape of `scores`, with `-inf` for every token that is not allowed.
        """
        allowed, matchers = torch.ones(scores.shape, dtype=torch.bool), {}
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            call = self._call(ids)
            matcher = None if call is None else self._follow(call, matchers)
            if matcher is not None:
                allowed[row] = self._allowed_tokens(matcher, scores.shape[1])
        self._matchers = matchers
        return scores.masked_fill(~allowed.to(scores.device), float("-inf"))

    def is_complete(self, new_ids: Sequence[int]) -> bool:
        """Whether the tokens of a turn end with a complete call."""
        call = self._call(new_ids)
        matcher = None if call is None else self._follow(call, {})
        return matcher is not None and matcher.is_accepting() and matcher.is_stopped()

    def _call(self, new_ids: Sequence[int]) -> tuple[int, ...] | None:
        """Return the last complete code of a turn with the tokens after it; `None` in free text or inside a code."""
        first = self.tokenizer.level_offsets[0]
        starts = range(first, first + self.tokenizer.codebook_sizes[0])
        start = next((i for i in range(len(new_ids) - 1, -1, -1) if new_ids[i] in starts), None)
        if start is None or len(new_ids) - start < len(self.tokenizer.codebook_sizes):
            return None
        return tuple(new_ids[start:])

    def _follow(self, call: tuple[int, ...], matchers: dict[tuple[int, ...], Any]) -> Any:
        """Return the matcher advanced by a call's tokens; `None` if they violate the grammar, as after its end."""
        levels = len(self.tokenizer.codebook_sizes)
        matcher = matchers.get(call) or self._matchers.get(call)
        if matcher is None and call[:-1] in self._matchers:
            matcher = self._matchers[call[:-1]].deep_copy()
            matcher.consume_token(call[-1])
        elif matcher is None:
            grammar, _ = self._grammar(self.tokenizer.decode_tool(call[:levels]))
            matcher = self._matcher_class(self._vocabulary, grammar, log_level=0)
            matcher.consume_tokens(list(call[levels:]))
        if matcher.is_error():
            return None
        matchers[call] = matcher
        return matcher

    def _allowed_tokens(self, matcher: Any, vocab_size: int) -> torch.BoolTensor:
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        if matcher.is_accepting() and matcher.is_stopped():
            allowed[self.eos_token_ids] = True
            return allowed
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        width = min(vocab_size, len(self.tokenizer))
        allowed[:width] = torch.from_numpy(bits[:width].astype(bool))
        return allowed

    def _grammar(self, tool_id: str) -> tuple[str, bool]:
        """Return the grammar of a tool's arguments, and whether it expresses the whole schema."""
        if tool_id not in self._grammars:
            schema = self.tools[tool_id].parameters if tool_id in self.tools else {"type": "object"}
            grammar, left_out = expressible_grammar(
                schema,
                lambda grammar: self._matcher_class.validate_grammar(grammar, self._vocabulary),
                start='" " ' if self.tokenizer.opens_with_space else "",
            )
            if left_out:
                logger.info(f"the grammar of {tool_id!r} cannot express these keywords: {', '.join(left_out)}")
            self._grammars[tool_id] = grammar, all(keyword.startswith("format: ") for keyword in left_out)
        return self._grammars[tool_id]


def text_tokenizer(tokenizer: ToolWeaverTokenizer) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` that never parses code tokens or control tokens in a text, and puts no
    space before it.

    Code tokens, role markers and other added tokens keep their ids but become special tokens with a new spelling, so
    that no text of a schema matches them. The new spelling has a control character, which JSON strings always escape.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    names = {}
    for token in document["added_tokens"]:
        if token["content"].replace("\u2581", " ").strip():
            names[token["content"]] = f"\x00{token['id']}"
            token |= {"content": names[token["content"]], "special": True, "normalized": False}
    model = document["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    for step in (document["normalizer"] or {}, document["pre_tokenizer"] or {}):
        for part in step.get("normalizers") or step.get("pretokenizers") or [step]:
            part |= {key: value for key, value in NO_PREFIX.items() if key in part}
    return document | {"post_processor": None}
