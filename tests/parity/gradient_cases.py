# SPDX-License-Identifier: Apache-2.0
"""Gradients of an MSE with respect to every parameter of small models, in torch and here.

A golden file holds two numbers per parameter rather than the gradient: its norm, and its product
with a random direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracle import UNETS, VAE, nhwc, seeded_input, seeded_tensor, unet_inputs
from towers import BERT, CLIP, bert_ids, clip_ids, pixels, torch_model

from digseg_jax import trees
from digseg_jax.models import functional
from digseg_jax.weights import keymap

CONFIGS: dict[str, dict[str, Any]] = {
    "unet_sd1": UNETS["sd1"],
    "unet_sd2": UNETS["sd2"],
    "vae": VAE,
    "bert": BERT,
    "clip_text": CLIP["text_projected"],
    "clip_vision": CLIP["vision"],
}
# A key's bias moves all logits of a query alike, so its gradient is zero but for rounding.
ZERO_GRADIENT = ("to_k.bias", "k_proj.bias", "self.key.bias")


def build_torch(name: str) -> Any:
    """The torch model of a case, with its random weights."""
    import diffusers

    config = CONFIGS[name]
    if "_class_name" in config:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    return torch_model(config)


def _torch_results(name: str, model: Any) -> list[Any]:
    import torch

    if name.startswith("unet"):
        sample, timestep, text, mask = map(torch.from_numpy, unet_inputs())
        return [model(sample, timestep, text, encoder_attention_mask=mask).sample]
    if name == "vae":
        posterior = model.encode(torch.from_numpy(_image())).latent_dist
        decoded = model.decode(torch.from_numpy(_latent())).sample
        return [posterior.mean, posterior.logvar, decoded]
    if name == "clip_vision":
        return [model(torch.from_numpy(pixels())).image_embeds]
    ids, mask = bert_ids() if name == "bert" else clip_ids()
    out = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64)))
    return [out.last_hidden_state, out.pooler_output if name == "bert" else out.text_embeds]


def _our_results(name: str, model: nnx.Module) -> list[Any]:
    if name.startswith("unet"):
        sample, timestep, text, mask = unet_inputs()
        return [model(nhwc(sample), jnp.asarray(timestep), text, jnp.asarray(mask))]
    if name == "vae":
        posterior = model.encode(nhwc(_image()))
        return [posterior.mean, posterior.logvar, model.decode(nhwc(_latent()))]
    if name == "clip_vision":
        return [model(nhwc(pixels())).image_embeds]
    return list(model(*map(jnp.asarray, bert_ids() if name == "bert" else clip_ids())))


def _image() -> np.ndarray:
    return seeded_input("image", (1, 3, 16, 24))


def _latent() -> np.ndarray:
    return seeded_input("latent", (1, 4, 4, 6))


def torch_gradients(name: str, model: Any) -> dict[str, np.ndarray]:
    """Hub key -> gradient of the mean squared distance to seeded targets."""
    import torch

    loss = 0.0
    for i, result in enumerate(_torch_results(name, model)):
        target = torch.from_numpy(seeded_input(f"target {i}", tuple(result.shape)))
        loss = loss + torch.mean((result - target) ** 2)
    loss.backward()
    return {key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None}


def our_gradients(name: str, model: nnx.Module) -> dict[str, np.ndarray]:
    """The same from our model."""
    graphdef, params = functional.split(model)

    def loss(params: Any) -> Any:
        results = _our_results(name, functional.merge(graphdef, params))
        shape: Callable[[Any], tuple[int, ...]] = lambda x: (x.shape[0], x.shape[3], *x.shape[1:3])  # noqa: E731
        total = 0.0
        for i, result in enumerate(results):
            if result.ndim == 4:  # targets are drawn in torch's layout
                target = nhwc(seeded_input(f"target {i}", shape(result)))
            else:
                target = seeded_input(f"target {i}", result.shape)
            total = total + jnp.mean((result - target) ** 2)
        return total

    options = {"xla_backend_optimization_level": 0}  # compiling takes far longer than running once
    gradients = jax.jit(jax.grad(loss), compiler_options=options)(params)
    flat = trees.flatten(gradients)
    return {keymap.hub_key(p): keymap.to_hub(p, np.asarray(g)) for p, g in flat.items()}


def digest(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Key -> (norm, product with a direction of unit entries) in float64."""
    found = {}
    for key, g in gradients.items():
        direction = np.sign(seeded_tensor(f"direction {key}", g.shape)).astype(np.float64)
        g = g.astype(np.float64)
        found[key] = np.array([np.linalg.norm(g), np.sum(g * direction)])
    return found
