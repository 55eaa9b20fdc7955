"""Structured tokenization: give every tool of a catalog a hierarchical code (ToolWeaver, section 3.1).

```bash
python recipes/tokenize_tools.py --catalog tools.jsonl --queries queries.train.jsonl --output_dir out/codes
```

The folder then holds the RQ-VAE (`config.json`, `model.safetensors`), the codes (`tool_codes.json`), the catalog, its
embeddings and `metrics.json`.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from toolweaver_hf.cli import parse_arguments, run_command


if TYPE_CHECKING:
    from toolweaver_hf.codes.trainer import RQVAETrainingArguments


@dataclass
class TokenizationArguments:
    """What to tokenize.

    Args:
        catalog (`str`):
            The catalog, in any of the formats that [`ToolCatalog.from_file`] reads: JSONL, function schemas, MCP's
            tools/list, OpenAPI, ToolBench, a BEIR corpus.
        queries (`str`, *optional*):
            Queries with their tools, for the co-usage graph.
        qrels (`str`, *optional*):
            The relevance file of BEIR queries.
        encoder (`str`, *optional*):
            sentence-transformers model for the tools' documents. Defaults to all-MiniLM-L6-v2.
        codebook_sizes (`list[int]`, *optional*):
            Number of codes of each level. Defaults to two levels of the next power of two above
            4 * sqrt(number of tools).
        collaborative_weight (`float`, *optional*, defaults to 1.0):
            Weight of the collaborative loss.
        min_cousage (`int`, *optional*, defaults to 2):
            Number of queries that two tools must share to count as used together. With 1, as in the paper, and few
            queries, chance pairs count as well.
        codebook_update (`str`, *optional*, defaults to `"gradient"`):
            How the codebooks are trained: `"gradient"`, or `"ema"` for exponential moving averages.
        held_out_edges (`float`, *optional*, defaults to 0.0):
            Share of the co-used pairs of tools to hold out, to measure how many of them share their first code.
    """

    catalog: str = field(metadata={"help": "The catalog of tools (JSONL or JSON)."})
    queries: str | None = field(default=None, metadata={"help": "Queries with their tools (JSONL)."})
    qrels: str | None = field(default=None, metadata={"help": "Relevance file (TSV) of BEIR queries."})
    encoder: str | None = field(default=None, metadata={"help": "sentence-transformers model."})
    codebook_sizes: list[int] | None = field(default=None, metadata={"help": "Codes of each level."})
    collaborative_weight: float = field(default=1.0, metadata={"help": "Weight of the collaborative loss."})
    min_cousage: int = field(default=2, metadata={"help": "Queries that two tools must share to count as co-used."})
    codebook_update: str = field(default="gradient", metadata={"help": "How codebooks are trained: gradient or ema."})
    held_out_edges: float = field(default=0.0, metadata={"help": "Share of co-used pairs to hold out."})


def default_codebook_sizes(num_tools: int) -> list[int]:
    """Two levels of the next power of two above 4 * sqrt(num_tools): ample codes, few tools per prefix."""
    return [2 ** math.ceil(math.log2(4 * math.sqrt(num_tools)))] * 2


def default_steps(num_tools: int) -> int:
    """The number of tools, clipped to 600 and 3000: longer training makes the codes of few tools worse."""
    return min(max(num_tools, 600), 3000)


def main(args: TokenizationArguments, training_args: RQVAETrainingArguments) -> dict:
    """Tokenize a catalog into `training_args.output_dir`; print and return the metrics."""
    from transformers import set_seed

    from toolweaver_hf.codes.assignment import check_capacity
    from toolweaver_hf.codes.cousage import cousage_graph, hold_out_edges
    from toolweaver_hf.codes.embeddings import embed_catalog
    from toolweaver_hf.codes.measures import CODES_METRICS_VERSION, METRICS_FILE, measure_codes
    from toolweaver_hf.codes.tool_codes import ToolCodes
    from toolweaver_hf.codes.trainer import CodesEarlyStoppingCallback, RQVAETrainer
    from toolweaver_hf.configuration_rqvae import RQVAEConfig
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.data.queries import load_queries
    from toolweaver_hf.files import write_json
    from toolweaver_hf.hub.artifacts import pop_push_arguments, push_folder
    from toolweaver_hf.modeling_rqvae import RQVAEModel

    set_seed(training_args.seed)
    output_dir = training_args.output_dir
    catalog = ToolCatalog.from_file(args.catalog)
    codebook_sizes = args.codebook_sizes or default_codebook_sizes(len(catalog))
    check_capacity(len(catalog), codebook_sizes)
    if training_args.max_steps < 0:
        training_args.max_steps = default_steps(len(catalog))
    uses = [] if args.queries is None else [query.tools for query in load_queries(args.queries, args.qrels)]
    graph = cousage_graph(catalog, uses, args.min_cousage)
    if uses and not graph.nnz and training_args.process_index == 0:
        print(f"no two tools share {args.min_cousage} queries: the codes follow the documents alone")
    cousage, held_out = hold_out_edges(graph, args.held_out_edges, training_args.seed)

    # Tools to vectors, vectors to codes
    with training_args.main_process_first(local=False):
        embeddings = embed_catalog(catalog, args.encoder, cache_dir=output_dir)
    config = RQVAEConfig(
        input_dim=embeddings.shape[1],
        codebook_sizes=codebook_sizes,
        collaborative_weight=args.collaborative_weight,
        codebook_update=args.codebook_update,
    )
    push_arguments = pop_push_arguments(training_args)
    trainer = RQVAETrainer(RQVAEModel(config), training_args, embeddings, cousage)
    if training_args.early_stopping_patience is not None:
        trainer.add_callback(CodesEarlyStoppingCallback(training_args.early_stopping_patience))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if not trainer.is_world_process_zero():
        return {}

    # The codes and their measures
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    assigned = trainer.codes.cpu().numpy()
    codes = ToolCodes(
        codebook_sizes,
        dict(zip(catalog.ids, assigned.tolist(), strict=True)),
        checksums={tool.id: tool.checksum for tool in catalog},
    )

    metrics = measure_codes(model, trainer.embeddings, assigned, cousage, held_out)
    metrics["history"] = [entry for entry in trainer.state.log_history if "reconstruction_loss" in entry]
    model.save_pretrained(output_dir)
    codes.save_pretrained(output_dir)
    catalog.save_pretrained(output_dir)
    write_json(os.path.join(output_dir, METRICS_FILE), metrics, CODES_METRICS_VERSION)
    for checkpoint in Path(output_dir).glob("checkpoint-*"):  # they were for a resume, and hold pickles
        shutil.rmtree(checkpoint)
    print_metrics(metrics)
    print(f"Codes saved in {output_dir}")
    if push_arguments:
        push_folder(output_dir, **push_arguments)
    return metrics


def print_metrics(metrics: dict) -> None:
    """Print a summary of the measures of codes."""
    print(f"reconstruction loss      {metrics['reconstruction_loss']:.4f} of the embeddings' variance")
    for level in metrics["levels"]:
        print(
            f"level {level['level']}                  {level['used']} of {level['codes']} codes used, perplexity "
            f"{level['perplexity']:.1f}"
        )
    print(
        f"collisions               {metrics['collisions_before'] / metrics['tools']:.1%} of the tools at the nearest codes, "
        f"{metrics['collisions_uniform'] / metrics['tools']:.1%} by the uniform mapping, "
        f"{metrics['collisions']} after the assignment"
    )
    for name, pairs in (("co-used pairs", metrics["cousage"]), ("pairs held out", metrics["held_out"])):
        if pairs:
            print(
                f"{name:<25}{pairs['same_first_code']:.1%} of {pairs['pairs']} share their first code, against "
                f"{pairs['chance']:.1%} by chance"
            )


def training_arguments() -> tuple[type, ...]:
    """Import the dataclass of the arguments beside the recipe's own."""
    from toolweaver_hf.codes.trainer import RQVAETrainingArguments

    return (RQVAETrainingArguments,)


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, TokenizationArguments, training_arguments))


if __name__ == "__main__":
    run_command(cli)
