"""The code that makes an aligned model's folder work by itself, where this package is not installed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from .files import write_text


PIPELINE = {
    "tool-retrieval": {
        "impl": "pipeline_tool_retrieval.ToolRetrievalPipeline",
        "pt": ["AutoModelForCausalLM"],
        "type": "text",
    }
}
PIPELINE_FILES = (
    "pipeline_tool_retrieval.py",
    "retrieval.py",
    "adapter.py",
    "cache.py",
    "node_states.py",
    "text_expert.py",
    "loading.py",
    "trie.py",
    "tokenization_toolweaver.py",
    "tool_codes_file.py",
    "chat_template.py",
)
GENERATE_FILES = (
    "text_expert.py",
    "logits_process.py",
    "trie.py",
    "tokenization_toolweaver.py",
    "tool_codes_file.py",
    "chat_template.py",
    "vllm.py",
)


def save_inference_code(folder: str | os.PathLike) -> None:
    """Put beside an aligned model the code of its pipeline and of its constrained `generate`.

    Whoever loads the folder with `trust_remote_code=True` then has `pipeline("tool-retrieval", model=folder)`, and a
    `model.generate` that only names tools which exist, as `transformers serve` calls it. vLLM finds its plugin beside
    that. A folder that holds an adapter alone is left as it is: all are found through a whole model's configuration.

    Args:
        folder (`str`): Where the model and its tokenizer were saved.
    """
    folder, source = Path(folder), Path(__file__).parent
    if not (folder / "config.json").exists():
        return
    for name in PIPELINE_FILES:
        shutil.copyfile(source / name, folder / name)
    (folder / "custom_generate").mkdir(exist_ok=True)
    shutil.copyfile(source / "custom_generate.py", folder / "custom_generate" / "generate.py")
    for name in GENERATE_FILES:
        shutil.copyfile(source / name, folder / "custom_generate" / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_text(folder / "config.json", json.dumps(config | {"custom_pipelines": PIPELINE}, indent=2) + "\n")
