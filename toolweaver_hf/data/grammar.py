"""Grammars of JSON Schemas for constrained decoding, without the keywords that a grammar cannot express."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .schemas import MANY, NAMED, ONE


# The separators of json.dumps, as in the training data.
JSON_FORMAT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

FindError = Callable[[str], str]
"""Returns llguidance's error for a grammar, or an empty string if it compiles."""


def expressible_grammar(schema: dict[str, Any], find_error: FindError, start: str = "") -> tuple[str, list[str]]:
    """Convert the JSON Schema of an object to a grammar for llguidance.

    Keywords that a grammar cannot express, such as `uniqueItems`, a pattern with lookahead or an unknown type, are
    omitted one by one; the rest of the schema is kept.

    Args:
        schema (`dict`): The schema.
        find_error (`Callable[[str], str]`): `LLMatcher.validate_grammar`.
        start (`str`, *optional*): Prefix of the object, in the grammar's syntax.

    Returns:
        `tuple[str, list[str]]`: the grammar, and the omitted keywords. Omitted formats, such as `format: snowflake`,
        are annotations that no validator checks.
    """

    def compile_schema(candidate: dict[str, Any], **options: bool) -> tuple[str, str]:
        rule = json.dumps(candidate | {"x-guidance": JSON_FORMAT | options})
        grammar = f"start: {start}object\nobject: %json {rule}"
        return grammar, find_error(grammar)

    def fails(candidate: dict[str, Any]) -> bool:
        return bool(compile_schema(candidate)[1])

    closed = close_schema(schema)
    grammar, error = compile_schema(closed)
    if not error:
        return grammar, []
    left_out: list[str] = []
    relaxed = _relax(closed, closed, fails, left_out)
    if not fails(relaxed):
        return compile_schema(relaxed)[0], left_out
    # Treat oneOf as anyOf.
    grammar, error = compile_schema(relaxed, coerce_one_of=True)
    if not error:
        return grammar, [*left_out, "oneOf"]
    properties = relaxed.get("properties")
    if isinstance(properties, dict):  # expressible keywords may still fail in combination
        around = {key: relaxed[key] for key in ("$defs", "definitions") if key in relaxed}
        kept = {
            name: {} if compile_schema({**around, "properties": {name: inner}}, coerce_one_of=True)[1] else inner
            for name, inner in properties.items()
        }
        grammar, error = compile_schema({**relaxed, "properties": kept}, coerce_one_of=True)
        if not error:
            return grammar, [*left_out, "$ref"]
    return compile_schema({"type": "object"})[0], [*left_out, *(key for key in schema if key != "type")]


def _relax(schema: Any, root: dict[str, Any], fails: Callable[[dict[str, Any]], bool], left_out: list[str]) -> Any:
    """Copy a schema without inexpressible keywords. Each keyword is tested without its nested schemas."""
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    own: dict[str, Any] = {}  # the schema's keywords without nested schemas
    for key, value in schema.items():
        if key in NAMED and isinstance(value, dict):
            result[key] = {name: _relax(inner, root, fails, left_out) for name, inner in value.items()}
            own[key] = {name: {} for name in value}
        elif key in (*ONE, *MANY) and isinstance(value, list):
            result[key] = [_relax(inner, root, fails, left_out) for inner in value]
            own[key] = [{} for _ in value]
        elif key in ONE and isinstance(value, dict):
            result[key], own[key] = _relax(value, root, fails, left_out), {}
        elif key == "$ref":
            if _resolves(value, root):
                result[key] = value
            else:
                left_out.append(key)
        else:
            result[key] = own[key] = value
    own.pop("oneOf", None)  # only the nested schemas show whether the alternatives are disjoint
    own = {key: value for key, value in own.items() if key not in ("$defs", "definitions")}
    if fails(own):
        kept: dict[str, Any] = {}
        for key in sorted(own, key=lambda key: key != "type"):
            if fails({**kept, key: own[key]}):
                del result[key]
                left_out.append(f"format: {own[key]}" if key == "format" else key)
            else:
                kept[key] = own[key]
    return result


def _resolves(reference: Any, root: dict[str, Any]) -> bool:
    """Whether a reference resolves within the root schema."""
    if reference == "#":
        return True
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return False
    value: Any = root
    for part in reference[2:].split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            return False
    return isinstance(value, (dict, bool))


def close_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Copy the JSON Schema of an object and disallow undeclared properties.

    Nested objects that declare properties are closed as well. A schema is unchanged if it has `additionalProperties`
    or `patternProperties`, is composed of other schemas, or requires undeclared properties.
    """
    closed = dict(schema)
    if isinstance(closed.get("properties"), dict):
        closed["properties"] = {
            name: close_schema(inner) if isinstance(inner, dict) else inner
            for name, inner in closed["properties"].items()
        }
        composed = ("additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf")
        required = closed.get("required") if isinstance(closed.get("required"), list) else []
        declared = list(closed["properties"])  # not every required name is hashable
        undeclared = [name for name in required if name not in declared]
        if not undeclared and not any(keyword in closed for keyword in composed):
            closed["additionalProperties"] = False
    if isinstance(closed.get("items"), dict):
        closed["items"] = close_schema(closed["items"])
    return closed
