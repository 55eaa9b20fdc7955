"""Measure the cost of structured tokenization, next to a dense implementation of the same losses.

```bash
python recipes/benchmarks/tokenization.py --num_tools 5000 47000 200000 --output_dir out/benchmark
python recipes/benchmarks/tokenization.py --catalog tools.jsonl --queries queries.jsonl --steps 300 --output_dir out/real
```

The baseline holds the similarity of all tools as a dense matrix, compares all pairs of a batch at every level,
initializes its codebooks by k-means on the first batch, and resolves collisions group by group with Sinkhorn-Knopp.
Model, embeddings, edges and batches are the same; its learning rate is 1e-3. Each run has its own process, whose peak
memory is reported.

Without a catalog the tools are synthetic, and steps are timed after the first two. The time of a whole fit is
extrapolated from the time of a step and of an assignment: the recipe assigns once at the start and `ASSIGNMENTS` times
later, the baseline once. With a catalog, both are trained for the given number of steps, and their codes are measured
with a fifth of the co-used pairs held out.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING

from toolweaver_hf.cli import parse_arguments, run_command
from toolweaver_hf.recipes.tokenize_tools import default_steps


if TYPE_CHECKING:
    import numpy as np
    import scipy.sparse
    import torch

    from toolweaver_hf.modeling_rqvae import RQVAEModel


@dataclass
class BenchmarkArguments:
    """What to measure."""

    num_tools: list[int] = field(default_factory=lambda: [5000, 47000, 200000], metadata={"help": "Synthetic sizes."})
    edges_per_tool: int = field(default=6, metadata={"help": "Co-used tools drawn for each tool."})
    codebook_size: int = field(default=1024, metadata={"help": "Codes on each of two levels."})
    catalog: str | None = field(default=None, metadata={"help": "A catalog in place of synthetic tools."})
    queries: str | None = field(default=None, metadata={"help": "Queries with its tools."})
    qrels: str | None = field(default=None, metadata={"help": "Relevance file (TSV) of BEIR queries."})
    encoder: str | None = field(default=None, metadata={"help": "sentence-transformers model."})
    steps: int = field(default=10, metadata={"help": "Timed steps of the fit; with a catalog all its steps."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for benchmark_tokenization.json."})


def synthetic_tools(num_tools: int, edges_per_tool: int) -> tuple[torch.Tensor, scipy.sparse.csr_array, None]:
    """Draw embeddings in clusters of about twenty tools, and edges, half of them within a cluster."""
    import numpy as np
    import scipy.sparse
    import torch

    generator = np.random.default_rng(0)
    groups = generator.integers(0, max(1, num_tools // 20), num_tools)
    centers = generator.standard_normal((groups.max() + 1, 384), dtype=np.float32)
    embeddings = centers[groups]
    embeddings += 0.5 * generator.standard_normal(embeddings.shape, dtype=np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    order = np.argsort(groups, kind="stable")
    place = np.argsort(order)
    tool = np.repeat(np.arange(num_tools), edges_per_tool)
    near = order[np.minimum(place[tool] + generator.integers(1, 10, len(tool)), num_tools - 1)]
    other = np.where(generator.random(len(tool)) < 0.5, near, generator.integers(0, num_tools, len(tool)))
    kept = tool != other
    edges = (np.ones(kept.sum(), dtype=np.float32), (tool[kept], other[kept]))
    graph = scipy.sparse.csr_array(scipy.sparse.coo_array(edges, shape=(num_tools, num_tools)))
    return torch.from_numpy(embeddings), scipy.sparse.csr_array(graph.maximum(graph.T)), None


def real_tools(args: BenchmarkArguments, folder: str) -> tuple[torch.Tensor, scipy.sparse.csr_array, np.ndarray]:
    """Return a catalog's embeddings, the graph of four fifths of its co-used pairs, and the held-out fifth."""
    import torch

    from toolweaver_hf.codes.cousage import cousage_graph, hold_out_edges
    from toolweaver_hf.codes.embeddings import embed_catalog
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.data.queries import load_queries

    catalog = ToolCatalog.from_file(args.catalog)
    uses = [] if args.queries is None else [query.tools for query in load_queries(args.queries, args.qrels)]
    graph, held_out = hold_out_edges(cousage_graph(catalog, uses), 0.2)
    return torch.from_numpy(embed_catalog(catalog, args.encoder, cache_dir=folder)), graph, held_out


def fit_sparse(
    model: RQVAEModel, embeddings: torch.Tensor, graph: scipy.sparse.csr_array, steps: int, whole: bool
) -> tuple[dict, np.ndarray]:
    """Train and assign with `RQVAETrainer`, as the recipe does."""
    import numpy as np
    from transformers import TrainerCallback

    from toolweaver_hf.codes.trainer import ASSIGNMENTS, RQVAETrainer, RQVAETrainingArguments

    times: list[float] = []

    class Clock(TrainerCallback):
        """Takes the time of each step, and ends the training after the last one to time."""

        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter())
            control.should_training_stop = len(times) == (steps if whole else steps + 2)

    with tempfile.TemporaryDirectory() as folder:
        args = RQVAETrainingArguments(output_dir=folder, logging_strategy="no", disable_tqdm=True, use_cpu=True)
        args.max_steps = steps if whole else default_steps(len(embeddings))
        trainer = RQVAETrainer(model, args, embeddings, graph, callbacks=[Clock()])
        start = time.perf_counter()
        trainer.train()
        fit = time.perf_counter() - start
        codes = trainer.codes.numpy()
        start = time.perf_counter()
        trainer.assign()
        assignment = time.perf_counter() - start
    step = float(np.median(np.diff(times[1:])))
    fit = fit if whole else args.max_steps * step + (ASSIGNMENTS + 1) * assignment
    return {"step": step, "assignment": assignment, "fit": fit}, codes


def fit_dense(
    model: RQVAEModel, embeddings: torch.Tensor, graph: scipy.sparse.csr_array, steps: int, whole: bool
) -> tuple[dict, np.ndarray]:
    """Train with a dense similarity matrix and all pairs of a batch; resolve collisions group by group."""
    import numpy as np
    import torch
    from torch.nn.functional import mse_loss

    from toolweaver_hf.codes.start import start_model
    from toolweaver_hf.modeling_rqvae import uniform_mapping

    began = time.perf_counter()
    similarity = torch.from_numpy(graph.todense())
    model.mean.copy_(embeddings.mean(0))
    model.scale.copy_((embeddings - model.mean).square().mean().sqrt())
    start_model(model, embeddings[:1024])  # of the first batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    times = []
    for _ in range(steps if whole else steps + 2):
        batch = torch.randperm(len(embeddings))[:1024]
        latents = model.encode(embeddings[batch])
        _, residuals, vectors = model.quantizer(latents, uniform=True)
        quantized = torch.zeros_like(latents)
        loss = 0.0
        for residual, vector in zip(residuals, vectors, strict=True):
            loss = loss + mse_loss(vector, residual.detach()) + 0.25 * mse_loss(residual, vector.detach())
            quantized = quantized + residual + (vector - residual).detach()
            apart = (quantized[:, None] - quantized[None]).square().sum(-1)
            loss = loss + (similarity[batch][:, batch] * apart).sum() / len(batch)
        reconstruction = model.decode(latents + (sum(vectors) - latents).detach())
        loss = loss + mse_loss(reconstruction, embeddings[batch]) / model.scale.square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter())

    model.eval()
    start = time.perf_counter()
    with torch.no_grad():
        latents = torch.cat([model.encode(rows) for rows in embeddings.split(8192)])
        codes = torch.cat([model.quantize(rows) for rows in latents.split(8192)]).numpy()
        for _ in range(20):
            groups: dict[tuple[int, ...], list[int]] = {}
            for tool, code in enumerate(codes.tolist()):
                groups.setdefault(tuple(code), []).append(tool)
            crowded = [tools for tools in groups.values() if len(tools) > 1]
            for tools in crowded:
                residual = latents[tools] - model.codebooks()[0][codes[tools, 0]]
                codes[tools, 1] = uniform_mapping(model.quantizer.codebooks[1].distances(residual)).argmax(1)
            if not crowded:
                break
    step, assignment = float(np.median(np.diff(times[1:]))), time.perf_counter() - start
    fit = time.perf_counter() - began if whole else default_steps(len(embeddings)) * step + assignment
    return {"step": step, "assignment": assignment, "fit": fit}, codes


def measure(way: str, load: Callable[[], tuple], args: BenchmarkArguments) -> dict:
    """Fit and assign in this process; return seconds, the peak memory in GiB, and with a catalog the codes' measures."""
    import numpy as np
    import torch
    from transformers import set_seed

    from toolweaver_hf.codes.measures import measure_codes
    from toolweaver_hf.configuration_rqvae import RQVAEConfig
    from toolweaver_hf.modeling_rqvae import RQVAEModel

    torch.set_num_threads(args.threads)
    set_seed(0)
    embeddings, graph, held_out = load()
    model = RQVAEModel(RQVAEConfig(input_dim=embeddings.shape[1], codebook_sizes=[args.codebook_size] * 2))
    fit = fit_sparse if way == "sparse" else fit_dense
    result, codes = fit(model, embeddings, graph, args.steps, args.catalog is not None)
    result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    result["unique"] = len(np.unique(codes, axis=0)) == len(codes)
    return result if args.catalog is None else result | measure_codes(model.eval(), embeddings, codes, graph, held_out)


def main(args: BenchmarkArguments) -> dict[str, dict]:
    """Measure both ways for every size or for the catalog, print tables and return the measures by size and way."""
    results = {}
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        if args.catalog is None:
            loads = {size: partial(synthetic_tools, size, args.edges_per_tool) for size in args.num_tools}
        else:
            load = partial(real_tools, args, args.output_dir or folder)
            loads = {len(load()[0]): load}  # the embeddings are then in the folder, for the processes to come
        print("| tools | way | ms a step | times | assignment, s | times | whole fit, min | times | GiB | times |")
        print("|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        for num_tools, load in loads.items():
            ours = None
            for way in ("sparse", "dense"):
                needed = 4 * num_tools**2 / (1 << 30)
                available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
                if way == "dense" and needed > 0.7 * available:
                    print(
                        f"| {num_tools} | dense | | | | | | | {needed:.0f} for the matrix alone: not run | |",
                        flush=True,
                    )
                    continue
                with context.Pool(1) as pool:
                    result = results[f"{num_tools}, {way}"] = pool.apply(measure, (way, load, args))
                ours = ours or result
                cells = [f"{num_tools}", way, f"{1000 * result['step']:.0f}", f"{result['step'] / ours['step']:.1f}"]
                cells += [f"{result['assignment']:.1f}", f"{result['assignment'] / ours['assignment']:.1f}"]
                cells += [f"{result['fit'] / 60:.1f}", f"{result['fit'] / ours['fit']:.1f}"]
                cells += [f"{result['memory']:.2f}", f"{result['memory'] / ours['memory']:.1f}"]
                print(f"| {' | '.join(cells)} |", flush=True)
    if args.catalog is not None:
        print_codes(results)
    if args.output_dir:
        os.makedirs(args.output_dir, exist_ok=True)
        with open(os.path.join(args.output_dir, "benchmark_tokenization.json"), "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
    return results


def print_codes(results: dict[str, dict]) -> None:
    """Print a table of the measures of a catalog's codes."""
    print()
    print(
        "| tools, way | reconstruction loss | codes used | collisions, nearest codes | in the end | held-out pairs with the "
        "same first code | by chance |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, result in results.items():
        cells = [name, f"{result['reconstruction_loss']:.3f}"]
        cells += [f"{min(level['used'] / level['codes'] for level in result['levels']):.0%}"]
        cells += [f"{result[when] / result['tools']:.1%}" for when in ("collisions_before", "collisions")]
        held_out = result["held_out"]
        cells += [f"{held_out[share]:.1%}" if held_out else "" for share in ("same_first_code", "chance")]
        print(f"| {' | '.join(cells)} |")


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, BenchmarkArguments))


if __name__ == "__main__":
    run_command(cli)
