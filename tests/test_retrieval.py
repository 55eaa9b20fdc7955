import math

import ir_measures
import numpy as np
import pytest
import torch
from conftest import small_llama
from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel

from toolweaver_hf import ToolCodeLogitsProcessor, ToolCodes, ToolRetriever, ToolWeaverTokenizer


QUERIES = ["Will it rain?", "How many dollars is a euro today, and was it more in the spring?"]


def score(model, tokenizer, query, tool_id):
    """The log-probability of a tool's code after a query, in one plain forward pass, each token among its siblings."""
    prompt = tokenizer.encode_conversation([{"role": "user", "content": query}], add_generation_prompt=True)[
        "input_ids"
    ]
    code = tokenizer.encode_tool(tool_id)
    codes = [tokenizer.encode_tool(other) for other in tokenizer.tool_ids]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + code])).logits[0, len(prompt) - 1 :]
    total = 0.0
    for i, token in enumerate(code):
        siblings = sorted({other[i] for other in codes if other[:i] == code[:i]})
        total += logits[i, siblings].log_softmax(-1)[siblings.index(token)].item()
    return total


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_and_order_equal_exhaustive_search(tokenizer, family):
    model = small_llama(len(tokenizer))
    if family == "gpt2":
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
        model = GPT2LMHeadModel(config).eval()
    results = ToolRetriever(model, tokenizer)(QUERIES, top_k=4)
    for query, found in zip(QUERIES, results, strict=True):
        expected = sorted(((score(model, tokenizer, query, t), t) for t in tokenizer.tool_ids), reverse=True)
        assert [tool.tool_id for tool in found] == [tool_id for _, tool_id in expected]
        for tool, (value, _) in zip(found, expected, strict=True):
            assert math.isclose(tool.score, value, abs_tol=1e-3)


def test_allowed_tools(tokenizer):
    retriever = ToolRetriever(small_llama(len(tokenizer)), tokenizer)
    (found,) = retriever(QUERIES[0], allowed_tools=["mail", "wind"])
    assert {tool.tool_id for tool in found} == {"mail", "wind"}
    with pytest.raises(ValueError, match="snow"):
        retriever(QUERIES[0], allowed_tools=["snow"])


@pytest.mark.parametrize("exhaustive", [False, True])
def test_nothing_allowed_is_an_empty_ranking(tokenizer, exhaustive):
    retriever = ToolRetriever(small_llama(len(tokenizer)), tokenizer)
    assert retriever(QUERIES[:2], allowed_tools=[], exhaustive=exhaustive) == [[], []]
    none, one = retriever(QUERIES[:2], allowed_tools=[[], ["wind"]], exhaustive=exhaustive)
    assert not none and [tool.tool_id for tool in one] == ["wind"]


@pytest.mark.parametrize("query", [None, 5, [None], ["rain?", {}]])
def test_a_query_that_is_no_text_is_refused(tokenizer, query):
    with pytest.raises(ValueError, match="a query must be a text"):
        ToolRetriever(small_llama(len(tokenizer)), tokenizer)(query)


def test_a_query_longer_than_the_model_reads_keeps_its_end(tokenizer):
    retriever = ToolRetriever(small_llama(len(tokenizer), max_position_embeddings=64), tokenizer)
    short, query = retriever.encode_query("rain?"), "the weather of the city " * 50 + "rain?"
    whole, ids = tokenizer.encode_query(query), retriever.encode_query(query)
    assert len(short) < len(ids) == 64 - len(tokenizer.codebook_sizes) < len(whole)
    head = next(i for i, (one, other) in enumerate(zip(short, whole, strict=False)) if one != other)
    assert ids[:head] == short[:head] and ids[head:] == whole[head - len(ids) :]
    assert len(retriever(query)[0]) == len(tokenizer.tool_ids)


def many_tools(base_tokenizer, num_tools=60, sizes=(4, 5, 6)):
    generator = np.random.default_rng(0)
    flat = generator.choice(math.prod(sizes), num_tools, replace=False)
    codes = {f"tool_{i}": np.unravel_index(code, sizes) for i, code in enumerate(flat)}
    return ToolWeaverTokenizer.from_base(base_tokenizer, ToolCodes(sizes, codes))


@pytest.mark.parametrize("tied", [True, False])
def test_scoring_codes_alone_changes_no_rank_and_no_score(base_tokenizer, tied):
    tokenizer = many_tools(base_tokenizer)
    model = small_llama(len(tokenizer), tie_word_embeddings=tied)
    full, codes = ToolRetriever(model, tokenizer), ToolRetriever(model, tokenizer, full_head=False)
    for arguments in ({}, {"num_beams": 3, "top_k": 3}, {"exhaustive": True, "top_k": 60}):
        for expected, found in zip(full(QUERIES, **arguments), codes(QUERIES, **arguments), strict=True):
            assert [tool.tool_id for tool in found] == [tool.tool_id for tool in expected]
            for a, b in zip(found, expected, strict=True):
                assert math.isclose(a.score, b.score, abs_tol=1e-4)


def test_models_that_change_their_logits_need_the_full_head(tokenizer):
    config = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = CohereForCausalLM(CohereConfig(**config, num_attention_heads=2, logit_scale=0.0625, pad_token_id=0))
    assert ToolRetriever(model, tokenizer)(QUERIES[0])
    with pytest.raises(ValueError, match="use full_head=True"):
        ToolRetriever(model, tokenizer, full_head=False)


@pytest.mark.parametrize("sizes", [(60,), (2,) * 8])
def test_any_number_of_levels(base_tokenizer, sizes):
    tokenizer = many_tools(base_tokenizer, num_tools=50, sizes=sizes)
    model = small_llama(len(tokenizer))
    for full_head in (True, False):
        retriever = ToolRetriever(model, tokenizer, full_head=full_head)
        (found,) = retriever(QUERIES[0], exhaustive=True, top_k=50)
        assert len(found) == 50
        for tool in found[::10]:
            assert math.isclose(tool.score, score(model, tokenizer, QUERIES[0], tool.tool_id), abs_tol=1e-3)


def test_exhaustive_scores_are_the_teacher_forced_ones(base_tokenizer):
    tokenizer = many_tools(base_tokenizer)
    model = small_llama(len(tokenizer))
    retriever = ToolRetriever(model, tokenizer)
    for query, found in zip(QUERIES, retriever(QUERIES, exhaustive=True, top_k=60), strict=True):
        expected = {tool_id: score(model, tokenizer, query, tool_id) for tool_id in tokenizer.tool_ids}
        assert [tool.tool_id for tool in found] == sorted(expected, key=expected.get, reverse=True)
        for tool in found:
            assert math.isclose(tool.score, expected[tool.tool_id], abs_tol=1e-3)
        assert math.isclose(sum(math.exp(tool.score) for tool in found), 1, abs_tol=1e-3)
        (searched,) = retriever(query, num_beams=60, top_k=60)
        assert [tool.tool_id for tool in searched] == [tool.tool_id for tool in found]


def test_beams_of_generate_rank_alike(base_tokenizer):
    tokenizer = many_tools(base_tokenizer)
    model = small_llama(len(tokenizer))
    (found,) = ToolRetriever(model, tokenizer)(QUERIES[0], top_k=10, num_beams=60)
    prompt = torch.tensor([tokenizer.encode_query(QUERIES[0])])
    processor = ToolCodeLogitsProcessor(
        tokenizer.trie, prompt_length=prompt.shape[1], eos_token_id=tokenizer.eos_token_id
    )
    output = model.generate(
        prompt,
        max_new_tokens=3,
        num_beams=60,
        num_return_sequences=10,
        length_penalty=0.0,
        renormalize_logits=True,
        return_dict_in_generate=True,
        output_scores=True,
        logits_processor=[processor],
    )
    codes = output.sequences[:, prompt.shape[1] :].tolist()
    assert codes == [tokenizer.encode_tool(tool.tool_id) for tool in found]
    torch.testing.assert_close(
        output.sequences_scores, torch.tensor([tool.score for tool in found]), atol=1e-4, rtol=0
    )


def test_a_batch_and_its_padding_change_nothing(base_tokenizer):
    tokenizer = many_tools(base_tokenizer)
    retriever = ToolRetriever(small_llama(len(tokenizer)), tokenizer)
    queries = [*QUERIES, "x", "One more that is rather longer than the others are, so that they are padded"]
    for together, query in zip(retriever(queries), queries, strict=True):
        for a, b in zip(together, *retriever(query), strict=True):
            assert a.tool_id == b.tool_id
            assert math.isclose(a.score, b.score, abs_tol=1e-4)


def test_each_query_has_its_own_set_of_tools(base_tokenizer):
    tokenizer = many_tools(base_tokenizer)
    retriever = ToolRetriever(small_llama(len(tokenizer)), tokenizer)
    sets = [["tool_3", "tool_8", "tool_9"], []]
    first, second = retriever(QUERIES, allowed_tools=sets, batch_size=2)
    assert {tool.tool_id for tool in first} == set(sets[0])
    assert second == []
    for tool in first:
        assert math.isclose(tool.score, score(retriever.model, tokenizer, QUERIES[0], tool.tool_id), abs_tol=1e-3)
    with pytest.raises(ValueError, match="2 sets of allowed tools are given for 3 queries"):
        retriever([*QUERIES, "x"], allowed_tools=sets)


def test_scores_make_a_run(tokenizer):
    """As ir-measures and ranx take it: query id -> tool id -> score."""
    results = ToolRetriever(small_llama(len(tokenizer)), tokenizer)(QUERIES)
    run = {f"q{i}": {tool.tool_id: tool.score for tool in found} for i, found in enumerate(results)}
    best = {f"q{i}": {found[0].tool_id: 1} for i, found in enumerate(results)}
    assert ir_measures.calc_aggregate([ir_measures.nDCG @ 1, ir_measures.RR], best, run) == {
        ir_measures.nDCG @ 1: 1.0,
        ir_measures.RR: 1.0,
    }
