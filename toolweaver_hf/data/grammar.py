"""What a grammar can say of a JSON Schema, and what is left to a check afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .schemas import MANY, NAMED, ONE


# As json.dumps writes, and so as the training data has it.
JSON_FORMAT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

FindError = Callable[[str], str]
"""Says why llguidance cannot compile a grammar; an empty string if it can."""


def expressible_grammar(schema: dict[str, Any], find_error: FindError, start: str = "") -> tuple[str, list[str]]:
    """Return a grammar of the JSON that a schema of an object allows, for llguidance.

    What no grammar can say, such as `uniqueItems`, a pattern that looks ahead or a type that does not exist, is left
    out, keyword by keyword; everything around it stays.

    Args:
        schema (`dict`): The schema.
        find_error (`Callable[[str], str]`): `LLMatcher.validate_grammar`.
        start (`str`, *optional*): What comes before the object, in the grammar's syntax.

    Returns:
        `tuple[str, list[str]]`: the grammar, and the keywords that it leaves out. Formats among them, such as
        `format: snowflake`, are notes to the reader that no validator checks.
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
    # Alternatives of which exactly one must hold are taken as any of them.
    grammar, error = compile_schema(relaxed, coerce_one_of=True)
    if not error:
        return grammar, [*left_out, "oneOf"]
    properties = relaxed.get("properties")
    if isinstance(properties, dict):  # what does not go together, though each keyword can be said
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
    """Copy a schema without the keywords that no grammar can say. Each is tried without the schemas inside of it."""
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    own: dict[str, Any] = {}  # the schema's keywords with nothing inside
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
    own.pop("oneOf", None)  # whether its alternatives exclude each other is seen only with what is in them
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
    """Whether a reference leads to a schema within the same schema."""
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
    """Copy a JSON Schema of an object so that no property is allowed that it does not declare.

    Objects inside that declare properties are closed as well. A schema that says itself what other properties may be,
    is composed of others, or requires properties that it does not declare, stays as it is.
    """
    closed = dict(schema)
    if isinstance(closed.get("properties"), dict):
        closed["properties"] = {
            name: close_schema(inner) if isinstance(inner, dict) else inner
            for name, inner in closed["properties"].items()
        }
        composed = ("additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf")
        required = closed.get("required") if isinstance(closed.get("required"), list) else []
        undeclared = [name for name in required if name not in closed["properties"]]
        if not undeclared and not any(keyword in closed for keyword in composed):
            closed["additionalProperties"] = False
    if isinstance(closed.get("items"), dict):
        closed["items"] = close_schema(closed["items"])
    return closed
