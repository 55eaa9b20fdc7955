"""Measure how codes slow down a tokenizer: its speed on text without codes relative to its base's, and loading.

```bash
python recipes/benchmarks/tokenizer.py --base HuggingFaceTB/SmolLM2-135M-Instruct --num_tools 47000
```
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from toolweaver_hf.cli import parse_arguments, run_command


@dataclass
class BenchmarkArguments:
    """What to measure.

    Args:
        base (`str`):
            Id or path of the base tokenizer.
        num_tools (`int`, *optional*, defaults to 47000):
            Size of the catalog.
        codebook_size (`int`, *optional*, defaults to 1024):
            Codes of each of the two levels.
        rounds (`int`, *optional*, defaults to 50):
            Measurements, taken in turn; the fastest counts.
    """

    base: str = field(metadata={"help": "Id or path of the base tokenizer."})
    num_tools: int = field(default=47000, metadata={"help": "Size of the catalog."})
    codebook_size: int = field(default=1024, metadata={"help": "Codes of each of the two levels."})
    rounds: int = field(default=50, metadata={"help": "Measurements; the fastest counts."})


def fastest(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Time functions in turn; return the seconds of processor time of each one's fastest call."""
    seconds = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.process_time()
            function()
            seconds[name] = min(seconds[name], time.process_time() - started)
    return seconds


def main(args: BenchmarkArguments) -> dict[str, float]:
    """Measure, print and return the figures."""
    from transformers import AutoTokenizer

    from toolweaver_hf.codes.tool_codes import ToolCodes
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.demo import DEMO_FOLDER
    from toolweaver_hf.tokenization_toolweaver import ToolWeaverTokenizer

    base = AutoTokenizer.from_pretrained(args.base)
    codes = {f"tool_{i}": divmod(i, args.codebook_size) for i in range(args.num_tools)}
    tokenizer = ToolWeaverTokenizer.from_base(base, ToolCodes([args.codebook_size] * 2, codes))
    texts = ToolCatalog.from_pretrained(DEMO_FOLDER).documents
    messages = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    ids = base(texts)["input_ids"]
    tasks = {
        "batch": lambda t: t(texts),
        "one by one": lambda t: [t(text) for text in texts],
        "decoding": lambda t: t.batch_decode(ids),
        "chat template": lambda t: [t.apply_chat_template(messages) for _ in range(200)],
    }
    results = {}
    for name, task in tasks.items():
        seconds = fastest({"base": partial(task, base), "ours": partial(task, tokenizer)}, args.rounds)
        results[name] = seconds["ours"] / seconds["base"]
        print(f"{name:<16}{1e3 * seconds['ours']:8.1f} ms, {results[name]:.3f} times the base's")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(f"{folder}/ours")
        base.save_pretrained(f"{folder}/base")
        seconds = fastest(
            {name: partial(AutoTokenizer.from_pretrained, f"{folder}/{name}") for name in ("ours", "base")}, 3
        )
    results["loading"] = seconds["ours"]
    print(f"{'loading':<16}{seconds['ours']:8.2f} s with {args.num_tools} tools, {seconds['base']:.2f} s the base")
    looked_up = fastest(
        {"names": lambda: [tokenizer.decode_tool(tokenizer.encode_tool(tool_id)) for tool_id in codes]}, 3
    )
    print(f"{'looking up':<16}{1e6 * looked_up['names'] / args.num_tools:8.2f} µs for a tool by name and back by code")
    return results


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, BenchmarkArguments))


if __name__ == "__main__":
    run_command(cli)
