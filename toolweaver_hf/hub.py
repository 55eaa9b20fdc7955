"""Pushing the artifacts of a run to the Hub, each with its code and with a card that says what the run recorded."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    DatasetCardData,
    EvalResult,
    HfApi,
    HfFileSystem,
    ModelCard,
    ModelCardData,
    RepoCard,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx, logging
from jinja2 import TemplateError
from safetensors import safe_open

from .json_files import read_json, write_json


if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


logger = logging.get_logger(__name__)

CARD_TEMPLATE = Path(__file__).parent / "model_card_template.md"
TRAINING_FILE = "training.json"
TRAINING_VERSION = 1  # its schema_version
EVALUATION_FOLDER = "evaluation"

PUSHED_SUFFIXES = (".json", ".jsonl", ".safetensors", ".py", ".jinja", ".txt", ".png")
"""What leaves a folder for the Hub. Pickles and checkpoints do not."""
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", "adapter_config.json")
LEFT_OUT = ("embeddings.safetensors", "trainer_state.json")

DATASET_CARD_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{% if num_tools %}A catalogue of {{ num_tools }} tools with the JSON Schemas of their arguments{% else %}Data{% endif %} for [ToolWeaver](https://arxiv.org/abs/2601.21947).

```python
{%- if num_tools %}
from toolweaver_hf import ToolCatalog

catalog = ToolCatalog.from_pretrained("{{ repo_id }}")
{%- else %}
from datasets import load_dataset

rows = load_dataset("{{ repo_id }}", "{{ configs[0]["config_name"] }}")
{%- endif %}
```
"""


class PushToHubMixin:
    """Gives a class that has `save_pretrained` its `push_to_hub`."""

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
        """Push to a repository of the Hub, with a card. The arguments are those of [`~hub.push_folder`]."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(
                folder,
                repo_id,
                private=private,
                revision=revision,
                token=token,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                create_pr=create_pr,
            )


def artifact_kind(folder: str | os.PathLike) -> Literal["model", "codes", "tokenizer", "dataset"]:
    """Tell what a folder holds, by its files.

    Returns:
        `str`: `"model"` (an aligned model, or adapters of one), `"codes"` (codes, with or without their RQ-VAE),
        `"tokenizer"`, or `"dataset"` (a catalogue, queries or trajectories).

    Raises:
        `ValueError`: if it is none of these.
    """
    folder = Path(folder)
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "tool_codes.json" in present:
        if "adapter_config.json" in present:
            return "model"
        if "config.json" in present:
            return "codes" if _read_object(folder / "config.json").get("model_type") == "toolweaver_rqvae" else "model"
        return "tokenizer" if "tokenizer.json" in present else "codes"
    if _dataset_files(folder):
        return "dataset"
    raise ValueError(
        f"{folder} holds nothing to push: give the output folder of `toolweaver tokenize` or `toolweaver sft`, a saved "
        "tokenizer, or a folder with catalog.jsonl, queries.*.jsonl or trajectories.*.jsonl"
    )


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
    """Push an artifact to a repository of the Hub, in one commit, with its card.

    The repository is made where it does not exist. A file that is there unchanged is not sent again, and an upload
    that was interrupted is taken up by pushing again. The card is made by [`create_card`]; a `README.md` in the folder
    that carries the tag `toolweaver` is pushed as it is instead.

    Args:
        folder (`str`):
            Output folder of `toolweaver tokenize` or `toolweaver sft`, a saved tokenizer, or a folder with a
            catalogue, queries or trajectories. The last becomes a dataset repository.
        repo_id (`str`):
            The repository, `user/name`; a name alone is one of the user who is logged in.
        private (`bool`, *optional*):
            Whether a repository that is made is private.
        revision (`str`, *optional*):
            Branch to push to, made from `main` where it does not exist. Defaults to `main`.
        token (`bool` or `str`, *optional*):
            The token to authenticate with. Defaults to the one of `hf auth login`.
        commit_message (`str`, *optional*):
            The commit's first line.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request instead of committing to the branch.
        license (`str`, *optional*):
            For the card: identifier of the licence.
        datasets (`Sequence[str]`, *optional*):
            For the card: ids of the datasets that the model was trained on.

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit, or the pull request.

    Raises:
        `ValueError`: if the folder holds no artifact, or a file of it is not valid; nothing is sent then.
        `OSError`: if the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    kind = artifact_kind(folder)
    files, left_out = _files(folder)
    if kind == "dataset":
        files = [file for splits in _dataset_files(folder).values() for file in splits.values()]
    elif left_out:
        logger.warning(f"Not pushed: {', '.join(left_out)}")
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in files]
    api, repo_type = HfApi(token=token), "dataset" if kind == "dataset" else "model"
    try:
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        card = _own_card(folder) or create_card(folder, repo_id, license=license, datasets=datasets)
        operations.append(CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=str(card).encode()))
        api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True)
        if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        if kind == "model":
            # Weights of an earlier push that are not of this model would be taken for it.
            present = api.list_repo_files(repo_id, revision=None if create_pr else revision)
            stale = [name for name in present if name.endswith(WEIGHT_FILES) and name not in files]
            operations += [CommitOperationDelete(path_in_repo=name) for name in stale if "/" not in name]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Upload {kind}",
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


def local_file(path: str | os.PathLike) -> str | os.PathLike:
    """Return a path as it is, or the local copy of a file that is named as `hf://datasets/user/name/queries.jsonl`.

    Raises:
        `OSError`: if the Hub cannot be reached or has no such file.
    """
    if not os.fspath(path).startswith("hf://"):
        return path
    try:
        found = HfFileSystem().resolve_path(path)
        return hf_hub_download(found.repo_id, found.path_in_repo, repo_type=found.repo_type, revision=found.revision)
    except (ValueError, OSError, httpx.TransportError, NotImplementedError) as error:
        raise OSError(f"cannot get {path} from the Hub: {error}") from None


def take_push_arguments(args: TrainingArguments) -> dict[str, Any] | None:
    """Take out of training arguments whether and where to push, for one [`push_folder`] at the end of a run.

    The Trainer would push all along, without a card, and its arguments with the token in them as a pickle.

    Args:
        args ([`TrainingArguments`]): Its `push_to_hub` and `hub_token` are cleared.

    Returns:
        `dict` or `None`: the arguments of [`push_folder`] beside the folder; `None` if nothing is to be pushed.
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
    """Return the names of the files to push, and of the files and folders that are left out."""
    pushed, left_out = [], []
    for path in sorted(folder.iterdir()):
        if path.name == "README.md" or path.name.startswith("."):
            continue
        if path.is_file() and path.suffix in PUSHED_SUFFIXES and path.name not in LEFT_OUT:
            pushed.append(path.name)
        elif path.is_dir() and path.name in (EVALUATION_FOLDER, "additional_chat_templates", "custom_generate"):
            inside = sorted(file for file in path.iterdir() if file.suffix in PUSHED_SUFFIXES)
            pushed += [f"{path.name}/{file.name}" for file in inside]
        else:
            left_out.append(path.name)
    return pushed, left_out


# Cards


def create_card(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
) -> RepoCard:
    """Make the card of an artifact from what the run recorded in its folder; what is not known is left out.

    To write more into a card, save it as `README.md` in the folder, edit it, and push the folder.

    Args:
        folder (`str`): The folder, as for [`push_folder`].
        repo_id (`str`): The repository that it will be pushed to.
        license (`str`, *optional*): Identifier of the licence.
        datasets (`Sequence[str]`, *optional*): Ids of the datasets that the model was trained on.

    Returns:
        [`~huggingface_hub.ModelCard`] or [`~huggingface_hub.DatasetCard`]

    Raises:
        `ValueError`: naming a file of the folder that is not valid.
    """
    from .tokenization_toolweaver import LEVEL_LETTERS, check_tool_codes

    folder, kind, name = Path(folder), artifact_kind(folder), repo_id.split("/")[-1]
    if kind == "dataset":
        return _dataset_card(folder, repo_id, license)
    path = folder / "tool_codes.json"
    codes = check_tool_codes(_read_object(path), str(path))
    sizes = codes["codebook_sizes"]
    example_tool, indices = next(iter(codes["codes"].items()))
    example_code = "".join(f"<{letter}_{index}>" for letter, index in zip(LEVEL_LETTERS, indices, strict=False))
    facts: dict[str, Any] = {
        "kind": kind,
        "repo_id": repo_id,
        "num_tools": len(codes["codes"]),
        "codebook_sizes": sizes,
        "example_tool": json.dumps(example_tool, ensure_ascii=False),
        "example_code": example_code,
        "example_indices": tuple(indices),
    }
    tags = ["toolweaver", "tool-use"]
    base_model, eval_results = None, None
    if kind == "model":
        tags += ["function-calling", "generative-retrieval"]
        training = read_json(folder / TRAINING_FILE, TRAINING_VERSION) if (folder / TRAINING_FILE).exists() else {}
        base_model = training.get("base_model")
        facts["adapter"] = (folder / "adapter_config.json").exists()
        facts["pipeline"] = (folder / "pipeline_tool_retrieval.py").exists()
        facts["runs"] = training.get("runs")
        query = _first_description(folder) or "What is the weather in Oslo?"
        facts["example_query"] = json.dumps(query, ensure_ascii=False)
        eval_results = _evaluation(folder, facts)
        if facts["adapter"]:
            base = _read_object(folder / "adapter_config.json").get("base_model_name_or_path")
            if base_model is None and base and not os.path.exists(base):
                base_model = base
            elif base and os.path.exists(base):
                logger.warning(f"adapter_config.json names the local folder {base} as the base: others lack it")
    elif kind == "codes" and (folder / "config.json").exists():
        tags.append("rq-vae")
        facts |= {"rqvae": True, "input_dim": _read_object(folder / "config.json").get("input_dim")}
        facts["encoder"] = _encoder(folder)
        if (folder / "metrics.json").exists():
            facts["code_metrics"] = read_json(folder / "metrics.json", 1)
    data = ModelCardData(
        library_name="transformers",
        license=license,
        base_model=base_model,
        datasets=list(datasets) if datasets else None,
        pipeline_tag="text-generation" if kind == "model" else None,
        tags=tags,
        model_name=name if eval_results else None,
        eval_results=eval_results,
    )
    try:
        return ModelCard.from_template(data, template_path=str(CARD_TEMPLATE), **(facts | {"model_name": name}))
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the records in {folder} are not what a run writes: {error}") from None


def _evaluation(folder: Path, facts: dict[str, Any]) -> list[EvalResult] | None:
    """Read `evaluation/metrics.json`, put its tables among the card's facts and return the model's own results."""
    from .evaluation import METRICS_FILE, METRICS_VERSION, markdown_table

    path = folder / EVALUATION_FOLDER / METRICS_FILE
    if not path.exists():
        return None
    metrics = read_json(path, METRICS_VERSION)
    try:
        results, queries = metrics["results"], metrics["queries"]
        own = next(iter(results.values()))
        facts["evaluation_queries"] = queries
        facts["evaluation_tables"] = [
            (f"{group} ({measured['queries']} queries)", markdown_table(results, group))
            for group, measured in own.items()
        ]
        return [
            EvalResult(
                task_type="information-retrieval",
                task_name="Tool retrieval",
                dataset_type=Path(queries).stem,
                dataset_name=queries,
                dataset_config=group,
                metric_type=name.lower(),
                metric_name=name,
                metric_value=round(value, 4),
            )
            for group, measured in own.items()
            for name, value in measured.items()
            if name != "queries"
        ]
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path} does not hold the results of `toolweaver evaluate`: {error!r}") from None


def _encoder(folder: Path) -> str | None:
    """Return the id of the encoder that the tools were embedded with, by the cached embeddings beside the codes."""
    from .embeddings import DEFAULT_ENCODER, EMBEDDINGS_FILE, default_encoder

    path = folder / EMBEDDINGS_FILE
    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        encoder = (file.metadata() or {}).get("encoder")
    if encoder == default_encoder():
        return DEFAULT_ENCODER
    return None if encoder is None or os.path.exists(encoder) else encoder


def _first_description(folder: Path) -> str | None:
    """Return the description of the catalogue's first tool, as an example of a query."""
    from .catalog import CATALOG_FILE, ToolCatalog

    path = folder / CATALOG_FILE
    return ToolCatalog.from_file(path)[0].description if path.exists() else None


def _dataset_files(folder: Path) -> dict[str, dict[str, str]]:
    """Return for each configuration of a dataset (`catalog`, `queries`, `trajectories`) its split -> file."""
    configurations: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else []:
        name, _, split = path.stem.partition(".")
        if name in ("catalog", "queries", "trajectories"):
            configurations.setdefault(name, {})[split or "train"] = path.name
    return configurations


def _dataset_card(folder: Path, repo_id: str, license: str | None) -> DatasetCard:
    """Make the card of a dataset; `load_dataset(repo_id, "queries")` reads by its `configs` what the folder holds."""
    from .catalog import CATALOG_FILE, ToolCatalog
    from .data import load_queries, load_trajectories

    configurations = _dataset_files(folder)
    for name, load in (("queries", load_queries), ("trajectories", load_trajectories)):
        for file in configurations.get(name, {}).values():
            load(folder / file)
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in configurations.items()
    ]
    data = DatasetCardData(license=license, tags=["toolweaver", "tool-use"], configs=configs)
    num_tools = len(ToolCatalog.from_file(folder / CATALOG_FILE)) if "catalog" in configurations else None
    facts = {"name": repo_id.split("/")[-1], "repo_id": repo_id, "num_tools": num_tools}
    return DatasetCard.from_template(data, template_str=DATASET_CARD_TEMPLATE, **facts)


def _own_card(folder: Path) -> RepoCard | None:
    """Return the card in a folder if it is one of ours, and not what PEFT or TRL write beside every model."""
    path = folder / "README.md"
    if not path.exists():
        return None
    card = RepoCard.load(path)
    return card if "toolweaver" in (card.data.to_dict().get("tags") or []) else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(document).__name__}")
    return document


def record_training(trainer: Trainer, base_model: str, **settings: Any) -> None:
    """Write `training.json` into the trainer's output folder: what the card says of the training.

    A run that starts from another one's folder goes on with that one's record.

    Args:
        trainer ([`Trainer`]): The trainer, after the training.
        base_model (`str`): Id or folder of the model that the run started from.
        settings: What else describes the run, such as its stages.
    """
    args, state = trainer.args, trainer.state
    earlier = Path(base_model, TRAINING_FILE)
    record = read_json(earlier, TRAINING_VERSION) if earlier.exists() else {"base_model": base_model, "runs": []}
    if os.path.exists(record["base_model"] or ""):
        record["base_model"] = None  # a folder of this machine says nothing to others
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


def cli(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Push codes, an aligned model, a tokenizer or a dataset to the Hub.")
    parser.add_argument("folder", help="the folder to push")
    parser.add_argument("repo_id", help="the repository, user/name; it is made where it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--token", help="token to authenticate with (default: the one of `hf auth login`)")
    parser.add_argument("--commit-message", help="first line of the commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--license", help="for the card: identifier of the licence")
    parser.add_argument("--datasets", nargs="+", help="for the card: datasets that the model was trained on")
    commit = push_folder(**vars(parser.parse_args(argv)))
    print(f"Pushed: {commit.pr_url or commit.commit_url}")


if __name__ == "__main__":
    cli()
