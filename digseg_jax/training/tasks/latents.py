# SPDX-License-Identifier: Apache-2.0
"""The frozen parts of the segmentation task on their own: images and masks to latents, for a cache."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from digseg_jax import trees
from digseg_jax.arraytypes import Array, Float, Int, Params, UInt8
from digseg_jax.config.schema import Config
from digseg_jax.data.shards.latents import (
    cache_folders,
    encode_record,
    read_manifest,
    require,
)
from digseg_jax.data.sources import training_parts
from digseg_jax.errors import UserError
from digseg_jax.runtime.sharding import BATCH, infer_shardings, on_mesh, place
from digseg_jax.runtime.tpu import compiler_options
from digseg_jax.segmentation.codecs import make_codec
from digseg_jax.training.tasks.base import to_unit
from digseg_jax.training.tasks.parts import Vae, load_vae
from digseg_jax.training.tasks.segmentation import SegmentationTask


class Crop(NamedTuple):
    """What is encoded of an example; classes: those whose masks show at least one pixel."""

    name: str
    image: UInt8[np.ndarray, "s s 3"]
    label: Int[np.ndarray, "s s"]
    classes: tuple[int, ...]


class FrozenParts:
    """A configuration's autoencoder and codec; neither text tower nor U-Net is loaded.

    Raises:
      UserError: the autoencoder is missing, or cannot take images of this size.
    """

    def __init__(self, config: Config):
        self.config, self.codec = config, make_codec(config)
        self.vae, params = load_vae(config.model)
        self.frozen: Params = {"vae": params}
        size, factor = config.data.image_size, self.vae.config.factor
        if size % factor:
            raise UserError(
                f"config.data.image_size={size}: must be a multiple of {factor} pixels for this VAE"
            )
        self.codec.prepare(self.vae.on_host(params))

    def picture_latents(
        self, frozen: Params, image: UInt8[Array, "b s s 3"]
    ) -> Float[Array, "b h w c"]:
        return self.vae.encode(frozen["vae"], to_unit(image))

    def mask_latents(
        self, frozen: Params, label: Int[Array, "b s s"], covers: Int[Array, "b m"]
    ) -> Float[Array, "b h w c"]:
        """One mask image for each label, of the ids that its class covers, or of all classes."""
        masks = self.codec.encode(label, covers[:, None])[:, 0]
        return self.vae.encode(frozen["vae"], masks)


def made_with(config: Config, parts: FrozenParts | SegmentationTask) -> dict[str, Any]:
    """What cached latents depend on beside the data: keys of `shards.latents.MADE_WITH`, JSON-ready."""
    facts: dict[str, Any] = {
        "image_size": config.data.image_size,
        "codec": config.segmentation.codec,
        "dtype": config.model.dtype,
        "vae": fingerprint(parts.vae, parts.frozen["vae"]),
    }
    if state := parts.codec.state():
        facts["codec_state"] = state
    return facts


def fingerprint(vae: Vae, params: Params) -> str:
    """Identifies an autoencoder by its architecture and every weight, whatever name it goes by."""
    digest = hashlib.sha256(repr(vae.config).encode())
    for path, leaf in sorted(trees.flatten(params).items()):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


class LatentEncoder:
    """Crops to records, in two compiled programs of one number of rows, split over a mesh.

    The autoencoder is split over it by the rule table, as in the train step.

    rows: pictures or masks of a call, rounded up to the devices.
    """

    def __init__(self, parts: FrozenParts, mesh: Mesh, rows: int):
        self.rows = math.ceil(rows / mesh.size) * mesh.size
        self.one_by_one = parts.codec.one_by_one
        self.size = parts.config.data.image_size
        side = self.size // parts.vae.config.factor
        self.shape = (side, side, parts.vae.config.latent_channels)
        self._batch = NamedSharding(mesh, BATCH)
        shardings = infer_shardings(parts.frozen, mesh)
        self._frozen = place(parts.frozen, shardings)

        def compiled(function: Callable[..., Array], arguments: int) -> Callable[..., Array]:
            return jax.jit(
                on_mesh(mesh, function),
                in_shardings=(shardings, *[self._batch] * arguments),
                out_shardings=self._batch,
                compiler_options=compiler_options(mesh.devices.flat[0].platform),
            )

        self._pictures = compiled(parts.picture_latents, 1)
        self._masks = compiled(parts.mask_latents, 2)

    def records(self, crops: Sequence[Crop], covers: Int[np.ndarray, "c m"]) -> Iterator[bytes]:
        """Two records for each crop: as it is, then mirrored. covers: ids of each class's mask."""
        images = np.stack([view for c in crops for view in (c.image, c.image[:, ::-1])])
        labels = np.stack([view for c in crops for view in (c.label, c.label[:, ::-1])])
        shown = [c.classes if self.one_by_one else (0,) for c in crops for _ in range(2)]
        asked = np.asarray([(k, c) for k, own in enumerate(shown) for c in own], int).reshape(-1, 2)
        pictures = self.pictures(images)
        masks = self.masks(labels, asked[:, 0], covers[asked[:, 1]])
        ends = np.cumsum([len(own) for own in shown])
        for k, own in enumerate(np.split(masks, ends[:-1])):
            crop = crops[k // 2]
            latents = np.concatenate([pictures[k : k + 1], own])
            yield encode_record(crop.name, labels[k], crop.classes, latents)

    def pictures(self, images: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n h w c"]:
        return self._run(self._pictures, len(images), lambda rows: (images[rows],))

    def masks(
        self,
        labels: Int[np.ndarray, "k s s"],
        which: Int[np.ndarray, " n"],
        covers: Int[np.ndarray, "n m"],
    ) -> Float[np.ndarray, "n h w c"]:
        """The masks of labels[which[i]] that show the ids covers[i]."""
        return self._run(self._masks, len(which), lambda rows: (labels[which[rows]], covers[rows]))

    def absent(self, covers: Int[np.ndarray, "c m"]) -> Float[np.ndarray, "h w c"]:
        """The latent of a mask that shows nothing."""
        nothing = np.full((1, self.size, self.size), -1, np.int32)
        return self.masks(nothing, np.zeros(1, int), covers[:1])[0]

    def _run(
        self,
        program: Callable[..., Array],
        count: int,
        read: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    ) -> Float[np.ndarray, "n h w c"]:
        """All calls are begun before the first result is fetched."""
        parts = []
        for start in range(0, count, self.rows):
            rows = np.minimum(np.arange(start, start + self.rows), count - 1)  # repeats the last
            placed = [jax.device_put(array, self._batch) for array in read(rows)]
            parts.append(program(self._frozen, *placed))
        if not parts:
            return np.zeros((0, *self.shape), np.float32)
        return np.concatenate([np.asarray(part) for part in parts])[:count]


def check_cache(config: Config, task: FrozenParts | SegmentationTask) -> None:
    """What only the task knows of a cache that is to be trained from; the reader checks the rest.

    Raises:
      UserError: not finished, or made with another autoencoder, size, codec or precision.
    """
    facts = made_with(config, task)
    for folder in cache_folders(config.data.latent_cache, training_parts(config.data)):
        require(folder, read_manifest(folder), facts)
