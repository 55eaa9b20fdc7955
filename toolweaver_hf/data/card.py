"""The dataset card of a catalog, queries or trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData


DATASET_CARD_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{% if num_tools %}A catalog of {{ num_tools }} tools with the JSON Schemas of their arguments{% else %}Data{% endif %} for [ToolWeaver](https://arxiv.org/abs/2601.21947).

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


def dataset_card(
    repo_id: str, configurations: Mapping[str, Mapping[str, str]], num_tools: int | None, license: str | None = None
) -> DatasetCard:
    """Create a dataset card whose `configs` let `load_dataset(repo_id, "queries")` load each kind of file.

    Args:
        repo_id (`str`): The repository that the dataset will be pushed to.
        configurations (`Mapping[str, Mapping[str, str]]`): Configuration (`catalog`, `queries`, ...) -> split -> file.
        num_tools (`int`, *optional*): Number of tools, if the dataset has a catalog.
        license (`str`, *optional*): Identifier of the license.
    """
    configs = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in files.items()]}
        for name, files in configurations.items()
    ]
    data = DatasetCardData(license=license, tags=["toolweaver", "tool-use"], configs=configs)
    facts: dict[str, Any] = {"name": repo_id.split("/")[-1], "repo_id": repo_id, "num_tools": num_tools}
    return DatasetCard.from_template(data, template_str=DATASET_CARD_TEMPLATE, **facts)
