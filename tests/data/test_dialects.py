"""Tools as other projects write them: what each format says must be in the tool, to the last key."""

import json
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from toolweaver_hf.cli import main
from toolweaver_hf.data.catalog import Tool, ToolCatalog, encoder_texts
from toolweaver_hf.data.schemas import arguments_schema, to_json_schema


def read(tmp_path, document, name="tools.json"):
    path = tmp_path / name
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return ToolCatalog.from_file(path)


CITY = {"type": "string", "description": "The city."}
DAYS = {"type": "integer", "default": 1}
SCHEMA = {"type": "object", "properties": {"city": CITY, "days": DAYS}, "required": ["city"]}
WEATHER = Tool("weather", "Weather of a city.", parameters=SCHEMA)
TITLED = {"annotations": {"readOnlyHint": True}, "title": "Weather"}
ANSWER = {"type": "object", "properties": {"mm": {"type": "number"}}}
ABOUT = {"name": "weather", "description": "Weather of a city."}

DIALECTS = {
    "OpenAI": ({"type": "function", "function": {**ABOUT, "parameters": SCHEMA, "strict": True}}, {"strict": True}),
    "OpenAI's Responses": ({"type": "function", **ABOUT, "parameters": SCHEMA}, {}),
    "Anthropic": ({**ABOUT, "input_schema": SCHEMA}, {}),
    "MCP": ({**ABOUT, "inputSchema": SCHEMA, "outputSchema": ANSWER, **TITLED}, {"output_schema": ANSWER, **TITLED}),
    "MCP in Python": (
        {**ABOUT, "title": None, "input_schema": SCHEMA, "output_schema": ANSWER, "icons": None, "meta": None},
        {"output_schema": ANSWER},
    ),
    "LangChain": ({**ABOUT, "args_schema": SCHEMA}, {}),
    "LangChain's args": ({**ABOUT, "args": {"city": CITY, "days": DAYS}}, {}),
    "Bedrock": ({"toolSpec": {**ABOUT, "inputSchema": {"json": SCHEMA}}}, {}),
    "smolagents": (
        {
            **ABOUT,
            "inputs": {"city": CITY, "days": {"type": "integer", "default": 1, "nullable": False}},
            "output_type": "number",
        },
        {"output_schema": {"type": "number"}},
    ),
    "Gemini": (
        {
            "functionDeclarations": [
                {
                    **ABOUT,
                    "parameters": {
                        "type": "OBJECT",
                        "properties": {"city": CITY | {"type": "STRING"}, "days": DAYS | {"type": "INTEGER"}},
                        "required": ["city"],
                    },
                    "response": {"type": "OBJECT", "properties": {"mm": {"type": "NUMBER"}}},
                }
            ]
        },
        {"output_schema": ANSWER},
    ),
    "Gemini in Python": (
        [
            {
                "function_declarations": [
                    {
                        **ABOUT,
                        "behavior": None,
                        "parameters": {
                            "any_of": None,
                            "type": "OBJECT",
                            "properties": {"city": CITY | {"type": "STRING", "min_items": None}, "days": DAYS},
                            "required": ["city"],
                        },
                    }
                ]
            }
        ],
        {},
    ),
    "BFCL": (
        {
            "id": "simple_0",
            "question": [[{"role": "user", "content": "Rain?"}]],
            "function": [
                {
                    **ABOUT,
                    "parameters": {
                        "type": "dict",
                        "properties": {"city": CITY, "days": DAYS},
                        "required": ["city"],
                    },
                }
            ],
        },
        {},
    ),
    "xLAM": (
        [
            {
                "id": 0,
                "query": "Rain?",
                "answers": "[]",
                "tools": json.dumps(
                    [
                        {
                            **ABOUT,
                            "parameters": {
                                "city": CITY | {"type": "str"},
                                "days": {"type": "int, optional", "default": 1},
                            },
                        }
                    ]
                ),
            }
        ],
        {},
    ),
    "API-Bank": (
        {
            **ABOUT,
            "input_parameters": {"city": CITY | {"type": "str"}, "days": {"type": "int", "default": 1}},
            "output_parameters": {"mm": {"type": "float"}},
        },
        {"output_schema": ANSWER},
    ),
    "Cohere": (
        {**ABOUT, "parameter_definitions": {"city": CITY | {"type": "str", "required": True}, "days": DAYS}},
        {},
    ),
    "a list of arguments": (
        {
            **ABOUT,
            "parameters": [
                {"name": "city", **CITY, "required": True},
                {"name": "days", "schema": {"type": "integer"}, "default": 1},
            ],
        },
        {},
    ),
    "a schema in a text": ({**ABOUT, "parameters": json.dumps(SCHEMA)}, {}),
    "tools by name": ({"tools": {"weather": {"description": "Weather of a city.", "parameters": SCHEMA}}}, {}),
    "lists of tools": ([[{**ABOUT, "parameters": SCHEMA}]], {}),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects(tmp_path, dialect, caplog):
    document, metadata = DIALECTS[dialect]
    (tool,) = catalog = read(tmp_path, document)
    assert tool == Tool("weather", "Weather of a city.", parameters=SCHEMA, metadata=metadata)
    assert not catalog.changes and not caplog.records
    again = ToolCatalog.from_functions([document])
    assert list(again) == [tool]
    catalog.to_jsonl(tmp_path / "catalog.jsonl")
    assert list(ToolCatalog.from_file(tmp_path / "catalog.jsonl")) == [tool]


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("str", {"type": "string"}),
        ("String", {"type": "string"}),
        ("int", {"type": "integer"}),
        ("float", {"type": "number"}),
        ("dict", {"type": "object"}),
        ("tuple", {"type": "array"}),
        ("None", {"type": "null"}),
        ("any", {}),
        ("List[str]", {"type": "array", "items": {"type": "string"}}),
        ("list[list[int]]", {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
        ("int[]", {"type": "array", "items": {"type": "integer"}}),
        ("Dict[str, float]", {"type": "object", "additionalProperties": {"type": "number"}}),
        ("Dict[str, Any]", {"type": "object"}),
        ("ArrayList<String>", {"type": "array", "items": {"type": "string"}}),
        ("Set[int]", {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}),
        (
            "Tuple[float, str]",
            {"type": "array", "prefixItems": [{"type": "number"}, {"type": "string"}], "minItems": 2, "maxItems": 2},
        ),
        ("Optional[int]", {"type": ["integer", "null"]}),
        ("Union[int, str]", {"type": ["integer", "string"]}),
        ("int | List[str] | None", {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
        ("Literal['a,b', 'c']", {"enum": ["a,b", "c"]}),
        ("datetime", {"type": "string", "format": "date-time"}),
    ],
)  # fmt: skip
def test_names_of_types(name, schema):
    assert to_json_schema({"type": name}, pytest.fail) == schema
    read = arguments_schema({"a": f"{name}, optional", "b": name}, pytest.fail)
    assert read == {"type": "object", "properties": {"a": schema, "b": schema}} | (
        {} if name.startswith("Optional") else {"required": ["b"]}
    )


def test_only_names_of_arguments_are_required():
    read = arguments_schema({"a": "int", "b": "str", "required": [{}, "b", "c"]}, pytest.fail)
    assert read["required"] == ["b"]


def test_what_is_not_known_is_kept_and_told_of_once(tmp_path, caplog):
    rows = [
        {"id": "a", "description": "A.", "parameters": {"f": "Callable[[float], float]", "x": {"type": "Callable"}}},
        {"id": "b", "description": "B.", "version": 2, "team": {"name": "x"}, "metadata": {"owner": "me"}},
        {"id": "c", "description": "C.", "version": 3},
    ]
    catalog = read(tmp_path, rows)
    assert catalog["a"].parameters["properties"] == {"f": {"description": "Callable[[float], float]"}, "x": {}}
    assert catalog["b"].metadata == {"owner": "me", "version": 2, "team": {"name": "x"}}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"{tmp_path / 'tools.json'}: the type 'Callable' is not known: any value is allowed (1 of the tools, such as "
        "'a'); the key 'version' is not known: it is kept in the metadata (2 of the tools, such as 'b', 'c'); the key "
        "'team' is not known: it is kept in the metadata (1 of the tools, such as 'b')"
    )
    assert [*catalog.changes.values()] == [["a"], ["b", "c"], ["b"]]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"schema_of_inputs": SCHEMA}, "'schema_of_inputs' looks like the schema"),
        ({"parameters": {"type": "object", "city": CITY}}, "no 'properties', and their key 'city'"),
        ({"parameters": {"filter": {"city": CITY}}}, "the argument 'filter' is described by 'city'"),
        ({"parameters": {"city": ["str"]}}, "the argument 'city'"),
        ({"parameters": [{"type": "str"}]}, "needs a 'name'"),
        ({"parameters": "city: str"}, "the text 'city: str'"),
        ({"parameters": {"type": "string"}}, "type 'object'"),
        ({"parameters": 5}, "type 'object'"),
    ],
)
def test_what_looks_like_a_schema_and_is_none_is_refused(tmp_path, row, says):
    with pytest.raises(ValueError, match=rf"tools\.json, item 2: tool 'x': .*{says}"):
        read(tmp_path, [{"id": "a", "description": "A."}, {"id": "x", "description": "X.", **row}])


def test_a_schema_among_the_properties_is_the_schema():
    (tool,) = ToolCatalog.from_functions([{**ABOUT, "inputSchema": {"type": "object", "properties": SCHEMA}}])
    assert tool == WEATHER


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6) | st.sampled_from(
    ["type", "properties", "required", "description", "example", "xml", "nullable", "discriminator", "$ref", "items"]
)
leaves = st.sampled_from([{"type": kind} for kind in ("string", "integer", "number", "boolean")]) | st.just(
    {"type": "string", "enum": ["a", None], "default": {"type": "OBJECT", "nullable": True, "$ref": "#/no"}}
)
described = st.tuples(leaves, st.text("ab ", min_size=1).filter(str.strip)).map(
    lambda pair: {**pair[0], "description": pair[1]}
)
schemas = st.recursive(
    described,
    lambda inner: (
        st.dictionaries(names, inner, max_size=3).map(lambda named: {"type": "object", "properties": named})
        | inner.map(lambda items: {"type": "array", "items": items})
        | st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some})
    ),
    max_leaves=6,
)


def respelled(schema, names):
    """A schema with other names of types."""
    inner = dict(schema)
    if "type" in inner:
        inner["type"] = names[inner["type"]]
    if "properties" in inner:
        inner["properties"] = {name: respelled(value, names) for name, value in inner["properties"].items()}
    if "items" in inner:
        inner["items"] = respelled(inner["items"], names)
    if "anyOf" in inner:
        inner["anyOf"] = [respelled(value, names) for value in inner["anyOf"]]
    return inner


PYTHON = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "array": "list", "object": "dict"}
GEMINI = {name: name.upper() for name in PYTHON}
SAME = {name: name for name in PYTHON}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(arguments=st.dictionaries(names, schemas, min_size=1, max_size=4), data=st.data())
def test_arguments_survive_every_dialect_and_back(arguments, data):
    """A mapping of names to schemas, whatever the names and however deep, comes out as it went in."""
    required = data.draw(st.lists(st.sampled_from(sorted(arguments)), unique=True))
    schema = {"type": "object", "properties": arguments} | ({"required": required} if required else {})
    rows = [
        {key: respelled(schema, spelling)}
        for key in ("parameters", "inputSchema", "input_schema", "args_schema")
        for spelling in (SAME, PYTHON, GEMINI)
    ]
    for flat in (
        {name: {**respelled(value, PYTHON), "required": name in required} for name, value in arguments.items()},
        [{"name": name, **value, "optional": name not in required} for name, value in arguments.items()],
    ):
        rows += [{"parameters": flat}, {"inputs": flat}, {"input_parameters": json.dumps(flat)}]
    for row in rows:
        (tool,) = ToolCatalog.from_functions([{"name": "x", "description": "X.", **row}])
        assert {**tool.parameters, "required": sorted(tool.parameters.get("required", []))} == {
            **schema,
            "required": sorted(required),
        }
        assert Tool.from_dict(json.loads(json.dumps(tool.to_dict()))) == tool


def test_a_servers_tool_without_a_description_is_described_by_its_name(tmp_path, caplog):
    listed = [{"name": "list_openIssues", "inputSchema": SCHEMA}, {"name": "b", "description": " ", "inputSchema": {}}]
    catalog = read(tmp_path, {"tools": listed})
    assert [tool.description for tool in catalog] == ["List open Issues", "B"]
    assert "no description" in caplog.text
    with pytest.raises(ValueError, match="line 1: tool 'a': its description is empty"):
        read(tmp_path, '{"id": "a"}', "own.jsonl")


def test_a_form_is_recognized_by_what_it_must_have(tmp_path):
    row = {"api_name": "torch.hub.load", "description": "Loads a model.", "api_call": "load()", "domain": "Vision"}
    (tool,) = read(tmp_path, [row])
    assert tool == Tool("torch.hub.load", "Loads a model.", metadata={"api_call": "load()", "domain": "Vision"})


@pytest.mark.parametrize("name", ["tool.json", "tool.yaml", "tool.ndjson", "tool.JSONL", "tool.jsonl"])
def test_a_single_tool_and_other_suffixes(tmp_path, name):
    assert list(read(tmp_path, {**ABOUT, "parameters": SCHEMA}, name)) == [WEATHER]


def test_lines_in_a_json_file_and_numeric_ids(tmp_path):
    lines = '{"id": 7, "description": "Seven."}\n\n{"id": "x", "description": "X."}\n'
    assert read(tmp_path, lines).ids == ["7", "x"]
    with pytest.raises(ValueError, match=r"tools\.json, line 3 is not valid JSON"):
        read(tmp_path, lines[:-4])


def test_half_a_character_is_named_by_line(tmp_path):
    for broken in (
        '{"id": "x", "description": "\\ud83d"}',
        '{"id": "x", "description": "X", "metadata": {"\\ude00": 1}}',
    ):
        with pytest.raises(ValueError, match=r"own\.jsonl, line 1: tool 'x': it holds '\\u?d.*half of a character"):
            read(tmp_path, broken, "own.jsonl")
    assert read(tmp_path, '{"id": "x", "description": "\\ud83d\\ude00"}', "own.jsonl")["x"].description == "😀"


def test_instructions_that_list_tools_of_one_name(tmp_path):
    """The same tool in several rows is one; another tool of its name is told apart by its row."""
    other = {**ABOUT, "parameters": {"type": "dict", "properties": {"place": {"type": "string"}}}}
    rows = [
        {"id": f"simple_{n}", "question": [[]], "function": [function]}
        for n, function in enumerate([ABOUT, other, ABOUT])
    ]
    catalog = read(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "BFCL_v3_simple.json")
    assert catalog.ids == ["weather", "simple_1.weather"]
    assert catalog["simple_1.weather"].name == "weather"


SEARCH = {"name": "search", "description": "Searches.", "inputSchema": SCHEMA}


@pytest.mark.parametrize(
    "document",
    [
        {"servers": [{"name": "github", "tools": [SEARCH]}, {"name": "jira", "tools": [SEARCH]}]},
        {"servers": {"github": {"tools": [SEARCH]}, "jira": [SEARCH]}},
        [{"name": "github", "tools": [SEARCH]}, {"name": "jira", "tools": [SEARCH]}],
    ],
)
def test_tools_of_several_servers(tmp_path, document):
    catalog = read(tmp_path, document)
    assert catalog.ids == ["github.search", "jira.search"]
    tool = Tool("github.search", "Searches.", "search", SCHEMA, "github", {"server": "github"})
    assert catalog["github.search"] == tool
    assert list(ToolCatalog.from_servers({"github": ToolCatalog.from_functions([SEARCH]), "jira": [SEARCH]})) == [
        *catalog
    ]
    with pytest.raises(ValueError, match=r"'search'.*from_servers"):
        ToolCatalog.from_functions([SEARCH, SEARCH])


def test_yaml_with_anchors_and_merges(tmp_path):
    text = """
    tools:
      - &base {name: a, description: A., parameters: {type: object, properties: &p {q: &q {type: string}}}}
      - {<<: *base, name: b}
      - {name: c, description: C., parameters: {type: object, properties: {<<: *p, r: *q}}}
    """
    catalog = read(tmp_path, text, "tools.yaml")
    string = {"type": "string"}
    assert catalog["b"] == Tool("b", "A.", parameters={"type": "object", "properties": {"q": string}})
    assert catalog["c"].parameters["properties"] == {"q": string, "r": string}
    laughs = "a: &a {k: v}\n" + "".join(
        f"{y}: &{y} [{', '.join([f'*{x}'] * 10)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
    )
    merges = laughs.replace("[", "{<<: [").replace("]", "]}")
    for text in (laughs, merges, "tools: &t [*t]", "tools: &t {<<: *t}"):
        with pytest.raises(ValueError, match=r"bad\.yaml is not JSON-compatible YAML: .*alias"):
            read(tmp_path, text, "bad.yaml")


@pytest.mark.parametrize("value", ["09:30", "12:30", "0755", "1_000", "0x1F", "=", "no", "2024-01-01", ".inf", "-"])
def test_yaml_scalars_that_json_lacks_are_strings(tmp_path, value):
    text = f"{{name: a, description: A., parameters: {{q: {{enum: [{value}, x], default: {value}}}}}}}"
    (tool,) = read(tmp_path, text, "tools.yaml")
    assert tool.parameters["properties"]["q"] == {"enum": [value, "x"], "default": value}


@pytest.mark.parametrize("value", ["0", "-12", "1.5", "-0.5e-3", "1e3", "true", "null"])
def test_yaml_scalars_of_json(tmp_path, value):
    (tool,) = read(tmp_path, f"{{name: a, description: A., parameters: {{q: {{default: {value}}}}}}}", "tools.yaml")
    found = tool.parameters["properties"]["q"]["default"]
    assert found == json.loads(value) and type(found) is type(json.loads(value))


def test_the_report_of_a_catalog(tmp_path, capsys):
    pattern = {"type": "object", "properties": {"q": {"type": "string", "pattern": "^(?!a)"}, "n": {"format": "odd"}}}
    rows = [
        {"name": "a", "description": "A. " * 40, "inputSchema": SCHEMA},
        {"name": "b", "inputSchema": {"type": "object"}},
        {"name": "c", "description": "C.", "inputSchema": pattern, "owner": "me"},
    ]
    (tmp_path / "tools.json").write_text(json.dumps(rows))
    main(["inspect", "--catalog", str(tmp_path / "tools.json")])
    assert capsys.readouterr().out.splitlines() == [
        "3 tools, 4 arguments",
        "without a description: 1 (b)",
        "without arguments: 1 (b)",
        f"longest documents, in characters: a ({len(ToolCatalog.from_functions(rows)['a'].document)}), c (23), b (4)",
        "it has no description: the words of its name stand for one: 1 (b)",
        "the key 'owner' is not known: it is kept in the metadata: 1 (c)",
        "pattern, which no grammar can say, is checked only after generation: 1 (c)",
        "format: odd, which no grammar can say, is not checked at all: 1 (c)",
    ]


def test_long_documents_keep_the_names_of_their_arguments():
    """Of a document that is longer than the encoder reads, the description is cut, not the arguments."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(12)
    long = Tool("long", "one two three four five six seven eight nine ten", parameters=SCHEMA, category="Sky")
    endless = Tool("endless", "a b c d e f g h i j k l m n o p")
    texts, cut = encoder_texts([WEATHER, long, endless, Tool("s", "Short.")], tokenizer, 16)
    assert texts == [
        WEATHER.document,
        "Sky. long: one two three four five six seven eight Parameters: city, days.",
        "endless: a b c d e f g h i j k l m n",
        "s: Short.",
    ]
    assert cut == ["long", "endless"]
