"""From a catalog to an aligned model in one command: queries, codes, alignment. Steps that are done are not done again.

```bash
toolweaver align --catalog tools.jsonl --base_model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir out
```

Without `--queries` the base model, or `--generator`, writes them. The same command goes on with a run that was cut off;
a step is done anew where what it is made from has changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolweaver_hf.cli import parse_arguments, run_command
from toolweaver_hf.recipes import queries, sft, tokenize_tools


STEPS_FILE = "align.json"
STEPS_VERSION = 1


@dataclass
class AlignArguments:
    """What to align with which catalog.

    Args:
        catalog (`str`):
            The catalog, in any of the formats that [`ToolCatalog.from_file`] reads.
        base_model (`str`):
            Id or path of the causal language model to align.
        output_dir (`str`, *optional*, defaults to `"toolweaver-model"`):
            Folder for everything: `queries`, `codes`, `model`, and `align.json`, which tells what is done.
        queries (`str`, *optional*):
            Training queries with their tools. Without them, queries are written.
        validation_queries (`str`, *optional*):
            Validation queries, which choose the epoch that is kept. Queries that are written bring their own.
        generator (`str`, *optional*):
            Who writes queries: a causal language model, or the URL of an endpoint. Defaults to the base model.
        generator_model (`str`, *optional*):
            Name of the model at an endpoint.
        per_tool (`int`, *optional*, defaults to 8):
            How many queries are written for each tool alone.
        encoder (`str`, *optional*):
            sentence-transformers model for the tools' documents. Defaults to all-MiniLM-L6-v2.
        num_train_epochs (`int`, *optional*, defaults to 3):
            Epochs of the alignment.
        learning_rate (`float`, *optional*, defaults to 5e-4):
            Its peak learning rate.
        batch_size (`int`, *optional*, defaults to 32):
            Queries in a step of it.
        seed (`int`, *optional*, defaults to 0):
            Seed of everything random.
    """

    catalog: str = field(metadata={"help": "The catalog of tools (JSONL or JSON)."})
    base_model: str = field(metadata={"help": "Causal language model to align."})
    output_dir: str = field(default="toolweaver-model", metadata={"help": "Folder for everything made."})
    queries: str | None = field(default=None, metadata={"help": "Training queries (JSONL); else they are written."})
    validation_queries: str | None = field(default=None, metadata={"help": "Validation queries (JSONL)."})
    generator: str | None = field(default=None, metadata={"help": "Model or endpoint that writes queries."})
    generator_model: str | None = field(default=None, metadata={"help": "Name of the model at an endpoint."})
    per_tool: int = field(default=8, metadata={"help": "Queries to write for each tool alone."})
    encoder: str | None = field(default=None, metadata={"help": "sentence-transformers model for the documents."})
    num_train_epochs: int = field(default=3, metadata={"help": "Epochs of the alignment."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of the alignment."})
    batch_size: int = field(default=32, metadata={"help": "Queries in a step of the alignment."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})

    def __post_init__(self):
        if self.validation_queries and not self.queries:
            raise ValueError("--validation_queries go with --queries: queries that are written bring their own")


class Steps:
    """What is done in a folder, and what it was made from.

    Args:
        folder (`Path`): The output folder, which holds a folder for each step.
    """

    def __init__(self, folder: Path):
        from toolweaver_hf.files import read_json

        self.folder, self.path = folder, folder / STEPS_FILE
        self.steps = read_json(self.path, STEPS_VERSION)["steps"] if self.path.exists() else {}

    def run(self, name: str, settings: dict[str, Any], files: list[Path], step: Callable[[], None]) -> None:
        """Do a step into the folder of its name, unless it is done with the same settings and files.

        A step that was begun with them goes on in its folder; what was made from others is deleted first.
        """
        contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        made_from = hashlib.sha256(json.dumps([settings, contents], sort_keys=True).encode()).hexdigest()[:16]
        found = self.steps.get(name, {})
        if found == {"made_from": made_from, "done": True}:
            print(f"{name}: done before, in {self.folder / name}")
            return
        if found and found["made_from"] != made_from:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self._record(name, made_from, done=False)
        step()
        self._record(name, made_from, done=True)

    def _record(self, name: str, made_from: str, done: bool) -> None:
        from toolweaver_hf.files import write_json

        self.folder.mkdir(parents=True, exist_ok=True)
        self.steps[name] = {"made_from": made_from, "done": done}
        write_json(self.path, {"steps": self.steps}, STEPS_VERSION)


def main(args: AlignArguments) -> None:
    """Do what is not done yet, and say how to go on."""
    from toolweaver_hf.data.catalog import ToolCatalog
    from toolweaver_hf.data.queries import load_queries

    output = Path(args.output_dir)
    catalog = ToolCatalog.from_file(args.catalog)  # a mistake shows before anything is written
    train, validation = args.queries, args.validation_queries
    for path in filter(None, (train, validation)):
        unknown = {tool_id for query in load_queries(path) for tool_id in query.tools}.difference(catalog.ids)
        if unknown:
            raise ValueError(f"{path} names the tool {min(unknown)!r}, which {args.catalog} lacks")
    steps = Steps(output)
    if train is None:
        files = queries.output_files(str(output / "queries" / "queries.train.jsonl"))
        writing = queries.QueryArguments(
            catalog=args.catalog,
            generator=args.generator or args.base_model,
            generator_model=args.generator_model,
            output=str(files["train"]),
            per_tool=args.per_tool,
            encoder=args.encoder,
            seed=args.seed,
        )
        steps.run("queries", _settings(writing), [Path(args.catalog)], lambda: queries.main(writing))
        train, validation = str(files["train"]), str(files["validation"])
        if not files["validation"].read_text(encoding="utf-8"):
            validation = None  # too few queries to spare any
    learned_from = [Path(path) for path in (args.catalog, train, validation) if path]
    settings = {"encoder": args.encoder, "seed": args.seed}
    steps.run("codes", settings, learned_from, lambda: _learn_codes(args, output / "codes", train))
    settings |= {"base_model": args.base_model, "learning_rate": args.learning_rate, "batch_size": args.batch_size}
    settings |= {"num_train_epochs": args.num_train_epochs}
    learned_from.append(output / "codes" / "tool_codes.json")
    steps.run("model", settings, learned_from, lambda: _align(args, output, train, validation))
    print(f"""
The aligned model is in {output / "model"}:

    from toolweaver_hf import ToolRetriever
    retriever = ToolRetriever.from_pretrained("{output / "model"}")

Measure it with queries of people: toolweaver evaluate --model {output / "model"} --queries my_queries.jsonl""")


def _settings(arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name not in ("catalog", "output")}


def _learn_codes(args: AlignArguments, folder: Path, train: str) -> None:
    from toolweaver_hf.codes.trainer import RQVAETrainingArguments

    tokenize_tools.main(
        tokenize_tools.TokenizationArguments(catalog=args.catalog, queries=train, encoder=args.encoder),
        RQVAETrainingArguments(output_dir=str(folder), seed=args.seed),
    )


def _align(args: AlignArguments, output: Path, train: str, validation: str | None) -> None:
    from trl import ModelConfig

    from toolweaver_hf.alignment.trainer import AlignmentTrainingArguments

    choose_best = {"eval_strategy": "epoch", "load_best_model_at_end": True} if validation else {}
    sft.main(
        sft.AlignmentArguments(
            codes_dir=str(output / "codes"),
            stages=["memorization", "retrieval"],
            queries=train,
            eval_queries=validation,
            text_encoder=args.encoder,
        ),
        AlignmentTrainingArguments(
            output_dir=str(output / "model"),
            learning_rate=args.learning_rate,
            num_train_epochs=args.num_train_epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            train_sampling_strategy="group_by_length",
            activation_checkpointing=False,
            max_length=1024,
            save_strategy="epoch",
            save_total_limit=1,
            resume_from_checkpoint="last",
            report_to="none",
            seed=args.seed,
            **choose_best,
        ),
        ModelConfig(model_name_or_path=args.base_model),
    )
    for checkpoint in (output / "model").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # what was to be gone on with is done


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, AlignArguments))


if __name__ == "__main__":
    run_command(cli)
