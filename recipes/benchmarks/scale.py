"""Measure how cost grows with the catalog, for codes and for atomic tokens (ToolGen), up to a million tools.

```bash
python recipes/benchmarks/scale.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir out/scale
```

The catalogs are synthetic: clustered embeddings, numbered names. Everything that depends on the size alone is run for
real: the new embeddings are allocated and searched, and an RQ-VAE whose codebooks are initialized from the embeddings
assigns the codes. Each size and method runs in its own process, to measure peak memory. Training is not measured.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from toolweaver_hf.cli import parse_arguments, run_command
from toolweaver_hf.recipes.tokenize_tools import default_codebook_sizes


if TYPE_CHECKING:
    import torch

    from toolweaver_hf.codes.tool_codes import ToolCodes


METHODS = ("codes", "atomic tokens")
PANELS = {  # label and scale
    "new_parameters": ("new parameters", "log"),
    "peak_gib": ("peak memory, GiB", "linear"),
    "query_ms": ("a query, ms", "linear"),
    "index_s": ("index, s", "log"),
}
QUERY = "Is it a good day for the park, or will it rain before the evening?"
EMBEDDING_DIM = 384
SAMPLE = 32_768  # tools that the codebooks are started on


@dataclass
class ScaleArguments:
    """What to measure.

    Args:
        model (`str`):
            The base model.
        num_tools (`list[int]`, *optional*):
            Sizes of catalog.
        repeats (`int`, *optional*, defaults to 10):
            Timed queries, of which the shortest counts.
        output_dir (`str`, *optional*):
            Folder for `benchmark_scale.json` and `benchmark_scale.png`.
    """

    model: str = field(metadata={"help": "The base model."})
    num_tools: list[int] = field(
        default_factory=lambda: [500, 5_000, 47_000, 200_000, 1_000_000], metadata={"help": "Sizes of catalog."}
    )
    repeats: int = field(default=10, metadata={"help": "Timed queries, of which the shortest counts."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the results and the picture."})


def synthetic_embeddings(num_tools: int) -> torch.Tensor:
    """Draw embeddings of tools, about sqrt(num_tools) to a cluster."""
    import torch

    generator = torch.Generator().manual_seed(0)
    clusters = torch.randn((math.isqrt(num_tools) + 1, EMBEDDING_DIM), generator=generator)
    embeddings = torch.empty((num_tools, EMBEDDING_DIM))
    for rows in embeddings.split(50_000):  # filled in place, without a second matrix of this size
        members = torch.randint(len(clusters), (len(rows),), generator=generator)
        rows.normal_(std=0.7, generator=generator).add_(clusters[members])
    return embeddings


def index_by_codes(num_tools: int) -> tuple[ToolCodes, list[torch.Tensor], float]:
    """Assign a code to each tool; return the codes, the codebooks and the seconds of encoding and assignment."""
    import torch

    from toolweaver_hf.codes.assignment import assign_codes
    from toolweaver_hf.codes.start import start_model
    from toolweaver_hf.codes.tool_codes import ToolCodes
    from toolweaver_hf.configuration_rqvae import RQVAEConfig
    from toolweaver_hf.modeling_rqvae import RQVAEModel

    embeddings, sizes = synthetic_embeddings(num_tools), default_codebook_sizes(num_tools)
    rqvae = RQVAEModel(RQVAEConfig(input_dim=EMBEDDING_DIM, codebook_sizes=sizes)).eval()
    sample = embeddings[:SAMPLE]
    rqvae.mean.copy_(sample.mean(0))
    rqvae.scale.copy_((sample - rqvae.mean).square().mean().sqrt())
    start_model(rqvae, sample, torch.Generator().manual_seed(0))
    start = time.perf_counter()
    with torch.inference_mode():
        latents = torch.cat([rqvae.encode(batch) for batch in embeddings.split(8192)])
        assigned = assign_codes(latents, rqvae.codebooks())
    seconds = time.perf_counter() - start
    return (
        ToolCodes(sizes, {f"tool {i}": code for i, code in enumerate(assigned.tolist())}),
        rqvae.codebooks(),
        seconds,
    )


def measure(model_name: str, num_tools: int, method: str, repeats: int) -> dict[str, float]:
    """Index a catalog by one method and retrieve from it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolweaver_hf.alignment.embedding_init import initialize_code_embeddings
    from toolweaver_hf.codes.tool_codes import ToolCodes
    from toolweaver_hf.retrieval import ToolRetriever
    from toolweaver_hf.tokenization_toolweaver import ToolWeaverTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    base = AutoTokenizer.from_pretrained(model_name)
    before, codebooks, seconds = model.num_parameters(), None, 0.0
    if method == "codes":
        codes, codebooks, seconds = index_by_codes(num_tools)
    else:
        codes = ToolCodes([num_tools], {f"tool {i}": [i] for i in range(num_tools)})
    start = time.perf_counter()
    tokenizer = ToolWeaverTokenizer.from_base(base, codes)
    init = "random" if codebooks is None else "codebook"
    initialize_code_embeddings(model, tokenizer, codebooks, init, pad_to_multiple_of=None)  # to count new rows alone
    retriever = ToolRetriever(model, tokenizer)
    seconds += time.perf_counter() - start

    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        retriever(QUERY, top_k=5)
        times.append(1000 * (time.perf_counter() - start))
    return {
        "new_parameters": model.num_parameters() - before,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "query_ms": min(times[2:]),
        "index_s": seconds,
    }


def new_rows(config, num_tools: int, method: str) -> dict[str, float]:
    """Count the tokens and parameters that a method adds to a model, and the memory to train them."""
    config = config.get_text_config()
    tokens = num_tools if method == "atomic tokens" else sum(default_codebook_sizes(num_tools))
    parameters = tokens * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    # A weight in fp32 with its gradient and Adam's two moments
    return {"new_tokens": tokens, "new_parameters": parameters, "training_mib": 16 * parameters / 2**20}


def missing_memory(row: dict[str, float], num_tools: int) -> float:
    """Return the GiB of memory that are missing. While embeddings are resized, old and new ones are in memory."""
    import psutil

    needed = 12 * row["new_parameters"] + 4096 * num_tools + 2 * 2**30  # and 4 KiB a tool for all else
    return (needed - psutil.virtual_memory().available) / 2**30


def draw(results: dict[str, dict[str, dict]], path: str) -> None:
    """Draw each measure by number of tools, a line for each method."""
    import matplotlib

    from toolweaver_hf.files import atomic_write

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for axes, (name, (label, scale)) in zip(panels.flat, PANELS.items(), strict=True):
        for method in METHODS:
            points = [(int(size), row[method][name]) for size, row in results.items() if name in row[method]]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=method)
        axes.set(xscale="log", yscale=scale, xlabel="tools", title=label)
        if scale == "linear":
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)


def main(args: ScaleArguments) -> dict[str, dict[str, dict]]:
    """Measure every size and method, print a table and return the measures by size and method."""
    from transformers import AutoConfig

    from toolweaver_hf.evaluation.runs import describe_run
    from toolweaver_hf.files import write_json

    config = AutoConfig.from_pretrained(args.model)
    results: dict[str, dict[str, dict]] = {}
    print(
        "| tools | method | new tokens | new parameters | trained by Adam, MiB | peak, GiB | a query, ms | index, s |"
    )
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for num_tools in args.num_tools:
        results[str(num_tools)] = {}
        for method in METHODS:
            row = results[str(num_tools)][method] = new_rows(config, num_tools, method)
            added = f"{row['new_tokens']:,} | {row['new_parameters']:,} | {row['training_mib']:,.0f}"
            missing = missing_memory(row, num_tools)
            if missing > 0:
                measured = f"not run: {missing:.1f} GiB of memory are missing"
            else:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    try:
                        row |= pool.submit(measure, args.model, num_tools, method, args.repeats).result()
                        measured = f"{row['peak_gib']:.2f} | {row['query_ms']:.0f} | {row['index_s']:.1f}"
                    except BrokenProcessPool:
                        measured = "its process was killed, for want of memory"
            print(f"| {num_tools:,} | {method} | {added} | {measured} |", flush=True)
    if args.output_dir:
        os.makedirs(args.output_dir, exist_ok=True)
        document = {**describe_run(asdict(args)), "results": results}
        write_json(os.path.join(args.output_dir, "benchmark_scale.json"), document, 1)
        draw(results, os.path.join(args.output_dir, "benchmark_scale.png"))
    return results


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, ScaleArguments))


if __name__ == "__main__":
    run_command(cli)
