"""Arguments and answers in the words of the conversation: small models change names that they should copy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

from ..tokenization_toolweaver import ToolWeaverTokenizer
from .arguments import text_tokenizer


MAX_CHARACTERS = 4000  # of the texts, from their end: with more, there is little that is not in them
MAX_TOKEN_LENGTH = 32  # characters that decide a text's first token
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
CLOSED = re.compile(r"\{[^{}\[\]]*\}|\[[^{}\[\]]*\]")
WORD_START = re.compile(r"(?<!\w)\w")
INSIDE_WORD = re.compile(r"(?:\w|\d[.,:])\Z")
OPENING = "(\"'#$€£"  # what a word follows without a space


class WordCopier:
    """Finds the tokens that go on as a conversation does.

    Args:
        tokenizer ([`ToolWeaverTokenizer`]): The tokenizer.
    """

    def __init__(self, tokenizer: ToolWeaverTokenizer):
        self._tokenizer = Tokenizer.from_str(json.dumps(text_tokenizer(tokenizer)))
        self._tokenizer.encode_special_tokens = True  # whatever a text spells, it is text
        tokens = enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        self._quotes = [token_id for token_id, token in tokens if token.startswith('"')]

    def in_arguments(self, arguments: str, texts: Iterable[str]) -> list[int]:
        """Return the tokens that go on with a string value as the conversation does.

        A value is copied from the start of a word on, and may end at the end of one. Where it has left what the
        conversation says, as a translation or a date in another format does, there is nothing to go on with.

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
        may_end = value and any(not re.match(r"\w", text) for text in following)
        return sorted(self._first_tokens(following).union(self._quotes if may_end else ()))

    def in_answer(self, answer: str, facts: Sequence[str], pending: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """Return the tokens that go on with a fact, and those that begin one.

        Args:
            answer (`str`): An answer as far as it is generated.
            facts (`Sequence[str]`): The facts that it has yet to tell.
            pending (`Sequence[int]`, *optional*): The tokens of a character that has begun after that.

        Returns:
            `tuple[list[int], list[int]]`: Tokens, without repetition. At most one of the lists holds any: a fact is gone
            on with where the answer ends in the beginning of one.
        """
        begun = {fact[length:] for fact in facts if (length := _length_begun(answer, fact))}
        space = "" if not answer or answer[-1].isspace() or answer[-1] in OPENING else " "
        going_on = self._first_tokens(begun, pending)
        begins = () if going_on else [space + fact for fact in facts]
        return sorted(going_on), sorted(self._first_tokens(begins, pending))

    def _first_tokens(self, texts: Iterable[str], pending: Sequence[int] = ()) -> set[int]:
        """Return the first tokens of some texts, or those that follow the pending ones."""
        texts, n = [text[:MAX_TOKEN_LENGTH] for text in texts if text], len(pending)
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return {i for encoding in encodings if encoding.ids[:n] == [*pending] for i in encoding.ids[n : n + 1]}


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


def _length_begun(text: str, fact: str) -> int:
    """Return how many characters of a fact a text ends in, from the start of a word or number on, but not all of it."""
    for length in range(min(len(fact) - 1, len(text)), 0, -1):
        same = text[-length:].lower() == fact[:length].lower()
        if same and not INSIDE_WORD.search(text[:-length][-2:]):
            return length
    return 0
