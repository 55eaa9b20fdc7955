"""`toolweaver gateway` as a process: what a client, an operator and an attacker see of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import anyio
import httpx2
import psutil
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import create_mcp_http_client, streamable_http_client

from toolweaver_hf.data.usage_log import load_usage


SERVERS = Path(__file__).parents[1] / "servers"
COMMAND = [sys.executable, "-m", "toolweaver_hf.cli", "gateway"]
TOKEN = "tok-4711-geheim"


@pytest.fixture
def config(tmp_path):
    def plain(name):
        return {
            "command": sys.executable,
            "args": [str(SERVERS / "plain_server.py"), name, str(tmp_path)],
            "env": {"API_TOKEN": TOKEN},
        }

    path = tmp_path / "mcp.json"
    clients = {"ide": {"token": "ide-token-1", "allow": ["p.*"]}, "all": {"token": "all-token-2"}}
    document = {"mcpServers": {"p": plain("p"), "q": plain("q"), "bad": {"command": "no-such-program"}}}
    path.write_text(json.dumps(document))
    path.with_name("tokens.json").write_text(json.dumps(document | {"clients": clients}))
    return path


def is_running(folder, name):
    path = folder / f"{name}.pid"
    return path.exists() and psutil.pid_exists(int(path.read_text()))


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


async def use(client):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = await client.call_tool("find_tools", {"query": "say a text in the voice of p", "k": 2})
        if found.structured_content["unavailable"] == ["bad"]:  # the others are up
            break
    said = await client.call_tool("call_tool", {"name": "say_p", "arguments": {"text": "hi"}})
    return found.structured_content, said.content[0].text


def test_a_client_on_standard_input_and_output(config, tmp_path):
    log = tmp_path / "log"
    options = [str(config), "--cache-dir", str(tmp_path / "cache"), "--log", str(log), "--redact"]
    parameters = StdioServerParameters(command=COMMAND[0], args=[*COMMAND[1:], *options], env=dict(os.environ))

    async def main():
        async with Client(parameters) as client:
            return await use(client)

    found, said = anyio.run(main)
    # Search has nothing but a letter to tell it from `say_q` by, and answers by words alone while it embeds the tools.
    assert "say_p" in {tool["name"] for tool in found["tools"]}
    assert 0 < found["tools"][0]["probability"] <= 1
    assert found["unavailable"] == ["bad"]
    assert said == "p: hi"
    wait_for(lambda: not is_running(tmp_path, "p") and not is_running(tmp_path, "q"))
    (row,) = load_usage(log)
    assert row["messages"][1]["tool_calls"][0]["function"] == {
        "name": "p.say_p",
        "arguments": {"text": "[redacted]"},
    }
    assert "p: hi" not in "".join(path.read_text() for path in log.iterdir())
    assert {row["id"] for row in map(json.loads, (log / "catalog.jsonl").read_text().splitlines())} >= {"q.say_q"}


@pytest.fixture
def served(config, tmp_path):
    options = [str(config.with_name("tokens.json")), "--port", "0", "--cache-dir", str(tmp_path / "cache")]
    with open(tmp_path / "stderr", "wb") as stderr:
        process = subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("3 servers at http://127.0.0.1:")
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_clients_by_http_have_tokens_and_allow_lists(served, tmp_path):
    process, url = served
    assert httpx2.post(url, json={}, timeout=120).status_code == 401
    assert httpx2.post(url, json={}, headers={"Authorization": "Bearer nonsense"}, timeout=120).status_code == 401

    async def connect(token):
        async with (
            create_mcp_http_client(headers={"Authorization": f"Bearer {token}"}) as http_client,
            Client(streamable_http_client(url, http_client=http_client)) as client,
        ):
            found, said = await use(client)
            other = await client.call_tool("call_tool", {"name": "say_q", "arguments": {"text": "hi"}})
            return found, said, other.content[0].text

    for mine in ("ide-token-1", "all-token-2"):
        found, said, other = anyio.run(connect, mine)
        assert said == "p: hi"
        names = {tool["name"] for tool in found["tools"]}
        assert "say_p" in names and ("say_q" in names) == (mine == "all-token-2")
        assert other == (
            "q: hi" if mine == "all-token-2" else "there is no tool 'say_q': find_tools tells which there are"
        )
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in (0, -signal.SIGTERM)
    wait_for(lambda: not is_running(tmp_path, "p"))
    messages = (tmp_path / "stderr").read_text()
    assert "bad is down: there is no such program" in messages
    assert "Traceback" not in messages
    for secret in (TOKEN, "ide-token-1", "all-token-2"):
        assert secret not in messages


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_no_server_outlives_the_gateway(config, tmp_path, sign):
    options = [str(config), "--cache-dir", str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*COMMAND, *options], **pipes) as process:  # its input stays open
        wait_for(lambda: is_running(tmp_path, "p") and is_running(tmp_path, "q"))
        time.sleep(0.5)
        process.send_signal(sign)
        process.wait(60)
        wait_for(lambda: not is_running(tmp_path, "p") and not is_running(tmp_path, "q"))


def test_a_gateway_that_lists_itself_is_not_started_again_and_again(config, tmp_path):
    document = json.loads(config.read_text())
    document["mcpServers"]["self"] = {
        "command": sys.executable,
        "args": [*COMMAND[1:], str(config), "--cache-dir", str(tmp_path / "cache")],
        "env": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    }
    config.write_text(json.dumps(document))
    run = subprocess.run(
        [*COMMAND, str(config), "--approve", "--cache-dir", str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "p: 5 tools approved" in run.stdout
    assert "lists this gateway as one of its own servers" in run.stderr


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ('{"mcpServers": {"a": {"comand": "x"}}}', [], "server 'a': it needs either a 'command' or a 'url'"),
        ("{", [], "is not valid JSON"),
        (None, [], "No such file"),
        ('{"mcpServers": {"a": {"command": "x"}}}', ["--time-limit", "0"], "time limit must be positive"),
        ('{"mcpServers": {"a": {"command": "x"}}}', ["--port", "{taken}"], "in use"),
        ('{"mcpServers": {"a": {"command": "x"}}}', ["--model", "{folder}"], "holds neither text_expert.json nor"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(tmp_path, text, options, message):
    path = tmp_path / "mcp.json"
    if text is not None:
        path.write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = [option.format(taken=taken.getsockname()[1], folder=tmp_path) for option in options]
        run = subprocess.run(
            [*COMMAND, str(path), *options, "--cache-dir", str(tmp_path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("toolweaver: error: ")
    assert message in line


def test_all_tools_are_approved_on_demand(config, tmp_path):
    cache = tmp_path / "cache"
    run = subprocess.run(
        [*COMMAND, str(config), "--approve", "--cache-dir", str(cache)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0
    assert "p: 5 tools approved" in run.stdout
    (path,) = cache.glob("approved-*.json")
    assert "p.say_p" in json.loads(path.read_text())["tools"]
