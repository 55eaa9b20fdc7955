"""The facts that tools' results hold, and which of them an answer tells."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any


SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def facts_of(results: Iterable[str]) -> list[str]:
    """List the distinct numbers and strings of tools' results; booleans and blanks are skipped.

    Args:
        results (`Iterable[str]`): Results as JSON; one that is no JSON is a fact as a whole.
    """
    facts: dict[str, None] = {}

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                collect(item)
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
            facts[str(value).strip()] = None

    for result in results:
        try:
            collect(json.loads(result))
        except ValueError:
            collect(result)
    return list(facts)


def tells(answer: str, fact: str) -> bool:
    """Whether an answer tells a fact, as a whole word or number."""
    return re.search(rf"(?<![\w.])(?<!\w,){re.escape(fact)}(?!\w|[.,]\d)", answer, re.IGNORECASE) is not None


def tells_more(answer: str, facts: Sequence[str]) -> bool:
    """Whether the last sentence of an answer tells one of some facts that those before it do not, or is the first."""
    *before, _ = SENTENCE_END.split(answer.strip())
    told = " ".join(before)
    return not before or any(tells(answer, fact) and not tells(told, fact) for fact in facts)
