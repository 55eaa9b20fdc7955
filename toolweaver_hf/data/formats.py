"""The formats of tools that other projects write: documents, rows and their fields."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .openapi import join_sentences, openapi_tools


def json_lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from None


def parse_document(text: str, path: Path) -> Any:
    """Parse a document of JSON or, by its name, of YAML."""
    if path.suffix not in (".yaml", ".yml"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
    try:
        # A few lines of aliases can stand for more data than fits into memory.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _JsonLikeLoader)):
            raise ValueError("aliases are not read: write it as JSON")
        return json.loads(json.dumps(yaml.load(text, _JsonLikeLoader)))
    except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON-compatible YAML: {error}") from None


class _JsonLikeLoader(yaml.CSafeLoader):
    """Reads plain words as JSON does: `no` and dates are texts."""


_JsonLikeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":bool"))]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}


_JsonLikeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$"), list("tf"))


def document_rows(document: Any) -> Iterator[tuple[str, Any]]:
    """Find the tools in a document; yield each with its place."""
    if isinstance(document, dict):
        if "openapi" in document or "swagger" in document:
            yield from openapi_tools(document)
            return
        if isinstance(document.get("result"), dict):  # a JSON-RPC answer of an MCP server
            document = document["result"]
        if isinstance(document.get("api_list"), list) and "tool_name" in document:  # ToolBench
            shared = {name: document.get(name) for name in ("tool_name", "tool_description", "category_name")}
            document = [
                shared | {"api_name": api.get("name")} | api if isinstance(api, dict) else api
                for api in document["api_list"]
            ]
        else:
            document = document.get("tools", document.get("functions"))
    if isinstance(document, list) and document and all(isinstance(row, dict) and "query" in row for row in document):
        document = _instructions_apis(document)
    if not isinstance(document, list):
        raise ValueError("it holds no list of tools: give a list, an object with a list 'tools', or OpenAPI 3")
    for number, row in enumerate(document, start=1):
        yield f"item {number}", row


def _instructions_apis(instructions: list[dict[str, Any]]) -> list[Any]:
    """Return the APIs that instructions of ToolBench may use, each once."""
    apis: dict[str, Any] = {}
    for row in instructions:
        for api in row.get("api_list") or []:
            name = f"{api.get('tool_name')}&&{api.get('api_name')}" if isinstance(api, dict) else str(api)
            apis.setdefault(name, api)
    return list(apis.values())


TOOLBENCH_TYPES = {
    "number": "number",
    "integer": "integer",
    "boolean": "boolean",
    "array": "array",
    "object": "object",
}


def toolbench_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a [`Tool`] for an API of ToolBench."""
    tool, api = row["tool_name"], row["api_name"]
    if not isinstance(tool, str) or not isinstance(api, str):
        raise ValueError("an API of ToolBench needs a 'tool_name' and an 'api_name'")
    properties, required = {}, []
    for kind in ("required_parameters", "optional_parameters"):
        declared = row.get(kind) or []
        for parameter in declared if isinstance(declared, list) else [None]:
            if not isinstance(parameter, dict) or not isinstance(parameter.get("name"), str):
                raise ValueError(f"tool '<<{tool}&&{api}>>': each of its {kind} needs a 'name'")
            schema = {"type": TOOLBENCH_TYPES.get(str(parameter.get("type")).lower(), "string")}
            if isinstance(parameter.get("description"), str) and parameter["description"].strip():
                schema["description"] = parameter["description"].strip()
            properties[parameter["name"]] = schema
            if kind == "required_parameters":
                required.append(parameter["name"])
    parameters = {"type": "object", "properties": properties}
    description = join_sentences(row.get("api_description") or row.get("description"), row.get("tool_description"))
    return {
        "id": f"<<{tool}&&{api}>>",
        "name": f"{tool}: {api}",
        "description": description or f"{api} of {tool}",  # many APIs of ToolBench are described by name alone
        "parameters": parameters | ({"required": required} if required else {}),
        "category": row.get("category_name") or None,
    }


SEALTOOLS_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


def sealtools_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a [`Tool`] for an API of Seal-Tools."""
    name = row["api_name"]
    schemas = []
    for kind in ("parameters", "responses"):
        declared = row.get(kind) or {}
        if not isinstance(declared, dict) or not all(isinstance(field, dict) for field in declared.values()):
            raise ValueError(f"tool {name!r}: each of its {kind} must be a JSON object")
        properties = {
            key: {**field, "type": SEALTOOLS_TYPES.get(field.get("type"), "string")} for key, field in declared.items()
        }
        schemas.append({"type": "object", "properties": properties})
    parameters, output = schemas
    return {
        "id": name,
        "description": row.get("api_description"),
        "parameters": parameters | ({"required": row["required"]} if row.get("required") else {}),
        "category": row.get("field") or None,
        "metadata": {"output_schema": output} if output["properties"] else {},
    }
