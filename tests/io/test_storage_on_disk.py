# SPDX-License-Identifier: Apache-2.0
"""Folders that are filled as a whole, and paths as people type them."""

from __future__ import annotations

from pathlib import Path

import pytest

from digseg_jax.errors import UserError
from digseg_jax.io import storage
from digseg_jax.io.storage import as_path, filled_locally
from digseg_jax.prediction.files import find_images
from digseg_jax.prediction.targets import targets
from digseg_jax.weights import resolve


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_keeps_its_files_until_the_new_ones_are_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "weights").write_text("old")
    (out / "notes").write_text("the user's")
    with pytest.raises(UserError, match="No space"), filled_locally(out) as folder:
        (folder / "weights").write_text("ne")
        raise OSError(28, "No space left on device")
    assert (out / "weights").read_text() == "old" and names(tmp_path) == {"out/weights", "out/notes"}

    with filled_locally(out) as folder:
        assert (out / "weights").read_text() == "old"
        (folder / "more").mkdir()
        for name in ("weights", "more/part"):
            (folder / name).write_text("new")
    assert names(tmp_path) == {"out/weights", "out/notes", "out/more/part"}
    assert (out / "weights").read_text() == "new"


def test_with_replace_nothing_else_is_left(tmp_path):
    for name in ("a", "b"):
        with filled_locally(tmp_path / "gallery", replace=True) as folder:
            (folder / name).write_text(name)
    assert names(tmp_path) == {"gallery/b"}


def test_what_a_killed_run_left_beside_is_removed(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("half")
    with filled_locally(tmp_path / "out") as folder:
        (folder / "whole").write_text("whole")
    assert names(tmp_path) == {"out/whole"}


@pytest.mark.parametrize("replace", [False, True])
def test_a_linked_or_mounted_folder_gets_the_files_itself(tmp_path, monkeypatch, replace):
    real, link = tmp_path / "disk" / "real", tmp_path / "out"
    real.mkdir(parents=True)
    (real / "old").write_text("old")
    link.symlink_to(real)
    for mounted in (False, True):  # nothing can be renamed into a mounted folder from beside it
        monkeypatch.setattr(storage, "_takes_renames", lambda parent, folder, is_so=not mounted: is_so)
        with filled_locally(link, replace=replace) as folder:
            (folder / "new").write_text(str(mounted))
        assert link.is_symlink() and (real / "new").read_text() == str(mounted)
        assert names(real) == ({"new"} if replace else {"new", "old"})


def test_the_home_of_nobody_is_told(tmp_path):
    for take in (as_path, find_images, resolve, lambda out: targets([Path("a")], out, ["ice"])):
        with pytest.raises(UserError, match="~nobody77/data: the home folder of ~nobody77 is not"):
            take("~nobody77/data")


def test_home_and_relative_paths_mean_one_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert as_path("~/runs") == as_path("runs") == tmp_path / "runs"
