# SPDX-License-Identifier: Apache-2.0
"""A broken example in the middle of an epoch: an error that names it, or one deterministic other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from digseg_jax.data.checked import TRIES, Guarded
from digseg_jax.errors import UserError

N = 40


class Source:
    """Example i shows i; `broken` ones fail in the ways that files do."""

    def __init__(self, broken=None):
        self.broken = broken or {}

    def __len__(self):
        return N

    def files(self, i):
        return {"image": Path(f"/data/{i}.jpg"), "label": Path(f"/data/{i}.png")}

    def __getitem__(self, i):
        example = {
            "image": np.full((4, 5, 3), i, np.uint8),
            "label": np.zeros((4, 5), np.int32),
            "name": str(i),
        }
        failure = self.broken.get(i)
        if isinstance(failure, Exception):
            raise failure
        return example | (failure or {})


WRONG = {
    "an error of a decoder": RuntimeError("bad\nstream"),
    "an error of the system": OSError(5, "Input/output error"),
    "a label of another size": {"label": np.zeros((5, 4), np.int32)},
    "an id beyond the classes": {"label": np.full((4, 5), 3, np.int32)},
    "an id below the ignore label": {"label": np.full((4, 5), -2, np.int32)},
    "labels that are not int32": {"label": np.zeros((4, 5), np.uint8)},
    "an image of one channel": {"image": np.zeros((4, 5, 1), np.uint8)},
    "an image of floats": {"image": np.zeros((4, 5, 3), np.float32)},
    "no pixels": {"image": np.zeros((0, 5, 3), np.uint8), "label": np.zeros((0, 5), np.int32)},
}


@pytest.mark.parametrize("failure", WRONG.values(), ids=WRONG)
def test_the_error_names_the_files_and_the_reason_in_one_line(failure):
    with pytest.raises(UserError) as caught:
        Guarded(Source({7: failure}), 3)[7]
    message = str(caught.value)
    assert "/data/7.jpg" in message and "/data/7.png" in message and "\n" not in message


@pytest.mark.parametrize("failure", WRONG.values(), ids=WRONG)
def test_a_skip_gives_another_whole_example_counts_and_logs_it(failure, caplog):
    example = Guarded(Source({7: failure}), 3, "skip")[7]
    assert example["name"] != "7" and example["label"].shape == (4, 5)
    assert example["skipped"] == 1 and example["skipped"].dtype == np.int32
    assert "/data/7.jpg" in caplog.text


def test_a_whole_example_passes_as_it_is():
    example = Guarded(Source(), 3, "skip")[7]
    assert example["name"] == "7" and example["skipped"] == 0


def test_the_replacement_is_a_function_of_seed_and_index():
    broken = {i: OSError("gone") for i in range(0, N, 2)}
    one, again = ([Guarded(Source(broken), 3, "skip", seed)[i]["name"] for i in range(N)]
                  for seed in (1, 1))  # fmt: skip
    other = [Guarded(Source(broken), 3, "skip", 2)[i]["name"] for i in range(N)]
    assert one == again and one != other
    assert all(int(name) % 2 == 1 for name in one)
    assert len({one[i] for i in broken}) > 5  # not one stand-in for all


def test_nothing_but_broken_examples_is_an_error_not_an_endless_search():
    broken = {i: OSError("gone") for i in range(N)}
    with pytest.raises(UserError, match=f"example 3 and {TRIES - 1} drawn in its place"):
        Guarded(Source(broken), 3, "skip")[3]


def test_a_key_press_is_not_a_broken_file():
    class Interrupted(Source):
        def __getitem__(self, i):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded(Interrupted(), 3, "skip")[0]
