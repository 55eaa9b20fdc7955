"""Upload files to a Hub repository in one commit, and `push_to_hub` for classes with `save_pretrained`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx


WEIGHT_FILES = (".safetensors", ".safetensors.index.json", "adapter_config.json")


class PushToHubMixin:
    """Adds `push_to_hub` to a class with `save_pretrained`. The class implements `create_card`."""

    _repo_type: Literal["model", "dataset"] = "model"

    def create_card(self, repo_id: str) -> RepoCard:
        """Return the card for the Hub repository `repo_id`."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Push to a Hub repository, with a card. The arguments are those of [`upload`]."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(
                folder,
                sorted(os.listdir(folder)),
                repo_id,
                self.create_card,
                repo_type=self._repo_type,
                private=private,
                revision=revision,
                token=token,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                create_pr=create_pr,
            )


def upload(
    folder: str | os.PathLike,
    files: Sequence[str],
    repo_id: str,
    make_card: Callable[[str], RepoCard],
    *,
    repo_type: Literal["model", "dataset", "space"] = "model",
    replace_weights: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload files of a folder to a Hub repository, in one commit, with a card.

    The repository is created if it does not exist. Unchanged files are not uploaded again, and pushing again continues
    an interrupted upload.

    Args:
        folder (`str`):
            The folder.
        files (`Sequence[str]`):
            Names of the files to upload, relative to the folder.
        repo_id (`str`):
            The repository, `user/name`. A name alone belongs to the user who is logged in.
        make_card (`Callable[[str], RepoCard]`):
            Makes the card, given the full name of the repository.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"`, `"dataset"` or `"space"`, a Space of Gradio.
        replace_weights (`bool`, *optional*, defaults to `False`):
            Whether to delete weights of an earlier push that are not in `files`.
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

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit, or the pull request.

    Raises:
        `OSError`: if the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in files]
    api = HfApi(token=token)
    try:
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        card = make_card(repo_id)
        operations.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=str(card).encode()))
        sdk = "gradio" if repo_type == "space" else None
        api.create_repo(repo_id, private=private, repo_type=repo_type, space_sdk=sdk, exist_ok=True)
        if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        if replace_weights:
            # Weights of an earlier push would be loaded as part of this model.
            present = api.list_repo_files(repo_id, revision=None if create_pr else revision)
            stale = [name for name in present if name.endswith(WEIGHT_FILES) and name not in files]
            operations += [CommitOperationDelete(path_in_repo=name) for name in stale if "/" not in name]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Upload {repo_type}",
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
        )
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise OSError(
                f"the Hub did not let you write to {repo_id} ({error.response.status_code}): log in with "
                "`hf auth login`, or give a token that may write there"
            ) from None
        raise
    except httpx.TransportError as error:
        raise OSError(
            f"cannot reach the Hub at {constants.ENDPOINT} ({error}); {folder} is as it was: push it again later"
        ) from None
