import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolweaver_hf import CodeTrie


def code_sets(levels=3, size=4):
    """Sets of codes as token ids: each level has a range of its own, as a tokenizer gives it."""
    code = st.tuples(*[st.integers(10 + level * size, 9 + (level + 1) * size) for level in range(levels)])
    return st.lists(code, min_size=1, max_size=30, unique=True)


@given(code_sets(), st.data())
@settings(max_examples=80, deadline=None)
def test_children_equal_brute_force(codes, data):
    trie = CodeTrie(np.array(codes))
    chosen = data.draw(st.sets(st.integers(0, len(codes) - 1)))
    allowed = trie.allow([sorted(chosen)])
    prefixes = {code[:depth] for code in codes for depth in range(3)}
    for prefix in prefixes | {(9,), (10, 10)}:
        node = trie.walk(torch.tensor([prefix], dtype=torch.long).view(1, -1))
        expected = sorted({code[len(prefix)] for code in codes if code[: len(prefix)] == prefix})
        tokens, present = trie.children(node, max(trie.max_children))
        assert tokens[present].tolist() == expected
        expected = sorted({codes[i][len(prefix)] for i in chosen if codes[i][: len(prefix)] == prefix})
        tokens, present = trie.children(node, max(trie.max_children), allowed)
        assert tokens[present].tolist() == expected


@given(code_sets())
@settings(max_examples=40, deadline=None)
def test_every_code_leads_to_its_tool(codes):
    trie = CodeTrie(np.array(codes))
    leaves = trie.walk(torch.tensor(codes))
    assert trie.tools[leaves - (trie.num_nodes - len(trie))].tolist() == list(range(len(codes)))


def test_equal_codes_are_refused():
    with pytest.raises(ValueError, match="rows 0 and 2 have the same code"):
        CodeTrie(np.array([[1, 5], [1, 6], [1, 5]]))
    with pytest.raises(ValueError, match="have the shape"):
        CodeTrie(np.zeros((0, 2)))
