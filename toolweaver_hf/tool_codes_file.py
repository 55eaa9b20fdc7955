"""The format of `tool_codes.json`: every tool's code, and the sizes of the codebooks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any


SCHEMA_VERSION = 1
TOOL_CODES_FILE = "tool_codes.json"
LEVEL_LETTERS = "abcdefgh"


def code_tokens(codebook_sizes: Sequence[int]) -> list[str]:
    """Return the tokens of all codes, level by level: `<a_0>`, `<a_1>`, ..., `<b_0>`, ..."""
    return [f"<{letter}_{i}>" for letter, size in zip(LEVEL_LETTERS, codebook_sizes) for i in range(size)]  # noqa: B905


def check_tool_codes(document: Any, source: str) -> dict[str, Any]:
    """Check what a `tool_codes.json` holds and return it.

    Raises:
        `ValueError`: naming `source` and the tool that is wrong.
    """
    if not isinstance(document, dict) or not isinstance(document.get("schema_version"), int):
        raise ValueError(f"{source} is not a file of tool codes: it lacks a schema_version")
    if document["schema_version"] > SCHEMA_VERSION:
        raise ValueError(
            f"{source} has schema_version {document['schema_version']}, newer than {SCHEMA_VERSION}, which this "
            "version reads: upgrade toolweaver-hf"
        )
    sizes, codes = document.get("codebook_sizes"), document.get("codes")
    if not isinstance(sizes, list) or not 1 <= len(sizes) <= len(LEVEL_LETTERS):
        raise ValueError(f"{source}: codebook_sizes must list 1 to {len(LEVEL_LETTERS)} sizes")
    if not all(type(size) is int and 1 <= size <= 1 << 20 for size in sizes):
        raise ValueError(f"{source}: every codebook size must be a whole number from 1 to {1 << 20}")
    if not isinstance(codes, dict) or not codes:
        raise ValueError(f"{source}: it holds no codes")

    def is_code(code: Any) -> bool:
        return (
            isinstance(code, list)
            and len(code) == len(sizes)
            and all(type(i) is int and 0 <= i < size for i, size in zip(code, sizes, strict=True))
        )

    tool_of_code: dict[tuple[int, ...], str] = {}
    for tool_id, code in codes.items():
        if not is_code(code):
            raise ValueError(f"{source}: the code of tool {tool_id!r} must be {len(sizes)} indices below {sizes}")
        if tool_of_code.setdefault(tuple(code), tool_id) != tool_id:
            raise ValueError(f"{source}: tools {tool_of_code[tuple(code)]!r} and {tool_id!r} share the code {code}")
    checksums, retired = document.get("checksums") or {}, document.get("retired") or []
    if not isinstance(checksums, dict) or not all(isinstance(value, str) for value in checksums.values()):
        raise ValueError(f"{source}: checksums must map tools to texts")
    if not isinstance(retired, list) or not all(is_code(code) for code in retired):
        raise ValueError(f"{source}: each of the retired codes must be {len(sizes)} indices below {sizes}")
    return document


def write_tool_codes(document: dict[str, Any], path: str) -> None:
    """Write a `tool_codes.json`, whole or not at all."""
    with open(path + ".partial", "w", encoding="utf-8") as file:
        json.dump(document, file, ensure_ascii=False)
    os.replace(path + ".partial", path)
