"""What a training step costs: plain TRL, rows of their own, and rows side by side that share what they begin with.

```bash
python recipes/benchmarks/training.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir out/training
```

All systems take turns at the same batches of the demo's queries or trajectories, with codes of random embeddings. Tokens
are those of the rows, however many of them a system computes.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from toolweaver_hf.cli import parse_arguments, run_command


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from trl import SFTTrainer

    from toolweaver_hf.tokenization_toolweaver import ToolWeaverTokenizer


TRL, APART, PACKED = "TRL's SFTTrainer", "rows of their own", "rows side by side"


@dataclass
class TrainingBenchmarkArguments:
    """What to time.

    Args:
        model (`str`):
            A base model.
        batch_size (`int`, *optional*, defaults to 16):
            Rows in a batch.
        steps (`int`, *optional*, defaults to 6):
            Batches of each kind of rows, drawn over all lengths.
        num_threads (`int`, *optional*, defaults to 1):
            Threads to compute with.
        output_dir (`str`, *optional*):
            Folder for `run.json` and `metrics.json`.
    """

    model: str = field(metadata={"help": "A base model."})
    batch_size: int = field(default=16, metadata={"help": "Rows in a batch."})
    steps: int = field(default=6, metadata={"help": "Batches of each kind of rows."})
    num_threads: int = field(default=1, metadata={"help": "Threads to compute with."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for run.json and metrics.json."})


def load_rows(tokenizer: ToolWeaverTokenizer) -> dict[str, tuple[Dataset, Dataset]]:
    """Return the demo's rows by kind: one answer a row, and answers of one prompt together."""
    from toolweaver_hf.alignment.rows import retrieval_rows, share_prompts, tokenize_rows, trajectory_rows
    from toolweaver_hf.data.queries import load_queries
    from toolweaver_hf.data.trajectories import load_trajectories
    from toolweaver_hf.demo import DEMO_FOLDER

    queries = retrieval_rows(load_queries(DEMO_FOLDER / "queries.train.jsonl"), tokenizer)
    queries, _ = tokenize_rows(queries, tokenizer)
    trajectories = trajectory_rows(load_trajectories(DEMO_FOLDER / "trajectories.train.jsonl"), tokenizer)
    trajectories, _ = tokenize_rows(trajectories, tokenizer)
    return {"queries": (queries, share_prompts(queries)), "trajectories": (trajectories, trajectories)}


def make_trainers(args: TrainingBenchmarkArguments, folder: str) -> tuple[dict[str, SFTTrainer], dict]:
    """Set up a trainer for each system, all of one model, and load the rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from toolweaver_hf.alignment.embedding_init import initialize_code_embeddings
    from toolweaver_hf.alignment.trainer import AlignmentTrainer, AlignmentTrainingArguments
    from toolweaver_hf.data.catalog import CATALOG_FILE, ToolCatalog
    from toolweaver_hf.demo import DEMO_FOLDER
    from toolweaver_hf.evaluation.baselines import random_codes
    from toolweaver_hf.tokenization_toolweaver import ToolWeaverTokenizer

    codes = random_codes(ToolCatalog.from_file(DEMO_FOLDER / CATALOG_FILE), [64, 64])
    tokenizer = ToolWeaverTokenizer.from_base(AutoTokenizer.from_pretrained(args.model), codes)
    rows = load_rows(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    initialize_code_embeddings(model, tokenizer, None, method="random")
    shared = {"output_dir": folder, "bf16": False, "max_length": None, "report_to": "none"}
    plain = SFTConfig(**shared, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True})
    ours = AlignmentTrainingArguments(**shared, activation_checkpointing=False)
    settings = {"train_dataset": rows["queries"][0], "processing_class": tokenizer}
    trainers = {
        TRL: SFTTrainer(model, plain, **settings),
        APART: AlignmentTrainer(model, ours, **settings),
        PACKED: AlignmentTrainer(model, ours, **settings),
    }
    trainers[APART].train_collator = trainers[APART].data_collator
    return trainers, rows


def time_batch(trainer: SFTTrainer, examples: list[dict], dtype: torch.dtype) -> tuple[float, int]:
    """Return the CPU seconds of loss and gradient of a batch, and how many tokens were computed."""
    import torch

    collator = getattr(trainer, "train_collator", trainer.data_collator)
    batch = trainer._prepare_inputs(collator([dict(example) for example in examples]))
    computed, started = batch["input_ids"].numel(), time.process_time()
    with torch.autocast(trainer.model.device.type, dtype, enabled=dtype != torch.float32):
        trainer.compute_loss(trainer.model.train(), batch).backward()
    seconds = time.process_time() - started
    trainer.model.zero_grad()
    return seconds, computed


def main(args: TrainingBenchmarkArguments) -> dict[str, dict[str, dict[str, float]]]:
    """Time everything, print a table for each kind of rows, and return the measures by kind and system."""
    import tempfile

    import torch

    from toolweaver_hf.evaluation.runs import save_tables, text_table
    from toolweaver_hf.text_expert import fast_dtype

    torch.set_num_threads(args.num_threads)
    results, tables = {}, []
    with tempfile.TemporaryDirectory() as folder:
        trainers, rows = make_trainers(args, folder)
    for kind, (apart, together) in rows.items():
        order = sorted(range(len(together)), key=lambda i: len(together[i]["input_ids"]))
        starts = [round(k * (len(order) - args.batch_size) / max(args.steps - 1, 1)) for k in range(args.steps)]
        seconds, computed, told = dict.fromkeys(trainers, 0.0), dict.fromkeys(trainers, 0), 0
        for step, start in enumerate([starts[0], *starts]):
            examples = [together[i] for i in order[start : start + args.batch_size]]
            ids = {example["id"] for example in examples}
            one_by_one = [row for row in apart if row["id"] in ids]
            for name, trainer in trainers.items():
                spent, tokens = time_batch(trainer, examples if name == PACKED else one_by_one, fast_dtype())
                if step:  # the first one warms up
                    seconds[name] += spent
                    computed[name] += tokens
            told += sum(len(row["input_ids"]) for row in one_by_one) * bool(step)
        results[kind] = {
            name: {
                "tokens_per_s": told / seconds[name],
                "speedup": seconds[TRL] / seconds[name],
                "computed": computed[name] / told,
            }
            for name in trainers
        }
        columns = ["system", "tokens of rows per CPU second", "times TRL's", "tokens computed, of the rows'"]
        cells = [
            [name, f"{row['tokens_per_s']:.0f}", f"{row['speedup']:.2f}", f"{100 * row['computed']:.0f} %"]
            for name, row in results[kind].items()
        ]
        tables.append({"title": f"{kind}, batches of {args.batch_size}", "columns": columns, "rows": cells})
        print(f"\n{tables[-1]['title']}\n\n{text_table(columns, cells)}", flush=True)
    if args.output_dir:
        save_tables(args.output_dir, tables, asdict(args))
    return results


def cli(argv: list[str] | None = None) -> None:
    main(*parse_arguments(argv, TrainingBenchmarkArguments))


if __name__ == "__main__":
    run_command(cli)
