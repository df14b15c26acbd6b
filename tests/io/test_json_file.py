# SPDX-License-Identifier: Apache-2.0
"""The program's own JSON files, damaged in every way: one line with the path, or nothing lost."""

from __future__ import annotations

import json
import os

import pytest
import tiny

from digseg_jax.config.parse import parse, to_dict
from digseg_jax.data.shards import files, latents, records
from digseg_jax.errors import UserError
from digseg_jax.evaluation.journal import Journal
from digseg_jax.io import json_file
from digseg_jax.io.json_file import read_json
from digseg_jax.io.workdir import CONFIG_NAME, claim

BAD = {
    "empty": "",
    "half": '{"a": ',
    "list": "[1, 2]",
    "number": "3",
    "deep": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "nested": '{"a": ' + "[" * 60 + "]" * 60 + "}",
    "object": '{"format": 1}',
}
READERS = {
    "a run's configuration": (CONFIG_NAME, lambda folder: claim(folder, to_dict(parse({})))),
    "shards": (records.MANIFEST, records.read_manifest),
    "latents": (latents.MANIFEST, latents.read_manifest),
    "a plan": (files.PLAN, lambda folder: files.claim(folder, {"format": 2}, "--out")),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("reader", READERS)
def test_a_bad_file_is_one_line_with_its_path(tmp_path, reader, kind):
    name, read = READERS[reader]
    (tmp_path / name).write_text(BAD[kind])
    if reader == "a run's configuration" and kind == "object":
        pytest.skip(
            "a configuration of other keys is compared, and taken over where nothing was trained"
        )
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert str(tmp_path) in tiny.one_line(caught.value)


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_journal_begins_again(tmp_path, kind):
    """It ended every start of an evaluation."""
    journal = Journal(tmp_path, "counts", "abc")
    journal.add("one", 1)
    journal.close()
    path = tmp_path / "counts.jsonl"
    path.write_text(path.read_text() + BAD[kind] + "\n")
    assert Journal(tmp_path, "counts", "abc").done == {"one": 1}
    path.write_text(BAD[kind] + "\n")
    assert Journal(tmp_path, "counts", "abc").done == {}


def test_keys_and_types(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"scale": 2, "name": "a", "flag": True, "bad": float("nan")}))
    assert read_json(path, {"scale": float, "name": str, "flag": bool})["scale"] == 2
    for keys, told in (
        ({"bias": float}, "has no key 'bias'"),
        ({"name": float}, "'name' is 'a', expected float or int"),
        ({"flag": int}, "'flag' is 'True', expected int"),
        ({"bad": float}, "'bad' is 'nan', expected float or int"),
    ):
        with pytest.raises(UserError) as caught:
            read_json(path, keys, "evaluate again")
        assert tiny.one_line(caught.value) == f"{path}: {told}; evaluate again"


def test_size_is_looked_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr(json_file, "MAX_SIZE", 10)
    (tmp_path / "a.json").write_text('{"a": "0123456789"}')
    with pytest.raises(UserError, match="19 bytes, more than the 10 that are read"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="none.json: cannot be read"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_not_read(tmp_path, kind):
    """A pipe would be waited for, and /dev/zero has no end."""
    path = tmp_path / "a.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UserError) as caught:
        read_json(path, remedy="evaluate again")
    assert tiny.one_line(caught.value) == f"{path}: not a regular file; evaluate again"
