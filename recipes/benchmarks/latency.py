"""What a query costs: search, one token a tool (ToolGen), codes level by level, and codes in one forward pass.

```bash
python recipes/benchmarks/latency.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir out/latency
python recipes/benchmarks/latency.py --model out/retrieval --encoder sentence-transformers/all-MiniLM-L6-v2
```

With a base model the catalogs are synthetic: random codes and documents of random words, with random embeddings; the
encoder and the model really read the queries. With a model that `recipes/sft.py` aligned, its own catalog and codes are
measured, so that the share of queries that one pass answers is a real one. All systems take turns at every query, in
one process. The baseline decodes level by level in float32, reads the whole prompt, and keeps a row of the cache for
each beam; its results are compared with those of one pass before anything is timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from toolweaver_hf.cli import parse_arguments, run_command


if TYPE_CHECKING:
    import numpy as np
    import torch

    from toolweaver_hf.codes.tool_codes import ToolCodes
    from toolweaver_hf.retrieval import ToolRetriever
    from toolweaver_hf.text_expert import TextExpert


BASELINE, ONE_PASS = "codes, level by level, float32", "codes, one pass"
QUERIES = [
    "Is it a good day for the park, or will it rain before the evening?",
    "How much is a euro in dollars today?",
    "Send the report to everyone who was in the meeting this morning.",
    "Find a vegetarian restaurant near the station that is open late.",
    "Translate this letter to Spanish and check its grammar.",
    "Which films of this director were nominated for an award, and where can I watch them?",
    "Book a table for four tomorrow.",
    "Summarize the news about the election in three sentences.",
]
WORDS = [word for query in QUERIES for word in query.strip(".?").lower().split()]


@dataclass
class LatencyArguments:
    """What to time.

    Args:
        model (`str`):
            A base model, or an aligned one with its own codes and catalog.
        num_tools (`list[int]`, *optional*):
            Sizes of the synthetic catalogs for a base model.
        encoder (`str`, *optional*):
            Sentence encoder of the text expert. Defaults to all-MiniLM-L6-v2.
        num_threads (`list[int]`, *optional*):
            Numbers of threads to compute with.
        batch_size (`int`, *optional*, defaults to 32):
            Queries in a batch.
        repeats (`int`, *optional*, defaults to 5):
            How often each of the eight queries is timed.
        output_dir (`str`, *optional*):
            Folder for `run.json` and `metrics.json`.
    """

    model: str = field(metadata={"help": "A base model, or an aligned one with its own codes and catalog."})
    num_tools: list[int] = field(
        default_factory=lambda: [464, 4_076, 47_000], metadata={"help": "Sizes of catalog for a base model."}
    )
    encoder: str | None = field(default=None, metadata={"help": "Sentence encoder of the text expert."})
    num_threads: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Threads to compute with."})
    batch_size: int = field(default=32, metadata={"help": "Queries in a batch."})
    repeats: int = field(default=5, metadata={"help": "How often each query is timed."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for run.json and metrics.json."})


def level_by_level(retriever: ToolRetriever) -> ToolRetriever:
    """Turn off the kept prefix, the shared rows of the cache and the drafts."""
    retriever._one_row = retriever._drafts = False
    return retriever


def synthetic_expert(num_tools: int, encoder: str | None) -> TextExpert:
    """Make up documents and embeddings of tools."""
    import numpy as np
    import torch

    from toolweaver_hf.text_expert import TextExpert

    generator = np.random.default_rng(0)
    documents = [" ".join(words) for words in generator.choice(WORDS, (num_tools, 12))]
    expert = TextExpert([f"tool {i}" for i in range(num_tools)], documents, encoder)
    size = expert._encode(["?"], as_queries=True).shape[1]
    embeddings = torch.randn((num_tools, size), generator=torch.Generator().manual_seed(0))
    expert.embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    return expert


def base_systems(model: str, num_tools: int, encoder: str | None) -> dict[str, ToolRetriever]:
    """Set up all systems over a synthetic catalog."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolweaver_hf.alignment.embedding_init import initialize_code_embeddings
    from toolweaver_hf.codes.tool_codes import ToolCodes
    from toolweaver_hf.recipes.tokenize_tools import default_codebook_sizes
    from toolweaver_hf.retrieval import ToolRetriever
    from toolweaver_hf.text_expert import fast_dtype
    from toolweaver_hf.tokenization_toolweaver import ToolWeaverTokenizer

    base, expert = AutoTokenizer.from_pretrained(model), synthetic_expert(num_tools, encoder)
    sizes = default_codebook_sizes(num_tools)
    flat = np.random.default_rng(0).choice(int(np.prod(sizes)), num_tools, replace=False)
    codes = np.stack(np.unravel_index(flat, sizes), axis=1).tolist()

    def retriever(codes: ToolCodes, dtype: torch.dtype) -> ToolRetriever:
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = ToolWeaverTokenizer.from_base(base, codes)
        torch.manual_seed(0)
        initialize_code_embeddings(lm, tokenizer, None, method="random")
        return ToolRetriever(lm.to(dtype), tokenizer, expert)

    of_levels = ToolCodes(sizes, dict(zip(expert.tool_ids, codes, strict=True)))
    of_one = ToolCodes([num_tools], {tool_id: [i] for i, tool_id in enumerate(expert.tool_ids)})
    return {
        "search": ToolRetriever(text_expert=expert),
        "one token a tool": retriever(of_one, fast_dtype()),
        BASELINE: level_by_level(retriever(of_levels, torch.float32)),
        ONE_PASS: retriever(of_levels, fast_dtype()),
    }


def aligned_systems(model: str, encoder: str | None) -> dict[str, ToolRetriever]:
    """Set up the systems that an aligned model has."""
    import torch

    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.loading import load_aligned_model
    from toolweaver_hf.retrieval import ToolRetriever
    from toolweaver_hf.text_expert import TextExpert, fast_dtype
    from toolweaver_hf.tokenization_toolweaver import ToolWeaverTokenizer

    catalog = ToolCatalog.from_pretrained(model, repo_type="model")
    expert = TextExpert(catalog.ids, catalog.documents, encoder).embed()
    tokenizer = ToolWeaverTokenizer.from_pretrained(model)
    slow, fast = load_aligned_model(model, dtype=torch.float32), load_aligned_model(model, dtype=fast_dtype())
    return {
        "search": ToolRetriever(text_expert=expert),
        BASELINE: level_by_level(ToolRetriever(slow, tokenizer, expert)),
        ONE_PASS: ToolRetriever(fast, tokenizer, expert),
        "codes without an expert, one pass": ToolRetriever(fast, tokenizer),
    }


def count_passes(retriever: ToolRetriever) -> float:
    """Count the forward passes of a query, on average; 0 for search."""
    if retriever.model is None:
        return 0.0
    passes = []
    hook = retriever.model.base_model.register_forward_pre_hook(lambda module, args: passes.append(1))
    for query in QUERIES:
        retriever(query)
    hook.remove()
    return len(passes) / len(QUERIES)


def compare(systems: dict[str, ToolRetriever]) -> None:
    """Check that one pass in float32 finds what the baseline does."""
    from toolweaver_hf.retrieval import ToolRetriever

    slow, fast = systems[BASELINE], systems[ONE_PASS]
    exact = ToolRetriever(slow.model, slow.tokenizer, fast.text_expert)
    # One query at a time: the encoder rounds the embeddings of padded batches otherwise.
    for one, other in ((slow(query)[0], exact(query)[0]) for query in QUERIES):
        if any(abs(a.score - b.score) > 1e-2 for a, b in zip(one, other, strict=True)):
            raise ValueError(f"one pass scores differently from the baseline: {one} and {other}")


def time_calls(calls: dict[str, Callable[[int], object]], repeats: int) -> dict[str, np.ndarray]:
    """Let calls take turns; return the seconds of wall clock and of CPU of each, of shape `(2, repeats)`."""
    import numpy as np

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for i in range(-1, repeats):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call(i)
            if i >= 0:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: np.array(values).T for name, values in times.items()}


def measure(systems: dict[str, ToolRetriever], args: LatencyArguments) -> dict[str, dict[str, float]]:
    """Time single queries and batches of all systems."""
    import numpy as np

    compare(systems)
    batch = (QUERIES * args.batch_size)[: args.batch_size]
    single = time_calls(
        {name: lambda i, r=r: r(QUERIES[i % len(QUERIES)]) for name, r in systems.items()},
        args.repeats * len(QUERIES),
    )
    batched = time_calls(
        {name: lambda i, r=r: r(batch, batch_size=args.batch_size) for name, r in systems.items()},
        max(args.repeats // 2, 1),
    )
    return {
        name: {
            "p50_ms": 1000 * float(np.median(single[name][0])),
            "p99_ms": 1000 * float(np.quantile(single[name][0], 0.99)),
            "cpu_ms": 1000 * float(np.median(single[name][1])),
            "cpu_ratio": float(np.median(single[name][1] / single[BASELINE][1])),
            "batch_queries_per_s": args.batch_size / float(np.median(batched[name][0])),
            "batch_cpu_ratio": float(np.median(batched[name][1] / batched[BASELINE][1])),
            "passes": count_passes(retriever),
        }
        for name, retriever in systems.items()
    }


def main(args: LatencyArguments) -> dict[str, dict[str, dict]]:
    """Time everything, print tables and return the measures by catalog and threads, and system."""
    import torch

    from toolweaver_hf.evaluation.runs import save_tables, text_table
    from toolweaver_hf.tool_codes_file import TOOL_CODES_FILE

    aligned = os.path.exists(os.path.join(args.model, TOOL_CODES_FILE))
    results, tables = {}, []
    for num_tools in [None] if aligned else args.num_tools:
        if aligned:
            systems = aligned_systems(args.model, args.encoder)
        else:
            systems = base_systems(args.model, num_tools, args.encoder)
        for threads in args.num_threads:
            torch.set_num_threads(threads)
            title = f"{len(systems['search'].tool_ids):,} tools, {threads} thread{'s' * (threads > 1)}"
            results[title] = measure(systems, args)
            rows = [
                [
                    name,
                    *(f"{row[key]:.0f}" for key in ("p50_ms", "p99_ms", "cpu_ms")),
                    f"{row['cpu_ratio']:.2f}",
                    f"{row['passes']:.1f}",
                    f"{row['batch_queries_per_s']:.1f}",
                    f"{row['batch_cpu_ratio']:.2f}",
                ]
                for name, row in results[title].items()
            ]
            columns = ["system", "p50, ms", "p99, ms", "CPU, ms", "of the baseline", "passes"]
            columns += [f"queries/s in batches of {args.batch_size}", "batch: of the baseline"]
            tables.append({"title": title, "columns": columns, "rows": rows})
            print(f"\n{title}\n\n{text_table(columns, rows)}", flush=True)
    if args.output_dir:
        save_tables(args.output_dir, tables, asdict(args))
    return results


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, LatencyArguments))


if __name__ == "__main__":
    run_command(cli)
