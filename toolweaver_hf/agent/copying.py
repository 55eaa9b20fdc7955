"""Arguments in the words of the conversation: small models change names that they should copy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from tokenizers import Tokenizer

from ..tokenization_toolweaver import ToolWeaverTokenizer
from .arguments import text_tokenizer


MAX_CHARACTERS = 4000  # of the texts, from their end: with more, there is little that is not in them
MAX_TOKEN_LENGTH = 32  # characters that decide a text's first token
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
CLOSED = re.compile(r"\{[^{}\[\]]*\}|\[[^{}\[\]]*\]")
WORD_START = re.compile(r"(?<!\w)\w")


class WordCopier:
    """Finds the tokens that go on with a string value as a conversation does.

    A value is copied from the start of a word on, and may end at the end of one. Where it has left what the
    conversation says, as a translation or a date in another format does, there is nothing to go on with.

    Args:
        tokenizer ([`ToolWeaverTokenizer`]): The tokenizer.
    """

    def __init__(self, tokenizer: ToolWeaverTokenizer):
        self._tokenizer = Tokenizer.from_str(json.dumps(text_tokenizer(tokenizer)))
        tokens = enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        self._quotes = [token_id for token_id, token in tokens if token.startswith('"')]

    def __call__(self, arguments: str, texts: Iterable[str]) -> list[int]:
        """Return the tokens that go on as the conversation does.

        Args:
            arguments (`str`): The arguments of a call as far as they are generated, a prefix of a JSON object.
            texts (`Iterable[str]`): What was said in the conversation.

        Returns:
            `list[int]`: Tokens, without repetition. Empty outside of a string value.
        """
        value = open_value(arguments)
        if value is None:
            return []
        following = _continuations("\n".join(texts)[-MAX_CHARACTERS:], value)
        first = {
            token_id
            for encoding in self._tokenizer.encode_batch([*following - {""}], add_special_tokens=False)
            for token_id in encoding.ids[:1]
        }
        may_end = value and any(not re.match(r"\w", text) for text in following)
        return sorted(first.union(self._quotes if may_end else ()))


def open_value(arguments: str) -> str | None:
    """Return the string value that a prefix of a JSON object ends in, unescaped as far as it goes; `None` elsewhere,
    as in a key."""
    outside, quote, value = STRING.sub("", arguments).partition('"')
    if not quote:
        return None
    while (shorter := CLOSED.sub("", outside)) != outside:
        outside = shorter
    in_list = outside.rfind("[") > outside.rfind("{")
    if not in_list and not outside.rstrip().endswith(":"):
        return None
    try:
        return json.loads(f'"{value}"')
    except ValueError:  # an escape sequence has begun
        return None


def _continuations(text: str, value: str) -> set[str]:
    """Return what follows in a text where it says a value, or from the start of each word on if there is none yet."""
    if value:
        start = r"(?<!\w)" if re.match(r"\w", value) else ""
        ends = [found.end() for found in re.finditer(start + re.escape(value), text)]
    else:
        ends = [found.start() for found in WORD_START.finditer(text)]
    return {text[end : end + MAX_TOKEN_LENGTH] for end in ends}
