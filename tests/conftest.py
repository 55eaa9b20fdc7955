import os

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toolweaver_hf import ToolCodes, ToolWeaverTokenizer
from toolweaver_hf.demo import DEMO_FOLDER


os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def base_tokenizer():
    """A byte-level BPE tokenizer without a chat template, trained on the demo's documents."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((DEMO_FOLDER / "catalog.jsonl").read_text(encoding="utf-8").splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>")


@pytest.fixture
def codes():
    return ToolCodes([3, 4], {"rain": [0, 0], "wind": [0, 1], "fx": [2, 3], "mail": [1, 1]})


@pytest.fixture
def tokenizer(base_tokenizer, codes):
    return ToolWeaverTokenizer.from_base(base_tokenizer, codes)


def small_llama(vocab_size, **kwargs):
    torch.manual_seed(0)
    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(config | kwargs)))
