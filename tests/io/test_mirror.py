# SPDX-License-Identifier: Apache-2.0
"""Files that grow beside a bucket: uploaded now and then, again after a failure, and at the end."""

from __future__ import annotations

import pytest

from digseg_jax.errors import Transient, UserError
from digseg_jax.io import jsonl
from digseg_jax.io.jsonl import UPLOAD_EVERY, Mirror, Record


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


class Bucket:
    """Stands in for the writing of objects; refuses while it is `closed`."""

    def __init__(self):
        self.objects: list[tuple[str, bytes]] = []
        self.closed = False

    def write(self, path, data):
        if self.closed:
            raise Transient(f"{path}: cannot be written (503)")
        self.objects.append((path.name, data))


@pytest.fixture
def bucket(monkeypatch):
    made = Bucket()
    monkeypatch.setattr(jsonl.storage, "write_bytes", made.write)
    return made


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def mirror(bucket, clock, tmp_path):
    made = Mirror(tmp_path / "bucket", clock)
    yield made
    made.close(upload=False)


def grow(mirror, text):
    """Appends to a file beside the bucket, and says so."""
    with (mirror.local / "metrics.jsonl").open("a") as file:
        file.write(text)
    mirror.maybe_upload()
    if mirror._running:  # in the background
        mirror._running.exception(60)


def test_what_has_grown_is_uploaded_in_the_background_every_half_minute(mirror, bucket, clock):
    grow(mirror, "a")
    clock.now = UPLOAD_EVERY - 1
    grow(mirror, "b")
    assert bucket.objects == []
    clock.now = UPLOAD_EVERY
    grow(mirror, "c")
    clock.now += UPLOAD_EVERY - 1
    grow(mirror, "d")
    assert bucket.objects == [("metrics.jsonl", b"abc")]


def test_a_file_that_has_not_grown_is_not_uploaded_again(mirror, bucket, clock):
    grow(mirror, "a")
    mirror.upload()
    clock.now = UPLOAD_EVERY
    grow(mirror, "")
    assert bucket.objects == [("metrics.jsonl", b"a")]


def test_an_upload_that_failed_is_logged_and_tried_again(mirror, bucket, clock, caplog):
    bucket.closed, clock.now = True, UPLOAD_EVERY
    grow(mirror, "a")
    bucket.closed = False
    grow(mirror, "b")
    assert "(503); trying again" in caplog.text and bucket.objects == []
    clock.now += UPLOAD_EVERY
    grow(mirror, "c")
    assert bucket.objects == [("metrics.jsonl", b"abc")]


def test_an_upload_that_is_waited_for_says_that_the_bucket_refuses(mirror, bucket):
    bucket.closed = True
    grow(mirror, "a")
    with pytest.raises(Transient, match="503"):
        mirror.upload()


@pytest.mark.parametrize(
    ("ended_by", "uploaded"),
    [(None, True), (KeyboardInterrupt, True), (UserError, True), (Transient, False)],
)
def test_the_last_rows_are_uploaded_unless_the_bucket_may_not_answer(
    bucket, tmp_path, monkeypatch, ended_by, uploaded
):
    monkeypatch.setattr(jsonl.storage, "is_remote", lambda path: True)
    record = Record(tmp_path / "metrics.jsonl")
    record.write({"step": 1})
    record.leave(ended_by)
    assert bucket.objects == ([("metrics.jsonl", b'{"step": 1}\n')] if uploaded else [])
    assert not record.mirror.local.exists()


def test_a_bucket_that_refuses_the_last_rows_does_not_hide_why_the_run_ended(
    bucket, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(jsonl.storage, "is_remote", lambda path: True)
    record = Record(tmp_path / "metrics.jsonl")
    record.write({"step": 1})
    bucket.closed = True
    record.leave(UserError)
    assert "the last rows are lost" in caplog.text
