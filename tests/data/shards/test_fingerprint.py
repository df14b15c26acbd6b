# SPDX-License-Identifier: Apache-2.0
"""Shards of files that were changed since, or of other files, are not taken for theirs."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from functools import partial

import official_trees as trees
import pytest
import tiny
from official_trees import grid

from digseg_jax.config import default
from digseg_jax.config.parse import parse, with_settings
from digseg_jax.data.datasets import registry
from digseg_jax.data.shards.fingerprint import fingerprint
from digseg_jax.data.shards.records import RecordSource
from digseg_jax.data.sources import check_scored_splits, check_training_data
from digseg_jax.errors import UserError
from digseg_jax.tools.prepare_data import prepare_split


def prepare(root, out, split="train", **options):
    spec = registry.spec("folder", root)
    opened = partial(registry.open_source, "folder", root, split)
    return prepare_split(opened, spec, split, out, **options)


def test_a_corrected_mask_is_not_complete_already(tmp_path):
    root, out = tmp_path / "data", tmp_path / "out"
    root.mkdir()
    trees.folder(root)
    prepare(root, out)
    prepare(root, out)  # the same files: complete

    mask = root / "masks" / "train" / "a.png"
    before = mask.stat()
    trees.save(mask, grid(1, 0, 255, 1))  # as large as before
    os.utime(mask, (before.st_atime, before.st_mtime + 5))
    with pytest.raises(UserError) as caught:
        prepare(root, out)
    line = tiny.one_line(caught.value)
    assert "holds shards made with files (names, sizes, times)=" in line and "with --renew" in line

    # Renewed, they have the new label; files that the tool did not make stay.
    (out / "train" / "notes.txt").write_text("mine")
    prepare(root, out, renew=True)
    spec = registry.spec("folder", root)
    assert RecordSource(out, "train", spec)[0]["label"].ravel()[:2].tolist() == [1, 0]
    assert (out / "train" / "notes.txt").read_text() == "mine"
    shards = [p.stat().st_mtime_ns for p in (out / "train").glob("shard-*")]
    prepare(root, out, renew=True)  # nothing is old: nothing is made again
    assert [p.stat().st_mtime_ns for p in (out / "train").glob("shard-*")] == shards


def test_a_copy_with_its_times_is_the_same_data_and_another_set_is_not(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    trees.folder(root)
    shutil.copytree(root, tmp_path / "copy")  # keeps times
    shutil.copytree(root, tmp_path / "other")
    trees.image(tmp_path / "other" / "images" / "train" / "a.jpg", quality=30)
    made = [
        fingerprint(registry.open_source("folder", tmp_path / name, "train"))
        for name in ("data", "copy", "other")
    ]
    assert made[0] == made[1] != made[2]


def test_shards_are_known_by_their_checksums(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    trees.folder(root)
    prepare(root, tmp_path / "a")
    prepare(root, tmp_path / "b")
    spec = registry.spec("folder", root)
    a, b = (fingerprint(RecordSource(tmp_path / name, "train", spec)) for name in "ab")
    assert a == b and len(a) == 24


def test_shards_beside_changed_files_are_refused_at_the_start(tmp_path, monkeypatch):
    """The shards are what is trained on: a corrected mask would be left out without a word."""
    trees.folder(tmp_path)
    for split in ("train", "val"):
        prepare(tmp_path, tmp_path, split)
    settings = {"data.name": "folder", "data.root": str(tmp_path), "eval.calibrate": False}
    config = with_settings(parse(default()), settings | {"eval.split": "val"})

    def told(training: bool = True) -> str:
        try:
            if training:
                check_training_data(config.data)
            check_scored_splits(config.data, config.eval)
        except UserError as error:
            return tiny.one_line(error)
        return ""

    # A copy of later times, as `cp` makes it, is the same before the shards were made.
    manifest, mask = tmp_path / "train" / "manifest.json", tmp_path / "masks" / "train" / "a.png"
    os.utime(mask, (0, mask.stat().st_mtime - 60))
    assert told() == ""

    os.utime(mask, (0, manifest.stat().st_mtime + 60))
    line = told()
    assert f"folder {tmp_path.name} train: the shards in {manifest.parent} are read instead" in line
    assert f"1 of its files are newer than what was made from them, such as {mask}" in line
    assert f"--out={tmp_path} --split=train --renew (if only the times of the files are new" in line
    assert told(training=False) == "", "the evaluated split's files are as they were"
    os.utime(manifest, (0, mask.stat().st_mtime + 1))  # as `touch` does
    assert told() == ""
    trees.image(tmp_path / "images" / "train" / "new.jpg")
    trees.save(tmp_path / "masks" / "train" / "new.png", grid(1, 0))
    assert "the names or sizes of its files are others now" in told()
    prepare(tmp_path, tmp_path, renew=True)
    assert told() == ""

    # Files that came with a package are as new as its installation.
    os.utime(mask, (0, (tmp_path / "train" / "manifest.json").stat().st_mtime + 9e3))
    assert "newer than" in told()
    with monkeypatch.context() as patched:
        own = registry.spec("folder", tmp_path)
        patched.setattr(registry, "spec", lambda name, root: replace(own, from_package=True))
        assert told() == ""
    os.utime(mask, (0, 0))

    # The evaluated split is judged in the same way; files that are not there are not.
    os.utime(tmp_path / "masks" / "val" / "a.png", (0, manifest.stat().st_mtime + 9e3))
    assert "val: the shards" in told(training=False)
    shutil.rmtree(tmp_path / "images")
    assert told() == ""
