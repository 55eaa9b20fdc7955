import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, TrainerCallback

from toolweaver_hf import RQVAEConfig, RQVAEModel, Tool, ToolCatalog
from toolweaver_hf.codes.cousage import cousage_graph, hold_out_edges
from toolweaver_hf.codes.start import kmeans, start_model
from toolweaver_hf.codes.trainer import LOSSES, CodesEarlyStoppingCallback, RQVAETrainer, RQVAETrainingArguments
from toolweaver_hf.modeling_rqvae import uniform_mapping


def trainer(embeddings, folder, cousage=None, **kwargs):
    """A trainer of a small model; keyword arguments go to the configuration or to the training."""
    sizes = {"input_dim": 32, "codebook_sizes": [8, 64], "hidden_sizes": [64], "code_dim": 16}
    own = {name: kwargs.pop(name) for name in [*kwargs] if name in RQVAEConfig().to_dict()}
    torch.manual_seed(0)
    args = RQVAETrainingArguments(output_dir=str(folder), disable_tqdm=True, **kwargs)
    return RQVAETrainer(RQVAEModel(RQVAEConfig(**(sizes | own))), args, embeddings, cousage)


def fit(embeddings, folder, cousage=None, steps=200, **kwargs):
    fitted = trainer(embeddings, folder, cousage, max_steps=steps, **kwargs)
    fitted.train()
    return fitted.model.eval()


def ring(num_tools):
    """Each tool is used with the one before and the one after it."""
    tools = np.arange(num_tools)
    graph = scipy.sparse.coo_array((np.ones(num_tools), (tools, (tools + 1) % num_tools)), shape=(num_tools,) * 2)
    return scipy.sparse.csr_array(graph + graph.T)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


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
    assert len(torch.unique(output.codes, dim=0)) > 120
    assert (torch.full((1000,), 1e-40) * 0.5 > 0).all()  # denormal numbers are numbers again


def test_collaborative_loss_draws_co_used_tools_together(embeddings, tmp_path):
    pairs = np.arange(0, 240, 2)  # tool 2i, of one cluster, with 2i + 1, of another
    row, column = np.concatenate([pairs, pairs + 1]), np.concatenate([pairs + 1, pairs])
    graph = scipy.sparse.csr_array((np.ones(240), (row, column)), shape=(240, 240))

    def distance(**kwargs):
        fitted = trainer(embeddings, tmp_path, graph, max_steps=100, **kwargs)
        fitted.train()
        with torch.no_grad():
            output = fitted.model(embeddings[pairs], fitted.codes[pairs + 1], codes=fitted.codes[pairs])
        return output.collaborative_loss.item()

    assert distance() < 0.5 * distance(collaborative_weight=0)


def test_pairs_kept_from_training_share_their_first_code(tmp_path):
    """Three times as often as without the graph, where tools are used in sets of which their documents do not tell."""
    shared = {0.0: [], 1.0: []}
    for seed in range(2):
        embeddings = torch.randn(120, 32, generator=torch.Generator().manual_seed(seed))
        sets = np.random.default_rng(seed).permutation(120).reshape(24, 5)
        pairs = np.concatenate([sets[:, [i, j]] for i in range(5) for j in range(i)])
        half = scipy.sparse.coo_array((np.ones(len(pairs), dtype=np.float32), pairs.T), shape=(120, 120))
        kept, hidden = hold_out_edges(scipy.sparse.csr_array(half + half.T), 0.2, seed)
        for weight, shares in shared.items():
            options = {"collaborative_weight": weight, "codebook_sizes": [16, 32]}
            fitted = trainer(embeddings, tmp_path, kept, max_steps=20, seed=seed, **options)
            fitted.train()
            first = fitted.codes[:, 0].numpy()
            shares.append(np.mean(first[hidden[:, 0]] == first[hidden[:, 1]]))
    assert np.mean(shared[1.0]) > 3 * np.mean(shared[0.0]), shared


def test_codes_of_tools_that_are_much_alike_become_the_nearest(tmp_path):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(60, 32, generator=generator).repeat(4, 1)
    embeddings += 0.1 * torch.randn(embeddings.shape, generator=generator)

    def collisions(**kwargs):
        fitted = trainer(embeddings, tmp_path, max_steps=200, **kwargs)
        fitted.train()
        return fitted.evaluate()["eval_collision_rate"]

    assert collisions() < 0.5 * collisions(assignment_weight=0)


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
    assert done.stdout.strip() == "[8, 64]", done.stderr


def test_gradients_reach_encoder_codebooks_and_decoder(embeddings):
    model = RQVAEModel(RQVAEConfig(input_dim=32, codebook_sizes=[8, 8]))
    assert all(0.5 < codebook.std() < 1.5 for codebook in model.codebooks())
    model(embeddings, neighbor_codes=torch.randint(8, (240, 2))).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("epsilon", [1e-4, 0.05, 1.0])
def test_uniform_mapping_is_balanced(epsilon):
    distances = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    plan = uniform_mapping(distances, epsilon, iterations=200).exp()
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(1), torch.full((64,), 1 / 64))
    if epsilon > 0.01:  # a plan this sharp takes more rounds to converge
        torch.testing.assert_close(plan.sum(0), torch.full((8,), 1 / 8), rtol=0.02, atol=0)


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([1e-3, 0.05, 10.0]), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_uniform_mapping_is_finite_and_batched(rows, columns, epsilon, seed):
    """Any epsilon, any scale, in bf16 too, and several problems at once as one by one."""
    generator = torch.Generator().manual_seed(seed)
    distances = torch.randn(3, rows, columns, generator=generator) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    plans = uniform_mapping(distances, epsilon)
    assert plans.isfinite().all()
    torch.testing.assert_close(plans.logsumexp(-1).exp(), torch.full((3, rows), 1 / rows))
    for plan, problem in zip(plans, distances, strict=True):
        torch.testing.assert_close(plan, uniform_mapping(problem, epsilon), rtol=1e-4, atol=1e-2)
    assert uniform_mapping(distances.bfloat16(), epsilon).isfinite().all()
    assert uniform_mapping(torch.zeros(rows, columns), epsilon).isfinite().all()


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
    uses = [["a", "b"], ["b", "a"], ["a", "c"], ["a"]]
    # a is used 4 times, b twice, c once
    expected = np.array([[0, 2 / 8**0.5, 1 / 2], [2 / 8**0.5, 0, 0], [1 / 2, 0, 0]])
    np.testing.assert_allclose(cousage_graph(catalog, uses, min_cousage=1).toarray(), expected, rtol=1e-6)
    expected[0, 2] = expected[2, 0] = 0  # a and c only met once
    np.testing.assert_allclose(cousage_graph(catalog, uses).toarray(), expected, rtol=1e-6)
    assert cousage_graph(catalog, []).nnz == 0
    with pytest.raises(ValueError, match="'d'"):
        cousage_graph(catalog, [["a", "d"]])
    with pytest.raises(ValueError, match="min_cousage"):
        cousage_graph(catalog, uses, min_cousage=0)


def test_resumed_training_ends_as_the_unbroken_one(embeddings, tmp_path):
    graph = ring(240)
    for step in (4, 23):  # when the codebooks are started, and amid the rest
        whole, broken = tmp_path / f"whole{step}", tmp_path / f"broken{step}"
        options = {
            "max_steps": 40,
            "per_device_train_batch_size": 64,
            "codebook_update": "ema" if step == 4 else "gradient",
        }
        expected = trainer(embeddings, whole, graph, **options)
        expected.train()
        first = trainer(embeddings, broken, graph, save_strategy="steps", save_steps=step, **options)
        first.add_callback(StopAt(step))
        first.train()
        torch.manual_seed(99)  # nothing depends on the global state
        second = trainer(embeddings, broken, graph, **options)
        second.train(resume_from_checkpoint=True)
        for name, value in expected.model.state_dict().items():
            torch.testing.assert_close(second.model.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_moving_averages_learn_codebooks(embeddings, tmp_path):
    fitted = trainer(embeddings, tmp_path, max_steps=200, codebook_update="ema")
    fitted.train()
    metrics = fitted.evaluate()
    assert metrics["eval_reconstruction_loss"] < 0.1
    model = fitted.model
    assert not any(codebook.weight.requires_grad for codebook in model.quantizer.codebooks)
    before = [codebook.clone() for codebook in model.codebooks()]
    model.train()(embeddings).loss.backward()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.codebooks(), strict=True))
    model.save_pretrained(tmp_path / "saved")
    again = RQVAEModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.eval()(embeddings).codes, model.eval()(embeddings).codes)


def test_a_moving_average_is_the_mean_of_its_residuals(embeddings):
    model = RQVAEModel(RQVAEConfig(input_dim=32, codebook_sizes=[4], codebook_update="ema", ema_decay=0.0)).train()
    with torch.no_grad():
        latents = model.encode(embeddings)
        codes = model(embeddings).codes[:, 0]
    for code in codes.unique():
        torch.testing.assert_close(model.codebooks()[0][code], latents[codes == code].mean(0))


def test_bf16(embeddings, tmp_path):
    fitted = trainer(embeddings, tmp_path, max_steps=200, bf16=True, use_cpu=True)
    fitted.train()
    assert fitted.evaluate()["eval_reconstruction_loss"] < 0.1
    assert all(parameter.dtype == torch.float32 for parameter in fitted.model.parameters())
    half = fitted.model.to(torch.bfloat16).eval()
    assert half(embeddings.bfloat16(), neighbor_codes=fitted.codes.flip(0)).loss.isfinite()


def test_early_stopping_waits_for_both_measures(embeddings, tmp_path):
    callback = CodesEarlyStoppingCallback(patience=2)
    fitted = trainer(embeddings, tmp_path, max_steps=2000, eval_strategy="steps", eval_steps=20)
    fitted.add_callback(callback)
    fitted.train()
    assert 60 <= fitted.state.global_step < 2000
    history = [entry for entry in fitted.state.log_history if "eval_collision_rate" in entry]
    for name in ("eval_collision_rate", "eval_reconstruction_loss"):
        assert min(entry[name] for entry in history[-2:]) >= min(entry[name] for entry in history[:-2]) - 0.001


def test_early_stopping_stops_at_the_evaluation_that_used_up_its_patience(embeddings, tmp_path):
    fitted = trainer(embeddings, tmp_path, max_steps=200, eval_strategy="steps", eval_steps=10)
    fitted.add_callback(CodesEarlyStoppingCallback(patience=2, threshold=1.0))  # nothing after the first can improve
    fitted.train()
    assert fitted.state.global_step == 30


def test_losses_are_logged_one_by_one(embeddings, tmp_path):
    pytest.importorskip("tensorboard")
    fitted = trainer(embeddings, tmp_path, ring(240), max_steps=20, logging_steps=10, report_to="tensorboard")
    fitted.train()
    last = [entry for entry in fitted.state.log_history if "reconstruction_loss" in entry][-1]
    weights = fitted.model.config
    assert last["loss"] == pytest.approx(
        last["reconstruction_loss"]
        + last["codebook_loss"]
        + weights.commitment_weight * last["commitment_loss"]
        + weights.assignment_weight * last["assignment_loss"]
        + weights.collaborative_weight * last["collaborative_loss"],
        rel=1e-3,
    )
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_two_processes_have_the_losses_of_one(tmp_path):
    """The same number of tools a step, on one process and on two."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "import torch\n"
        "sys.path.insert(0, sys.argv[3])\n"
        "from test_rqvae import ring, trainer\n"
        "embeddings = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))\n"
        "fitted = trainer(embeddings, sys.argv[1], ring(200), max_steps=40, logging_steps=5, use_cpu=True,\n"
        "                 per_device_train_batch_size=int(sys.argv[2]))\n"
        "fitted.train()\n"
        "if fitted.is_world_process_zero():\n"
        "    json.dump([entry for entry in fitted.state.log_history if 'loss' in entry], open(sys.argv[1] + '.json', 'w'))\n"
    )
    histories = []
    for processes in (1, 2):
        out = str(tmp_path / f"out{processes}")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [*launch, str(script), out, str(64 // processes), os.path.dirname(__file__)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        histories.append(json.loads(Path(out + ".json").read_text()))
    for one, two in zip(*histories, strict=True):
        for name in ("loss", *LOSSES):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=0.01), (name, one["step"])


@pytest.mark.parametrize("num_tools", [1, 3, 10])
@pytest.mark.parametrize("identical", [False, True])
def test_tiny_and_identical_catalogs(tmp_path, num_tools, identical):
    embeddings = torch.randn(num_tools, 32, generator=torch.Generator().manual_seed(0))
    if identical:
        embeddings = embeddings[:1].repeat(num_tools, 1)
    graph = scipy.sparse.csr_array((num_tools, num_tools))  # no two tools are used together
    fitted = trainer(embeddings, tmp_path, graph, max_steps=20)
    fitted.train()
    assert len(torch.unique(fitted.codes, dim=0)) == num_tools
    assert all(parameter.isfinite().all() for parameter in fitted.model.parameters())


def test_tools_without_edges_do_not_dilute_the_others(embeddings, tmp_path):
    """The weight of a pair does not change with the scale of the similarities, nor with tools that have none."""
    graph = ring(240)
    alone = 5 * graph.copy()
    alone.resize(480, 480)
    index = torch.arange(240)
    draws = torch.rand(240, dtype=torch.float64)
    expected = trainer(embeddings, tmp_path, graph).neighbors.draw(index, draws)
    neighbors, weights = trainer(embeddings.repeat(2, 1), tmp_path, alone).neighbors.draw(index, draws)
    assert torch.equal(neighbors, expected[0])
    torch.testing.assert_close(weights, expected[1])
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))


def test_neighbors_are_drawn_in_proportion_to_their_similarity(embeddings, tmp_path):
    graph = ring(240)
    graph[0, 1] = graph[1, 0] = 3.0
    drawer = trainer(embeddings, tmp_path, graph).neighbors
    index = torch.arange(240).repeat(50)
    ends, weights = drawer.draw(index, torch.rand(len(index), dtype=torch.float64))
    steps = (ends - index + 120) % 240 - 120
    assert set(steps.tolist()) == {-1, 1}
    drawer_of_one = drawer.draw(torch.zeros(4000, dtype=torch.int64), torch.rand(4000, dtype=torch.float64))[0]
    assert (drawer_of_one == 1).float().mean() == pytest.approx(0.75, abs=0.03)
    assert weights[0] == pytest.approx(2 * weights[2].item())


@pytest.mark.parametrize("code_dim", [4, 64])
def test_the_start_is_the_linear_solution(embeddings, code_dim):
    """As good as principal axes and k-means, also where the latents have more dimensions than the embeddings."""
    model = RQVAEModel(RQVAEConfig(input_dim=32, code_dim=code_dim, codebook_sizes=[8, 8])).eval()
    model.mean.copy_(embeddings.mean(0))
    model.scale.copy_((embeddings - model.mean).square().mean().sqrt())
    start_model(model, embeddings, torch.Generator().manual_seed(0))
    axes = torch.linalg.svd(embeddings - embeddings.mean(0), full_matrices=False).Vh[:code_dim]
    projected = (embeddings - embeddings.mean(0)) @ axes.T @ axes + embeddings.mean(0)
    torch.testing.assert_close(model.decode(model.encode(embeddings)), projected, rtol=1e-3, atol=1e-3)
    assert model(embeddings).reconstruction_loss < (0.5 if code_dim == 4 else 0.1)


def test_held_out_edges():
    graph = ring(200)
    kept, hidden = hold_out_edges(graph, 0.2, seed=1)
    assert 20 < len(hidden) < 60
    assert kept.nnz // 2 + len(hidden) == graph.nnz // 2
    assert (kept != kept.T).nnz == 0 and all(kept[u, v] == 0 and graph[u, v] == 1 for u, v in hidden)
    with pytest.raises(ValueError, match="from 0 to below 1"):
        hold_out_edges(graph, 1.0)
