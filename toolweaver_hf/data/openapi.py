"""Conversion of OpenAPI documents to catalog rows, one tool per operation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import url2pathname

from referencing import Registry, Resource, Specification
from referencing.exceptions import Unresolvable

from .documents import read_documents
from .schemas import MANY, NAMED, ONE, to_json_schema


METHODS = ("get", "put", "post", "delete", "patch", "head", "options", "trace")
BODY = "body"  # argument name for a request body that is not an object, or whose property names clash with parameters
OWN_HEADERS = ("accept", "content-type", "authorization")  # not parameters, by the specification
MAX_DEFINITIONS = 1000  # maximum number of schemas referenced by one operation
ANNOTATIONS = ("example", "xml", "externalDocs", "discriminator")  # OpenAPI keywords without a meaning in JSON Schema
# Keys of a Swagger parameter that are not part of its schema.
NO_SCHEMA = ("name", "in", "description", "required", "allowEmptyValue", "collectionFormat")


class Node(NamedTuple):
    """A value of a document, with the base URI of its references."""

    value: Any
    base: str


def openapi_tools(
    document: dict[str, Any], path: Path | None = None, leave_out: Callable[[str, str], None] | None = None
) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Convert an OpenAPI 3.0, OpenAPI 3.1 or Swagger 2.0 description to rows of a catalog.

    The tool's id is the `operationId`, or the method and path if it is missing or not unique. The tool's arguments are
    the operation's parameters and the properties of its request body; referenced schemas are placed under `$defs`.
    Properties that are `readOnly` are left out, because only responses have them. `metadata` describes the request:
    `method`, `path`, the body's `content_type` (JSON if available), and in `arguments` the location of each argument
    (`path`, `query`, `header`, `cookie` or `body`). Arguments with the same name are prefixed with their location, and
    `names` maps them to their original names. The headers `Accept`, `Content-Type` and `Authorization` are not
    parameters, by the specification.

    References are resolved within the document's folder, and never over the network. Keywords without a meaning in
    JSON Schema are removed: `example`, `xml`, `externalDocs`, `discriminator` and extensions (`x-`).

    Args:
        document (`dict`): The parsed document.
        path (`Path`, *optional*): The document's file. Without it, references to other files are errors.
        leave_out (`Callable[[str, str], None]`, *optional*): Called with the place of an invalid operation and the
            reason. Without it, an invalid operation is an error.

    Returns:
        `Iterator[tuple[str, dict, list[str]]]`: for each operation its place, such as `GET /pets`, its row, and the
        changes made by the conversion to JSON Schema.

    Raises:
        `ValueError`: naming the invalid operation or reference, or the unsupported version.
    """
    version = str(document.get("openapi", document.get("swagger")))
    if not version.startswith("2." if "swagger" in document else "3."):
        raise ValueError(f"OpenAPI {version} is not read, only 2.0, 3.0 and 3.1: convert the document first")
    reader = _Reader(document, path)
    ids: set[str] = set()

    def attempt(place: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except RecursionError:
            reason = "its schemas are nested too deeply"
        except ValueError as error:
            reason = str(error)
        if leave_out is None:
            raise ValueError(f"{place}: {reason}")
        leave_out(place, reason)
        return None

    paths = reader.follow(Node(document.get("paths") or {}, reader.base))
    for name, value in _object(paths.value, "paths").items():
        if name.startswith("x-"):
            continue
        for item, method in attempt(name, lambda value=value: reader.operations(Node(value, paths.base))) or ():
            place = f"{method.upper()} {name}"
            read = attempt(place, lambda item=item, method=method, name=name: reader.tool(method, name, item))
            if read is not None:
                row, changes = read
                short = re.sub(r"[\W_]+", "_", f"{method}_{name}").strip("_")
                candidates = (row["id"], short, *(f"{short}_{number}" for number in range(2, len(ids) + 3)))
                tool_id = next(tool_id for tool_id in candidates if tool_id and tool_id not in ids)
                if row["id"] and tool_id != row["id"]:
                    row["metadata"]["operationId"] = row["id"]
                ids.add(tool_id)
                yield place, row | {"id": tool_id}, changes


class _Reader:
    """Reads operations and resolves their references."""

    def __init__(self, document: dict[str, Any], path: Path | None):
        self.document = document
        self.is_swagger = "swagger" in document
        self.base = "" if path is None else path.resolve().as_uri()
        self.folder = None if path is None else path.resolve().parent
        self.found: dict[tuple[str, str], Node] = {}
        self.files: dict[str, Resource] = {}
        self.registry = Registry(retrieve=self.retrieve).with_resource(self.base, _resource(document))
        self.names: dict[Any, str] = {}  # names of referenced schemas under `$defs`
        # By name: the JSON Schema, the names it references, and the changes made by its conversion.
        self.definitions: dict[str, tuple[Any, list[str], list[str]]] = {}
        self.waiting: dict[str, tuple[Node, Any, Any]] = {}

    def retrieve(self, uri: str) -> Resource:
        """Read a file of the document's folder."""
        if uri not in self.files:
            parts = urlsplit(uri)
            if self.folder is None or parts.scheme != "file" or parts.netloc:
                where = "over the network" if parts.scheme not in ("", "file") else "out of the document"
                raise ValueError(f"leads {where} and is not followed: put the file next to the document")
            path = Path(url2pathname(parts.path)).resolve()
            if not path.is_relative_to(self.folder):
                raise ValueError("leads out of the document's folder")
            if not path.is_file():
                raise ValueError("leads to a file that is not there")
            documents = [document for _, document in read_documents(path.read_text(encoding="utf-8-sig"), path)]
            if len(documents) != 1:
                raise ValueError("leads to a file that is not one document")
            self.files[uri] = _resource(documents[0])
        return self.files[uri]

    def look_up(self, reference: str, base: str) -> Node:
        """Resolve a reference against a base URI."""
        if (reference, base) not in self.found:
            try:
                resolved = self.registry.resolver(base).lookup(reference)
            except (Unresolvable, TypeError, ValueError) as error:  # the latter two for a pointer into a wrong type
                causes = (error.__cause__, error.__cause__ and error.__cause__.__cause__)
                reason = next((str(cause) for cause in causes if type(cause) is ValueError), "leads nowhere")
                raise ValueError(f"the reference {reference!r} {reason}") from None
            self.found[reference, base] = Node(resolved.contents, urldefrag(urljoin(base, reference)).url)
        return self.found[reference, base]

    def follow(self, node: Node) -> Node:
        """Resolve an object that is a reference; return any other node unchanged."""
        for _ in range(20):
            if not isinstance(node.value, dict) or not isinstance(node.value.get("$ref"), str):
                return node
            node = self.look_up(node.value["$ref"], node.base)
        raise ValueError(f"the reference {node.value['$ref']!r} leads round in a circle")

    def operations(self, node: Node) -> list[tuple[list[Node], str]]:
        """List the operations of a path: for each, the objects that describe the path, and the method."""
        beside = {key: value for key, value in _object(node.value, "a path").items() if key != "$ref"}
        item = [Node(beside, node.base)]
        if len(beside) < len(node.value):
            followed = self.follow(node)
            item.append(Node(_object(followed.value, "a path"), followed.base))
        return [(item, method) for method in METHODS if any(method in part.value for part in item)]

    def tool(self, method: str, path: str, item: list[Node]) -> tuple[dict[str, Any], list[str]]:
        operation = self.follow(next(Node(part.value[method], part.base) for part in item if method in part.value))
        _object(operation.value, "the operation")
        body = Node(operation.value.get("requestBody") or {}, operation.base)
        media = None
        # Parameters of the operation override those of the path.
        declared: dict[tuple[str, str], Node] = {}
        for part in (*reversed(item), operation):
            for value in _list(part.value, "parameters"):
                parameter = self.follow(Node(value, part.base))
                described = _object(parameter.value, "a parameter")
                name, place = described.get("name"), described.get("in")
                if not isinstance(name, str) or not isinstance(place, str):
                    raise ValueError("a parameter needs a 'name' and an 'in'")
                if place != "header" or name.lower() not in OWN_HEADERS:
                    declared[name, place] = parameter

        arguments: list[tuple[str, str, Any, bool]] = []  # name, location, schema, required
        used: list[str] = []
        for (name, place), parameter in declared.items():
            value = parameter.value
            if self.is_swagger and place == "body":
                media = self.swagger_media(operation.value, ("json", ""))
                content = {media: {"schema": value.get("schema") or {}}}
                body = Node({**value, "content": content}, parameter.base)
                continue
            if self.is_swagger:
                schema = {key: inner for key, inner in value.items() if key not in NO_SCHEMA}
                schema = {**schema, **(value.get("schema") or {})}
                if place == "formData":
                    media, place = self.swagger_media(operation.value, ("multipart", "form")), "body"
            else:
                schema = value.get("schema") or _content(parameter).schema or {}
            schema = _described(self.plain(Node(schema, parameter.base), schema, used), value.get("description"))
            arguments.append((name, place, schema, bool(value.get("required")) or place == "path"))

        body = self.follow(body)
        content = _content(Node(_object(body.value, "requestBody"), body.base))
        if content.media is not None:
            media = content.media
            arguments += self.body_arguments(Node(content.schema, body.base), body.value, arguments, used)

        names = _distinct_names(arguments)
        changes: list[str] = []
        properties = {
            name: to_json_schema(schema, changes.append)
            for name, (_, _, schema, _) in zip(names, arguments, strict=True)
        }
        required = [name for name, (*_, is_required) in zip(names, arguments, strict=True) if is_required]
        parameters: dict[str, Any] = {"type": "object", "properties": properties}
        if required:
            parameters["required"] = required
        definitions = self.collect(used, changes)
        if definitions:
            parameters["$defs"] = definitions
        metadata: dict[str, Any] = {"method": method.upper(), "path": path}
        if media is not None:
            metadata["content_type"] = media
        metadata["arguments"] = {name: place for name, (_, place, _, _) in zip(names, arguments, strict=True)}
        renamed = {name: argument[0] for name, argument in zip(names, arguments, strict=True) if name != argument[0]}
        if renamed:
            metadata["names"] = renamed
        tags = [tag for tag in _list(operation.value, "tags") if isinstance(tag, str)]
        operation_id = operation.value.get("operationId")
        row = {
            "id": operation_id if _is_text(operation_id) else None,
            "description": join_sentences(operation.value.get("summary"), operation.value.get("description"))
            or f"{method.upper()} {path}",
            "parameters": parameters,
            "category": tags[0] if tags else None,
            "metadata": metadata,
        }
        return row, changes

    def body_arguments(
        self, content: Node, body: dict[str, Any], arguments: list[tuple[str, str, Any, bool]], used: list[str]
    ) -> list[tuple[str, str, Any, bool]]:
        """Convert a request body to arguments: one per property, or a single one unless it is a plain object."""
        resolved = self.follow(content)
        schema = _object(resolved.value, "the request body's schema")
        inside, is_required = _without_read_only(schema).get("properties"), bool(body.get("required"))
        taken = {name for name, *_ in arguments}
        if isinstance(inside, dict) and not {"allOf", "oneOf", "anyOf"} & schema.keys() and not inside.keys() & taken:
            listed = schema.get("required") if isinstance(schema.get("required"), list) else []
            return [
                (name, "body", self.plain(Node(value, resolved.base), schema, used), is_required and name in listed)
                for name, value in inside.items()
            ]
        whole = _described(self.plain(content, content.value, used), body.get("description"))
        return [(BODY, "body", whole, is_required)]

    def swagger_media(self, operation: dict[str, Any], wanted: tuple[str, ...]) -> str:
        """Choose one of the media types that an operation consumes."""
        consumes = [
            *_list(operation, "consumes"),
            *([] if "consumes" in operation else _list(self.document, "consumes")),
        ]
        found = [media for want in wanted for media in consumes if want in str(media)]
        default = "application/json" if "json" in wanted else "application/x-www-form-urlencoded"
        return str(found[0]) if found else default

    def plain(self, node: Node, root: Any, used: list[str]) -> Any:
        """Copy a schema for requests, with references to `$defs`, whose names are added to `used`.

        OpenAPI's annotations and read-only properties are left out. Values that only look like schemas, such as
        defaults, are unchanged.
        """
        if not isinstance(node.value, dict):
            return node.value
        result: dict[str, Any] = {}
        for key, value in _without_read_only(node.value).items():
            if key in ANNOTATIONS or key.startswith("x-"):
                continue
            if key == "$ref" and isinstance(value, str):
                name = self.definition(value, node.base, root)
                used.append(name)
                value = f"#/$defs/{name}"
            elif key in ("$defs", "definitions") and isinstance(value, dict):
                continue  # referenced definitions are collected separately
            elif key in NAMED and isinstance(value, dict):
                value = {name: self.plain(Node(inner, node.base), root, used) for name, inner in value.items()}
            elif key in (*ONE, *MANY) and isinstance(value, list):
                value = [self.plain(Node(inner, node.base), root, used) for inner in value]
            elif key in ONE:
                value = self.plain(Node(value, node.base), root, used)
            result[key] = value
        return result

    def definition(self, reference: str, base: str, root: Any) -> str:
        """Return the name of the referenced schema under `$defs`."""
        uri, fragment = urldefrag(urljoin(base, reference))
        fragment = unquote(fragment)
        key: Any = (uri, fragment)
        local = re.fullmatch(r"/(\$defs|definitions)/([^/]+)", fragment)
        inner = root.get(local[1]) if local and reference.startswith("#") and isinstance(root, dict) else None
        inside = isinstance(inner, dict) and local[2] in inner
        if inside:  # the schema's own definitions, as code generators write them
            key = (id(root), fragment)
        if key not in self.names:
            node = Node(inner[local[2]], base) if inside else self.look_up(reference, base)
            short = re.sub(r"^/(components/schemas|components|definitions|\$defs)/", "", fragment)
            short = re.sub(r"[^\w.-]+", "_", short, flags=re.ASCII).strip("_") or Path(uri).stem or "schema"
            taken = set(self.names.values())
            name = next(
                name for name in (short, *(f"{short}_{i}" for i in range(2, len(taken) + 3))) if name not in taken
            )
            self.names[key] = name
            self.waiting[name] = (
                node,
                root if inside else node.value,
                root,
            )  # root is kept alive so that its id() is not reused
        return self.names[key]

    def collect(self, used: list[str], changes: list[str]) -> dict[str, Any]:
        """Return the definitions of the names and, transitively, of the names they reference."""
        definitions: dict[str, Any] = {}
        open_names = list(used)
        while open_names:
            name = open_names.pop()
            if name in definitions:
                continue
            if len(definitions) == MAX_DEFINITIONS:
                raise ValueError(f"it refers to more than {MAX_DEFINITIONS} schemas")
            if name not in self.definitions:
                node, root, _ = self.waiting[name]
                further: list[str] = []
                said: list[str] = []
                self.definitions[name] = to_json_schema(self.plain(node, root, further), said.append), further, said
            definitions[name], further, said = self.definitions[name]
            open_names += further
            changes += said
        return definitions


class _Content(NamedTuple):
    media: str | None = None
    schema: Any = None


def _content(holder: Node) -> _Content:
    """Return the content of a request body or parameter, preferring media types with a schema, then JSON."""
    content = holder.value.get("content")
    media = {
        name: value
        for name, value in (content if isinstance(content, dict) else {}).items()
        if isinstance(value, dict)
    }
    if not media:
        return _Content()

    def rank(name: str) -> tuple[bool, bool, bool]:
        return "schema" not in media[name], not name.startswith("application/json"), "json" not in name

    name = min(media, key=rank)
    return _Content(name, media[name].get("schema") or {})


def _without_read_only(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without its read-only properties, which only responses have."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict):
        return schema
    hidden = [name for name, inner in properties.items() if isinstance(inner, dict) and inner.get("readOnly") is True]
    schema = {**schema, "properties": {name: inner for name, inner in properties.items() if name not in hidden}}
    if isinstance(required, list):
        schema["required"] = [name for name in required if name not in hidden]
    return schema


def _distinct_names(arguments: list[tuple[str, str, Any, bool]]) -> list[str]:
    """Return unique names; arguments that share a name are prefixed with their location."""
    given = [name for name, *_ in arguments]
    names: list[str] = []
    for name, place, *_ in arguments:
        if given.count(name) > 1:
            name = "request_body" if (name, place) == (BODY, "body") else f"{place}_{name}"
            while name in names or name in given:
                name += "_"
        names.append(name)
    return names


def _resource(document: Any) -> Resource:
    return Resource(contents=document, specification=Specification.OPAQUE)


def join_sentences(*texts: Any) -> str:
    """Join the non-empty strings as sentences."""
    present = list(dict.fromkeys(text.strip() for text in texts if _is_text(text)))
    return " ".join(text if text[-1] in ".!?" or text == present[-1] else f"{text}." for text in present)


def _described(schema: Any, description: Any) -> Any:
    """Add the parameter's description to its schema, unless the schema has one."""
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
