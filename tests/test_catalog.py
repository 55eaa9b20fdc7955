import json

import pytest

from toolweaver_hf.catalog import Tool, ToolCatalog


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
        ([GOOD, {"id": 5, "description": "Number."}], ["line 2", "5"]),
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
