import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from conftest import small_llama
from transformers import AutoModelForCausalLM, pipeline
from transformers.utils.import_utils import is_serve_available

from toolweaver_hf import ToolRetrievalPipeline, ToolRetriever
from toolweaver_hf.serving import save_inference_code


QUERIES = ["Will it rain?", "How many dollars is a euro today, and was it more in the spring?", "x"]


@pytest.fixture
def folder(tokenizer, tmp_path):
    path = tmp_path / "aligned"
    small_llama(len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(path)
    tokenizer.save_pretrained(path)
    save_inference_code(path)
    return path


def run_without_the_package(code, folder, tmp_path):
    """Run Python where `toolweaver_hf` cannot be imported, and return what it prints as JSON."""
    blocker = "import sys; sys.modules['toolweaver_hf'] = None\n"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "FOLDER": str(folder)}
    output = subprocess.run([sys.executable, "-c", blocker + code], env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    return json.loads(output.stdout.splitlines()[-1])


def test_the_pipeline_ranks_as_the_retriever_does(folder):
    retriever = ToolRetriever.from_pretrained(folder)
    retrieve = pipeline("tool-retrieval", model=str(folder), trust_remote_code=True)
    for batch_size in (1, 2):
        for found, expected in zip(retrieve(QUERIES, batch_size=batch_size), retriever(QUERIES), strict=True):
            assert [tool["tool_id"] for tool in found] == [tool.tool_id for tool in expected]
            assert all(math.isclose(a["score"], b.score, abs_tol=1e-4) for a, b in zip(found, expected, strict=True))
    (found,) = retrieve(QUERIES[0], top_k=1, allowed_tools=["mail", "wind"], num_beams=2)
    assert found["tool_id"] in ("mail", "wind")
    assert len(list(retrieve(query for query in QUERIES))) == 3
    with pytest.raises(ValueError, match="takes no temperature"):
        retrieve(QUERIES[0], temperature=1)


def test_the_pipeline_saves_itself(folder, tmp_path):
    made = pipeline("tool-retrieval", model=str(folder), trust_remote_code=True, pipeline_class=ToolRetrievalPipeline)
    made.save_pretrained(tmp_path / "again")
    again = pipeline("tool-retrieval", model=str(tmp_path / "again"), trust_remote_code=True)
    assert again(QUERIES) == made(QUERIES)


@pytest.mark.slow
def test_the_folder_works_where_the_package_is_not_installed(folder, tmp_path):
    code = """
import json, os, torch
from transformers import AutoModelForCausalLM, pipeline
from transformers.utils.import_utils import is_serve_available
retrieve = pipeline("tool-retrieval", model=os.environ["FOLDER"], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(os.environ["FOLDER"], trust_remote_code=True)
prompt = torch.tensor([retrieve.retriever.encode_query("Will it rain?")])
forced = model.generate(input_ids=prompt, max_new_tokens=2, do_sample=False, code_start="forced")
print(json.dumps([retrieve("Will it rain?"), retrieve.tokenizer.decode_tool(forced[0, -2:])]))
"""
    found, forced = run_without_the_package(code, folder, tmp_path)
    expected = ToolRetriever.from_pretrained(folder)("Will it rain?")[0]
    assert [tool["tool_id"] for tool in found] == [tool.tool_id for tool in expected]
    assert forced in {tool.tool_id for tool in expected}


def test_generate_of_a_trusted_folder_names_tools_that_exist(folder, tokenizer):
    trusted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompts = torch.tensor([[5, 6, 7], [0, 8, tokenizer.encode_tool("mail")[0]]])
    settings = {
        "attention_mask": (prompts > 0).long(),
        "do_sample": True,
        "num_return_sequences": 8,
        "max_new_tokens": 2,
    }
    for arguments, allowed in (({}, tokenizer.tool_ids), ({"allowed_tools": ["fx", "wind"]}, ["fx", "wind"])):
        output = trusted.generate(prompts, code_start="forced", **settings, **arguments)
        assert {tokenizer.decode_tool(row[-2:]) for row in output} <= set(allowed)
    with pytest.raises(ValueError, match="unknown: snow"):
        trusted.generate(prompts, allowed_tools=["rain", "snow"])
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.generate.__func__ is type(plain).generate


def test_an_adapter_alone_is_left_as_it_is(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_inference_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="transformers[serving] is not installed")
def test_transformers_serve_names_tools_that_exist(folder, tokenizer):
    model = small_llama(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.lm_head.weight.data[tokenizer.code_token_ids] *= 50  # a model that is fond of codes
    model.save_pretrained(folder)
    save_inference_code(folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--trust-remote-code"]
    server = subprocess.Popen([*command, "--port", str(port), "--device", "cpu"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://localhost:{port}/health").read()
                break
            assert server.poll() is None
            time.sleep(0.25)
        body = {
            "model": str(folder),
            "messages": [{"role": "user", "content": "Rain?"}],
            "max_tokens": 60,
            "temperature": 1.0,
        }
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.loads(urllib.request.urlopen(request).read())["choices"][0]["message"]["content"]
    finally:
        server.terminate()
        server.wait()
    written = re.findall(r"<a_\d>(?:<b_\d>)?", answer)
    codes = {
        "".join(tokenizer.convert_ids_to_tokens(tokenizer.encode_tool(tool_id))) for tool_id in tokenizer.tool_ids
    }
    assert len(written) > 5
    assert set(written[:-1]) <= codes  # the last one may be cut off
