# SPDX-License-Identifier: Apache-2.0
"""Scenes of named cut-outs: names held out are heard nowhere in training, masks are the cut-outs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tiny import one_line

from digseg_jax.config.schema import PartConfig
from digseg_jax.data.sources import open_part, spec_of
from digseg_jax.errors import UserError
from tests.bench import stamp_data
from tests.bench.stamp_files import FOLDER, held_out, near_duplicates, read_stamps, unrelated
from tests.bench.stamp_scenes import TRIES, VISIBLE, Scenes, paste, shrunk

NAMES = ["red cow", "cows", "cow", "owl", "apple", "big pear", "drum", "bus", "boat", "tram"]
SETTINGS = {"size": 32, "scenes": 6, "val": 3, "seed": 0, "share": 0.4}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Stamps of one color each, as Debian's package has them; and some that are left out."""
    root = tmp_path_factory.mktemp("package")
    folder = root / FOLDER / "animals"
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
    return stamp_data.make(package, out, **SETTINGS), out


def test_stamps_are_photographs_with_a_short_name(package):
    found = read_stamps(package)
    assert sorted(s.name for s in found) == sorted(NAMES)
    assert {s.category for s in found} == {"animals"}


def test_a_name_is_on_one_side_and_takes_its_plural_along(package):
    found = read_stamps(package)
    for seed in range(20):
        unseen = held_out(found, 0.4, seed)
        assert ("cow" in unseen) == ("cows" in unseen)
        assert 3 <= len(unseen) <= 5
    assert held_out(found, 0.4, 3) == held_out(found, 0.4, 3)


def test_hidden_colors_do_not_show_at_a_stamps_edge():
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[..., 1] = 255  # green wherever nothing is to be seen
    rgba[6:31, 6:31] = (200, 10, 20, 255)
    small = shrunk(rgba, 13, 13)
    seen = small[..., 3] > 10
    assert 0 < seen.sum() < seen.size and (small[seen][:, 3] < 255).any()
    assert (np.abs(small[seen][:, :3].astype(int) - (200, 10, 20)) <= 1).all()


def test_training_never_hears_an_unseen_name(made):
    manifest, out = made
    seen, unseen = (set(manifest[part]["names"]) for part in ("seen", "unseen"))
    assert not seen & unseen and seen | unseen == set(NAMES)
    for part, names in (("seen", seen), ("unseen", unseen)):
        facts = spec_of(PartConfig("folder", str(out / part)))
        assert set(facts.names) == names | {stamp_data.BACKGROUND}
    assert not (out / "unseen" / "images" / "train").exists()
    assert json.loads((out / "manifest.json").read_text()) == manifest


def test_what_is_nearly_a_trained_name_is_in_neither_set():
    trained = ["flower", "head of lettuce", "lion", "glass"]
    near = near_duplicates(
        ["two flowers", "some flowers", "head of red lettuce", "sea lion", "flow", "cows"], trained
    )
    assert near == {
        "two flowers": "flower",
        "some flowers": "flower",
        "head of red lettuce": "head of lettuce",
    }
    assert near_duplicates(["cow"], ["cows"]) == {"cow": "cows"}
    assert unrelated(["sea lion", "sea cow", "owls"], trained) == {"sea cow", "owls"}


def test_a_name_left_out_is_told_and_shown_nowhere(package, cover, tmp_path, monkeypatch):
    monkeypatch.setattr(stamp_data, "held_out", lambda *_: {"owl", "drum", "bus", "cow", "cows"})
    monkeypatch.setattr(stamp_data, "near_duplicates", lambda *_: {"owl": "apple"})
    manifest = stamp_data.make(package, tmp_path / "out", **SETTINGS)
    assert manifest["left_out"] == {"owl": "apple"}
    assert manifest["unseen"]["names"] == ["bus", "cow", "cows", "drum"]
    assert "owl" not in manifest["seen"]["names"]


def test_a_cut_out_is_mixed_by_its_alpha_and_its_mask_is_where_it_is_more_than_half_opaque():
    image, label = np.full((4, 4, 3), 100, np.uint8), np.zeros((4, 4), np.uint16)
    cutout = np.zeros((2, 3, 4), np.uint8)
    cutout[..., :3] = 200
    cutout[..., 3] = [[255, 128, 127], [0, 51, 255]]
    inside = paste(image, label, cutout, 1, 0, 7)
    assert label.tolist() == [[0] * 4, [7, 7, 0, 0], [0, 0, 7, 0], [0] * 4]
    assert (inside == (label == 7)).all()
    assert image[1:3, :3, 0].tolist() == [[200, 150, 150], [100, 120, 200]]
    image[1:3, :3] = 100
    assert (image == 100).all()


def test_every_stamp_of_a_scene_stays_visible(package, cover, monkeypatch):
    pasted = {}

    def recorded(image, label, cutout, top, left, value):
        if not label.any():
            pasted.clear()
        pasted[value] = paste(image, label, cutout, top, left, value)
        return pasted[value]

    monkeypatch.setattr("tests.bench.stamp_scenes.paste", recorded)
    scenes = Scenes(read_stamps(package), "test", 32)
    for i in range(40):
        _, label = scenes.scene(np.random.default_rng(i))
        assert set(np.unique(label)) == {0, *pasted} and 2 <= len(pasted) <= 3
        for value, mask in pasted.items():
            assert (label == value).sum() >= VISIBLE * mask.sum()


def test_backgrounds_are_training_tiles_for_training_alone(made, cover):
    _, out = made
    tiles = {split: cover.tiles(split) for split in ("train", "test")}
    for part, split, own in (("seen", "train", "train"), ("seen", "val", "test"),
                             ("unseen", "val", "test")):  # fmt: skip
        stored = np.asarray(Image.open(out / part / "images" / split / "000000.png"))
        label = np.asarray(Image.open(out / part / "masks" / split / "000000.png"))
        windows = [cover.window(t.top, t.left, 128)["image"] for t in tiles[own]]
        small = [w.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3)) for w in windows]
        outside = label == 0  # the median: soft edges of the stamps are mixed into it
        assert min(np.median(np.abs(w - stored)[outside]) for w in small) <= 0.5


def test_masks_are_the_cut_outs(made):
    """Every stamp has one color, which nothing else in a scene has in such a patch."""
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
    stamp_data.make(package, tmp_path / "again", **SETTINGS)
    for path in sorted(out.rglob("*.*")):
        assert (tmp_path / "again" / path.relative_to(out)).read_bytes() == path.read_bytes()


def test_a_scene_does_not_depend_on_how_many_are_made(made, package, tmp_path):
    _, out = made
    stamp_data.make(package, tmp_path / "fewer", **(SETTINGS | {"scenes": 2}))
    for kind in ("images", "masks"):
        place = f"seen/{kind}/train/000001.png"
        assert (tmp_path / "fewer" / place).read_bytes() == (out / place).read_bytes()


def test_a_killed_command_may_be_given_again_and_another_set_is_kept(made, package, tmp_path):
    manifest, out = made
    again = tmp_path / "again"
    stamp_data.claim(again, manifest)  # all that a command killed at once has written
    with pytest.raises(UserError, match="holds another set"):
        stamp_data.make(package, again, **(SETTINGS | {"seed": 1}))
    assert stamp_data.make(package, again, **SETTINGS) == manifest
    place = "unseen/masks/val/000002.png"
    assert (again / place).read_bytes() == (out / place).read_bytes()


def test_bad_input_is_told(package, cover, tmp_path, capsys, monkeypatch):
    def told(**changes):
        given = SETTINGS | {"stamps": package, "out": tmp_path / "new"} | changes
        with pytest.raises(UserError) as caught:
            stamp_data.make(**given)
        assert not (tmp_path / "new").exists()
        return one_line(caught.value)

    assert "no PNG files" in told(stamps=tmp_path)
    assert "no such folder" in told(stamps=tmp_path / "nowhere")
    assert "--held_out=1.5" in told(share=1.5)
    assert "--size=5" in told(size=5)
    assert "--seed=-1" in told(seed=-1)
    assert "0 unseen names" in told(share=0.01)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    assert "is not empty" in told(out=tmp_path / "used")
    assert "is a file" in told(out=tmp_path / "used" / "file")
    assert stamp_data.main([f"--stamps={package}", f"--out={tmp_path / 'used'}"]) == 2
    assert capsys.readouterr().err.startswith("error: --out=")
    for name, png, text in (("a", b"no image", b"An owl."), ("b", None, b"\xff\xfe")):
        folder = tmp_path / name / "animals"
        folder.mkdir(parents=True)
        Image.new("RGBA", (60, 60)).save(folder / "x.png")
        if png:
            (folder / "x.png").write_bytes(png)
        (folder / "x.txt").write_bytes(text)
        assert "x." in told(stamps=tmp_path / name)
    monkeypatch.setattr("tests.bench.stamp_scenes.VISIBLE", 1.1)
    with pytest.raises(UserError, match=f"--size=32: in {TRIES} tries"):
        Scenes(read_stamps(package), "test", 32).scene(np.random.default_rng(0))
