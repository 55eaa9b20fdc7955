import json
import re

import pytest
from bases import FAMILIES, build
from conftest import small_llama
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList

from toolweaver_hf import Tool, ToolAgent, ToolCatalog, ToolCodes, ToolWeaverTokenizer
from toolweaver_hf.agent.copying import WordCopier, open_value
from toolweaver_hf.agent.facts import facts_of, tells, tells_more


SAID = "Is the garage at City Hall full, or park-and-ride 7?"
MARK = "\ue000"
TEXTS = st.text(st.characters(exclude_characters=MARK, exclude_categories=["Cs"]), max_size=8)
FIND = Tool(
    "find",
    "Find a place to park.",
    parameters={"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
)


def make_tokenizer(family="smollm2"):
    return ToolWeaverTokenizer.from_base(build(family), ToolCodes([2, 2], {"find": [0, 0]}))


COPIER = WordCopier(make_tokenizer())


@given(
    st.recursive(
        TEXTS | st.integers() | st.none() | st.booleans(),
        lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3),
    ),
    TEXTS,
    TEXTS,
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_the_value_that_is_open(before, said, rest, in_list, indent):
    """Whatever stands before a string, and however it is escaped, its beginning is read as JSON reads it."""
    opened = [before, said + MARK + rest] if in_list else said + MARK + rest
    text = json.dumps({"a": before, "b": {"c": before, "d": opened}}, indent=indent)
    assert open_value(text[: text.index(json.dumps(MARK)[1:-1])]) == said
    key = json.dumps({"a": before, said + MARK + rest: 1}, ensure_ascii=False, indent=indent)
    assert open_value(key[: key.index(MARK)]) is None


@pytest.mark.parametrize(
    "text", ["", "{", '{"a', '{"a"', '{"a": ', '{"a": 12', '{"a": "b"', '{"a": "b\\', '{"a": "\\u00']
)
def test_where_no_value_is_open(text):
    assert open_value(text) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_words_can_be_copied_and_nothing_else(family):
    tokenizer = make_tokenizer(family)
    copier = WordCopier(tokenizer)
    ids = copier._tokenizer.encode("City Hall", add_special_tokens=False).ids
    for i, token_id in enumerate(ids):
        begun = tokenizer.decode(ids[:i]) if i else ""
        assert token_id in copier.in_arguments(f'{{"place": "{begun}', [SAID])
    assert copier.in_arguments('{"place": "City Hall', [SAID])
    assert copier.in_arguments('{"place": "park-and-ride', [SAID])
    ends = {token for token in copier.in_arguments('{"place": "City', [SAID]) if '"' in tokenizer.decode([token])}
    assert ends and not ends.intersection(copier.in_arguments('{"place": "Cit', [SAID]))
    assert copier.in_arguments('{"place": "Cities', [SAID]) == []
    assert copier.in_arguments('{"place": "all', [SAID]) == []  # not the start of a word
    assert copier.in_arguments('{"place', [SAID]) == [] == copier.in_arguments('{"place": "', [])
    assert not {*copier.in_arguments('{"place": "', [SAID])} & {*tokenizer.code_token_ids, *tokenizer.all_special_ids}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "fact", ["Great Hall", "15:15", "-12.5", "#985", "see a doctor this week", "Zürich Süd", "20 °C", "北京"]
)
def test_facts_can_be_told_and_nothing_else(family, fact):
    tokenizer = make_tokenizer(family)
    copier = WordCopier(tokenizer)
    told = f"Now {fact}"
    ids, whole = copier._tokenizer.encode(told, add_special_tokens=False).ids, 0
    for i, token_id in enumerate(ids):
        answer = copier._tokenizer.decode(ids[:i])
        if not answer.endswith("\ufffd"):
            written, whole = answer, i
        going_on, begins = copier.in_answer(written, [fact, "elsewhere"], ids[whole:i])
        if written.startswith("Now"):
            assert token_id in (going_on or begins)
        assert not (going_on and begins)
    assert copier.in_answer(told, []) == ([], [])
    assert copier.in_answer("It is 3.1", ["1234"])[0] == []  # inside of a number
    assert copier.in_answer("Room\n15", ["15:15"])[0]
    spelled = [fact, "\x00" + str(tokenizer.eos_token_id), tokenizer.eos_token, "<a_0>"]
    assert not {*copier.in_answer("", spelled)[1]} & {*tokenizer.code_token_ids, *tokenizer.all_special_ids}


@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=8), max_size=3))
def test_facts_that_begin_are_gone_on_with(answer, facts):
    going_on, begins = COPIER.in_answer(answer, facts)
    first = {
        COPIER._tokenizer.encode(fact[i:], add_special_tokens=False).ids[0] for fact in facts for i in range(len(fact))
    }
    assert {*going_on} <= first
    if not facts:
        assert going_on == begins == []


def test_the_facts_of_results():
    results = ['{"room": "Great Hall", "people": [20, 20.5], "open": true, "note": " "}', "no JSON", "null"]
    assert facts_of(results) == ["Great Hall", "20", "20.5", "no JSON"]
    assert tells("It is in the great hall.", "Great Hall") and not tells("It is in the Great Halls", "Great Hall")
    assert tells("That is 20, or 20.5.", "20") and not tells("20.5, 120 or 20,000", "20")
    assert tells("It is 20°C, 5%.", "°C") and tells("It is 20°C, 5%.", "%") and tells("温度是20度", "20")
    assert facts_of(["[" * 2000 + "]" * 2000, "20"])[-1] == "20"
    assert facts_of(['"{\\"at\\": 20, \\"by\\": \\"\\ud800\\"}"']) == ["20", "?"]  # as tools of MCP servers return it


def test_an_answer_goes_on_while_its_sentences_tell_more():
    facts = ["20", "15:15", "Great Hall"]
    assert tells_more("", facts) and tells_more("It is booked.", facts)  # the first may be about anything
    assert tells_more("It is booked. It starts at 15:15.", facts)
    assert not tells_more("It starts at 15:15. It starts at 15:15.", facts)
    assert not tells_more("It starts at 15:15. That is late.", facts)
    assert not tells_more("It starts at 15:15\nIt starts at 15:15\n", facts)
    assert not tells_more("大厅在15:15。大厅在15:15。", facts)
    assert not tells_more("at 15:15; " * 50, facts)


class Wish(LogitsProcessor):
    """Calls the tool; in its arguments all tokens are alike, but for one that is worth `by` more."""

    def __init__(self, code, token_id, by):
        self.code, self.token_id, self.by, self.start = code, token_id, by, None

    def __call__(self, input_ids, scores):
        self.start = self.start or input_ids.shape[1]
        done = input_ids.shape[1] - self.start
        scores[:] = 0
        if done < len(self.code):
            scores[:, self.code[done]] = 1e4
        else:
            scores[:, self.token_id] = self.by
        return scores


@pytest.mark.parametrize("bonus, by, copies", [(3.0, 1.0, True), (3.0, 5.0, False), (0.0, 1.0, False)])
def test_an_agent_copies_unless_the_model_is_sure(bonus, by, copies):
    tokenizer = make_tokenizer()
    (other,) = tokenizer.encode("x", add_special_tokens=False)
    places = []
    agent = ToolAgent(
        small_llama(len(tokenizer), eos_token_id=tokenizer.eos_token_id),
        tokenizer,
        ToolCatalog([FIND]),
        {"find": lambda place: places.append(place)},
        logits_processor=LogitsProcessorList([Wish(tokenizer.encode_tool("find"), other, by)]),
        copy_bonus=bonus,
        max_steps=1,
        max_new_tokens=16,
    )
    run = agent(SAID)
    text = tokenizer.decode(run.token_ids)
    value = open_value(text[text.rindex('{"place') :]) if not places else places[0]
    assert bool(re.search(rf"\b{re.escape(value)}", SAID)) == copies
    assert value.startswith("x") != copies


class Answer(LogitsProcessor):
    """Writes a call, the same call again, and then an answer: all of its tokens are alike, but for its end, which is
    worth `by` more."""

    def __init__(self, call, end, by):
        self.script, self.end, self.by = [*call, *call], end, by

    def __call__(self, input_ids, scores):
        scores[:] = 0
        if self.script:
            scores[:, self.script.pop(0)] = 1e4
        else:
            scores[:, self.end] = self.by
        return scores


def make_answering_agent(tokenizer, result, by, **kwargs):
    arguments = " " * tokenizer.opens_with_space + '{"place": "x"}'
    ids = WordCopier(tokenizer)._tokenizer.encode(arguments, add_special_tokens=False).ids
    call = [*tokenizer.encode_tool("find"), *ids]
    return ToolAgent(
        small_llama(len(tokenizer), eos_token_id=tokenizer.eos_token_id),
        tokenizer,
        ToolCatalog([FIND]),
        {"find": lambda place: result},
        logits_processor=LogitsProcessorList([Answer(call, tokenizer.eos_token_id, by)]),
        **kwargs,
    )


@pytest.mark.parametrize("bonus, by, told", [(3.0, 1.0, "15 Great Hall"), (3.0, 9.0, ""), (0.0, 1.0, "")])
def test_an_answer_tells_the_facts_unless_the_model_is_sure(bonus, by, told):
    agent = make_answering_agent(
        make_tokenizer(), {"room": "Great Hall", "at": 15, "open": True}, by, copy_bonus=bonus
    )
    assert agent(SAID).answer == told


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_tells_facts_of_any_script_and_ends(family):
    """What cannot be told to the letter, such as what spells a control token, does not keep it from ending."""
    tokenizer = make_tokenizer(family)
    facts = ["Zürich Süd", "İstanbul", "Cafe\u0301", f"a{tokenizer.eos_token}b", "\ufffd"]
    run = make_answering_agent(tokenizer, facts, by=1.0)(SAID)
    assert run.stop_reason == "answer"
    assert "Zürich Süd" in run.answer and "İstanbul" in run.answer


@pytest.mark.parametrize("result", [list(range(100)), "word " * 100, "x" * 1000])
def test_an_answer_to_a_large_result_is_the_models_own(result):
    assert make_answering_agent(make_tokenizer(), result, by=1.0)(SAID).answer == ""
