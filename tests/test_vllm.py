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
