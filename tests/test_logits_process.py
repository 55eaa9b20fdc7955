import itertools

import numpy as np
import pytest
import torch
from conftest import small_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CompileConfig, LogitsProcessorList

from toolweaver_hf import CodeTrie, ToolCodeLogitsProcessor


EOS, TEXT, SIZE = 2, 10, 4  # the end, the number of tokens of text, the codes of a level


def level_tokens(level):
    return range(TEXT + level * SIZE, TEXT + (level + 1) * SIZE)


@st.composite
def catalogs(draw, max_levels=8):
    levels = draw(st.integers(1, max_levels))
    code = st.tuples(*[st.sampled_from(level_tokens(level)) for level in range(levels)])
    return draw(st.lists(code, min_size=1, max_size=20, unique=True))


def unfinished(codes, ids):
    """The longest end of a row that begins a code without being one; nothing in free text."""
    beginnings = {code[:depth] for code in codes for depth in range(1, len(code))}
    return max((ids[i:] for i in range(len(ids)) if ids[i:] in beginnings), key=len, default=())


def expected_tokens(mode, code_start, codes, new_ids, vocab_size):
    """Which tokens may follow, by brute force."""
    levels = len(codes[0]) if codes else None
    if mode == "retrieval":
        if not codes or len(new_ids) >= levels:
            return {EOS}
        return {code[len(new_ids)] for code in codes if code[: len(new_ids)] == new_ids} or {EOS}
    prefix = unfinished(codes, new_ids)
    if prefix:
        return {code[len(prefix)] for code in codes if code[: len(prefix)] == prefix}
    text = set() if code_start == "forced" else {token for token in range(vocab_size) if token < TEXT}
    return text | (set() if code_start == "forbidden" else {code[0] for code in codes})


@given(catalogs(), st.sampled_from(["retrieval", "allowed", "forbidden", "forced"]), st.data())
@settings(max_examples=150, deadline=None)
def test_every_step_equals_brute_force(codes, kind, data):
    mode, code_start = ("retrieval", "allowed") if kind == "retrieval" else ("trajectory", kind)
    levels = len(codes[0])
    vocab_size = TEXT + levels * SIZE
    least = 1 if kind == "forced" else 0
    sets = data.draw(st.lists(st.sets(st.integers(0, len(codes) - 1), min_size=least), min_size=1, max_size=3))
    beams = data.draw(st.integers(1, 2))
    length = data.draw(st.integers(0, levels + 1))
    prompt = data.draw(st.sampled_from([(3, 4), codes[0][:1], (3, *codes[-1])]))
    rows = []
    for tools in sets:  # what generation may have written: pieces of text, codes of the set, the start of one
        for _ in range(beams):
            own = [codes[i] for i in sorted(tools)]
            if mode == "retrieval":
                row = data.draw(st.sampled_from(own))[:length] if own else (EOS,) * length
                row += (EOS,) * (length - len(row))
            else:
                pieces = data.draw(st.lists(st.sampled_from([(5,), *own]), min_size=length, max_size=length))
                row = tuple(itertools.chain((5,) * length, *pieces))
                cut = data.draw(st.integers(0, levels - 1))
                row = row[: len(row) - cut][-length:] if length else ()
                row = (5,) * (length - len(row)) + row
                if unfinished([codes[i] for i in range(len(codes))], row) != unfinished(own, row):
                    row = (5,) * length
            rows.append(row)
    ids = torch.tensor([[*prompt, *row] for row in rows])
    processor = ToolCodeLogitsProcessor(
        CodeTrie(np.array(codes)),
        mode=mode,
        prompt_length=len(prompt),
        eos_token_id=EOS,
        code_start=code_start,
        code_token_ids=range(TEXT, vocab_size),
        allowed_rows=[sorted(tools) for tools in sets],
    )
    scores = torch.randn(len(rows), vocab_size)
    kept = scores.clone()
    masked = processor(ids, scores)
    assert torch.equal(scores, kept)
    for i, row in enumerate(rows):
        own = [codes[tool] for tool in sorted(sets[i // beams])]
        allowed = masked[i].isfinite().nonzero().flatten().tolist()
        assert set(allowed) == expected_tokens(mode, code_start, own, row, vocab_size)
        assert torch.equal(masked[i, allowed], scores[i, allowed])


CODES = [(10, 14, 18), (10, 14, 19), (10, 15, 18), (11, 14, 20), (12, 16, 21), (12, 17, 18)]
PROMPTS = torch.tensor(
    [[0, 0, 3, 4], [5, 10, 14, 3], [7, 12, 16, 21]]
)  # padded to the left; ends that look like codes
SETS = [[0, 1, 4], [3, 4, 5], [2]]


@pytest.fixture(scope="module")
def model():
    return small_llama(TEXT + 3 * SIZE).eval()


def generate(model, allowed_rows=SETS, mode="retrieval", **kwargs):
    processor = ToolCodeLogitsProcessor(
        CodeTrie(np.array(CODES)),
        mode=mode,
        prompt_length=PROMPTS.shape[1],
        eos_token_id=EOS,
        allowed_rows=allowed_rows,
        code_token_ids=range(TEXT, TEXT + 3 * SIZE),
        code_start=kwargs.pop("code_start", "allowed"),
    )
    settings = {"do_sample": False, "max_new_tokens": 4} | kwargs
    mask = (PROMPTS != 0).long()
    mask[1:] = 1
    output = model.generate(PROMPTS, attention_mask=mask, logits_processor=[processor], pad_token_id=0, **settings)
    if settings.get("return_dict_in_generate"):
        return output
    return [tuple(row) for row in output[:, PROMPTS.shape[1] :].tolist()]


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "num_return_sequences": 4}], ids=["greedy", "sampling"])
def test_generate_names_tools_of_the_set(model, settings):
    rows = generate(model, **settings)
    for i, row in enumerate(rows):
        assert CODES.index(row[:3]) in SETS[i * len(SETS) // len(rows)]
        assert row[3] == EOS


def test_beams_beyond_the_tools_of_a_set_are_told_by_their_score(model):
    output = generate(model, num_beams=4, num_return_sequences=4, return_dict_in_generate=True, output_scores=True)
    found = [[] for _ in SETS]
    for i, (row, score) in enumerate(zip(output.sequences[:, PROMPTS.shape[1] :].tolist(), output.sequences_scores)):  # noqa: B905
        if score > -1e6:
            found[i // 4].append(CODES.index(tuple(row[:3])))
    assert [sorted(tools) for tools in found] == SETS


def test_beam_search_finds_every_tool_of_a_set_and_no_other(model):
    rows = generate(model, [[0, 2, 3, 4, 5]], num_beams=5, num_return_sequences=5)
    for i in range(len(PROMPTS)):
        assert {CODES.index(row[:3]) for row in rows[5 * i : 5 * i + 5]} == {0, 2, 3, 4, 5}


def diverse_beams(model, input_ids, logits_processor, beams=4, groups=2, steps=3, **model_kwargs):
    """Diverse beam search (arXiv 1610.02424), which transformers 5 leaves to code outside it: a group at a time."""
    batch, size = len(input_ids), beams // groups
    sequences = [input_ids.repeat_interleave(size, 0) for _ in range(groups)]
    mask = model_kwargs["attention_mask"].repeat_interleave(size, 0)
    totals = [torch.tensor([0.0] + [-1e9] * (size - 1)).repeat(batch) for _ in range(groups)]
    for _ in range(steps):
        chosen = torch.zeros(batch, model.config.vocab_size)
        for group in range(groups):
            ids = sequences[group]
            attention = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
            positions = (attention.cumsum(1) - 1).clamp(min=0)
            scores = model(ids, attention_mask=attention, position_ids=positions).logits[:, -1].log_softmax(-1)
            scores = logits_processor(ids, scores - chosen.repeat_interleave(size, 0)) + totals[group][:, None]
            totals[group], best = scores.view(batch, -1).topk(size)
            beam = best // scores.shape[1] + torch.arange(batch)[:, None] * size
            tokens = best % scores.shape[1]
            chosen.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.float))
            totals[group] = totals[group].flatten()
            sequences[group] = torch.cat([ids[beam.flatten()], tokens.view(-1, 1)], 1)
    return torch.stack(sequences, 1).view(-1, sequences[0].shape[1])


def test_diverse_beams_through_custom_generate(model):
    for row in generate(model, [list(range(6))], custom_generate=diverse_beams):
        assert row in CODES


@pytest.mark.parametrize("mode", ["retrieval", "trajectory"])
def test_a_cut_or_reordered_batch_changes_nothing(model, mode):
    """State comes from the ids alone: rows are masked alike wherever they stand and whatever was masked before."""
    processor = ToolCodeLogitsProcessor(CodeTrie(np.array(CODES)), mode=mode, prompt_length=2, eos_token_id=EOS)
    ids = torch.tensor([[3, 4, *code[:2]] for code in CODES])
    scores = torch.randn(len(ids), model.config.vocab_size)
    whole = processor(ids, scores)
    for order in ([5, 0, 0, 3], [2], [4, 1, 2, 3, 0, 5]):
        assert torch.equal(processor(ids[order], scores[order]), whole[order])


@pytest.mark.parametrize("code_start", ["allowed", "forced", "forbidden"])
@pytest.mark.parametrize("settings", [{"do_sample": True, "num_return_sequences": 8}, {"num_beams": 3}])
def test_trajectories_hold_whole_codes_or_none(model, code_start, settings):
    torch.manual_seed(0)
    rows = generate(model, mode="trajectory", code_start=code_start, max_new_tokens=12, **settings)
    copies = len(rows) // len(SETS)
    seen = 0
    for i, row in enumerate(rows):
        tools = SETS[i // copies]
        position = 0
        while position < len(row):
            if row[position] < TEXT:
                assert code_start != "forced" or row[position] in (EOS, 0)
                position += 1
                continue
            code = row[position : position + 3]
            whole = [CODES[tool] for tool in tools]
            assert code in whole or (position + len(code) == len(row) and any(c[: len(code)] == code for c in whole))
            position += 3
            seen += 1
    assert seen or code_start != "forced"
    assert not seen or code_start != "forbidden"


def test_assisted_decoding_gives_the_same_codes(model):
    assistant = small_llama(model.config.vocab_size, hidden_size=16, num_hidden_layers=1).eval()
    trie = CodeTrie(np.array(CODES))
    for prompt in PROMPTS[1:]:
        for mode in ("retrieval", "trajectory"):
            processor = ToolCodeLogitsProcessor(trie, mode=mode, prompt_length=4, eos_token_id=EOS)
            arguments = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "logits_processor": [processor]}
            plain = model.generate(prompt[None], **arguments)
            for helper in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
                assert torch.equal(model.generate(prompt[None], **arguments, **helper), plain)


@pytest.mark.slow
def test_static_cache_and_compiled_forward(model):
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True  # generate compiles on accelerators alone unless told
    for mode in ("retrieval", "trajectory"):
        plain = generate(model, mode=mode)
        assert generate(model, mode=mode, cache_implementation="static") == plain
        assert generate(model, mode=mode, cache_implementation="static", compile_config=compiled) == plain


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["retrieval", "trajectory"])
def test_the_processor_itself_compiles_in_one_graph(mode):
    processor = ToolCodeLogitsProcessor(
        CodeTrie(np.array(CODES)), mode=mode, prompt_length=2, eos_token_id=EOS, allowed_rows=SETS
    )
    compiled = torch.compile(processor.__call__, fullgraph=True, backend="aot_eager")
    for depth in range(4):
        ids = torch.tensor([[3, 4, *CODES[tools[0]][:depth]] for tools in SETS])
        scores = torch.randn(len(ids), TEXT + 3 * SIZE)
        assert torch.equal(compiled(ids, scores), processor(ids, scores))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_keep_their_type(dtype):
    trie = CodeTrie(np.array(CODES))
    ids = torch.tensor([[3, 10, 14], [3, 4, 5]])
    for mode in ("retrieval", "trajectory"):
        scores = torch.randn(2, TEXT + 3 * SIZE).to(dtype)
        masked = ToolCodeLogitsProcessor(trie, mode=mode, prompt_length=1, eos_token_id=EOS)(ids, scores)
        assert masked.dtype == dtype
        assert torch.equal(masked[masked.isfinite()], scores[masked.isfinite()])


def test_errors():
    trie = CodeTrie(np.array(CODES))
    with pytest.raises(ValueError, match="mode must be"):
        ToolCodeLogitsProcessor(trie, mode="other")
    with pytest.raises(ValueError, match="needs prompt_length"):
        ToolCodeLogitsProcessor(trie)
    with pytest.raises(ValueError, match="code_start must be"):
        ToolCodeLogitsProcessor(trie, mode="trajectory", code_start="maybe")
    with pytest.raises(ValueError, match="empty set of allowed tools"):
        ToolCodeLogitsProcessor(trie, mode="trajectory", code_start="forced", allowed_rows=[[1], []])
    processor = ToolCodeLogitsProcessor(trie, mode="trajectory", allowed_rows=[[1], [2]])
    with pytest.raises(ValueError, match="2 sets of allowed tools cannot hold for 3 rows"):
        LogitsProcessorList([processor])(torch.ones((3, 4), dtype=torch.long), torch.zeros(3, 22))
    with pytest.raises(ValueError, match="resize the model's embeddings"):
        processor(torch.ones((2, 4), dtype=torch.long), torch.zeros(2, 20))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 8]))
@settings(max_examples=12, deadline=None)
def test_large_catalogs_keep_to_their_sets(seed, levels):
    """Of 50,000 tools, whatever is sampled is of the row's set, and at each step the tokens are those of numpy."""
    generator = np.random.default_rng(seed)
    size = {1: 60_000, 2: 300, 3: 40, 8: 4}[levels]
    codes = np.unique(generator.integers(0, size, (50_000, levels)), axis=0) + TEXT + size * np.arange(levels)
    codes = generator.permutation(codes)
    sets = [generator.choice(len(codes), generator.integers(1, 2000), replace=False) for _ in range(4)]
    processor = ToolCodeLogitsProcessor(CodeTrie(codes), prompt_length=0, eos_token_id=EOS, allowed_rows=sets)
    rows = torch.zeros((8, 0), dtype=torch.long)
    for depth in range(levels):
        masked = processor(rows, torch.rand(8, TEXT + size * levels))
        for i, row in enumerate(rows.numpy()):
            own = codes[sets[i // 2]]
            expected = np.unique(own[(own[:, :depth] == row).all(1), depth])
            assert masked[i].isfinite().nonzero().flatten().tolist() == expected.tolist()
        rows = torch.cat([rows, masked.argmax(1, keepdim=True)], dim=1)


@pytest.mark.parametrize("ends", [[EOS, 5], torch.tensor([EOS, 5])], ids=["list", "tensor"])
def test_several_tokens_may_end_a_code(ends):
    trie = CodeTrie(torch.tensor([[10, 14], [11, 15]]))
    processor = ToolCodeLogitsProcessor(
        trie, prompt_length=1, eos_token_id=ends, allowed_rows=[[0, 1], []], code_token_ids=range(10, 18)
    )
    for new_ids, expected in (((), [{10, 11}, {EOS, 5}]), ((11,), [{15}, {EOS}]), ((11, 15), [{EOS, 5}, {EOS, 5}])):
        scores = processor(torch.tensor([[3, *new_ids]] * 2), torch.zeros(2, 18))
        assert [set(row.isfinite().nonzero().flatten().tolist()) for row in scores] == expected


def test_padding_of_the_matrix_is_never_chosen():
    processor = ToolCodeLogitsProcessor(CodeTrie(torch.tensor([[10, 14], [11, 15]])), mode="trajectory", vocab_size=18)
    for new_ids in ([3], [3, 10]):
        scores = processor(torch.tensor([new_ids]), torch.zeros(1, 24))[0]
        assert scores[18:].isneginf().all() and scores[:18].isfinite().any()
