# SPDX-License-Identifier: Apache-2.0
"""Scenes of named cut-outs: names held out are heard nowhere in training, masks are the cut-outs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tiny import one_line

from digseg_jax.config import PartConfig
from digseg_jax.data import stamps
from digseg_jax.data.opening import open_part, spec_of
from digseg_jax.errors import UserError

NAMES = ["red cow", "cows", "cow", "owl", "apple", "big pear", "drum", "bus", "boat", "tram"]
SETTINGS = {"size": 32, "scenes": 6, "val": 3, "seed": 0, "share": 0.4}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Stamps of one colour each, as Debian's package has them; and some that are left out."""
    root = tmp_path_factory.mktemp("package")
    folder = root / stamps.FOLDER / "animals"
    for i, name in enumerate([*NAMES, "a name of too many words", "cartoon owl"]):
        place = folder / "cartoon" if name.startswith("cartoon") else folder
        place.mkdir(parents=True, exist_ok=True)
        rgba = np.zeros((60, 50, 4), np.uint8)
        rgba[10:50, 5:45] = (20 * i, 255 - 20 * i, 7, 255)
        Image.fromarray(rgba).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"A {name}.\nmore\n")
    return root


@pytest.fixture(scope="module")
def made(package, cover, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    return stamps.make(package, out, **SETTINGS), out


def test_stamps_are_photographs_with_a_short_name(package):
    found = stamps.read_stamps(package)
    assert sorted(s.name for s in found) == sorted(NAMES)
    assert {s.category for s in found} == {"animals"}


def test_a_name_is_on_one_side_and_takes_its_plural_along(package):
    found = stamps.read_stamps(package)
    for seed in range(20):
        unseen = stamps.held_out(found, 0.4, seed)
        assert ("cow" in unseen) == ("cows" in unseen)
        assert 3 <= len(unseen) <= 5
    assert stamps.held_out(found, 0.4, 3) == stamps.held_out(found, 0.4, 3)


def test_training_never_hears_an_unseen_name(made):
    manifest, out = made
    seen, unseen = (set(manifest[part]["names"]) for part in ("seen", "unseen"))
    assert not seen & unseen and seen | unseen == set(NAMES)
    for part, names in (("seen", seen), ("unseen", unseen)):
        facts = spec_of(PartConfig("folder", str(out / part)))
        assert set(facts.names) == names | {stamps.BACKGROUND}
    assert not (out / "unseen" / "images" / "train").exists()
    assert json.loads((out / "manifest.json").read_text()) == manifest


def test_masks_are_the_cut_outs(made):
    """Every stamp has one colour, which nothing else in a scene has in such a patch."""
    _, out = made
    part = PartConfig("folder", str(out / "seen"))
    names, source = spec_of(part).names, open_part(part, "train")
    assert len(source) == SETTINGS["scenes"]
    for i in range(len(source)):
        scene = source[i]
        shown = set(np.unique(scene["label"])) - {0}
        assert 2 <= len(shown) <= 3
        for c in shown:
            color = np.array([20 * NAMES.index(names[c]), 255 - 20 * NAMES.index(names[c]), 7])
            same = (np.abs(scene["image"].astype(int) - color) <= 3).all(axis=-1)
            mask = scene["label"] == c
            assert same[mask].mean() > 0.4 and mask[same].mean() > 0.95


def test_the_same_seed_makes_the_same_bytes(made, package, tmp_path):
    _, out = made
    stamps.make(package, tmp_path / "again", **SETTINGS)
    for path in sorted(out.rglob("*.*")):
        assert (tmp_path / "again" / path.relative_to(out)).read_bytes() == path.read_bytes()


def test_bad_input_is_told(package, cover, tmp_path, capsys):
    with pytest.raises(UserError, match="--stamps=.*no PNG files"):
        stamps.read_stamps(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    for changes, what in (({"share": 1.5}, "--held_out=1.5"), ({"size": 5}, "--size=5")):
        with pytest.raises(UserError) as caught:
            stamps.make(package, tmp_path / "new", **(SETTINGS | changes))
        assert what in one_line(caught.value)
    assert stamps.main([f"--stamps={package}", f"--out={tmp_path / 'used'}"]) == 2
    assert "is not empty" in capsys.readouterr().err
