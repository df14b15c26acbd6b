# SPDX-License-Identifier: Apache-2.0
"""The journal: what was counted before a kill is not counted again, and nothing else is believed."""

from __future__ import annotations

import contextlib
import json
import time

import jax
import numpy as np
import pytest
from etils import epath

from digseg_jax.errors import UserError
from digseg_jax.evaluation import journal as journal_module
from digseg_jax.evaluation.journal import Journal, identity_of, pack, unpack
from digseg_jax.runtime import distributed


def filled(folder, n=3, identity="a"):
    journal = Journal(folder, "set", identity)
    for i in range(n):
        journal.add(str(i), {"value": i / 3})
    return journal


def test_a_new_journal_knows_what_the_old_one_finished(tmp_path):
    filled(tmp_path)  # never closed: a killed process closes nothing
    again = Journal(tmp_path, "set", "a")
    assert again.done == {str(i): {"value": i / 3} for i in range(3)}
    assert "2" in again and "3" not in again and again["1"] == {"value": 1 / 3}


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_line_cut_short_by_a_kill_is_forgotten_and_the_next_is_whole(tmp_path, cut):
    filled(tmp_path)
    path = tmp_path / "set.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(tmp_path, "set", "a")
    assert set(again.done) <= {"0", "1", "2"} and "0" in again
    again.add("9", 9)
    assert Journal(tmp_path, "set", "a")["9"] == 9
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_journal_of_something_else_is_begun_anew(tmp_path):
    filled(tmp_path)
    assert Journal(tmp_path, "set", "b").done == {}
    assert Journal(tmp_path, "set", "a").done == {}, "its lines are gone"


def test_in_a_bucket_it_is_one_object_for_each_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "is_remote", lambda folder: True)
    folder = epath.Path(tmp_path)
    filled(folder).close()
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [f"0000{i}.json" for i in range(3)]
    again = Journal(folder, "set", "a")
    assert again.done == {str(i): {"value": i / 3} for i in range(3)}
    again.add("9", 9)
    assert Journal(folder, "set", "a")["9"] == 9
    assert Journal(folder, "set", "b").done == {}
    assert not (tmp_path / "set").exists(), "another one's pieces are gone"


def test_a_disk_that_refuses_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set.jsonl: cannot be written"):
        Journal(tmp_path / "file", "set", "a")


def test_garbage_is_no_journal(tmp_path):
    (tmp_path / "set.jsonl").write_bytes(b"\xff\x00garbage\n{}")
    assert Journal(tmp_path, "set", "a").done == {}


def test_without_a_folder_it_lives_in_memory():
    journal = Journal(None, "set", "a")
    journal.add("1", 2)
    assert journal["1"] == 2
    journal.close()


@pytest.mark.parametrize("shape", [(3, 4), (0,), (2, 3, 4)])
def test_counts_survive_exactly(shape):
    counts = np.random.default_rng(0).integers(0, 3, shape) * 2**40
    again = unpack(json.loads(json.dumps(pack(counts))))
    np.testing.assert_array_equal(again, counts)
    assert again.dtype == np.int64


def test_other_weights_or_settings_are_another_identity():
    params = {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": np.zeros(4, np.float32)}
    base = identity_of(params, {"seed": 0}, "1x1")
    assert base == identity_of(jax.tree.map(jax.numpy.asarray, params), {"seed": 0}, "1x1")
    changed = {"a": {"kernel": 1.01 * np.ones((2, 3), np.float32)}, "b": np.zeros(4, np.float32)}
    assert len({base, identity_of(changed, {"seed": 0}, "1x1"), identity_of(params, {"seed": 1})}) == 3


def test_another_version_of_the_program_is_another_identity(monkeypatch):
    before = identity_of(None, {"seed": 0})
    monkeypatch.setattr("digseg_jax.__version__", "9.9.9")
    assert identity_of(None, {"seed": 0}) != before


def test_pieces_in_a_bucket_are_read_side_by_side_and_keep_their_order(tmp_path, monkeypatch):
    """One after another, a long journal took longer than the other processes wait for it."""
    monkeypatch.setattr(journal_module, "is_remote", lambda folder: True)
    folder = epath.Path(tmp_path)
    filled(folder, n=150).close()
    kind, running, most = type(folder), [], []
    read = kind.read_bytes

    def slow(path):
        running.append(path)
        most.append(len(running))
        time.sleep(0.02 + 0.01 * (int(path.stem) % 3))  # later ones may be faster
        running.remove(path)
        return read(path)

    monkeypatch.setattr(kind, "read_bytes", slow)
    assert list(Journal(folder, "set", "a").done) == [str(i) for i in range(150)]
    assert 8 < max(most) <= journal_module.READERS

    # Of another identity one piece is enough to know; a broken one is named.
    most.clear()
    (tmp_path / "set" / "00007.json").write_text("{")
    with pytest.raises(UserError, match="00007.json: not readable as JSON"):
        Journal(folder, "set", "a")
    most.clear()
    assert Journal(folder, "set", "b").done == {} and len(most) == 1


def test_processes_wait_long_for_a_long_journal(tmp_path, monkeypatch):
    waited = []

    @contextlib.contextmanager
    def noted(name, timeout=distributed.BARRIER_TIMEOUT):
        waited.append(timeout)
        yield

    monkeypatch.setattr(journal_module, "together", noted)
    Journal.shared(tmp_path, "set", "a").close()
    assert waited and min(waited) >= 3600
