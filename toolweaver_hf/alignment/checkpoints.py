"""Checkpoints: whether there is room for them, which one to resume from, and their weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig


def size_on_disk(model: PreTrainedModel | PeftModel, args: SFTConfig) -> int:
    """How many bytes a run writes at least: its checkpoints, as many as are kept, and the final model."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    saved = trained if isinstance(model, PeftModel) else parameters
    weights = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    moments = (
        0 if args.save_only_model else 2 * sum(parameter.numel() * parameter.element_size() for parameter in trained)
    )
    checkpoints = 0 if args.save_strategy == "no" else args.save_total_limit or 1
    return weights + checkpoints * (weights + moments)


def check_writable(folder: str | os.PathLike) -> None:
    """Make a folder and make sure that it can be written.

    Raises:
        `OSError`: saying what is wrong.
    """
    probe = Path(folder, f".write-test-{os.getpid()}")
    try:
        os.makedirs(folder, exist_ok=True)
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error}); choose another --output_dir") from None


def check_disk_space(folder: str | os.PathLike, num_bytes: int) -> None:
    """Make sure, before hours of training, that a folder's disk has room for what will be written.

    Raises:
        `OSError`: saying how much is missing.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, but this run writes at least {num_bytes / 1e9:.1f} GB; "
            "free some, or lower --save_total_limit"
        )


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """Return the newest checkpoint in a folder that was written to its end, or `None`.

    [`~transformers.trainer_utils.get_last_checkpoint`] would return one that a kill cut short.
    """
    checkpoints = [path for path in Path(folder).glob("checkpoint-*") if path.name.split("-", 1)[1].isdecimal()]
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            # Written last: present only in complete checkpoints
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            return str(checkpoint)
        except (OSError, ValueError, TypeError):
            continue
    return None


@torch.no_grad()
def load_weights(model: PreTrainedModel, checkpoint: str | os.PathLike) -> None:
    """Load the weights of a checkpoint into the model that it was saved from.

    [`~transformers.Trainer`] matches the names in the file with those of the model's weights, and leaves a weight as it
    is where they differ, as in a mixture of experts: its file has a weight for each expert, the model one for all.

    Args:
        model ([`PreTrainedModel`]): The model; changed in place.
        checkpoint (`str`): The checkpoint's folder.

    Raises:
        `ValueError`: naming the weights that the checkpoint lacks.
    """
    with torch.random.fork_rng(devices=[]):  # what it draws must not change the order of the rows
        with_info: Any = type(model).from_pretrained(
            checkpoint, dtype=model.dtype, use_safetensors=True, output_loading_info=True
        )
    saved, loaded = with_info
    if loaded["missing_keys"]:
        raise ValueError(f"{checkpoint} lacks weights of the model: {', '.join(sorted(loaded['missing_keys'])[:5])}")
    model.load_state_dict(saved.state_dict())
