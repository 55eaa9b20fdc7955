"""The record of a training run, for the model card."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_json, write_json


if TYPE_CHECKING:
    from transformers import Trainer


TRAINING_FILE = "training.json"


TRAINING_VERSION = 1  # its schema_version


def record_training(trainer: Trainer, base_model: str, **settings: Any) -> None:
    """Write `training.json` with the settings and results of a run to the trainer's output folder.

    If `base_model` is the output folder of an earlier run, the run is appended to that run's record.

    Args:
        trainer ([`Trainer`]): The trainer, after training.
        base_model (`str`): Id or folder of the model that the run started from.
        settings: Additional settings of the run, such as its stages.
    """
    args, state = trainer.args, trainer.state
    earlier = Path(base_model, TRAINING_FILE)
    record = read_json(earlier, TRAINING_VERSION) if earlier.exists() else {"base_model": base_model, "runs": []}
    if os.path.exists(record["base_model"] or ""):
        record["base_model"] = None  # a local path is meaningless to others
    summary = next((entry for entry in reversed(state.log_history) if "train_loss" in entry), {})
    run = {
        **settings,
        "rows": len(trainer.train_dataset),
        "epochs": round(state.epoch or 0, 2),
        "steps": state.global_step,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else str(next(trainer.model.parameters()).dtype)[6:],
        "seed": args.seed,
        "training_loss": round(summary["train_loss"], 4) if "train_loss" in summary else None,
        "seconds": round(summary["train_runtime"]) if "train_runtime" in summary else None,
        "versions": {name: version(name) for name in ("toolweaver-hf", "transformers", "trl", "torch")},
    }
    record["runs"].append({name: value for name, value in run.items() if value is not None})
    write_json(Path(args.output_dir, TRAINING_FILE), record, TRAINING_VERSION)
