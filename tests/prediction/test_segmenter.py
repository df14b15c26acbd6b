# SPDX-License-Identifier: Apache-2.0
"""The engine: a handful of programs for any sizes and numbers, the same masks on any devices."""

from __future__ import annotations

import dataclasses
import types

import jax
import numpy as np
import pytest
import tiny

from digseg_jax.config.sampling import EStep
from digseg_jax.errors import UserError
from digseg_jax.prediction import raster
from digseg_jax.prediction.segmenter import (
    Request,
    Segmenter,
    first_queries,
    trained_short_side,
    view_size,
)
from digseg_jax.runtime.sharding import infer_shardings
from digseg_jax.segmentation.ensemble import probabilities

QUERIES = ["water", "forest", "snow and ice"]
ONE = EStep(1, 1)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def task(folders):
    return tiny.load_task(tiny.config(folders, eval__view_size=()), prompts=QUERIES)


@pytest.fixture(scope="module")
def params(task):
    return task.initial()


@pytest.fixture(scope="module")
def segmenter(task, params):
    return Segmenter(task, params, mesh=tiny.mesh())


def with_settings(segmenter, **changes):
    """Another segmenter of the same weights."""
    settings = dataclasses.replace(segmenter.settings, **changes)
    return Segmenter(segmenter.task, segmenter.programs.params, settings, mesh=segmenter.mesh)


def ask(segmenter, images, queries=QUERIES, **options):
    return segmenter.predict_masks(images, queries, **{"ensemble": 1, "steps": 1, **options})


class TestMasks:
    def test_they_are_the_tasks_evidence_as_probabilities(self, segmenter, task, params):
        every = with_settings(segmenter, decoder="vae")
        image = noise(tiny.SIZE, tiny.SIZE)
        got = ask(every, [image], ensemble=2, key=5)[0]
        evidence = task.evidence(params, task.frozen, image[None], np.arange(1), EStep(2, 1), seed=5)
        np.testing.assert_allclose(got, probabilities(evidence, 2.0, np.zeros(3))[0], atol=1e-4)

    def test_any_size_and_number_runs_in_the_programs_that_are_there(self, segmenter):
        ask(segmenter, [noise(32, 32)])  # one view
        ask(segmenter, [noise(64, 32)])  # several
        before = segmenter.programs.compiled
        for i, shape in enumerate([(32, 32), (5, 9), (40, 33), (90, 61), (33, 32), (1, 1)]):
            queries = [*QUERIES, "barren"][: 3 + i % 2]  # both in the bucket of four
            got = ask(segmenter, [noise(*shape)], queries)
            assert got[0].shape == (len(queries), *shape)
            ask(segmenter, [noise(*shape)], queries, mode="whole", key=i)
        assert segmenter.programs.compiled == before

    @pytest.mark.parametrize(
        ("shape", "short_side", "near"),
        [((70, 90), 0, 1e-5), ((20, 90), 0, 1e-5), ((150, 201), 40, 0.01), ((150, 201), 150, 1e-5)],
    )
    def test_a_raster_read_by_windows_has_the_masks_of_its_whole(
        self, segmenter, monkeypatch, shape, short_side, near
    ):
        monkeypatch.setattr(raster, "_HELD", 5000)  # several parts of a row, several rows of an output
        image, seen = noise(*shape), segmenter.seen_at(short_side)
        source = types.SimpleNamespace(shape=shape, rows=lambda first, last: image[first:last])
        found = list(raster.segment_raster(seen, source, QUERIES, ONE, 0, templates=["a {}"]))
        firsts = np.cumsum([0, *(band.shape[1] for _, band in found)])
        assert [first for first, _ in found] == firsts[:-1].tolist() and len(found) > 1
        masks = np.concatenate([band for _, band in found], axis=1)
        asked = [f"a {query}" for query in QUERIES]
        np.testing.assert_allclose(masks, ask(seen, [image], asked)[0], atol=near)

    def test_queries_share_the_noise_and_do_not_hear_each_other(self, segmenter):
        image = [noise(32, 32)]
        alone, together = ask(segmenter, image, QUERIES[1:2]), ask(segmenter, image)
        np.testing.assert_allclose(alone[0][0], together[0][1], atol=1e-4)
        same = ask(segmenter, image, ["water", "water"])[0]
        # the same noise and text; another place in the batch may cost the last digits
        np.testing.assert_allclose(same[0], same[1], atol=1e-5)

    def test_an_image_has_its_answer_in_any_company(self, segmenter):
        images = [noise(32, 32, seed) for seed in range(3)]
        together = ask(segmenter, images)
        for i, image in enumerate(images):
            np.testing.assert_allclose(ask(segmenter, [image], first=i)[0], together[i], atol=1e-4)

    def test_a_key_changes_the_noise_and_a_number_is_its_key(self, segmenter):
        image = [noise(32, 32)]
        a, b = ask(segmenter, image, key=1)[0], ask(segmenter, image, key=jax.random.key(1))[0]
        np.testing.assert_array_equal(a, b)
        assert (ask(segmenter, image, key=2)[0] != a).any()

    @pytest.mark.parametrize("axes", [{"data": 2}, {"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}])
    def test_views_are_spread_over_a_mesh(self, segmenter, task, params, axes):
        spread = Segmenter(task, params, mesh=tiny.mesh(**axes))
        image = [noise(64, 50)]

        # Weights and autoencoder lie on the devices as a training's state does.
        for held in (spread.programs.params, spread.programs.vae):
            wanted = infer_shardings(held, spread.mesh)
            for array, sharding in zip(*map(jax.tree.leaves, (held, wanted)), strict=True):
                assert array.sharding.is_equivalent_to(sharding, array.ndim)
        np.testing.assert_allclose(ask(spread, image)[0], ask(segmenter, image)[0], atol=1e-4)

    def test_a_bias_moves_its_own_query(self, segmenter):
        image = [noise(32, 32)]
        plain, moved = ask(segmenter, image)[0], ask(segmenter, image, bias=[0.0, 3.0, -3.0])[0]
        np.testing.assert_allclose(plain[0], moved[0], atol=1e-5)
        assert (moved[1] > plain[1]).all() and (moved[2] < plain[2]).all()

    def test_a_biased_answer_knows_its_masks_without_it(self, segmenter):
        biased = Request(noise(32, 32), 0, tuple(QUERIES), (0.0, 3.0, -3.0))
        (answer,) = segmenter.segment([biased], ONE)
        plain = ask(segmenter, [noise(32, 32)])[0]
        assert answer.biased
        np.testing.assert_allclose([answer.alone(q) for q in range(3)], plain, atol=1e-5)

    def test_the_label_map_is_the_most_probable_query(self, segmenter):
        (answer,) = segmenter.segment([Request(noise(40, 33), 0, tuple(QUERIES))], ONE)
        np.testing.assert_array_equal(answer.label_map(), answer.stack().argmax(axis=0))


class TestReading:
    """How latents become masks."""

    def test_decoding_the_mean_of_one_member_is_decoding_that_member(self, segmenter):
        every = with_settings(segmenter, decoder="vae")
        image = [noise(32, 32)]
        one, mean = ask(every, image)[0], ask(segmenter, image)[0]
        np.testing.assert_allclose(mean, one, atol=1e-4)
        assert (ask(segmenter, image, ensemble=2)[0] != mean).any()

    def test_of_many_queries_the_first_are_decoded_and_the_others_probed(self, segmenter):
        queries = [*QUERIES, "barren", "urban"]
        image = [noise(40, 52)]
        decoded = ask(with_settings(segmenter, decode_limit=0), image, queries)[0]
        probed = ask(with_settings(segmenter, decoder="probe"), image, queries)[0]
        few = with_settings(segmenter, decode_limit=2)
        (answer,) = few.segment([Request(image[0], 0, tuple(queries))], ONE)
        for masks in answer.masks:
            assert (masks.slot >= 0).sum() == 2 and len(masks.probability) == 2
        # Every view chose for itself: what all of them chose, or none, can be compared.
        chosen = [set(np.flatnonzero(m.slot >= 0)) for m in answer.masks]
        everywhere, somewhere = set.intersection(*chosen), set.union(*chosen)
        nowhere = set(range(5)) - somewhere
        assert everywhere and nowhere and len(chosen) > 1
        for masks, queries in ((decoded, everywhere), (probed, nowhere)):
            for query in queries:
                np.testing.assert_allclose(answer.probability(query), masks[query], atol=1e-5)
        assert np.abs(decoded - probed).max() > 0.01

    def test_the_first_queries_are_those_that_win_cells_then_the_most_certain(self):
        cells = np.full((4, 2, 2), -0.9, np.float32)
        cells[2, 0, 0], cells[0, 0, 1], cells[1] = 0.9, 0.2, 0.1
        zero = np.zeros(4, np.float32)
        assert first_queries(cells, zero, 1).tolist() == [1]  # two cells
        assert first_queries(cells, zero, 2).tolist() == [1, 2]  # a cell each; 2 is more certain
        assert first_queries(cells, zero, 3).tolist() == [0, 1, 2]
        assert first_queries(cells, zero, 9).tolist() == [0, 1, 2, 3]
        assert first_queries(cells, np.array([0, 0, 0, 5.0]), 1).tolist() == [3]

    def test_members_evidence_is_kept_where_it_is_asked_for(self, segmenter):
        every = with_settings(segmenter, decoder="vae")
        request = Request(noise(32, 32), 0, tuple(QUERIES))
        (answer,) = every.segment([request], EStep(3, 1), evidence=True)
        evidence = answer.evidence(1)
        assert evidence.shape == (3, 32, 32) and np.abs(evidence).max() <= 1.0
        (soft,) = every.segment([request], EStep(3, 1))
        expected = (1 / (1 + np.exp(-2.0 * evidence))).mean(axis=0)
        np.testing.assert_allclose(soft.probability(1), expected, atol=1e-5)


class TestSizes:
    """What is asked of the network."""

    def test_a_view_is_the_training_crop_unless_it_is_set(self, folders):
        config = tiny.config(folders, eval__view_size=())
        assert view_size(config.eval, config.data) == (tiny.SIZE, tiny.SIZE)
        wide = dataclasses.replace(config.eval, view_size=(24, 48))
        assert view_size(wide, config.data) == (24, 48)

    def test_images_are_seen_at_the_scale_of_the_training_crops(self, folders):
        config = tiny.config(folders)
        assert trained_short_side(config.data) == 0
        photographs = dataclasses.replace(
            config.data, name="ade20k", image_size=512, scale_unit="short_side"
        )
        assert trained_short_side(photographs) == 512


@pytest.mark.parametrize(("queries", "told"), [([], "no queries"), ([" "], "empty")])
def test_what_cannot_be_asked_is_told(segmenter, queries, told):
    with pytest.raises(UserError) as caught:
        ask(segmenter, [noise(8, 8)], queries)
    assert told in tiny.one_line(caught.value)


def test_progress_is_told_inside_an_image(segmenter):
    told = []
    request = Request(noise(90, 61), 0, tuple(QUERIES))
    segmenter.segment([request], ONE, advance=lambda *numbers: told.append(numbers))
    assert len(told) > 1 and told == [(i + 1, len(told)) for i in range(len(told))]
