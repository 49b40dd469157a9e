"""Few vectors are rotated without making the rotations, and the blocks of several adapters at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import splice
from splice.methods import boft
from splice.methods.oft import layers
from splice.methods.rotations import cayley, each_block, series, turned
from tests.comparing import assert_close


def skew(blocks: int, side: int, size: float = 0.3) -> torch.Tensor:
    q = torch.randn(blocks, side, side, generator=torch.Generator().manual_seed(side)) * size
    return q - q.mT


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 7, None])
@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_vectors_are_turned_as_by_the_whole(side: int, terms: int | None) -> None:
    q, x = skew(3, side).double(), torch.randn(3, 2, side, dtype=torch.float64)
    whole = cayley(q) if terms is None else series(q, terms)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(turned(x, q, terms), x @ whole)


@pytest.mark.parametrize("largest", [0.01, 0.3, 2, 60])
@pytest.mark.parametrize("side", [2, 7, 8, 16, 19, 32])
def test_many_small_blocks_are_solved_at_once(side: int, largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exactly as one by one; so they are where values are so large that this would not be exact."""
    q, x = skew(16 * side, side, largest).clamp(-largest, largest), torch.randn(16 * side, side // 2, side)
    one_by_one, solved = x @ cayley(q), []
    plain = torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda *args, **options: solved.append(1) or plain(*args, **options))
    identity = torch.eye(side, dtype=torch.float64)
    expected = x.double() @ (identity - q) @ torch.linalg.inv(identity + q)
    with torch.no_grad():
        found = turned(x, q, None)
    assert bool(solved) is (largest > 2)
    assert (found - expected).abs().max() < 5 * (one_by_one - expected).abs().max() + 1e-6


def test_blocks_of_several_are_more_blocks() -> None:
    def function(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        assert not torch._C._functorch.is_batchedtensor(q) or torch.is_grad_enabled()
        return torch.bmm(x, q)

    q, x = torch.randn(4, 2, 3, 3), torch.randn(2, 5, 3)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for dims, own in (((None, 0), q), ((None, 3), q.movedim(0, 3))):
                found = torch.vmap(lambda x, q: each_block(function, x, q), in_dims=dims)(x, own)
                assert_close(found, torch.matmul(x, q))
            twice = torch.vmap(torch.vmap(lambda q: each_block(torch.neg, q)))(q[None])
            assert torch.equal(twice, -q[None])


def test_forward_derivatives_without_gradients() -> None:
    config = splice.BOFTConfig(boft_block_size=4, target_modules=["0"], init_weights=False)
    model: Any = splice.get_peft_model(nn.Sequential(nn.Linear(256, 6)), config).eval().requires_grad_(False)
    x, towards = torch.randn(1, 256), torch.randn(1, 256)
    with torch.no_grad():
        _, found = torch.func.jvp(model, (x,), (towards,))
    assert_close(found, model(x + towards) - model(x), factor=10)  # it is linear


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        splice.OFTConfig(oft_block_size=8),
        splice.OFTConfig(oft_block_size=8, use_cayley_neumann=False),
        splice.OFTConfig(oft_block_size=8, block_share=True),
        splice.OFTConfig(oft_block_size=8, coft=True, eps=0.1),
        splice.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2),
    ],
)
def test_a_layer_makes_rotations_for_gradients_alone(config: Any, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own tensors; and for many vectors, where that costs less."""
    direct: list[int] = []

    def noted(x: torch.Tensor, q: torch.Tensor, terms: int | None) -> torch.Tensor:
        direct.append(len(x))
        return turned(x, q, terms)

    for module in (layers, boft):
        monkeypatch.setattr(module, "turned", noted)
    torch.manual_seed(0)
    config.target_modules, config.init_weights = ["0"], False
    model: Any = splice.get_peft_model(nn.Sequential(nn.Linear(32, 6)), config).eval()
    model = model.bfloat16() if half else model
    x = torch.randn(3, 32, dtype=torch.bfloat16 if half else torch.float32, requires_grad=True)
    expected = model(x)
    expected.float().sum().backward()
    assert not direct
    with torch.no_grad():
        found = model(x)
        assert direct
        del direct[:]
        model(x.repeat(9, 1))
        assert not direct
    model.requires_grad_(False)
    assert_close(model(x), expected.detach())
    assert direct
    assert_close(found, expected.detach())
    gradient, x.grad = x.grad, None
    model(x).float().sum().backward()
    assert_close(x.grad, gradient)
