# SPDX-License-Identifier: Apache-2.0
"""A codec is one class: one that paints named classes in colors drawn anew, through task and segmenter.

Two queries share a mask image, each in a color that its text is marked with. It exists to hold what the
protocol promises; nothing is said about how well it would segment.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from digseg_jax.config.sampling import EStep
from digseg_jax.metrics.presence import presence
from digseg_jax.prediction.request import Request
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.segmentation import codecs
from digseg_jax.segmentation.codec import Codec
from digseg_jax.training.tasks.base import example_keys
from digseg_jax.training.tasks.segmentation import SegmentationTask

COLORS = np.array([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]], np.float32)
FIXED = np.array([0, 1])  # query to color where nothing is drawn


class PairCodec(Codec):
    """Pairs of queries in one mask image, of both texts; each text is marked with its color."""

    name = "pair"
    exclusive = True
    scale = 3.0

    @classmethod
    def for_data(cls, data, classes=None):
        return cls()

    def num_images(self, queries):
        return queries // 2

    def texts(self, queries):
        return tuple(queries)

    def text_rows(self, query):
        return query

    def slots(self, count):
        return 2

    def draw(self, keys, query_class):
        return jax.vmap(lambda key: jax.random.permutation(jax.random.fold_in(key, 7), 2))(keys)

    def _order(self, drawn, count):
        return jnp.broadcast_to(FIXED, (count, 2)) if drawn is None else drawn

    def encode(self, label, query_class, drawn=None):
        order = self._order(drawn, len(label))
        seen = (label[:, None] == query_class[..., None, None]).astype(jnp.float32)
        return jnp.einsum("bqhw,bqc->bhwc", seen, jnp.asarray(COLORS)[order])[:, None]

    def context(self, tokens, mask, drawn=None):
        order = self._order(drawn, len(tokens))
        marked = tokens + order[..., None, None].astype(tokens.dtype)
        b, t, length, width = tokens.shape
        return marked.reshape(b, t // 2, 2 * length, width), mask.reshape(b, t // 2, 2 * length)

    def decode(self, image):
        return jnp.einsum("nhwc,kc->nkhw", image, COLORS[FIXED])

    def read_latents(self, latents):
        return jnp.moveaxis(latents[:, 0, ..., :2], -1, 1)

    def mask_loss(self, latent, label, query_class, valid, anchors, drawn=None):
        target = drawn[:, 0].astype(jnp.float32)[:, None, None]
        return jnp.square(latent.mean(axis=-1) - target).mean(axis=(1, 2))


@pytest.fixture
def task(folders, monkeypatch):
    monkeypatch.setitem(codecs.CODECS, "binary", PairCodec)  # whatever the name
    return SegmentationTask(tiny.config(folders, loss__mask_weight=0.5, eval__view_size=()))


def test_it_is_trained_with_the_colors_of_each_sample(task):
    task.prepare()
    batch = {name: jnp.asarray(x) for name, x in tiny.batch(3).items()}
    params = jax.tree.map(jnp.asarray, task.initial())
    grad = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, metrics), grads = grad(params, task.frozen, batch, example_keys(0, batch["index"]))
    assert np.isfinite(loss) and metrics["mask_loss"] > 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))

    drawn = task.codec.draw(example_keys(0, jnp.arange(20)), jnp.zeros((20, 2), int))
    orders = {tuple(row) for row in np.asarray(drawn).tolist()}
    assert orders == {(0, 1), (1, 0)}


@pytest.mark.parametrize("decoder", ["latent_mean", "vae", "probe"])
def test_it_answers_any_number_of_queries_pair_by_pair(task, decoder):
    settings = dataclasses.replace(task.config.eval, decoder=decoder)
    segmenter = Segmenter(task, task.initial(), settings, mesh=tiny.mesh())
    assert segmenter.scale == 3.0
    image = np.random.default_rng(0).integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), np.uint8)
    request = Request(image, 0, ("water", "forest", "snow and ice"))
    (answer,) = segmenter.segment([request], EStep(2, 1))
    masks = answer.stack()
    assert masks.shape == (3, tiny.SIZE, tiny.SIZE)
    np.testing.assert_allclose(masks[0] + masks[1], 1.0, atol=1e-5)  # exclusive within their image

    if decoder == "probe":  # a coarse pass tells what is there
        assert presence(answer.cell_probabilities()).shape == (3,)
