"""`mcp.json`: the configuration of MCP servers and of a gateway's clients, and its secrets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_plus, urlsplit


VARIABLE = re.compile(r"\$\{(?:(env|input|command|config):(?!-))?([^}:]+)(?::-([^}]*))?\}")
STRING = r'("(?:[^"\\]|\\.)*")'
COMMENT = re.compile(STRING + r"|//[^\n]*|/\*.*?\*/", re.DOTALL)
TRAILING_COMMA = re.compile(STRING + r"|,(?=\s*[}\]])")
ENV_LINE = re.compile(r"""\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(?:"([^"]*)"|'([^']*)'|(.*?))\s*(?:(?<=\s)#.*)?""")
KINDS = (None, "stdio", "http", "streamable-http", "streamableHttp", "streamable_http", "sse")
SECRET_NAME = re.compile(r"key|token|secret|pass|pwd|auth|cred|cookie|session|signature", re.IGNORECASE)
SCHEMA_TEXTS = ("title", "description", "default", "examples")


@dataclass(frozen=True)
class ServerConfig:
    """The configuration of one MCP server.

    Args:
        name (`str`):
            The server's name, which prefixes the ids of its tools.
        command (`str`, *optional*):
            The program of a stdio server.
        args (`list[str]`, *optional*):
            The program's arguments.
        env (`dict[str, str]`, *optional*):
            Environment variables, in addition to `PATH`, `HOME` and other defaults.
        cwd (`str`, *optional*):
            The working directory.
        url (`str`, *optional*):
            The URL of an HTTP server.
        headers (`dict[str, str]`, *optional*):
            HTTP headers of each request.
        sse (`bool`, *optional*, defaults to `False`):
            Whether the HTTP server uses the older HTTP+SSE transport instead of streamable HTTP.
    """

    name: str
    command: str | None = None
    args: list[str] = field(default_factory=list, repr=False)
    env: dict[str, str] = field(default_factory=dict, repr=False)
    cwd: str | None = None
    url: str | None = field(default=None, repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    sse: bool = False

    @property
    def secrets(self) -> dict[str, str]:
        """`dict[str, str]`: Maps secret values to their placeholders."""
        found = {}
        for name, value in self.env.items():
            if _is_secret(name, value):
                found[value] = f"[env {name}]"
        for name, value in self.headers.items():
            for part in {value, value.split(" ", 1)[-1]}:  # also the token after "Bearer"
                if _is_secret(name, part):
                    found[part] = f"[header {name}]"
        if self.url:
            address = urlsplit(self.url)
            parameters = [pair.partition("=")[::2] for pair in address.query.split("&")]
            for name, value in [("auth", address.password or ""), *parameters]:
                for form in {value, unquote(value), unquote_plus(value)}:  # errors may hold any of them
                    if _is_secret(name, form):
                        found[form] = "[url]"
        return found


def _is_secret(name: str, value: str) -> bool:
    """Whether a setting is secret: by its name, or unless its value is short, a word such as `debug`, or a number."""
    if SECRET_NAME.search(name):
        return len(value) >= 3
    return len(value) >= 6 and not value.isalpha() and not value.isdecimal()


class Redactor:
    """Replaces secrets by placeholders, in strings and JSON values.

    Args:
        secrets (`Mapping[str, str]`): Maps secrets to their placeholders.
    """

    def __init__(self, secrets: Mapping[str, str]):
        self._secrets = dict(secrets)
        longest_first = sorted(self._secrets, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(self, value: Any) -> Any:
        """Return a copy of a JSON value with all secrets replaced, also in its keys."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._secrets[match[0]], value)
        if isinstance(value, Mapping):
            return {self(key): self(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self(item) for item in value]
        return value

    def schema(self, schema: Any) -> Any:
        """Return a copy of a JSON Schema with the secrets in its texts replaced, but not in what arguments must match."""
        if isinstance(schema, Mapping):
            return {
                key: self(item) if key in SCHEMA_TEXTS and not isinstance(item, Mapping) else self.schema(item)
                for key, item in schema.items()
            }
        return [self.schema(item) for item in schema] if isinstance(schema, list) else schema


def redactor_of(configs: Iterable[ServerConfig], others: Mapping[str, str] | None = None) -> Redactor:
    """Create a redactor of the secrets of several servers."""
    secrets = dict(others or {})
    for config in configs:
        secrets |= config.secrets
    return Redactor(secrets)


def read_mcp_config(path: str | os.PathLike) -> tuple[list[ServerConfig], dict[str, ClientConfig]]:
    """Read the `mcp.json` of Claude Desktop, Cursor or VS Code, also with comments and trailing commas.

    Servers are read from `mcpServers` (VS Code: `servers`, or `mcp.servers` in its settings). The gateway's own key
    `clients` maps client names to their `token` and `allow`, the patterns of the tool ids that they may use. `${NAME}`,
    `${env:NAME}` and `${NAME:-default}` are replaced by environment variables, `${userHome}` and `${workspaceFolder}`
    by folders. Disabled servers are skipped.

    Args:
        path (`str`): The file.

    Returns:
        `tuple`: the servers in order, and the clients by name.

    Raises:
        `ValueError`: naming the file and the invalid entry, without the values of settings.
        `OSError`: if the file cannot be read.
    """
    document = _read_jsonc(path)
    settings = document.get("mcp")  # in VS Code's settings.json
    nested = settings.get("servers") if isinstance(settings, dict) else None
    entries = document.get("mcpServers", document.get("servers", nested))
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path}: it needs 'mcpServers', an object with at least one server")
    configs: dict[str, ServerConfig] = {}
    folders = _folders(path)
    for name, entry in entries.items():
        place = f"{path}, server {name!r}"
        config = _read_server(name, entry, place, folders)
        if config is None:
            continue
        if config.name in configs:
            raise ValueError(f"{place}: another server is called {config.name!r}, too; rename one")
        configs[config.name] = config
    if not configs:
        raise ValueError(f"{path}: all of its servers are disabled")
    clients = document.get("clients", {})
    if not isinstance(clients, dict):
        raise ValueError(f"{path}: its 'clients' must be an object")
    found: dict[str, ClientConfig] = {}
    for name, entry in clients.items():
        client = _read_client(name, entry, f"{path}, client {name!r}")
        twin = next((other.name for other in found.values() if other.token == client.token), None)
        if twin is not None:
            raise ValueError(f"{path}, client {name!r}: its token is that of {twin!r}, too; give each its own")
        found[name] = client
    return list(configs.values()), found


@dataclass(frozen=True)
class ClientConfig:
    """A client of the gateway: its HTTP bearer token, and patterns of the tools that it may use."""

    name: str
    token: str = field(repr=False)
    allow: tuple[str, ...] = ("*",)


def _read_jsonc(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON object that may have comments and trailing commas, as VS Code's files do."""

    def blank(match: re.Match[str]) -> str:
        return match[1] or re.sub(r"[^\n]", " ", match[0])  # strings stay, and errors tell the right line

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        document = json.loads(TRAILING_COMMA.sub(blank, COMMENT.sub(blank, text)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(document).__name__}")
    return document


def _folders(path: str | os.PathLike) -> dict[str, str]:
    """Return the variables of editors that name folders, for a file in a project's `.vscode` or `.cursor`, or in it."""
    folder = Path(path).absolute().parent
    workspace = folder.parent if folder.name in (".vscode", ".cursor") else folder
    return {
        "userHome": str(Path.home()),
        "workspaceFolder": str(workspace),
        "workspaceFolderBasename": workspace.name,
        "pathSeparator": os.sep,
        "/": os.sep,
    }


def _read_server(name: str, entry: Any, place: str, folders: Mapping[str, str]) -> ServerConfig | None:
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: it must be an object, not {type(entry).__name__}")
    if entry.get("disabled") is True or entry.get("enabled") is False:
        return None
    kind = entry.get("type", entry.get("transport"))
    if kind not in KINDS:
        raise ValueError(f"{place}: its type must be 'stdio', 'http' (streamable HTTP) or 'sse', not {kind!r}")
    if (entry.get("command") is None) == (entry.get("url") is None):
        raise ValueError(f"{place}: it needs either a 'command' or a 'url'")
    names = ("command", "args", "env", "envFile", "cwd", "url", "headers")
    fields = {key: entry[key] for key in names if entry.get(key) is not None}
    for key, value in fields.items():
        wanted = {"args": list, "env": dict, "headers": dict}.get(key, str)
        if not isinstance(value, wanted) or (not value and wanted is str):
            raise ValueError(
                f"{place}: its {key!r} must be a {'non-empty string' if wanted is str else wanted.__name__}"
            )
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if not all(isinstance(item, str | int | float) for item in items):
            raise ValueError(f"{place}: its {key!r} must hold strings")
        fields[key] = _expand(value, f"{place}, {key!r}", folders)
    if "envFile" in fields:
        env_file = Path(folders["workspaceFolder"], fields.pop("envFile"))
        fields["env"] = _read_env_file(env_file, f"{place}, 'envFile'") | fields.get("env", {})
    if "url" in fields and urlsplit(fields["url"]).scheme not in ("http", "https"):
        raise ValueError(f"{place}: its 'url' must begin with http:// or https://")
    bad = next((text for text in _texts(fields) if "\0" in text), None)
    if bad is not None or any("\n" in value or "\r" in value for value in fields.get("headers", {}).values()):
        raise ValueError(f"{place}: its settings must not hold null characters, nor its headers line breaks")
    # Where nothing else is said, the path that servers of the older transport have by convention tells them.
    sse = kind == "sse" or (
        kind in (None, "http") and urlsplit(fields.get("url", "")).path.rstrip("/").endswith("/sse")
    )
    return ServerConfig(re.sub(r"[^A-Za-z0-9_-]+", "_", name) or "_", **fields, sse=sse)


def _read_env_file(path: Path, place: str) -> dict[str, str]:
    """Read a file of `NAME=value` lines, also with quotes, comments and `export`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{place}: {path} cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}"
        ) from None
    found = [ENV_LINE.fullmatch(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return {match[1]: next(text for text in match.groups()[1:] if text is not None) for match in found if match}


def _read_client(name: str, entry: Any, place: str) -> ClientConfig:
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: it must be an object, not {type(entry).__name__}")
    token, allow = entry.get("token"), entry.get("allow", ["*"])
    token = _expand(token, f"{place}, 'token'", {}) if isinstance(token, str) else ""
    if not token:
        raise ValueError(f"{place}: it needs a 'token', a non-empty string")
    if not isinstance(allow, list) or not all(isinstance(pattern, str) for pattern in allow):
        raise ValueError(f"{place}: its 'allow' must be a list of tools' ids, such as 'github.*'")
    return ClientConfig(name, token, tuple(allow))


def _expand(value: Any, place: str, folders: Mapping[str, str]) -> Any:
    """Expand variables, and convert numbers to strings."""
    if isinstance(value, dict):
        return {key: _expand(item, f"{place}, {key!r}", folders) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, place, folders) for item in value]
    if not isinstance(value, str):
        return str(value).lower() if isinstance(value, bool) else str(value)

    def replace(match: re.Match[str]) -> str:
        kind, name, default = match.groups()
        if kind not in (None, "env"):
            raise ValueError(
                f"{place}: {match[0]} is known to the editor alone: use an environment variable, ${{env:NAME}}"
            )
        if kind is None and name in folders:
            return folders[name]
        if re.fullmatch(r"[A-Za-z_]\w*", name) is None:
            return match[0]  # not a variable
        found = os.environ.get(name, default)
        if found is None:
            raise ValueError(f"{place}: the environment has no variable {name!r}")
        return found

    return VARIABLE.sub(replace, value)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
