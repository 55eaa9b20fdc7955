"""Fit the weights of guided decoding on held-out queries: how far to trust the model, its text expert's embeddings
and BM25.

```bash
toolweaver fit-guidance --model out/retrieval --queries queries.validation.jsonl
```

`recipes/sft.py` does so by itself where it has `--eval_queries`.
"""

from __future__ import annotations

import argparse
import os

from toolweaver_hf.cli import run_command


def main(model: str, queries: str, qrels: str | None = None, max_queries: int = 100, seed: int = 0) -> None:
    """Fit the weights of the text expert in a model's folder and save them there.

    Raises:
        `ValueError`: if the model is no local folder.
    """
    from toolweaver_hf.alignment.guidance import fit_guidance
    from toolweaver_hf.data.queries import load_queries
    from toolweaver_hf.retrieval import ToolRetriever
    from toolweaver_hf.text_expert import fast_dtype

    if not os.path.isdir(model):
        raise ValueError(f"--model {model} is no local folder to save the weights in: download a repository first")
    retriever = ToolRetriever.from_pretrained(model, dtype=fast_dtype())
    fitted = fit_guidance(retriever, load_queries(queries, qrels), max_queries, seed, show_progress_bar=True)
    retriever.text_expert.save_pretrained(model)
    print(", ".join(f"{name}: {value}" for name, value in fitted.items()))


def cli(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fit the weights of guided decoding on held-out queries.")
    parser.add_argument("--model", required=True, help="local folder of an aligned model, or of a text expert alone")
    parser.add_argument("--queries", required=True, help="held-out queries with their tools (JSONL)")
    parser.add_argument("--qrels", help="relevance file (TSV) of BEIR queries")
    parser.add_argument("--max_queries", type=int, default=100, help="how many of them to use")
    parser.add_argument("--seed", type=int, default=0, help="seed of their drawing")
    main(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run_command(cli)
