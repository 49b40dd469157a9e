"""Pipelines of diffusers with adapters: every figure is what the same script gives where `peft` is the reference."""

from __future__ import annotations

import gc
import json
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.utils import convert_state_dict_to_diffusers
from peft.tuners.tuners_utils import BaseTunerLayer

from tests.ecosystem.both import reference
from tests.ecosystem.tiny_diffusers import (
    draw,
    flux,
    image,
    kohya_file,
    old_file,
    peft_file,
    stable_diffusion,
    stable_diffusion_3,
)

Figures = dict[str, Any]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FILE = "pytorch_lora_weights.safetensors"
TEXT = ("q_proj", "v_proj", "out_proj")


def switching() -> Figures:
    """One adapter, two, weights for them and for blocks, fusing, switching off, taking off, and again."""
    pipe, out = stable_diffusion(), {}
    one = peft_file(pipe.unet, "unet", (*ATTENTION, "conv1"), 4, "one")
    two = peft_file(pipe.unet, "unet", ATTENTION, 2, "two")
    out["base"] = image(pipe)
    pipe.load_lora_weights(one, adapter_name="one")
    out["one"] = image(pipe)
    pipe.load_lora_weights(two, adapter_name="two", low_cpu_mem_usage=False)
    out["two"] = image(pipe)
    out["there are"], out["active"] = pipe.get_list_adapters(), pipe.get_active_adapters()
    pipe.set_adapters(["one", "two"], [0.5, 0.7])
    out["both"], out["active of both"] = image(pipe), pipe.get_active_adapters()
    blocks = {"unet": {"down": 0.2, "mid": 0.3, "up": {"block_0": 0.6}}}
    pipe.set_adapters(["one", "two"], [blocks, 1.0])
    out["by block"] = image(pipe)
    pipe.set_adapters("one")
    out["one again"] = image(pipe)
    out["with a scale"] = image(pipe, cross_attention_kwargs={"scale": 0.3})
    out["without it"] = image(pipe)
    pipe.disable_lora()
    out["disabled"] = image(pipe)
    pipe.enable_lora()
    out["enabled"] = image(pipe)
    pipe.set_adapters(["one", "two"], [0.5, 0.7])
    pipe.fuse_lora(components=["unet"], lora_scale=0.5)
    out["fused"], out["number fused"] = image(pipe), pipe.num_fused_loras
    pipe.unfuse_lora(components=["unet"])
    out["unfused"] = image(pipe)
    pipe.set_adapters("two")
    pipe.fuse_lora(components=["unet"], adapter_names=["two"], safe_fusing=True)
    out["two fused"], out["names fused"] = image(pipe), sorted(pipe.fused_loras)
    pipe.unfuse_lora(components=["unet"])
    pipe.set_adapters(["one", "two"])
    pipe.delete_adapters("one")
    out["without one"], out["then there are"] = image(pipe), pipe.get_list_adapters()
    out["then active"] = pipe.get_active_adapters()
    pipe.delete_adapters("two")
    out["without two"], out["then none"] = image(pipe), pipe.get_list_adapters()
    pipe.load_lora_weights(one, adapter_name="one")
    out["one after all"] = image(pipe)
    pipe.unload_lora_weights()
    out["unloaded"], out["none again"] = image(pipe), pipe.get_list_adapters()
    pipe.load_lora_weights(two)
    out["two without a name"] = image(pipe)
    pipe.load_lora_weights(one)
    out["one without a name"], out["names"] = image(pipe), pipe.get_list_adapters()
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    out["fused for good"] = image(pipe)
    return out


def spellings() -> Figures:
    """Files of today, of diffusers before peft, and of sd-scripts, with ranks and alphas of their own."""
    out: Figures = {}
    files: dict[str, Callable[[StableDiffusionPipeline], dict[str, torch.Tensor]]] = {
        "today": lambda pipe: {
            **peft_file(pipe.unet, "unet", ATTENTION, 4, "a"),
            **peft_file(pipe.unet, "unet", ("conv1", "proj_in"), 2, "b"),
        },
        "before peft": lambda pipe: old_file(pipe.unet, "unet", ATTENTION, 4, "c"),
        "sd-scripts": lambda pipe: {
            **kohya_file(pipe.unet, "lora_unet", (*ATTENTION, "ff.net.2"), 4, 3.0, "d"),
            **kohya_file(pipe.unet, "lora_unet", ("proj_in", "conv2"), 2, 1.0, "e"),
        },
        "bias of B": lambda pipe: peft_file(pipe.unet, "unet", ATTENTION, 2, "f", bias=True),
        "dora": lambda pipe: peft_file(pipe.unet, "unet", (*ATTENTION, "conv1"), 2, "g", magnitude=True),
    }
    for name, make in files.items():
        for cheap in (True, False):
            pipe = stable_diffusion()
            pipe.load_lora_weights(make(pipe), low_cpu_mem_usage=cheap)
            out[f"{name}, low_cpu_mem_usage={cheap}"] = image(pipe)
            out[f"{name}, names"] = pipe.get_list_adapters()
            if name == "bias of B":
                continue  # the layers have none that it could be merged into
            pipe.fuse_lora(components=["unet"])
            out[f"{name}, fused"] = image(pipe)
            pipe.unfuse_lora(components=["unet"])
            out[f"{name}, unfused"] = image(pipe)
    return out


def text_encoders() -> Figures:
    """Adapters on the text encoder as well, which transformers loads, in each spelling."""
    out: Figures = {}
    files: dict[str, Callable[[StableDiffusionPipeline], dict[str, torch.Tensor]]] = {
        "today": lambda pipe: {
            **peft_file(pipe.unet, "unet", ATTENTION, 4, "a"),
            **peft_file(pipe.text_encoder, "text_encoder", TEXT, 2, "b"),
        },
        "before peft": lambda pipe: {
            **old_file(pipe.unet, "unet", ATTENTION, 4, "a"),
            **old_file(pipe.text_encoder, "text_encoder", TEXT, 2, "b"),
        },
        "sd-scripts": lambda pipe: {
            **kohya_file(pipe.unet, "lora_unet", ATTENTION, 4, 2.0, "a"),
            **kohya_file(pipe.text_encoder, "lora_te_text_model", (*TEXT, "fc1"), 2, 1.0, "b"),
        },
    }
    for name, make in files.items():
        pipe = stable_diffusion()
        pipe.load_lora_weights(make(pipe), adapter_name="one")
        out[name] = image(pipe)
        pipe.set_adapters("one", {"text_encoder": 0.3, "unet": 0.0})
        out[f"{name}, text alone"] = image(pipe)
        pipe.fuse_lora(components=["unet", "text_encoder"], lora_scale=0.5)
        out[f"{name}, fused"] = image(pipe)
        pipe.unfuse_lora(components=["unet", "text_encoder"])
        out[f"{name}, there are"] = pipe.get_list_adapters()
        pipe.disable_lora()
        out[f"{name}, disabled"] = image(pipe)
        pipe.enable_lora()
        pipe.delete_adapters("one")
        out[f"{name}, deleted"] = image(pipe)
        pipe.load_lora_weights(make(pipe), adapter_name="one")
        pipe.unload_lora_weights()
        out[f"{name}, unloaded"] = image(pipe)
        pipe.load_lora_weights(make(pipe))
        out[f"{name}, again"] = image(pipe)
    return out


def _filled(network: Any, name: str) -> None:
    """Give the adapter's tensors values that follow from their names alone."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    own = get_peft_model_state_dict(network, adapter_name=name)
    set_peft_model_state_dict(network, {key: draw(*t.shape, key=key) for key, t in own.items()}, name)


def training() -> Figures:
    """A new adapter on the bare network, two steps, the files that come of it, and back into a pipeline."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict

    out: Figures = {}
    configs = {
        "lora": LoraConfig(r=2, target_modules=[*ATTENTION], init_lora_weights="gaussian"),
        "dora": LoraConfig(r=2, lora_alpha=4, target_modules=[*ATTENTION, "conv1"], use_dora=True),
        "loha": LoHaConfig(r=2, target_modules=[*ATTENTION, "conv1"]),
        "lokr": LoKrConfig(r=2, target_modules=[*ATTENTION, "conv1"]),
    }
    for name, config in configs.items():
        pipe = stable_diffusion()
        unet = pipe.unet
        unet.requires_grad_(False)
        unet.add_adapter(config, adapter_name=name)
        _filled(unet, name)
        trained = {key: p for key, p in unet.named_parameters() if p.requires_grad}
        out[f"{name}, trained"] = sorted(trained)
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
        for step in range(2):
            noise = unet(draw(1, 4, 8, 8, key=step), 5, draw(1, 8, 16, key="text")).sample
            loss = noise.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            out[f"{name}, loss {step}"] = loss.detach()
        out[f"{name}, image"] = image(pipe)
        tensors = {key: t.detach() for key, t in get_peft_model_state_dict(unet, adapter_name=name).items()}
        out[f"{name}, tensors"] = dict(sorted(tensors.items()))
        with tempfile.TemporaryDirectory() as folder:
            unet.save_lora_adapter(folder, adapter_name=name)
            file = Path(folder, FILE)
            out[f"{name}, file"] = dict(sorted(safetensors.torch.load_file(file).items()))
            with safetensors.safe_open(file, "pt") as opened:
                said = json.loads(opened.metadata()["lora_adapter_metadata"])
            said.pop("peft_version", None)
            said["target_modules"] = sorted(said["target_modules"])
            out[f"{name}, metadata"] = said
            pipe.unet.delete_adapters(name)
            out[f"{name}, deleted"] = image(pipe)
            if "lora_alpha" in said:
                fresh = stable_diffusion()
                fresh.unet.load_lora_adapter(folder, prefix=None, weight_name=FILE)
                out[f"{name}, read again"] = image(fresh)
        if name == "lora":
            with tempfile.TemporaryDirectory() as folder:
                layers = convert_state_dict_to_diffusers(tensors)
                StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
                fresh = stable_diffusion()
                fresh.load_lora_weights(folder)
                out[f"{name}, by way of a pipeline"] = image(fresh)
    return out


def offloaded() -> Figures:
    """Group offloading, before and after the adapter came, and weights that are stored in float8 between calls."""
    out: Figures = {}
    for how in ("leaf_level", "block_level"):
        options: dict[str, Any] = {"onload_device": torch.device("cpu"), "offload_type": how}
        options |= {"num_blocks_per_group": 1} if how == "block_level" else {}
        for first in (True, False):
            pipe = stable_diffusion()
            one = peft_file(pipe.unet, "unet", (*ATTENTION, "conv1"), 4, "one")
            two = peft_file(pipe.unet, "unet", ATTENTION, 2, "two")
            if first:
                apply_group_offloading(pipe.unet, **options)
            pipe.load_lora_weights(one, adapter_name="one")
            if not first:
                apply_group_offloading(pipe.unet, **options)
            here = f"{how}, offloaded {'first' if first else 'last'}"
            out[here] = image(pipe)
            pipe.load_lora_weights(two, adapter_name="two")
            out[f"{here}, two"] = image(pipe)
            pipe.set_adapters(["one", "two"], [0.5, 0.5])
            out[f"{here}, both"] = image(pipe)
            pipe.delete_adapters("two")
            out[f"{here}, one again"] = image(pipe)
            pipe.unload_lora_weights()
            out[f"{here}, unloaded"] = image(pipe)
            pipe.load_lora_weights(one)
            out[f"{here}, loaded again"] = image(pipe)
    return out


def in_float8(first: bool) -> tuple[StableDiffusionPipeline, torch.Tensor]:
    """A pipeline whose weights are stored in float8 between calls, told so before or after the adapter came."""
    pipe = stable_diffusion()
    one = peft_file(pipe.unet, "unet", ATTENTION, 4, "one")
    if first:
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    pipe.load_lora_weights(one, adapter_name="one")
    if not first:
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return pipe, image(pipe)


def stored_in_float8() -> Figures:
    """Told so after the adapter came: told before, the reference stores the adapter in float8 too, and cannot compute."""
    pipe, first = in_float8(first=False)
    out: Figures = {"one": first, "again": image(pipe)}
    own = {key: p for key, p in pipe.unet.named_parameters() if "lora_" in key}
    out["dtypes"] = sorted({str(p.dtype) for p in own.values()})
    out["sums"] = {key: p.detach().double().sum() for key, p in sorted(own.items())}
    pipe.disable_lora()
    out["disabled"] = image(pipe)
    return out


def fluxes() -> Figures:
    pipe, out = flux(), {}
    network = pipe.transformer
    ends = (*ATTENTION, "add_q_proj", "ff.net.2", "proj_out")
    one = peft_file(network, "transformer", ends, 4, "one")
    kohya = {}
    for name, size_in, size_out in (
        ("double_blocks_0_img_attn_qkv", 32, 96),
        ("double_blocks_0_img_attn_proj", 32, 32),
        ("double_blocks_0_txt_mlp_0", 32, 128),
        ("single_blocks_0_linear2", 160, 32),
    ):
        key = f"lora_unet_{name}"
        kohya[f"{key}.lora_down.weight"] = draw(3, size_in, key=(key, "down"))
        kohya[f"{key}.lora_up.weight"] = draw(size_out, 3, key=(key, "up"))
        kohya[f"{key}.alpha"] = torch.tensor(2.0)
    out["base"] = image(pipe)
    pipe.load_lora_weights(one, adapter_name="one")
    out["one"] = image(pipe)
    # With low_cpu_mem_usage the reference's layers share one A, which it cannot save then.
    pipe.load_lora_weights(kohya, adapter_name="kohya", low_cpu_mem_usage=False)
    out["kohya"], out["there are"] = image(pipe), pipe.get_list_adapters()
    pipe.set_adapters(["one", "kohya"], [0.5, 0.3])
    out["both"] = image(pipe)
    out["with a scale"] = image(pipe, joint_attention_kwargs={"scale": 0.5})
    pipe.fuse_lora(components=["transformer"])
    out["fused"] = image(pipe)
    pipe.unfuse_lora(components=["transformer"])
    pipe.delete_adapters("one")
    out["kohya alone"] = image(pipe)
    with tempfile.TemporaryDirectory() as folder:
        network.save_lora_adapter(folder, adapter_name="kohya")
        pipe.unload_lora_weights()
        out["unloaded"] = image(pipe)
        network.load_lora_adapter(folder, prefix=None, weight_name=FILE)
        out["read again"] = image(pipe)
    return out


def sd3s() -> Figures:
    pipe, out = stable_diffusion_3(), {}
    network = pipe.transformer
    one = peft_file(network, "transformer", (*ATTENTION, "add_k_proj", "norm1.linear"), 4, "one")
    two = peft_file(network, "transformer", ("net.2",), 2, "two", magnitude=True)
    out["base"] = image(pipe)
    pipe.load_lora_weights(one, adapter_name="one")
    out["one"] = image(pipe)
    pipe.load_lora_weights(two, adapter_name="two", low_cpu_mem_usage=False)
    out["two"], out["there are"] = image(pipe), pipe.get_list_adapters()
    pipe.set_adapters(["one", "two"], [0.5, 0.7])
    out["both"] = image(pipe)
    pipe.set_adapters(["one", "two"], [{"transformer": 0.1}, 1.0])
    out["by part"] = image(pipe)
    out["with a scale"] = image(pipe, joint_attention_kwargs={"scale": 0.5})
    pipe.fuse_lora(components=["transformer"], adapter_names=["one", "two"])
    out["fused"] = image(pipe)
    pipe.unfuse_lora(components=["transformer"])
    pipe.disable_lora()
    out["disabled"] = image(pipe)
    pipe.unload_lora_weights()
    out["unloaded"] = image(pipe)
    pipe.load_lora_weights(two)
    out["two again"] = image(pipe)
    return out


def hotswaps() -> Figures:
    """Adapters of other ranks and alphas in the place of the first, with room for them and without."""
    out: Figures = {}
    for room in (True, False):
        pipe = stable_diffusion()
        files = {
            name: kohya_file(pipe.unet, "lora_unet", (*ATTENTION, "conv1"), rank, alpha, name)
            for name, rank, alpha in (("one", 4, 3.0), ("two", 2, 5.0), ("three", 8, 4.0))
        }
        if room:
            pipe.enable_lora_hotswap(target_rank=8)
        for name, file in files.items():
            pipe.load_lora_weights(file, adapter_name="default", hotswap=name != "one")
            out[f"{name}, {room}"] = image(pipe)
        out[f"there are, {room}"] = pipe.get_list_adapters()
    return out


SCENARIOS = [switching, spellings, text_encoders, training, offloaded, stored_in_float8, hotswaps, fluxes, sd3s]


def all_figures() -> dict[str, Figures]:
    return {scenario.__name__: scenario() for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def expected() -> dict[str, Figures]:
    return reference(all_figures)


def differences(ours: Any, theirs: Any, place: str) -> list[str]:
    """A line for each figure that is another one here."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        lines = [f"{place}: only on one side: {key}" for key in ours.keys() ^ theirs.keys()]
        for key in ours.keys() & theirs.keys():
            lines += differences(ours[key], theirs[key], f"{place}: {key}")
        return lines
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        close = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=2e-5)
        return [] if close else [f"{place}: {float((ours - theirs).abs().max())} of {float(theirs.abs().max())}"]
    return [] if ours == theirs else [f"{place}: {ours} instead of {theirs}"]


@pytest.mark.shows("diffusers", "Stable Diffusion, Flux, SD3: each figure is the reference's")
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_figure_is_the_references(scenario: Callable[[], Figures], expected: dict[str, Figures]) -> None:
    assert differences(scenario(), expected[scenario.__name__], scenario.__name__) == []


def test_the_figures_tell_adapters_apart(expected: dict[str, Figures]) -> None:
    figures = expected["switching"]
    for one, two in (("base", "one"), ("one", "two"), ("one", "both"), ("both", "by block"), ("both", "fused")):
        assert (figures[one] - figures[two]).abs().max() > 1e-3, (one, two)


# -- what only holds here


def test_told_to_store_float8_first_or_last_is_the_same() -> None:
    (one, first), (two, last) = in_float8(first=True), in_float8(first=False)
    assert torch.equal(first, last)
    for pipe in (one, two):
        stored = {key: p.dtype for key, p in pipe.unet.named_parameters() if key.endswith("to_q.weight")}
        assert set(stored.values()) == {torch.float8_e4m3fn}
        assert {p.dtype for key, p in pipe.unet.named_parameters() if "lora_" in key} == {torch.float32}


@pytest.mark.shows("diffusers", "`unload_lora_weights` gives back the very layers and frees the adapter")
@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "group offload"])
def test_unloading_gives_back_the_very_layers(hooked: bool) -> None:
    pipe = stable_diffusion()
    before, image_before = dict(pipe.unet.named_modules()), image(pipe)
    classes = {path: type(module) for path, module in before.items()}
    keys = list(pipe.unet.state_dict())
    if hooked:
        apply_group_offloading(pipe.unet, onload_device=torch.device("cpu"), offload_type="leaf_level")
    pipe.load_lora_weights(peft_file(pipe.unet, "unet", ATTENTION, 4, "one"))
    tensors = [weakref.ref(p) for key, p in pipe.unet.named_parameters() if "lora_" in key]
    assert tensors and not torch.equal(image(pipe), image_before)
    pipe.unload_lora_weights()
    after = dict(pipe.unet.named_modules())
    assert after.keys() == before.keys() and all(after[path] is module for path, module in before.items())
    assert {path: type(module) for path, module in after.items()} == classes
    assert list(pipe.unet.state_dict()) == keys and torch.equal(image(pipe), image_before)
    gc.collect()
    assert [ref for ref in tensors if ref() is not None] == []


@pytest.mark.shows("diffusers", "group offload with streams of CUDA: an adapter loaded, switched, taken off")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a CUDA GPU")
@pytest.mark.parametrize("first", [True, False], ids=["offloaded first", "offloaded last"])
def test_group_offload_with_streams(first: bool) -> None:
    def step(pipe: Any) -> torch.Tensor:
        text = draw(1, 8, 16, key="prompt", scale=1.0).cuda()
        noise = draw(1, 4, 8, 8, key="latents", scale=1.0).cuda()
        with torch.no_grad():
            found: torch.Tensor = pipe.unet(noise, 1, text).sample.cpu()
        return found

    found = []
    for streams in (False, True):
        pipe = stable_diffusion()
        one, two = (peft_file(pipe.unet, "unet", (*ATTENTION, "conv1"), rank, rank) for rank in (4, 2))
        # On the GPU as a whole, for the figures to compare with; else each group of layers comes there for its call.
        offload = pipe.unet.cuda if not streams else partial(
            apply_group_offloading, pipe.unet, torch.device("cuda"), torch.device("cpu"), "leaf_level", use_stream=True
        )  # fmt: skip
        if first:
            offload()
        pipe.load_lora_weights(one, adapter_name="one")
        if not first:
            offload()
        figures = [step(pipe)]
        pipe.load_lora_weights(two, adapter_name="two")
        pipe.set_adapters(["one", "two"], [0.5, 0.7])
        figures.append(step(pipe))
        pipe.delete_adapters("one")
        figures.append(step(pipe))
        pipe.unload_lora_weights()
        found.append([*figures, step(pipe)])
    for streamed, plain in zip(found[1], found[0]):
        torch.testing.assert_close(streamed, plain, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[0][0], found[0][1])


def test_a_load_that_fails_says_why_and_leaves_the_others() -> None:
    pipe = stable_diffusion()
    one, two = (peft_file(pipe.unet, "unet", ATTENTION, rank, rank) for rank in (4, 2))
    pipe.load_lora_weights(one, adapter_name="one")
    expected = image(pipe)
    key = next(key for key in two if "lora_A" in key)
    broken = {**two, key: torch.zeros(2, 5)}
    with pytest.raises(RuntimeError, match="(?s)lora_A.*5"):
        pipe.load_lora_weights(broken, adapter_name="two")
    assert pipe.get_list_adapters() == {"unet": ["one"]}
    pipe.set_adapters("one")
    assert torch.equal(image(pipe), expected)
    pipe.load_lora_weights(two, adapter_name="two")
    assert not torch.equal(image(pipe), expected)


def test_deleted_adapters_leave_nothing_behind() -> None:
    pipe = stable_diffusion()
    one, two = (peft_file(pipe.unet, "unet", ATTENTION, rank, rank) for rank in (4, 2))
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.load_lora_weights(two, adapter_name="two")
    tensors = [weakref.ref(p) for key, p in pipe.unet.named_parameters() if ".two." in key]
    pipe.delete_adapters("two")
    gc.collect()
    assert [ref for ref in tensors if ref() is not None] == []
    pipe.load_lora_weights(one, adapter_name="two")
    now = image(pipe)
    pipe.set_adapters("one")
    assert torch.equal(image(pipe), now)


@pytest.mark.shows("diffusers", "`hotswap=True` in a compiled UNet: nothing is compiled again")
def test_a_compiled_unet_is_not_compiled_again() -> None:
    import torch._dynamo

    files = {name: (rank, alpha) for name, rank, alpha in (("one", 4, 3.0), ("two", 2, 5.0), ("three", 8, 4.0))}

    def load(pipe: Any, name: str, hotswap: bool) -> None:
        file = kohya_file(pipe.unet, "lora_unet", ("to_q", "to_v"), *files[name], name)
        pipe.load_lora_weights(file, adapter_name="default", hotswap=hotswap)

    expected = {}
    for name in files:
        pipe = stable_diffusion()
        load(pipe, name, False)
        pipe.set_adapters("default", 0.5)
        expected[name] = image(pipe)
    torch._dynamo.reset()
    pipe = stable_diffusion()
    pipe.enable_lora_hotswap(target_rank=8)
    load(pipe, "one", False)
    pipe.set_adapters("default", 0.5)
    pipe.unet.compile(backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.allclose(image(pipe), expected["one"], atol=1e-5)
        for name in ("two", "three", "one"):
            load(pipe, name, True)
            pipe.set_adapters("default", 0.5)
            assert torch.allclose(image(pipe), expected[name], atol=1e-5), name
    torch._dynamo.reset()


def test_layers_put_back_by_hand_are_forgotten() -> None:
    """As scripts do that know no better way: each layer's `get_base_layer`, and the configs deleted."""
    pipe = stable_diffusion()
    unet, one = pipe.unet, peft_file(pipe.unet, "unet", ATTENTION, 4, "one")
    before = image(pipe)
    pipe.load_lora_weights(one, adapter_name="one")
    expected = image(pipe)
    for path, layer in list(unet.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, name = path.rpartition(".")
            setattr(unet.get_submodule(parent), name, layer.get_base_layer())
    del unet.peft_config
    unet._hf_peft_config_loaded = False
    assert torch.equal(image(pipe), before)
    pipe.load_lora_weights(one, adapter_name="one")
    assert torch.equal(image(pipe), expected)
