"""Report on a catalog file, to be checked before training."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

from .catalog import ToolCatalog, encoder_texts
from .grammar import expressible_grammar


def describe_catalog(catalog: ToolCatalog, encoder: str | None = None) -> dict[str, Any]:
    """Collect statistics and possible problems of a catalog.

    Args:
        catalog ([`ToolCatalog`]): The catalog.
        encoder (`str`, *optional*): Folder of a sentence-transformers model, which truncates long documents.

    Returns:
        `dict`:

        - `tools` and `arguments`: their numbers.
        - `without_description`: ids of the tools whose description is derived from their name.
        - `without_arguments`: ids of the tools without arguments.
        - `longest`: the longest documents with their length in characters.
        - `changes`: the changes made while reading, each with its tools.
        - `relaxed`: the schema keywords that a grammar cannot express, each with its tools; `None` without llguidance.
        - `cut`: ids of the tools whose document the encoder truncates; `None` without `encoder`.
    """
    arguments = {tool.id: len(tool.parameters.get("properties") or {}) for tool in catalog}
    lengths = sorted(((len(tool.document), tool.id) for tool in catalog), reverse=True)
    return {
        "tools": len(catalog),
        "arguments": sum(arguments.values()),
        "without_description": next((ids for text, ids in catalog.changes.items() if "no description" in text), []),
        "without_arguments": [tool_id for tool_id, number in arguments.items() if not number],
        "longest": {tool_id: length for length, tool_id in lengths[:3]},
        "changes": catalog.changes,
        "relaxed": _relaxed(catalog),
        "cut": None if encoder is None else _cut(catalog, encoder),
    }


def format_report(report: dict[str, Any]) -> str:
    """Format the result of [`describe_catalog`] as lines of text."""
    longest = ", ".join(f"{tool_id} ({length:,})" for tool_id, length in report["longest"].items())
    lines = [
        f"{report['tools']:,} tools, {report['arguments']:,} arguments",
        f"without a description: {_some(report['without_description'])}",
        f"without arguments: {_some(report['without_arguments'])}",
        f"longest documents, in characters: {longest}",
    ]
    lines += [f"{change}: {_some(tools)}" for change, tools in report["changes"].items()]
    if report["relaxed"] is None:
        lines.append('keywords that a grammar cannot express: needs llguidance, pip install "toolweaver-hf[grammar]"')
    else:
        for keyword, tools in sorted(report["relaxed"].items(), key=lambda pair: -len(pair[1])):
            when = "not checked at all" if keyword.startswith("format: ") else "checked only after generation"
            lines.append(f"{keyword}, which no grammar can say, is {when}: {_some(tools)}")
    if report["cut"] is not None:
        lines.append(f"longer than the encoder's maximum length, and truncated: {_some(report['cut'])}")
    return "\n".join(lines)


def _some(tools: list[str]) -> str:
    return f"{len(tools):,}" + (f" ({', '.join(tools[:3])}{', …' if len(tools) > 3 else ''})" if tools else "")


def _relaxed(catalog: ToolCatalog) -> dict[str, list[str]] | None:
    try:
        from llguidance import LLMatcher
    except ImportError:
        return None
    relaxed: dict[str, list[str]] = {}
    for tool in catalog:
        for keyword in Counter(expressible_grammar(tool.parameters, LLMatcher.validate_grammar)[1]):
            relaxed.setdefault(keyword, []).append(tool.id)
    return relaxed


def _cut(catalog: ToolCatalog, encoder: str) -> list[str]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(Path(encoder) / "tokenizer.json"))
        settings = json.loads((Path(encoder) / "sentence_bert_config.json").read_text(encoding="utf-8"))
        max_tokens = int(settings["max_seq_length"])
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(
            f"{encoder} is not a sentence-transformers folder with a maximum sequence length: {error}"
        ) from None
    return encoder_texts(catalog, tokenizer, max_tokens)[1]


def print_catalog_report(path: str | os.PathLike, encoder: str | None = None) -> None:
    """Print the report on a catalog file."""
    catalog_logger = logging.getLogger(ToolCatalog.__module__)
    level = catalog_logger.level
    catalog_logger.setLevel(logging.ERROR)  # the report repeats the warning
    try:
        catalog = ToolCatalog.from_file(path)
    finally:
        catalog_logger.setLevel(level)
    print(format_report(describe_catalog(catalog, encoder)))
