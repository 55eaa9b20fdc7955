"""The evaluation of an agent, on a tiny model with random weights."""

import json
import shutil

import pytest
from conftest import small_llama
from servers.chat_server import ChatServer
from transformers import AutoModelForCausalLM

from toolweaver_hf import ToolCatalog, ToolCodes, ToolWeaverTokenizer
from toolweaver_hf.cli import main as toolweaver
from toolweaver_hf.demo import DEMO_FOLDER
from toolweaver_hf.hub.artifacts import push_folder


GOLD = DEMO_FOLDER / "trajectories.test.jsonl"


@pytest.fixture(scope="module")
def agent(base_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("agent")
    catalog = ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl")
    codes = ToolCodes([16, 16], {tool.id: [i // 16, i % 16] for i, tool in enumerate(catalog)})
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    small_llama(len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    catalog.save_pretrained(folder)
    return folder


def evaluate(*options):
    toolweaver(["evaluate-agent", "--tasks", str(GOLD), *map(str, options)])


def measures(folder):
    return json.loads((folder / "metrics.json").read_text())["measures"]


def test_a_run_is_gone_on_with_and_not_mixed(agent, capsys):
    output = agent / "agent_evaluation"
    evaluate("--model", agent, "--max_tasks", 2)
    first = (output / "runs.jsonl").read_text()
    assert len(first.splitlines()) == 2
    assert "| tool_accuracy | " in capsys.readouterr().out
    (output / "runs.jsonl").write_text(first[:-10])  # killed while the second run was written
    evaluate("--model", agent, "--max_tasks", 3, "--reference", GOLD)
    runs = (output / "runs.jsonl").read_text()
    assert runs.startswith(first) and len(runs.splitlines()) == 3
    assert measures(output) | {"tasks": 3, "SoWR": 0, "losses": 1} == measures(output)
    with pytest.raises(SystemExit, match="2"):
        evaluate("--model", agent, "--max_tasks", 3, "--max_steps", 1)
    assert "other settings (max_steps)" in capsys.readouterr().err
    assert (output / "runs.jsonl").read_text() == runs


def test_a_model_that_was_trained_anew_is_another_one(agent, hub, tmp_path, capsys):
    folder = tmp_path / "agent"
    shutil.copytree(agent, folder, ignore=shutil.ignore_patterns("agent_evaluation"))
    push_folder(folder, "me/agent")
    for model, output in ((folder, folder / "agent_evaluation"), ("me/agent", tmp_path / "of_the_hub")):
        evaluate("--model", model, "--max_tasks", 1, "--output_dir", output)
    (tmp_path / "moved").mkdir()
    moved = folder.rename(tmp_path / "moved" / "agent")
    evaluate("--model", moved, "--max_tasks", 2)

    model = AutoModelForCausalLM.from_pretrained(moved)
    model.get_input_embeddings().weight.data += 1
    model.save_pretrained(moved)
    push_folder(moved, "me/agent")
    for model, output in ((moved, moved / "agent_evaluation"), ("me/agent", tmp_path / "of_the_hub")):
        with pytest.raises(SystemExit, match="2"):
            evaluate("--model", model, "--max_tasks", 2, "--output_dir", output)
        assert "other settings (model)" in capsys.readouterr().err


def test_runs_of_another_agent_and_a_chat_model_as_judge(tmp_path, capsys):
    gold = ["--runs", GOLD, "--catalog", DEMO_FOLDER / "catalog.jsonl"]
    with ChatServer(lambda question: '{"status": "Solved"}') as server:
        judge = ["--judge_model", "judge", "--url", server.url, "--votes", 2, "--prices", 1, 2, "--max_tasks", 4]
        evaluate(*gold, "--output_dir", tmp_path, *judge)
        evaluate(*gold, "--output_dir", tmp_path, *judge)
        assert len(server.requests) == 4 * 2
    assert "prompt_tokens 80, completion_tokens 24, cost 0.000128" in capsys.readouterr().out
    assert measures(tmp_path)["SoPR"] == measures(tmp_path)["argument_exact_match"] == 1


def test_queries_without_a_judge_are_measured_by_their_tools(tmp_path):
    queries = DEMO_FOLDER / "queries.test.jsonl"
    gold = ["--runs", GOLD, "--catalog", DEMO_FOLDER / "catalog.jsonl", "--output_dir", tmp_path]
    toolweaver(["evaluate-agent", "--tasks", str(queries), *map(str, gold)])
    assert "tool_F1" in measures(tmp_path) and "SoPR" not in measures(tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "either --model or --runs"),
        (["--runs", GOLD], "--catalog"),
        (["--runs", GOLD, "--catalog", DEMO_FOLDER / "catalog.jsonl"], "--output_dir is needed"),
        (["--model", "m", "--output_dir", "o", "--prices", "1"], "two numbers"),
    ],
)
def test_wrong_options(options, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate(*options)
    assert says in capsys.readouterr().err
