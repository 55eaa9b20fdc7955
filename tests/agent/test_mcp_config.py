import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolweaver_hf.agent.mcp_config import Redactor, _read_jsonc, read_mcp_config, redactor_of


def write(tmp_path, document):
    path = tmp_path / "mcp.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_what_people_have_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "Oslo")
    document = {
        "mcpServers": {
            "time": {"command": "uvx", "args": ["mcp-server-time", "--port", 80], "env": {"TZ": "${env:PLACE}"}},
            "My Server": {
                "type": "http",
                "url": "https://h/mcp",
                "headers": {"Authorization": "Bearer ${NO:-abcdef}"},
            },
            "off": {"command": "x", "disabled": True},
            "more": {"command": "x", "autoApprove": ["y"], "timeout": 5},
        },
        "clients": {"ide": {"token": "tok", "allow": ["time.*"]}},
    }
    servers, clients = read_mcp_config(write(tmp_path, document))
    assert [server.name for server in servers] == ["time", "My_Server", "more"]
    assert servers[0].args == ["mcp-server-time", "--port", "80"]
    assert servers[0].env == {"TZ": "Oslo"}
    assert servers[1].headers == {"Authorization": "Bearer abcdef"}
    assert clients["ide"].allow == ("time.*",)
    (server,), _ = read_mcp_config(write(tmp_path, {"servers": {"a": {"command": "x"}}, "inputs": []}))  # VS Code's
    assert server.command == "x"


VS_CODE = r"""{
  // Servers of this project
  "inputs": [],
  "servers": {
    "files": {
      "type": "stdio",
      "command": "npx", /* "command": "uvx", */
      "args": ["-y", "// no comment", "${workspaceFolder}/src", "a, }", "\"/*\"", "${unknown-thing}",],
      "envFile": "${workspaceFolder}/.env",
      "env": {"B": "from mcp.json", "HOME_": "${userHome}"},
    },
    "old": {"type": "sse", "url": "http://localhost/events"},
    "older": {"url": "https://h/sse/"},
    "new": {"type": "http", "url": "https://h/mcp", "headers": null},
    "off": {"command": "x", "enabled": false},
  },
}"""


def test_vs_code_writes_comments_variables_and_env_files(tmp_path):
    (tmp_path / ".vscode").mkdir()
    (tmp_path / ".env").write_text("# secrets\nexport A='x y' # one\nB=from .env\nC = plain#1 # two\n\nnonsense\n")
    path = tmp_path / ".vscode" / "mcp.json"
    path.write_text("\ufeff" + VS_CODE, encoding="utf-8")
    files, old, older, new = read_mcp_config(path)[0]
    assert files.args == ["-y", "// no comment", f"{tmp_path}/src", "a, }", '"/*"', "${unknown-thing}"]
    assert files.env == {"A": "x y", "B": "from mcp.json", "C": "plain#1", "HOME_": str(Path.home())}
    assert [server.sse for server in (files, old, older, new)] == [False, True, True, False]
    settings = {"editor.tabSize": 2, "mcp": {"servers": {"a": {"command": "x"}}}}
    assert read_mcp_config(write(tmp_path, settings))[0][0].command == "x"


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_no_text_is_taken_for_a_comment(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "mcp.json"
    path.write_text(json.dumps({"value": value}, indent=1).replace("\n", " // , ]\n/* } */"), encoding="utf-8")
    assert _read_jsonc(path) == {"value": value}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"mcpServers": {\n // one\n "a" 1}}', "line 3"),
        ({"mcpServers": {"a": {"command": "x", "env": {"K": "${input:key}"}}}}, "${input:key} is known to the editor"),
        ({"mcpServers": {"a": {"command": "x", "envFile": "no.env"}}}, "no.env cannot be read: No such file"),
        ("{", "not valid JSON"),
        ([], "must hold a JSON object"),
        ({}, "needs 'mcpServers'"),
        ({"mcpServers": {}}, "at least one server"),
        ({"mcpServers": {"a": 1}}, "server 'a': it must be an object"),
        ({"mcpServers": {"a": {}}}, "server 'a': it needs either a 'command' or a 'url'"),
        ({"mcpServers": {"a": {"command": "x", "url": "http://h"}}}, "either"),
        ({"mcpServers": {"a": {"command": ["x"]}}}, "'command' must be a non-empty string"),
        ({"mcpServers": {"a": {"command": "x", "args": "y"}}}, "'args' must be a list"),
        ({"mcpServers": {"a": {"command": "x", "env": {"K": ["geheim"]}}}}, "'env' must hold strings"),
        ({"mcpServers": {"a": {"command": "x", "env": {"K": "${MISSING_VARIABLE}"}}}}, "MISSING_VARIABLE"),
        ({"mcpServers": {"a": {"url": "ftp://geheim@h"}}}, "begin with http"),
        ({"mcpServers": {"a": {"url": "http://h", "type": "ws"}}}, "not 'ws'"),
        ({"mcpServers": {"a": {"url": "http://h", "headers": {"K": "geheim\r\nX: y"}}}}, "line breaks"),
        ({"mcpServers": {"a b": {"command": "x"}, "a_b": {"command": "x"}}}, "rename one"),
        ({"mcpServers": {"a": {"command": "x", "disabled": True}}}, "disabled"),
        ({"clients": {"c": {"token": "geheim", "allow": "*"}}}, "client 'c': its 'allow' must be a list"),
        ({"clients": {"c": {"tokne": "geheim"}}}, "client 'c': it needs a 'token'"),
        ({"clients": {"c": {"token": "${NO_TOKEN:-}"}}}, "client 'c': it needs a 'token'"),
        (
            {"clients": {"b": {"token": "geheim"}, "c": {"token": "geheim"}}},
            "client 'c': its token is that of 'b', too",
        ),
    ],
)
def test_a_bad_file_is_named_with_its_entry(tmp_path, document, message):
    if "clients" in document:
        document = {"mcpServers": {"a": {"command": "x"}}} | document
    path = write(tmp_path, document)
    with pytest.raises(ValueError, match=r"mcp\.json") as error:
        read_mcp_config(path)
    assert message in str(error.value)
    assert "geheim" not in str(error.value)


def test_secrets_are_found(tmp_path):
    document = {
        "mcpServers": {
            "a": {
                "command": "x",
                "env": {"API_KEY": "abc", "LEVEL": "debug", "DATABASE": "postgres://u:p@h/db", "N": "12"},
            },
            "b": {
                "url": "https://user:hunter2@h/mcp?key=q1%2Fw2&page=3",
                "headers": {"Authorization": "Bearer t0ken", "X-Mode": "read"},
            },
        }
    }
    servers, _ = read_mcp_config(write(tmp_path, document))
    redact = redactor_of(servers)
    text = "abc debug postgres://u:p@h/db 12 hunter2 q1/w2 q1%2Fw2 page=3 Bearer t0ken t0ken thread"
    shown = "[env API_KEY] debug [env DATABASE] 12 [url] [url] [url] page=3 "
    shown += "[header Authorization] [header Authorization] thread"
    assert redact(text) == shown
    assert "hunter2" not in repr(servers) + repr(redact)


values = st.recursive(
    st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(values, st.text(min_size=3, alphabet="abc"))
def test_no_secret_is_left_anywhere(value, secret):
    redact = Redactor({secret: "[*]"})
    assert secret not in json.dumps(redact(value), ensure_ascii=False)
    assert secret not in json.dumps(redact({"x": [value, secret, {secret: f"a{secret}b"}]}), ensure_ascii=False)
