"""Time a step of constrained decoding, next to two common implementations.

```bash
python recipes/benchmarks/decoding.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir out/benchmark
```

Both baselines look up prefixes in a trie of nested dictionaries: one through transformers'
`PrefixConstrainedLogitsProcessor`, one in a masking loop over the rows. All get the same beams and scores, and their
results are compared before they are timed. Each returns a new tensor of scores, so a plain copy of the scores is timed
as well: no implementation can be faster, and no speedup can exceed a baseline's time divided by it. With a model that
`recipes/sft.py` aligned, retrieval is timed end to end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from toolweaver_hf.cli import parse_arguments, run_command


if TYPE_CHECKING:
    import numpy as np
    import torch


CODEBOOK_SIZE = 1024
PROMPT_LENGTH = 16
COPY = "a copy of the scores"
DICTIONARY = "dictionary, row by row"
STATES = {
    "retrieval, first level": ("retrieval", 0),
    "retrieval, second level": ("retrieval", 1),
    "trajectory, free text": ("trajectory", 0),
    "trajectory, inside a code": ("trajectory", 1),
}


@dataclass
class BenchmarkArguments:
    """What to time."""

    num_tools: list[int] = field(
        default_factory=lambda: [47_000, 1_000_000],
        metadata={"help": "Sizes of catalog, each on two levels of 1,024 codes."},
    )
    num_beams: int = field(default=64, metadata={"help": "Rows of a step."})
    vocab_size: int = field(default=49152, metadata={"help": "Tokens of the base model."})
    model: str | None = field(default=None, metadata={"help": "Model whose forward pass is timed as well."})
    repeats: int = field(default=20, metadata={"help": "Timed calls, of which the shortest counts."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for run.json and metrics.json."})


def least_milliseconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time calls in turn; return the shortest time of each, which other work on the machine disturbs least."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i > 1:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: min(values) for name, values in times.items()}


class DictionaryMasks:
    """The masks of both modes, from nested dictionaries and one row at a time."""

    def __init__(self, codes: np.ndarray, vocab_size: int, mode: str):
        self.mode = mode
        self.root: dict[int, dict] = {}
        for code in codes.tolist():
            node = self.root
            for token in code:
                node = node.setdefault(token, {})
        self.closed = sorted(set(range(vocab_size, vocab_size + 2 * CODEBOOK_SIZE)) - set(self.root))
        self.text = [*range(vocab_size), *self.root]

    def node(self, new_ids: list[int]) -> dict[int, dict] | None:
        """Return the node that a row has reached; `None` in free text."""
        if self.mode == "trajectory":
            return self.root.get(new_ids[-1]) if new_ids else None
        node = self.root
        for token in new_ids:
            node = node[token]
        return node

    def allowed_tokens(self, _: int, ids: torch.Tensor) -> list[int]:
        """Return the valid continuations of a row, as `PrefixConstrainedLogitsProcessor` needs them."""
        node = self.node(ids[PROMPT_LENGTH:].tolist())
        return self.text if node is None else list(node)

    def loop(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask row by row."""
        mask = scores.new_full(scores.shape, float("-inf"))
        for row, ids in enumerate(input_ids[:, PROMPT_LENGTH:].tolist()):
            node = self.node(ids)
            if node is None:
                mask[row] = 0
                mask[row, self.closed] = float("-inf")
            else:
                mask[row, list(node)] = 0
        return scores + mask


def time_steps(num_tools: int, args: BenchmarkArguments) -> dict[str, dict[str, float]]:
    """Time the building of a trie and a step in every state, in milliseconds."""
    import numpy as np
    import torch
    from transformers import PrefixConstrainedLogitsProcessor

    from toolweaver_hf.logits_process import ToolCodeLogitsProcessor
    from toolweaver_hf.trie import CodeTrie

    generator = np.random.default_rng(0)
    flat = generator.choice(CODEBOOK_SIZE**2, size=num_tools, replace=False)
    codes = np.stack([flat // CODEBOOK_SIZE, CODEBOOK_SIZE + flat % CODEBOOK_SIZE], axis=1) + args.vocab_size
    start = time.perf_counter()
    trie = CodeTrie(codes)
    results = {"building": {"ToolCodeLogitsProcessor": 1000 * (time.perf_counter() - start)}}

    prompts = torch.from_numpy(generator.integers(0, args.vocab_size, (args.num_beams, PROMPT_LENGTH)))
    begun = torch.from_numpy(codes[generator.integers(0, len(codes), args.num_beams), :1])
    scores = torch.randn(args.num_beams, args.vocab_size + 2 * CODEBOOK_SIZE)
    for state, (mode, depth) in STATES.items():
        rival = DictionaryMasks(codes, args.vocab_size, mode)
        masks = {
            "ToolCodeLogitsProcessor": ToolCodeLogitsProcessor(
                trie,
                mode=mode,
                prompt_length=PROMPT_LENGTH,
                eos_token_id=0,
                code_token_ids=range(args.vocab_size, args.vocab_size + 2 * CODEBOOK_SIZE),
            ),
            "PrefixConstrainedLogitsProcessor": PrefixConstrainedLogitsProcessor(rival.allowed_tokens, num_beams=1),
            DICTIONARY: rival.loop,
        }
        input_ids = torch.cat([prompts, begun[:, :depth]], dim=1)
        expected = rival.loop(input_ids, scores)
        for name, mask in masks.items():
            if not torch.equal(mask(input_ids, scores), expected):
                raise ValueError(f"{name} masks the state {state!r} differently")
        calls = {name: partial(mask, input_ids, scores) for name, mask in masks.items()} | {COPY: scores.clone}
        results[state] = least_milliseconds(calls, args.repeats)
    return results


def time_model(args: BenchmarkArguments) -> dict[str, float]:
    """Time a forward pass of one more token for each beam, and retrieval with an aligned model, in milliseconds."""
    import torch
    from transformers import AutoModelForCausalLM

    from toolweaver_hf.retrieval import ToolRetriever
    from toolweaver_hf.tool_codes_file import TOOL_CODES_FILE

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (args.num_beams, PROMPT_LENGTH + 1))
    times = []
    with torch.inference_mode():
        for i in range(args.repeats + 2):
            cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).cache
            start = time.perf_counter()
            model(ids[:, -1:], cache=cache, use_cache=True, logits_to_keep=1)
            if i > 1:
                times.append(1000 * (time.perf_counter() - start))
    results = {"forward pass": min(times)}
    if os.path.exists(os.path.join(args.model, TOOL_CODES_FILE)):
        queries = ["Is it a good day for the park?", "How much is a euro in dollars?"] * 8
        calls = {
            f"retrieval of {len(queries)} queries, {name}": partial(
                ToolRetriever.from_pretrained(args.model, full_head=full), queries, num_beams=args.num_beams
            )
            for name, full in (("whole head", True), ("codebooks' rows of the head", False))
        }
        results |= least_milliseconds(calls, 3)
    return results


def main(args: BenchmarkArguments) -> dict[str, dict]:
    """Time everything, print tables and return milliseconds by number of tools, state and name."""
    from toolweaver_hf.evaluation.runs import save_tables, text_table

    model_times = time_model(args) if args.model else {}
    forward = model_times.get("forward pass")
    results: dict[str, dict] = {"model": model_times}
    tables = []
    for num_tools in args.num_tools:
        results[str(num_tools)] = steps = time_steps(num_tools, args)
        rows = []
        for state in STATES:
            ours, *others, copy = steps[state].values()
            share = f"{ours / forward:.2%}" if forward else ""
            ratios = [f"{other:.2f} ms, {other / ours:.1f} times" for other in others]
            rows.append([state, f"{ours:.2f}", share, *ratios, f"{copy:.2f} ms"])
        building = steps["building"]["ToolCodeLogitsProcessor"]
        tables.append(
            {
                "title": f"{num_tools:,} tools, {args.num_beams} beams, {args.vocab_size + 2 * CODEBOOK_SIZE:,} tokens, "
                f"the shortest of {args.repeats} calls; the trie is built in {building:.0f} ms",
                "columns": ["a step", "ms", "of a forward pass", "PrefixConstrainedLogitsProcessor", DICTIONARY, COPY],
                "rows": rows,
            }
        )
    if model_times:
        rows = [[name, f"{value:.0f}"] for name, value in model_times.items()]
        tables.append({"title": "The model", "columns": ["", "ms"], "rows": rows})
    for table in tables:
        print(f"\n{table['title']}\n\n{text_table(table['columns'], table['rows'])}")
    if args.output_dir:
        save_tables(args.output_dir, tables, asdict(args))
    return results


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, BenchmarkArguments))


if __name__ == "__main__":
    run_command(cli)
