"""The files of a run: written whole or not at all, those of JSON with the version of their format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a file's writer another name to write to, which becomes `path` once all is written."""
    path = Path(path)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, document: dict[str, Any], schema_version: int) -> None:
    """Write a JSON object with its `schema_version`, whole or not at all."""
    write_text(path, json.dumps({"schema_version": schema_version, **document}, indent=2, ensure_ascii=False))


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        `ValueError`: naming the file, if it is no JSON object.
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
    """Read a JSON object of `schema_version` or older; a file without one is of version 0.

    Raises:
        `ValueError`: naming the file, if it is no JSON object or of a newer version.
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
    """Cut off the last line of a JSONL file that a run adds to, if the run ended before the line was whole."""
    path = Path(path)
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
