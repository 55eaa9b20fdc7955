"""`TextStream`: incremental decoding of generated tokens."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase


BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """Decodes tokens incrementally; the pieces concatenate to the decoded text without special tokens.

    A piece is held back while further tokens may change it: inside a multi-byte character, and within a run of byte
    tokens, which tokenizers with byte fallback (Llama 2, Mistral, Gemma) decode together.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): The tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._ids: list[int] = []
        self._length = 0  # total length of the returned pieces

    def put(self, token_id: int) -> str:
        """Add a token and return the text that it completes, which may be empty."""
        if token_id in self._special_ids:
            return ""
        self._ids.append(token_id)
        text = self._text()
        waits = text.endswith("\ufffd") or BYTE_TOKEN.fullmatch(self.tokenizer.convert_ids_to_tokens(token_id))
        return "" if waits else self._piece(text)

    def end(self) -> str:
        """Return the remaining text."""
        return self._piece(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _piece(self, text: str) -> str:
        piece, self._length = text[self._length :], max(self._length, len(text))
        return piece
