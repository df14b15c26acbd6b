# SPDX-License-Identifier: Apache-2.0
"""Memory is bounded by the image, not by the image times the vocabulary."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiny

from digseg_jax.data.datasets.landcover import GROUPS
from digseg_jax.prediction import pretrained
from digseg_jax.prediction.pretrained import load_segmenter

WORDS = [f"land {i}" for i in range(40)]  # three groups
SIZE = (200, 300)
PLANE = 4 * SIZE[0] * SIZE[1]


def image(size=SIZE):
    return np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def export(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    config = tiny.config(folders, eval__view_size=(128,), eval__batch_size=1, eval__decoder="vae")
    tiny.export(config, folder)
    return folder


def peak_of(work) -> int:
    """Bytes of NumPy's that `work` had at the most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_masks_are_written_and_labeled_a_few_planes_at_a_time(export, tmp_path):
    masks = load_segmenter(export)(image(), WORDS, ensemble=1, steps=1)
    masks.save(tmp_path, "first")  # modules are imported (and compiled, once) outside what is measured
    assert peak_of(lambda: masks.save(tmp_path, "a")) < 30 * PLANE
    assert peak_of(lambda: masks.label) < 9 * PLANE
    assert peak_of(lambda: masks.probability) > len(WORDS) * PLANE  # what the others go without


def test_groups_of_queries_give_the_same_bits_as_all_at_once(export, monkeypatch):
    segment, told, two_views = load_segmenter(export), [], image((128, 160))
    whole = segment(two_views, WORDS, ensemble=1, steps=1)
    monkeypatch.setattr(pretrained, "HELD", 0)
    apart = segment(two_views, WORDS, ensemble=1, steps=1, advance=lambda *n: told.append(n))
    assert told == []  # nothing is computed before it is asked for
    np.testing.assert_array_equal(apart.probability, whole.probability)
    np.testing.assert_array_equal(apart.label, whole.label)
    assert told[: len(told) // 2] == [(i + 1, len(told) // 2) for i in range(len(told) // 2)]


@pytest.mark.parametrize("decoder", ["vae", "probe"])
def test_a_palette_is_sampled_once_and_read_again_for_the_same_bits(
    decoder, folders, tmp_path, monkeypatch
):
    config = tiny.config(
        folders, model__codec="palette", eval__view_size=(64,), eval__decoder=decoder,
        eval__batch_size=1,
    )  # fmt: skip
    tiny.export(config, tmp_path)
    segment, told, few_views = load_segmenter(tmp_path), [], image((80, 100))
    whole = segment(few_views, GROUPS, ensemble=2, steps=1)

    queries = 3  # of a group; the last one has two
    views = len(whole._answer.masks)
    monkeypatch.setattr(pretrained, "HELD", queries * 4 * views * 64 * 64)
    apart = segment(few_views, GROUPS, ensemble=2, steps=1, advance=lambda *n: told.append(n))
    sampled = len(told)
    np.testing.assert_array_equal(apart.probability, whole.probability)
    assert sampled > 0 and told == [(i + 1, 4 * sampled) for i in range(4 * sampled)]
    held = apart._answer._held[1].masks
    assert {mask.probability.shape for mask in held} == {(2, 64, 64)}


def measured(*arguments: str) -> dict[str, int]:
    """What `memory.py` finds."""
    command = [sys.executable, str(Path(__file__).with_name("memory.py")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("latent_mean",), ("vae",), ("vae", "palette")], ids=str)
def test_twelve_megapixels_and_150_queries_take_less_than_four_gigabytes(kind):
    """The whole command, its files written."""
    found = measured("3000", "4000", "150", *kind)
    assert found["over"] <= 4e9
    assert found["told"] > 10 and found["files"] == 2 * 150 + 3
