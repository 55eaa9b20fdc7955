"""Streamed text adds up to the text of all tokens, whatever the tokens are."""

import pytest
from bases import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st

from toolweaver_hf import ToolCodes, ToolWeaverTokenizer
from toolweaver_hf.agent.text_stream import TextStream


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_add_up_to_the_whole_text(family):
    """Any sequence: half characters, bytes that are none, spaces at the start, codes and special tokens between."""
    tokenizer = ToolWeaverTokenizer.from_base(build(family), ToolCodes([2, 2], {"rain": [0, 1]}))
    odd = [i for token, i in tokenizer.get_vocab().items() if token.startswith("<") or token.strip("▁Ġ") == ""]
    texts = st.text(max_size=6).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    tokens = st.one_of(st.integers(0, len(tokenizer) - 1), st.sampled_from(odd)).map(lambda token: [token])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.one_of(tokens, texts), max_size=12))
    def check(parts):
        ids = [token for part in parts for token in part]
        stream = TextStream(tokenizer)
        pieces = [stream.put(token) for token in ids]
        assert "".join([*pieces, stream.end()]) == tokenizer.decode(ids, skip_special_tokens=True)

    check()
    stream = TextStream(tokenizer)  # and what is complete does not wait
    ids = tokenizer.encode("Ça va? Oui, merci.", add_special_tokens=False)
    assert sum(bool(stream.put(token)) for token in ids) > 1
