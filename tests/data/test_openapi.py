"""Descriptions in OpenAPI and Swagger: what their operations ask for must be in the tool, and nothing else."""

import json
import os

import jsonschema
import pytest
import yaml

from toolweaver_hf.data.catalog import Tool, ToolCatalog


STRING, INTEGER = {"type": "string"}, {"type": "integer"}


def read(tmp_path, paths, version="3.0.3", name="openapi.yaml", **rest):
    key = "swagger" if version == "2.0" else "openapi"
    (tmp_path / name).write_text(yaml.safe_dump({key: version, "paths": paths, **rest}), encoding="utf-8")
    return ToolCatalog.from_file(tmp_path / name)


def post(content, **rest):
    return {"/notes": {"post": {"operationId": "note", "requestBody": {"content": content, "required": True}, **rest}}}


NOTE = {"type": "object", "properties": {"text": STRING, "to": INTEGER}, "required": ["text"]}


@pytest.mark.parametrize(
    "media",
    [
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "*/*",
        "application/merge-patch+json",
        "application/json; charset=utf-8",
        "application/xml",
    ],
)
def test_every_media_types_properties_are_arguments(tmp_path, media):
    tool = read(tmp_path, post({media: {"schema": NOTE}}))["note"]
    assert tool == Tool(
        "note",
        "POST /notes",
        parameters=NOTE,
        metadata={
            "method": "POST",
            "path": "/notes",
            "content_type": media,
            "arguments": {"text": "body", "to": "body"},
        },
    )


def test_json_comes_first_and_a_body_without_a_schema_is_an_argument(tmp_path):
    other = {"schema": {"type": "object", "properties": {"xml": STRING}}}
    tool = read(tmp_path, post({"application/xml": other, "text/csv": {}, "application/json": {"schema": NOTE}}))[
        "note"
    ]
    assert tool.metadata["content_type"] == "application/json" and "text" in tool.parameters["properties"]
    tool = read(tmp_path, post({"application/octet-stream": {}}))["note"]
    assert tool.parameters == {"type": "object", "properties": {"body": {}}, "required": ["body"]}


def test_swagger_2(tmp_path):
    paths = {
        "/books/{isbn}": {
            "parameters": [{"$ref": "#/parameters/isbn"}],
            "put": {
                "summary": "Change a book",
                "tags": ["Books"],
                "parameters": [
                    {"name": "book", "in": "body", "required": True, "schema": {"$ref": "#/definitions/Book"}},
                    {"name": "tags", "in": "query", "type": "array", "items": STRING, "collectionFormat": "csv"},
                    {"name": "Authorization", "in": "header", "type": "string"},
                ],
            },
        },
        "/covers": {
            "post": {
                "operationId": "addCover",
                "consumes": ["multipart/form-data"],
                "parameters": [
                    {"name": "image", "in": "formData", "type": "file", "required": True, "description": "A picture."},
                    {"name": "size", "in": "formData", "type": "integer", "minimum": 0, "exclusiveMinimum": True},
                ],
            }
        },
        "/names": {
            "post": {"parameters": [{"name": "all", "in": "body", "schema": {"type": "array", "items": STRING}}]}
        },
    }
    person = {"type": "object", "properties": {"name": STRING, "boss": {"$ref": "#/definitions/Person"}}}
    book = {
        "type": "object",
        "properties": {"title": STRING, "author": {"$ref": "#/definitions/Person"}},
        "required": ["title"],
    }
    catalog = read(
        tmp_path,
        paths,
        "2.0",
        consumes=["application/xml", "application/json"],
        parameters={"isbn": {"name": "isbn", "in": "path", "type": "string", "required": True, "pattern": "^[0-9]+$"}},
        definitions={"Book": book, "Person": person},
    )
    assert catalog["put_books_isbn"] == Tool(
        "put_books_isbn",
        "Change a book",
        parameters={
            "type": "object",
            "properties": {
                "isbn": {"type": "string", "pattern": "^[0-9]+$"},
                "tags": {"type": "array", "items": STRING},
                "title": STRING,
                "author": {"$ref": "#/$defs/Person"},
            },
            "required": ["isbn", "title"],
            "$defs": {
                "Person": {"type": "object", "properties": {"name": STRING, "boss": {"$ref": "#/$defs/Person"}}}
            },
        },
        category="Books",
        metadata={
            "method": "PUT",
            "path": "/books/{isbn}",
            "content_type": "application/json",
            "arguments": {"isbn": "path", "tags": "query", "title": "body", "author": "body"},
        },
    )
    cover = catalog["addCover"]
    assert cover.parameters == {
        "type": "object",
        "properties": {
            "image": {"type": "string", "format": "binary", "description": "A picture."},
            "size": {"type": "integer", "exclusiveMinimum": 0},
        },
        "required": ["image"],
    }
    assert cover.metadata["content_type"] == "multipart/form-data"
    assert cover.metadata["arguments"] == {"image": "body", "size": "body"}
    assert catalog["post_names"].parameters["properties"] == {"body": {"type": "array", "items": STRING}}


def test_files_beside_the_document(tmp_path):
    """Paths, operations, parameters and schemas in files of their own, of JSON and YAML, that refer in circles."""
    (tmp_path / "paths").mkdir()
    (tmp_path / "common").mkdir()
    (tmp_path / "paths" / "drops.yaml").write_text(
        """
        post: {$ref: operations.yml#/create}
        parameters: [{$ref: "../common/parameters.json#/account id"}]
        """
    )
    (tmp_path / "paths" / "operations.yml").write_text(
        """
        create:
          operationId: createDrop
          requestBody:
            required: true
            content: {application/json: {schema: {$ref: ../common/drop.yml}}}
        """
    )
    account = {"name": "account", "in": "query", "required": True, "schema": {"$ref": "#/schemas/Account"}}
    (tmp_path / "common" / "parameters.json").write_text(
        json.dumps({"account id": account, "schemas": {"Account": {"type": "string", "minLength": 3}}})
    )
    (tmp_path / "common" / "drop.yml").write_text(
        """
        type: object
        required: [name]
        properties:
          name: {type: string}
          parent: {$ref: drop.yml}
          owner: {$ref: "parameters.json#/schemas/Account"}
        """
    )
    (tool,) = catalog = read(tmp_path, {"/drops": {"$ref": "paths/drops.yaml"}})
    assert not catalog.changes
    drop = {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": STRING,
            "parent": {"$ref": "#/$defs/drop"},
            "owner": {"$ref": "#/$defs/schemas_Account"},
        },
    }
    assert tool == Tool(
        "createDrop",
        "POST /drops",
        parameters={
            "type": "object",
            "properties": {"account": {"$ref": "#/$defs/schemas_Account"}, **drop["properties"]},
            "required": ["account", "name"],
            "$defs": {"schemas_Account": {"type": "string", "minLength": 3}, "drop": drop},
        },
        metadata={
            "method": "POST",
            "path": "/drops",
            "content_type": "application/json",
            "arguments": {"account": "query", "name": "body", "parent": "body", "owner": "body"},
        },
    )
    jsonschema.validate({"account": "abc", "name": "x", "parent": {"name": "y"}}, tool.parameters)


def parameter(schema, name="q"):
    return {"name": name, "in": "query", "schema": schema}


def test_files_elsewhere_cost_their_tool_alone(tmp_path, caplog):
    (tmp_path / "secret.json").write_text('{"type": "string"}')
    (tmp_path / "api").mkdir()
    os.symlink(tmp_path / "secret.json", tmp_path / "api" / "link.json")
    references = [
        "../secret.json",
        "link.json",
        "none.json",
        "http://127.0.0.1:9/x.json",
        "file://host/x.json",
        "#/no",
    ]
    paths = {f"/{i}": {"get": {"parameters": [parameter({"$ref": ref})]}} for i, ref in enumerate(references)}
    catalog = read(tmp_path / "api", {**paths, "/good": {"get": {"operationId": "good"}}})
    assert catalog.ids == ["good"]
    (record,) = caplog.records
    for place, says in {
        "GET /0": "the reference '../secret.json' leads out of the document's folder",
        "GET /1": "the reference 'link.json' leads out of the document's folder",
        "GET /2": "the reference 'none.json' leads to a file that is not there",
        "GET /3": "the reference 'http://127.0.0.1:9/x.json' leads over the network",
        "GET /5": "the reference '#/no' leads nowhere",
    }.items():
        assert f"left out: {says}" in record.getMessage() and place in record.getMessage()
    with pytest.raises(ValueError, match=r"openapi\.yaml: .*empty.*GET /3: left out: the reference 'http://127"):
        read(tmp_path / "api", {"/3": paths["/3"]})


def test_references_to_values_of_a_wrong_type_cost_their_tool_alone(tmp_path):
    parameters = [
        parameter({"$ref": "#/components/schemas/Note"}),
        parameter({"$ref": "#/info/title/short"}),
        {"$ref": "#/x-nothing"},
        {"$ref": "#/x-list"},
    ]
    paths = {f"/{i}": {"get": {"parameters": [each]}} for i, each in enumerate(parameters)}
    rest = {"components": None, "info": {"title": "Notes"}, "x-nothing": None, "x-list": []}
    catalog = read(tmp_path, {**paths, "/good": {"get": {"operationId": "good"}}}, **rest)
    assert catalog.ids == ["good"]
    assert catalog.changes == {
        "left out: the reference '#/components/schemas/Note' leads nowhere": ["GET /0"],
        "left out: the reference '#/info/title/short' leads nowhere": ["GET /1"],
        "left out: a parameter must be an object, not NoneType": ["GET /2"],
        "left out: a parameter must be an object, not list": ["GET /3"],
    }


def test_every_pointer_resolves_and_data_stays_data(tmp_path):
    tag = {"allOf": [{"type": "object", "properties": {"$ref": STRING, "label": STRING}}]}
    data = {"$ref": "#/nowhere"}
    schemas = {
        "Tag": tag,
        "with space/é": {"type": "integer"},
        "Local": {"$defs": {"Inner": {"type": "boolean"}}, "type": "array", "items": {"$ref": "#/$defs/Inner"}},
        "Data": {"type": "object", "default": data, "examples": [data], "x-more": data, "enum": [data], "const": data},
    }
    references = {
        "part": "#/components/schemas/Tag/allOf/0",
        "percent": "#/components/schemas/with%20space~1%C3%A9",
        "local": "#/components/schemas/Local",
        "data": "#/components/schemas/Data",
        "other": "#/paths/~1a/get/parameters/0/schema",
    }
    paths = {"/a": {"get": {"parameters": [parameter({"$ref": ref}, name) for name, ref in references.items()]}}}
    (tool,) = catalog = read(tmp_path, paths, "3.1.0", components={"schemas": schemas})
    assert not catalog.changes
    assert tool.parameters["$defs"] == {
        "Tag_allOf_0": tag["allOf"][0],
        "with_space_1": {"type": "integer"},
        "Inner": {"type": "boolean"},
        "Local": {"type": "array", "items": {"$ref": "#/$defs/Inner"}},
        "Data": {"type": "object", "default": data, "examples": [data], "enum": [data], "const": data},
        "paths_1a_get_parameters_0_schema": {"$ref": "#/$defs/Tag_allOf_0"},
    }
    jsonschema.validate({"part": {"label": "x"}, "percent": 1, "local": [True], "other": {}}, tool.parameters)


def test_properties_that_are_named_like_annotations(tmp_path):
    names = (
        "example",
        "xml",
        "nullable",
        "discriminator",
        "description",
        "externalDocs",
        "x-id",
        "type",
        "properties",
    )
    inner = {name: {"type": "string", "nullable": True, "example": "x", "xml": {}, "x-of": 1} for name in names}
    nested = {"type": "object", "properties": {"deep": {"type": "object", "properties": inner}}}
    tool = read(tmp_path, post({"application/json": {"schema": nested}}))["note"]
    deep = tool.parameters["properties"]["deep"]["properties"]
    assert deep == {name: {"type": ["string", "null"]} for name in names}
    flat = read(tmp_path, post({"application/json": {"schema": nested["properties"]["deep"]}}))["note"]
    assert flat.parameters["properties"] == deep


def test_read_only_properties_are_no_arguments(tmp_path):
    """Neither in the request body nor in what it refers to, and neither as properties nor as required."""
    person = {"type": "object", "properties": {"id": {**INTEGER, "readOnly": True}, "name": STRING}}
    person["required"] = ["id", "name"]
    parent = {"type": "object", "properties": {"child": {"$ref": "#/components/schemas/Person"}}}
    body = {**person, "properties": {**person["properties"], **parent["properties"]}}
    sent = {"type": "object", "properties": {"name": STRING}, "required": ["name"]}
    child = {"child": {"$ref": "#/$defs/Person"}}
    for schema, properties in (
        (body, {"name": STRING, **child}),
        ({"allOf": [person, parent]}, {"body": {"allOf": [sent, {"type": "object", "properties": child}]}}),
    ):
        content = {"application/json": {"schema": schema}}
        (tool,) = read(tmp_path, post(content), components={"schemas": {"Person": person}})
        assert tool.parameters["properties"] == properties
        assert tool.parameters["required"] == list(properties)[:1]
        assert tool.parameters["$defs"] == {"Person": sent}


def test_headers_of_the_client_are_no_arguments(tmp_path):
    headers = [{"name": name, "in": "header", "required": True, "schema": STRING} for name in
               ("Accept", "content-type", "Authorization", "From")]  # fmt: skip
    (tool,) = read(tmp_path, {"/a": {"get": {"parameters": [*headers, {**parameter(STRING, "accept")}]}}})
    assert tool.parameters == {
        "type": "object",
        "properties": {"From": STRING, "accept": STRING},
        "required": ["From"],
    }


def test_arguments_of_one_name_are_told_apart_by_their_place(tmp_path):
    both = [{"name": "id", "in": "path", "required": True, "schema": INTEGER}, parameter(STRING, "id")]
    body = {"content": {"text/plain": {"schema": {"type": "string"}}}, "required": True}
    paths = {
        "/a/{id}": {"parameters": both[:1], "get": {"parameters": [*both[1:], parameter(STRING, "path_id")]}},
        "/b": {"post": {"parameters": [parameter(INTEGER, "body")], "requestBody": body}},
    }
    get, send = read(tmp_path, paths)
    assert get.parameters == {
        "type": "object",
        "properties": {"path_id_": INTEGER, "query_id": STRING, "path_id": STRING},
        "required": ["path_id_"],
    }
    assert get.metadata["arguments"] == {"path_id_": "path", "query_id": "query", "path_id": "query"}
    assert get.metadata["names"] == {"path_id_": "id", "query_id": "id"}
    assert send.parameters["properties"] == {"query_body": INTEGER, "request_body": STRING}
    assert send.metadata["arguments"] == {"query_body": "query", "request_body": "body"}


def test_operations_of_one_id(tmp_path):
    operation = {"operationId": "x"}
    catalog = read(tmp_path, {"/a": {"get": operation, "put": operation}, "/a-b": {"get": {}}, "/a_b": {"get": {}}})
    assert catalog.ids == ["x", "put_a", "get_a_b", "get_a_b_2"]
    assert catalog["put_a"].metadata["operationId"] == "x"
