import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import torch
from transformers import AutoModel

from toolweaver_hf import RQVAEConfig, RQVAEModel, Tool, ToolCatalog
from toolweaver_hf.cousage import cousage_graph
from toolweaver_hf.modeling_rqvae import uniform_mapping
from toolweaver_hf.recipes.tokenize_tools import RQVAETrainingArguments
from toolweaver_hf.train_rqvae import RQVAETrainer, kmeans


def fit(embeddings, folder, cousage=None, steps=200, **kwargs):
    config = RQVAEConfig(**({"codebook_sizes": [8, 8], "hidden_sizes": [64], "code_dim": 16} | kwargs), input_dim=32)
    torch.manual_seed(0)
    args = RQVAETrainingArguments(output_dir=str(folder), max_steps=steps, disable_tqdm=True)
    trainer = RQVAETrainer(RQVAEModel(config), args, embeddings, cousage)
    trainer.train()
    return trainer.model.eval()


@pytest.fixture(scope="module")
def embeddings():
    """240 points in 8 clusters."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(8, 32, generator=generator)
    return centers.repeat(30, 1) + 0.2 * torch.randn(240, 32, generator=generator)


def test_training_reconstructs_and_separates_clusters(embeddings, tmp_path):
    model = fit(embeddings, tmp_path)
    with torch.no_grad():
        output = model(embeddings)
    assert output.reconstruction_loss < 0.1
    first = output.codes[:, 0].view(30, 8)
    assert (first == first[0]).all() and len(set(first[0].tolist())) == 8
    assert len(torch.unique(output.codes[:, 1])) == 8


def test_collaborative_loss_draws_co_used_tools_together(embeddings, tmp_path):
    pairs = np.arange(0, 240, 2)  # tool 2i, of one cluster, with 2i + 1, of another
    row, column = np.concatenate([pairs, pairs + 1]), np.concatenate([pairs + 1, pairs])
    graph = scipy.sparse.csr_array((np.ones(240), (row, column)), shape=(240, 240))

    def distance(model):
        with torch.no_grad():
            return model(embeddings[pairs], neighbors=embeddings[pairs + 1]).collaborative_loss.item()

    without = distance(fit(embeddings, tmp_path, graph, collaborative_weight=0))
    assert distance(fit(embeddings, tmp_path, graph)) < 0.5 * without


def test_save_and_load(embeddings, tmp_path):
    model = fit(embeddings, tmp_path / "fit", steps=20)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved").eval()
    assert isinstance(again, RQVAEModel)
    assert torch.equal(again(embeddings).codes, model(embeddings).codes)
    script = (
        "import sys\n"
        "sys.modules['toolweaver_hf'] = None\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(model.config.codebook_sizes)\n"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "saved")], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "[8, 8]", done.stderr


def test_gradients_reach_encoder_codebooks_and_decoder(embeddings):
    model = RQVAEModel(RQVAEConfig(input_dim=32, codebook_sizes=[8, 8]))
    assert all(0.5 < codebook.std() < 1.5 for codebook in model.codebooks())
    model(embeddings, neighbors=embeddings.flip(0)).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("epsilon", [1e-4, 0.05, 1.0])
def test_uniform_mapping_is_balanced(epsilon):
    distances = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    plan = uniform_mapping(distances, epsilon, iterations=200).exp()
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(1), torch.full((64,), 1 / 64))
    if epsilon > 0.01:  # a plan this sharp takes more rounds to converge
        torch.testing.assert_close(plan.sum(0), torch.full((8,), 1 / 8), rtol=0.02, atol=0)


def test_kmeans_finds_clusters(embeddings):
    centers = kmeans(embeddings, 8, torch.Generator().manual_seed(0), iterations=50)
    error = torch.cdist(embeddings, centers).square().min(1).values.sum()
    best = (embeddings - embeddings.view(30, 8, 32).mean(0).repeat(30, 1)).square().sum()
    assert error < 1.5 * best
    assert kmeans(embeddings[:3], 8).isfinite().all()


def test_nan_names_the_row(embeddings, tmp_path):
    broken = embeddings.clone()
    broken[7, 3] = float("nan")
    with pytest.raises(ValueError, match="row 7"):
        fit(broken, tmp_path)


def test_cousage_graph():
    catalog = ToolCatalog([Tool(name, f"The tool {name}.") for name in "abc"])
    graph = cousage_graph(catalog, [["a", "b"], ["b", "a"], ["a", "c"], ["a"]]).toarray()
    # a is used 4 times, b twice, c once
    expected = np.array([[0, 2 / 8**0.5, 1 / 2], [2 / 8**0.5, 0, 0], [1 / 2, 0, 0]])
    np.testing.assert_allclose(graph, expected, rtol=1e-6)
    assert cousage_graph(catalog, []).nnz == 0
    with pytest.raises(ValueError, match="'d'"):
        cousage_graph(catalog, [["a", "d"]])
