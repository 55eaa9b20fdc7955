"""`ToolCodes`: the mapping from tools to codes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import cached_file

from ..data.catalog import Tool, ToolCatalog
from ..modeling_rqvae import RQVAEModel
from ..push_mixin import PushToHubMixin
from ..tool_codes_file import SCHEMA_VERSION, TOOL_CODES_FILE, check_tool_codes, write_tool_codes
from .assignment import assign_codes
from .card import TAGS, codes_facts, model_card


class CatalogChanges(NamedTuple):
    """Ids of the tools by which a catalog differs from the one that codes were learned for."""

    added: list[str]
    removed: list[str]
    changed: list[str]


class ToolCodes(PushToHubMixin, Mapping[str, tuple[int, ...]]):
    """The code of every tool: a mapping from tool id to one codebook index per level.

    Args:
        codebook_sizes (`Sequence[int]`):
            Size of the codebook of each level, 1 to 8 levels.
        codes (`Mapping[str, Sequence[int]]`):
            The code of each tool id. Codes are unique.
        checksums (`Mapping[str, str]`, *optional*):
            [`Tool.checksum`] of each tool at the time its code was learned.
        retired (`Sequence[Sequence[int]]`, *optional*):
            Codes of removed tools, which are not assigned to other tools.

    Raises:
        `ValueError`: naming the tool whose code is out of range or taken.
    """

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        codes: Mapping[str, Sequence[int]],
        checksums: Mapping[str, str] | None = None,
        retired: Sequence[Sequence[int]] = (),
    ):
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        self._codes = {tool_id: tuple(int(i) for i in code) for tool_id, code in codes.items()}
        self.checksums = dict(checksums or {})
        self.retired = {tuple(int(i) for i in code) for code in retired}
        check_tool_codes(self.to_dict(), "tool codes")

    def __getitem__(self, tool_id: str) -> tuple[int, ...]:
        return self._codes[tool_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._codes)

    def __len__(self) -> int:
        return len(self._codes)

    def __repr__(self) -> str:
        return f"ToolCodes({len(self)} tools, codebook_sizes={self.codebook_sizes})"

    @property
    def ids(self) -> list[str]:
        """`list[str]`: The tools' ids, in order."""
        return list(self._codes)

    @property
    def num_levels(self) -> int:
        """`int`: The number of levels, the length of every code."""
        return len(self.codebook_sizes)

    @property
    def matrix(self) -> np.ndarray:
        """`np.ndarray` of shape `(num_tools, num_levels)`: The codes, in the order of `ids`."""
        return np.array(list(self._codes.values()), dtype=np.int64)

    def compare(self, catalog: ToolCatalog) -> CatalogChanges:
        """Compare a catalog with the one that the codes were learned for.

        A tool counts as `changed` if its checksum differs from the one in `checksums`. Update that one if the tool is to
        keep its code; remove the tool and add it again if it is to get another.
        """
        return CatalogChanges(
            added=[tool.id for tool in catalog if tool.id not in self],
            removed=[tool_id for tool_id in self if tool_id not in catalog],
            changed=[tool.id for tool in catalog if self.checksums.get(tool.id, tool.checksum) != tool.checksum],
        )

    def add(
        self,
        tools: Sequence[Tool],
        model: RQVAEModel,
        embeddings: np.ndarray | torch.Tensor,
        reuse_retired: bool = False,
    ) -> None:
        """Assign codes to new tools with a fitted model. The codes of other tools do not change.

        An aligned language model already has the tokens of the new codes, but does not know the tools yet: train it on
        their documents and queries.

        Args:
            tools (`Sequence[Tool]`):
                The new tools.
            model ([`RQVAEModel`]):
                The RQ-VAE that the codes were learned with.
            embeddings (`np.ndarray` or `torch.Tensor` of shape `(len(tools), input_dim)`):
                Embeddings of their documents, by the encoder that the RQ-VAE was trained on.
            reuse_retired (`bool`, *optional*, defaults to `False`):
                Whether to assign codes of removed tools again. Only do so if no language model has learned them.

        Raises:
            `ValueError`: naming a tool that already has a code or whose embedding is not finite, or if there are not
                enough free codes. No tool is added then.
        """
        present = [tool.id for tool in tools if tool.id in self]
        if present:
            raise ValueError(f"the tool {present[0]!r} already has a code; remove it first to assign another")
        if len({tool.id for tool in tools}) < len(tools):
            raise ValueError("two of the new tools have the same id")
        embeddings = torch.as_tensor(embeddings, device=model.device)
        if embeddings.shape != (len(tools), model.config.input_dim):
            raise ValueError(
                f"embeddings must have the shape {(len(tools), model.config.input_dim)}, not {tuple(embeddings.shape)}"
            )
        broken = (~torch.isfinite(embeddings).all(1)).nonzero().flatten().tolist()
        if broken:
            raise ValueError(f"the embedding of the tool {tools[broken[0]].id!r} holds NaN or infinity")
        with torch.no_grad():
            latents = model.eval().encode(embeddings)
        codes = [*self.values()] if reuse_retired else [*self.values(), *self.retired]
        taken = np.array(codes, dtype=np.int64).reshape(-1, self.num_levels)
        for tool, code in zip(tools, assign_codes(latents, model.codebooks(), taken).tolist(), strict=True):
            self._codes[tool.id] = tuple(code)
            self.checksums[tool.id] = tool.checksum
            self.retired.discard(tuple(code))

    def remove(self, *tool_ids: str) -> None:
        """Remove tools. Their codes are retired, since a language model may have learned them.

        Raises:
            `ValueError`: naming a tool that has no code. No tool is removed then.
        """
        for tool_id in tool_ids:
            if tool_id not in self:
                raise ValueError(f"the tool {tool_id!r} has no code, so it cannot be removed")
        for tool_id in tool_ids:
            self.retired.add(self._codes.pop(tool_id))
            self.checksums.pop(tool_id, None)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `tool_codes.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "codebook_sizes": self.codebook_sizes,
            "codes": {tool_id: list(code) for tool_id, code in self._codes.items()},
            "checksums": self.checksums,
            "retired": sorted(list(code) for code in self.retired),
        }

    def create_card(self, repo_id: str) -> ModelCard:
        data = ModelCardData(library_name="transformers", tags=[*TAGS])
        return model_card(repo_id, data, {"kind": "codes", **codes_facts(self.to_dict())})

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `tool_codes.json` in `folder`."""
        os.makedirs(folder, exist_ok=True)
        write_tool_codes(self.to_dict(), os.path.join(folder, TOOL_CODES_FILE))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **hub_kwargs) -> ToolCodes:
        """Read `tool_codes.json` from a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path (`str`): The folder or the repository id.
            hub_kwargs: `revision`, `token`, `cache_dir`, ... as for any `from_pretrained`.

        Raises:
            `ValueError`: naming the file, if it is not valid or has a newer `schema_version`.
            `OSError`: if the file does not exist.
        """
        path = cached_file(pretrained_model_name_or_path, TOOL_CODES_FILE, **hub_kwargs)
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        document = check_tool_codes(document, str(path))
        return cls(
            document["codebook_sizes"], document["codes"], document.get("checksums"), document.get("retired") or ()
        )
