import pytest
import torch
from conftest import small_llama

from toolweaver_hf import Tool, ToolCatalog
from toolweaver_hf.embedding_init import initialize_code_embeddings


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
    catalog = ToolCatalog([Tool(tool_id, f"The tool {tool_id}.") for tool_id in tokenizer.tool_ids])
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


def test_errors(tokenizer, base_tokenizer, codebooks):
    model = small_llama(len(base_tokenizer))
    with pytest.raises(ValueError, match="method must be"):
        initialize_code_embeddings(model, tokenizer, codebooks, method="zeros")
    with pytest.raises(ValueError, match="needs the catalogue"):
        initialize_code_embeddings(model, tokenizer, codebooks, method="mean_description")
    with pytest.raises(ValueError, match="needs the codebooks"):
        initialize_code_embeddings(model, tokenizer)
    with pytest.raises(ValueError, match="sizes"):
        initialize_code_embeddings(model, tokenizer, codebooks[::-1])
