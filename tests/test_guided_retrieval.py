"""Search, guided decoding and abstention: exact against brute force over every tool."""

import math
from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import small_llama

from toolweaver_hf import ToolCodes, ToolRetriever, ToolWeaverTokenizer
from toolweaver_hf.text_expert import (
    MAX_SENTENCES,
    TextExpert,
    document_views,
    mean_distribution,
    split_sentences,
)


QUERIES = ["Will it rain?", "How many dollars is a euro today? And was it more in the spring?", "mail"]
SIZES = (3, 4, 5)


class LetterEncoder:
    """Embeds texts by their letters: a real encoder's interface at no cost."""

    max_seq_length = 128

    def encode_query(self, texts, **kwargs):
        counts = torch.tensor([[text.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts])
        return torch.nn.functional.normalize(counts.float() + 0.1, dim=1)

    encode_document = encode_query


@pytest.fixture
def guided(base_tokenizer):
    generator = np.random.default_rng(0)
    words = ["rain", "wind", "euro", "dollar", "mail", "spring", "train", "cash", "snow", "letter"]
    tools = {f"tool_{i}": " ".join(generator.choice(words, 4)) for i in range(40)}
    flat = generator.choice(math.prod(SIZES), 40, replace=False)
    codes = ToolCodes(SIZES, {t: np.unravel_index(c, SIZES) for t, c in zip(tools, flat, strict=True)})
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    expert = TextExpert(list(tools), list(tools.values()), cosine_weight=5, bm25_weight=1, model_weight=0.7)
    expert._encoder_module = LetterEncoder()
    return small_llama(len(tokenizer)), tokenizer, expert.embed()


def brute_force(model, tokenizer, expert, query):
    """The log-probability of every tool: the model's, with its abstentions, times the expert's, normalized."""
    from test_retrieval import score

    learned = [t for t in tokenizer.tool_ids if t in expert.tool_ids and t in (expert.learned or expert.tool_ids)]

    class Restricted:
        tool_ids = learned
        encode_conversation = tokenizer.encode_conversation
        encode_tool = tokenizer.encode_tool

    num_tools = len(expert)
    share = math.log(len(learned) / num_tools)
    of_learned = {t: score(model, Restricted, query, t) + share for t in learned}
    abstained = max(-math.log(num_tools), math.log(0.2) + max(of_learned.values()))
    by_model = torch.tensor([of_learned.get(t, abstained) for t in expert.tool_ids])
    return (expert.model_weight * by_model + expert.logits([query])[0]).log_softmax(0)


@pytest.mark.parametrize("learned", [None, 25])
@pytest.mark.parametrize("full_head", [True, False])
def test_guided_scores_equal_brute_force(guided, learned, full_head):
    model, tokenizer, expert = guided
    expert.learned = None if learned is None else frozenset(expert.tool_ids[:learned])
    retriever = ToolRetriever(model, tokenizer, expert, full_head=full_head)
    found = retriever(QUERIES, top_k=40, exhaustive=True)
    batched = retriever(QUERIES, top_k=40, num_beams=60)
    for query, one, other in zip(QUERIES, found, batched, strict=True):
        expected = dict(zip(expert.tool_ids, brute_force(model, tokenizer, expert, query).tolist(), strict=True))
        assert [tool.tool_id for tool in one] == sorted(expected, key=expected.get, reverse=True)
        assert math.isclose(sum(math.exp(tool.score) for tool in one), 1, abs_tol=1e-4)
        for tool in [*one, *other]:
            assert math.isclose(tool.score, expected[tool.tool_id], abs_tol=2e-3)


@pytest.mark.parametrize("search", [{"num_beams": 60}, {"exhaustive": True}])
def test_an_allow_list_leaves_scores_as_they_are(guided, search):
    _, tokenizer, expert = guided
    expert.learned = frozenset(expert.tool_ids[:25])
    expert.cosine_weight, expert.bm25_weight = 60, 5  # it rules out what the model, sure of itself, thinks best
    retriever = ToolRetriever(small_llama(len(tokenizer), initializer_range=0.8), tokenizer, expert)
    every = [{tool.tool_id: tool.score for tool in found} for found in retriever(QUERIES, top_k=40, **search)]
    sets = [["tool_1"], ["tool_2", "tool_30"], []]
    for scores, allowed, found in zip(every, sets, retriever(QUERIES, allowed_tools=sets, **search), strict=True):
        assert {tool.tool_id for tool in found} == set(allowed)
        for tool in found:
            assert math.isclose(tool.score, scores[tool.tool_id], abs_tol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_search_ranks_where_the_model_counts_nothing(guided, attention):
    _, tokenizer, expert = guided
    expert.model_weight = 0.0
    retriever = ToolRetriever(small_llama(len(tokenizer), attn_implementation=attention), tokenizer, expert)
    assert retriever(QUERIES) == ToolRetriever(text_expert=expert)(QUERIES)
    ids, logits = torch.tensor([tokenizer.encode_query("mail")]), expert.logits(["mail"]).to("meta")
    tools, scores = retriever.rank(ids, torch.ones_like(ids), 2, allowed_tools=["tool_3"], expert_logits=logits)
    assert tools.device == scores.device == logits.device  # which need not be the processor


def test_few_beams_find_what_the_product_ranks_first(guided):
    model, tokenizer, expert = guided
    retriever = ToolRetriever(model, tokenizer, expert)
    for found, exact in zip(
        retriever(QUERIES, top_k=1, num_beams=10), retriever(QUERIES, top_k=1, exhaustive=True), strict=True
    ):
        assert found[0].tool_id == exact[0].tool_id
        assert math.isclose(found[0].score, exact[0].score, abs_tol=0.1)


def test_a_new_tool_is_found_at_the_next_call(guided):
    from toolweaver_hf import Tool

    model, tokenizer, expert = guided
    for retriever in (ToolRetriever(text_expert=expert), ToolRetriever(model, tokenizer, expert)):
        expert.model_weight = 0.2
        expert.learned = frozenset(tokenizer.tool_ids)
        retriever.add([Tool("chess", "Suggests a chess opening.")])
        (found,) = retriever("a good chess opening", top_k=1)
        assert found[0].tool_id == "chess"
        with pytest.raises(ValueError, match="chess"):
            retriever.add([Tool("chess", "Twice.")])
        with pytest.raises(ValueError, match="2 tools and 1 documents"):
            expert.add(["draughts", "go"], ["Suggests a move."])
        retriever.remove("chess", "tool_3")
        ids = {tool.tool_id for tool in retriever("a good chess opening", top_k=50)[0]}
        assert len(ids) == 39 and not ids & {"chess", "tool_3"}
        retriever.add([Tool("tool_3", "Back again.")])


def test_an_expert_is_saved_with_its_retriever(guided, tmp_path):
    model, tokenizer, expert = guided
    expert.learned = frozenset(expert.tool_ids[:25])
    retriever = ToolRetriever(model, tokenizer, expert)
    retriever.save_pretrained(tmp_path)
    loaded = ToolRetriever.from_pretrained(tmp_path)
    loaded.text_expert._encoder_module = LetterEncoder()
    assert loaded.text_expert.learned == expert.learned
    for one, other in zip(retriever(QUERIES), loaded(QUERIES), strict=True):
        assert [tool.tool_id for tool in one] == [tool.tool_id for tool in other]
        assert all(math.isclose(a.score, b.score, abs_tol=1e-2) for a, b in zip(one, other, strict=True))
    alone = ToolRetriever.from_pretrained(tmp_path, guided=False)(QUERIES)
    assert [t.tool_id for t in alone[0]] == [t.tool_id for t in ToolRetriever(model, tokenizer)(QUERIES)[0]]


def test_a_local_encoder_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    TextExpert(["rain"], ["the weather"], "encoder").save_pretrained("expert")
    assert TextExpert.from_pretrained("expert").encoder == str(tmp_path / "encoder")


def test_embeddings_are_cached_by_document(guided, tmp_path):
    expert = guided[2]

    class Counting(LetterEncoder):
        texts = 0

        def encode_document(self, texts, **kwargs):
            self.texts += len(texts)
            return super().encode_query(texts)

    for documents, count in (
        (["a b", "c d", "e f"], 3),
        (["a b", "c d", "e f"], 0),
        (["a b", "x y", "e f", "e f"], 1),
    ):
        fresh = TextExpert([str(i) for i in range(len(documents))], documents, expert.encoder)
        fresh._encoder_module = Counting()
        fresh.embed(tmp_path)
        assert fresh._encoder_module.texts == count
        expected = LetterEncoder().encode_query(documents)
        assert torch.allclose(fresh.embeddings, expected, atol=1e-3)


def test_the_cache_leaves_an_expert_in_its_folder_alone(guided, tmp_path):
    expert = guided[2]
    expert.remember(["snow"], [["tool_3"]])
    expert.save_pretrained(tmp_path)
    expert.embed(tmp_path)
    loaded = TextExpert.from_pretrained(tmp_path)
    assert len(loaded.memory) == 1 and len(loaded.embeddings) == len(expert)


def test_tools_may_be_added_just_when_the_embeddings_are_there():
    class Busy(TextExpert):
        adding = None

        def __setattr__(self, name, value):
            if name == "embeddings" and value is not None and self.adding is None:
                self.adding = Thread(target=self.add, args=(["late"], ["Will it snow?"]))
                self.adding.start()
                self.adding.join(0.5)
            super().__setattr__(name, value)

    expert = Busy(["rain", "mail"], ["the weather", "a letter"])
    expert._encoder_module = LetterEncoder()
    expert.embed().adding.join()
    torch.testing.assert_close(expert.embeddings, LetterEncoder().encode_document(expert.documents))
    assert expert.logits(["Will it snow?"]).argmax() == 2


def test_identifiers_are_split_into_words():
    expert = TextExpert(["a", "b"], ["getUserByID_v2: reads an account", "delete_row: removes"])
    assert expert.log_probs(["user id"]).argmax() == 0
    assert expert.log_probs(["row"]).argmax() == 1


@pytest.mark.parametrize(
    ("document", "views"),
    [
        (
            "Weather. rain_chance: Give the odds of rain. Parameters: city (its name).",
            ["Give the odds of rain.", "rain chance"],
        ),
        ("github.createIssue: File a bug.", ["File a bug.", "github create Issue"]),
        ("17: Latest rates.", ["Latest rates."]),
        ("send_mail: ", []),
        ("Some text of no tool.", []),
        ("", []),
    ],
)
def test_views_of_a_document(document, views):
    assert document_views(document) == [document, *views]


def test_a_tool_is_embedded_by_its_views():
    documents = ["Weather. rain_chance: Give the odds of rain. Parameters: city.", "send_mail: Write to somebody."]
    expert = TextExpert(["rain", "mail"], documents)
    expert._encoder_module = LetterEncoder()
    sums = torch.stack([LetterEncoder().encode_document(document_views(text)).sum(0) for text in documents])
    torch.testing.assert_close(expert.embed().embeddings, torch.nn.functional.normalize(sums, dim=1))
    expert.add(["late"], documents[:1])
    torch.testing.assert_close(expert.embeddings[2], expert.embeddings[0])
    expert.describe({"mail": documents[0]})
    torch.testing.assert_close(expert.embeddings[1], expert.embeddings[0])


def test_each_sentence_of_a_query_counts(guided):
    _, _, expert = guided
    parts = ["Will it rain or snow? How much is a dollar?", "Will it rain or snow?", "How much is a dollar?"]
    cosines, bm25, *_ = expert.scores([*parts, "mail"])
    probs = (expert.cosine_weight * cosines + expert.bm25_weight * bm25).softmax(1)
    expected = torch.stack([probs[:3].mean(0), probs[3]])
    assert torch.allclose(expert.log_probs([parts[0], "mail"]).exp(), expected, atol=1e-5)
    # What is remembered are whole queries
    expert.remember(["Has it snowed?", "Is a dollar much?"], [["tool_3"], ["tool_5"]])
    cosines, bm25, centroids, memory = expert.scores(parts)
    probs = expert.cosine_weight * cosines + expert.bm25_weight * bm25 + expert.centroid_weight * centroids
    expected = probs.softmax(1).mean(0).log() + expert.memory_weight * memory[0]
    assert torch.allclose(expert.log_probs(parts[:1])[0], expected.log_softmax(0), atol=1e-4)


def test_a_tool_of_the_next_sentence_comes_before_the_second_of_the_first():
    logits = torch.tensor([[10.0, 9.0, 5.0], [10.0, 9.0, 0.0], [0.0, 0.0, 10.0]])
    assert logits[0].argsort(descending=True).tolist() == [0, 1, 2]
    mean = mean_distribution(logits, torch.zeros(3, dtype=torch.long))
    assert mean[0].argsort(descending=True).tolist() == [0, 2, 1] and math.isclose(mean.exp().sum(), 1, abs_tol=1e-6)


def test_mean_distribution_without_underflow():
    logits = torch.tensor([[0.0, -300.0, -400.0], [0.0, -400.0, -300.0], [5.0, 5.0, 5.0]])
    expected = torch.tensor([[0, -300, -300], [-math.log(3)] * 3]) - torch.tensor(
        [[0, math.log(2), math.log(2)], [0] * 3]
    )
    assert torch.allclose(mean_distribution(logits, torch.tensor([0, 0, 1])), expected)
    assert mean_distribution(logits, torch.tensor([0, 1, 2])) is logits


@pytest.mark.parametrize(
    ("query", "sentences"),
    [
        ("", []),
        ("Will it rain?", []),
        ("Hi! Will it rain in Oslo? Thanks.", []),  # two words ask for nothing
        ("Ask Dr. Smith about the rain in 3.5 hours", []),
        ("Book the train to Rome; write a mail to Ada.", ["Book the train to Rome;", "write a mail to Ada."]),
        ("1. Look at the snow\n2. Write to Ada Lovelace", ["Look at the snow", "Write to Ada Lovelace"]),
        ("明天会下雨吗？请给我的朋友写一封信。", ["明天会下雨吗？", "请给我的朋友写一封信。"]),
    ],
)
def test_sentences(query, sentences):
    texts, owners = split_sentences(["before", query, "after"])
    assert texts == ["before", query, "after", *sentences]
    assert owners.tolist() == [0, 1, 2, *[1] * len(sentences)]


def test_a_long_query_is_read_in_few_parts():
    sentences = [f"This is sentence {i}." for i in range(100)]
    (whole, *parts), owners = split_sentences([" ".join(sentences)])
    assert " ".join(parts) == whole and len(parts) <= MAX_SENTENCES and owners.tolist() == [0] * (1 + len(parts))


def test_remembered_queries_score_tools_by_centroids_and_a_kernel_density(guided, tmp_path):
    expert = guided[2]
    asked = [
        ("rain today", ["tool_1"]),
        ("a euro", ["tool_1", "tool_2"]),
        ("no such", ["unknown"]),
        ("snow", ["tool_3"]),
    ]
    expert.remember(*zip(*asked, strict=True))
    expert.remove("tool_0")

    def densities(queries):
        encoded = LetterEncoder().encode_query(queries)
        memory = torch.zeros(len(queries), len(expert))
        for text, tools in asked:
            kernel = ((encoded @ LetterEncoder().encode_query([text])[0] - 1) * 20).exp()
            for tool in set(tools) & set(expert.tool_ids):
                memory[:, expert.tool_ids.index(tool)] += kernel
        return memory

    assert torch.allclose(expert.scores(QUERIES)[3], (densities(QUERIES) + 1e-5).log(), atol=1e-3)

    def cosines(queries):
        vectors = LetterEncoder().encode_document(expert.documents)
        for text, tools in asked:
            for tool in set(tools) & set(expert.tool_ids):
                vectors[expert.tool_ids.index(tool)] += LetterEncoder().encode_query([text])[0]
        return LetterEncoder().encode_query(queries) @ torch.nn.functional.normalize(vectors, dim=1).T

    assert torch.allclose(expert.scores(QUERIES)[2], cosines(QUERIES), atol=1e-3)
    # What comes later counts for a fifth of the best, so that its document decides.
    expert.add(["late"], ["a chess opening"])
    late = expert.scores(QUERIES)[3, :, -1]
    assert torch.allclose(expert.scores(QUERIES)[2], cosines(QUERIES), atol=1e-3)
    assert torch.allclose(late, (0.2 * densities(QUERIES).max(1).values + 1e-5).log(), atol=1e-3)
    expert.save_pretrained(tmp_path)
    loaded = TextExpert.from_pretrained(tmp_path)
    loaded._encoder_module = LetterEncoder()
    assert torch.allclose(loaded.scores(QUERIES), expert.scores(QUERIES), atol=2e-2)


def test_what_is_remembered_before_the_tools_are_embedded_counts_afterwards(guided, tmp_path):
    expert = guided[2]
    early = TextExpert(expert.tool_ids, expert.documents)
    early._encoder_module = LetterEncoder()
    early.remember(["snow"], [["tool_3"]])
    assert not early.scores(QUERIES)[2:].any()
    early.save_pretrained(tmp_path)
    loaded = TextExpert.from_pretrained(tmp_path)
    loaded._encoder_module = LetterEncoder()
    expert.remember(["snow"], [["tool_3"]])
    assert torch.allclose(loaded.embed().scores(QUERIES), expert.scores(QUERIES), atol=2e-2)


def test_what_is_asked_later_is_remembered_besides(guided):
    expert = guided[2]
    expert.remember(["snow", "a euro"], [["tool_3"], ["tool_2"]])
    expert.add(["late", "later"], ["a chess opening", "a chess ending"])
    expert.remember(["a euro", "a euro", "a pound"], [["tool_2"], ["tool_4"], ["late", "tool_2"]], keep=True)
    expert.remember(["something else"], [["unknown"]], keep=True)
    other = TextExpert(expert.tool_ids, expert.documents)
    other._encoder_module = LetterEncoder()
    asked = {
        "snow": ["tool_3"],
        "a euro": ["tool_2", "tool_4"],
        "a pound": ["late", "tool_2"],
    }  # each pair counts once
    other.embed().remember([*asked], [*asked.values()])
    scores, expected = expert.scores(QUERIES)[3], other.scores(QUERIES)[3]
    assert torch.allclose(scores[:, :-1], expected[:, :-1], atol=1e-5)
    assert (scores[:, -1] > expected[:, -1]).all()  # it came later, and nothing is known of it yet
    expert.remember(["snow"], [["tool_3"]])  # in place of all others
    assert len(expert.memory) == 1
    memory = expert.scores(QUERIES)[3]
    expert.describe({"tool_3": "a dollar", "late": "the wind"})
    other = TextExpert(expert.tool_ids, expert.documents)
    other._encoder_module = LetterEncoder()
    scores = expert.scores(QUERIES)
    assert torch.allclose(scores[:2], other.embed().scores(QUERIES)[:2])
    assert other.documents[3] == "a dollar" and torch.equal(scores[3], memory)
    with pytest.raises(ValueError, match="'nobody'"):
        expert.describe({"nobody": "no document"})


def test_the_next_stage_takes_over_what_is_remembered(guided):
    first = guided[2]
    first.remember(["rain today"], [["tool_1"]])
    first.learned, first.cosine_weight = frozenset({"tool_1"}), 3.0
    first.add(["late"], ["a chess opening"])
    tools = {"tool_2": "euro", "tool_1": "rain", "late": "a chess opening", "later": "a chess ending"}
    second = TextExpert([*tools], [*tools.values()], learned=["tool_2"])
    second._encoder_module = LetterEncoder()
    second.embed().take_over(first)
    second.remember(["rain today", "a euro"], [["tool_1"], ["tool_2"]], keep=True)
    assert second.learned == {"tool_1", "tool_2"} and second.cosine_weight == 3.0
    assert len(second.memory) == 2
    memory = second.scores(["rain today", "a euro"])[3]
    assert memory[0].argmax() == 1 and memory[1].argmax() == 0
    # What came after the first stage's memory counts for a fifth of the best, as the best alone is remembered.
    new = (0.2 * memory.exp().max(1, keepdim=True).values + 1e-5).log()
    assert torch.allclose(memory[:, 2:], new.expand(-1, 2), atol=1e-3)


def test_weights_are_fitted_by_likelihood(guided):
    from toolweaver_hf.alignment.guidance import CAUTIOUS_WEIGHTS, PRIORS, fit_guidance
    from toolweaver_hf.data.queries import Query

    model, tokenizer, expert = guided
    pairs = zip(expert.tool_ids, expert.documents, strict=True)
    queries = [Query(str(i), text, (tool,)) for i, (tool, text) in enumerate(pairs)]
    queries.append(Query("x", "rain", ("unknown",)))
    retriever = ToolRetriever(model, tokenizer, expert)
    fitted = fit_guidance(retriever, queries)
    # Each document is its own query, of which an untrained model knows nothing: it is not trusted at all.
    assert fitted["queries"] == 40 and expert.cosine_weight > 15 and expert.model_weight == 0
    assert fitted["loss"] == fitted["search_loss"]
    assert retriever(QUERIES) == ToolRetriever(text_expert=expert)(QUERIES)
    several = [Query(str(i), f"{q.text}. What about that?", q.tools) for i, q in enumerate(queries[:20])]
    fitted = fit_guidance(retriever, several)
    rows = [expert.tool_ids.index(query.tools[0]) for query in several]
    log_probs = expert.log_probs([query.text for query in several])
    assert math.isclose(-log_probs[range(20), rows].mean(), fitted["loss"], abs_tol=1e-3)
    # Queries whose words tell nothing, but which are remembered in other words, are what the memory is for.
    asked = [f"{'abcdefghijklmnopqrstuvwxyz'[i % 26] * 9} {'xyzw'[i // 26] * 5}" for i in range(40)]
    expert.remember([f"{text} now" for text in asked], [[tool] for tool in expert.tool_ids])
    riddles = [Query(str(i), text, (tool,)) for i, (tool, text) in enumerate(zip(expert.tool_ids, asked, strict=True))]
    fitted = fit_guidance(retriever, riddles)
    assert expert.centroid_weight > 1 and fitted["loss"] < fitted["search_loss"] - 0.5
    # A generator's queries are like those that it wrote for training: they count half, or not at all.
    generated = [replace(query, generated=True) for query in riddles]
    assert fit_guidance(retriever, generated + riddles) == fitted
    half = fit_guidance(retriever, generated)
    assert half["loss"] == fitted["loss"]
    for name in PRIORS.keys() & half.keys():
        assert math.isclose(half[name], math.sqrt(PRIORS[name] * fitted[name]), abs_tol=1e-2)
    generated = [replace(query, reliable=False) for query in generated]
    assert fit_guidance(retriever, generated + riddles) == fitted
    assert fit_guidance(retriever, generated) == CAUTIOUS_WEIGHTS | {"tells_end": False, "queries": 0}
    assert expert.model_weight == CAUTIOUS_WEIGHTS["model_weight"]
    with pytest.raises(ValueError, match="no text expert"):
        fit_guidance(ToolRetriever(model, tokenizer), queries)
    with pytest.raises(ValueError, match="none of the queries"):
        fit_guidance(ToolRetriever(text_expert=expert), queries[-1:])


def test_the_log_odds_of_a_further_tool_are_those_of_the_model(guided):
    model, tokenizer, expert = guided
    retriever = ToolRetriever(model, tokenizer, expert)
    answered = expert.tool_ids[:2]
    codes = [token_id for tool_id in answered for token_id in tokenizer.encode_tool(tool_id)]
    state, logits = retriever.read_answers(["rain and mail"], [answered])
    ids = torch.tensor([tokenizer.encode_query("rain and mail") + codes])
    with torch.no_grad():
        expected = model(ids).logits[0, -1].softmax(0)
    begins = sorted({tokenizer.encode_tool(tool_id)[0] for tool_id in tokenizer.tool_ids})
    odds = expected[begins].sum() / expected[tokenizer.eos_token_id]
    assert math.isclose(retriever.more_log_odds(logits), odds.log(), abs_tol=1e-3)
    assert state.length == ids.shape[1]
    _, batched = retriever.read_answers(["rain", "rain and mail"], [answered[:1], answered])  # with padding
    assert math.isclose(retriever.more_log_odds(batched)[1], odds.log(), abs_tol=1e-3)
    context = model.config.max_position_embeddings
    longest = retriever.encode_query("rain " * context, answered)
    assert len(longest) == context - len(SIZES) and longest[-len(codes) :] == codes


@pytest.mark.parametrize("model_weight", [0.7, 0.0])
def test_generate_is_guided_as_the_product_says(guided, model_weight):
    from transformers import LogitsProcessorList

    from toolweaver_hf import ToolCodeLogitsProcessor

    model, tokenizer, expert = guided
    expert.model_weight = model_weight
    texts, trie = QUERIES, tokenizer.trie
    prompts = [tokenizer.encode_query(text) for text in texts]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    logits = expert.logits(texts)
    guide = {"expert_logits": logits, "model_weight": model_weight}
    processor = ToolCodeLogitsProcessor(trie, prompt_length=longest, eos_token_id=2, **guide)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([processor]),
        num_beams=30,
        num_return_sequences=1,
        renormalize_logits=True,
        max_new_tokens=4,
    )
    found = [tokenizer.decode_tool(row[longest : longest + 3]) for row in out]
    best = [tools[0].tool_id for tools in ToolRetriever(model, tokenizer, expert)(texts, top_k=1, exhaustive=True)]
    assert found == best

    # In free text it leaves alone how probable a code is, and sums up to the scores of the codes that may start.
    scores = torch.randn(len(texts), len(tokenizer))
    plain = ToolCodeLogitsProcessor(trie, mode="trajectory")(ids, scores)
    moved = ToolCodeLogitsProcessor(trie, mode="trajectory", **guide)(ids, scores)
    starts = torch.tensor(tokenizer.code_token_ids)
    torch.testing.assert_close(moved[:, starts].logsumexp(1), plain[:, starts].logsumexp(1))
    text = torch.ones(len(tokenizer), dtype=torch.bool)
    text[starts] = False
    assert torch.equal(moved[:, text], plain[:, text])
    # With allowed tools, only those; inside a code its children alone.
    rows = [[0, 1], [2], [3, 4, 5]]
    forest = ToolCodeLogitsProcessor(trie, mode="trajectory", code_start="forced", allowed_rows=rows, **guide)
    for row, allowed, values in zip(range(3), rows, forest(ids, scores), strict=True):
        first = {tokenizer.encode_tool(tokenizer.tool_ids[tool])[0] for tool in allowed}
        assert set((values > -torch.inf).nonzero().flatten().tolist()) == first, row
