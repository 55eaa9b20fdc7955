"""Evaluate tool retrieval by an aligned model, next to BM25 and a dense encoder.

```bash
python recipes/evaluate.py --model out/retrieval --queries my_test_queries.jsonl --output_dir out/evaluation
```

The model's whole catalog is ranked (multi-domain). `--in_domain` ranks only the tools that the queries need, `--corpus
tools.jsonl` only those of a file. Without `--model`, the baselines are measured alone, on the tools of `--corpus`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolweaver_hf.cli import parse_arguments, run_command


if TYPE_CHECKING:
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.data.queries import Query


TOP_K = 10


@dataclass
class EvaluationArguments:
    """What to evaluate.

    Args:
        queries (`list[str]`):
            Test queries, in any of the formats that [`~data.queries.load_queries`] reads: JSONL with `id`, `text`,
            `tools`, a BEIR queries file, ToolBench's instructions, rows of Seal-Tools or ToolRet. Each of several files is
            a group, named after the file.
        qrels (`str`, *optional*):
            The relevance file of BEIR queries.
        model (`str`, *optional*):
            Output folder of `recipes/sft.py`, or a Hub repository. Without it, the baselines are measured alone.
        corpus (`str`, *optional*):
            Catalog of the tools to rank, a subset of the model's catalog. Defaults to the model's whole catalog.
        in_domain (`bool`, *optional*, defaults to `False`):
            Whether to rank only the tools that the queries need.
        by_wording (`bool`, *optional*, defaults to `False`):
            Whether to report the queries by how vague they are: in the tools' own words, in others, or without any of
            them (see [`~evaluation.wording.group_by_wording`]), in place of the queries' own groups.
        encoder (`str`, *optional*):
            sentence-transformers model of the dense baseline. Defaults to the default encoder of catalogs.
        output_dir (`str`, *optional*):
            Folder for the run: measures, rankings in TREC's format, and `run.json`. Defaults to `evaluation` in the
            model's folder, from where `toolweaver push` takes the results into the model card.
        seed (`int`, *optional*, defaults to 0):
            Seed of the bootstrap.
    """

    queries: list[str] = field(metadata={"help": "Test queries (JSONL or JSON)."})
    qrels: str | None = field(default=None, metadata={"help": "Relevance file (TSV) of BEIR queries."})
    model: str | None = field(default=None, metadata={"help": "Folder of an aligned model."})
    corpus: str | None = field(default=None, metadata={"help": "Catalog of the tools to rank."})
    in_domain: bool = field(default=False, metadata={"help": "Rank only the tools that the queries need."})
    by_wording: bool = field(default=False, metadata={"help": "Report the queries by how vague they are."})
    encoder: str | None = field(default=None, metadata={"help": "sentence-transformers model of the dense baseline."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the run."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})

    def __post_init__(self):
        if self.model is None and self.corpus is None:
            raise ValueError("give --model, an aligned model, or --corpus, the tools that the baselines rank")


def load_test_queries(paths: Sequence[str], qrels: str | None = None) -> list[Query]:
    """Read one file of queries, or several as groups named after their files.

    Raises:
        `ValueError`: naming two files that would be one group, or the file and the line that is wrong.
    """
    from toolweaver_hf.data.queries import load_queries

    if len(paths) == 1:
        return load_queries(paths[0], qrels)
    files: dict[str, str] = {}
    for path in paths:
        group = Path(path).stem
        if group in files:
            raise ValueError(f"{files[group]} and {path} would both be the group {group!r}: rename one of the files")
        files[group] = path
    return [
        replace(query, id=f"{group}/{query.id}", group=query.group or group)
        for group, path in files.items()
        for query in load_queries(path, qrels)
    ]


def load_candidates(args: EvaluationArguments, queries: Sequence[Query]) -> ToolCatalog:
    """Return the tools to rank, as described in the model's catalog."""
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.evaluation.rankings import check_ground_truth

    if args.model is None:
        catalog = ToolCatalog.from_file(args.corpus)
    else:
        catalog = ToolCatalog.from_pretrained(args.model, repo_type="model")
    allowed = set(ToolCatalog.from_file(args.corpus).ids if args.corpus else catalog.ids)
    unknown = sorted(allowed.difference(catalog.ids))
    if unknown:
        raise ValueError(f"{args.corpus} has tools that the catalog of {args.model} lacks: {', '.join(unknown[:5])}")
    check_ground_truth(queries, allowed, args.corpus or f"the catalog of {args.model}")
    if args.in_domain:
        allowed &= {tool for query in queries for tool in query.tools}
    return ToolCatalog(tool for tool in catalog if tool.id in allowed)


def main(args: EvaluationArguments) -> dict[str, Any]:
    """Evaluate, print a table per group of queries, and return [`~evaluation.rankings.compare_rankings`]' result."""
    from toolweaver_hf.evaluation.baselines import BM25Retriever, DenseRetriever
    from toolweaver_hf.evaluation.rankings import compare_rankings
    from toolweaver_hf.evaluation.runs import save_run, tables
    from toolweaver_hf.evaluation.wording import group_by_wording
    from toolweaver_hf.hub.cards import EVALUATION_FOLDER
    from toolweaver_hf.retrieval import ToolRetriever
    from toolweaver_hf.text_expert import default_encoder, fast_dtype

    queries = load_test_queries(args.queries, args.qrels)
    candidates = load_candidates(args, queries)
    if args.by_wording:
        queries = group_by_wording(queries, candidates)
    texts = [query.text for query in queries]
    rankings = {}
    if args.model is not None:
        retriever = ToolRetriever.from_pretrained(args.model, dtype=fast_dtype())
        rankings["ToolWeaver"] = retriever(texts, top_k=TOP_K, allowed_tools=candidates.ids, show_progress_bar=True)
        if retriever.text_expert is not None and retriever.model is not None:
            alone = ToolRetriever(retriever.model, retriever.tokenizer)
            known = set(alone.tool_ids)
            coded = [tool_id for tool_id in candidates.ids if tool_id in known]
            rankings["codes alone"] = alone(texts, top_k=TOP_K, allowed_tools=coded, show_progress_bar=True)
    encoder = args.encoder or default_encoder()
    rankings["BM25"] = BM25Retriever(candidates)(texts, top_k=TOP_K)
    rankings["dense"] = DenseRetriever(candidates, encoder)(texts, top_k=TOP_K)
    rankings["search"] = ToolRetriever.from_catalog(candidates, encoder)(texts, top_k=TOP_K)

    name = ", ".join(Path(path).name for path in args.queries)
    output_dir = args.output_dir
    if output_dir is None and args.model is not None and os.path.isdir(args.model):
        output_dir = os.path.join(args.model, EVALUATION_FOLDER)
    if output_dir:
        metrics = save_run(output_dir, queries, rankings, candidates.ids, asdict(args), name, args.seed)
    else:
        metrics = {"queries": name, **compare_rankings(queries, rankings, args.seed)}
    print(f"\n{len(candidates):,} tools ranked\n\n{tables(metrics)}", end="")
    return metrics


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, EvaluationArguments))


if __name__ == "__main__":
    run_command(cli)
