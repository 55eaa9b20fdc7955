"""All levels in one forward pass, with a kept prefix: whatever is drafted, the results are those of a plain search."""

import math

import bases
import numpy as np
import pytest
import torch
from conftest import small_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from test_guided_retrieval import LetterEncoder

from toolweaver_hf import ToolCodes, ToolRetriever, ToolWeaverTokenizer
from toolweaver_hf.cache import DecodingTree
from toolweaver_hf.text_expert import TextExpert


QUERIES = ["Will it rain?", "How many dollars is a euro today, and was it more in the spring?", "mail"]
WORDS = ["rain", "wind", "euro", "dollar", "mail", "spring", "train", "cash", "snow", "letter"]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_branches_are_read_as_in_rows_of_their_own(data):
    model = small_llama(50).eval()
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    prefix = [draw(1, 49) for _ in range(draw(0, 3))]
    lengths = [draw(1, 5) for _ in range(2)]
    prompts = [[draw(1, 49) for _ in range(length)] for length in lengths]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    tree = DecodingTree(model)
    with torch.no_grad():
        if prefix:
            tree.read(torch.tensor([prefix]))
        tree = tree.repeat(2)
    total = draw(0, 6)
    first = draw(0, total)
    parents = torch.tensor([[draw(-1, i - 1) for i in range(total)] for _ in prompts]).view(2, -1)
    branches = torch.tensor([[draw(1, 49) for _ in range(total)] for _ in prompts]).view(2, -1).long()
    with torch.no_grad():
        logits = tree.read(ids, mask, branches[:, :first], parents[:, :first])
        if first < total:
            rest = tree.read(branches=branches[:, first:], parents=parents[:, first:])
            logits = torch.cat([logits, rest], dim=1)
        for row, prompt in enumerate(prompts):
            for place in range(-1, total):
                path, at = [], place
                while at >= 0:
                    path, at = [branches[row, at].item(), *path], parents[row, at].item()
                expected = model(torch.tensor([prefix + prompt + path])).logits[0, -1]
                torch.testing.assert_close(logits[row, place + 1], expected, atol=1e-4, rtol=1e-4)


class Drafting(ToolRetriever):
    """Drafts the inner nodes that a test names."""

    drafts: list = []

    def _draft(self, guide, num_beams, batch):
        inner = range(1, self._first_nodes[-1])
        parent = {
            child: n for n in range(self._first_nodes[-1]) for child in range(*self.trie.child_ranges[n].tolist())
        }
        chosen = sorted({inner[i % len(inner)] for i in self.drafts})
        chosen = [node for node in chosen if parent[node] == 0 or parent[node] in chosen]
        nodes = torch.tensor([chosen] * batch).view(batch, -1).long()
        return nodes, self.trie.tokens_of(nodes), torch.tensor([[parent[n] for n in chosen]] * batch).view(batch, -1)


@pytest.fixture(scope="module", params=[(6, 7), (3, 4, 5)], ids=["two levels", "three levels"])
def retrievers(request):
    sizes = request.param
    generator = np.random.default_rng(0)
    tools = {f"tool_{i}": " ".join(generator.choice(WORDS, 4)) for i in range(36)}
    flat = generator.choice(math.prod(sizes), 36, replace=False)
    codes = ToolCodes(sizes, {t: np.unravel_index(c, sizes) for t, c in zip(tools, flat, strict=True)})
    tokenizer = ToolWeaverTokenizer.from_base(bases.build("smollm2"), codes)
    expert = TextExpert(list(tools), list(tools.values()), cosine_weight=5, bm25_weight=1, model_weight=0.7)
    expert._encoder_module = LetterEncoder()
    expert.embed()
    expert.learned = frozenset(list(tools)[:30])
    # The same weights, each beam in a row of its own and level by level
    plain = small_llama(len(tokenizer), attn_implementation="eager")
    model = small_llama(len(tokenizer))
    model.load_state_dict(plain.state_dict())
    return {
        guided: (
            Drafting(model, tokenizer, expert if guided else None),
            ToolRetriever(plain, tokenizer, expert if guided else None),
        )
        for guided in (False, True)
    }


@settings(max_examples=30, deadline=None)
@given(
    guided=st.booleans(),
    drafts=st.lists(st.integers(0, 200), max_size=25),
    top_k=st.integers(1, 8),
    num_beams=st.integers(1, 30),
    num_queries=st.integers(1, 3),
    allowed=st.none() | st.lists(st.integers(0, 35), unique=True, max_size=12),
)
def test_any_drafts_give_the_results_of_the_beam_search(
    retrievers, guided, drafts, top_k, num_beams, num_queries, allowed
):
    drafting, plain = retrievers[guided]
    drafting.drafts = drafts
    if allowed is not None:
        allowed = [f"tool_{i}" for i in allowed if guided or i < 30]
    arguments = {"top_k": top_k, "num_beams": num_beams, "allowed_tools": allowed}
    queries = QUERIES[:num_queries]
    for found, expected in zip(drafting(queries, **arguments), plain(queries, **arguments), strict=True):
        assert [tool.tool_id for tool in found] == [tool.tool_id for tool in expected]
        for one, other in zip(found, expected, strict=True):
            assert math.isclose(one.score, other.score, abs_tol=1e-3)


def test_its_own_drafts_give_the_results_of_the_beam_search(retrievers):
    for guided in (False, True):
        drafting, plain = retrievers[guided]
        retriever = ToolRetriever(drafting.model, drafting.tokenizer, drafting.text_expert)
        for query in QUERIES * 3:  # the same ones again are drafted by what was found
            for found, expected in zip(*retriever(query), *plain(query), strict=True):
                assert found.tool_id == expected.tool_id
                assert math.isclose(found.score, expected.score, abs_tol=1e-3)


def score(model, tokenizer, query, tool_id):
    """The log-probability of a tool's code after a query, in one plain forward pass, each token among its siblings."""
    prompt, code = tokenizer.encode_query(query), tokenizer.encode_tool(tool_id)
    codes = [tokenizer.encode_tool(other) for other in tokenizer.tool_ids]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + code])).logits[0, len(prompt) - 1 :]
    siblings = [sorted({other[i] for other in codes if other[:i] == code[:i]}) for i in range(len(code))]
    return sum(logits[i, tokens].log_softmax(-1)[tokens.index(code[i])].item() for i, tokens in enumerate(siblings))


def count_tokens(model):
    """The number of tokens of each forward pass that follows."""
    counts = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return counts


def test_right_drafts_spare_the_second_pass(retrievers):
    drafting, _ = retrievers[True]
    counts = count_tokens(drafting.model)
    drafting.drafts = range(200)
    drafting(QUERIES[0])
    assert len(counts) == 1
    drafting.drafts = []
    drafting(QUERIES[0])
    assert len(counts) > 2


@pytest.mark.parametrize("family", bases.FAMILIES)
def test_the_constant_part_of_the_prompt_is_read_once(family, codes):
    tokenizer = ToolWeaverTokenizer.from_base(bases.build(family), codes)
    model = small_llama(len(tokenizer)).eval()
    retriever = ToolRetriever(model, tokenizer)
    counts = count_tokens(model)
    for attempt in range(2):
        for queries in (QUERIES, *QUERIES):
            queries = [queries] if isinstance(queries, str) else queries
            for query, found in zip(queries, retriever(queries, top_k=4), strict=True):
                assert len(found) == 4
                for tool in found:
                    assert math.isclose(tool.score, score(model, tokenizer, query, tool.tool_id), abs_tol=1e-3)
        if attempt == 0:  # what was read with other weights counts no more
            with torch.no_grad():
                model.lm_head.weight.mul_(0.5)
                model.model.layers[0].mlp.up_proj.weight.mul_(-1)
    kept = len(retriever._prefix_ids)
    assert kept > 0 or family in ("gpt2", "gpt2_prefix")
    prompt = tokenizer.encode_query(QUERIES[0])
    assert prompt[:kept] == retriever._prefix_ids.tolist()
    counts.clear()
    retriever(QUERIES[0], num_beams=50)  # too many for drafts
    assert counts[0] == len(prompt) - kept


def test_long_queries_take_smaller_batches(retrievers):
    drafting, _ = retrievers[False]
    retriever = ToolRetriever(drafting.model, drafting.tokenizer)
    queries = [*QUERIES * 5, *["rain and wind " * 60] * 7]
    counts = count_tokens(drafting.model)
    together = retriever(queries, num_beams=4)
    assert max(counts) <= 2048
    assert len(counts) < len(queries)
    for found, expected in zip(together, retriever(queries, num_beams=4, batch_size=1), strict=True):
        assert [tool.tool_id for tool in found] == [tool.tool_id for tool in expected]
