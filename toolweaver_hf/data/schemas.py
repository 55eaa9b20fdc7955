"""Conversion of argument declarations in various formats to JSON Schema."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from typing import Any


JSON_TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")

# The JSON Schema of each type name of Python, Java, JavaScript, SQL and OpenAPI, in lower case.
TYPES: dict[str, dict[str, Any]] = {
    name: {"type": json_type}
    for json_type, names in {
        "string": "string str text char character varchar enum bytes",
        "integer": "integer int long short bigint int32 int64 byte",
        "number": "number float double decimal numeric real float32 float64",
        "boolean": "boolean bool",
        "array": "array list tuple set sequence iterable arraylist vector queue stack",
        "object": "object dict dictionary map mapping hashmap hashtable record struct",
        "null": "null none nonetype void",
    }.items()
    for name in names.split()
}
TYPES |= {name: {"type": "string", "format": name} for name in ("date", "date-time", "time", "uuid", "uri", "email")}
TYPES |= {"datetime": TYPES["date-time"], "url": TYPES["uri"], "file": {"type": "string", "format": "binary"}}
TYPES |= {name: {} for name in ("any", "mixed", "json", "unknown", "type_unspecified", "")}

# Keywords whose value is one schema (a list in older drafts), a list of schemas, or a mapping of names to schemas.
ONE = (
    *("items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties", "contentSchema"),
)
MANY = ("allOf", "anyOf", "oneOf", "prefixItems")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
DATA = ("default", "const", "example", "examples", "enum")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
ANNOTATIONS = ("description", "title", "format", "pattern", "nullable", "required", "optional", "deprecated")
KEYWORDS = {*ONE, *MANY, *NAMED, *DATA, *COUNTS, *BOUNDS, *ANNOTATIONS, "type", "$ref", "uniqueItems"}

# Google's Python SDK writes the keywords in snake case.
SNAKE_CASE = {re.sub("[A-Z]", lambda match: f"_{match[0].lower()}", name): name for name in (*ONE, *MANY, *COUNTS)}
SNAKE_CASE["property_ordering"] = "propertyOrdering"

Change = Callable[[str], None]
"""Called with a description of each part of a schema that is lost in the conversion to JSON Schema."""


def arguments_schema(value: Any, change: Change) -> dict[str, Any]:
    """Convert the declaration of a tool's arguments to JSON Schema.

    Args:
        value:
            A JSON Schema, with type names of JSON, Python (`dict`, `List[str]`, `int, optional`) or Gemini (`OBJECT`);
            a mapping of argument names to types, descriptions or schemas; a list of arguments with a `name` each; or
            any of these as a JSON string.
        change (`Callable[[str], None]`):
            Called with a description of each part that JSON Schema cannot express.

    Raises:
        `ValueError`: naming the unknown key.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"parameters must be a JSON Schema, not the text {value[:40]!r}") from None
    if not value and value != 0:
        return {"type": "object", "properties": {}}
    if isinstance(value, list):
        return _read_mapping({_name_of(entry): _unnamed(entry) for entry in value}, change)
    if not isinstance(value, dict):
        raise ValueError("parameters must be a JSON Schema of type 'object'")
    if not _is_schema(value):
        return _read_mapping(value, change)
    inside = value.get("properties")
    if isinstance(inside, dict) and inside.get("type") == "object" and isinstance(inside.get("properties"), dict):
        change("its schema stands where the properties belong: it is read as the schema")
        value = inside
    schema = to_json_schema(value, change)
    if re.search("draft-0[34]", str(schema.get("$schema"))):  # drafts 3 and 4 write exclusive bounds differently
        schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    if isinstance(schema.get("type"), list) and "object" in schema["type"]:
        schema["type"] = "object"
    if "properties" not in schema:
        odd = next((key for key, inner in schema.items() if key not in KEYWORDS and _looks_like_schema(inner)), None)
        if odd is not None and not any(key in schema for key in ("$ref", *MANY)):
            raise ValueError(f"its parameters have no 'properties', and their key {odd!r} is not JSON Schema")
    return schema


def to_json_schema(schema: Any, change: Change) -> Any:
    """Convert a schema to JSON Schema. A schema that is already JSON Schema is unchanged."""
    if isinstance(schema, str):
        return _type_schema(schema, change)
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        name = SNAKE_CASE.get(key, key)
        if value is None and name not in DATA:
            continue  # a null has no meaning here
        if name in NAMED and isinstance(value, dict):
            value = {inner_name: _named_schema(inner_name, inner, change) for inner_name, inner in value.items()}
        elif name in (*ONE, *MANY) and isinstance(value, list):
            value = [to_json_schema(inner, change) for inner in value]
        elif name in ONE and isinstance(value, (dict, str)):
            value = to_json_schema(value, change)
        elif name in (*COUNTS, *BOUNDS) and isinstance(value, str):
            value = _number(value)
        result[name] = value
    _lift_required(result)
    _read_type(result, change)
    if result.get("nullable") is True:
        _allow_null(result)
    if isinstance(result.get("nullable"), bool):
        del result["nullable"]
    for bound in ("minimum", "maximum"):  # in draft 4 and OpenAPI 3.0, exclusive bounds are booleans
        name = f"exclusive{bound.title()}"
        if isinstance(result.get(name), bool) and result.pop(name) and bound in result:
            result[name] = result.pop(bound)
    return result


def _named_schema(name: str, schema: Any, change: Change) -> Any:
    if isinstance(schema, (dict, bool)):
        return to_json_schema(schema, change)
    if isinstance(schema, str):
        known = _parse_type(schema)
        return {"description": schema} if known is None else known
    if schema is not None:
        change(f"what stands for the schema of {name!r} is none: any value is allowed")
    return {}


def _is_schema(value: dict[str, Any]) -> bool:
    """Whether a value is an object schema, not a mapping of argument names such as `type` or `properties`."""
    properties = value.get("properties")
    if isinstance(properties, dict) and all(isinstance(inner, (dict, bool)) for inner in properties.values()):
        return True
    kind = value.get("type")
    if isinstance(kind, list) or (isinstance(kind, str) and TYPES.get(kind.strip().lower()) == TYPES["object"]):
        return True
    if isinstance(kind, str) and all(key in KEYWORDS for key in value):
        return True  # not of type 'object': `Tool` will reject it
    if any(isinstance(value.get(key), str) for key in ("$ref", "$schema")):
        return True
    if any(isinstance(value.get(key), list) for key in MANY):
        return True
    return all(key in KEYWORDS and not isinstance(inner, (dict, str)) for key, inner in value.items())


def is_object_schema(value: Any) -> bool:
    """Whether a value is certainly an object schema with properties."""
    properties = value.get("properties") if isinstance(value, dict) else None
    return bool(properties) and isinstance(properties, dict) and all(isinstance(p, dict) for p in properties.values())


def _looks_like_schema(value: Any) -> bool:
    return isinstance(value, dict) and (
        isinstance(value.get("type"), (str, list)) or isinstance(value.get("properties"), dict)
    )


def _read_mapping(entries: dict[str, Any], change: Change) -> dict[str, Any]:
    """Convert a mapping of argument names to their declarations."""
    entries = dict(entries)
    listed = entries.get("required")
    if isinstance(listed, list):
        del entries["required"]
    properties: dict[str, Any] = {}
    marks: dict[str, bool] = {}  # arguments that are explicitly marked as required or optional
    optional = set()
    for name, entry in entries.items():
        if entry is None or isinstance(entry, bool):
            entry = {}
        if isinstance(entry, str):
            known = _parse_type(_strip_optional(entry)[0])
            entry = {"description": entry} if known is None else {"type": entry}
        if not isinstance(entry, dict):
            raise ValueError(f"the argument {name!r} must be described by a JSON object, not {type(entry).__name__}")
        if entry and not entry.keys() & KEYWORDS:
            raise ValueError(f"the argument {name!r} is described by {', '.join(map(repr, entry))}, none a known key")
        entry = dict(entry)
        if isinstance(entry.get("required"), bool):
            marks[name] = entry.pop("required")
        if isinstance(entry.get("optional"), bool):
            marks[name] = not entry.pop("optional")
        if isinstance(entry.get("type"), str):
            entry["type"], said = _strip_optional(entry["type"])
            if said:
                optional.add(name)
        if "default" in entry or entry.get("nullable") is True:
            optional.add(name)
        if isinstance(entry.get("description"), str) and not entry["description"].strip():
            del entry["description"]
        properties[name] = to_json_schema(entry, change)
    if isinstance(listed, list):
        required = [name for name in properties if name in listed]
    elif marks:
        required = [name for name in properties if marks.get(name)]
    else:
        required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})


def _name_of(entry: Any) -> str:
    name = entry.get("name") if isinstance(entry, dict) else entry
    if not isinstance(name, str) or not name:
        raise ValueError(f"each of its parameters needs a 'name', unlike {entry!r}"[:200])
    return name


def _unnamed(entry: Any) -> Any:
    if isinstance(entry, str):
        return {}
    inner = {key: value for key, value in entry.items() if key != "name"}
    schema = inner.pop("schema", None)
    return {**inner, **schema} if isinstance(schema, dict) else inner


def _lift_required(schema: dict[str, Any]) -> None:
    """Convert `"required": true` of single properties (older drafts) to the object's list `required`."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return
    marked = {
        name: inner["required"]
        for name, inner in properties.items()
        if isinstance(inner, dict) and isinstance(inner.get("required"), bool)
    }
    if marked:
        schema["properties"] = {
            name: {key: value for key, value in inner.items() if key != "required"} if name in marked else inner
            for name, inner in properties.items()
        }
        listed = schema.get("required") if isinstance(schema.get("required"), list) else []
        required = [*listed, *(name for name, value in marked.items() if value and name not in listed)]
        if required:
            schema["required"] = required


def _allow_null(schema: dict[str, Any]) -> None:
    kind = schema.get("type")
    if kind is not None:
        kinds = kind if isinstance(kind, list) else [kind]
        schema["type"] = kinds if "null" in kinds else [*kinds, "null"]
    elif "$ref" in schema:
        schema["anyOf"] = [{"$ref": schema.pop("$ref")}, {"type": "null"}]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _read_type(schema: dict[str, Any], change: Change) -> None:
    """Replace type names of other languages by their schemas."""
    kind = schema.get("type")
    if isinstance(kind, list) and all(isinstance(name, str) for name in kind):
        if not all(name in JSON_TYPES for name in kind):
            del schema["type"]
            _merge(schema, _union([_type_schema(name, change) for name in kind]))
    elif isinstance(kind, str) and kind not in JSON_TYPES:
        del schema["type"]
        _merge(schema, _type_schema(kind, change))


def _merge(schema: dict[str, Any], said: dict[str, Any]) -> None:
    """Prepend the keywords of a type name; the schema's own keywords take precedence."""
    own = dict(schema)
    schema.clear()
    schema.update({**said, **own})


def _type_schema(name: str, change: Change) -> dict[str, Any]:
    schema = _parse_type(_strip_optional(name)[0])
    if schema is None:
        change(f"the type {name!r} is not known: any value is allowed")
        return {}
    return schema


def _strip_optional(name: str) -> tuple[str, bool]:
    """Remove the mark of an optional argument: `int, optional`, `Optional[int]`, `optional int`."""
    stripped = re.sub(r"\s*[,(]\s*optional\s*\)?\s*$|^\s*optional\s*,?\s+", "", name, flags=re.IGNORECASE)
    stripped = re.sub(r",\s*default(s|\s|=).*$", "", stripped, flags=re.IGNORECASE)
    return stripped, stripped != name or bool(re.match(r"\s*(typing\.)?optional\s*\[", name, re.IGNORECASE))


def _parse_type(name: str) -> dict[str, Any] | None:
    """Return the schema of a type name, or `None` if it is unknown."""
    name = name.strip().removeprefix("typing.")
    if name.lower() in TYPES:
        return dict(TYPES[name.lower()])
    alternatives = list(_split(name, "|"))
    if len(alternatives) > 1:
        return _all_known(alternatives, _union)
    match = re.fullmatch(r"([\w.]+)\s*[\[<(](.+)[\]>)]", name, re.DOTALL)
    if match is None:
        if name.endswith("[]"):
            return _all_known([name[:-2]], lambda inner: {"type": "array", "items": inner[0]})
        return None
    outer, inner = match[1].removeprefix("typing.").lower(), match[2]
    if outer == "literal":
        try:
            return {"enum": list(ast.literal_eval(f"[{inner}]"))}
        except (ValueError, SyntaxError):
            return None
    parts = list(_split(inner, ","))
    if outer in ("optional", "union"):
        return _all_known(parts, lambda read: _union([*read, *([{"type": "null"}] if outer == "optional" else [])]))
    kind = TYPES.get(outer, {}).get("type")
    if kind == "object":
        if len(parts) != 2:
            return {"type": "object"}
        return _all_known(parts[1:], lambda read: {"type": "object"} | _described(additionalProperties=read[0]))
    if kind == "array" and outer == "tuple" and "..." not in parts:
        fixed = {"minItems": len(parts), "maxItems": len(parts)}
        return _all_known(parts, lambda read: {"type": "array", "prefixItems": read, **fixed})
    if kind == "array":
        unique = {"uniqueItems": True} if outer == "set" else {}
        return _all_known(parts[:1], lambda read: {"type": "array"} | _described(items=read[0]) | unique)
    return None


def _all_known(names: list[str], build: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> dict[str, Any] | None:
    read = [_parse_type(name) for name in names]
    return None if any(schema is None for schema in read) else build(read)


def _described(**keywords: dict[str, Any]) -> dict[str, Any]:
    return {name: schema for name, schema in keywords.items() if schema}


def _union(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if any(not schema for schema in schemas):
        return {}
    if all(schema.keys() == {"type"} for schema in schemas):
        kinds = [schema["type"] for schema in schemas]
        kinds = list(dict.fromkeys(name for kind in kinds for name in (kind if isinstance(kind, list) else [kind])))
        return {"type": kinds[0] if len(kinds) == 1 else kinds}
    return {"anyOf": schemas}


def _split(text: str, separator: str) -> Iterator[str]:
    """Split a type name at separators outside of brackets and quotes."""
    depth, start, quote = 0, 0, ""
    for position, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[<(":
            depth += 1
        elif letter in "]>)":
            depth -= 1
        elif letter == separator and depth == 0:
            yield text[start:position].strip()
            start = position + 1
    yield text[start:].strip()
