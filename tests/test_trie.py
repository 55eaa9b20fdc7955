import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolweaver_hf import CodeTrie


@st.composite
def code_sets(draw, max_levels=8, size=4):
    """Sets of codes as token ids: each level has a range of its own, as a tokenizer gives it."""
    levels = draw(st.integers(1, max_levels))
    code = st.tuples(*[st.integers(10 + level * size, 9 + (level + 1) * size) for level in range(levels)])
    return draw(st.lists(code, min_size=1, max_size=30, unique=True))


def following(codes, prefix):
    return sorted({code[len(prefix)] for code in codes if code[: len(prefix)] == prefix})


@given(code_sets(), st.data())
@settings(max_examples=80, deadline=None)
def test_children_equal_brute_force(codes, data):
    trie = CodeTrie(np.array(codes))
    sets = data.draw(st.lists(st.sets(st.integers(0, len(codes) - 1)), min_size=1, max_size=4))
    forest = trie.restrict([sorted(tools) for tools in sets])
    prefixes = {code[:depth] for code in codes for depth in range(len(code))} | {(9,), (10, 10)}
    for prefix in prefixes:
        ids = torch.tensor([prefix], dtype=torch.long).view(1, -1)
        tokens, present = trie.children(trie.walk(ids), max(trie.max_children))
        assert tokens[present].tolist() == following(codes, prefix)
        nodes = forest.walk(ids.repeat(len(sets), 1), forest.roots)
        tokens, present = forest.children(nodes, max(forest.max_children))
        for row, tools in enumerate(sets):
            assert tokens[row][present[row]].tolist() == following([codes[i] for i in tools], prefix)


def leaves(trie, codes):
    """Walk whole codes; return their leaves, as places in `trie.tools`, negative where there is none."""
    return trie.walk(torch.tensor(codes)) - (trie.num_nodes - len(trie))


@given(code_sets(), st.data())
@settings(max_examples=40, deadline=None)
def test_every_code_leads_to_its_tool(codes, data):
    trie = CodeTrie(np.array(codes))
    assert trie.tools[leaves(trie, codes)].tolist() == list(range(len(codes)))
    tools = sorted(data.draw(st.sets(st.integers(0, len(codes) - 1), min_size=1)))
    found = trie.restrict([tools])
    assert found.tools[leaves(found, [codes[i] for i in tools])].tolist() == tools
    others = [code for i, code in enumerate(codes) if i not in tools]
    assert not others or (leaves(found, others) < 0).all()


def test_equal_sets_share_a_root():
    forest = CodeTrie(np.array([[1, 5], [1, 6], [2, 5]])).restrict([[0, 1], [2], [], [1, 0, 1]])
    assert forest.roots.tolist() == [0, 1, -1, 0]
    assert len(forest) == 3


def test_errors():
    with pytest.raises(ValueError, match="rows 0 and 2 have the same code"):
        CodeTrie(np.array([[1, 5], [1, 6], [1, 5]]))
    with pytest.raises(ValueError, match="have the shape"):
        CodeTrie(np.zeros((0, 2)))
    trie = CodeTrie(np.array([[1, 5], [1, 6]]))
    for tools in ([2], [-1]):
        with pytest.raises(ValueError, match="rows of tool_code_ids, 0 to 1"):
            trie.restrict([tools])
    with pytest.raises(ValueError, match="at least one set"):
        trie.restrict([])
