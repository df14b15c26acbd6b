# SPDX-License-Identifier: Apache-2.0
"""The training stream: batch i is a pure function of (seed, i), whoever reads it and from where."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from same import assert_same

from digseg_jax.config.schema import DataConfig, LoadingConfig, PartConfig
from digseg_jax.data import pipeline
from digseg_jax.data.captions import Captions
from digseg_jax.data.datasets import registry
from digseg_jax.data.pipeline import Repeated, _parts, training_stream
from digseg_jax.data.stream import Part, mixed_stream
from digseg_jax.data.vocabulary import vocabularies
from digseg_jax.errors import UserError

COUNT = 10  # examples in the toy source; batches cross its end


class ToySource:
    """Ten examples that know their number."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {"source": np.int64(i)}


class AddDraw:
    """Stands in for cropping: one draw from the example's generator."""

    def __call__(self, example, rng):
        return {**example, "draw": rng.random()}


def toy(n, **options):
    options = {"seed": 1, "batch_size": 4} | options
    return take(mixed_stream([Part(ToySource(), AddDraw())], **options), n)


def take(batches, n):
    return list(itertools.islice(batches, n))


def test_the_same_seed_gives_the_same_batches():
    assert_same(toy(8), toy(8))


def test_another_seed_gives_others():
    a, b = toy(3), toy(3, seed=2)
    assert (np.stack([x["source"] for x in a]) != np.stack([x["source"] for x in b])).any()
    assert (np.stack([x["draw"] for x in a]) != np.stack([x["draw"] for x in b])).any()


@pytest.mark.parametrize("start", [1, 2, 3, 5, 7])
def test_a_restart_at_any_step_goes_on_with_the_same_batches(start):
    assert_same(toy(8)[start:], toy(8 - start, start=start))


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_any_number_of_hosts_sees_the_same_global_batches(hosts, start):
    whole = toy(5, start=start)
    parts = [toy(5, start=start, host=h, hosts=hosts) for h in range(hosts)]
    for step, batch in enumerate(whole):
        for key in batch:
            slices = [parts[h][step][key] for h in range(hosts)]
            assert all(len(s) == 4 // hosts for s in slices)
            np.testing.assert_array_equal(np.concatenate(slices), batch[key], err_msg=key)


def test_worker_processes_give_what_threads_give():
    assert_same(toy(5), toy(5, workers=2))


def test_indices_are_unique_and_count_the_examples_of_the_run():
    index = np.concatenate([b["index"] for b in toy(12)])
    assert index.dtype == np.uint32
    np.testing.assert_array_equal(index, np.arange(48))


def test_each_pass_shows_every_example_once():
    source = np.concatenate([b["source"] for b in toy(10)])
    for first in range(0, 40, COUNT):
        assert set(source[first : first + COUNT]) == set(range(COUNT))


def test_an_example_is_drawn_anew_in_every_pass():
    draws = np.concatenate([b["draw"] for b in toy(10)])
    assert len(set(draws)) == 40


def test_a_batch_that_does_not_divide_among_the_hosts_is_refused():
    with pytest.raises(ValueError, match="batch size 4 does not divide among 3 hosts"):
        toy(1, hosts=3)


LAND = {"image_size": 32, "num_queries": 3, "scale_unit": "pixel", "scale_min": 1.0, "scale_max": 1.0}
CONFIG = DataConfig(**LAND, mixture=(PartConfig("landcover"), PartConfig("landcover_igbp")))


def real(n=2, task="segmentation", config=CONFIG, **options):
    options = {"seed": 0, "batch_size": 4, "start": 0, "host": 0, "hosts": 1} | options
    return take(training_stream(config, task, loading=LoadingConfig(), **options), n)


@pytest.mark.usefixtures("cover")
class TestLandCover:
    """The real stream over the training tiles."""

    def test_shapes_and_types(self):
        batch = real(1)[0]
        shapes = {k: (v.shape, v.dtype) for k, v in batch.items()}
        assert shapes == {
            "image": ((4, 32, 32, 3), np.uint8),
            "label": ((4, 32, 32), np.int32),
            "query": ((4, 3), np.int32),
            "query_class": ((4, 3), np.int32),
            "query_kind": ((4, 3), np.int32),
            "part": ((4,), np.int32),
            "index": ((4,), np.uint32),
        }

    def test_a_restart_gives_the_same_images(self):
        assert_same(real(4)[2:], real(2, start=2))

    def test_two_hosts_share_the_batch(self):
        whole, halves = real(1)[0], [real(1, host=h, hosts=2)[0] for h in range(2)]
        together = np.concatenate([half["image"] for half in halves])
        np.testing.assert_array_equal(together, whole["image"])

    def test_a_query_is_a_prompt_of_its_class_in_one_of_the_class_lists(self):
        words = vocabularies(CONFIG)
        owner = {
            row: (s, c) for s, v in enumerate(words) for c, rows in enumerate(v.rows) for row in rows
        }
        sets = set()
        for batch in real(6):
            for queries, classes in zip(batch["query"], batch["query_class"], strict=True):
                owners = [owner[int(q)] for q in queries]
                assert [c for _, c in owners] == classes.tolist()
                assert len({s for s, _ in owners}) == 1
                sets |= {s for s, _ in owners}
        assert sets == {0, 1}

    def test_the_prior_gets_captions(self):
        batch = real(1, task="prior", config=DataConfig(**LAND))[0]
        assert batch.keys() == {"image", "query", "index"}
        texts = Captions(registry.spec("landcover")).texts
        assert batch["query"].shape == (4, 1) and batch["query"].max() < len(texts)

    def test_tiles_of_rare_classes_come_more_often(self):
        (plain,) = _parts(DataConfig(**LAND), "segmentation", 0)
        (repeated,) = _parts(DataConfig(**LAND, repeat_threshold=0.3), "segmentation", 0)
        assert (len(plain.source), len(repeated.source)) == (198, 221)

    def test_a_broken_example_is_replaced_when_rare_classes_are_counted_too(self, monkeypatch):
        class Broken(ToySource):
            def __getitem__(self, index):
                if index == 2:
                    raise UserError("2.png: damaged")
                label = np.arange(64, dtype=np.int32).reshape(8, 8) % 8
                return {"image": np.zeros((8, 8, 3), np.uint8), "label": label, "name": str(index)}

        monkeypatch.setattr(pipeline, "open_part", lambda part, split, narrow: Broken())
        config = DataConfig(**LAND, repeat_threshold=0.3)
        (part,) = _parts(config, "segmentation", 0, "skip")
        assert len(part.source) == COUNT
        with pytest.raises(UserError, match="damaged"):
            _parts(config, "segmentation", 0)


def test_an_example_is_repeated_as_often_as_told():
    class Source(ToySource):
        def files(self, index):
            return {"image": index}

    repeated = Repeated(Source(), np.array([1, 3, 2, *[1] * (COUNT - 3)]))
    seen = [int(repeated[i]["source"]) for i in range(len(repeated))]
    assert seen == [0, 1, 1, 1, 2, 2, *range(3, COUNT)]
    assert repeated.files(3) == {"image": 1}
