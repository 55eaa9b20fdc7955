"""Rank the tools for held-out queries with an aligned model and with its rivals, and print their table.

```bash
python recipes/evaluate.py --model out/retrieval --queries my_test_queries.jsonl --output_dir out/evaluation
```
"""

import os
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from toolweaver_hf.baselines import BM25Retriever, DenseRetriever
from toolweaver_hf.cards import EVALUATION_FOLDER
from toolweaver_hf.catalog import ToolCatalog
from toolweaver_hf.cli import run
from toolweaver_hf.data import load_queries
from toolweaver_hf.embeddings import default_encoder
from toolweaver_hf.evaluation import METRICS_FILE, METRICS_VERSION, evaluate_rankings, markdown_table
from toolweaver_hf.json_files import write_json
from toolweaver_hf.retrieval import ToolRetriever


TOP_K = 10


@dataclass
class EvaluationArguments:
    """What to evaluate.

    Args:
        model (`str`):
            Folder of an aligned model, as `recipes/sft.py` writes it, or a repository of the Hub.
        queries (`str`):
            Test queries: JSONL with `id`, `text`, `tools`, or a BEIR queries file.
        qrels (`str`, *optional*):
            The relevance file of BEIR queries.
        encoder (`str`, *optional*):
            sentence-transformers model of the dense rival. Defaults to the encoder that the catalogue is embedded with.
        output_dir (`str`, *optional*):
            Folder for `metrics.json` and the rankings in TREC's run format. Defaults to `evaluation` in the model's
            folder, from where `toolweaver push` takes the results into the model's card.
    """

    model: str = field(metadata={"help": "Folder of an aligned model."})
    queries: str = field(metadata={"help": "Test queries (JSONL)."})
    qrels: str | None = field(default=None, metadata={"help": "Relevance file (TSV) of BEIR queries."})
    encoder: str | None = field(default=None, metadata={"help": "sentence-transformers model of the dense rival."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for metrics.json and the rankings."})


def main(args: EvaluationArguments) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluate, print a table for each group of queries, and return name -> group -> measure -> value."""
    queries = load_queries(args.queries, args.qrels)
    catalog = ToolCatalog.from_pretrained(args.model, repo_type="model")
    unknown = sorted({tool for query in queries for tool in query.tools if tool not in catalog})
    if unknown:
        raise ValueError(
            f"{args.queries} names tools that the catalogue of {args.model} lacks: {', '.join(unknown[:5])}"
        )
    retrievers = {
        "ToolWeaver": ToolRetriever.from_pretrained(args.model),
        "BM25": BM25Retriever(catalog),
        "dense": DenseRetriever(catalog, args.encoder or default_encoder()),
    }
    texts = [query.text for query in queries]
    rankings = {name: retriever(texts, top_k=TOP_K) for name, retriever in retrievers.items()}
    results = {name: evaluate_rankings(queries, ranking) for name, ranking in rankings.items()}

    for group in results["ToolWeaver"]:
        print(f"\n{group} ({results['ToolWeaver'][group]['queries']} queries), in percent\n")
        print(markdown_table(results, group))
    output_dir = args.output_dir
    if output_dir is None and os.path.isdir(args.model):
        output_dir = os.path.join(args.model, EVALUATION_FOLDER)
    if output_dir:
        os.makedirs(output_dir, exist_ok=True)
        metrics = {"queries": os.path.basename(args.queries), "results": results}
        write_json(os.path.join(output_dir, METRICS_FILE), metrics, METRICS_VERSION)
        for name, ranking in rankings.items():
            with open(os.path.join(output_dir, f"{name}.run"), "w", encoding="utf-8") as file:
                for query, tools in zip(queries, ranking, strict=True):
                    for rank, tool in enumerate(tools, start=1):
                        fields = (query.id, "Q0", tool.tool_id, rank, tool.score, name)
                        # TREC separates fields by spaces, so none may stand in an id.
                        print(*("_".join(str(field).split()) for field in fields), file=file)
    return results


def cli(argv: list[str] | None = None) -> None:
    main(*HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses(argv))


if __name__ == "__main__":
    run(cli)
