# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a suite on two processes, here with a tiny model; what it times is not judged."""

from __future__ import annotations

import pytest
import tiny

from digseg_jax.errors import UserError
from tests.bench import suite_on_two


@pytest.mark.slow
def test_both_count_every_image_of_every_set_once(folders, tmp_path):
    config = tiny.config(folders, eval__view_size=(32,), eval__batch_size=1)
    tiny.export(config, tmp_path)
    result = suite_on_two.run(str(tmp_path), "open_vocab", images=2, sampling="1x1")
    # four sets have all three protocols; of two the exhaustive one would be too many queries
    assert result["counted"] == 2 * (4 * 3 + 2 * 2)
    assert result["ratio"] == pytest.approx(result["two_seconds"] / result["one_seconds"], abs=0.02)


@pytest.mark.parametrize(("suite", "told"), [("all", "bdd100k"), ("none", "--suite=none")])
def test_a_suite_without_trees_is_named(suite, told):
    with pytest.raises(UserError) as caught:
        suite_on_two.run("assets:segmenter", suite, images=2, sampling="1x1")
    assert told in tiny.one_line(caught.value)
