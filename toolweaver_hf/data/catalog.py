"""The catalog of tools: their descriptions and the schemas of their arguments."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import RepoCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..files import atomic_write, local_file
from ..push_mixin import PushToHubMixin
from .card import dataset_card
from .documents import read_documents
from .formats import Row, document_rows, find_rows, tool_fields


if TYPE_CHECKING:
    from tokenizers import Tokenizer


logger = logging.getLogger(__name__)

CATALOG_FILE = "catalog.jsonl"


@dataclass(frozen=True)
class Tool:
    """One tool that a model can choose and call.

    Args:
        id (`str`):
            Unique identifier, by which codes, queries and trajectories refer to the tool.
        description (`str`):
            What the tool does, in natural language.
        name (`str`, *optional*, defaults to `id`):
            Display name, shown to users and models.
        parameters (`dict`, *optional*):
            JSON Schema of the arguments, of type `object`. Defaults to an object without properties.
        category (`str`, *optional*):
            Category of the tool, such as that of its API.
        metadata (`dict`, *optional*):
            Additional data, stored unchanged.

    Raises:
        `ValueError`: if the id or description is empty, `parameters` is not an object schema, or a value is not
            JSON-serializable.
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
                raise ValueError(f"tool {self.id!r}: its {label} is empty; it must be a non-empty string")
        if self.category is not None and not isinstance(self.category, str):
            raise ValueError(f"tool {self.id!r}: category must be a string")
        if not isinstance(self.metadata, dict):
            raise ValueError(f"tool {self.id!r}: metadata must be a JSON object")
        if not isinstance(self.parameters, dict) or self.parameters.get("type", "object") != "object":
            raise ValueError(f"tool {self.id!r}: parameters must be a JSON Schema of type 'object'")
        if not isinstance(self.parameters.get("properties", {}), dict):
            raise ValueError(f"tool {self.id!r}: the properties of its parameters must be a JSON object")
        try:
            json.dumps(self.to_dict(), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.end]
            raise ValueError(f"tool {self.id!r}: it holds {half!r}, half of a character, which is no text") from None
        except TypeError as error:
            raise ValueError(f"tool {self.id!r}: its parameters and metadata must be JSON: {error}") from None

    @property
    def document(self) -> str:
        """`str`: The text that represents the tool: the encoder embeds it and the model memorizes it."""
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
        """`str`: Checksum of the tool's document, 16 hexadecimal digits."""
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
        """Create a tool from a row in any format that [`ToolCatalog.from_file`] supports.

        Raises:
            `ValueError`: if the format is unknown or the tool is invalid.
        """
        changes: dict[str, list[str]] = {}
        tool = _read_tool(Row("", row), changes)
        _warn("a tool", changes)
        return tool


class ToolCatalog(PushToHubMixin, Sequence[Tool]):
    """An ordered set of tools with unique ids.

    Index it by position or by id; `len`, `in` (by id) and iteration work as expected.

    Args:
        tools (`Iterable[Tool]`):
            The tools, in the order of the rows of embeddings and codes.

    Attributes:
        changes (`dict[str, list[str]]`): Maps a description of each change or omission made while reading to the ids
            of the affected tools.

    Raises:
        `ValueError`: if the catalog is empty or an id occurs twice.

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
        self.changes: dict[str, list[str]] = {}
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
        """`str`: Checksum of the ids and documents in order, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for tool in self._tools:
            digest.update(f"{tool.id}\0{tool.checksum}\0".encode())
        return digest.hexdigest()[:16]

    def create_card(self, repo_id: str) -> RepoCard:
        return dataset_card(repo_id, {"catalog": {"train": CATALOG_FILE}}, len(self))

    @classmethod
    def from_functions(cls, functions: Iterable[dict[str, Any]]) -> ToolCatalog:
        """Create a catalog from function schemas, such as the `tools` of an MCP server or of a chat API request.

        Each schema may have any format that [`ToolCatalog.from_file`] supports.

        Raises:
            `ValueError`: naming the first invalid item.

        Example:

        ```python
        >>> listed = await session.list_tools()  # an MCP client's session
        >>> catalog = ToolCatalog.from_functions(tool.model_dump() for tool in listed.tools)
        ```
        """
        rows = (row for number, item in enumerate(functions, 1) for row in find_rows(f"function {number}", item))
        return cls._read(rows, {}, "the functions")

    @classmethod
    def from_servers(cls, servers: Mapping[str, ToolCatalog | Iterable[dict[str, Any]]]) -> ToolCatalog:
        """Merge the tools of several servers into one catalog.

        Tool ids are prefixed with the server (`server.id`), so that two servers may both have a `search`. Names are
        unchanged. The server is stored in `metadata["server"]` and is the default category.

        Args:
            servers (`Mapping[str, ToolCatalog]`): Maps each server's name to its tools: a catalog or function schemas.

        Example:

        ```python
        >>> catalog = ToolCatalog.from_servers({"github": github_tools, "jira": ToolCatalog.from_file("jira.json")})
        >>> catalog["github.search"].name
        'search'
        ```
        """
        tools, changes = [], {}
        for server, listed in servers.items():
            catalog = listed if isinstance(listed, ToolCatalog) else cls.from_functions(listed)
            tools += [_of_server(tool, server) for tool in catalog]
            for change, tool_ids in catalog.changes.items():
                changes.setdefault(change, []).extend(f"{server}.{tool_id}" for tool_id in tool_ids)
        together = cls(tools)
        together.changes = changes
        return together

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> ToolCatalog:
        """Read a catalog from a local file or a file on the Hub (`hf://datasets/user/name/catalog.jsonl`).

        A `.jsonl` or `.ndjson` file has one tool per line. A `.yaml` or `.yml` file is one YAML document, and any other
        file is one JSON document (JSON Lines in a `.json` file are also accepted). A document is one of:

        - a tool, a list of tools, or an object with them under `tools`, `functions` or `functionDeclarations`;
        - the result of an MCP server's `tools/list`, with or without its JSON-RPC envelope, or a list `servers` of such
          results, each with a `name` that prefixes its tools' ids (see [`ToolCatalog.from_servers`]);
        - an OpenAPI 3 or Swagger 2.0 description, with one tool per operation (see [`~data.openapi.openapi_tools`]);
        - a ToolBench file with its `api_list`, or instructions of ToolBench, BFCL or xLAM, whose tools are merged.

        Supported formats of a tool are the rows of [`ToolCatalog.to_jsonl`]; function schemas of OpenAI, Anthropic,
        Gemini, Amazon Bedrock, LangChain, smolagents, BFCL, xLAM and API-Bank; MCP tools; documents of a BEIR corpus
        (`_id`, `title`, `text`); APIs of ToolBench, with ids `<<tool&&api>>` as in ToolGen; and tools of Seal-Tools and
        ToolRet.

        Arguments are converted to JSON Schema. The schema of a tool's output is stored as JSON Schema in
        `metadata["output_schema"]`, and unknown keys are stored unchanged in `metadata`. Changes and omissions are
        reported in a warning and in `changes`.

        Raises:
            `ValueError`: naming the file, the line or item, and the invalid tool.
            `OSError`: if the file cannot be read.
        """
        path = Path(local_file(path))
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
        changes: dict[str, list[str]] = {}

        def leave_out(place: str, reason: str) -> None:
            changes.setdefault(f"left out: {reason}", []).append(place)

        try:
            return cls._read(document_rows(read_documents(text, path), path, leave_out), changes, str(path))
        except ValueError as error:
            message = str(error)
            left_out = "; ".join(f"{', '.join(places[:3])}: {change}" for change, places in changes.items())
            if left_out and message.startswith("the catalog is empty"):
                message = f"{message} ({left_out})"
            raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None
        except RecursionError:
            raise ValueError(f"{path}: a tool's schema is nested too deeply") from None

    @classmethod
    def _read(cls, rows: Iterable[Row], changes: dict[str, list[str]], source: str) -> ToolCatalog:
        catalog = cls(_read_tools(rows, changes))
        catalog.changes = changes
        _warn(source, changes)
        return catalog

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        repo_type: Literal["dataset", "model"] = "dataset",
        **hub_kwargs,
    ) -> ToolCatalog:
        """Load `catalog.jsonl` from a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path (`str`): The folder or repository.
            repo_type (`str`, *optional*, defaults to `"dataset"`): `"model"` for a catalog in a model repository.
            hub_kwargs: Hub options of `from_pretrained`, such as `revision`, `token` and `cache_dir`.

        Raises:
            `ValueError`: naming the file, the line and the invalid tool.
            `OSError`: if the file does not exist.
        """
        if os.path.isdir(pretrained_model_name_or_path):
            return cls.from_file(Path(pretrained_model_name_or_path) / CATALOG_FILE)
        try:
            path = hf_hub_download(str(pretrained_model_name_or_path), CATALOG_FILE, repo_type=repo_type, **hub_kwargs)
        except (HFValidationError, HfHubHTTPError) as error:
            raise OSError(
                f"no {CATALOG_FILE} in {pretrained_model_name_or_path}, neither a folder nor a {repo_type} on the Hub: "
                f"{error}"
            ) from None
        return cls.from_file(path)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the catalog as `catalog.jsonl` in `folder`."""
        os.makedirs(folder, exist_ok=True)
        self.to_jsonl(Path(folder) / CATALOG_FILE)

    def to_jsonl(self, path: str | os.PathLike) -> None:
        """Write the catalog as JSON Lines, one tool per line, for [`ToolCatalog.from_file`]."""
        with atomic_write(path) as partial, open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(tool.to_dict(), ensure_ascii=False) + "\n" for tool in self)


def encoder_texts(tools: Iterable[Tool], tokenizer: Tokenizer, max_tokens: int) -> tuple[list[str], list[str]]:
    """Return the texts of the tools for an encoder: their documents, shortened to the encoder's maximum length.

    In a document that the encoder would truncate, the description is truncated instead, so that the names of the
    arguments are kept. Descriptions of the arguments are dropped.

    Args:
        tools (`Iterable[Tool]`): The tools.
        tokenizer (`tokenizers.Tokenizer`): The encoder's tokenizer.
        max_tokens (`int`): Maximum sequence length of the encoder, including special tokens.

    Returns:
        `tuple[list[str], list[str]]`: the text of each tool, and the ids of the tools with truncated documents.
    """
    tools = list(tools)
    tokenizer = type(tokenizer).from_str(tokenizer.to_str())  # a copy without truncation
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts, cut = [], []
    for tool, encoding in zip(tools, tokenizer.encode_batch([tool.document for tool in tools]), strict=True):
        texts.append(tool.document)
        if len(encoding.ids) > max_tokens:
            cut.append(tool.id)
            head = f"{tool.category}. {tool.name}: " if tool.category else f"{tool.name}: "
            names = ", ".join(tool.parameters.get("properties", {}))
            tail = f" Parameters: {names}." if names else ""
            room = max(max_tokens - len(tokenizer.encode(head + tail).ids), max_tokens // 2)
            offsets = tokenizer.encode(tool.description, add_special_tokens=False).offsets
            end = offsets[room - 1][1] if len(offsets) > room else len(tool.description)
            texts[-1] = head + tool.description[:end] + tail
    return texts, cut


def _read_tools(rows: Iterable[Row], changes: dict[str, list[str]]) -> Iterator[Tool]:
    """Convert rows to tools; errors name the row's place."""
    read: dict[str, tuple[str, Tool]] = {}
    for row in rows:
        try:
            tool = _read_tool(row, changes)
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from None
        if tool.id in read and row.listed_by is not None:
            if read[tool.id][1] == tool:
                continue
            tool = replace(tool, id=f"{row.listed_by}.{tool.id}")
        if tool.id in read:
            raise ValueError(
                f"{row.place}: the id {tool.id!r} was already used by {read[tool.id][0]}; ids must be unique. Tools of "
                "several servers are told apart by ToolCatalog.from_servers"
            )
        read[tool.id] = row.place, tool
        yield tool


def _read_tool(row: Row, changes: dict[str, list[str]]) -> Tool:
    said = list(row.changes or ())
    tool = Tool(**(row.fields if row.changes is not None else tool_fields(row.fields, said.append, row.foreign)))
    if row.server is not None:
        tool = _of_server(tool, row.server)
    for change in dict.fromkeys(said):
        changes.setdefault(change, []).append(tool.id)
    return tool


def _of_server(tool: Tool, server: str) -> Tool:
    metadata = {**tool.metadata, "server": server}
    return replace(tool, id=f"{server}.{tool.id}", category=tool.category or server, metadata=metadata)


def _warn(source: str, changes: dict[str, list[str]]) -> None:
    """Log one warning with all changes made while reading."""
    if changes:
        said = (
            f"{change} ({len(tools):,} of the tools, such as {', '.join(map(repr, tools[:3]))})"
            for change, tools in changes.items()
        )
        logger.warning(f"{source}: {'; '.join(said)}")
