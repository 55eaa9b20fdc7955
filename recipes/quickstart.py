"""The whole method in one go: catalog, codes, alignment, evaluation and an agent, on a small model from scratch."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from toolweaver_hf.cli import parse_arguments, run_command
from toolweaver_hf.recipes import evaluate, sft, tokenize_tools


if TYPE_CHECKING:
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.data.queries import Query


SPLITS = ("train", "validation", "test")


@dataclass
class QuickstartArguments:
    """What to run the quick start on.

    Args:
        output_dir (`str`, *optional*, defaults to `"toolweaver-quickstart"`):
            Folder for everything that the run makes: `codes`, `base`, `retrieval` with its `evaluation`, `agent`.
        data (`str`, *optional*):
            Folder with `catalog.jsonl`, `queries.{train,validation,test}.jsonl` and
            `trajectories.{train,validation,test}.jsonl`. Defaults to the demo that comes with the package.
        base_model (`str`, *optional*):
            Id or path of a causal language model to align. Without it a small Llama is trained from scratch.
        encoder (`str`, *optional*):
            sentence-transformers model that embeds the tools' documents.
        seed (`int`, *optional*, defaults to 0):
            Seed of everything random.
    """

    output_dir: str = field(default="toolweaver-quickstart", metadata={"help": "Folder for everything made."})
    data: str | None = field(default=None, metadata={"help": "Folder with catalog, queries and trajectories."})
    base_model: str | None = field(default=None, metadata={"help": "Causal language model to align."})
    encoder: str | None = field(default=None, metadata={"help": "sentence-transformers model for the documents."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})


def load_data(folder: Path) -> tuple[ToolCatalog, dict[str, list[Query]], dict[str, list[dict]]]:
    """Read and check a data folder, so that a mistake in it shows before anything is written.

    Raises:
        `ValueError`: naming the file that is wrong, or the tool that the catalog lacks.
    """
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.data.queries import load_queries
    from toolweaver_hf.data.trajectories import load_trajectories

    catalog = ToolCatalog.from_file(folder / "catalog.jsonl")
    queries = {split: load_queries(folder / f"queries.{split}.jsonl") for split in SPLITS}
    trajectories = {split: load_trajectories(folder / f"trajectories.{split}.jsonl") for split in SPLITS}
    for split in SPLITS:
        calls = [
            (call["function"]["name"], f"trajectories.{split}.jsonl")
            for row in trajectories[split]
            for message in row["messages"]
            for call in message.get("tool_calls") or []
        ]
        needs = [(tool_id, f"queries.{split}.jsonl") for query in queries[split] for tool_id in query.tools]
        for tool_id, name in needs + calls:
            if tool_id not in catalog:
                raise ValueError(f"{folder / name} names the tool {tool_id!r}, which the catalog lacks")
    return catalog, queries, trajectories


def main(args: QuickstartArguments) -> None:
    """Run the quick start and print what it found."""
    from transformers import set_seed
    from trl import ModelConfig

    from toolweaver_hf.agent.loop import ToolAgent
    from toolweaver_hf.alignment.trainer import AlignmentTrainingArguments
    from toolweaver_hf.codes.report import inspect_codes
    from toolweaver_hf.codes.trainer import RQVAETrainingArguments
    from toolweaver_hf.data.trajectories import code_text
    from toolweaver_hf.demo import DEMO_FOLDER, demo_functions
    from toolweaver_hf.demo.small_llama import build_small_llama
    from toolweaver_hf.retrieval import ToolRetriever

    started = time.perf_counter()
    data, output = Path(args.data or DEMO_FOLDER), Path(args.output_dir)
    catalog, queries, trajectories = load_data(data)
    set_seed(args.seed)

    def step(title: str) -> None:
        print(f"\n[{time.perf_counter() - started:4.0f} s] {title}", flush=True)

    step(f"Learning codes for {len(catalog)} tools")
    codes_dir = output / "codes"
    tokenize_tools.main(
        tokenize_tools.TokenizationArguments(
            catalog=str(data / "catalog.jsonl"), queries=str(data / "queries.train.jsonl"), encoder=args.encoder
        ),
        RQVAETrainingArguments(output_dir=str(codes_dir), seed=args.seed),
    )
    picture = inspect_codes(codes_dir)

    base = args.base_model
    if base is None:
        base = str(output / "base")
        texts = catalog.documents + [query.text for query in queries["train"]]
        texts += [
            json.dumps(message, ensure_ascii=False) for row in trajectories["train"] for message in row["messages"]
        ]
        build_small_llama(texts, Path(base))

    step("Alignment: documents and queries to codes")
    shared = {
        "train_sampling_strategy": "group_by_length",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "adam_beta2": 0.98,
        "weight_decay": 0.1,
        "max_length": 512,
        "activation_checkpointing": False,
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
        "seed": args.seed,
    }
    scratch = args.base_model is None
    sft.main(
        sft.AlignmentArguments(
            codes_dir=str(codes_dir),
            stages=["memorization", "retrieval"],
            queries=str(data / "queries.train.jsonl"),
            augmentations=20 if scratch else 0,
        ),
        AlignmentTrainingArguments(
            output_dir=str(output / "retrieval"),
            learning_rate=1e-3 if scratch else 5e-4,
            num_train_epochs=2 if scratch else 3,
            per_device_train_batch_size=32,
            **shared,
        ),
        ModelConfig(model_name_or_path=base),
    )

    step("Alignment: whole trajectories")
    sft.main(
        sft.AlignmentArguments(
            codes_dir=str(codes_dir), stages=["trajectory"], trajectories=str(data / "trajectories.train.jsonl")
        ),
        AlignmentTrainingArguments(
            output_dir=str(output / "agent"),
            learning_rate=1e-3 if scratch else 2e-4,
            num_train_epochs=16 if scratch else 2,
            per_device_train_batch_size=8,
            **shared,
        ),
        ModelConfig(model_name_or_path=str(output / "retrieval")),
    )

    step("Evaluation on queries that were held out")
    evaluate.main(
        evaluate.EvaluationArguments(
            model=str(output / "retrieval"),
            queries=[str(data / "queries.test.jsonl")],
            encoder=args.encoder,
        )
    )

    step("Three queries and the tools retrieved for them")
    retriever = ToolRetriever.from_pretrained(output / "retrieval")
    examples = [query for query in queries["test"] if len(query.tools) == 1][:2]
    examples += [query for query in queries["test"] if len(query.tools) > 1][:1]
    for query, ranking in zip(examples, retriever([query.text for query in examples], top_k=3), strict=True):
        print(f"\n  {query.text}\n  needs: {', '.join(query.tools)}")
        for tool in ranking:
            print(f"  {tool.score:7.2f}  {tool.tool_id}")

    step("One run of the agent")
    agent = ToolAgent.from_pretrained(output / "agent", demo_functions(catalog))
    for message in agent.stream(trajectories["test"][0]["messages"][0]["content"]):
        print(f"\n  {message['role']}: {message['content']}")
        for call in message.get("tool_calls", []):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            code = code_text(name, agent.tokenizer)
            print(f"  {code} = {name} {json.dumps(arguments, ensure_ascii=False)}")
    if scratch:
        print("\n  (A model this small, from scratch, often errs. Give a real one with --base-model.)")

    step(f"Done. Everything is in {output}; the picture of the codes is {picture}")


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, QuickstartArguments))


if __name__ == "__main__":
    run_command(cli)
