import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolweaver_hf.agent.mcp_config import Redactor, read_mcp_config, redactor_of


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


@pytest.mark.parametrize(
    ("document", "message"),
    [
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
        ({"mcpServers": {"a": {"url": "http://h", "type": "sse"}}}, "not 'sse'"),
        ({"mcpServers": {"a": {"url": "http://h", "headers": {"K": "geheim\r\nX: y"}}}}, "line breaks"),
        ({"mcpServers": {"a b": {"command": "x"}, "a_b": {"command": "x"}}}, "rename one"),
        ({"mcpServers": {"a": {"command": "x", "disabled": True}}}, "disabled"),
        ({"mcpServers": {"a": {"command": "x"}}, "clients": {"c": {"allow": "*"}}}, "client 'c'"),
    ],
)
def test_a_bad_file_is_named_with_its_entry(tmp_path, document, message):
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
            "b": {"url": "https://user:hunter2@h/mcp?key=q1w2e3&page=3", "headers": {"Authorization": "Bearer t0ken"}},
        }
    }
    servers, _ = read_mcp_config(write(tmp_path, document))
    redact = redactor_of(servers)
    text = "abc debug postgres://u:p@h/db 12 hunter2 q1w2e3 page=3 Bearer t0ken t0ken"
    shown = "[env API_KEY] debug [env DATABASE] 12 [url] [url] page=3 [header Authorization] [header Authorization]"
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
