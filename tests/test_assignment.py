import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolweaver_hf.assignment import assign_codes, check_capacity


@given(st.integers(1, 16), st.integers(0, 10_000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_codes_are_unique_up_to_full_capacity(num_tools, seed, identical):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.zeros(num_tools, 3) if identical else torch.randn(num_tools, 3, generator=generator)
    codebooks = [torch.randn(4, 3, generator=generator) for _ in range(2)]
    codes = assign_codes(latents, codebooks)
    assert len({tuple(code) for code in codes.tolist()}) == num_tools
    assert codes.min() >= 0 and codes.max() < 4


@given(st.integers(2, 5), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_last_level_loses_as_little_as_brute_force(num_tools, seed):
    """One prefix, everyone's nearest code the same: all but its nearest tool move, at the least total cost."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(num_tools, 2, generator=generator) * 0.1
    last = torch.cat([torch.zeros(1, 2), torch.nn.functional.normalize(torch.randn(5, 2, generator=generator)) * 3])
    codes = assign_codes(latents, [torch.zeros(1, 2), last])[:, 1]
    cost = torch.cdist(latents.double(), last.double()).square().numpy()
    stays = int(cost[:, 0].argmin())
    assert codes[stays] == 0
    moving = [tool for tool in range(num_tools) if tool != stays]
    best = min(
        sum(cost[tool, code] for tool, code in zip(moving, choice, strict=True))
        for choice in itertools.permutations(range(1, 6), len(moving))
    )
    assert cost[moving, codes[moving]].sum() == pytest.approx(best, rel=1e-5)


def test_tools_alone_on_their_code_are_not_moved():
    codebooks = [torch.tensor([[0.0], [10.0]]), torch.tensor([[-1.0], [0.0], [1.0]])]
    codes = assign_codes(torch.tensor([[-1.0], [10.0], [10.01], [11.0]]), codebooks)
    assert codes[0].tolist() == [0, 0] and codes[1].tolist() == [1, 1] and codes[3].tolist() == [1, 2]
    assert codes[2].tolist() == [1, 0]


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
