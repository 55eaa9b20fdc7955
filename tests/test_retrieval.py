import math

import pytest
import torch
from conftest import small_llama
from transformers import GPT2Config, GPT2LMHeadModel

from toolweaver_hf import CodeTrie, ToolCodeLogitsProcessor, ToolRetriever


QUERIES = ["Will it rain?", "How many dollars is a euro today, and was it more in the spring?"]


def score(model, tokenizer, query, tool_id):
    """The log-probability of a tool's code after a query, in one plain forward pass."""
    prompt = tokenizer.encode_conversation([{"role": "user", "content": query}], add_generation_prompt=True)[
        "input_ids"
    ]
    code = tokenizer.encode_tool(tool_id)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + code])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(code))


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


@pytest.mark.parametrize("num_beams", [1, 4])
def test_generation_comes_to_a_tool(tokenizer, num_beams):
    """Through `generate`, with left padding and beams; in the mode `trajectory` codes are whole or absent."""
    model = small_llama(len(tokenizer)).eval()
    tokenizer.padding_side = "left"
    inputs = tokenizer(QUERIES, return_tensors="pt", padding=True, return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    trie = CodeTrie(tokenizer.tool_code_ids)
    processor = ToolCodeLogitsProcessor(trie, prompt_length=length, eos_token_id=tokenizer.eos_token_id)
    output = model.generate(
        **inputs,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        max_new_tokens=5,
        logits_processor=[processor],
        pad_token_id=0,
    )[:, length:]
    names = [tokenizer.decode_tool(row[:2]) for row in output]
    assert len(set(names[:num_beams])) == num_beams
    assert (output[:, 2] == tokenizer.eos_token_id).all()


def test_trajectory_mode_ends_what_it_starts(tokenizer):
    trie = CodeTrie(tokenizer.tool_code_ids)
    first, second = tokenizer.level_offsets
    codes = {"mode": "trajectory", "code_token_ids": tokenizer.code_token_ids}
    processor = ToolCodeLogitsProcessor(trie, prompt_length=1, **codes)
    scores = torch.zeros(3, len(tokenizer))
    allowed = processor(torch.tensor([[5, 6], [5, first], [first, 6]]), scores).isfinite()
    text = list(range(first))
    assert allowed[0].nonzero().flatten().tolist() == [*text, first, first + 1, first + 2]
    assert allowed[1].nonzero().flatten().tolist() == [second, second + 1]
    assert torch.equal(allowed[2], allowed[0])
    only_mail = ToolCodeLogitsProcessor(trie, **codes, allowed_tools=[[tokenizer.tool_ids.index("mail")]])
    allowed = only_mail(torch.tensor([[5, 6]]), scores[:1]).isfinite()
    assert allowed[0].nonzero().flatten().tolist() == [*text, first + 1]
    forced = ToolCodeLogitsProcessor(trie, **codes, code_start="forced")
    assert forced(torch.tensor([[5, 6]]), scores[:1]).isfinite()[0].nonzero().flatten().tolist() == [
        first,
        first + 1,
        first + 2,
    ]


def test_processor_errors(tokenizer):
    trie = CodeTrie(tokenizer.tool_code_ids)
    with pytest.raises(ValueError, match="mode must be"):
        ToolCodeLogitsProcessor(trie, mode="other")
    with pytest.raises(ValueError, match="needs prompt_length"):
        ToolCodeLogitsProcessor(trie)
    with pytest.raises(ValueError, match="code_start must be"):
        ToolCodeLogitsProcessor(trie, mode="trajectory", code_start="maybe")
