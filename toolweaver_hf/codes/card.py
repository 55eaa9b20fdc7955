"""The model card of codes; its template is shared with aligned models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..tool_codes_file import LEVEL_LETTERS


CARD_TEMPLATE = Path(__file__).parents[1] / "model_card_template.md"
TAGS = ["toolweaver", "tool-use"]


def codes_facts(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables for codes: their number, sizes and an example.

    Args:
        document (`Mapping[str, Any]`): The content of a `tool_codes.json`.
    """
    example_tool, indices = next(iter(document["codes"].items()))
    return {
        "num_tools": len(document["codes"]),
        "codebook_sizes": document["codebook_sizes"],
        "example_tool": example_tool,
        "example_tool_json": json.dumps(example_tool, ensure_ascii=False),
        "example_code": "".join(f"<{a}_{i}>" for a, i in zip(LEVEL_LETTERS, indices, strict=False)),
        "example_indices": tuple(indices),
    }


def model_card(repo_id: str, data: ModelCardData, facts: Mapping[str, Any]) -> ModelCard:
    """Fill in the template for a repository of the Hub.

    Args:
        repo_id (`str`): The repository.
        data (`ModelCardData`): The card's metadata.
        facts (`Mapping[str, Any]`): The template's variables, including the `kind` of the artifact.
    """
    names = {"repo_id": repo_id, "model_name": repo_id.split("/")[-1]}
    return ModelCard.from_template(data, template_path=str(CARD_TEMPLATE), **facts, **names)
