"""Generate training queries for a catalog with a language model, and filter them by search.

```bash
toolweaver queries --catalog tools.jsonl --generator HuggingFaceTB/SmolLM2-135M-Instruct --output queries.train.jsonl
toolweaver queries --catalog tools.jsonl --generator http://localhost:8000/v1 --generator_model Qwen/Qwen3-8B
```

The prompt and seed of each query are stored in `source`, and its vagueness in `group`. A generator is reliable if nine
of ten of its queries follow the instructions, which a large model does and one of 135M parameters does not:
then search need not find the tools of a training query, and the guidance is fitted on the validation queries. The same
command continues an interrupted run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from toolweaver_hf.cli import parse_arguments, run_command


if TYPE_CHECKING:
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.synthesis.candidates import Generator


ROUND_TRIP = 5
RELIABLE_SHARE = 0.9
"""Share of what a reliable generator writes that passes the filters: 0.56 to 0.79 by SmolLM2-135M, 0.98 by a large model."""


@dataclass
class QueryArguments:
    """Arguments of the generation of queries.

    Args:
        catalog (`str`):
            The catalog, in any of the formats that [`ToolCatalog.from_file`] reads.
        generator (`str`):
            Id or path of an instruction-tuned causal language model, or the base URL of an OpenAI-compatible endpoint
            (without `/chat/completions`), whose key is read from the environment variable `OPENAI_API_KEY`.
        generator_model (`str`, *optional*):
            Name of the endpoint's model.
        output (`str`, *optional*, defaults to `"queries.train.jsonl"`):
            File for the training queries. Validation queries (`queries.validation.jsonl`), all generated queries
            (`queries.candidates.jsonl`) and the embeddings of the catalog's documents are written to the same folder.
        trajectories (`str`, *optional*):
            File for trajectories of the training queries: calls with schema-conforming arguments that occur in the
            query, the tools' results, and an answer. Not written by default.
        recordings (`str`, *optional*):
            Recorded results of tools for the trajectories (see [`SimulatedTools`]). Other results are simulated from
            the tool's output schema. Written trajectories keep the results they have: after a change of the
            recordings, delete the `candidates` file beside `trajectories`.
        per_tool (`int`, *optional*, defaults to 8):
            Number of queries to generate for each single tool.
        groups (`int`, *optional*):
            Number of pairs and triples of related tools, for each of which two queries are generated. Defaults to half
            the number of tools.
        round_trip (`int`, *optional*):
            Keep only training queries for which search ranks the tool among the top `round_trip`. 0 keeps all queries.
            Defaults to 0 for a reliable generator, and to 5 for others.
        validation_share (`float`, *optional*, defaults to 0.1):
            Fraction of the queries for validation; every tool keeps some for training.
        batch_size (`int`, *optional*, defaults to 32):
            Batch size of a local model.
        encoder (`str`, *optional*):
            sentence-transformers model of the search. Defaults to all-MiniLM-L6-v2.
        prices (`list[float]`, *optional*):
            The generator's price per million prompt tokens and per million completion tokens.
        seed (`int`, *optional*, defaults to 0):
            The random seed.
    """

    catalog: str = field(metadata={"help": "The catalog of tools (JSONL or JSON)."})
    generator: str = field(metadata={"help": "Causal language model, or URL of an OpenAI-compatible endpoint."})
    generator_model: str | None = field(default=None, metadata={"help": "Name of the endpoint's model."})
    output: str = field(default="queries.train.jsonl", metadata={"help": "File for the training queries."})
    trajectories: str | None = field(default=None, metadata={"help": "File for trajectories of the training queries."})
    recordings: str | None = field(default=None, metadata={"help": "Recorded results of tools (JSONL)."})
    per_tool: int = field(default=8, metadata={"help": "Number of queries to generate for each single tool."})
    groups: int | None = field(
        default=None, metadata={"help": "Number of pairs and triples of tools, with two queries each."}
    )
    round_trip: int | None = field(
        default=None, metadata={"help": "Keep queries whose tool is in the top N of a search."}
    )
    validation_share: float = field(default=0.1, metadata={"help": "Fraction of the queries for validation."})
    batch_size: int = field(default=32, metadata={"help": "Batch size of a local model."})
    encoder: str | None = field(default=None, metadata={"help": "sentence-transformers model of the search."})
    prices: list[float] | None = field(
        default=None, metadata={"help": "Price per million prompt tokens and per million completion tokens."}
    )
    seed: int = field(default=0, metadata={"help": "The random seed."})

    def __post_init__(self):
        if self.recordings and not self.trajectories:
            raise ValueError("--recordings are for --trajectories: name a file for them")
        if is_url(self.generator) and not self.generator_model:
            raise ValueError(f"--generator {self.generator} is an endpoint: name its model with --generator_model")
        if self.per_tool < 1:
            raise ValueError(f"--per_tool must be at least 1, not {self.per_tool}")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"--validation_share must be from 0 to below 1, not {self.validation_share}")
        if self.prices is not None and len(self.prices) != 2:
            raise ValueError("--prices needs two numbers: for prompt tokens and for completion tokens")


def is_url(generator: str) -> bool:
    return generator.startswith(("http://", "https://"))


def load_generator(args: QueryArguments) -> Generator:
    """Load the local model, or connect to the endpoint."""
    from toolweaver_hf.evaluation.chat_endpoint import ChatEndpoint
    from toolweaver_hf.synthesis.generators import EndpointGenerator, LocalGenerator

    if is_url(args.generator):
        return EndpointGenerator(ChatEndpoint(args.generator_model, args.generator, temperature=1.0))
    return LocalGenerator(args.generator, args.batch_size)


def output_files(output: str) -> dict[str, Path]:
    """Return the paths of the training queries, validation queries and candidates."""
    path = Path(output)
    stem = path.stem.removesuffix(".train")
    names = {"train": path.name, **{kind: f"{stem}.{kind}.jsonl" for kind in ("validation", "candidates")}}
    return {kind: path.with_name(name) for kind, name in names.items()}


def main(args: QueryArguments) -> dict[str, int]:
    """Generate the queries; print and return the numbers of generated, kept and dropped queries."""
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.files import write_text
    from toolweaver_hf.synthesis.candidates import query_requests, read_candidates, write_candidates
    from toolweaver_hf.synthesis.filters import filter_queries, json_lines, lead_back, split_by_tool
    from toolweaver_hf.synthesis.groups import tool_groups
    from toolweaver_hf.text_expert import TextExpert

    catalog = ToolCatalog.from_file(args.catalog)
    files = output_files(args.output)
    generator = load_generator(args)
    files["train"].parent.mkdir(parents=True, exist_ok=True)
    expert = TextExpert(catalog.ids, catalog.documents, args.encoder)
    expert.embed(files["train"].parent, show_progress_bar=True)
    num_groups = len(catalog) // 2 if args.groups is None else args.groups
    requests = query_requests(catalog, [(tool_id,) for tool_id in catalog.ids], args.per_tool, args.seed)
    groups = tool_groups(catalog, expert.embeddings, num_groups, args.seed)
    # Two queries each, because tools that share only a single query do not count as related.
    requests += query_requests(catalog, groups, 2, args.seed)

    write_candidates(files["candidates"], requests, generator, show_progress_bar=True)
    written = read_candidates(files["candidates"], requests, generator.name)
    kept, dropped = filter_queries(written, catalog, expert)
    reliable = len(kept) >= RELIABLE_SHARE * len(written)
    kept = [row | {"source": row["source"] | {"reliable": reliable}} for row in kept]
    round_trip = (0 if reliable else ROUND_TRIP) if args.round_trip is None else args.round_trip
    train, validation = split_by_tool(kept, args.validation_share, args.seed)
    # Validation queries have no round trip: on those that search finds, nothing could be better than search.
    if round_trip:
        found = lead_back(train, expert, round_trip)
        dropped += Counter({"round trip": len(train) - len(found)})
        train = found
    kept = train + validation
    if not train:
        raise ValueError(f"none of the {len(written)} queries in {files['candidates']} can be used: {dict(dropped)}")
    write_text(files["validation"], json_lines(validation))
    write_text(files["train"], json_lines(train))

    counts = {"written": len(written), "kept": len(kept), **dropped}
    print(f"{len(kept)} of {len(written)} queries kept" + "".join(f", {n} {why}" for why, n in dropped.items()))
    print(f"{len(train)} in {files['train']}, {len(validation)} in {files['validation']}")
    if not reliable:
        print(
            f"{args.generator} often breaks its instructions: its queries are trusted little. A larger model pays off"
        )
    without = set(catalog.ids).difference(tool_id for row in train for tool_id in row["tools"])
    if without:
        print(f"{len(without)} of {len(catalog)} tools have no query: {', '.join(sorted(without)[:5])} ...")
    if args.trajectories:
        counts["trajectories"] = add_trajectories(args, catalog, files["train"], generator)
    tokens = {"prompt tokens": generator.prompt_tokens, "completion tokens": generator.completion_tokens}
    print(", ".join(f"{count:,} {name}" for name, count in tokens.items()), end="")
    if args.prices is not None:
        cost = sum(price * count / 1e6 for price, count in zip(args.prices, tokens.values(), strict=True))
        print(f", cost {cost:.4f}", end="")
    print(" in this run")
    return counts


def add_trajectories(args: QueryArguments, catalog: ToolCatalog, queries: Path, generator: Generator) -> int:
    """Generate trajectories of the training queries; print and return the number of complete ones."""
    from toolweaver_hf.data.queries import load_queries
    from toolweaver_hf.evaluation.simulated_tools import SimulatedTools
    from toolweaver_hf.files import write_text
    from toolweaver_hf.synthesis.filters import json_lines
    from toolweaver_hf.synthesis.trajectories import write_trajectories

    train = load_queries(queries)
    tools = SimulatedTools(catalog, args.recordings, seed=args.seed)
    candidates = output_files(args.trajectories)["candidates"]
    candidates.parent.mkdir(parents=True, exist_ok=True)
    rows = write_trajectories(candidates, train, catalog, tools, generator, args.seed, show_progress_bar=True)
    write_text(args.trajectories, json_lines(rows))
    print(f"{len(rows)} of {len(train)} trajectories are whole: {args.trajectories}")
    return len(rows)


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, QueryArguments))


if __name__ == "__main__":
    run_command(cli)
