"""The queries as they were written, before any is dropped: a file that a run adds to and goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Protocol

from tqdm.auto import tqdm

from ..data.catalog import ToolCatalog
from ..files import read_rows, truncate_partial_line
from .generators import Request
from .prompts import PROMPT_VERSION, STYLES


KEY = ("tools", "checksums", "styles", "seed", "generator", "prompt")


class Generator(Protocol):
    """What writes queries: [`LocalGenerator`], [`EndpointGenerator`], or any callable like them."""

    name: str

    def __call__(self, requests: Sequence[Request]) -> Iterable[list[str]]: ...


def query_requests(
    catalog: ToolCatalog, groups: Iterable[Sequence[str]], num_queries: int, seed: int = 0
) -> list[Request]:
    """Ask for so many queries of each group of tools, in styles that take turns, each request with a seed of its own."""
    requests = []
    for group in groups:
        # Drawn from the ids, so that nothing is asked again when other tools come or go. Each group starts with
        # another style: all are equally many in the end
        drawn = int(hashlib.sha256(" ".join([str(seed), *group]).encode()).hexdigest()[:7], 16)
        first = drawn % len(STYLES)
        styles = tuple(islice(cycle(STYLES), first, first + num_queries))
        requests.append(Request(tuple(catalog[tool_id] for tool_id in group), styles, drawn))
    return requests


def write_candidates(
    path: str | os.PathLike, requests: Sequence[Request], generator: Generator, show_progress_bar: bool = False
) -> None:
    """Let a generator write what is not in the file yet. A line holds the texts of one request.

    Args:
        path (`str`):
            JSONL file. Each line is added whole as soon as it is there, so that the next run goes on with the rest. A
            request is written again for another generator, seed or number of queries, and where a tool's document has
            changed.
        requests (`Sequence[Request]`):
            What is asked for.
        generator (`Callable`):
            What writes.
        show_progress_bar (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Raises:
        `ValueError`: naming the line of the file that is no candidate.
        `OSError`: if an endpoint does not answer.
    """
    done = {_key_of_row(row) for _, row in _rows(path)}
    missing = [request for request in requests if _key(request, generator.name) not in done]
    # Drawn at every step: a batch's tools come all at once, and the next of them a minute later.
    bar = {"desc": "Writing queries", "unit": "tool", "mininterval": 0, "disable": not show_progress_bar}
    with (
        tqdm(total=len(requests), initial=len(requests) - len(missing), **bar) as progress,
        open(path, "a", encoding="utf-8") as file,
    ):
        for request, texts in zip(missing, generator(missing), strict=True):
            key = dict(zip(KEY, _key(request, generator.name), strict=True))
            file.write(json.dumps({**key, "texts": texts}, ensure_ascii=False) + "\n")
            file.flush()
            progress.update()


def read_candidates(path: str | os.PathLike, requests: Sequence[Request], generator: str) -> list[dict]:
    """Return what was written for these requests as rows of queries, in the order of the requests.

    Args:
        path (`str`): The file of [`write_candidates`].
        requests (`Sequence[Request]`): Which ones.
        generator (`str`): Name of the generator that wrote them.

    Returns:
        `list[dict]`: rows of `id`, `text`, `tools`, `group` (the tier of how vague the query is) and `source` (generator,
        version and style of the prompt, seed).
    """
    found = {_key_of_row(row): row for _, row in _rows(path)}
    queries = []
    for request in requests:
        row = found.get(_key(request, generator), {"texts": []})
        for number, (style, text) in enumerate(zip(request.styles, row["texts"], strict=False)):
            source = {"generator": row["generator"], "prompt": f"{row['prompt']}/{style}", "seed": row["seed"]}
            queries.append(
                {
                    "id": f"{'+'.join(row['tools'])}#{number}",
                    "text": text,
                    "tools": row["tools"],
                    "group": STYLES[style].tier,
                    "source": source,
                }
            )
    return queries


def _rows(path: str | os.PathLike) -> Iterator[tuple[str, dict]]:
    if not Path(path).exists():
        return
    truncate_partial_line(path)
    for place, row in read_rows(path):
        lists = all(isinstance(row.get(name), list) for name in ("tools", "checksums", "styles", "texts"))
        if not lists or not all(name in row for name in KEY):
            raise ValueError(f"{place} is no line of candidates: give another --output, or delete the file")
        yield place, row


def _key(request: Request, generator: str) -> tuple:
    """Return what a request is recognized by, the values of `KEY`."""
    checksums = tuple(tool.checksum for tool in request.tools)
    return tuple(tool.id for tool in request.tools), checksums, request.styles, request.seed, generator, PROMPT_VERSION


def _key_of_row(row: dict) -> tuple:
    return tuple(tuple(row[name]) if isinstance(row[name], list) else row[name] for name in KEY)
