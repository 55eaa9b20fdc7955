"""The facts that tools' results hold, and which of them an answer tells."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .run import from_json


# Of scripts that put a space between words; in Chinese, Japanese or Korean text a fact may stand between any two letters
WORD = r"[^\W\u2e80-\ud7ff]"
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])(?!\Z)|\n+")
MAX_FIRST_SENTENCE = 200  # characters; a longer one may be one clause again and again


def facts_of(results: Iterable[str]) -> list[str]:
    """List the distinct numbers and strings of tools' results; keys, booleans, nulls and blanks are skipped.

    Args:
        results (`Iterable[str]`): Results as JSON; one that is no JSON is a fact as a whole. A string that holds a JSON
            object or list, as tools of MCP servers return, is read as such.
    """
    facts: dict[str, None] = {}
    values: list[Any] = [from_json(result) for result in results][::-1]
    while values:  # a result may be nested more deeply than calls may be
        value = values.pop()
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            values += reversed(value)
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            text = str(value).strip().encode("utf-8", "replace").decode()
            inner = from_json(text) if text[0] in "{[" else text
            if inner == text:
                facts[text] = None
            else:
                values.append(inner)
    return list(facts)


def tells(answer: str, fact: str) -> bool:
    """Whether an answer tells a fact, as a whole word or number."""
    start = rf"(?<!{WORD})(?<!\.)(?<!\w,)" if re.match(WORD, fact) else ""
    end = rf"(?!{WORD}|[.,]\d)" if re.search(rf"{WORD}\Z", fact) else ""
    return re.search(start + re.escape(fact) + end, answer, re.IGNORECASE) is not None


def tells_more(answer: str, facts: Sequence[str]) -> bool:
    """Whether the last sentence of an answer tells one of some facts that those before it do not, or is the first."""
    answer = answer.strip()
    *before, _ = SENTENCE_END.split(answer)
    if not before:
        return len(answer) <= MAX_FIRST_SENTENCE
    told = " ".join(before)
    return any(tells(answer, fact) and not tells(told, fact) for fact in facts)
