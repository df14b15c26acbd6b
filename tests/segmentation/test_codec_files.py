# SPDX-License-Identifier: Apache-2.0
"""The file of what a codec chose: a damaged one is told in a line, with its place."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny

from digseg_jax.errors import UserError
from digseg_jax.segmentation.codecs import load_state, save_state, state_file
from digseg_jax.segmentation.palette import PaletteCodec, build_palette
from digseg_jax.segmentation.prompted import PromptedCodec

ROWS = [[0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]
WHOLE = {"colors": ROWS, "prototypes": ROWS, "sigma": 0.1, "latents": [[0.0, 1.0], [1.0, 0.0]]}


def codec(name: str) -> PaletteCodec | PromptedCodec:
    return PaletteCodec(2) if name == "palette" else PromptedCodec(1)


@pytest.mark.parametrize("name", ["palette", "prompted"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"colors": None}, "no colors"),
        ({"sigma": None}, "sigma=None"),
        ({"sigma": 0.0}, "sigma=0.0, expected a number above 0"),
        ({"sigma": "0.1"}, "sigma=0.1"),
        ({"prototypes": [[1.0, 2.0]] * 2}, "prototypes has the shape [2, 2], expected rows of 3"),
        ({"prototypes": [*ROWS, ROWS[0]]}, "2 colors, but 3 prototypes"),
        ({"colors": [[1.0], [1.0, 2.0]]}, "colors has something else than rows of numbers"),
        ({"colors": {"red": 1}}, "colors has something else"),
        ({"colors": []}, "colors has the shape [0]"),
        ({"colors": [[1e99, 0.0, 0.0]] * 2}, "colors has values that are no numbers"),
    ],
)
def test_a_damaged_file_is_one_line_with_its_place(tmp_path, name, change, told):
    values = {key: value for key, value in (WHOLE | change).items() if value is not None}
    path = state_file(name, tmp_path)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        load_state(codec(name), tmp_path)
    assert tiny.one_line(caught.value).startswith(f"{path}: damaged: ") and told in str(caught.value)


@pytest.mark.parametrize("latents", [None, [[1.0, 2.0]], "none"])
def test_the_latents_of_names_are_looked_at_too(tmp_path, latents):
    values = WHOLE | {"latents": latents}
    if latents is None:
        del values["latents"]
    state_file("prompted", tmp_path).write_text(json.dumps(values))
    with pytest.raises(UserError, match="damaged: .*latents"):
        load_state(PromptedCodec(1), tmp_path)


@pytest.mark.parametrize("name", ["palette", "prompted"])
def test_a_whole_one_is_taken_over(tmp_path, name):
    state_file(name, tmp_path).write_text(json.dumps(WHOLE))
    taken = codec(name)
    load_state(taken, tmp_path)
    np.testing.assert_array_equal(taken.palette.colors, np.asarray(ROWS, np.float32))
    (tmp_path / "again").mkdir()
    if name == "prompted":  # a palette's latents are found anew
        save_state(taken, tmp_path / "again")
        assert json.loads(state_file(name, tmp_path / "again").read_text()) == WHOLE


def test_another_machines_last_digits_give_the_same_sigma():
    def noisy(scale):
        def round_trip(image):
            draws = np.random.default_rng(0).standard_normal(image.shape)
            return (np.asarray(image) + scale * draws).astype(np.float32)

        return round_trip

    made = [build_palette(5, noisy(scale), lambda image: image) for scale in (0.1, 0.1 + 1e-8)]
    assert made[0].sigma == made[1].sigma == round(made[0].sigma, 5)
