# SPDX-License-Identifier: Apache-2.0
"""An export in torch: diffusers' U-Net with our text adapters before its cross-attention; its masks."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from oracle import nhwc, relative_l2, seeded_input, torch_unet_output
from oracle import run as run_model
from safetensors.numpy import load_file

from digseg_jax.config.sampling import NUM_TRAIN_TIMESTEPS
from digseg_jax.diffusion.schedule import BETA_END, BETA_START
from digseg_jax.prediction.description import read_description
from digseg_jax.prediction.job import load_segmenter
from digseg_jax.segmentation.sampling import member_noise
from digseg_jax.weights import load_component

LIMIT = 1e-5  # relative L2
MASK_LIMIT = 1e-4  # of a probability, any pixel's
STEPS, SEED = 2, 7  # of a mask's sampling
WEIGHTS = "diffusion_pytorch_model.safetensors"


def check_export(folder: Path, cells: int = 8) -> bool:
    """Whether torch is installed; if it is, its U-Net must give our numbers for these weights."""
    if importlib.util.find_spec("torch") is None:
        return False
    ours, theirs = load_component(folder), torch_unet(folder)
    width = ours.config.text_dim or ours.config.cross_attention_dim
    sample = seeded_input("sample", (2, ours.config.in_channels, cells, cells))
    timestep, text = np.array([981, 17]), seeded_input("text", (2, 77, width))
    expected = nhwc(torch_unet_output(theirs, sample, timestep, text))
    actual = run_model(ours, "__call__", nhwc(sample), jnp.asarray(timestep), text)
    assert relative_l2(actual, expected) <= LIMIT
    return True


def check_mask(folder: Path, pipeline: Path, side: int, query: str = "wall") -> float:
    """The largest difference between our mask and that of torch's pipeline, from the same noise.

    One member, two steps, an image of the views' size. folder: an export. pipeline: where the text
    tower, the tokenizer and the autoencoder of its training are. side: of the image, in pixels.
    """
    image = np.random.default_rng(0).integers(0, 256, (side // 16, side // 16, 3))
    image = np.kron(image, np.ones((16, 16, 1), np.int64)).astype(np.uint8)
    ours, noise, scale = _our_mask(folder, image, query)
    theirs = 1 / (1 + np.exp(-scale * _torch_evidence(folder, pipeline, image, query, noise)))
    assert ours.std() > 0.01, "an even mask compares nothing"
    difference = float(np.abs(ours - theirs).max())
    assert difference <= MASK_LIMIT, difference
    return difference


def _our_mask(folder: Path, image: np.ndarray, query: str) -> tuple[np.ndarray, np.ndarray, float]:
    """As --mode=predict makes it: probabilities [h, w], the initial noise [1, h, w, c], the scale."""
    config = read_description(folder).training_config()
    dtype = dataclasses.replace(config.model, dtype="float32")
    views = dataclasses.replace(config.eval, view_size=image.shape[:2])
    segmenter, _ = load_segmenter(dataclasses.replace(config, model=dtype, eval=views), folder)
    mask = segmenter.predict_masks([image], [query], ensemble=1, steps=STEPS, key=SEED, mode="whole")
    vae = segmenter.task.vae.config
    shape = (*(side // vae.factor for side in mask[0][0].shape), vae.latent_channels)
    noise = np.asarray(member_noise(SEED, jnp.zeros(1, jnp.int32), 1, shape))[:, 0]
    return mask[0][0], noise, segmenter.scale


def _torch_evidence(
    folder: Path, pipeline: Path, image: np.ndarray, query: str, noise: np.ndarray
) -> np.ndarray:
    """The decoded mask [h, w] in [-1, 1]: transformers' text tower, diffusers' models and sampler."""
    import diffusers
    import torch
    import transformers

    diffusion = read_description(folder).training_config().diffusion
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        prediction_type=diffusion.prediction_type,
        rescale_betas_zero_snr=diffusion.zero_snr,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(STEPS)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    tower = transformers.CLIPTextModel.from_pretrained(pipeline / "text_encoder").eval()
    vae = diffusers.AutoencoderKL.from_pretrained(pipeline / "vae").eval()
    unet = torch_unet(folder)

    with torch.no_grad():
        words = tokenizer(query, padding="max_length", max_length=77, return_tensors="pt")
        text = tower(words.input_ids).last_hidden_state
        pixels = torch.from_numpy(image).movedim(-1, 0)[None].float() / 127.5 - 1
        encoded = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor

        x = torch.from_numpy(noise).movedim(-1, 1)
        for t in scheduler.timesteps:
            prediction = unet(torch.cat([encoded, x], dim=1), t, encoder_hidden_states=text).sample
            x = scheduler.step(prediction, t, x).prev_sample
        decoded = vae.decode(x / vae.config.scaling_factor).sample
        return decoded.mean(dim=1).clip(-1, 1)[0].numpy()


def torch_unet(folder: Path):
    """diffusers' U-Net with the folder's weights; text goes through its adapters, if it has some."""
    import diffusers

    model, found = diffusers.UNet2DConditionModel.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    assert all(key.startswith("text_adapters.") for key in found["unexpected_keys"])
    if found["unexpected_keys"]:
        _insert_adapters(model, load_file(folder / WEIGHTS))
    return model.eval()


def _insert_adapters(model, tensors: dict[str, np.ndarray]) -> None:
    """Each level's cross-attentions see the text as that level's adapter gives it."""
    levels = len(model.down_blocks)
    blocks = [*enumerate(model.down_blocks), (levels - 1, model.mid_block)]
    blocks += [(levels - 1 - i, block) for i, block in enumerate(model.up_blocks)]
    for level, block in blocks:
        adapt = _adapter(tensors, f"text_adapters.{level}")
        for name, module in block.named_modules():
            if name.endswith("attn2"):
                module.register_forward_pre_hook(_with_text(adapt), with_kwargs=True)


def _with_text(adapt):
    def hook(module, arguments, keywords):
        return arguments, keywords | {"encoder_hidden_states": adapt(keywords["encoder_hidden_states"])}

    return hook


def _adapter(tensors: dict[str, np.ndarray], prefix: str):
    """`models.text_adapters.TextAdapter`, written again in torch."""
    import torch
    from torch.nn import functional as F

    part = {key: torch.from_numpy(x) for key, x in tensors.items() if key.startswith(prefix + ".")}

    def linear(name: str, x):
        return F.linear(x, part[f"{prefix}.{name}.weight"], part[f"{prefix}.{name}.bias"])

    def adapt(tokens):
        weight, bias = part[f"{prefix}.norm.weight"], part[f"{prefix}.norm.bias"]
        normed = F.layer_norm(tokens, tokens.shape[-1:], weight, bias)
        base = linear("proj", tokens) if f"{prefix}.proj.weight" in part else tokens
        return base + linear("fc2", F.gelu(linear("fc1", normed)))

    return adapt
