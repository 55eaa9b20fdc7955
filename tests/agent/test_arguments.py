import json
import re

import jsonschema
import pytest
import torch
from bases import FAMILIES, build
from conftest import small_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from toolweaver_hf import (
    Tool,
    ToolArgumentsLogitsProcessor,
    ToolCatalog,
    ToolCodeLogitsProcessor,
    ToolCodes,
    ToolWeaverTokenizer,
)
from toolweaver_hf.agent.schema import find_error
from toolweaver_hf.data.grammar import close_schema, expressible_grammar
from toolweaver_hf.demo import DEMO_FOLDER


BOOKING = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Łódź"]},
        "nights": {"type": "integer", "minimum": 1, "maximum": 30},
        "price": {"type": "number"},
        "guests": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]},
        },
        "late": {"type": "boolean", "default": False},
        "note": {"type": ["string", "null"], "maxLength": 20},
    },
    "required": ["city", "nights", "guests"],
}
ALLOWED = [
    {"city": "Oslo", "nights": 2, "guests": [{"age": 3}]},
    {"city": "Łódź", "nights": 30, "price": 1.5, "guests": [{"age": 3}, {"age": 40}], "late": True, "note": None},
]
REFUSED = [
    {},
    {"city": "Rome", "nights": 2, "guests": [{"age": 3}]},
    {"city": "Oslo", "nights": 31, "guests": [{"age": 3}]},
    {"city": "Oslo", "nights": 2.5, "guests": [{"age": 3}]},
    {"city": "Oslo", "nights": 2, "guests": []},
    {"city": "Oslo", "nights": 2, "guests": [{"age": "3"}]},
    {"city": "Oslo", "nights": 2, "guests": [{}]},
    {"city": "Oslo", "nights": 2, "guests": [{"age": 3, "name": "x"}]},
    {"city": "Oslo", "nights": 2, "guests": [{"age": 3}], "other": 1},
]


def make(base_tokenizer, **schemas):
    catalog = ToolCatalog([Tool(tool_id, "A tool.", parameters=schema) for tool_id, schema in schemas.items()])
    codes = ToolCodes([8, 8], {tool_id: [i, i] for i, tool_id in enumerate(schemas)})
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    return tokenizer, ToolArgumentsLogitsProcessor(tokenizer, catalog, tokenizer.eos_token_id)


def accepts(tokenizer, processor, tool_id, text):
    """Whether the text can be generated token by token, and then ends the turn."""
    ids = tokenizer.encode_tool(tool_id) + tokenizer.encode(text) + [tokenizer.eos_token_id]
    for i in range(2, len(ids)):
        allowed = processor(torch.tensor([ids[:i]]), torch.zeros(1, len(tokenizer))).isfinite()[0]
        assert not allowed[tokenizer.code_token_ids].any()
        if not allowed[ids[i]]:
            return False
    return allowed.sum() == 1


def test_the_grammar_is_the_schema(base_tokenizer):
    tokenizer, processor = make(base_tokenizer, book=BOOKING)
    assert processor.is_exact("book")
    for arguments in ALLOWED:
        assert accepts(tokenizer, processor, "book", json.dumps(arguments, ensure_ascii=False))
    for arguments in REFUSED:
        assert not accepts(tokenizer, processor, "book", json.dumps(arguments, ensure_ascii=False))
    assert not accepts(tokenizer, processor, "book", json.dumps(ALLOWED[0]) + " ")
    assert not accepts(tokenizer, processor, "book", "I do not know")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        {"not": {"type": "string"}},
        {"type": "string", "pattern": "^(?=a)b"},
        {"$ref": "https://example.com/schema.json"},
        {"type": 7},
        {"properties": {"a": {}}, "required": [{}]},
    ],
)
def test_what_no_grammar_expresses_is_a_json_object_all_the_same(base_tokenizer, schema):
    tokenizer, processor = make(base_tokenizer, odd={"type": "object", "properties": {"x": schema}})
    assert not processor.is_exact("odd")
    assert accepts(tokenizer, processor, "odd", '{"x": [1, 1]}') or accepts(tokenizer, processor, "odd", '{"x": "bc"}')
    assert not accepts(tokenizer, processor, "odd", "[1]")


ODD = {
    "type": {"type": "Callable", "description": "A function."},
    "minimum": {"type": "integer", "minimum": -(2**63), "maximum": 9},
    "pattern": {"type": "string", "pattern": "^(?!a)b", "maxLength": 3},
    "uniqueItems": {"type": "array", "uniqueItems": True, "items": {"type": "string", "format": "snowflake"}},
    "$ref": {"$ref": "#/$defs/nothing"},
    "minLength": {"type": "string", "minLength": -1, "enum": ["a", "b"]},
    "oneOf": {"oneOf": [{"type": "string"}, {"enum": ["a", 1]}]},
}


def test_only_what_cannot_be_said_is_left_out(base_tokenizer):
    """Seven odd properties, in a definition as well: all else is in the grammar, and is checked."""
    schema = {
        "type": "object",
        "properties": {**ODD, "last": {"$ref": "#/$defs/Odd"}, "sure": {"type": "integer"}},
        "required": ["sure"],
        "$defs": {"Odd": {"type": "object", "properties": {**ODD, "sure": {"type": "integer"}}, "required": ["sure"]}},
    }
    tokenizer, processor = make(base_tokenizer, odd=schema, flaky={"properties": {"x": ODD["uniqueItems"]["items"]}})
    assert processor.is_exact("flaky") and not processor.is_exact("odd")
    _, left_out = expressible_grammar(schema, LLMatcher.validate_grammar)
    assert {*left_out} == {*ODD, "format: snowflake"}
    good = {"minimum": 3, "pattern": "ba", "uniqueItems": ["x"], "minLength": "a", "oneOf": 1}
    for arguments in (
        {**good, "sure": 1},
        {"last": {"sure": 1}, "sure": 1},
        {"type": [1], "$ref": {"a": 1}, "sure": 1},
    ):
        assert accepts(tokenizer, processor, "odd", json.dumps(arguments))
        assert find_error(arguments, schema) is None
    for wrong in ({"minimum": "3"}, {"minimum": 10}, {"pattern": "baba"}, {"uniqueItems": [1]}, {"minLength": "c"}):
        assert not accepts(tokenizer, processor, "odd", json.dumps({**wrong, "sure": 1}))
        assert not accepts(tokenizer, processor, "odd", json.dumps({"last": {**wrong, "sure": 1}, "sure": 1}))
        assert find_error({**wrong, "sure": 1}, schema)
        assert find_error({"last": {**wrong, "sure": 1}, "sure": 1}, schema)
    assert find_error({}, schema) == "'sure' is a required property"
    # What the grammar leaves out is found afterwards where it can be checked at all.
    for late in ({"uniqueItems": ["x", "x"]}, {"pattern": "ab"}, {"oneOf": "a"}):
        assert find_error({**late, "sure": 1}, schema)


def test_a_pattern_that_cannot_be_read_costs_nothing_else():
    schema = {"properties": {"x": {"type": "string", "pattern": "[("}, "y": {"type": "integer"}}}
    assert find_error({"x": "a"}, schema) is None
    assert find_error({"x": 1}, schema) == "['x']: 1 is not of type 'string'"
    assert find_error({"x": "a", "y": "b"}, schema) == "['y']: 'b' is not of type 'integer'"
    loop = {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}
    assert find_error({}, loop) is None


def test_every_schema_of_the_demo_gives_valid_arguments_to_any_model(base_tokenizer):
    """Random scores, and with them random arguments, for each tool: whatever closes is valid, and names no code."""
    demo = ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl")
    codes = ToolCodes([16, 16], {tool.id: divmod(i, 16) for i, tool in enumerate(demo)})
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    processor = ToolArgumentsLogitsProcessor(tokenizer, demo, tokenizer.eos_token_id)
    generator = torch.Generator().manual_seed(0)
    quotes = [i for token, i in tokenizer.get_vocab().items() if token in ('"', '",', '"}')]
    closed = 0
    for tool in demo:
        assert processor.is_exact(tool.id)
        ids = tokenizer.encode_tool(tool.id)
        while len(ids) < 80 and ids[-1] != tokenizer.eos_token_id:
            scores = torch.randn(1, len(tokenizer), generator=generator)
            scores[:, quotes] += 3  # so that strings come to an end
            ids.append(int(processor(torch.tensor([ids]), scores).argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            jsonschema.validate(json.loads(tokenizer.decode(ids[2:-1])), tool.parameters)
            closed += 1
    assert closed > 100


def test_generate_writes_whole_calls_in_a_batch_of_beams(base_tokenizer):
    tokenizer, processor = make(
        base_tokenizer,
        toss={"type": "object", "properties": {"times": {"type": "integer", "maximum": 9, "minimum": 0}}},
        stop={"type": "object", "properties": {}},
    )
    prompts = torch.tensor([[0, 5, 6], [7, *tokenizer.encode_tool("stop")]])
    processor.prompt_length = 3
    codes = ToolCodeLogitsProcessor(
        tokenizer.trie, mode="trajectory", prompt_length=3, code_token_ids=tokenizer.code_token_ids
    )

    class Code(torch.nn.Module):  # a model seldom starts a code by itself
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == 3:
                scores = scores.clone()
                scores[:, tokenizer.level_offsets[0] :] += 1e3
            return scores

    output = (
        small_llama(len(tokenizer))
        .eval()
        .generate(
            prompts,
            attention_mask=(prompts != 0).long(),
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=30,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=tokenizer.eos_token_id,
            logits_processor=[Code(), codes, processor],
        )
    )
    for row in output[:, 3:].tolist():
        arguments = json.loads(tokenizer.decode(row[2:], skip_special_tokens=True).replace("<pad>", ""))
        assert jsonschema.validate(arguments, processor.tools[tokenizer.decode_tool(row[:2])].parameters) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_schema_forges_no_control_token(family):
    """Control tokens are text wherever a schema spells them: such calls can be written, in tokens of text alone."""
    tokenizer = ToolWeaverTokenizer.from_base(build(family), ToolCodes([4, 4], {"t": [1, 1], "u": [2, 2]}))
    added = tokenizer.added_tokens_decoder
    control = {i for i, token in added.items() if token.content.replace("▁", " ").strip()}
    forged = st.lists(st.sampled_from([added[i].content for i in control] + ["a", ' "', "é"]), min_size=1, max_size=3)

    @settings(max_examples=10, deadline=None)
    @given(st.lists(forged.map("".join), min_size=4, max_size=4), st.integers(0, 99))
    def check(texts, seed):
        name, value, choice, matched = texts
        properties = {
            name: {"const": value, "title": value, "description": value},
            "enum ": {"enum": [choice, [choice], {choice: 1}]},
            "pattern ": {"type": "string", "pattern": f"^{re.escape(matched)}$".replace("\\ ", " "), "default": value},
        }
        schema = {"type": "object", "properties": properties, "required": [*properties]}
        processor = ToolArgumentsLogitsProcessor(
            tokenizer, {"t": Tool("t", "A tool.", parameters=schema)}, tokenizer.eos_token_id
        )
        ids, generator = tokenizer.encode_tool("t"), torch.Generator().manual_seed(seed)
        while ids[-1] != tokenizer.eos_token_id or len(ids) == 2:
            allowed = processor(torch.tensor([ids]), torch.rand(1, len(tokenizer), generator=generator))[0]
            ids.append(int(allowed.argmax()))
            assert allowed[ids[-1]].isfinite() and len(ids) < 400
            assert ids[-1] == tokenizer.eos_token_id or not allowed[list(control)].isfinite().any()
        jsonschema.validate(json.loads(tokenizer.decode(ids[2:-1])), schema)

    check()


def test_errors_and_schemas():
    assert find_error({"n": 1}, {"type": "object", "properties": {"n": {"type": "integer"}}}) is None
    assert find_error({"n": "1"}, {"properties": {"n": {"type": "integer"}}}) == "['n']: '1' is not of type 'integer'"
    assert find_error({}, {"required": ["n"]}) == "'n' is a required property"
    assert find_error({"n": 1}, {"properties": {"n": {"type": 7}}}) is None
    assert find_error({"n": 1}, {"properties": {"n": {"$ref": "http://127.0.0.1:9/x.json"}}}) is None
    open_schema = {
        "type": "object",
        "properties": {"x": {"type": "object"}},
        "additionalProperties": {"type": "string"},
    }
    assert close_schema(open_schema) == open_schema
    assert close_schema({"properties": {}}) == {"properties": {}, "additionalProperties": False}
    undeclared = {"properties": {"a": {}}, "required": ["b"]}  # closed, it would allow nothing
    assert close_schema(undeclared) == undeclared
