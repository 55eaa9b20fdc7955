"""Parsing of JSON, JSON Lines and YAML files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


LINES = (".jsonl", ".ndjson")
YAML = (".yaml", ".yml")
MAX_ALIASED = 1_000_000  # values that the aliases of a YAML file may expand to


def read_documents(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Parse a file of one document, or of one document per line. Yields each document with its place."""
    if path.suffix.lower() in LINES:
        yield from _json_lines(text, path)
    elif path.suffix.lower() in YAML:
        yield f"{path}", _parse_yaml(text, path)
    else:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not is_json(text.lstrip().partition("\n")[0]):
                raise ValueError(f"{path} is not valid JSON: {error}") from None
            yield from _json_lines(text, path)  # some benchmarks name JSON Lines files .json
        else:
            yield f"{path}", document


def is_json(text: str) -> bool:
    """Whether a text is valid JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from None


def _parse_yaml(text: str, path: Path) -> Any:
    """Parse JSON-compatible YAML; anchors and merge keys are resolved."""
    try:
        loader = _JsonLikeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_aliases(node)
            return json.loads(json.dumps(loader.construct_document(node)))
        finally:
            loader.dispose()
    except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON-compatible YAML: {error}") from None


class _JsonLikeLoader(yaml.CSafeLoader):
    """Resolves plain scalars as JSON would: `no`, `0755`, `12:30` and dates are strings."""


_JsonLikeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}


for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("int", r"-?(?:0|[1-9][0-9]*)", "-0123456789"),
    ("float", r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?", "-0123456789"),
):
    _JsonLikeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _check_aliases(root: yaml.Node) -> None:
    """Reject cyclic aliases, and aliases whose expansion would not fit into memory."""
    sizes: dict[int, int] = {}  # number of values that a node expands to; 0 while they are being counted

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0
            inner = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
            sizes[id(node)] = 1 + sum(map(size, parts))
        if sizes[id(node)] == 0:
            raise ValueError("an alias is cyclic")
        return sizes[id(node)]

    total = size(root)
    if total - len(sizes) > MAX_ALIASED:
        raise ValueError(f"its aliases expand to more than {MAX_ALIASED} values")
