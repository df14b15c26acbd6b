# SPDX-License-Identifier: Apache-2.0
"""Named data sets as a stream: the same batches for any workers, hosts and restarts; clean ends."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from made import CLASSES, Made, part
from same import assert_same

from digseg_jax.data.datasets.spec import ClassInfo, DatasetSpec
from digseg_jax.data.datasets.statistics import ClassStatistics, confusable, name_similarity
from digseg_jax.data.queries import ABSENT, HARD_ABSENT, PRESENT, QuerySampler
from digseg_jax.data.shards.records import RecordSource
from digseg_jax.data.stream import mixed_stream
from digseg_jax.errors import UserError
from digseg_jax.tools.prepare_data import prepare_split


def mixture():
    return [part(Made(13), 3.0), part(Made(5, offset=1), 1.0, first=2 * CLASSES)]


def batches(n, parts=None, **options):
    options = {"seed": 1, "batch_size": 4} | options
    with mixed_stream(parts or mixture(), **options) as stream:
        return list(itertools.islice(stream, n))


@pytest.fixture(scope="module")
def whole():
    return batches(10)


def test_shapes_and_types(whole):
    assert {k: (v.shape, v.dtype) for k, v in whole[0].items()} == {
        "image": ((4, 32, 32, 3), np.uint8),
        "label": ((4, 32, 32), np.int32),
        "query": ((4, 3), np.int32),
        "query_class": ((4, 3), np.int32),
        "query_kind": ((4, 3), np.int32),
        "index": ((4,), np.uint32),
    }


@pytest.mark.parametrize("workers", [2, 3])
def test_worker_processes_give_the_same_bits(whole, workers):
    assert_same(batches(6, workers=workers), whole[:6])


@pytest.mark.parametrize("start", range(1, 10))
def test_a_restart_at_any_step_goes_on(whole, start):
    assert_same(batches(10 - start, start=start), whole[start:])


def test_a_restart_with_another_number_of_workers_goes_on(whole):
    assert_same(batches(3, start=5, workers=2), whole[5:8])


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("start", [0, 3])
def test_any_number_of_hosts_shares_the_same_global_batches(whole, hosts, start):
    parts = [batches(4, start=start, host=h, hosts=hosts) for h in range(hosts)]
    for step in range(4):
        together = {k: np.concatenate([p[step][k] for p in parts]) for k in whole[0]}
        order = np.argsort(together["index"])
        for key, value in whole[start + step].items():
            np.testing.assert_array_equal(together[key][order], value, err_msg=key)


def test_a_mixture_has_the_proportions_of_its_weights(whole):
    """The second part's prompts lie behind those of the first."""
    second = np.concatenate([b["query"] for b in whole])[:, 0] >= 2 * CLASSES
    assert second.mean() == pytest.approx(0.25, abs=0.03)
    for b in whole:
        owners = b["query"] // (2 * CLASSES)
        assert (owners == owners[:, :1]).all()
        np.testing.assert_array_equal(b["query"] % (2 * CLASSES) // 2, b["query_class"])


def test_the_kinds_tell_the_truth(whole):
    for b in whole:
        shown = (b["label"][:, None] == b["query_class"][..., None, None]).any(axis=(2, 3))
        np.testing.assert_array_equal(b["query_kind"] == PRESENT, shown)


def test_skipping_is_deterministic_counted_and_leaves_no_trace_in_the_batch():
    def run(**options):
        with mixed_stream(
            [part(Made(12, broken=(3, 4, 5)), on_error="skip")], seed=0, batch_size=4, **options
        ) as stream:
            return list(itertools.islice(stream, 6)), stream.skipped

    a, skipped = run()
    b, again = run(workers=2)
    assert_same(a, b)
    assert skipped == again >= 6  # two epochs with three broken examples each
    assert "skipped" not in a[0]


def mapped_by(process):
    """Names in /dev/shm that a process has open."""
    try:
        lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    except OSError:  # it has ended
        return set()
    return {Path(line.split()[5]).name for line in lines if " /dev/shm/" in line}


def shared_memory():
    """Blocks in /dev/shm that no other process has open."""
    others = [p for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid()]
    return set(os.listdir("/dev/shm")) - set().union(*map(mapped_by, others))


def leftovers(before):
    """Living workers, and shared memory that was not there before, when all has had time to end."""
    for _ in range(50):
        gc.collect()
        left = multiprocessing.active_children(), sorted(shared_memory() - before)
        if left == ([], []):
            break
        time.sleep(0.2)
    return left


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="looks at Linux's shared memory")
class TestEnds:
    def test_an_error_in_a_worker_names_the_file_and_leaves_nothing_behind(self):
        before = shared_memory()
        with pytest.raises(UserError, match="/made/3.jpg.*gone") as caught:
            batches(12, [part(Made(12, broken=(3,)))], workers=2)
        del caught  # its traceback holds the stream
        assert leftovers(before) == ([], [])

    def test_closing_in_the_middle_leaves_nothing_behind(self):
        before = shared_memory()
        with (
            pytest.raises(ZeroDivisionError),
            mixed_stream(mixture(), seed=0, batch_size=4, workers=2) as stream,
        ):
            next(stream)
            raise ZeroDivisionError
        del stream
        assert leftovers(before) == ([], [])


# Prints by how many MB the resident memory grows over the examples of so many batches.
GROWTH = """
import resource, sys
from pathlib import Path
from made import Made, part
from digseg_jax.data.stream import mixed_stream

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20

with mixed_stream([part(Made(30))], seed=0, batch_size=50) as stream:
    for _ in range(4):  # allocators settle
        next(stream)
    before = resident()
    for _ in range(int(sys.argv[1])):
        next(stream)
    print(resident() - before)
"""


@pytest.mark.parametrize("batches", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_memory_is_flat(batches):
    """In a process of its own: what earlier tests left here comes and goes at any time."""
    tests = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}"}
    command = [sys.executable, "-c", GROWTH, str(batches)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20


def prepared(count, folder, shard):
    spec = DatasetSpec(
        "made", "", tuple(ClassInfo(f"c{i}") for i in range(CLASSES)), {"train": count}, "", ""
    )
    prepare_split(lambda: Tiny(count), spec, "train", folder, shard_examples=shard)
    return spec


class Tiny(Made):
    """One small example, many times."""

    def __getitem__(self, i):
        return {
            "image": np.zeros((8, 8, 3), np.uint8),
            "label": np.zeros((8, 8), np.int32),
            "name": str(i),
        }


def time_to_first_batch(folder, spec):
    """Processor seconds: others may be busy."""
    start = time.process_time()
    source = RecordSource(folder, "train", spec)
    confusable(source.statistics(), [(n,) for n in spec.names])
    with mixed_stream([part(source)], seed=0, batch_size=8) as stream:
        next(stream)
    return time.process_time() - start


def test_starting_does_not_read_the_index(tmp_path):
    spec = prepared(3000, tmp_path, 1000)
    assert time_to_first_batch(tmp_path, spec) < 3


@pytest.mark.slow
def test_start_up_on_118_000_entries(tmp_path):
    spec = prepared(118_287, tmp_path, 1000)
    assert time_to_first_batch(tmp_path, spec) <= 3


class TestNegatives:
    """Hard ones: seen together in other images, or of similar names."""

    def test_similar_names_share_words(self):
        got = name_similarity([("traffic light",), ("light", "lamp"), ("street lights",), ("dog",)])
        assert got[0, 1] > 0 and got[0, 2] > 0 and got[0, 3] == 0
        np.testing.assert_array_equal(got, got.T)
        np.testing.assert_array_equal(np.diag(got), 0)

    def test_expected_classes_are_those_of_other_images_with_this_one(self):
        statistics = ClassStatistics.empty(4)
        for shown in ([0, 1], [0, 1], [0, 2], [3]):
            statistics.add(np.asarray([shown], np.int32))
        got = confusable(statistics, [("a",), ("b",), ("c",), ("d",)])
        np.testing.assert_allclose(got[0], [0, 2 / 3, 1 / 3, 0])
        np.testing.assert_allclose(got[1], [1, 0, 0, 0])
        np.testing.assert_array_equal(got[3], 0)

    def rates(self, hard_rate, label, expected):
        sampler = QuerySampler(np.ones(CLASSES), 0.4, confusable=expected, hard_rate=hard_rate)
        rng = np.random.default_rng(0)
        drawn = [sampler.draw(label, 2, rng) for _ in range(2000)]
        return np.concatenate([c for c, _ in drawn]), np.concatenate([k for _, k in drawn])

    def test_the_rates_are_those_asked_for_where_the_crop_allows_them(self):
        label = np.repeat([0, 1, 2], 12).reshape(6, 6).astype(np.int32)
        expected = np.zeros((CLASSES, CLASSES))
        expected[0, 4] = 1
        expected[1, 3] = 0.5
        classes, kinds = self.rates(0.25, label, expected)
        assert (kinds != PRESENT).mean() == pytest.approx(0.4, abs=0.03)
        hard = classes[kinds == HARD_ABSENT]
        assert set(hard) == {3, 4} and set(classes[kinds == ABSENT]) == {3, 4, 5}
        assert (kinds == HARD_ABSENT).sum() / (kinds != PRESENT).sum() == pytest.approx(0.25, abs=0.04)

    def test_a_crop_without_expected_classes_takes_any_absent_one(self):
        label = np.zeros((6, 6), np.int32)
        classes, kinds = self.rates(1.0, label, np.zeros((CLASSES, CLASSES)))
        assert HARD_ABSENT not in kinds and (kinds == ABSENT).mean() == pytest.approx(0.4, abs=0.03)

    def test_a_crop_that_shows_everything_reports_no_negatives(self):
        label = np.arange(CLASSES, dtype=np.int32)[None].repeat(4, 0)
        _, kinds = self.rates(0.5, label, np.ones((CLASSES, CLASSES)))
        assert (kinds == PRESENT).all()

    def test_a_nested_class_is_present_where_what_it_covers_is(self):
        members = np.array([[True, False, False], [True, True, False], [False, False, True]])
        plain = QuerySampler(np.ones(3), 1.0)
        nested = dataclasses.replace(plain, members=members)
        label = np.zeros((4, 4), np.int32)  # cup everywhere; disc (1) covers it
        rng = np.random.default_rng(0)
        assert {int(nested.draw(label, 1, rng)[0][0]) for _ in range(30)} == {2}
        assert {int(plain.draw(label, 1, rng)[0][0]) for _ in range(30)} == {1, 2}
