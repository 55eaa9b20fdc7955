"""What of the written queries is kept: those that lead back to their tools, each said once."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from ..data.catalog import ToolCatalog
from ..text_expert import UNSPACED, WORD, WORD_BOUNDARY, TextExpert


MAX_WORDS = 60
MAX_WORD_LENGTH = 30
LONG_WORD = re.compile(rf"[!-~]{{{MAX_WORD_LENGTH + 1},}}")
MIN_LETTERS = 0.75
"""Share of letters and blanks from which on a text of more than a few words is language, and no row of codes."""
SAME_MEANING = 0.95
"""Cosine from which on two queries for the same tools are one."""
REFUSAL = re.compile(
    r"^(i'?m sorry|i am sorry|sorry,|i can'?t (help|assist|write|provide)|i cannot|i'?m (just )?an? (ai|language model)|"
    r"as an ai|unfortunately, i)|\blanguage model\b",
    re.IGNORECASE,
)
LABEL = re.compile(r"^(message|user|query|person|tool)\s*(\([^)]*\))?\s*:\s*", re.IGNORECASE)
QUOTED = re.compile(r'"([^"]*)"?|[“”]([^“”]*)[“”]?|`([^`]*)`?|\*+([^*]*)\**')
"""A text in quotation marks or the like, whose closing ones may be cut off, and with none of them inside."""
BATCH = 512


def clean(text: str) -> str:
    """Take off what a model puts around a query: quotation marks, a label."""
    text = LABEL.sub("", " ".join(text.split()))
    while quoted := QUOTED.fullmatch(text):
        text = LABEL.sub("", "".join(quoted.groups("")).strip())
    return text


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text in lower case, identifiers split."""
    return tuple(WORD.findall(WORD_BOUNDARY.sub(" ", text).lower()))


def filter_queries(rows: Sequence[dict], catalog: ToolCatalog, expert: TextExpert) -> tuple[list[dict], Counter[str]]:
    """Keep the queries that a person could have said, each once.

    Args:
        rows (`Sequence[dict]`):
            Rows of `text` and `tools`.
        catalog ([`ToolCatalog`]):
            The tools.
        expert ([`TextExpert`]):
            Whose encoder tells which queries mean the same.

    Returns:
        `tuple`: the rows that are kept, in order, their texts cleaned; how many were dropped for each reason.
    """
    names = _Names(catalog)
    dropped: Counter[str] = Counter()
    kept, seen = [], set()
    for row in rows:
        text = clean(row["text"])
        said = words(text)
        if len(said) < 2:
            dropped["empty"] += 1
        elif len(said) > MAX_WORDS:
            dropped["too long"] += 1
        elif _is_garbled(text):
            dropped["garbled"] += 1
        elif REFUSAL.search(text):
            dropped["refusal"] += 1
        elif any(names.gives_away(said, tool_id) for tool_id in row["tools"]):
            dropped["names the tool"] += 1
        elif said in seen:
            dropped["said twice"] += 1
        else:
            seen.add(said)
            kept.append({**row, "text": text})
    unlike = _drop_same_meaning(kept, expert)
    dropped["said twice"] += len(kept) - len(unlike)
    return unlike, +dropped


def _is_garbled(text: str) -> bool:
    """Whether a text is a row of codes, as small models write them: a long word that is no address, or few letters."""
    if any(not {"/", "@"} & {*word} for word in LONG_WORD.findall(text)):
        return True
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return len(text) > 2 * MAX_WORD_LENGTH and letters < MIN_LETTERS * len(text)


class _Names:
    """The names of a catalog's tools, and which of them a person could use who does not know the tool."""

    def __init__(self, catalog: ToolCatalog):
        self.names: dict[str, set[tuple[str, ...]]] = {}
        for tool in catalog:
            server, _, name = tool.id.rpartition(".")
            # In a script without blanks, a name cannot be told from an ordinary word.
            spelled = {text for text in (name, tool.name) if not re.search(f"[{UNSPACED}]", text)}
            self.names[tool.id] = {words(text) for text in spelled} - {()}
            # Nor would anybody spell the name of its server, where that is not one word, such as GitHub.
            if len(words(server)) > 1:
                self.names[tool.id].add(words(server))
        self.ordinary = {word for tool in catalog for word in re.findall(r"\b[a-z]+\b", tool.description)}

    def gives_away(self, said: tuple[str, ...], tool_id: str) -> bool:
        """Whether a text has a tool's name: all its words in a row, or as one. A word in lower case in any description
        is an ordinary one and gives nothing away: `rain`, but not `Zorbly`."""
        for name in self.names[tool_id]:
            if len(name) == 1 and name[0] in self.ordinary:
                continue
            if "".join(name) in said or any(said[i : i + len(name)] == name for i in range(len(said) - len(name) + 1)):
                return True
        return False


def lead_back(rows: Sequence[dict], expert: TextExpert, top_k: int) -> list[dict]:
    """Keep the rows for which search finds all of the tools among the first `top_k` for each tool that they need."""
    row_of_tool = {tool_id: row for row, tool_id in enumerate(expert.tool_ids)}
    found = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        logits = expert.logits([row["text"] for row in batch])
        for row, scores in zip(batch, logits, strict=True):
            needed = scores[[row_of_tool[tool_id] for tool_id in row["tools"]]]
            if int((scores >= needed.min()).sum()) <= top_k * len(needed):
                found.append(row)
    return found


def _drop_same_meaning(rows: Sequence[dict], expert: TextExpert) -> list[dict]:
    """Of queries for the same tools whose embeddings nearly coincide, keep the first."""
    if not rows or expert.embeddings is None:
        return list(rows)
    embeddings = expert.encode_queries([row["text"] for row in rows])
    kept_of_tools: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        others = kept_of_tools.setdefault(tuple(sorted(row["tools"])), [])
        if not others or float((embeddings[others] @ embeddings[i]).max()) < SAME_MEANING:
            others.append(i)
    return [rows[i] for i in sorted(i for others in kept_of_tools.values() for i in others)]


def split_by_tool(rows: Sequence[dict], share: float = 0.1, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Split queries into training and validation, so that every tool keeps some for training.

    Of the tools, in an order drawn by the seed, each gives one of its queries to validation until the share is
    reached; then each a second. No tool gives its last.

    Args:
        rows (`Sequence[dict]`): Rows of `text` and `tools`, those of groups of tools as well.
        share (`float`, *optional*, defaults to 0.1): Share of the queries for validation.
        seed (`int`, *optional*, defaults to 0): Seed of the choice.

    Returns:
        `tuple`: the rows for training and those for validation, both in order.
    """
    generator = random.Random(seed)
    of_tools: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        of_tools.setdefault(tuple(sorted(row["tools"])), []).append(i)
    pools = [generator.sample(members, len(members)) for members in of_tools.values()]
    generator.shuffle(pools)
    wanted, validation = round(share * len(rows)), set()
    while len(validation) < wanted:
        giving = [pool for pool in pools if len(pool) > 1][: wanted - len(validation)]
        if not giving:
            break
        validation.update(pool.pop() for pool in giving)
    return (
        [row for i, row in enumerate(rows) if i not in validation],
        [row for i, row in enumerate(rows) if i in validation],
    )


def json_lines(rows: Iterable[dict]) -> str:
    """Return rows as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
