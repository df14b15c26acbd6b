# SPDX-License-Identifier: Apache-2.0
"""Presence of classes by CLIP: one pass for an image, where a coarse pass takes one for each class.

CLIP compares the whole image with every name, so what fills little of an image scores low, whatever
its name; the gate therefore takes the best-scored classes, as many as it may, without a cut. Ours: the
paper mentions no gate. The model is transformers' CLIPModel (Radford et al., arXiv:2103.00020).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digseg_jax.arraytypes import Array, Float, Params, UInt8
from digseg_jax.config.templates import fill
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.text.clip_vision import normalize_pixels
from digseg_jax.segmentation.prompt_bank import encode_prompts
from digseg_jax.segmentation.resize import resize_image
from digseg_jax.training.tasks.base import to_unit
from digseg_jax.weights.hub import resolve
from digseg_jax.weights.load import load_component, load_config
from digseg_jax.weights.text_tower import load_tower_tokenizer

TEXT, VISION = "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"
TEMPLATE = "a photo of a {}"  # CLIP's own prompt for names; the U-Net's weights have others
LOGIT_SCALE = 100.0  # factor on the cosines before the softmax; CLIP's own, after training


class ClipPresence:
    """Scores of a vocabulary's classes for an image, by the cosines of image and names.

    spec: a folder, a hub id or a name of the catalog, of a CLIP with both encoders.

    Raises:
      UserError: not found, or one of its encoders is missing.
    """

    def __init__(self, spec: str):
        folder = resolve(spec)
        self.text = functional.split(load_component(folder, expect=TEXT))
        self.tokenizer = load_tower_tokenizer(folder)
        vision = load_component(folder, expect=VISION)
        self.size: int = vision.config.image_size  # type: ignore[attr-defined]  # every model has one
        self.length: int = load_config(folder, expect=TEXT).max_position_embeddings

        # On this process's first device: each process scores the images that it read.
        self.graphdef, params = functional.split(vision)
        self.params = jax.device_put(params, jax.local_devices()[0])
        self._features: dict[tuple[str, ...], np.ndarray] = {}
        self.seconds, self._compiled = 0.0, False  # in `scores`, without compilation and texts

    def scores(self, image: UInt8[np.ndarray, "h w 3"], names: Sequence[str]) -> np.ndarray:
        """Probabilities of the names, float [names]: a softmax over the whole vocabulary."""
        named = self._named(names)
        if not self._compiled:  # once, as every image is brought to one size
            blank = jnp.zeros((1, self.size, self.size, 3))
            jax.block_until_ready(_embed(self.graphdef, self.params, blank))
            self._compiled = True

        started = time.monotonic()
        pixels = to_unit(jnp.asarray(resize_image(image, self.size, self.size))[None])
        cosines = np.asarray(_embed(self.graphdef, self.params, pixels))[0] @ named.T
        odds = np.exp(LOGIT_SCALE * (cosines - cosines.max()))
        self.seconds += time.monotonic() - started
        return np.asarray(odds / odds.sum(), np.float64)

    def _named(self, names: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Features of the names, of length 1; a vocabulary is encoded once."""
        key = tuple(names)
        if key not in self._features:
            graphdef, params = self.text
            prompts = [fill(TEMPLATE, name) for name in key]
            bank = encode_prompts(
                graphdef, params, self.tokenizer, prompts, max_length=self.length, pooled=True
            )
            features = bank.tokens[:, 0]
            self._features[key] = features / np.linalg.norm(features, axis=-1, keepdims=True)
        return self._features[key]


@functools.lru_cache(maxsize=1)
def load_presence(spec: str) -> ClipPresence:
    """The CLIP of `eval.presence_model`, loaded once for all data sets of a suite."""
    return ClipPresence(spec)


def check_presence_model(spec: str) -> None:
    """Downloads the CLIP and reads its description, so that a fault is told before any work.

    Raises:
      UserError: not found, not a CLIP with both encoders, or without a tokenizer.
    """
    try:
        folder = resolve(spec)
        for name in (TEXT, VISION):
            load_config(folder, expect=name)
        load_tower_tokenizer(folder)
    except UserError as error:
        raise type(error)(f"config.eval.presence_model={spec}: {error}") from error


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef: nnx.GraphDef[Any], params: Params, image: Float[Array, "b h w 3"]) -> Array:
    """Features of images in [-1, 1] as large as the model takes them, float [b, d], of length 1."""
    model = functional.merge(graphdef, params)
    features = model(normalize_pixels(image, image.shape[1])).image_embeds.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
