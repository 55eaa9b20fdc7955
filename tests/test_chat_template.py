"""Conversations by the chat template of every model family: what is learned is what will be generated."""

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
from agent.test_agent import CATALOG, Script
from bases import FAMILIES, TRL_TEMPLATES, build, stop_tokens
from conftest import small_llama
from transformers import LogitsProcessorList
from trl import ModelConfig

from toolweaver_hf import ToolAgent, ToolCatalog, ToolCodes, ToolRetriever, ToolWeaverTokenizer
from toolweaver_hf.alignment.rows import replay_rows, retrieval_rows, tokenize_rows, trajectory_rows
from toolweaver_hf.alignment.trainer import AlignmentTrainingArguments
from toolweaver_hf.data.queries import Query
from toolweaver_hf.data.trajectories import read_messages, render_calls
from toolweaver_hf.recipes import sft


LEARNED = Path(__file__).parent / "fixtures" / "learned"
UPDATE = "TOOLWEAVER_TEST_UPDATE"  # set it to write the golden files anew, and look at what changed
MODELS = [name for name in (*FAMILIES, *TRL_TEMPLATES) if not name.endswith("_training")]
ONE_OF_A_KIND = ("llama2", "trl/deepseek_r1_distill", "trl/glm4moe", "trl/gptoss", "trl/idefics3", "trl/qwen3_6")
CODES = ToolCodes([2, 2], {"rain": [0, 1], "wind": [1, 1]})
# Two turns of the user, thoughts, and two calls in one turn whose results come in the other order
CONVERSATION = [
    {"role": "user", "content": "Rain in Oslo? Wind in Rome?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I look at both.",
        "tool_calls": [
            {"id": "c1", "function": {"name": "rain", "arguments": {"place": "Oslo"}}},
            {"id": "c2", "function": {"name": "wind", "arguments": {"place": "Rome"}}},
        ],
    },
    {"role": "tool", "content": '{"wind": 3}', "tool_call_id": "c2"},
    {"role": "tool", "content": '{"rain": true}', "tool_call_id": "c1"},
    {"role": "assistant", "content": "Rain, and a breeze."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "They said so."},
]


@pytest.fixture(scope="module", params=[*FAMILIES, *TRL_TEMPLATES])
def family(request):
    """Each family's name, tokenizer, and the tokens at which its models stop."""
    tokenizer = ToolWeaverTokenizer.from_base(build(request.param), CODES)
    return request.param, tokenizer, tokenizer.convert_tokens_to_ids(stop_tokens(request.param))


def stretches(row):
    """The parts of a row that are learned, and those that are not: whether learned, start, tokens."""
    parts = []
    for i, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
        if not parts or parts[-1][0] != (label != -100):
            parts.append((label != -100, i, []))
        parts[-1][2].append(token)
    return parts


def rows_of(conversation, tokenizer, stops):
    row = {"id": "1", "messages": read_messages({"messages": conversation})}
    return list(tokenize_rows(trajectory_rows([row], tokenizer), tokenizer, eos_token_id=stops)[0])


def learned_turns(rows):
    return [(row, start, tokens) for row in rows for is_learned, start, tokens in stretches(row) if is_learned]


def test_each_turn_is_learned_as_it_is_generated(family):
    """Every turn of the assistant, with its thought and its end, behind the prompt that an agent is given."""
    name, tokenizer, stops = family
    rendered = render_calls(read_messages({"messages": CONVERSATION}), tokenizer)
    turns = [i for i, message in enumerate(rendered) if message["role"] == "assistant"]
    learned = learned_turns(rows_of(CONVERSATION, tokenizer, stops))
    for turn, (row, start, tokens) in zip(turns, learned, strict=True):
        message, text = rendered[turn], tokenizer.decode(tokens)
        if name != "gpt2_prefix":  # which puts a space before what follows any added token
            assert message["content"] in text and message.get("reasoning_content", "") in text
        # An answer ends where generation stops, a call where its turn does.
        is_call = any(token in tokenizer.code_token_ids for token in tokens)
        assert tokens[-1] in (tokenizer.added_tokens_decoder if is_call else stops)
        assert not set(tokens[:-1]) & set(stops)
        if rendered[turn - 1]["role"] == "user":
            prompt = tokenizer.encode_conversation(rendered[:turn], add_generation_prompt=True)["input_ids"]
            assert row["input_ids"][:start] == prompt
    # Each result follows its call.
    text = "".join(tokenizer.decode(tokens) for _, _, tokens in stretches(learned[0][0]))
    places = [text.index(part) for part in ("<a_0>", "true", "<a_1>", "3}", "breeze")]
    assert places == sorted(places)


def test_a_query_is_the_prompt_of_its_code(family):
    """Of one code, or of all and the token at which generation stops; a thought that is opened is closed."""
    _, tokenizer, stops = family
    query = Query("1", "Rain, <a_0> or wind?", ("rain", "wind"))
    prompt = tokenizer.encode_query(query.text)
    rain, wind = (tokenizer.encode_tool(tool) for tool in query.tools)
    rows, _ = tokenize_rows(retrieval_rows([query], tokenizer), tokenizer, eos_token_id=stops)
    for row, answer in zip(rows, (rain + wind + [rows[0]["labels"][-1]], wind), strict=True):
        assert row["input_ids"] == prompt + answer
        assert row["labels"] == [-100] * len(prompt) + answer
    assert rows[0]["labels"][-1] in stops
    text = tokenizer.decode(prompt)
    assert text.count("<think>") == text.count("</think>")


@pytest.mark.parametrize("name", MODELS)
def test_what_is_learned_token_by_token(name):
    """A golden file for each family, to look at: the tokens, with `+` before those that are learned."""
    tokenizer = ToolWeaverTokenizer.from_base(build(name), CODES)
    stops = tokenizer.convert_tokens_to_ids(stop_tokens(name))
    queries = retrieval_rows([Query("1", "Rain in Oslo?", ("rain", "wind"))], tokenizer)
    lines = []
    for row in [
        *tokenize_rows(queries[:1], tokenizer, eos_token_id=stops)[0],
        *rows_of(CONVERSATION, tokenizer, stops),
    ]:
        lines.append("trajectory:" if lines else "retrieval:")
        for is_learned, start, tokens in stretches(row):
            if start == 0:  # from the user's text on: what a template says before may hold the day
                said = max(i for i in range(len(tokens)) if "Rain in Oslo?" in tokenizer.decode(tokens[i:]))
                tokens = tokens[said:]
            written = [token.replace("\n", "\\n") for token in tokenizer.convert_ids_to_tokens(tokens)]
            lines.append(f"{'+' if is_learned else ' '} {' '.join(written)}")
    text = "\n".join(lines) + "\n"
    path = LEARNED / f"{name.replace('/', '_')}.txt"
    if os.environ.get(UPDATE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"look at what changed, and set {UPDATE}=1 if it is right"


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2_prefix"])
def test_an_agent_sees_what_was_learned(name):
    """A run that writes what rows teach has their tokens, and the messages that they were made of."""
    tokenizer = ToolWeaverTokenizer.from_base(build(name), CODES)
    stops = tokenizer.convert_tokens_to_ids(stop_tokens(name))
    messages = read_messages({"messages": CONVERSATION})
    expected = render_calls(messages, tokenizer)
    rows = rows_of(CONVERSATION, tokenizer, stops)
    learned = [tokens for _, _, tokens in learned_turns(rows)]
    model = small_llama(len(tokenizer), eos_token_id=stops, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    functions = {"rain": lambda place: {"rain": True}, "wind": lambda place: {"wind": 3}}

    def write(turns):
        """What the model writes: a call ends with its arguments."""
        for tokens in turns:
            if any(token in tokenizer.code_token_ids for token in tokens):
                tokens = tokens[: next(i for i in range(len(tokens)) if "}" in tokenizer.decode(tokens[:i]))]
            yield from tokens

    for asked, turns, row in ((1, learned[:3], rows[0]), (6, learned[3:], rows[-1])):
        script = LogitsProcessorList([Script(write(turns))])
        run = ToolAgent(model, tokenizer, CATALOG, functions, logits_processor=script)(messages[:asked])
        assert run.stop_reason == "answer"
        assert run.token_ids == row["input_ids"][: len(run.token_ids)]
        said = render_calls(run.messages, tokenizer)
        assert said == [{k: v for k, v in m.items() if k != "loss"} for m in expected[: len(said)]]


TEMPLATES = {
    "default": "default: " + build("smollm2").chat_template,
    "tool_use": "tools: " + build("smollm2").chat_template,
    "rag": "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    "{{ message.content }}{% endfor %}",
}


def test_several_chat_templates(tmp_path):
    """All are completed and kept by their names; where tools are called, `tool_use` is taken."""
    base = build("smollm2")
    base.chat_template = TEMPLATES
    tokenizer = ToolWeaverTokenizer.from_base(base, CODES)
    tokenizer.save_pretrained(tmp_path)
    for tokenizer in (tokenizer, ToolWeaverTokenizer.from_pretrained(tmp_path)):  # noqa: B020
        assert list(tokenizer.chat_template) == list(TEMPLATES)
        messages = [{"role": "user", "content": "?"}, {"role": "tool", "content": "x"}]
        assert tokenizer.apply_chat_template(messages, chat_template="rag", tokenize=False) == "?x"
        assert "tools: " in tokenizer.decode(tokenizer.encode_query("?"))
        (row,) = rows_of(CONVERSATION[:5], tokenizer, None)
        assert "tools: " in tokenizer.decode(row["input_ids"])
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
        (row,) = tokenize_rows(replay_rows([{"id": "1", "messages": chat}], tokenizer), tokenizer)[0]
        assert "default: " in tokenizer.decode(row["input_ids"])
    base.chat_template = {name: text for name, text in TEMPLATES.items() if name != "tool_use"}
    tokenizer = ToolWeaverTokenizer.from_base(base, CODES)
    assert "default: " in tokenizer.decode(tokenizer.encode_query("?"))


def test_a_prompt_that_no_rendered_turn_begins_with_is_learned_all_the_same():
    """Such as one that closes an empty thought which a turn that is rendered does not show."""
    base = build("smollm2")
    base.chat_template = base.chat_template.replace("assistant\n' }}{% endif", "assistant (calm)\n' }}{% endif")
    tokenizer = ToolWeaverTokenizer.from_base(base, CODES)
    rendered = render_calls(read_messages({"messages": CONVERSATION}), tokenizer)
    rows = rows_of(CONVERSATION, tokenizer, None)
    learned = learned_turns(rows)
    assert len(learned) == 4
    for (row, start, _), turn in zip((learned[0], learned[3]), (2, 8), strict=True):
        prompt = tokenizer.encode_conversation(rendered[:turn], add_generation_prompt=True)["input_ids"]
        assert row["input_ids"][:start] == prompt
        assert tokenizer.decode(prompt).endswith("assistant (calm)\n")


def test_a_tokenizer_that_has_written_conversations_is_copied_and_pickled():
    tokenizer = ToolWeaverTokenizer.from_base(build("qwen3"), CODES)
    prompt = tokenizer.encode_query("?")
    assert pickle.loads(pickle.dumps(tokenizer)).encode_query("?") == prompt
    assert copy.deepcopy(tokenizer).encode_query("?") == prompt


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ONE_OF_A_KIND else pytest.mark.slow) for name in MODELS]
)
def test_the_recipe_trains_on_every_family(name, tmp_path):
    """From conversations in files to a model that retrieves and an agent that runs and knows where to stop."""
    base, stops = build(name), stop_tokens(name)
    model = small_llama(len(base), hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    model.generation_config.eos_token_id = base.convert_tokens_to_ids(stops)
    model.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    catalog = ToolCatalog([tool for tool in CATALOG if tool.id in CODES])
    checksums = {tool.id: tool.checksum for tool in catalog}
    ToolCodes(CODES.codebook_sizes, dict(CODES), checksums).save_pretrained(tmp_path / "codes")
    catalog.to_jsonl(tmp_path / "codes" / "catalog.jsonl")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": CONVERSATION}))
    query = {"id": "1", "text": "Rain and wind?", "tools": ["rain", "wind"]}
    (tmp_path / "queries.jsonl").write_text(json.dumps(query))
    arguments = sft.AlignmentArguments(
        codes_dir=str(tmp_path / "codes"),
        stages=["memorization", "retrieval", "trajectory", "replay"],
        queries=str(tmp_path / "queries.jsonl"),
        trajectories=str(tmp_path / "chat.jsonl"),
        replay=str(tmp_path / "chat.jsonl"),
        embedding_init="random",
        max_bad_rows=0,
    )
    # Some templates begin with pages of instructions, which are many tokens of a small vocabulary
    settings = AlignmentTrainingArguments(
        str(tmp_path / "out"), max_length=None, max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True
    )
    sft.main(arguments, settings, ModelConfig(str(tmp_path / "base")))
    (ranking,) = ToolRetriever.from_pretrained(tmp_path / "out")("Rain?")
    assert {tool.tool_id for tool in ranking} == {"rain", "wind"}
    functions = dict.fromkeys(CODES, lambda **arguments: 1)
    agent = ToolAgent.from_pretrained(tmp_path / "out", functions, max_steps=2, max_new_tokens=8)
    assert set(agent.tokenizer.convert_tokens_to_ids(stops)) <= set(agent._end_ids)
    assert agent(CONVERSATION[:1]).messages[1]["role"] == "assistant"
