import json
from pathlib import Path

import jsonschema
import pytest

from toolweaver_hf.data.catalog import Tool, ToolCatalog


FIXTURES = Path(__file__).parents[1] / "fixtures"
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Name of the city."}, "days": {"type": "integer"}},
    "required": ["city"],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_round_trip(tmp_path):
    catalog = ToolCatalog(
        [
            Tool("weather", "Weather of a city.", parameters=WEATHER, category="Weather", metadata={"unit": "°C"}),
            Tool("fx", "Converts money.", name="currency_converter"),
        ]
    )
    catalog.to_jsonl(tmp_path / "catalog.jsonl")
    again = ToolCatalog.from_file(tmp_path / "catalog.jsonl")
    assert list(again) == list(catalog)
    assert again.checksum == catalog.checksum
    assert [path.name for path in tmp_path.iterdir()] == ["catalog.jsonl"]


def test_indexing():
    catalog = ToolCatalog([Tool("a", "First."), Tool("b", "Second.")])
    assert catalog.ids == ["a", "b"]
    assert catalog["b"] is catalog[1]
    assert "a" in catalog and "c" not in catalog
    with pytest.raises(KeyError):
        catalog["c"]


def test_document_holds_what_tells_tools_apart():
    tool = Tool("w", "Weather of a city.", name="get_weather", parameters=WEATHER, category="Weather")
    assert tool.document == "Weather. get_weather: Weather of a city. Parameters: city (Name of the city), days."


def test_checksum_follows_the_document():
    tool = Tool("w", "Weather of a city.")
    assert tool.checksum == Tool("w", "Weather of a city.", metadata={"owner": "me"}).checksum
    assert tool.checksum != Tool("w", "Weather of a town.").checksum


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("container", ["list", "tools", "functions"])
def test_openai_functions(tmp_path, wrapped, container):
    function = {"name": "get_weather", "description": "Weather of a city.", "parameters": WEATHER}
    rows = [{"type": "function", "function": function} if wrapped else function]
    path = tmp_path / "functions.json"
    path.write_text(json.dumps(rows if container == "list" else {container: rows}), encoding="utf-8")
    tool = ToolCatalog.from_file(path)["get_weather"]
    assert (tool.name, tool.description, tool.parameters) == ("get_weather", "Weather of a city.", WEATHER)
    assert list(ToolCatalog.from_functions(rows)) == [tool]


def test_mcp_tools_list(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps({"tools": [{"name": "w", "description": "Weather.", "inputSchema": WEATHER}]}))
    assert ToolCatalog.from_file(path)["w"].parameters == WEATHER


def test_beir_corpus(tmp_path):
    path = write(tmp_path / "corpus.jsonl", [{"_id": "7", "title": "", "text": "tool_name:X", "metadata": {"n": 1}}])
    tool = ToolCatalog.from_file(path)["7"]
    assert (tool.name, tool.description, tool.metadata) == ("7", "tool_name:X", {"n": 1})


GOOD = {"id": "a", "description": "First."}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([GOOD, "{broken"], ["line 2", "not valid JSON"]),
        ([GOOD, {"id": "b", "description": "  "}], ["line 2", "'b'", "description is empty"]),
        ([GOOD, {"id": "b"}], ["line 2", "'b'", "description is empty"]),
        ([GOOD, GOOD], ["line 2", "'a'", "line 1", "unique"]),
        ([GOOD, ["a"]], ["line 2", "JSON object"]),
        ([GOOD, {"description": "Nameless."}], ["line 2", "'id'"]),
        ([GOOD, {"id": 5.5, "description": "Number."}], ["line 2", "5"]),
        ([GOOD, {"id": "b", "description": "B.", "parameters": {"type": "string"}}], ["line 2", "'b'", "'object'"]),
        ([GOOD, {"id": "b", "description": "B.", "metadata": "x"}], ["line 2", "'b'", "metadata"]),
        ([], ["empty"]),
    ],
)
def test_errors_name_file_line_and_tool(tmp_path, lines, says):
    path = tmp_path / "tools.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(ValueError) as error:
        ToolCatalog.from_file(path)
    for text in ["tools.jsonl", *says]:
        assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"{", b'"text"', b'{"rows": []}', b"\xff\xfe"])
def test_errors_in_a_json_document(tmp_path, content):
    path = tmp_path / "tools.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tools\.json"):
        ToolCatalog.from_file(path)


def test_item_of_a_json_list_is_named(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([{"name": "a", "description": "A."}, {"name": "b", "description": ""}]))
    with pytest.raises(ValueError, match=r"tools\.json, item 2: tool 'b'"):
        ToolCatalog.from_file(path)


def test_openapi():
    """Parameters and the body's properties are arguments; schemas referred to stand under `$defs`."""
    catalog = ToolCatalog.from_file(FIXTURES / "openapi.yaml")
    assert catalog.ids == ["getBook", "putBook", "get_loans", "post_loans"]
    get = catalog["getBook"]
    assert (get.category, get.description) == ("Books", "Look a book up. Gives its title and where it stands.")
    assert get.parameters == {
        "type": "object",
        "properties": {
            "isbn": {"type": "string", "description": "The book's ISBN."},
            "fields": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["isbn"],
    }
    assert get.metadata == {
        "method": "GET",
        "path": "/books/{isbn}",
        "arguments": {"isbn": "path", "fields": "query"},
    }
    put = catalog["putBook"]
    assert put.parameters["required"] == ["isbn", "title"]
    assert put.parameters["$defs"].keys() == {"Book", "Person"}
    jsonschema.validate({"isbn": "1", "title": None, "sequel": {"title": "II", "price": 2}}, put.parameters)
    for wrong in ({"isbn": "1"}, {"isbn": "1", "title": "I", "price": 0}, {"isbn": "1", "title": "", "sequel": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, put.parameters)
    loans = catalog["post_loans"].parameters
    assert loans["properties"]["body"] == {"type": "array", "items": {"$ref": "#/$defs/Book"}}
    assert "required" not in loans
    # Dates and words are texts in JSON, and so in YAML.
    since, is_open = catalog["get_loans"].parameters["properties"].values()
    assert since["default"] == "2024-01-31" and is_open["enum"] == ["yes", "no"]


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"swagger": "1.2", "paths": {}}, "OpenAPI 1.2 is not read"),
        ({"openapi": "3.1.0", "paths": {}}, "empty"),
        ({"openapi": "4.0.0", "paths": {}}, "OpenAPI 4.0.0 is not read"),
        ({"openapi": "3.1.0", "paths": {"/a": {"get": {"parameters": [{"$ref": "#/nowhere"}]}}}}, "GET /a: .*nowhere"),
        ({"openapi": "3.1.0", "paths": {"/a": {"$ref": "other.yaml#/a"}}}, "not there"),
        ({"openapi": "3.1.0", "paths": {"/a": {"$ref": "#/paths/~1a"}}}, "circle"),
    ],
)
def test_openapi_errors(tmp_path, document, says):
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"openapi\.json.*{says}"):
        ToolCatalog.from_file(path)


def test_answer_of_an_mcp_server():
    catalog = ToolCatalog.from_file(FIXTURES / "mcp_tools_list.json")
    assert catalog["read_file"].description == "Gives the text of a file."
    assert catalog["list_roots"].description == "List the folders that may be read"
    assert catalog["read_file"].parameters["required"] == ["path"]


def test_toolbench(tmp_path):
    catalog = ToolCatalog.from_file(FIXTURES / "toolbench.json")
    start = catalog["<<Chess Clock&&Start>>"]
    assert start.document == (
        "Gaming. Chess Clock: Start: Starts a clock. Times for games of chess. "
        "Parameters: minutes (Time of each player), mode."
    )
    assert start.parameters["properties"]["minutes"]["type"] == "number"
    assert start.parameters["required"] == ["minutes"]
    assert catalog["<<Chess Clock&&Stop>>"].description == "Times for games of chess."
    # A row of a query's api_list
    row = {"category_name": "Gaming", "tool_name": "Chess Clock", "api_name": "Start", "api_description": "Starts."}
    assert ToolCatalog.from_file(write(tmp_path / "apis.jsonl", [row])).ids == ["<<Chess Clock&&Start>>"]


def test_sealtools(tmp_path):
    api = {
        "api_name": "getScore",
        "api_description": "Score of a game.",
        "field": "Sports/Basketball",
        "parameters": {"team": {"type": "str", "description": "The team."}, "period": {"type": "int"}},
        "required": ["team"],
        "responses": {"score": {"type": "float", "description": "The score."}},
    }
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps(api))
    (tool,) = ToolCatalog.from_file(path)
    assert (tool.id, tool.category) == ("getScore", "Sports/Basketball")
    assert tool.parameters["properties"]["period"] == {"type": "integer"}
    assert tool.parameters["required"] == ["team"]
    assert tool.metadata["output_schema"]["properties"]["score"] == {"type": "number", "description": "The score."}
    path.write_text(json.dumps(api | {"parameters": {"team": ["str"]}}))
    with pytest.raises(ValueError, match="line 1: tool 'getScore': the argument 'team' must be described"):
        ToolCatalog.from_file(path)


def test_output_schema_of_mcp_is_kept():
    schema = {"type": "object", "properties": {"mm": {"type": "number"}}}
    catalog = ToolCatalog.from_functions([{"name": "rain", "description": "Rain.", "outputSchema": schema}])
    assert catalog["rain"].metadata["output_schema"] == schema


def test_toolret(tmp_path):
    row = {"id": "apigen_tool_2", "documentation": '{"name": "growth", "description": "Growth of bacteria."}'}
    (tool,) = ToolCatalog.from_file(write(tmp_path / "tools.jsonl", [row]))
    assert tool.id == "apigen_tool_2" and "Growth of bacteria." in tool.document


def test_apis_of_toolbench_instructions(tmp_path):
    apis = [{"category_name": "Data", "tool_name": "Sky", "api_name": name} for name in ("rain", "wind", "rain")]
    rows = [{"query_id": 1, "query": "x", "api_list": apis[:2]}, {"query_id": 2, "query": "y", "api_list": apis[2:]}]
    (tmp_path / "G1_tool.json").write_text(json.dumps(rows))
    assert ToolCatalog.from_file(tmp_path / "G1_tool.json").ids == ["<<Sky&&rain>>", "<<Sky&&wind>>"]
    (tmp_path / "G1_tool.json").write_text(json.dumps([{"query": "x", "api_list": ["rain"]}]))
    with pytest.raises(ValueError, match="item 1: a tool must be a JSON object"):
        ToolCatalog.from_file(tmp_path / "G1_tool.json")
