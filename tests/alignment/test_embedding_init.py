import math
import os
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from conftest import small_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolweaver_hf import Tool, ToolCatalog, ToolCodes, ToolWeaverTokenizer
from toolweaver_hf.adapter import make_room
from toolweaver_hf.alignment.embedding_init import initialize_code_embeddings
from toolweaver_hf.demo import DEMO_FOLDER


@pytest.fixture
def codebooks():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 8, generator=generator)
    first[1] = first[0] + 0.01  # two codes that mean nearly the same
    return [first, torch.randn(4, 8, generator=generator)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["codebook", "random", "mean_description"])
def test_base_rows_stay_and_new_rows_fit_in(tokenizer, base_tokenizer, codebooks, method, tied):
    model = small_llama(len(base_tokenizer), tie_word_embeddings=tied)
    before = [matrix.weight.clone() for matrix in (model.get_input_embeddings(), model.get_output_embeddings())]
    catalog = ToolCatalog([Tool(tool_id, f"The tool <a_1> {tool_id}.") for tool_id in tokenizer.tool_ids])
    initialize_code_embeddings(model, tokenizer, codebooks, method=method, catalog=catalog)
    matrices = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for old, new in zip(before, matrices, strict=True):
        assert torch.equal(new[: len(old)], old)
        center = old.mean(0)
        lengths = (new[tokenizer.code_token_ids] - center).norm(dim=1)
        assert lengths.max() < 2 * (old - center).norm(dim=1).median()
    assert (matrices[0] is matrices[1]) == tied


def test_distances_of_the_codebook_are_kept(tokenizer, base_tokenizer, codebooks):
    model = small_llama(len(base_tokenizer), hidden_size=64)
    initialize_code_embeddings(model, tokenizer, codebooks)
    rows = model.get_input_embeddings().weight[tokenizer.code_token_ids[:3]]
    assert (rows[0] - rows[1]).norm() < 0.1 * (rows[0] - rows[2]).norm()


def test_near_codes_have_near_rows(tokenizer, base_tokenizer):
    """The order of the distances in the codebook is that of the distances between the rows, but for the projection."""
    codebook = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).repeat_interleave(32, 0)
    codebook += 0.3 * torch.randn(codebook.shape, generator=torch.Generator().manual_seed(2))
    codes = ToolCodes([96, 4], {"rain": [0, 0]})
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    model = small_llama(len(base_tokenizer), hidden_size=128)
    initialize_code_embeddings(model, tokenizer, [codebook, torch.randn(4, 16)])
    rows = model.get_input_embeddings().weight[tokenizer.code_token_ids[:96]].detach()
    pairs = torch.stack([torch.pdist(codebook), torch.pdist(rows)])
    assert torch.corrcoef(pairs)[0, 1] > 0.9


def test_the_projection_points_to_the_documents(tokenizer, base_tokenizer):
    """Rows are a linear image of the codebook that resembles the mean embeddings of the documents under each code."""
    codes = ToolCodes([6, 2], {f"t{i}": divmod(i, 2) for i in range(12)})
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    words = ["data", "search", "time", "name", "text", "number"]  # a token each
    catalog = ToolCatalog([Tool(f"t{i}", f"{words[i // 2]}." * 5, name=words[i // 2]) for i in range(12)])
    codebooks = [torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), torch.randn(2, 8)]
    rows = {}
    for method in ("codebook", "mean_description"):
        model = small_llama(len(base_tokenizer), hidden_size=64)
        initialize_code_embeddings(model, tokenizer, codebooks, method, catalog)
        rows[method] = model.get_input_embeddings().weight[tokenizer.code_token_ids[:6]].detach()
        rows[method] -= rows[method].mean(0)
    assert torch.cosine_similarity(rows["codebook"], rows["mean_description"]).min() > 0.95


def test_the_rows_of_a_code_add_up_to_its_document(tokenizer, base_tokenizer):
    """Rows are linear images of the codebooks, and together what a document has apart from the other tools', where a
    token counts the more, the fewer documents have it."""
    codes = ToolCodes([6, 2], {f"t{i}": divmod(i, 2) for i in range(12)})
    tokenizer = ToolWeaverTokenizer.from_base(base_tokenizer, codes)
    topics, actions = ["rain", "money", "letter", "music", "train", "flower"], ["find", "send"]
    words = [f"{topics[i // 2]} {actions[i % 2]}" for i in range(12)]
    catalog = ToolCatalog([Tool(f"t{i}", f"{words[i]} " * 5, name=words[i]) for i in range(12)])
    codebooks = [torch.randn(size, 8, generator=torch.Generator().manual_seed(1)) for size in (6, 2)]
    model = small_llama(len(base_tokenizer), hidden_size=64)
    initialize_code_embeddings(model, tokenizer, codebooks, catalog=catalog)
    weight = model.get_input_embeddings().weight.detach()
    base = weight[: tokenizer.level_offsets[0]]
    rows = (weight[torch.as_tensor(tokenizer.tool_code_ids)] - base.mean(0)).sum(1)
    texts = [base_tokenizer.encode(tool.document) for tool in catalog]
    documents = []
    for text in texts:
        weights = torch.tensor([math.log(13 / sum(token in other for other in texts)) for token in text])
        documents.append((weights[:, None] * base[text]).sum(0) / weights.sum())
    documents = torch.stack(documents) - torch.stack(documents).mean(0)
    assert torch.cosine_similarity(rows, documents).min() > 0.95
    assert (rows - documents).square().sum() < 0.1 * documents.square().sum()


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_padded_beyond_the_tokenizer_and_bf16(tokenizer, base_tokenizer, codebooks, tied):
    """Rows that a base has to spare are used; no token of the base, and no row that is still spare, is touched."""
    model = small_llama(len(base_tokenizer) + 64, tie_word_embeddings=tied).to(torch.bfloat16)
    before = [matrix.weight.clone() for matrix in (model.get_input_embeddings(), model.get_output_embeddings())]
    initialize_code_embeddings(model, tokenizer, codebooks)
    for old, matrix in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert matrix.weight.dtype == torch.bfloat16 and matrix.weight.shape == old.shape
        changed = (matrix.weight != old).any(1).nonzero().flatten().tolist()
        assert changed == tokenizer.code_token_ids
        assert matrix.weight.isfinite().all()


def perplexity(model, tokenizer, texts):
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :256]
        with torch.no_grad():
            losses += [model(ids, labels=ids).loss.item()] * (ids.shape[1] - 1)
    return torch.tensor(losses).mean().exp().item()


def test_a_router_by_token_id_gets_rows_for_the_new_tokens(tokenizer, base_tokenizer):
    model = tiny_model("deepseek_v4", len(base_tokenizer))
    tables = [module.tid2eid.clone() for module in model.modules() if hasattr(module, "tid2eid")]
    initialize_code_embeddings(model, tokenizer, method="random")
    codes = torch.tensor([tokenizer.code_token_ids])
    assert tables and model(input_ids=codes, use_cache=False).logits.isfinite().all()
    for old, router in zip(tables, (m for m in model.modules() if hasattr(m, "tid2eid")), strict=True):
        assert torch.equal(router.tid2eid[: len(old)], old) and len(router.tid2eid) >= len(tokenizer)


@pytest.mark.parametrize("model_type", ["inkling_text", "inkling2_text", "marian"])
def test_a_vocabulary_of_another_name_takes_in_the_new_tokens(base_tokenizer, tmp_path, model_type):
    """Inkling cuts its logits to one, and Marian's decoder has one of its own."""
    model = tiny_model(model_type, len(base_tokenizer))
    make_room(model, len(base_tokenizer) + 20)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(5, 25)[None]
    assert loaded(input_ids=ids, use_cache=False).logits.shape[2] >= len(base_tokenizer) + 20


@pytest.mark.parametrize("model_type", ["xlstm", "reformer", "mllama"])
def test_embeddings_that_cannot_be_resized_are_refused(base_tokenizer, model_type):
    model = tiny_model(model_type, len(base_tokenizer))
    with pytest.raises(ValueError, match="cannot be resized"):
        make_room(model, len(base_tokenizer) + 20)


def test_embeddings_of_each_layer_get_the_same_rows_every_time(base_tokenizer):
    """An adapter does not hold them, so that whoever loads it makes them anew."""
    models = [tiny_model("gemma4", len(base_tokenizer)) for _ in range(2)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        make_room(model, len(base_tokenizer) + 20)
    first, second = (model.state_dict() for model in models)
    rows = next(len(weight) for name, weight in first.items() if "embed_tokens_per_layer" in name)
    assert rows >= len(base_tokenizer) + 20
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_plain_text_stays_as_probable(base_tokenizer):
    """New rows take less than 1 % off the probability of plain text, here in a small model that has learned some."""
    texts = ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl").documents
    ids = torch.tensor([i for text in texts for i in base_tokenizer.encode(text)])
    ids = ids[: len(ids) // 64 * 64].view(-1, 64)
    model = small_llama(len(base_tokenizer), hidden_size=64, initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(120):
        batch = ids[torch.arange(step * 16, step * 16 + 16) % len(ids)]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    check_perplexity(model, base_tokenizer, codebook_size=16)


@pytest.mark.slow
@pytest.mark.skipif(
    "TOOLWEAVER_TEST_MODELS" not in os.environ, reason="TOOLWEAVER_TEST_MODELS names no folder of models"
)
@pytest.mark.parametrize("method", ["codebook", "random", "mean_description"])
def test_plain_text_stays_as_probable_for_a_real_model(method):
    folder = Path(os.environ["TOOLWEAVER_TEST_MODELS"]) / "SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    check_perplexity(model, AutoTokenizer.from_pretrained(folder), method)


def check_perplexity(model, base, method="codebook", codebook_size=1024):
    catalog = ToolCatalog.from_file(DEMO_FOLDER / "catalog.jsonl")
    texts = [" ".join(tool.description for tool in list(catalog)[i : i + 20]) for i in range(0, len(catalog), 40)]
    before = perplexity(model.eval(), base, texts)
    codes = ToolCodes([codebook_size] * 2, {tool.id: divmod(i, codebook_size) for i, tool in enumerate(catalog)})
    tokenizer = ToolWeaverTokenizer.from_base(base, codes)
    generator = torch.Generator().manual_seed(0)
    codebooks = [torch.randn(codebook_size, 32, generator=generator) for _ in range(2)]
    initialize_code_embeddings(model, tokenizer, codebooks, method, catalog)
    after = perplexity(model, tokenizer, texts)
    assert after / before < 1.01


def test_errors(tokenizer, base_tokenizer, codebooks):
    model = small_llama(len(base_tokenizer))
    with pytest.raises(ValueError, match="method must be"):
        initialize_code_embeddings(model, tokenizer, codebooks, method="zeros")
    with pytest.raises(ValueError, match="needs the catalog"):
        initialize_code_embeddings(model, tokenizer, codebooks, method="mean_description")
    with pytest.raises(ValueError, match="needs the codebooks"):
        initialize_code_embeddings(model, tokenizer)
    with pytest.raises(ValueError, match="sizes"):
        initialize_code_embeddings(model, tokenizer, codebooks[::-1])
