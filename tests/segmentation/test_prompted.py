# SPDX-License-Identifier: Apache-2.0
"""The prompted codec: colors drawn for each example, names left out, masks that come back by color."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from digseg_jax.config.schema import DataConfig
from digseg_jax.data.queries import NOWHERE
from digseg_jax.errors import UserError
from digseg_jax.segmentation.codec import HostAutoencoder
from digseg_jax.segmentation.codecs import make_codec
from digseg_jax.segmentation.ensemble import probabilities
from digseg_jax.segmentation.prompted import Drawn, PromptedCodec, draw_names, neutral_last
from digseg_jax.training.tasks.base import example_keys

K = 5


def autoencoder(noise=0.02):
    """A stand-in: a latent cell is the mean color of 4 x 4 pixels, and colors scatter."""

    def encode(image):
        n, h, w, _ = image.shape
        return image.reshape(n, h // 4, 4, w // 4, 4, 3).mean(axis=(2, 4))

    def decode(latent):
        rng = np.random.default_rng(0)
        image = latent.repeat(4, 1).repeat(4, 2)
        return image + noise * rng.normal(size=image.shape).astype(np.float32)

    return HostAutoencoder(encode, decode, 4)


@pytest.fixture(scope="module")
def codec():
    made = PromptedCodec(K)
    made.prepare(autoencoder())
    return made


def keys(count, first=0):
    return example_keys(3, jnp.arange(first, first + count))


def test_colors_are_a_function_of_seed_and_example_and_differ_between_examples(codec):
    classes = jnp.broadcast_to(jnp.arange(K), (40, K))
    drawn = codec.draw(keys(40), classes)
    assert (np.sort(drawn.colors, axis=1) == np.arange(K)).all() and np.asarray(drawn.named).all()
    assert len({tuple(row) for row in np.asarray(drawn.colors).tolist()}) > 20

    later = codec.draw(keys(8, first=32), classes[:8])
    np.testing.assert_array_equal(later.colors, drawn.colors[32:])
    other = codec.draw(example_keys(4, jnp.arange(40)), classes)
    assert (np.asarray(other.colors) != np.asarray(drawn.colors)).any()


def test_a_class_is_named_once_and_foreign_names_are_all_kept():
    classes = jnp.asarray([4, NOWHERE, 4, 2, NOWHERE])[:, None]
    for key in keys(20):
        named = np.asarray(draw_names(key, classes, 0.0).named)
        np.testing.assert_array_equal(named, [True, True, False, True, True])


def test_names_are_thinned_out_in_a_share_of_the_examples():
    classes = jnp.broadcast_to(jnp.asarray([0, 1, 2, 2, 3])[:, None], (2000, K, 1))
    named = np.asarray(PromptedCodec(K, 0.5).draw(keys(2000), classes).named)
    counts = named.sum(axis=1)
    assert set(counts.tolist()) == {1, 2, 3, 4} and not named[:, 3].any()
    # half keep all four, and a quarter of the others do
    assert (counts == 4).mean() == pytest.approx(0.5 + 0.5 / 4, abs=0.04)
    assert named[counts == 1].mean(axis=0)[[0, 1, 2, 4]] == pytest.approx(0.25, abs=0.07)


def ideal(codec, label, classes, colors):
    """Probabilities [q, h, w] read from the ideal mask image of one label map, in these colors."""
    drawn = Drawn(jnp.asarray([colors]), jnp.ones((1, K), bool))
    image = codec.encode(jnp.asarray(label)[None], jnp.asarray([classes]), drawn)[:, 0]
    evidence = codec.decode(image)[:, :, None]
    found = probabilities(evidence, codec.scale, jnp.zeros(K), exclusive=True, background=True)
    return np.asarray(found)[0][np.asarray(colors)]  # from the order of the colors to that of the names


def test_permuted_colors_of_an_ideal_mask_give_the_same_labels(codec):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 8, (16, 16))
    classes = [6, 1, 3, 0, 7]
    wanted = np.full(label.shape, K)
    for place, c in enumerate(classes):
        wanted[label == c] = place
    for colors in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1], [1, 2, 3, 4, 0]):
        found = ideal(codec, label, classes, colors)
        whole = np.concatenate([found, 1 - found.sum(axis=0, keepdims=True)])
        np.testing.assert_array_equal(whole.argmax(axis=0), wanted)  # the last: nobody named it


def test_an_empty_place_takes_no_share_of_any_pixel(codec):
    """Only the colors of the asked names are read, whatever else looks like a pixel."""
    image = jnp.asarray(codec.palette.prototypes)[None, None]  # [1, 1, K + 1, 3]: each color once
    bias = jnp.asarray([0.0, 0.0, -np.inf, -np.inf, -np.inf])
    evidence = codec.decode(image)[:, :, None]
    found = probabilities(evidence, codec.scale, bias, exclusive=True, background=True)[0, :, 0]
    assert (np.asarray(found)[2:] == 0).all() and np.isfinite(found).all()
    np.testing.assert_allclose(found[:2, :2], np.eye(2), atol=0.05)
    assert found[:, K].max() < 0.05  # the background's own color
    votes = probabilities(evidence, codec.scale, bias, exclusive=True, background=True, rule="vote")[
        0, :, 0
    ]
    np.testing.assert_array_equal(votes[:2, [0, 1, K]], [[1, 0, 0], [0, 1, 0]])


def test_of_nested_names_the_most_specific_one_is_painted(codec):
    label = np.array([[[0, 1, 2, -1]]]).repeat(4, 1)
    query = jnp.asarray([[[0, 1], [1, 1], [5, 5], [6, 6], [7, 7]]])  # the first covers 0 and 1
    image = np.asarray(codec.encode(jnp.asarray(label), query))[0, 0, 0]
    colors = codec.palette.colors
    np.testing.assert_array_equal(image, [colors[0], colors[1], colors[K], [0, 0, 0]])


def test_the_context_is_one_list_of_names_and_their_colors(codec):
    tokens = jnp.arange(K * 2, dtype=jnp.float32).reshape(1, K, 1, 2)
    mask = jnp.ones((1, K, 1), bool)
    drawn = Drawn(jnp.asarray([[3, 0, 4, 2, 1]]), jnp.asarray([[True, True, False, True, True]]))
    context, seen = codec.context(tokens, mask, drawn)
    assert context.shape == (1, 1, K, 2 + codec.mark_width(3))
    np.testing.assert_array_equal(context[0, 0, :, :2], tokens[0, :, 0])
    np.testing.assert_allclose(context[0, 0, :, 2:5], codec.palette.colors[[3, 0, 4, 2, 1]])
    np.testing.assert_allclose(context[0, 0, :, 5:], codec.color_latents[[3, 0, 4, 2, 1]], atol=1e-6)
    np.testing.assert_array_equal(seen[0, 0], drawn.named[0])
    shown = codec.hide_empty(np.ones((K, 1), bool), 2)
    np.testing.assert_array_equal(shown[:, 0], [True, True, False, False, False])


def test_latents_are_read_like_images(codec):
    latents = jnp.asarray(codec.color_latents)[None, None, None, None]  # [n, k, e, h, w, c]
    evidence = codec.read_latents(latents)
    found = probabilities(evidence, codec.scale, jnp.zeros(K), exclusive=True, background=True)
    assert found.shape == (1, K, 1, K + 1)
    np.testing.assert_array_equal(found[0, :, 0, :K].argmax(axis=0), np.arange(K))
    assert found[0, :, 0, K].sum() < 0.5


def test_the_mask_loss_is_least_for_the_true_colors(codec):
    label = jnp.asarray(np.random.default_rng(0).integers(0, 7, (1, 8, 8))).repeat(4, 1).repeat(4, 2)
    query, valid = jnp.asarray([[6, 1, 3, 0, 2]]), jnp.ones((1, 8, 8), bool)

    def loss(true, painted):
        drawn = [Drawn(jnp.asarray([c]), jnp.ones((1, K), bool)) for c in (true, painted)]
        latent = autoencoder().encode(np.asarray(codec.encode(label, query, drawn[1]))[:, 0])
        return float(codec.mask_loss(jnp.asarray(latent), label, query, valid, None, drawn[0])[0])

    right = loss([3, 0, 4, 2, 1], [3, 0, 4, 2, 1])
    assert right < 0.5 * loss([3, 0, 4, 2, 1], [0, 3, 4, 2, 1])


def test_the_background_has_the_most_neutral_color(codec):
    latents = np.array([[1.0, 0], [0.1, 0.1], [-1, 0], [0, 1], [0, -1]])
    np.testing.assert_array_equal(neutral_last(latents), [0, 2, 3, 4, 1])
    assert len(codec.palette.colors) == K + 1


def test_weights_bring_their_colors_and_their_number_of_names(codec):
    again = PromptedCodec(2)
    again.restore(codec.state())
    again.prepare(autoencoder(noise=0.5))  # of another machine: nothing is chosen anew
    assert again.slots(1) == again.slots(100) == K and again.scale == codec.scale
    np.testing.assert_array_equal(again.color_latents, codec.color_latents)
    with pytest.raises(UserError, match="not trained with the prompted codec"):
        again.restore({})


@pytest.mark.parametrize(
    ("change", "named"),
    [({"latent_cache": "x"}, "legal are binary, palette"), ({"num_queries": 216}, "1 to 215")],
)
def test_what_it_cannot_do_is_told_at_the_start(change, named):
    with pytest.raises(UserError) as caught:
        make_codec("prompted", DataConfig(**change))
    assert named in tiny.one_line(caught.value)
