from types import SimpleNamespace

import pytest
import torch


interface = pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor.interface", exc_type=ImportError)

from toolweaver_hf import ToolCodeLogitsProcessor, ToolCodes, ToolWeaverTokenizer  # noqa: E402
from toolweaver_hf.vllm import VLLMToolCodeLogitsProcessor as VLLMProcessor  # noqa: E402


def test_rows_are_masked_as_generate_masks_them(base_tokenizer, tmp_path):
    """Two requests, one of them with two tokens of a draft, on the buffers that vLLM's runner hands over."""
    codes = ToolCodes([3, 4, 2], {"rain": [0, 0, 1], "wind": [0, 1, 0], "fx": [2, 3, 1], "mail": [1, 1, 0]})
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    tokenizer.save_pretrained(tmp_path)
    rain, fx = tokenizer.encode_tool("rain"), tokenizer.encode_tool("fx")
    histories = [[5, *fx[:2], 6, rain[0]], [5, rain[0]]]  # after prompts of 3 and 2 tokens
    draft = rain[1:]
    tokens = torch.zeros((4, 16), dtype=torch.int32)
    for slot, history in zip((2, 0), histories, strict=True):
        tokens[slot, : len(history)] = torch.tensor(history, dtype=torch.int32)
    buffer = lambda values: SimpleNamespace(gpu=values)  # noqa: E731
    states = interface.LogitsProcRequestState(
        device=torch.device("cpu"),
        max_num_reqs=4,
        vocab_size=len(tokenizer),
        all_token_ids=buffer(tokens),
        prompt_len=buffer(torch.tensor([2, 0, 3, 0], dtype=torch.int32)),
        prefill_len=buffer(torch.tensor([2, 0, 3, 0], dtype=torch.int32)),
        total_len=buffer(torch.tensor([2, 0, 5, 0], dtype=torch.int32)),
    )
    config = SimpleNamespace(model_config=SimpleNamespace(tokenizer=str(tmp_path)))
    processor = VLLMProcessor(config, states)
    context = interface.LogitsContext(
        expanded_idx_mapping=torch.tensor([2, 2, 2, 0]),
        idx_mapping=torch.tensor([2, 0]),
        idx_mapping_np=None,
        expanded_local_pos=torch.tensor([0, 1, 2, 0]),
        input_ids=torch.tensor([rain[0], *draft, rain[0]]),
        pos=torch.tensor([4, 5, 6, 1]),
        seq_lens_upper_bound_np=None,
    )
    logits = torch.randn(4, len(tokenizer))
    masked = processor.apply(logits, context)
    rows = [histories[0], [*histories[0], draft[0]], [*histories[0], *draft], histories[1]]
    for row, prompt, ids in zip(range(4), (3, 3, 3, 2), rows, strict=True):
        plain = ToolCodeLogitsProcessor(
            tokenizer.trie,
            mode="trajectory",
            prompt_length=prompt,
            code_token_ids=tokenizer.code_token_ids,
        )
        assert torch.equal(masked[row : row + 1], plain(torch.tensor([ids]), logits[row : row + 1]))
    assert masked[1].isfinite().sum() == 1 and masked[3].isfinite().sum() > 100


def test_scores_of_a_text_expert_guide_the_request_that_brings_them(base_tokenizer, tmp_path):
    codes = ToolCodes([3, 4], {"rain": [0, 0], "wind": [0, 1], "fx": [2, 3], "mail": [1, 1]})
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    tokenizer.save_pretrained(tmp_path)
    rain = tokenizer.encode_tool("rain")
    histories = [[5, 6], [5, rain[0]], [5, rain[0]]]
    tokens = torch.zeros((3, 8), dtype=torch.int32)
    for slot, history in enumerate(histories):
        tokens[slot, : len(history)] = torch.tensor(history, dtype=torch.int32)
    lengths = SimpleNamespace(gpu=torch.tensor([1, 1, 1], dtype=torch.int32))
    states = interface.LogitsProcRequestState(
        device=torch.device("cpu"),
        max_num_reqs=3,
        vocab_size=len(tokenizer),
        all_token_ids=SimpleNamespace(gpu=tokens),
        prompt_len=lengths,
        prefill_len=lengths,
        total_len=lengths,
    )
    processor = VLLMProcessor(SimpleNamespace(model_config=SimpleNamespace(tokenizer=str(tmp_path))), states)
    scores = {"rain": -0.1, "wind": -2.5, "fx": -5.0, "gone": -1.0}
    guided = SimpleNamespace(
        extra_args={"scored_tools": [*scores], "tool_scores": [*scores.values()], "model_weight": 0.7}
    )
    for slot, params in enumerate((guided, guided, SimpleNamespace(extra_args=None))):
        VLLMProcessor.validate_params(params)
        processor.add_request(slot, params)
    context = interface.LogitsContext(
        expanded_idx_mapping=torch.arange(3),
        idx_mapping=torch.arange(3),
        idx_mapping_np=None,
        expanded_local_pos=torch.zeros(3, dtype=torch.int32),
        input_ids=torch.tensor([history[-1] for history in histories]),
        pos=torch.tensor([1, 1, 1]),
        seq_lens_upper_bound_np=None,
    )
    logits = torch.randn(3, len(tokenizer))
    masked = processor.apply(logits.clone(), context)
    expert_logits = torch.tensor([[scores.get(tool_id, -5.0) for tool_id in tokenizer.tool_ids]])
    for row, history in enumerate(histories):
        plain = ToolCodeLogitsProcessor(
            tokenizer.trie,
            mode="trajectory",
            prompt_length=1,
            code_token_ids=tokenizer.code_token_ids,
            expert_logits=expert_logits if row < 2 else None,
            model_weight=0.7,
        )
        expected = plain(torch.tensor([history]), logits[row : row + 1])
        torch.testing.assert_close(masked[row : row + 1], expected)
    processor.add_request(1, SimpleNamespace(extra_args=None))  # the slot of a request that has ended
    plain = ToolCodeLogitsProcessor(tokenizer.trie, mode="trajectory", code_token_ids=tokenizer.code_token_ids)
    expected = plain(torch.tensor([histories[1]]), logits[1:2])
    torch.testing.assert_close(processor.apply(logits.clone(), context)[1:2], expected)
    for wrong in (
        {"tool_scores": [0.1]},
        {"scored_tools": []},
        {"scored_tools": ["rain"], "tool_scores": ["high"]},
        {"scored_tools": ["rain"], "tool_scores": [-(10**400)]},
        {"scored_tools": [["rain"]], "tool_scores": [0.1]},
    ):
        with pytest.raises(ValueError, match="tool_scores"):
            VLLMProcessor.validate_params(SimpleNamespace(extra_args=wrong))
