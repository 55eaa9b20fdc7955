"""Reading and writing files: atomic writes, JSON with a schema version, JSON lines, files on the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfFileSystem, hf_hub_download
from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath
from huggingface_hub.utils import httpx


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on success, and is deleted on failure."""
    path = Path(path)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, document: dict[str, Any], schema_version: int) -> None:
    """Write a JSON object with its `schema_version` atomically."""
    write_text(path, json.dumps({"schema_version": schema_version, **document}, indent=2, ensure_ascii=False))


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        `ValueError`: naming the file, if it is not a JSON object.
        `OSError`: if it cannot be read.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(document).__name__}")
    return document


def read_json(path: str | os.PathLike, schema_version: int) -> dict[str, Any]:
    """Read a JSON object whose `schema_version` is at most the given one; a file without one has version 0.

    Raises:
        `ValueError`: naming the file, if it is not a JSON object or has a newer version.
        `OSError`: if it cannot be read.
    """
    document = read_object(path)
    found = document.get("schema_version", 0)
    if type(found) is not int:
        raise ValueError(f"{path}: schema_version must be a whole number, not {found!r}")
    if found > schema_version:
        raise ValueError(
            f"{path} has schema_version {found}, newer than {schema_version}, which this version reads: upgrade "
            "toolweaver-hf"
        )
    return document


def truncate_partial_line(path: str | os.PathLike) -> None:
    """Remove the last line of a JSONL file if it is incomplete, as after an interrupted run."""
    path = Path(path)
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def read_rows(path: str | os.PathLike, bad_rows: list[str] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Read the rows of a JSONL file, or of a JSON list, each with its position for error messages.

    A `.json` file of several lines, of which the first is a whole JSON object, is JSONL as well. The file may be on the
    Hub: `hf://datasets/user/name/file.jsonl`. Where `bad_rows` is given, a row that is not a JSON object is left out,
    and what is wrong with it is added to this list.

    Raises:
        `ValueError`: naming the file and the line or item that is not a JSON object.
    """
    rows: list[tuple[str, dict[str, Any]]] = []

    def add(place: str, load: Callable[[], Any]) -> None:
        try:
            row = load()
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected a JSON object, not {type(row).__name__}")
            _check_characters(row, place)
            rows.append((place, row))
        except ValueError as error:
            if bad_rows is None:
                raise
            bad_rows.append(str(error))

    with open(local_file(path), "rb") as file:  # each line is decoded by itself, so that an error names it
        lines: Iterable[bytes] = file
        if os.fspath(path).endswith(".json"):
            lines = file.readlines()
        if isinstance(lines, list) and not (len(lines) > 1 and _is_object(lines[0])):
            items = _parse(b"".join(lines), str(path))
            if not isinstance(items, list):
                raise ValueError(f"{path} holds no list of rows")
            for number, item in enumerate(items, start=1):
                add(f"{path}, item {number}", lambda item=item: item)
        else:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    add(place, lambda line=line, place=place: _parse(line, place))
    return rows


def _check_characters(row: dict[str, Any], place: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and no text can hold."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise ValueError(f"{place} holds {half!r}, half of a character, which is no text") from None


def _is_object(line: bytes) -> bool:
    """Return whether a line is a whole JSON object, as in files of JSON lines that are named `.json`."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse(text: bytes, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None


def local_file(path: str | os.PathLike) -> str | os.PathLike:
    """Return a local path as it is, and download a file such as `hf://datasets/user/name/queries.jsonl`.

    Raises:
        `OSError`: if the Hub cannot be reached or has no such file.
    """
    if not os.fspath(path).startswith("hf://"):
        return path
    try:
        found = HfFileSystem().resolve_path(os.fspath(path))
        if not isinstance(found, HfFileSystemResolvedRepositoryPath):
            raise ValueError("a bucket's files are not read")
        return hf_hub_download(found.repo_id, found.path_in_repo, repo_type=found.repo_type, revision=found.revision)
    except (ValueError, OSError, httpx.TransportError, NotImplementedError) as error:
        raise OSError(f"cannot get {path} from the Hub: {error}") from None
