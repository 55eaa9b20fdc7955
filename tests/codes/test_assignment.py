import itertools
import math

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from toolweaver_hf.codes.assignment import assign_codes, check_capacity, choose_codes, uniform_codes
from toolweaver_hf.codes.cousage import unit_degree


@given(st.integers(1, 16), st.integers(0, 10_000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_codes_are_unique_up_to_full_capacity(num_tools, seed, identical):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.zeros(num_tools, 3) if identical else torch.randn(num_tools, 3, generator=generator)
    codebooks = [torch.randn(4, 3, generator=generator) for _ in range(2)]
    codes = assign_codes(latents, codebooks)
    assert len({tuple(code) for code in codes.tolist()}) == num_tools
    assert codes.min() >= 0 and codes.max() < 4


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_as_few_tools_move_as_can_be_and_lose_as_little(num_tools, num_taken, seed):
    """Two prefixes far from each other; each is compared with all its assignments of one tool to a code."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    last = torch.randn(5 + num_taken, 2, generator=generator)
    latents = torch.cat([first[i] + 0.6 * torch.randn(num_tools, 2, generator=generator) for i in range(2)])
    taken = [[0, code] for code in torch.randperm(len(last), generator=generator)[:num_taken].tolist()]
    codes = assign_codes(latents, [first, last], np.array(taken).reshape(-1, 2))
    for prefix in range(2):
        tools = range(prefix * num_tools, (prefix + 1) * num_tools)
        cost = torch.cdist((latents[tools] - first[prefix]).double(), last.double()).square().numpy()
        nearest = cost.argmin(1)
        free = [code for code in range(len(last)) if [prefix, code] not in taken]

        def moves_and_cost(choice, nearest=nearest, cost=cost):
            return (np.not_equal(choice, nearest).sum(), cost[range(num_tools), choice].sum())

        best = min(moves_and_cost(choice) for choice in itertools.permutations(free, num_tools))
        assert codes[tools, 0].tolist() == [prefix] * num_tools
        assert moves_and_cost(codes[tools, 1]) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0])
def test_large_groups_are_solved_exactly(noise):
    """Nearly identical tools in one prefix: the total cost is that of a plain solver over all columns."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 8, generator=generator) + noise * torch.randn(120, 8, generator=generator)
    last = 2 * torch.randn(256, 8, generator=generator)
    codes = assign_codes(latents, [torch.zeros(1, 8), last])[:, 1]
    cost = torch.cdist(latents.double(), last.double()).square().numpy()
    nearest = cost.argmin(1)
    stays = codes == nearest
    assert stays.sum() == len(set(nearest)) and len(set(codes)) == 120
    free = np.setdiff1d(np.arange(256), nearest)
    moved = cost[~stays][:, free]
    assert cost[~stays, codes[~stays]].sum() == pytest.approx(moved[linear_sum_assignment(moved)].sum(), rel=1e-9)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_any_number_of_levels_of_any_sizes(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    num_tools = min(40, math.prod(sizes))
    latents = torch.randn(num_tools, 3, generator=generator)
    codebooks = [torch.randn(size, 3, generator=generator) for size in sizes]
    codes = assign_codes(latents, codebooks)
    assert len({tuple(code) for code in codes.tolist()}) == num_tools
    assert (codes >= 0).all() and (codes < sizes).all()
    assert np.array_equal(codes, assign_codes(latents, codebooks))


def test_a_crowded_prefix_keeps_those_who_would_lose_most():
    first = torch.tensor([[0.0], [10.0], [30.0]])
    latents = torch.tensor([[0.0], [1.0], [2.0], [3.0], [30.0]])
    codes = assign_codes(latents, [first, torch.tensor([[0.0], [0.5]])])
    assert codes[:, 0].tolist() == [0, 0, 1, 1, 2]


def test_tools_alone_on_their_code_are_not_moved():
    codebooks = [torch.tensor([[0.0], [10.0]]), torch.tensor([[-1.0], [0.0], [1.0]])]
    codes = assign_codes(torch.tensor([[-1.0], [10.0], [10.01], [11.0]]), codebooks)
    assert codes[0].tolist() == [0, 0] and codes[3].tolist() == [1, 2]
    # Of the two that share [1, 1], 10.0 is a little nearer to the free code: the sum is least if it moves.
    assert codes[1].tolist() == [1, 0] and codes[2].tolist() == [1, 1]


def test_taken_codes_are_not_given():
    codebooks = [torch.tensor([[0.0], [10.0]]), torch.tensor([[-1.0], [0.0], [1.0]])]
    taken = np.array([[0, 0], [0, 1], [0, 2]])
    codes = assign_codes(torch.zeros(3, 1), codebooks, taken)
    assert sorted(codes.tolist()) == [[1, 0], [1, 1], [1, 2]]


def test_errors():
    with pytest.raises(ValueError, match="17 tools do not fit into 4 x 4 = 16 codes"):
        check_capacity(17, [4, 4])
    with pytest.raises(ValueError, match="NaN"):
        assign_codes(torch.tensor([[float("nan")]]), [torch.zeros(2, 1)])


def test_the_uniform_mapping_inside_prefixes_leaves_few_collisions():
    generator = torch.Generator().manual_seed(0)
    first = 5 * torch.randn(8, 16, generator=generator)
    latents = first[torch.randint(8, (200,), generator=generator)] + 0.3 * torch.randn(200, 16, generator=generator)
    codebooks = [first, torch.randn(64, 16, generator=generator)]

    def collisions(codes):
        return 200 - len(np.unique(codes, axis=0))

    sharp = uniform_codes(latents, codebooks, epsilon=1e-9, iterations=0)  # no rounds: the nearest codes
    assert collisions(sharp) > 60
    uniform = uniform_codes(latents, codebooks, iterations=20)
    assert collisions(uniform) < 10
    assert np.array_equal(uniform[:, 0], assign_codes(latents, codebooks)[:, 0])


def graph(num_tools, edges):
    row, column = np.array(edges).T
    half = scipy.sparse.coo_array((np.ones(len(row), dtype=np.float32), (row, column)), shape=(num_tools, num_tools))
    return scipy.sparse.csr_array(half + half.T)


def test_a_code_is_chosen_by_distance_and_by_the_codes_of_co_used_tools():
    codebook = torch.tensor([[0.0], [10.0]])
    residual = torch.tensor([[0.0], [4.0], [6.0], [10.0], [4.9]])
    cousage_weights = unit_degree(graph(5, [(1, 2)]))
    assert choose_codes(residual, codebook, 0 * cousage_weights).tolist() == [0, 0, 1, 1, 0]  # the nearest
    first = choose_codes(
        residual, codebook, 3 * cousage_weights
    )  # the two that are used together agree, and nobody else moves
    assert first[1] == first[2] and first[[0, 3, 4]].tolist() == [0, 1, 0]
    assert choose_codes(residual, codebook, 1e-3 * cousage_weights).tolist() == [0, 0, 1, 1, 0]
    far = choose_codes(torch.tensor([[0.0], [10.0]]), codebook, 0.1 * unit_degree(graph(2, [(0, 1)])))
    assert far.tolist() == [0, 1]  # what they share does not outweigh the distance


@given(st.integers(0, 10_000), st.sampled_from([0.3, 1.0, 3.0]))
@settings(max_examples=30, deadline=None)
def test_choosing_with_neighbors_lowers_the_objective(seed, weight):
    generator = torch.Generator().manual_seed(seed)
    residual, codebook = torch.randn(60, 4, generator=generator), torch.randn(6, 4, generator=generator)
    cousage_weights = weight * unit_degree(graph(60, torch.randint(60, (90, 2), generator=generator).tolist()))

    def objective(index):
        left = (residual - codebook[torch.from_numpy(index)]).square().sum() / residual.var(0, correction=0).sum()
        row, column = cousage_weights.nonzero()
        return left + 0.5 * cousage_weights.data[index[row] != index[column]].sum()

    nearest = choose_codes(residual, codebook, 0 * cousage_weights)
    chosen = choose_codes(residual, codebook, cousage_weights)
    assert objective(chosen) <= objective(nearest)
    assert np.array_equal(chosen, choose_codes(residual, codebook, cousage_weights))


def test_codes_of_co_used_tools_are_unique_at_any_number_of_levels():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(100, 4, generator=generator)
    edges = unit_degree(graph(100, [(i, (i + 37) % 100) for i in range(100)]))
    row, column = edges.nonzero()
    for sizes in ([128], [16, 16], [8, 8, 8]):
        codebooks = [torch.randn(size, 4, generator=generator) for size in sizes]
        codes = assign_codes(latents, codebooks, cousage_weights=edges)
        assert len(np.unique(codes, axis=0)) == 100
        same = np.mean((codes[row] == codes[column])[:, : max(1, len(sizes) - 1)].all(1))
        apart = assign_codes(latents, codebooks, cousage_weights=0 * edges)
        assert np.array_equal(apart, assign_codes(latents, codebooks))
        before = np.mean((apart[row] == apart[column])[:, : max(1, len(sizes) - 1)].all(1))
        assert same > 3 * before if len(sizes) > 1 else same == before
