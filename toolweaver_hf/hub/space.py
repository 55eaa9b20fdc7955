"""Push a Space of the Hub that shows an artifact in the browser, as `toolweaver ui` does."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.metadata import requires
from pathlib import Path

from huggingface_hub import CommitInfo, SpaceCard, SpaceCardData
from packaging.requirements import Requirement

from ..push_mixin import upload


PACKAGE = Path(__file__).parents[1]
LEFT_OUT = ("__pycache__", "recipes", "*.jsonl")
"""What of the package a Space does not need."""

GRADIO_VERSION = "6.31.0"
"""The version that a Space runs, the oldest of the extra `ui`."""
APP = """from toolweaver_hf.ui.page import run_ui


run_ui({repo_id})
"""
REQUIREMENTS = """# PyTorch without CUDA, which a Space without a GPU installs faster. On a GPU, remove the next line.
--extra-index-url https://download.pytorch.org/whl/cpu
"""
CARD = """# {title}

Type a query and see how its tools are found: the tree of their codes, the ranked tools with their schemas, a run of the agent where there is one, and a map. It opens [{repo_id}]({url}) with the code in `toolweaver_hf`. To open a private repository, it needs a token that may read it, as the secret `HF_TOKEN` in its settings.
"""


def push_space(
    repo_id: str,
    *,
    dataset: bool = False,
    private: bool | None = None,
    token: bool | str | None = None,
    license: str | None = None,
) -> CommitInfo:
    """Push a Gradio Space that shows the model, codes or catalog of a repository, in one commit.

    The Space has the name of the repository, and the code of this package as it is here, so that it runs what pushed
    it. It is created if it does not exist.

    Args:
        repo_id (`str`):
            The repository to show, `user/name`, which is opened when the Space starts.
        dataset (`bool`, *optional*, defaults to `False`):
            Whether it is a dataset repository.
        private (`bool`, *optional*):
            Whether a newly created Space is private.
        token (`bool` or `str`, *optional*):
            The token to authenticate with. Defaults to the one of `hf auth login`.
        license (`str`, *optional*):
            For the card: identifier of the license.

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit.

    Raises:
        `OSError`: if the Hub cannot be reached or refuses.
    """
    needed = [one for one in map(Requirement, requires("toolweaver-hf") or ()) if _is_needed(one)]
    packages = [str(one).partition(";")[0] for one in needed]

    def make_card(space_id: str) -> SpaceCard:
        data = SpaceCardData(
            title=space_id.split("/")[-1],
            sdk="gradio",
            sdk_version=GRADIO_VERSION,
            python_version="3.12",
            app_file="app.py",
            license=license,
            tags=["toolweaver"],
            models=None if dataset else [repo_id],
            datasets=[repo_id] if dataset else None,
        )
        url = f"https://huggingface.co/{'datasets/' if dataset else ''}{repo_id}"
        return SpaceCard(f"---\n{data.to_yaml()}\n---\n\n{CARD.format(title=data.title, repo_id=repo_id, url=url)}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        (folder / "app.py").write_text(APP.format(repo_id=json.dumps(repo_id)), encoding="utf-8")
        (folder / "requirements.txt").write_text(REQUIREMENTS + "\n".join(packages) + "\n", encoding="utf-8")
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return upload(
            folder,
            files,
            repo_id,
            make_card,
            repo_type="space",
            private=private,
            token=token,
            commit_message=f"Show {repo_id}",
        )


def _is_needed(requirement: Requirement) -> bool:
    """Whether a Space needs a package: without the extras, but for the grammar of an agent's arguments."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": "grammar"})
