"""What is peculiar to WaveFT: which wavelets there are, and what an update is made of."""

from __future__ import annotations

import pytest
import torch

import splice
from splice.methods.waveft.filters import LOW_PASS, high_pass
from splice.methods.waveft.record import WaveFTConfig
from tests import bases


def config(**changes: object) -> WaveFTConfig:
    return WaveFTConfig(target_modules=["first", "second"], **{"n_frequency": 6, "init_weights": False, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [f for f in LOW_PASS if f != "coif4"])
def test_the_filters_put_a_signal_together_from_its_halves(family: str) -> None:
    """Each is orthonormal, to itself moved by two places and to the other one."""
    low, high = torch.tensor(LOW_PASS[family]).double(), torch.tensor(high_pass(LOW_PASS[family])).double()
    assert torch.allclose(low.sum(), torch.tensor(2.0).double().sqrt(), atol=1e-6)
    for step in range(0, len(low), 2):
        here = float(step == 0)
        moved = slice(step, None), slice(None, len(low) - step)
        assert abs(float(low[moved[0]] @ low[moved[1]]) - here) < 1e-6
        assert abs(float(high[moved[0]] @ high[moved[1]]) - here) < 1e-6
        assert abs(float(low[moved[0]] @ high[moved[1]])) < 1e-6


def test_an_update_that_is_known() -> None:
    """Of four rows and columns with three coefficients."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = splice.get_peft_model(base, WaveFTConfig(target_modules=["0"], n_frequency=3, scaling=2.0))
    layer = model.base_model.placed["default"]["0"]
    with torch.no_grad():
        layer.tensor("waveft_spectrum").copy_(torch.tensor([1.0, -0.5, 0.25]))
        update = layer.update()
    rows = [[0, 0, 0.25, -0.25], [0, 0, -0.25, 0.25], [0, 0, 0.5, 1.5], [0, 0, -0.5, -1.5]]
    assert torch.allclose(update, torch.tensor(rows), atol=1e-6)
    assert model.base_model.model[0].waveft_indices["default"].tolist() == [[1, 3, 2], [3, 3, 3]]


@pytest.mark.parametrize("family", ["haar", "db11", "coif5", "DB1"])
def test_a_wavelet_without_a_filter_is_refused(family: str) -> None:
    with pytest.raises(
        ValueError, match=rf"`wavelet_family` is '{family}', for which there is no filter. There are db1,"
    ):
        splice.get_peft_model(bases.LINEAR.build(), config(wavelet_family=family))
    # Where nothing is transformed the name has no meaning.
    splice.get_peft_model(bases.LINEAR.build(), config(wavelet_family=family, use_idwt=False))


def test_more_coefficients_than_places_are_refused() -> None:
    with pytest.raises(ValueError, match="first: `n_frequency` is 1000, and the weight has 8 x 6 = 48 places"):
        splice.get_peft_model(bases.LINEAR.build(), config(n_frequency=1000))


def test_coefficients_are_dealt_out_by_size_among_all_targets() -> None:
    """The number of one layer depends on the other targets, and no layer is left without."""
    base = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 6), "b": torch.nn.Linear(6, 20), "c": torch.nn.Linear(1, 1)})
    base.forward = lambda x: x  # type: ignore[method-assign]
    fields = {"n_frequency": 9, "proportional_parameters": True}
    for names, counts in ((["a", "b"], [5, 13]), (["a", "b", "c"], [8, 19, 1]), (["a"], [9])):
        model = splice.get_peft_model(base, WaveFTConfig(target_modules=names, **fields))  # type: ignore[arg-type]
        placed = model.base_model.placed["default"]
        assert [len(layer.tensor("waveft_spectrum")) for layer in placed.values()] == counts
        model.unload()
