# SPDX-License-Identifier: Apache-2.0
"""Segmentation of images of any size by any number of queries: the engine of every mode.

Images are cut into views of one size and queries into groups of one size, so that the programs of
`prediction.programs` serve any image and vocabulary. Masks are kept view by view and brought to the
image's resolution one query at a time: memory is bounded by the image, not image times vocabulary.

With few queries every mask is decoded. With many, a linear probe reads all latents
(`segmentation.latent_probe`); in each view only the queries that it ranks first are decoded, and the
others keep the probe's reading.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from digseg_jax.arraytypes import Array, Float, Params, UInt8
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import DataConfig, EvalConfig
from digseg_jax.config.templates import PLACE, asked_templates, fill
from digseg_jax.data.vocabulary import training_templates
from digseg_jax.errors import UserError
from digseg_jax.prediction.answer import Answer, ViewMasks, empty_answer
from digseg_jax.prediction.programs import Programs
from digseg_jax.prediction.progress import Job, Watch, Watcher
from digseg_jax.prediction.request import Request, filled
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.segmentation.views import Views, make_views
from digseg_jax.training.tasks.parts import bank_shape, encode_bank
from digseg_jax.training.tasks.segmentation import SegmentationTask

VIEW_STRIDE = 4096  # noise indices reserved for the views of one image
Rows = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # crops, index, tokens and mask


class Segmenter:
    """Segmenter with a task's trained weights on a mesh.

    Args:
      params: host arrays, or arrays that are on the mesh already.
      settings: view size, decoder, ensemble rule, views per call and device, templates.
      scale: factor from evidence to logits, unless the codec has its own.
      templates: prompts of the weights' training; by default those of the task's data sets.
    """

    def __init__(
        self,
        task: SegmentationTask,
        params: Params,
        settings: EvalConfig | None = None,
        *,
        mesh: Mesh | None = None,
        scale: float = 2.0,
        templates: Sequence[str] = (),
    ):
        task.prepare()
        config = task.config
        self.task, self.codec, self.settings = task, task.codec, settings or config.eval
        self.mesh = make_mesh(config.mesh) if mesh is None else mesh
        self.programs = Programs(task, params, self.mesh)
        self.scale = self.codec.scale or scale
        self.size = view_size(self.settings, config.data)
        self.short_side = self.settings.short_side or trained_short_side(config.data)
        self.templates = tuple(templates) or training_templates(config.data)
        self._texts: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # tokens and mask by text

        # Every call is filled up to this many views, over all processes, so that a device always runs
        # the same program.
        self.views_of_call = self.settings.batch_size * self.programs.shards

    def seen_at(self, short_side: int) -> Segmenter:
        """The same segmenter for images whose short side is scaled to another number of pixels."""
        other = copy.copy(self)
        other.short_side = short_side
        return other

    @property
    def seconds(self) -> float:
        """Seconds spent in calls of the programs so far, without compilation."""
        return self.programs.seconds

    def predict_masks(
        self,
        images: Sequence[UInt8[np.ndarray, "h w 3"]],
        queries: Sequence[str],
        *,
        ensemble: int = 8,
        steps: int = 2,
        spacing: str = "trailing",
        key: int | Array = 0,
        mode: str = "window",
        first: int = 0,
        bias: Sequence[float] | None = None,
    ) -> list[Float[np.ndarray, "q h w"]]:
        """Probabilities (0..1) of every query on every image, at the image's own resolution.

        Queries are asked in the templates of `asks_in`. first: index of the first image in the draws of
        the noise, for a list passed in parts. Other arguments: see `Request` and `segment`.
        """
        shift, templates = None if bias is None else tuple(bias), self.asks_in()
        requests = [
            Request(image, first + i, tuple(queries), shift, templates)
            for i, image in enumerate(images)
        ]
        estep = EStep(ensemble, steps, spacing)
        return [answer.stack() for answer in self.segment(requests, estep, key=key, mode=mode)]

    def segment(
        self,
        requests: Sequence[Request],
        estep: EStep,
        *,
        key: int | Array = 0,
        mode: str = "window",
        scale: float | None = None,
        decoder: str | None = None,
        slots: int = 0,
        evidence: bool = False,
        later: bool = False,
        advance: Callable[[int, int], None] | None = None,
        watch: Watch | None = None,
    ) -> list[Answer]:
        """Answers this process's requests; every process must call it, with any number of requests.

        Args:
          key: seed or `jax.random.key` of the initial noise, which all queries of a view share.
          mode: "window", "whole" or "aspect" (see `segmentation.views`).
          scale, decoder: by default the segmenter's own.
          slots: queries per call; 0: as many as make the fewest calls. A caller whose requests vary in
            number sets it, so that one program serves them all.
          evidence: keep each member's evidence in place of probabilities.
          later: sample only; the answers keep latents in place of masks (`ViewMasks.latents`).
          advance: called with the steps done and their total; a step is one group of queries in a call.
          watch: called after every step of each member of a single request, which are then sampled one
            by one: the same masks, to rounding (see `prediction.progress`).

        Raises:
          UserError: no queries, a blank or too long one, or some that the codec cannot answer.
        """
        # From here on a request's queries are texts, one for each of its templates; or each is the mean
        # of its texts' features.
        for request in requests:
            self._check(request.queries)
        ways = [self.ways(request) for request in requests]
        requests = [r if self.codec.pooled else r.in_texts() for r in requests]
        job = Job(
            estep=estep,
            root=jax.random.key(key) if isinstance(key, int) else key,
            scale=self.codec.scale or scale or self.scale,
            decoder=decoder or self.settings.decoder,
            evidence=evidence,
            later=later,
            advance=advance,
        )
        views = [make_views(np.asarray(r.image), self.size, mode, self.short_side) for r in requests]
        places = [(r, k) for r, view in enumerate(views) for k in range(len(view.crops))]

        # All processes make as many calls as the one with the most views and queries needs.
        most = max((len(r.queries) for r in requests), default=0)
        biased = any(r.bias is not None for r in requests)
        agreed = self.programs.agree_on_largest(len(places), most, int(biased))
        most_views, most_queries, job.biased = agreed[0], agreed[1], bool(agreed[2])
        job.slots = slots or self.codec.slots(most_queries)
        job.groups = max(1, -(-most_queries // job.slots))
        rows = self.views_of_call // self.programs.parts
        calls = -(-most_views // rows)
        job.total = calls * job.groups

        # A request's own number of queries decides how its masks are read, never the other requests.
        decoded = [len(r.queries) for r in requests if self._is_decoded(r, job)]
        others = len(decoded) < len(requests)
        agreed = self.programs.agree_on_largest(max(decoded, default=0), int(others))
        job.decoded, job.chooses = agreed[0], bool(agreed[1])
        if watch:
            room = empty_answer(views[0], self.size, job.scale, requests[0].biases, ways[0])
            job.watcher = Watcher(watch, room, job.total * estep.ensemble * estep.steps)

        found: dict[tuple[int, int], ViewMasks] = {}  # by request and view
        for call in range(calls):
            chosen = places[call * rows : (call + 1) * rows]
            masks = self._ask(requests, views, chosen, rows, job)
            found |= dict(zip(chosen, masks, strict=True))
        return [
            Answer(
                view,
                tuple(found[r, k] for k in range(len(view.crops))),
                self.size,
                job.scale,
                request.biases,
                ways[r],
            )
            for r, (request, view) in enumerate(zip(requests, views, strict=True))
        ]

    def asks_in(self, own: str = PLACE, wanted: Sequence[str] = ()) -> tuple[str, ...]:
        """Templates to ask in; () for a closed codec, which always reads the same text.

        own: see `asked_templates`. wanted: by default `eval.templates`.

        Raises:
          UserError: templates are wanted from a closed codec.
        """
        if self.codec.closed:
            if wanted:
                raise UserError(
                    f"templates={list(wanted)}: these weights ask with one text for all classes"
                )
            return ()
        return asked_templates(wanted or self.settings.templates, self.templates, own)

    def decodes_all(self, queries: int, slots: int, decoder: str) -> bool:
        """Whether every mask of a request is decoded, for its number of texts and `slots` per call."""
        if not self.codec.one_by_one:
            return True
        filled = -(-queries // slots) * slots  # empty places of the last call are decoded as well
        return decoder != "probe" and not chooses_masks(self.settings, decoder, filled)

    def ways(self, request: Request) -> int:
        """Masks per query before they are averaged: one for each template, unless texts are pooled."""
        return 1 if self.codec.pooled else max(1, len(request.templates))

    def _is_decoded(self, request: Request, job: Job) -> bool:
        """Whether every mask of the request is decoded."""
        return self.decodes_all(len(request.queries), job.slots, job.decoder)

    def _check(self, queries: Sequence[str]) -> None:
        """Raises UserError for queries that the codec cannot answer, or none."""
        if not queries:
            raise UserError("no queries: name what to segment")
        self.codec.check_queries(queries)

    def _ask(
        self,
        requests: Sequence[Request],
        views: Sequence[Views],
        places: Sequence[tuple[int, int]],
        rows: int,
        job: Job,
    ) -> list[ViewMasks]:
        """Masks of all queries for one call's views; places: (request, view) of each of them."""
        # Padding repeats the last view; a process without any views passes black ones.
        blank = np.zeros((*self.size, 3), np.uint8)
        shown = [views[r].crops[k] for r, k in places]
        crops = np.stack([*shown, *[shown[-1] if shown else blank] * (rows - len(shown))])
        numbers = [requests[r].index * VIEW_STRIDE + requests[r].first_view + k for r, k in places]
        index = np.array([*numbers, *[0] * (rows - len(numbers))], np.int32)
        asked = [requests[r] for r, _ in places]

        # If only some queries are decoded, which ones is known after the last group.
        parts, latents = [], []
        for group in range(job.groups):
            tokens, mask, bias = self._group(asked, rows, group, job.slots)
            seen = [k for _, k in places], group * job.slots
            sampled = self._sample((crops, index, tokens, mask), bias, seen, job)
            if job.later:
                parts.append({"latents": sampled[:, None]})
            elif group * job.slots < job.decoded:
                read = self.read(
                    sampled, bias, job.scale, job.decoder, biased=job.biased, evidence=job.evidence
                )
                parts.append(read)
                if job.watcher and not job.evidence:
                    job.watcher.put(read["probability"], *seen)
            if job.chooses:
                latents.append(sampled)
            job.tick()

        # A view's masks were decoded group by group, or are chosen from all groups' latents now.
        every = np.concatenate(latents, axis=1) if latents else np.empty((rows, 0))  # [n, q, e, ...]
        masks = [
            ViewMasks.joined([{k: part[k][row] for k in part} for part in parts], len(request.queries))
            if self._is_decoded(request, job)
            else self._probed(request, every[row])
            for row, request in enumerate(asked)
        ]
        if job.chooses and job.decoder != "probe":
            self._decode_first(asked, masks, every, job)
        return masks

    def _sample(
        self, rows: Rows, bias: np.ndarray, seen: tuple[list[int], int], job: Job
    ) -> Float[np.ndarray, "n k e h w c"]:
        """Samples one group of queries of a call's views; a watcher is called after every step.

        rows: see `Programs.sample`. seen: the views, and the first query.
        """
        mean = job.decoder == "latent_mean" and not self.codec.recolored
        if job.watcher is None:
            return self.programs.sample(*rows, job.root, job.estep, mean=mean)

        def read(latents: np.ndarray) -> np.ndarray:
            """Probabilities [n, q, h, w] of the members so far."""
            # Their mean latent, or one member at a time: no program for each number of members.
            rest: dict[str, Any] = {"biased": job.biased}
            if not self.codec.recolored:
                latents = latents.mean(axis=2, keepdims=True)
                return self.read(latents, bias, job.scale, **rest)["probability"]
            each = [
                self.read(latents[:, :, [i]], bias, job.scale, first=i, **rest)["probability"]
                for i in range(latents.shape[2])
            ]
            return np.mean(each, axis=0)

        told = job.watcher.sees(read, *seen)
        latents = self.programs.sample_in_steps(*rows, job.root, job.estep, told)
        return self.programs.mean(latents) if mean else latents

    def read(
        self, latents: np.ndarray, bias: np.ndarray, scale: float, decoder: str = "", **options: Any
    ) -> dict[str, np.ndarray]:
        """Reads masks from a call's latents by the segmenter's settings; see `Programs.read`."""
        decoder = decoder or self.settings.decoder
        return self.programs.read(
            latents,
            bias,
            scale,
            size=self.size,
            decoder="probe" if decoder == "probe" else "vae",  # a mean is one latent to decode
            rule=self.settings.ensemble_rule,
            **options,
        )

    def _probed(self, request: Request, latents: Float[np.ndarray, "q e h w c"]) -> ViewMasks:
        """Masks of a view at latent resolution, as the linear probe reads them."""
        probe, count = self.codec.cell_probe(), len(request.queries)

        # einsum, not `@`: the last digits of BLAS depend on the number of threads.
        cells = np.einsum("...c,c->...", latents[:count], probe.weight) + probe.offset
        return ViewMasks(np.full(count, -1), cells=np.clip(cells, -1.0, 1.0))

    def _decode_first(
        self,
        asked: Sequence[Request],
        masks: Sequence[ViewMasks],
        latents: Float[np.ndarray, "n q 1 h w c"],
        job: Job,
    ) -> None:
        """Decodes the queries that the probe ranks first, `decode_limit` in each view that it read."""
        # Probabilities compare as evidence + bias / scale. Unused places decode query 0 in vain.
        rows, limit = len(latents), self.settings.decode_limit
        bias, chosen = np.zeros((rows, limit), np.float32), np.zeros((rows, limit), np.int64)
        for row, (request, mask) in enumerate(zip(asked, masks, strict=True)):
            if mask.cells is None:
                continue
            first = first_queries(mask.cells[:, 0], request.biases / job.scale, limit)
            chosen[row, : len(first)] = first
            bias[row, : len(first)] = request.biases[first]
            mask.slot[first] = np.arange(len(first))

        # One call for all views; the arrays of the others are not touched.
        few = np.take_along_axis(latents, chosen[:, :, None, None, None, None], axis=1)
        read = self.read(few, bias, job.scale, job.decoder, biased=job.biased, evidence=job.evidence)
        for name, array in read.items():
            for row, mask in enumerate(masks):
                if mask.cells is not None:
                    setattr(mask, name, array[row])

    def _group(
        self, asked: Sequence[Request], rows: int, group: int, slots: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One group of each view's queries: tokens and masks [rows, t, ...], biases [rows, slots]."""
        # A process without any views passes zeros: nobody reads its answers.
        model, tower = self.task.config.model, self.task.parts.tower
        if not asked and tower:
            count = len(self.codec.texts(("",) * slots))
            shape = (rows, *bank_shape(count, model, tower.width))
            empty = np.zeros(shape, np.float32), np.ones(shape[:-1], bool)
            return *empty, np.zeros((rows, slots), np.float32)

        # Views with the same texts share their arrays. Padding repeats the last view and query.
        made: dict[tuple[tuple[str, ...], ...], tuple[np.ndarray, np.ndarray]] = {}
        tokens, masks, biases = [], [], []
        for row in range(rows):
            request = asked[min(row, len(asked) - 1)]
            part = request.queries[group * slots : (group + 1) * slots] or request.queries[:1]

            texts = self.codec.texts(part + part[-1:] * (slots - len(part)))
            templates = request.templates
            if (texts, templates) not in made:
                made[texts, templates] = self._tokens(texts, templates)
            tokens.append(made[texts, templates][0])
            masks.append(self.codec.hide_empty(made[texts, templates][1], len(part)))

            biases.append(filled(request.biases[group * slots : (group + 1) * slots], slots))
        return np.stack(tokens), np.stack(masks), np.stack(biases)

    def _tokens(self, texts: Sequence[str], templates: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n, l, d] and masks [n, l] of texts; with templates, the mean of those in them."""
        if not templates:  # or they are in the texts already: only a pooled text can be averaged
            return self._encoded(texts)
        ways = [self._encoded([fill(way, text) for text in texts]) for way in templates]
        return np.mean([tokens for tokens, _ in ways], axis=0), ways[0][1]

    def _encoded(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n, l, d] and masks [n, l] of texts, each of which is encoded only once."""
        tower = self.task.parts.tower
        assert tower is not None  # only parts that are mere shapes have none

        # One text per batch: in a larger one its last digits would depend on the other texts.
        missing = [t for t in dict.fromkeys(texts) if t not in self._texts]
        if missing:
            model, pooled = self.task.config.model, self.codec.pooled
            bank = encode_bank(tower, missing, model, batch_size=1, pooled=pooled)
            tokens, mask = np.asarray(bank.tokens), np.asarray(bank.mask)
            self._texts |= {text: (tokens[i], mask[i]) for i, text in enumerate(missing)}
        tokens, mask = (np.stack(x) for x in zip(*(self._texts[t] for t in texts), strict=True))
        return tokens, mask


def chooses_masks(settings: EvalConfig, decoder: str, queries: int) -> bool:
    """Whether only some masks of this number of queries are decoded (`eval.decode_limit`)."""
    return decoder == "latent_mean" and 0 < settings.decode_limit < queries


def view_size(settings: EvalConfig, data: DataConfig) -> tuple[int, int]:
    """Height and width of a view, pixels: `eval.view_size`, by default the training crop's."""
    sides = settings.view_size or (data.image_size,)
    return sides[0], sides[-1]


def trained_short_side(data: DataConfig) -> int:
    """Pixels of an image's short side at scale 1 of the training crops; 0: images are not scaled."""
    return data.image_size if data.scale_unit == "short_side" else 0


def first_queries(
    cells: Float[np.ndarray, "q h w"], shift: Float[np.ndarray, " q"], limit: int
) -> np.ndarray:
    """Indices of at most `limit` queries that win the most cells, ties by highest evidence; sorted.

    shift: added to each query's evidence before they are compared.
    """
    # lexsort's last key is the primary one.
    biased = cells + shift[:, None, None]
    won = np.bincount(biased.argmax(axis=0).ravel(), minlength=len(cells))
    highest = cells.max(axis=(1, 2))
    return np.sort(np.lexsort((-highest, -won))[:limit])
