"""Formats of tool catalogs of other projects: documents, rows and fields."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .documents import LINES, is_json
from .openapi import join_sentences, openapi_tools
from .schemas import Change, arguments_schema, is_object_schema, to_json_schema


class Row(NamedTuple):
    """An unconverted tool of a document."""

    place: str
    """Its place in the file, for error messages."""
    fields: Any
    server: str | None = None
    """The server that the tool belongs to, which prefixes its id."""
    foreign: bool = False
    """Whether a server or a benchmark wrote it, so that a missing description is not the user's mistake."""
    listed_by: str | None = None
    """The benchmark row that lists it; several rows may list the same tool."""
    changes: list[str] | None = None
    """The changes made while reading, if `fields` are already those of a [`Tool`]."""


def document_rows(
    documents: Iterable[tuple[str, Any]], path: Path, leave_out: Callable[[str, str], None]
) -> Iterator[Row]:
    """Find the tools in the documents of a file.

    Args:
        documents (`Iterable[tuple[str, Any]]`): The documents, each with its place.
        path (`Path`): The file. References of an OpenAPI document are relative to it.
        leave_out (`Callable[[str, str], None]`): Called with the place of each omitted operation and the reason.
    """
    for place, document in documents:
        if isinstance(document, dict) and ("openapi" in document or "swagger" in document):
            for where, fields, changes in openapi_tools(document, path, leave_out):
                yield Row(f"{place}, {where}", fields, changes=changes)
        elif path.suffix.lower() in LINES or isinstance(document, list) or _is_tool(document) or _container(document):
            yield from find_rows(place, document)
        else:
            raise ValueError(
                "it holds no tools; expected a list of tools, an object with a list 'tools' or 'servers', or OpenAPI"
            )


# Keys under which an object may hold tools, or objects that hold tools.
CONTAINERS = ("tools", "functions", "function", "functionDeclarations", "function_declarations", "api_list")


def find_rows(place: str, value: Any, server: str | None = None, foreign: bool = False) -> Iterator[Row]:
    """Find the tools in a value: a tool, a list, or an object that holds tools under a known key."""
    if isinstance(value, list):
        for number, item in enumerate(value, start=1):
            inside = f"{place}, item {number}"
            is_server = isinstance(item, dict) and "tools" in item and not _is_instruction(item)
            yield from find_rows(inside, item, _server_name(item) if is_server else server, foreign)
        return
    key = _container(value)
    if key is None:
        yield Row(place, value, server, foreign)
        return
    held = json.loads(value[key]) if isinstance(value[key], str) else value[key]
    if key == "api_list" and "tool_name" in value:  # a ToolBench file
        about = {name: value.get(name) for name in ("tool_name", "tool_description", "category_name")}
        held = [{**about, "api_name": api.get("name"), **api} if isinstance(api, dict) else api for api in held]
    foreign = foreign or key in ("servers", "result", "api_list") or _is_instruction(value)
    if isinstance(held, dict) and key == "servers":
        for name, inner in held.items():
            yield from find_rows(f"{place}, {name!r}", inner, name, foreign)
    elif isinstance(held, dict) and key != "result":
        for name, inner in held.items():
            yield Row(f"{place}, {name!r}", {"name": name, **inner}, server, foreign)
    elif _is_instruction(value):
        listed_by = str(value.get("id", value.get("query_id", place)))
        yield from (row._replace(listed_by=listed_by) for row in find_rows(place, held, server, foreign))
    else:
        yield from find_rows(place, held, server, foreign)


def _container(value: Any) -> str | None:
    """Return the key under which an object holds tools."""
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("result"), dict) and "tools" in value["result"]:  # a JSON-RPC response of an MCP server
        return "result"
    servers = value.get("servers")
    if servers and all(
        isinstance(item, (dict, list)) for item in (servers.values() if isinstance(servers, dict) else servers)
    ):
        return "servers"
    for key in CONTAINERS:
        held = value.get(key)
        if isinstance(held, str) and held.lstrip().startswith("[") and _is_instruction(value) and is_json(held):
            return key
        if isinstance(held, list) and (not _is_tool(value) or all(isinstance(item, dict) for item in held)):
            return key
        if (
            isinstance(held, dict)
            and held
            and key != "function"
            and all(isinstance(item, dict) for item in held.values())
        ):
            return key
    return None


def _is_instruction(value: dict[str, Any]) -> bool:
    """Whether an object is a benchmark row: a query with its candidate tools."""
    return "query" in value or "question" in value


def _is_tool(value: Any) -> bool:
    return isinstance(value, dict) and (
        any(key in value for key in ("id", "_id", *NAMES)) or any(isinstance(value.get(key), dict) for key in WRAPPERS)
    )


def _server_name(item: dict[str, Any]) -> str | None:
    names = (item.get(key) for key in ("name", "server_name", "server", "id"))
    return next((name for name in names if isinstance(name, str) and name.strip()), None)


# Names of each field in the supported formats; the first that is present is read.
NAMES = ("name", "api_name", "tool_name", "function_name")
DESCRIPTIONS = ("description", "api_description", "desc")
ARGUMENTS = (
    *("parameters", "inputSchema", "input_schema", "args_schema", "inputs", "parametersJsonSchema"),
    *("parameters_json_schema", "input_parameters", "parameter_definitions", "args"),
)
OUTPUTS = (
    *("outputSchema", "output_schema", "responses", "response", "responseJsonSchema", "response_json_schema"),
    *("output_parameters", "output_type"),
)
SERVERS_ARGUMENTS = ("inputSchema", "input_schema")  # an MCP server's
WRAPPERS = ("function", "toolSpec")  # OpenAI's and Amazon Bedrock's
# Other known keys, which are stored in the metadata without a warning.
KEPT = (
    *("title", "annotations", "_meta", "meta", "icons", "execution", "strict", "cache_control", "tool_description"),
    *("method", "url", "template_response", "statuscode", "schema"),
)

Take = Callable[..., Any]
"""Pops the value of the first present key from a row; keys with empty values come last."""


def _function_fields(take: Take) -> dict[str, Any]:
    """OpenAI, Anthropic, Gemini, Bedrock, MCP, LangChain, smolagents, BFCL, xLAM, API-Bank, and the catalog's own."""
    tool_id, name = take("id"), take(*NAMES)
    if tool_id is None and name is None:
        raise ValueError("a tool needs an 'id' (or 'name', or BEIR's '_id') beside its 'description'")
    fields = {"id": name if tool_id is None else tool_id, "name": name or "", "description": take(*DESCRIPTIONS)}
    return fields | {"category": take("category"), "parameters": _with_required(take(*ARGUMENTS), take)}


def _beir_fields(take: Take) -> dict[str, Any]:
    return {"id": take("_id"), "name": take("title") or "", "description": take("text")}


def _toolret_fields(take: Take) -> dict[str, Any]:
    return {"id": take("id"), "description": take("documentation")}


def _sealtools_fields(take: Take) -> dict[str, Any]:
    fields = {"id": take("api_name"), "description": take("api_description"), "category": take("field") or None}
    return fields | {"parameters": _with_required(take("parameters"), take)}


def _toolbench_fields(take: Take) -> dict[str, Any]:
    tool, api = take("tool_name"), take("api_name")
    if not isinstance(tool, str) or not isinstance(api, str):
        raise ValueError("an API of ToolBench needs a 'tool_name' and an 'api_name'")
    take("name")  # repeats the api_name
    parameters = []
    for kind in ("required_parameters", "optional_parameters"):
        declared = take(kind) or []
        for parameter in declared if isinstance(declared, list) else [None]:
            if not isinstance(parameter, dict) or not isinstance(parameter.get("name"), str):
                raise ValueError(f"tool '<<{tool}&&{api}>>': each of its {kind} needs a 'name'")
            parameters.append({**parameter, "required": kind == "required_parameters"})
    description = join_sentences(take("api_description", "description"), take("tool_description"))
    return {
        "id": f"<<{tool}&&{api}>>",
        "name": f"{tool}: {api}",
        "description": description or f"{api} of {tool}",  # many ToolBench APIs have only a name
        "parameters": parameters,
        "category": take("category_name") or None,
    }


# The keys that identify each format, with its reader; the first match reads the row.
DIALECTS: tuple[tuple[tuple[str, ...], Callable[[Take], dict[str, Any]]], ...] = (
    (("_id", "text"), _beir_fields),
    (("tool_name", "api_name"), _toolbench_fields),
    (("api_name", "api_description", "parameters", "field"), _sealtools_fields),
    (("id", "documentation"), _toolret_fields),
    ((), _function_fields),
)


def _with_required(parameters: Any, take: Take) -> Any:
    """Move a list of required arguments from beside `parameters` into it."""
    if not isinstance(parameters, dict) or "required" in parameters:
        return parameters
    required = take("required", only=list)
    return parameters | {"required": required} if parameters and required is not None else parameters


def tool_fields(row: Any, change: Change, foreign: bool = False) -> dict[str, Any]:
    """Convert a row of any supported format to the fields of a [`Tool`].

    Args:
        row (`dict`): The row.
        change (`Callable[[str], None]`): Called with a description of each change.
        foreign (`bool`): Whether a missing description is derived from the tool's name.

    Raises:
        `ValueError`: for an unsupported format, naming the tool and the invalid key.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a tool must be a JSON object, not {type(row).__name__}")
    for key in WRAPPERS:
        if isinstance(row.get(key), dict):
            row = {name: value for name, value in row.items() if name != key} | row[key]
    rest = {key: value for key, value in row.items() if value is not None}
    if rest.get("type") == "function":
        del rest["type"]
    foreign = foreign or any(key in rest for key in SERVERS_ARGUMENTS)

    def take(*keys: str, only: type = object) -> Any:
        there = [key for key in keys if isinstance(rest.get(key), only) and key in rest]
        key = next((key for key in there if rest[key]), there[0] if there else None)
        return None if key is None else rest.pop(key)

    fields = next(read for needs, read in DIALECTS if all(key in rest for key in needs))(take)
    if isinstance(fields["id"], int) and not isinstance(fields["id"], bool):
        fields["id"] = str(fields["id"])
    label = f"tool {fields['id']!r}"
    try:
        fields["parameters"] = arguments_schema(_unwrapped(fields.get("parameters")), change)
    except RecursionError:
        raise ValueError(f"{label}: its schema is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    description = fields["description"]
    if foreign and (description is None or (isinstance(description, str) and not description.strip())):
        title = rest.get("title")
        fields["description"] = title if isinstance(title, str) and title.strip() else name_words(str(fields["id"]))
        change("it has no description: the words of its name stand for one")
    metadata = take("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"{label}: metadata must be a JSON object")
    metadata = dict(metadata or {})
    if "output_schema" not in metadata:
        output = next((key for key in OUTPUTS if key in rest), None)
        schema = None if output is None else _output_schema(rest[output])
        if schema is not None:
            del rest[output]
            if schema:
                metadata["output_schema"] = schema
    for key, value in rest.items():
        if key not in KEPT:
            if is_object_schema(value) and not fields["parameters"].get("properties"):
                raise ValueError(
                    f"{label}: its key {key!r} looks like the schema of its arguments: call it 'parameters'"
                )
            change(f"the key {key!r} is not known: it is kept in the metadata")
        metadata.setdefault(key, value)
    given = {name: value for name, value in fields.items() if value is not None or name == "description"}
    return given | {"metadata": metadata}


def _unwrapped(schema: Any) -> Any:
    """Unwrap a schema from Amazon Bedrock's `{"json": {...}}`."""
    if isinstance(schema, dict) and schema.keys() == {"json"} and isinstance(schema["json"], dict):
        return schema["json"]
    return schema


def _output_schema(value: Any) -> dict[str, Any] | None:
    """Return the schema of a tool's output; `None` if it is not a schema, `{}` if it is empty."""
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, dict):
        return None
    unknown: list[str] = []
    try:
        if "type" in value and not isinstance(value["type"], dict):
            schema = to_json_schema(value, unknown.append)
        elif value:
            schema = arguments_schema(value, unknown.append)
            schema = {key: inner for key, inner in schema.items() if key != "required" or "required" in value}
        else:
            return {}
    except ValueError:
        return None
    return None if unknown else schema


def name_words(name: str) -> str:
    """Split a tool's name, such as `listRoots` or `list_roots`, into words."""
    words = re.sub(r"[\W_]+|(?<=[a-z0-9])(?=[A-Z])", " ", name).strip()
    return words[:1].upper() + words[1:] if words else name
