"""What the page shows: sums over the code tree, escaped texts, and a conversation turn by turn."""

import json

import numpy as np
import pytest
import torch
from conftest import small_llama
from transformers import LogitsProcessor, LogitsProcessorList

from toolweaver_hf import TextExpert, Tool, ToolAgent, ToolCatalog, ToolCodes, ToolRetriever, ToolWeaverTokenizer
from toolweaver_hf.demo import demo_functions
from toolweaver_hf.ui.drawing import draw_header, draw_map, draw_run, draw_tools, draw_tree
from toolweaver_hf.ui.explorer import ToolExplorer, no_function
from toolweaver_hf.ui.page import converse, waits_for


QUERY = "Will it rain in Oslo, or is it only the wind?"
HOSTILE = "<script>alert('${7*7} {{7*7}}')</script><img src=x onerror=alert(1)>"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CATALOG = ToolCatalog(
    [
        Tool("rain", "Will it rain in a city?", parameters=CITY, metadata={"function": "weather.rain_chance"}),
        Tool("wind", "How strong is the wind?", category="Weather", metadata={"function": "no.such_function"}),
        Tool("fx", "Exchange rates.", name="<b>fx</b>", category=HOSTILE),
        Tool("mail", HOSTILE, parameters={"type": "object", "properties": {HOSTILE: {"type": "string"}}}),
    ]
)


def make_parts(base_tokenizer, codes):
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    return small_llama(len(tokenizer)), tokenizer, TextExpert(CATALOG.ids, CATALOG.documents)


@pytest.fixture
def parts(base_tokenizer, codes):
    return make_parts(base_tokenizer, codes)


def test_probabilities_are_those_of_retrieval_added_up_over_the_tree(parts, codes):
    retriever = ToolRetriever(*parts)
    explorer = ToolExplorer(retriever, CATALOG, codes)
    found = explorer.explain(QUERY)
    assert explorer.measures == ("model", "expert", "product")
    expected = dict(retriever(QUERY, top_k=4, exhaustive=True)[0])
    assert [one.tool.id for one in found.tools] == [*expected]
    by_measure = torch.stack([retriever.model_log_probs([QUERY])[0], retriever.text_expert.log_probs([QUERY])[0]])
    for one in found.tools:
        model, expert, product = one.probabilities
        row = retriever.tool_ids.index(one.tool.id)
        assert [model, expert] == pytest.approx(by_measure[:, row].exp().tolist(), rel=1e-4)
        assert product == pytest.approx(np.exp(expected[one.tool.id]), rel=1e-4)
    probabilities = {one.tool.id: one.probabilities for one in found.tools}
    first, last = found.levels
    assert first and last
    for branch in first:
        below = [tool_id for tool_id, code in codes.items() if branch.token == f"<a_{code[0]}>"]
        assert branch.num_tools == len(below)
        assert branch.probabilities == pytest.approx(np.sum([probabilities[tool_id] for tool_id in below], axis=0))
    names = {(first[leaf.parent].token, leaf.token): leaf.label for leaf in last}
    for tool_id, (a, b) in codes.items():
        assert names.get((f"<a_{a}>", f"<b_{b}>"), CATALOG[tool_id].name) == CATALOG[tool_id].name
        assert (f"<a_{a}>", f"<b_{b}>") in names or max(probabilities[tool_id]) < 0.01


def test_a_tree_of_three_levels_by_beam_search(base_tokenizer, monkeypatch):
    """Beyond the limit of exhaustive search, what the beams reach is shown; here these are all."""
    codes = ToolCodes([2, 2, 2], {"rain": [0, 0, 1], "wind": [0, 1, 0], "fx": [1, 0, 0], "mail": [1, 0, 1]})
    explorer = ToolExplorer(ToolRetriever(*make_parts(base_tokenizer, codes)), CATALOG, codes)
    whole = explorer.explain(QUERY)
    monkeypatch.setattr("toolweaver_hf.ui.explorer.EXHAUSTIVE", 0)
    reached = explorer.explain(QUERY)
    assert len(whole.levels) == 3
    for one, other in zip(whole.levels, reached.levels, strict=True):
        assert [branch.token for branch in one] == [branch.token for branch in other]
        for branch, same in zip(one, other, strict=True):
            assert branch.probabilities == pytest.approx(same.probabilities, rel=1e-4)
    assert draw_tree(whole, explorer).count('class="tw-level"') == 3


@pytest.mark.parametrize("given", ["model", "expert"])
def test_a_model_or_a_text_expert_alone(parts, codes, given):
    model, tokenizer, expert = parts
    retriever = ToolRetriever(model, tokenizer) if given == "model" else ToolRetriever(text_expert=expert)
    explorer = ToolExplorer(retriever, CATALOG, codes if given == "model" else None)
    found = explorer.explain(QUERY)
    assert explorer.measures == (given,)
    expected = dict(retriever(QUERY, top_k=4)[0])
    assert [one.probabilities for one in found.tools] == [pytest.approx((np.exp(s),)) for s in expected.values()]
    assert all(one.probabilities == pytest.approx((np.exp(expected[one.tool.id]),)) for one in found.tools)
    if given == "model":
        assert "&lt;a_0&gt;" in draw_tree(found, explorer) and draw_map(explorer, found).count("tw-ring") == 4
    else:
        assert "no codes" in draw_tree(found, explorer) and "no embeddings" in draw_map(explorer)


def test_texts_are_escaped(parts, codes):
    explorer = ToolExplorer(ToolRetriever(*parts[:2]), CATALOG, codes)
    found = explorer.explain(HOSTILE)
    call = {"type": "function", "function": {"name": HOSTILE, "arguments": {HOSTILE: HOSTILE}}}
    messages = [
        {"role": "user", "content": HOSTILE},
        {"role": "assistant", "content": HOSTILE, "reasoning_content": HOSTILE, "tool_calls": [call]},
        {"role": "tool", "content": json.dumps({HOSTILE: HOSTILE})},
        {"role": "assistant", "content": HOSTILE},
    ]
    drawn = [
        draw_header(HOSTILE, explorer),
        draw_tree(found, explorer),
        draw_tools(found, explorer.measures),
        draw_map(explorer),
        draw_map(explorer, found),
        draw_run(messages, explorer, draft=HOSTILE, note=HOSTILE),
    ]
    for html in drawn:
        assert not any(tag in html for tag in ("<script", "<img", "<b>fx"))
    assert all("&lt;script" in drawn[place] for place in (0, 2, 3, 5))


class Script(LogitsProcessor):
    """Makes the next token of a script far more probable than any other."""

    def __init__(self, tokens):
        self.tokens = iter(tokens)

    def __call__(self, input_ids, scores):
        scores[:, next(self.tokens)] += 1e4
        return scores


def test_a_conversation_waits_for_results_that_no_function_gives(parts, codes):
    model, tokenizer, _ = parts
    turns = [
        'I look.<a_0><b_0>{"city": "Oslo"}',  # the demo has a function for it
        "And the wind.<a_0><b_1>{}",  # none
        "Stay at home.<|im_end|>",
        "You are welcome.<|im_end|>",
    ]
    script = [token for turn in turns for token in tokenizer.encode(turn, add_special_tokens=False)]
    functions = dict.fromkeys(CATALOG.ids, no_function) | demo_functions(CATALOG)
    agent = ToolAgent(model, tokenizer, CATALOG, functions, logits_processor=LogitsProcessorList([Script(script)]))
    explorer = ToolExplorer(ToolRetriever(model, tokenizer), CATALOG, codes, agent)

    steps = [*converse(agent, [], QUERY)]
    messages, draft, note = steps[-1]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert "percent" in messages[2]["content"] and "wind has no function" in note and not draft
    assert any("I lo" in draft for _, draft, _ in steps)
    assert waits_for(agent, messages) == "wind"
    messages, _, note = [*converse(agent, messages, '{"beaufort": 9}')][-1]
    assert messages[4:] == [
        {"role": "tool", "content": '{"beaufort": 9}'},
        {"role": "assistant", "content": "Stay at home."},
    ]
    assert waits_for(agent, messages) is None and not note
    messages, _, _ = [*converse(agent, messages, "Thank you.")][-1]
    assert [message["role"] for message in messages[6:]] == ["user", "assistant"]
    assert [*converse(agent, messages, "  ")] == [(messages, "", "")]
    drawn = draw_run(messages, explorer)
    assert drawn.count("tw-answer") == 2 and "&lt;a_0&gt;&lt;b_1&gt;" in drawn
