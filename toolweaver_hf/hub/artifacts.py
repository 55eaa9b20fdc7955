"""Push the artifacts of a run to the Hub, each with its code and its card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from huggingface_hub.utils import logging

from ..push_mixin import upload
from .cards import artifact_kind, create_card, dataset_files, own_card


if TYPE_CHECKING:
    from transformers import TrainingArguments


logger = logging.get_logger(__name__)

PUSHED_SUFFIXES = (".json", ".jsonl", ".safetensors", ".py", ".jinja", ".txt", ".png")
"""Suffixes of the files that are pushed. Pickles and checkpoints never are."""
LEFT_OUT = ("embeddings.safetensors", "text_embeddings.safetensors", "trainer_state.json")


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
) -> CommitInfo:
    """Push an artifact to a Hub repository, in one commit, with its card.

    The repository is created if it does not exist. Unchanged files are not uploaded again, and pushing again continues
    an interrupted upload. The card is made by [`~hub.cards.create_card`], unless the folder has a `README.md` with the
    tag `toolweaver`, which is pushed instead.

    Args:
        folder (`str`):
            Output folder of `toolweaver tokenize` or `toolweaver sft`, a saved tokenizer, or a folder with a
            catalog, queries or trajectories, which becomes a dataset repository.
        repo_id (`str`):
            The repository, `user/name`. A name alone belongs to the user who is logged in.
        private (`bool`, *optional*):
            Whether a newly created repository is private.
        revision (`str`, *optional*):
            Branch to push to, created from `main` if it does not exist. Defaults to `main`.
        token (`bool` or `str`, *optional*):
            The token to authenticate with. Defaults to the one of `hf auth login`.
        commit_message (`str`, *optional*):
            The commit's first line.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request instead of committing to the branch.
        license (`str`, *optional*):
            For the card: identifier of the license.
        datasets (`Sequence[str]`, *optional*):
            For the card: ids of the datasets that the model was trained on.

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit, or the pull request.

    Raises:
        `ValueError`: if the folder holds no artifact, or one of its files is not valid. Nothing is uploaded then.
        `OSError`: if the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    kind = artifact_kind(folder)
    files, left_out = _files(folder)
    if kind == "dataset":
        files = [file for splits in dataset_files(folder).values() for file in splits.values()]
    elif left_out:
        logger.warning(f"Not pushed: {', '.join(left_out)}")
    return upload(
        folder,
        files,
        repo_id,
        lambda repo_id: own_card(folder) or create_card(folder, repo_id, license=license, datasets=datasets),
        repo_type="dataset" if kind == "dataset" else "model",
        replace_weights=kind == "model",
        private=private,
        revision=revision,
        token=token,
        commit_message=commit_message or f"Upload {kind}",
        create_pr=create_pr,
    )


def pop_push_arguments(args: TrainingArguments) -> dict[str, Any] | None:
    """Remove the push arguments from training arguments, for one [`push_folder`] at the end of a run.

    `Trainer` itself would push during the run, without this card, and pickle its arguments with the token in them.

    Args:
        args ([`TrainingArguments`]): Its `push_to_hub` and `hub_token` are cleared.

    Returns:
        `dict` or `None`: keyword arguments for [`push_folder`]; `None` without `--push_to_hub`.
    """
    push_to_hub, args.push_to_hub = args.push_to_hub, False
    token, args.hub_token = args.hub_token, None
    if not push_to_hub:
        return None
    return {
        "repo_id": args.hub_model_id or Path(args.output_dir).name,
        "private": args.hub_private_repo,
        "revision": args.hub_revision,
        "token": token,
    }


def _files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the files to push, and of the files and folders to leave out."""
    pushed, left_out = [], []
    for path in sorted(folder.iterdir()):
        if path.name == "README.md" or path.name.startswith("."):
            continue
        if path.is_file() and path.suffix in PUSHED_SUFFIXES and path.name not in LEFT_OUT:
            pushed.append(path.name)
        elif path.is_dir() and path.name in ("evaluation", "additional_chat_templates", "custom_generate"):
            inside = sorted(file for file in path.iterdir() if file.suffix in PUSHED_SUFFIXES)
            pushed += [f"{path.name}/{file.name}" for file in inside]
        else:
            left_out.append(path.name)
    return pushed, left_out
