"""`Approvals`: checksums of approved tools, to detect later changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.utils import WeakFileLock

from ..files import read_json, write_json


if TYPE_CHECKING:
    from mcp import types


logger = logging.getLogger(__name__)

APPROVALS_VERSION = 1


class Approvals:
    """The checksums of approved tools, stored in a file that several gateways may share.

    A tool is approved when it is first seen. If its description, schema or annotations change later, the change is
    logged, because a model would follow the new text as it did the old one. With `pin`, changed tools are held back
    until they are approved again.

    Args:
        path (`str`):
            The file.
        pin (`bool`, *optional*, defaults to `False`):
            Whether to hold back changed tools.
        approve (`bool`, *optional*, defaults to `False`):
            Whether to approve all tools in their current version.

    Raises:
        `ValueError`: naming the file, if it is not an approvals file.
    """

    def __init__(self, path: str | os.PathLike, pin: bool = False, approve: bool = False):
        self.path, self.pin, self.approve = Path(path), pin, approve
        self._reported: dict[str, str] = {}
        self._approved = self._read()

    def check(self, tools: Mapping[str, types.Tool]) -> set[str]:
        """Compare tools with their approved checksums, and approve new tools.

        Args:
            tools (`Mapping[str, mcp.types.Tool]`): The tools by id.

        Returns:
            `set[str]`: The ids of the tools to hold back.

        Raises:
            `ValueError` or `OSError`: with `approve`, if the file cannot be read or written. Without it, this is logged,
                and the approvals are kept in memory.
        """
        now = {tool_id: _checksum(tool) for tool_id, tool in tools.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(f"{self.path}.lock"):
                stored = self._read()  # other gateways approve tools, too
                self._approved |= stored
                changed = self._compare(now)
                if self._approved != stored:
                    write_json(self.path, {"tools": self._approved}, APPROVALS_VERSION)
        except (ValueError, OSError) as error:
            if self.approve:
                raise
            logger.warning("the approved tools cannot be stored: %s", error)
            changed = self._compare(now)
        return changed if self.pin and not self.approve else set()

    def _read(self) -> dict[str, str]:
        if not self.path.exists():
            return {}
        tools = read_json(self.path, APPROVALS_VERSION).get("tools")
        if not isinstance(tools, dict) or not all(isinstance(checksum, str) for checksum in tools.values()):
            raise ValueError(f"{self.path} must hold the checksums of approved tools under 'tools'")
        return tools

    def _compare(self, now: dict[str, str]) -> set[str]:
        """Approve new tools, and return the ids of those that have changed."""
        changed = {tool_id for tool_id, checksum in now.items() if self._approved.get(tool_id, checksum) != checksum}
        for tool_id in sorted(changed):
            if self._reported.get(tool_id) != now[tool_id]:
                self._reported[tool_id] = now[tool_id]
                outcome = "approved" if self.approve else "held back" if self.pin else "served all the same"
                logger.warning("the tool %s has changed since it was approved: it is %s", tool_id, outcome)
        self._approved = self._approved | now if self.approve else now | self._approved
        return changed


def _checksum(tool: types.Tool) -> str:
    text = json.dumps(tool.model_dump(mode="json", by_alias=True, exclude_none=True), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
