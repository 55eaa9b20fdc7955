"""The catalog: which tools there are, and what each one does."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import RepoCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..files import atomic_write, local_file
from ..push_mixin import PushToHubMixin
from .card import dataset_card
from .formats import document_rows, json_lines, parse_document, sealtools_fields, toolbench_fields


CATALOG_FILE = "catalog.jsonl"


@dataclass(frozen=True)
class Tool:
    """One tool that a model can choose and call.

    Args:
        id (`str`):
            Identifier, unique in its catalog. Codes, queries and trajectories refer to the tool by it.
        description (`str`):
            What the tool does, in natural language.
        name (`str`, *optional*, defaults to `id`):
            The name that people and models read.
        parameters (`dict`, *optional*):
            JSON Schema of the arguments, an object schema. Defaults to an object without properties.
        category (`str`, *optional*):
            The group that the tool belongs to, such as its API's category.
        metadata (`dict`, *optional*):
            Anything else, kept as it is.

    Raises:
        `ValueError`: for an empty id or description, or parameters that are not an object schema.
    """

    id: str
    description: str
    name: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    category: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.id, str) or not self.id.strip():
            raise ValueError(f"a tool's id must be a string with at least one visible character, not {self.id!r}")
        if not self.name:
            object.__setattr__(self, "name", self.id)
        for label in ("name", "description"):
            value = getattr(self, label)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"tool {self.id!r}: its {label} is empty; give it a text")
        if self.category is not None and not isinstance(self.category, str):
            raise ValueError(f"tool {self.id!r}: category must be a string")
        if not isinstance(self.metadata, dict):
            raise ValueError(f"tool {self.id!r}: metadata must be a JSON object")
        if not isinstance(self.parameters, dict) or self.parameters.get("type", "object") != "object":
            raise ValueError(f"tool {self.id!r}: parameters must be a JSON Schema of type 'object'")
        if not isinstance(self.parameters.get("properties", {}), dict):
            raise ValueError(f"tool {self.id!r}: the properties of its parameters must be a JSON object")

    @property
    def document(self) -> str:
        """`str`: The text that stands for the tool: what the encoder embeds and the model memorizes."""
        text = f"{self.name}: {self.description}"
        if self.category:
            text = f"{self.category}. {text}"
        properties = self.parameters.get("properties", {})
        if properties:
            described = (
                f"{name} ({schema['description'].rstrip('.')})"
                if isinstance(schema, dict) and isinstance(schema.get("description"), str)
                else name
                for name, schema in properties.items()
            )
            text += f" Parameters: {', '.join(described)}."
        return text

    @property
    def checksum(self) -> str:
        """`str`: 16 hexadecimal digits that change when the tool's document does."""
        return hashlib.sha256(self.document.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return the tool as a row of a catalog file."""
        row = {"id": self.id, "name": self.name, "description": self.description, "parameters": self.parameters}
        if self.category:
            row["category"] = self.category
        if self.metadata:
            row["metadata"] = self.metadata
        return row

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Tool:
        """Build a tool from a row in any of the formats that [`ToolCatalog.from_file`] reads.

        Raises:
            `ValueError`: if the row is none of these, or describes no valid tool.
        """
        if not isinstance(row, dict):
            raise ValueError(f"a tool must be a JSON object, not {type(row).__name__}")
        if isinstance(row.get("function"), dict):  # OpenAI: {"type": "function", "function": {...}}
            row = row["function"]
        if "_id" in row:  # BEIR corpus
            return cls(
                id=row["_id"],
                name=row.get("title") or "",
                description=row.get("text"),
                metadata=row.get("metadata") or {},
            )
        if "api_name" in row and "tool_name" in row:  # ToolBench
            return cls(**toolbench_fields(row))
        if "api_name" in row:  # Seal-Tools
            return cls(**sealtools_fields(row))
        if "documentation" in row:  # ToolRet
            return cls(id=row.get("id"), description=row["documentation"])
        if "id" not in row and "name" not in row:
            raise ValueError("a tool needs an 'id' (or 'name', or BEIR's '_id') beside its 'description'")
        optional = {
            "parameters": row.get("parameters", row.get("inputSchema")),  # inputSchema: MCP's tools/list
            "category": row.get("category"),
            "metadata": row.get("metadata"),
        }
        if isinstance(row.get("outputSchema"), dict):  # MCP's, too
            optional["metadata"] = {**(row.get("metadata") or {}), "output_schema": row["outputSchema"]}
        return cls(
            id=row.get("id", row.get("name")),
            name=row.get("name", ""),
            description=row.get("description") or row.get("title"),  # MCP's description is optional, its title as well
            **{key: value for key, value in optional.items() if value is not None},
        )


class ToolCatalog(PushToHubMixin, Sequence[Tool]):
    """An ordered set of tools with unique ids.

    Index it by position or by id; `len`, `in` (by id) and iteration work as expected.

    Args:
        tools (`Iterable[Tool]`):
            The tools, in the order in which embeddings and codes will be laid out.

    Raises:
        `ValueError`: if there is no tool, or two share an id.

    Example:

    ```python
    >>> from toolweaver_hf import Tool, ToolCatalog

    >>> catalog = ToolCatalog([Tool("weather", "Current weather of a city."), Tool("aqi", "Air quality of a city.")])
    >>> catalog["aqi"].description
    'Air quality of a city.'
    ```
    """

    _repo_type = "dataset"

    def __init__(self, tools: Iterable[Tool]):
        self._tools = list(tools)
        self._position = {tool.id: position for position, tool in enumerate(self._tools)}
        if not self._tools:
            raise ValueError("the catalog is empty; it needs at least one tool")
        if len(self._position) < len(self._tools):
            twin = next(tool.id for i, tool in enumerate(self._tools) if self._position[tool.id] != i)
            raise ValueError(f"two tools have the id {twin!r}; ids must be unique")

    def __len__(self) -> int:
        return len(self._tools)

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools)

    def __contains__(self, tool_id: object) -> bool:
        return tool_id in self._position

    def __getitem__(self, key: int | str) -> Tool:
        return self._tools[self._position[key] if isinstance(key, str) else key]

    def __repr__(self) -> str:
        return f"ToolCatalog({len(self)} tools)"

    @property
    def ids(self) -> list[str]:
        """`list[str]`: The tools' ids, in order."""
        return list(self._position)

    @property
    def documents(self) -> list[str]:
        """`list[str]`: The tools' documents, in order."""
        return [tool.document for tool in self._tools]

    @cached_property
    def checksum(self) -> str:
        """`str`: 16 hexadecimal digits that change when an id, a document or the order does."""
        digest = hashlib.sha256()
        for tool in self._tools:
            digest.update(f"{tool.id}\0{tool.checksum}\0".encode())
        return digest.hexdigest()[:16]

    def create_card(self, repo_id: str) -> RepoCard:
        return dataset_card(repo_id, {"catalog": {"train": CATALOG_FILE}}, len(self))

    @classmethod
    def from_functions(cls, functions: Iterable[dict[str, Any]]) -> ToolCatalog:
        """Build a catalog from function schemas: OpenAI's `tools` list, or the `tools` of an MCP server.

        Raises:
            `ValueError`: naming the first item that is wrong.

        Example:

        ```python
        >>> listed = await session.list_tools()  # an MCP client's session
        >>> catalog = ToolCatalog.from_functions(tool.model_dump() for tool in listed.tools)
        ```
        """
        return cls(_checked((f"function {number}", row) for number, row in enumerate(functions, start=1)))

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> ToolCatalog:
        """Read a catalog.

        A `.jsonl` file has one tool a line. Any other is one document of JSON, or of YAML where it is named so:

        - a list of tools, or an object that holds it under `tools` or `functions`;
        - what an MCP server answers to `tools/list`, with or without its JSON-RPC envelope;
        - an OpenAPI 3 description, each operation of which is a tool (see [`~openapi.openapi_tools`]);
        - a file of ToolBench with its `api_list`, or instructions of ToolBench, whose `api_list`s are put together.

        A tool is a row as [`ToolCatalog.to_jsonl`] writes it, an OpenAI function schema (bare or in its
        `{"type": "function"}` wrapper), an item of MCP's list, a document of a BEIR corpus (`_id`, `title`, `text`),
        an API of ToolBench, whose id is `<<tool&&api>>` as in ToolGen, or one of Seal-Tools or ToolRet. What is known of a
        tool's answers is kept as the JSON Schema `metadata["output_schema"]`. The file may be one of the Hub:
        `hf://datasets/user/name/catalog.jsonl`.

        Raises:
            `ValueError`: naming the file, the line or item, and the tool that is wrong.
            `OSError`: if the file cannot be read.
        """
        path = Path(local_file(path))
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
        if path.suffix == ".jsonl":
            rows = json_lines(text, path)
        else:
            rows = ((f"{path}, {place}", row) for place, row in document_rows(parse_document(text, path)))
        try:
            return cls(_checked(rows))
        except ValueError as error:
            message = str(error)
            raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None
        except RecursionError:
            raise ValueError(f"{path}: a tool's schema is nested too deeply") from None

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, *, repo_type: Literal["dataset", "model"] = "dataset", **hub_kwargs
    ) -> ToolCatalog:
        """Read the `catalog.jsonl` of a folder or of a repository of the Hub.

        Args:
            folder (`str`): The folder or repository.
            repo_type (`str`, *optional*, defaults to `"dataset"`): `"model"` for the catalog beside a model.
            hub_kwargs: As for every `from_pretrained`: `revision`, `token`, `cache_dir`, ...

        Raises:
            `ValueError`: naming the file, the line and the tool that is wrong.
            `OSError`: if there is no such file.
        """
        if os.path.isdir(folder):
            return cls.from_file(Path(folder) / CATALOG_FILE)
        try:
            return cls.from_file(hf_hub_download(str(folder), CATALOG_FILE, repo_type=repo_type, **hub_kwargs))
        except (HFValidationError, HfHubHTTPError) as error:
            raise OSError(
                f"no {CATALOG_FILE} in {folder}, neither a folder nor a {repo_type} on the Hub: {error}"
            ) from None

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the catalog as `catalog.jsonl` in `folder`."""
        os.makedirs(folder, exist_ok=True)
        self.to_jsonl(Path(folder) / CATALOG_FILE)

    def to_jsonl(self, path: str | os.PathLike) -> None:
        """Write the catalog, one tool a line, as [`ToolCatalog.from_file`] reads it back."""
        with atomic_write(path) as partial, open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(tool.to_dict(), ensure_ascii=False) + "\n" for tool in self)


def _checked(rows: Iterable[tuple[str, Any]]) -> Iterator[Tool]:
    """Turn (place, row) pairs into tools; an error says in which place it is."""
    places: dict[str, str] = {}
    for place, row in rows:
        try:
            tool = Tool.from_dict(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if tool.id in places:
            raise ValueError(f"{place}: the id {tool.id!r} was already used by {places[tool.id]}; ids must be unique")
        places[tool.id] = place
        yield tool
