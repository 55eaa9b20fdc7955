"""A small MCP server without any library, which starts at once and notes in a folder what it did.

Arguments: its name, the folder, and optionally a JSON list of descriptions for tools that it has besides.
"""

import json
import os
import sys
import threading
from pathlib import Path


NAME, FOLDER = sys.argv[1], Path(sys.argv[2])
TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
TOOLS = [
    {"name": f"say_{NAME}", "description": f"Say a text in the voice of {NAME}.", "inputSchema": TEXT},
    {"name": "refuse", "description": "Refuse to do anything.", "inputSchema": {"type": "object"}},
    {"name": "nap", "description": "Sleep for a while.", "inputSchema": {"type": "object"}},
    {
        "name": "learn",
        "description": "Get a tool, or another description of one, or lose one.",
        "inputSchema": {"type": "object"},
    },
    {"name": "break", "description": "Break the protocol.", "inputSchema": {"type": "object"}},
]
for i, description in enumerate(json.loads(sys.argv[3]) if len(sys.argv) > 3 else []):
    TOOLS.append({"name": f"extra_{i}", "description": description, "inputSchema": {"type": "object"}})


def send(message):
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def answer(method, params):
    if method == "initialize":
        capabilities = {"tools": {"listChanged": True}}
        info = {"name": NAME, "version": "1"}
        return {"protocolVersion": "2025-06-18", "capabilities": capabilities, "serverInfo": info}
    if method == "ping":
        return {}
    if method == "tools/list":
        return {"tools": TOOLS}
    if method == "tools/call":
        name, arguments = params["name"], params.get("arguments", {})
        with open(FOLDER / f"{NAME}.calls", "a") as file:
            file.write(json.dumps([name, arguments]) + "\n")
        if name == "refuse":
            return {"content": [{"type": "text", "text": "I refuse"}], "isError": True}
        if name == "learn":
            TOOLS[:] = [tool for tool in TOOLS if tool["name"] != arguments["name"]]
            if "description" in arguments:
                TOOLS.append({"inputSchema": {"type": "object"}, **arguments})
            send({"method": "notifications/tools/list_changed"})
        if name == "break":
            return {"content": "not a list"}
        return {"content": [{"type": "text", "text": f"{NAME}: {arguments.get('text')}"}], "_meta": {"by": NAME}}
    raise LookupError(method)


(FOLDER / f"{NAME}.pid").write_text(str(os.getpid()))
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    try:
        reply = {"result": answer(message["method"], message.get("params", {}))}
    except LookupError:
        reply = {"error": {"code": -32601, "message": "Method not found"}}
    reply["id"] = message["id"]
    if message.get("params", {}).get("name") == "nap":
        threading.Timer(message["params"]["arguments"]["seconds"], send, [reply]).start()
    else:
        send(reply)
