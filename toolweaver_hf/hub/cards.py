"""Model and dataset cards, made from the records of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import DatasetCard, EvalResult, ModelCardData, RepoCard
from huggingface_hub.utils import logging
from jinja2 import TemplateError
from safetensors import safe_open

from ..alignment.record import TRAINING_FILE, TRAINING_VERSION
from ..codes.card import TAGS, codes_facts, model_card
from ..codes.measures import CODES_METRICS_VERSION
from ..data.card import dataset_card
from ..data.catalog import CATALOG_FILE, ToolCatalog
from ..data.queries import load_queries
from ..data.trajectories import load_trajectories
from ..evaluation.rankings import METRICS_FILE, RANKING_METRICS_VERSION, markdown_table
from ..files import read_json, read_object
from ..tool_codes_file import TOOL_CODES_FILE, check_tool_codes


logger = logging.get_logger(__name__)

EVALUATION_FOLDER = "evaluation"


def artifact_kind(folder: str | os.PathLike) -> Literal["model", "codes", "tokenizer", "dataset"]:
    """Return the kind of artifact in a folder, judged by its files.

    Returns:
        `str`: `"model"` (an aligned model, or its adapter), `"codes"` (codes, with or without their RQ-VAE),
        `"tokenizer"`, or `"dataset"` (a catalog, queries or trajectories).

    Raises:
        `ValueError`: if it is none of these.
    """
    folder = Path(folder)
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if TOOL_CODES_FILE in present:
        if "adapter_config.json" in present:
            return "model"
        if "config.json" in present:
            return "codes" if read_object(folder / "config.json").get("model_type") == "toolweaver_rqvae" else "model"
        return "tokenizer" if "tokenizer.json" in present else "codes"
    if dataset_files(folder):
        return "dataset"
    raise ValueError(
        f"{folder} holds nothing to push: give the output folder of `toolweaver tokenize` or `toolweaver sft`, a saved "
        "tokenizer, or a folder with catalog.jsonl, queries.*.jsonl or trajectories.*.jsonl"
    )


def create_card(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
) -> RepoCard:
    """Make the card of an artifact from the records in its folder. Facts without a record are left out.

    To add to a card, save it as `README.md` in the folder, edit it, and push the folder.

    Args:
        folder (`str`): The folder, as for [`push_folder`].
        repo_id (`str`): The repository to push to.
        license (`str`, *optional*): Identifier of the license.
        datasets (`Sequence[str]`, *optional*): Ids of the datasets that the model was trained on.

    Returns:
        [`~huggingface_hub.ModelCard`] or [`~huggingface_hub.DatasetCard`]

    Raises:
        `ValueError`: naming a file of the folder that is not valid.
    """
    folder, kind = Path(folder), artifact_kind(folder)
    if kind == "dataset":
        return _dataset_card(folder, repo_id, license)
    path = folder / TOOL_CODES_FILE
    facts = {"kind": kind, **codes_facts(check_tool_codes(read_object(path), str(path)))}
    data = ModelCardData(library_name="transformers", license=license, tags=[*TAGS])
    data.datasets = list(datasets) if datasets else None
    if kind == "model":
        _describe_model(folder, repo_id, data, facts)
    elif kind == "codes" and (folder / "config.json").exists():
        _describe_rqvae(folder, data, facts)
    try:
        return model_card(repo_id, data, facts)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the records in {folder} are not what a run writes: {error}") from None


def _describe_model(folder: Path, repo_id: str, data: ModelCardData, facts: dict[str, Any]) -> None:
    """Add to a card what the records of training and evaluation say of an aligned model."""
    training = read_json(folder / TRAINING_FILE, TRAINING_VERSION) if (folder / TRAINING_FILE).exists() else {}
    query = _first_description(folder) or "What is the weather in Oslo?"
    facts |= {
        "adapter": (folder / "adapter_config.json").exists(),
        "pipeline": (folder / "pipeline_tool_retrieval.py").exists(),
        "runs": training.get("runs"),
        "example_query": json.dumps(query, ensure_ascii=False),
    }
    data.tags = [*TAGS, "function-calling", "generative-retrieval"]
    data.pipeline_tag = "text-generation"
    data.base_model = training.get("base_model")
    if facts["adapter"]:
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        if data.base_model is None and base and not os.path.exists(base):
            data.base_model = base
        elif base and os.path.exists(base):
            logger.warning(f"adapter_config.json names the local folder {base} as the base: others lack it")
    data.eval_results = _evaluation(folder, facts)
    if data.eval_results:
        data.model_name = repo_id.split("/")[-1]


def _describe_rqvae(folder: Path, data: ModelCardData, facts: dict[str, Any]) -> None:
    """Add to a card what is known of the RQ-VAE that learned the codes."""
    data.tags = [*TAGS, "rq-vae"]
    facts |= {"rqvae": True, "input_dim": read_object(folder / "config.json").get("input_dim")}
    facts["encoder"] = _encoder(folder)
    if (folder / METRICS_FILE).exists():
        facts["code_metrics"] = read_json(folder / METRICS_FILE, CODES_METRICS_VERSION)


def _evaluation(folder: Path, facts: dict[str, Any]) -> list[EvalResult] | None:
    """Read `evaluation/metrics.json`, add its tables to the card's facts and return the model's results."""
    path = folder / EVALUATION_FOLDER / METRICS_FILE
    if not path.exists():
        return None
    metrics = read_json(path, RANKING_METRICS_VERSION)
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
    """Return the id of the encoder, as recorded in the cached embeddings beside the codes."""
    from ..codes.embeddings import EMBEDDINGS_FILE
    from ..text_expert import DEFAULT_ENCODER, default_encoder

    path = folder / EMBEDDINGS_FILE
    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        encoder = (file.metadata() or {}).get("encoder")
    if encoder == default_encoder():
        return DEFAULT_ENCODER
    return None if encoder is None or os.path.exists(encoder) else encoder


def _first_description(folder: Path) -> str | None:
    """Return the description of the catalog's first tool, as an example query."""
    path = folder / CATALOG_FILE
    return ToolCatalog.from_file(path)[0].description if path.exists() else None


def dataset_files(folder: Path) -> dict[str, dict[str, str]]:
    """Return the files of each configuration of a dataset: `catalog`, `queries` or `trajectories` -> split -> file.

    What `toolweaver queries` goes on from, `queries.candidates.jsonl`, is no split.
    """
    configurations: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else []:
        name, _, split = path.stem.partition(".")
        if name in ("catalog", "queries", "trajectories") and split != "candidates":
            configurations.setdefault(name, {})[split or "train"] = path.name
    return configurations


def _dataset_card(folder: Path, repo_id: str, license: str | None) -> DatasetCard:
    """Check the files of a dataset and make its card."""
    configurations = dataset_files(folder)
    for name, load in (("queries", load_queries), ("trajectories", load_trajectories)):
        for file in configurations.get(name, {}).values():
            load(folder / file)
    num_tools = len(ToolCatalog.from_file(folder / CATALOG_FILE)) if "catalog" in configurations else None
    return dataset_card(repo_id, configurations, num_tools, license)


def own_card(folder: Path) -> RepoCard | None:
    """Return the card in a folder if it has our tag; the cards that PEFT and TRL write do not."""
    path = folder / "README.md"
    if not path.exists():
        return None
    card = RepoCard.load(path)
    return card if "toolweaver" in (card.data.to_dict().get("tags") or []) else None
