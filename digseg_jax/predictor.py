# SPDX-License-Identifier: Apache-2.0
"""`predict_masks`: images of any size and queries of any number in, soft masks out.

A query count is padded to a bucket and squares are grouped into batches of fixed sizes, so that a
handful of programs serves every call. Members and queries are batch axes of one program with one
`lax.scan` over the steps; the image latent is computed once per square and shared by all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from digseg_jax.arraytypes import Array, Float, Params, UInt8
from digseg_jax.errors import UserError
from digseg_jax.segmentation import inference
from digseg_jax.segmentation.inference import EStep
from digseg_jax.segmentation.resolution import resize_image
from digseg_jax.segmentation.views import make_views
from digseg_jax.sharding import BATCH
from digseg_jax.tasks.components import encode_bank
from digseg_jax.tasks.segmentation import PALETTE_PROMPT, SegmentationTask

IMAGE_BUCKETS = (1, 4)  # squares of a compiled call
QUERY_BUCKETS = (1, 2, 4, 6, 8, 12, 16, 32)
MAX_PADDING = 1 / 3  # of a chunk's queries; else it is split into full buckets
MAX_ROWS = 512  # squares x queries x members that one call denoises at a time
INDEX_STRIDE = 4096  # noise indices reserved for the squares of one image


class Predictor:
    """A task's trained weights, ready to be asked.

    scale: turns the binary codec's evidence into a probability; a palette brings its own.
    rule, decoder: see `inference.combine` and `SegmentationTask.evidence`.
    mesh: squares are spread over its data and fsdp axes; the buckets become multiples of them.
    """

    def __init__(
        self,
        task: SegmentationTask,
        params: Params,
        *,
        scale: float = 2.0,
        rule: str = "mean",
        decoder: str = "vae",
        mesh: Mesh | None = None,
    ):
        self.task, self.params, self.mesh = task, params, mesh
        self.size = task.config.data.image_size
        self.short_side = task.config.eval.short_side
        self.scale = task.palette.scale if task.codec == "palette" else scale
        self.rule, self.decoder = rule, decoder
        devices = mesh.shape["data"] * mesh.shape["fsdp"] if mesh is not None else 1
        self.image_buckets = tuple(sorted({-(-b // devices) * devices for b in IMAGE_BUCKETS}))
        self.programs = 0  # compiled so far
        self._run = jax.jit(self._program, static_argnames="estep")
        self._texts: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def predict_masks(
        self,
        images: Sequence[UInt8[np.ndarray, "h w 3"]],
        queries: Sequence[str],
        *,
        ensemble: int = 8,
        steps: int = 2,
        spacing: str = "trailing",
        codec: str | None = None,
        key: int | Array = 0,
        mode: str = "window",
        first: int = 0,
        bias: Sequence[float] | None = None,
    ) -> list[Float[np.ndarray, "q h w"]]:
        """Probabilities of every query on every image, at the image's own resolution.

        Args:
          queries: texts; with the palette codec, the names of its classes in their order.
          codec: what the caller expects of the weights; None takes them as they are.
          key: number or `jax.random.key` of the initial noise, which all queries of a square share.
          mode: "window", "whole" or "aspect" (see `segmentation.views`).
          first: index of the first image in the draws of the noise, for a list handed over in parts.
          bias: added to each query's logits (see `segmentation.calibration`).

        Raises:
          UserError: no queries, a blank or too long one, another codec than the weights have, or a
            palette asked for another number of classes.
        """
        self._check(queries, codec)
        estep = EStep(ensemble, steps, spacing)
        root = jax.random.key(key) if isinstance(key, int) else key
        shift = np.zeros(len(queries), np.float32) if bias is None else np.asarray(bias, np.float32)
        views = [make_views(np.asarray(i), self.size, mode, self.short_side) for i in images]
        squares = [(i, k) for i, view in enumerate(views) for k in range(len(view.crops))]
        parts = [[None] * len(view.crops) for view in views]
        for group in self._groups(squares):
            crops = np.stack([views[i].crops[k] for i, k in group])
            index = np.array([(first + i) * INDEX_STRIDE + k for i, k in group], np.int32)
            answer = self._ask(crops, index, queries, shift, estep, root)
            for (i, k), probability in zip(group, answer, strict=True):
                parts[i][k] = probability
        return [view.assemble(np.stack(p)) for view, p in zip(views, parts, strict=True)]

    def squares(self, images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> list[np.ndarray]:
        """Whole pictures squeezed to the network's size: for coarse passes that need no more."""
        return [resize_image(np.asarray(image), self.size, self.size) for image in images]

    def _check(self, queries: Sequence[str], codec: str | None) -> None:
        if codec not in (None, self.task.codec):
            raise UserError(f"codec {codec!r}: these weights were trained with {self.task.codec!r}")
        if not queries:
            raise UserError("no queries: name what to segment")
        if self.task.codec == "palette" and len(queries) != len(self.task.palette.colors):
            raise UserError(
                f"{len(queries)} queries: this palette answers its {len(self.task.palette.colors)} "
                "classes at once; for free text use weights of the binary codec"
            )

    def _groups(self, squares: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        largest = self.image_buckets[-1]
        for start in range(0, len(squares), largest):
            yield squares[start : start + largest]

    def _ask(
        self,
        crops: np.ndarray,
        index: np.ndarray,
        queries: Sequence[str],
        bias: np.ndarray,
        estep: EStep,
        root: Array,
    ) -> Float[np.ndarray, "n q s s"]:
        """One group of squares, all queries, in chunks of one bucket."""
        count = len(crops)
        full = next(b for b in self.image_buckets if b >= count)
        rows = np.minimum(np.arange(full), count - 1)  # padding repeats the last square
        batch = self._place(crops[rows]), self._place(index[rows])
        if self.task.codec == "palette":
            frozen = self._frozen((PALETTE_PROMPT,))
            answer = self._run(self.params, frozen, *batch, bias, root, estep=estep)
            return np.asarray(answer)[:count]
        answers, done = [], 0
        for chunk, real in query_chunks(queries, self._query_limit(full, estep)):
            shift = np.resize(bias[done : done + real], len(chunk))
            answer = self._run(self.params, self._frozen(chunk), *batch, shift, root, estep=estep)
            answers.append(np.asarray(answer)[:count, :real])
            done += real
        return np.concatenate(answers, axis=1)

    def _query_limit(self, squares: int, estep: EStep) -> int:
        room = MAX_ROWS // (squares * estep.ensemble)
        return max([b for b in QUERY_BUCKETS if b <= room], default=QUERY_BUCKETS[0])

    def _place(self, array: np.ndarray) -> Array:
        if self.mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, NamedSharding(self.mesh, BATCH))

    def _frozen(self, prompts: tuple[str, ...]) -> Params:
        """The autoencoder and the encoded texts; every text is encoded once."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._texts]
        for chunk, real in query_chunks(missing, QUERY_BUCKETS[-1]):
            bank = encode_bank(self.task.tower, chunk, self.task.config.model)
            tokens, mask = np.asarray(bank.tokens), np.asarray(bank.mask)
            self._texts |= {p: (tokens[i], mask[i]) for i, p in enumerate(chunk[:real])}
        tokens, mask = (np.stack(x) for x in zip(*(self._texts[p] for p in prompts), strict=True))
        return {"vae": self.task.frozen["vae"], "bank": {"tokens": tokens, "mask": mask}}

    def _program(
        self,
        params: Params,
        frozen: Params,
        crops: Array,
        index: Array,
        bias: Array,
        root: Array,
        estep: EStep,
    ) -> Float[Array, "n q s s"]:
        self.programs += 1  # runs once for each compilation
        evidence = self.task.evidence(
            params, frozen, crops, index, estep, seed=root, decoder=self.decoder
        )
        return inference.probabilities(
            evidence, self.scale, bias, codec=self.task.codec, rule=self.rule
        )


def query_chunks(queries: Sequence[str], limit: int) -> Iterator[tuple[tuple[str, ...], int]]:
    """Chunks of at most `limit` queries, each padded to a bucket with its last; and the real number."""
    buckets = [b for b in QUERY_BUCKETS if b <= limit]
    start = 0
    while start < len(queries):
        left = len(queries) - start
        full = next((b for b in buckets if b >= left), buckets[-1])
        if full - left > MAX_PADDING * full:
            full = max(b for b in buckets if b <= left)
        chunk = tuple(queries[start : start + full])
        yield chunk + chunk[-1:] * (full - len(chunk)), len(chunk)
        start += len(chunk)
