"""What constrained decoding costs in a step, next to two usual ways of doing it.

```bash
python recipes/benchmark_decoding.py --num_tools 47000 --output_dir out/benchmark
```

The rivals are transformers' `PrefixConstrainedLogitsProcessor` over a dictionary of prefixes, and a masking loop over
the same dictionary. All see the same beams and scores, and their results are compared before they are timed.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, PrefixConstrainedLogitsProcessor

from toolweaver_hf.cli import run
from toolweaver_hf.logits_process import ToolCodeLogitsProcessor
from toolweaver_hf.trie import CodeTrie


@dataclass
class BenchmarkArguments:
    """What to time."""

    num_tools: int = field(default=47000, metadata={"help": "Tools in the trie, on two levels of 1,024 codes."})
    num_beams: int = field(default=64, metadata={"help": "Rows of a step."})
    vocab_size: int = field(default=49152, metadata={"help": "Tokens of the base model."})
    model: str | None = field(default=None, metadata={"help": "Model whose forward pass is timed, too."})
    repeats: int = field(default=20, metadata={"help": "Timed calls, of which the median counts."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for benchmark_decoding.json."})


def median_milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Time a call, after two that are not counted."""
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        call()
        if i > 1:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main(args: BenchmarkArguments) -> dict[str, float]:
    """Time the step at each level in both modes, print a table and return milliseconds by name."""
    generator = np.random.default_rng(0)
    flat = generator.choice(1024 * 1024, size=args.num_tools, replace=False)
    codes = np.stack([flat // 1024, 1024 + flat % 1024], axis=1) + args.vocab_size
    start = time.perf_counter()
    trie = CodeTrie(codes)
    results = {"building the trie": 1000 * (time.perf_counter() - start)}

    children: dict[tuple[int, ...], list[int]] = {}
    for first, second in codes.tolist():
        children.setdefault((), []).append(first)
        children.setdefault((first,), []).append(second)
    children = {prefix: sorted(set(tokens)) for prefix, tokens in children.items()}

    prompt_length = 16
    prompts = torch.from_numpy(generator.integers(0, args.vocab_size, (args.num_beams, prompt_length)))
    beams = torch.from_numpy(codes[generator.integers(0, len(codes), args.num_beams), :1])
    scores = torch.randn(args.num_beams, args.vocab_size + 2048)

    def dictionary(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mask = torch.full_like(scores, float("-inf"))
        for row, ids in enumerate(input_ids[:, prompt_length:].tolist()):
            mask[row, children[tuple(ids)]] = 0
        return scores + mask

    prefix_constrained = PrefixConstrainedLogitsProcessor(
        lambda _, ids: children[tuple(ids[prompt_length:].tolist())], num_beams=1
    )
    ours = ToolCodeLogitsProcessor(trie, prompt_length=prompt_length, eos_token_id=0)
    trajectory = ToolCodeLogitsProcessor(trie, mode="trajectory", prompt_length=prompt_length)
    for level, input_ids in enumerate((prompts, torch.cat([prompts, beams], dim=1)), start=1):
        expected = dictionary(input_ids, scores)
        for processor in (ours, prefix_constrained):
            if not torch.equal(processor(input_ids, scores), expected):
                raise ValueError(f"{type(processor).__name__} masks level {level} differently")
        for name, processor in (
            ("retrieval", ours),
            ("trajectory", trajectory),
            ("PrefixConstrainedLogitsProcessor", prefix_constrained),
            ("dictionary of prefixes", dictionary),
        ):
            call = lambda processor=processor, input_ids=input_ids: processor(input_ids, scores)  # noqa: E731
            results[f"level {level}, {name}"] = median_milliseconds(call, args.repeats)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        ids = prompts % model.config.vocab_size
        with torch.inference_mode():
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

            def forward() -> None:
                model(ids[:, -1:], cache=cache, use_cache=True, logits_to_keep=1)

            results["forward pass of the model"] = median_milliseconds(forward, args.repeats)

    print(f"{args.num_tools} tools, {args.num_beams} beams, {args.vocab_size + 2048} tokens, milliseconds\n")
    print("| | ms | times the mode retrieval |\n|---|---:|---:|")
    for name, value in results.items():
        level = name.split(",")[0]
        ratio = f"{value / results[f'{level}, retrieval']:.1f}" if level.startswith("level") else ""
        print(f"| {name} | {value:.2f} | {ratio} |")
    if args.output_dir:
        os.makedirs(args.output_dir, exist_ok=True)
        with open(os.path.join(args.output_dir, "benchmark_decoding.json"), "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
    return results


def cli(argv: list[str] | None = None) -> None:
    main(*HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv))


if __name__ == "__main__":
    run(cli)
