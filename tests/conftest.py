import atexit
import os
import shutil
import tempfile

from servers.hub_server import MY_TOKEN, HubServer


# huggingface_hub reads these when it is imported. No test reaches the real Hub or the user's cache.
HUB = HubServer().start()
HF_HOME = tempfile.mkdtemp()
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
os.environ.update(HF_ENDPOINT=HUB.url, HF_HOME=HF_HOME, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ.update(HF_HUB_ETAG_TIMEOUT="60", HF_HUB_DOWNLOAD_TIMEOUT="60")  # of a machine that is busy
# Tests side by side share the cores: with more threads than these, they wait for one another. PyTorch reads it once.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toolweaver_hf import ToolCodes, ToolWeaverTokenizer
from toolweaver_hf.demo import DEMO_FOLDER


os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture
def hub(monkeypatch):
    """An empty Hub on loopback, and the user `me` logged in to it."""
    HUB.reset()
    monkeypatch.setenv("HF_TOKEN", MY_TOKEN)
    return HUB


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
