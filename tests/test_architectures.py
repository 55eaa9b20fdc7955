"""The retriever on every architecture of transformers: its scores are those of plain forward passes."""

import math

import pytest
from architectures import IMAGE_TEXT, causal_architectures, tiny_model
from test_retrieval import QUERIES, score

from toolweaver_hf import ToolRetriever
from toolweaver_hf.cache import can_use_cache


NOT_CAUSAL = ("cpmant", "prophetnet", "xlm", "xlnet")
HYBRID = (
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "mamba",
    "nemotron_h",
    "qwen3_5",
    "qwen3_next",
)
FEW = (*HYBRID, "gemma3_text", "gpt_oss", "mistral", "mixtral", "rwkv")  # the others take half a minute


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=[] if name in FEW else pytest.mark.slow)
        for name in [*causal_architectures(), *IMAGE_TEXT]
    ],
)
def test_scores_are_those_of_plain_forward_passes(tokenizer, model_type):
    """Two prompts of different lengths in a batch, several beams of each."""
    model = tiny_model(model_type, len(tokenizer))
    if model_type in NOT_CAUSAL:
        with pytest.raises(ValueError, match="no causal language model"):
            ToolRetriever(model, tokenizer)
        return
    results = ToolRetriever(model, tokenizer)(QUERIES, top_k=4)
    assert model_type not in HYBRID or can_use_cache(model)  # they are read on, not again
    for query, found in zip(QUERIES, results, strict=True):
        assert len(found) == 4
        for tool in found:
            assert math.isclose(tool.score, score(model, tokenizer, query, tool.tool_id), abs_tol=2e-3)
