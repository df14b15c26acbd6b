# SPDX-License-Identifier: Apache-2.0
"""The miniature repositories are what diffusers and transformers read, and give the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from oracle import nhwc, relative_l2, run, seeded_input
from safetensors import safe_open

from digseg_jax.segmentation.prompt_bank import encode_prompts
from digseg_jax.weights import catalog, load_component, load_text_tower

PIPELINES = ("sd-1.5", "sd-2.1", "marigold")
PROMPTS = ("a photo of a zebra crossing", "sky")


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_whole(repositories, name):
    root = repositories / catalog.hub_id(name) / "main"
    index = json.loads((root / "model_index.json").read_text())
    for part, (library, kind) in ((k, v) for k, v in index.items() if isinstance(v, list)):
        if library in ("diffusers", "transformers") and part != "feature_extractor":
            assert (root / part).is_dir(), part
            assert kind in ("CLIPTokenizer", *_classes(root / part)), part


def _classes(folder: Path) -> list[str]:
    for file in folder.glob("*config.json"):
        values = json.loads(file.read_text())
        if named := [values.get("_class_name"), *values.get("architectures", [])]:
            return named
    return []


@pytest.mark.parametrize("name", PIPELINES)
def test_structure_is_stable_diffusions(repositories, name):
    """Levels, heads and attention places of the full size; only channels are fewer."""
    root = repositories / catalog.hub_id(name) / "main"
    unet, vae, text = (load_component(root / part).config for part in ("unet", "vae", "text_encoder"))
    full = catalog.find(name)
    assert unet.down_block_types == (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    assert unet.in_channels == full.unet.get("in_channels", 4)
    assert unet.use_linear_projection == full.unet.get("use_linear_projection", False)
    assert unet.cross_attention_dim == text.hidden_size and unet.layers_per_block == 2
    assert vae.mid_block_add_attention and vae.factor == 8 and vae.scaling_factor == 0.18215
    assert text.max_position_embeddings == 77 and text.vocab_size == 49408


@pytest.mark.parametrize(("name", "pad"), [("sd-1.5", 49407), ("sd-2.1", 0), ("clip-b16", 49407)])
def test_texts_begin_end_and_are_padded_with_the_real_ids(repositories, name, pad):
    root = repositories / catalog.hub_id(name) / "main"
    tower = load_text_tower(str(root if name == "clip-b16" else root / "text_encoder"))
    ids, mask = tower.tokenizer(PROMPTS, 77)
    assert (ids[:, 0] == 49406).all() and (ids[:, -1] == pad).all()
    assert [row[n - 1] for row, n in zip(ids, mask.sum(1), strict=True)] == [49407] * 2


@pytest.mark.parametrize("branch", ["fp16", "half", "sharded", "sharded-half"])
def test_branches_hold_the_same_unet(repositories, branch):
    root = repositories / catalog.hub_id("sd-1.5")
    files = sorted((root / branch / "unet").glob("*.safetensors"))
    assert len(files) == (3 if branch.startswith("sharded") else 1)
    stored = {}
    for file in files:
        with safe_open(file, "numpy") as handle:
            stored |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    with safe_open(root / "main" / "unet" / "diffusion_pytorch_model.safetensors", "numpy") as handle:
        assert set(stored) == set(handle.keys())
        for key, tensor in stored.items():
            np.testing.assert_allclose(tensor, handle.get_tensor(key), atol=2e-3)


@pytest.mark.parametrize("name", PIPELINES)
def test_torch_reads_a_pipeline_and_computes_the_same(repositories, name):
    torch = pytest.importorskip("torch")
    import diffusers
    import transformers

    root = repositories / catalog.hub_id(name) / "main"
    kwargs = {} if name == "marigold" else {"safety_checker": None}
    kind = diffusers.MarigoldDepthPipeline if name == "marigold" else diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(root, **kwargs)

    # text: our ids and tokens against theirs
    tower = load_text_tower(str(root / "text_encoder"))
    theirs = pipe.tokenizer(list(PROMPTS), padding="max_length", max_length=77, return_tensors="pt")
    ours = tower.tokenizer(PROMPTS, 77).ids
    np.testing.assert_array_equal(ours, theirs.input_ids.numpy())
    bank = encode_prompts(
        tower.graphdef, tower.params, tower.tokenizer, PROMPTS, max_length=77, mask_padding=False
    )
    assert isinstance(pipe.text_encoder, transformers.CLIPTextModel)
    with torch.no_grad():
        text = pipe.text_encoder(theirs.input_ids).last_hidden_state
    assert relative_l2(bank.tokens, text.numpy()) < 1e-5

    # U-Net and autoencoder
    inputs = pipe.unet.config.in_channels
    sample, t = seeded_input("sample", (2, inputs, 8, 8)), np.array([981, 17], np.int64)
    unet = load_component(root / "unet")
    with torch.no_grad():
        expected = pipe.unet(torch.from_numpy(sample), torch.from_numpy(t), text).sample.numpy()
    got = run(unet, "__call__", nhwc(sample), t, jax.numpy.asarray(text.numpy()))
    assert relative_l2(got, nhwc(expected)) < 1e-5
    image = seeded_input("image", (1, 3, 64, 64))
    vae = load_component(root / "vae")
    with torch.no_grad():
        latent = pipe.vae.encode(torch.from_numpy(image)).latent_dist.mean
        again = pipe.vae.decode(latent).sample.numpy()
    assert relative_l2(run(vae, "encode", nhwc(image)).mean, nhwc(latent.numpy())) < 1e-5
    assert relative_l2(run(vae, "decode", nhwc(latent.numpy())), nhwc(again)) < 1e-5


@pytest.mark.parametrize("name", ["clip-l14", "clip-b16"])
def test_torch_reads_a_whole_clip_model(repositories, name):
    torch = pytest.importorskip("torch")
    import transformers

    root = repositories / catalog.hub_id(name) / "main"
    theirs, report = transformers.CLIPModel.from_pretrained(root, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(root)
    tower = load_text_tower(str(root))
    ids = tokenizer(list(PROMPTS), padding="max_length", max_length=77, return_tensors="pt").input_ids
    np.testing.assert_array_equal(tower.tokenizer(PROMPTS, 77).ids, ids.numpy())
    bank = encode_prompts(
        tower.graphdef, tower.params, tower.tokenizer, PROMPTS, max_length=77, mask_padding=False
    )
    with torch.no_grad():
        expected = theirs.text_model(ids).last_hidden_state.numpy()
    assert relative_l2(bank.tokens, expected) < 1e-5


def test_torch_reads_the_tiny_autoencoder(repositories):
    torch = pytest.importorskip("torch")
    import diffusers

    root = repositories / catalog.hub_id("taesd") / "main"
    theirs = diffusers.AutoencoderTiny.from_pretrained(root)
    image = seeded_input("image", (1, 3, 64, 64))
    with torch.no_grad():
        latent = theirs.encode(torch.from_numpy(image)).latents.numpy()
    assert relative_l2(run(load_component(root), "encode", nhwc(image)).mean, nhwc(latent)) < 1e-5
