# SPDX-License-Identifier: Apache-2.0
"""`predict_masks`: a handful of programs for any sizes and numbers; noise shared between queries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from digseg_jax.errors import UserError
from digseg_jax.predictor import Predictor, query_chunks
from digseg_jax.segmentation.inference import EStep, probabilities
from digseg_jax.tasks.segmentation import SegmentationTask

QUERIES = ["water", "forest", "snow and ice"]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def task(folders):
    return SegmentationTask(tiny.config(folders), prompts=QUERIES)


@pytest.fixture(scope="module")
def traces():
    return []


@pytest.fixture(scope="module")
def predictor(task, traces):
    """Counts how often the program is traced: jit calls `evidence` once for each compilation."""
    original = task.evidence

    def counted(*arguments, **options):
        traces.append(arguments[2].shape)
        return original(*arguments, **options)

    task.evidence = counted
    return Predictor(task, jax.tree.map(jnp.asarray, task.initial()))


def ask(predictor, images, queries=QUERIES, **options):
    return predictor.predict_masks(images, queries, **{"ensemble": 1, "steps": 1, **options})


def test_it_is_the_tasks_evidence_as_probabilities(predictor, task):
    image = noise(tiny.SIZE, tiny.SIZE)
    got = ask(predictor, [image], ensemble=2, key=5)[0]
    evidence = task.evidence(
        predictor.params, task.frozen, jnp.asarray(image)[None], jnp.arange(1), EStep(2, 1), seed=5
    )
    expected = probabilities(evidence, 2.0, jnp.zeros(3))[0]
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_any_size_and_number_runs_in_the_programs_that_are_there(predictor, traces):
    ask(predictor, [noise(32, 32)])  # one square
    ask(predictor, [noise(64, 32)])  # several
    before = len(traces)
    for i, shape in enumerate([(32, 32), (5, 9), (40, 33), (90, 61), (33, 32), (1, 1)]):
        queries = [*QUERIES, "barren"][: 3 + i % 2]  # both in the bucket of four
        got = ask(predictor, [noise(*shape)], queries)
        assert got[0].shape == (len(queries), *shape)
        ask(predictor, [noise(*shape)], queries, mode="whole", key=i)
    assert len(traces) == before


def test_queries_share_the_noise_and_do_not_hear_each_other(predictor):
    image = [noise(32, 32)]
    alone, together = ask(predictor, image, QUERIES[1:2]), ask(predictor, image)
    np.testing.assert_allclose(alone[0][0], together[0][1], atol=1e-4)
    same = ask(predictor, image, ["water", "water"])[0]
    # the same noise and text; another place in the batch may cost the last digits
    np.testing.assert_allclose(same[0], same[1], atol=1e-5)


def test_an_image_has_its_answer_in_any_company(predictor):
    images = [noise(32, 32, seed) for seed in range(3)]
    together = ask(predictor, images)
    for i, image in enumerate(images):
        np.testing.assert_allclose(ask(predictor, [image], first=i)[0], together[i], atol=1e-4)


def test_a_key_changes_the_noise_and_a_number_is_its_key(predictor):
    image = [noise(32, 32)]
    a, b = ask(predictor, image, key=1)[0], ask(predictor, image, key=jax.random.key(1))[0]
    np.testing.assert_array_equal(a, b)
    assert (ask(predictor, image, key=2)[0] != a).any()


def test_squares_are_spread_over_a_mesh(predictor, task):
    spread = Predictor(task, predictor.params, mesh=tiny.mesh(data=2))
    assert spread.image_buckets == (2, 4)
    image = [noise(32, 32)]
    np.testing.assert_allclose(ask(spread, image)[0], ask(predictor, image)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("queries", "codec", "told"),
    [([], None, "no queries"), ([" "], None, "empty"), (QUERIES, "palette", "trained with 'binary'")],
)
def test_what_cannot_be_asked_is_told(predictor, queries, codec, told):
    with pytest.raises(UserError) as caught:
        ask(predictor, [noise(8, 8)], queries, codec=codec)
    assert told in tiny.one_line(caught.value)


def test_chunks_are_padded_to_buckets():
    words = [f"w{i}" for i in range(37)]
    chunks = list(query_chunks(words, 16))
    assert [(len(c), real) for c, real in chunks] == [(16, 16), (16, 16), (6, 5)]
    for n in range(1, 38):
        chunks = list(query_chunks(words[:n], 32))
        assert [w for c, real in chunks for w in c[:real]] == words[:n]
        assert sum(len(c) for c, _ in chunks) <= 1.5 * n


def test_a_bias_moves_its_own_query(predictor):
    image = [noise(32, 32)]
    plain, moved = ask(predictor, image)[0], ask(predictor, image, bias=[0.0, 3.0, -3.0])[0]
    np.testing.assert_allclose(plain[0], moved[0], atol=1e-5)
    assert (moved[1] > plain[1]).all() and (moved[2] < plain[2]).all()


def test_decoding_the_mean_of_one_member_is_decoding_that_member(predictor, task):
    cheap = Predictor(task, predictor.params, decoder="latent_mean")
    image = [noise(32, 32)]
    one, mean = ask(predictor, image)[0], ask(cheap, image)[0]
    np.testing.assert_allclose(mean, one, atol=1e-4)
    assert (ask(cheap, image, ensemble=2)[0] != mean).any()
