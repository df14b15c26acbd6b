# SPDX-License-Identifier: Apache-2.0
"""Encodes images and masks to latents, for a cache, with only the frozen parts of the task."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from digseg_jax import trees
from digseg_jax.arraytypes import Array, Float, Int, Params, UInt8
from digseg_jax.config.schema import ComputeConfig, DataConfig, ModelConfig, PartConfig
from digseg_jax.data.shards.fingerprint import StaleShards, check_unchanged
from digseg_jax.data.shards.latents import (
    MANIFEST,
    MODE,
    cache_folders,
    encode_record,
    read_manifest,
    require,
)
from digseg_jax.data.sources import open_fresh, spec_of, training_parts
from digseg_jax.errors import Transient, UserError
from digseg_jax.log import log
from digseg_jax.runtime.distributed import is_main, together
from digseg_jax.runtime.sharding import BATCH, infer_shardings, on_mesh, place
from digseg_jax.runtime.tpu import compiler_options
from digseg_jax.segmentation.codecs import check_cacheable, make_codec
from digseg_jax.training.tasks.base import to_unit
from digseg_jax.training.tasks.parts import Vae, load_vae
from digseg_jax.training.tasks.segmentation import SegmentationTask

_STATE = "codec_state"  # key of `shards.latents.MADE_WITH`


class Crop(NamedTuple):
    """The square of an example that is encoded.

    classes: those whose masks show at least one pixel.
    """

    name: str
    image: UInt8[np.ndarray, "s s 3"]
    label: Int[np.ndarray, "s s"]
    classes: tuple[int, ...]


class FrozenParts:
    """The autoencoder and the codec of a segmentation task, without the text tower and the U-Net.

    Raises:
      UserError: the autoencoder is missing or cannot take images of this size, or the codec's masks
        cannot be cached.
    """

    def __init__(self, data: DataConfig, model: ModelConfig, compute: ComputeConfig):
        check_cacheable(model.codec)
        self.codec = make_codec(model.codec, data)
        self.vae, params = load_vae(model, compute)
        self.frozen: Params = {"vae": params}
        self.size, factor = data.image_size, self.vae.config.factor
        if self.size % factor:
            raise UserError(
                f"config.data.image_size={self.size}: must be a multiple of {factor} pixels for this "
                "VAE"
            )
        self.codec.prepare(self.vae.on_host(params))

    def image_latents(self, frozen: Params, image: UInt8[Array, "b s s 3"]) -> Float[Array, "b h w c"]:
        """Encodes images, uint8."""
        return self.vae.encode(frozen["vae"], to_unit(image))

    def mask_latents(
        self, frozen: Params, label: Int[Array, "b s s"], covers: Int[Array, "b m"]
    ) -> Float[Array, "b h w c"]:
        """Encodes one mask of each label: of the ids that `covers` names, or of all classes at once.

        covers: ids of the class that is asked for, filled up by repeating the last.
        """
        masks = self.codec.encode(label, covers[:, None])[:, 0]
        return self.vae.encode(frozen["vae"], masks)


def cache_facts(
    parts: FrozenParts | SegmentationTask, image_size: int, model: ModelConfig
) -> dict[str, Any]:
    """Facts that cached latents depend on beside the data; keys of `shards.latents.MADE_WITH`."""
    facts: dict[str, Any] = {
        "image_size": image_size,
        "codec": model.codec,
        "dtype": model.dtype,
        "vae": fingerprint(parts.vae, parts.frozen["vae"]),
    }
    if state := parts.codec.state():
        facts[_STATE] = state
    return facts


def fingerprint(vae: Vae, params: Params) -> str:
    """Digest of an autoencoder's architecture and of every weight, whatever name it goes by."""
    digest = hashlib.sha256(repr(vae.config).encode())
    for path, leaf in sorted(trees.flatten(params).items()):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


class LatentEncoder:
    """Turns crops into records of latents, by two compiled programs: for images, and for masks.

    Rows of a call are split over the mesh, and the autoencoder by the rule table, as in the train step.

    rows: images or masks of a call; rounded up to a multiple of the devices.
    """

    def __init__(self, parts: FrozenParts, mesh: Mesh, rows: int):
        self.rows = math.ceil(rows / mesh.size) * mesh.size
        self.one_by_one = parts.codec.one_by_one
        self.size = parts.size
        side = self.size // parts.vae.config.factor
        self.shape = (side, side, parts.vae.config.latent_channels)

        # Frozen parts are placed once; only rows travel with each call.
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

        self._images = compiled(parts.image_latents, 1)
        self._masks = compiled(parts.mask_latents, 2)

    def records(self, crops: Sequence[Crop], covers: Int[np.ndarray, "c m"]) -> Iterator[bytes]:
        """Yields two records for each crop: as it is, then mirrored.

        covers: ids of each class's mask, filled up by repeating the last.
        """
        # Every view of every crop, and the (view, class) pairs whose masks are encoded.
        images = np.stack([view for c in crops for view in (c.image, c.image[:, ::-1])])
        labels = np.stack([view for c in crops for view in (c.label, c.label[:, ::-1])])
        shown = [c.classes if self.one_by_one else (0,) for c in crops for _ in range(2)]
        asked = np.asarray([(k, c) for k, own in enumerate(shown) for c in own], int).reshape(-1, 2)
        image_latents = self.images(images)
        mask_latents = self.masks(labels, asked[:, 0], covers[asked[:, 1]])

        # The masks come in one row of all views; cut it where a view's own end.
        ends = np.cumsum([len(own) for own in shown])
        for k, own in enumerate(np.split(mask_latents, ends[:-1])):
            crop = crops[k // 2]
            latents = np.concatenate([image_latents[k : k + 1], own])
            yield encode_record(crop.name, labels[k], crop.classes, latents)

    def images(self, images: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, "n h w c"]:
        """Encodes any number of images."""
        return self._run(self._images, len(images), lambda rows: (images[rows],))

    def masks(
        self,
        labels: Int[np.ndarray, "k s s"],
        which: Int[np.ndarray, " n"],
        covers: Int[np.ndarray, "n m"],
    ) -> Float[np.ndarray, "n h w c"]:
        """Encodes the masks of labels[which[i]] that show the ids covers[i], for every i."""
        return self._run(self._masks, len(which), lambda rows: (labels[which[rows]], covers[rows]))

    def absent(self, covers: Int[np.ndarray, "c m"]) -> Float[np.ndarray, "h w c"]:
        """Latent of a mask that shows nothing."""
        nothing = np.full((1, self.size, self.size), -1, np.int32)
        return self.masks(nothing, np.zeros(1, int), covers[:1])[0]

    def _run(
        self,
        program: Callable[..., Array],
        count: int,
        read: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    ) -> Float[np.ndarray, "n h w c"]:
        """Calls a program on `count` rows, `self.rows` at a time.

        read: the program's arguments for the given rows.
        """
        # All calls are dispatched before the first result is fetched, so the device never waits.
        parts = []
        for start in range(0, count, self.rows):
            rows = np.minimum(np.arange(start, start + self.rows), count - 1)  # repeats the last
            placed = [jax.device_put(array, self._batch) for array in read(rows)]
            parts.append(program(self._frozen, *placed))

        if not parts:
            return np.zeros((0, *self.shape), np.float32)
        return np.concatenate([np.asarray(part) for part in parts])[:count]


def check_cache(
    parts: FrozenParts | SegmentationTask, data: DataConfig, model: ModelConfig, *, colors: bool = True
) -> None:
    """Checks that a latent cache was made with these parts, and from the data as they are now.

    Data that are not here, as a cache needs none, are not compared.

    colors: False leaves out what the codec chose, for `check_cached_colors`.

    Raises:
      UserError: it is not finished, or made with another autoencoder, size, codec or precision, or from
        files that have changed since.
    """
    facts, sets = cache_facts(parts, data.image_size, model), training_parts(data)
    if not colors:
        facts.pop(_STATE, None)
    for (part, _, split), folder in zip(sets, cache_folders(data.latent_cache, sets), strict=True):
        manifest = read_manifest(folder)
        require(folder, manifest, facts)

        # Process 0 alone looks at every file: on a shared disk that takes its time.
        with together("the data of the latents"):
            if is_main():
                _compare_with_data(folder, manifest, part, split)


def check_cached_colors(parts: FrozenParts | SegmentationTask, data: DataConfig) -> None:
    """Checks that a latent cache was made with what the codec chose, such as these colors.

    Raises:
      UserError: it was made with others.
    """
    if state := parts.codec.state():
        for folder in cache_folders(data.latent_cache, training_parts(data)):
            require(folder, read_manifest(folder), {_STATE: state})


def _compare_with_data(
    folder: epath.Path, manifest: dict[str, Any], part: PartConfig, split: str
) -> None:
    """Raises UserError if the data of a cache are here, and have changed since it was made."""
    try:
        source = open_fresh(part, split)
    except (StaleShards, Transient):
        raise
    except UserError:  # not here, or no longer readable
        log.info("%s: the data that it was made from are not here to be compared", folder)
        return

    # Files of a package are as new as its installation, whatever is in them.
    title = f"config.data.latent_cache: {folder} does not fit the data under {part.root}"
    renewal = f"make it again in another folder with {MODE}"
    timed = not spec_of(part).from_package
    check_unchanged(source, manifest, folder / MANIFEST, title, renewal, times=timed)
