"""SHADOW on transformers for diffusion, beside the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import splice
from tests.comparing import Snapshot, assert_close, assert_same_tensors, differ, tensors_in

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")


def flux2(**changes: Any) -> Any:
    """A Flux2 of three heads, two double-stream and five single-stream blocks."""
    torch.manual_seed(0)
    sizes = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 5,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "joint_attention_dim": 6,
        "timestep_guidance_channels": 6,
        "mlp_ratio": 2.0,
        "axes_dims_rope": (2, 2, 2, 2),
    }
    return diffusers.Flux2Transformer2DModel(**{**sizes, **changes}).eval()


def flux2_inputs() -> dict[str, Any]:
    noise = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 6, 4, generator=noise),
        "encoder_hidden_states": torch.randn(2, 3, 6, generator=noise),
        "timestep": torch.tensor([0.3, 0.5]),
        "guidance": torch.tensor([1.0, 2.0]),
        "img_ids": torch.arange(24.0).view(6, 4),
        "txt_ids": torch.zeros(3, 4),
    }


def pixart() -> Any:
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=16,
        sample_size=8, patch_size=2, caption_channels=6, norm_num_groups=1,
    ).eval()  # fmt: skip


def pixart_inputs() -> dict[str, Any]:
    noise = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=noise),
        "encoder_hidden_states": torch.randn(2, 3, 6, generator=noise),
        "timestep": torch.tensor([1, 5]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


Made = tuple[Callable[[], Any], Callable[[], dict[str, Any]]]
FLUX2, PIXART = (flux2, flux2_inputs), (pixart, pixart_inputs)
FORMS: dict[str, tuple[Made, dict[str, Any]]] = {
    "token mlp": (PIXART, {}),
    "token mlp, narrow": (
        PIXART,
        {"shadow_hidden_size": 6, "shadow_intermediate_size": 5, "shadow_num_hidden_layers": 2},
    ),
    "flux2": (FLUX2, {}),
    "flux2, own stems": (FLUX2, {"share_embeddings": False}),
    "flux2, narrow": (FLUX2, {"shadow_hidden_size": 16}),
    "flux2, fewer heads": (FLUX2, {"shadow_num_attention_heads": 2, "shadow_intermediate_size": 20}),
    "flux2, deep": (FLUX2, {"shadow_num_hidden_layers": 2, "shadow_hidden_size": 8}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_new_one_is_trained_saved_and_loaded_as_in_the_reference(form: str, tmp_path: Path) -> None:
    (make, inputs), own = FORMS[form]
    found = []
    for library in (peft, splice):
        network = make()
        torch.manual_seed(4)
        config = library.ShadowConfig(r=3, init_weights=False, shadow_alpha=2.0, shadow_dropout=0.0, **own)
        model = library.get_peft_model(network, config)
        started = {n: p.detach().clone() for n, p in model.named_parameters() if "shadow_" in n}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**inputs()).sample.square().mean().backward()
        optimizer.step()
        model.save_pretrained(str(tmp_path / library.__name__))
        found.append((started, model.eval()(**inputs()).sample))
    assert_same_tensors(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1])
    assert differ(found[1][1], make()(**inputs()).sample)
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "splice")).eval()
    network = make()
    before = Snapshot.of(network)
    ours = splice.PeftModel.from_pretrained(network, tmp_path / "peft").eval()
    assert_close(theirs(**inputs()).sample, found[1][1])
    assert_close(ours(**inputs()).sample, found[0][1])
    assert sorted(tensors_in(tmp_path / "splice")) == sorted(tensors_in(tmp_path / "peft"))
    with pytest.raises(NotImplementedError, match="says nothing alone"):
        ours.base_model.unload_shadow()
    ours.unload()
    before.assert_same(network)


def test_a_trained_flux2_is_the_shadow(tmp_path: Path) -> None:
    flux2(num_layers=1, num_single_layers=2, num_attention_heads=2).save_pretrained(tmp_path / "network")
    found = []
    for library in (peft, splice):
        network = flux2()
        torch.manual_seed(4)
        model = library.get_peft_model(
            network, library.ShadowConfig(r=3, init_weights=False, shadow_model=str(tmp_path / "network"))
        )
        trained = sorted(name for name, p in model.named_parameters() if p.requires_grad)
        model.eval().save_pretrained(str(tmp_path / library.__name__))
        found.append((model(**flux2_inputs()).sample, trained))
    assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    again = splice.PeftModel.from_pretrained(flux2(), tmp_path / "peft").eval()
    assert_close(again(**flux2_inputs()).sample, found[0][0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 8}, "its `in_channels` is 8, and that of the base 4"),
        ({"guidance_embeds": False}, "its `guidance_embeds` is False"),
        ({"num_attention_heads": 4}, "its num_attention_heads is 4, and has to be 1 to 3"),
        ({"num_layers": 3}, "its num_layers is 3"),
        ({"mlp_ratio": 5.0}, "its intermediate size is 80, and has to be 1 to 48"),
    ],
)
def test_a_trained_flux2_for_another_base(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    flux2(**{"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, **changes}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        splice.get_peft_model(flux2(), splice.ShadowConfig(shadow_model=str(tmp_path)))


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"shadow_hidden_size": 12}, "its width must be as many as it has heads"),
        ({"shadow_hidden_size": 16, "shadow_num_attention_heads": 3}, "`shadow_hidden_size` is 16, of 3 heads"),
        ({"shadow_hidden_size": 32}, "its num_attention_heads is 4, and has to be 1 to 3"),
        ({"shadow_num_hidden_layers": 3}, "its num_layers is 3, and has to be 1 to 2"),
        ({"shadow_intermediate_size": 100}, "its intermediate size is 100, and has to be 1 to 48"),
    ],
)
def test_mirrors_that_would_be_larger_than_the_base(own: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        splice.get_peft_model(flux2(), splice.ShadowConfig(**own))


def test_what_the_shadow_of_flux2_cannot_follow() -> None:
    config = splice.ShadowConfig(r=3, target_modules=r"transformer_blocks\.\d+")
    with pytest.raises(ValueError, match="adapt these .`single_transformer_blocks`. alone"):
        splice.get_peft_model(flux2(), config)(**flux2_inputs())
    model = splice.get_peft_model(flux2(), splice.ShadowConfig(r=3))
    with pytest.raises(ValueError, match="leave out `kv_cache_mode`"):
        model(**flux2_inputs(), kv_cache_mode="extract", num_ref_tokens=2)


def test_networks_for_tokens_cannot_shadow_others(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="PixArtTransformer2DModel is a transformer for diffusion, which a trained network"
    ):
        splice.get_peft_model(pixart(), splice.ShadowConfig(shadow_model=str(tmp_path)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_that_compute_themselves_again(reentrant: bool) -> None:
    found = []
    for again in (False, True):
        network = flux2()
        torch.manual_seed(0)
        model = splice.get_peft_model(network, splice.ShadowConfig(r=3, init_weights=False, shadow_dropout=0.0)).train()
        if again:

            def checkpoint(run: Any, *args: Any) -> Any:
                return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=reentrant)

            network.enable_gradient_checkpointing(checkpoint)
        model(**flux2_inputs()).sample.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert_close(found[1][name], grad)
