"""From an OpenAPI 3 document to the rows of a catalog: one tool for each operation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any


METHODS = ("get", "put", "post", "delete", "patch", "head", "options", "trace")
BODY = "body"  # argument name for a request body that is not an object, or whose property names clash with parameters
MAX_DEFINITIONS = 1000  # schemas that one operation may refer to


def openapi_tools(document: dict[str, Any], path=None, leave_out=None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Turn an OpenAPI 3.0 or 3.1 document into rows of a catalog.

    An operation's id is the tool's id, or method and path where it has none. Its parameters, and the properties of its
    JSON request body, are the tool's arguments; schemas that are referred to stand under `$defs`. `metadata` tells
    how to send them: `method`, `path`, and for each argument its place (`path`, `query`, `header`, `cookie`, `body`).

    Args:
        document (`dict`): The document, of JSON or YAML.

    Returns:
        `Iterator[tuple[str, dict]]`: the place of each operation, such as `GET /pets`, and its row.

    Raises:
        `ValueError`: naming the operation or reference that is wrong, or the version that is not read.
    """
    version = document.get("openapi")
    if not isinstance(version, str) or not version.startswith("3."):
        found = document.get("swagger", version)
        raise ValueError(f"OpenAPI {found} is not read, only 3.0 and 3.1: convert the document first")
    for path, item in _object(document.get("paths", {}), "paths").items():
        item = _resolve(document, _object(item, path))
        for method in METHODS:
            if method in item:
                place = f"{method.upper()} {path}"
                try:
                    yield place, _tool(document, method, path, item)
                except RecursionError:
                    raise ValueError(f"{place}: its schemas are nested too deeply") from None
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from None


def _tool(document: dict[str, Any], method: str, path: str, item: dict[str, Any]) -> dict[str, Any]:
    operation = _object(item[method], "the operation")
    properties: dict[str, Any] = {}
    required: list[str] = []
    places: dict[str, str] = {}
    # An operation's parameter takes the place of its path's parameter of the same name.
    declared: dict[tuple[str, str], dict[str, Any]] = {}
    for parameter in [*_list(item, "parameters"), *_list(operation, "parameters")]:
        parameter = _resolve(document, _object(parameter, "a parameter"))
        name, place = parameter.get("name"), parameter.get("in")
        if not isinstance(name, str) or not isinstance(place, str):
            raise ValueError("a parameter needs a 'name' and an 'in'")
        declared[name, place] = parameter
    for (name, place), parameter in declared.items():
        schema = parameter.get("schema") or _json_content(parameter) or {}
        properties[name] = _described(_schema(schema), parameter.get("description"))
        places[name] = place
        if parameter.get("required") or place == "path":
            required.append(name)

    body = _resolve(document, _object(operation.get("requestBody", {}), "requestBody"))
    schema = _json_content(body)
    if schema is not None:
        resolved = _resolve(document, _object(schema, "the request body's schema"))
        inside = resolved.get("properties")
        plain = isinstance(inside, dict) and not {"allOf", "oneOf", "anyOf"} & resolved.keys()
        if plain and not inside.keys() & properties.keys():
            properties |= {name: _schema(value) for name, value in inside.items()}
            places |= dict.fromkeys(inside, "body")
            if body.get("required"):
                required += [name for name in _list(resolved, "required") if name in inside]
        else:
            properties[BODY] = _described(_schema(schema), body.get("description"))
            places[BODY] = "body"
            if body.get("required"):
                required.append(BODY)

    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = list(dict.fromkeys(required))
    definitions = _definitions(document, properties)
    if definitions:
        parameters["$defs"] = definitions
    tags = [tag for tag in _list(operation, "tags") if isinstance(tag, str)]
    tool_id = operation.get("operationId") or re.sub(r"[\W_]+", "_", f"{method}_{path}").strip("_")
    return {
        "id": tool_id,
        "description": join_sentences(operation.get("summary"), operation.get("description"))
        or f"{method.upper()} {path}",
        "parameters": parameters,
        "category": tags[0] if tags else None,
        "metadata": {"method": method.upper(), "path": path, "arguments": places},
    }


def join_sentences(*texts: Any) -> str:
    """Join the non-empty strings as sentences."""
    present = list(dict.fromkeys(text.strip() for text in texts if _is_text(text)))
    return " ".join(text if text[-1] in ".!?" or text == present[-1] else f"{text}." for text in present)


def _schema(schema: Any) -> Any:
    """Write a schema of OpenAPI as JSON Schema: `nullable`, boolean bounds and references are said differently there."""
    if isinstance(schema, list):
        return [_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: _schema(value) for name, value in schema.items() if name not in ("example", "xml", "nullable")}
    if isinstance(schema.get("$ref"), str):
        result["$ref"] = "#/$defs/" + _definition_name(schema["$ref"])
    if schema.get("nullable") is True and isinstance(schema.get("type"), str):
        result["type"] = [schema["type"], "null"]
    for bound in ("Minimum", "Maximum"):
        exclusive = schema.get(f"exclusive{bound}")
        if isinstance(exclusive, bool):
            del result[f"exclusive{bound}"]
            if exclusive and bound.lower() in result:
                result[f"exclusive{bound}"] = result.pop(bound.lower())
    return result


def _definitions(document: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any]:
    """Collect the schemas that the properties refer to, directly or by way of others."""
    definitions: dict[str, Any] = {}
    waiting = list(_references(properties))
    while waiting:
        name = waiting.pop()
        if name not in definitions:
            if len(definitions) == MAX_DEFINITIONS:
                raise ValueError(f"it refers to more than {MAX_DEFINITIONS} schemas")
            reference = f"#/components/schemas/{name}"
            definitions[name] = _schema(_look_up(document, reference))
            waiting += _references(definitions[name])
    return definitions


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].removeprefix("#/$defs/")
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _definition_name(reference: str) -> str:
    name = reference.removeprefix("#/components/schemas/")
    if name == reference or "/" in name:
        raise ValueError(f"the reference {reference!r} is not read, only those to '#/components/schemas/NAME'")
    return name


def _resolve(document: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """Follow the reference of an object, where it is one."""
    for _ in range(20):
        if not isinstance(value.get("$ref"), str):
            return value
        value = _object(_look_up(document, value["$ref"]), value["$ref"])
    raise ValueError(f"the reference {value['$ref']!r} leads round in a circle")


def _look_up(document: dict[str, Any], reference: str) -> Any:
    if not reference.startswith("#/"):
        raise ValueError(f"the reference {reference!r} leads out of the document: bundle it into one first")
    value: Any = document
    for key in reference[2:].split("/"):
        key = key.replace("~1", "/").replace("~0", "~")
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"the reference {reference!r} leads nowhere")
        value = value[key]
    return value


def _json_content(holder: dict[str, Any]) -> Any:
    """Return the schema of the JSON content of a request body or parameter, `None` where it has none."""
    content = holder.get("content")
    if not isinstance(content, dict):
        return None
    media = next((value for name, value in content.items() if "json" in name), None)
    return media.get("schema") if isinstance(media, dict) else None


def _described(schema: Any, description: Any) -> Any:
    """Give a parameter's schema the parameter's description where it has none of its own."""
    if isinstance(schema, dict) and "description" not in schema and _is_text(description):
        return {**schema, "description": description.strip()}
    return schema


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, not {type(value).__name__}")
    return value


def _list(holder: dict[str, Any], name: str) -> list[Any]:
    value = holder.get(name) or []
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, not {type(value).__name__}")
    return value
