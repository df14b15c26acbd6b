# SPDX-License-Identifier: Apache-2.0
"""The demo by HTTP: orders, limits, the queue, cancellation, and who is turned away."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image
from served_demo import serve, tiny_segmenter

from digseg_jax.config.sampling import EStep
from digseg_jax.data.datasets.readers.rle import decode
from digseg_jax.demo import job as job_lib
from digseg_jax.demo import server as server_lib
from digseg_jax.demo.work import KEPT, MAX_VALUES, WAITING, Job, Order, Queue
from digseg_jax.errors import INTERRUPTED, UserError

ROOT = Path(__file__).parents[2]
WORDS = ["water", "snow and ice"]


@pytest.fixture(scope="module")
def segmenter(folders, tmp_path_factory):
    return tiny_segmenter(folders, tmp_path_factory.mktemp("demo") / "export")


@pytest.fixture
def gate():
    """The engine's steps pass while it is open."""
    found = threading.Event()
    found.set()
    return found


@pytest.fixture
def demo(segmenter, gate):
    with serve(segmenter, gate) as found:
        yield found


def png(height=24, width=40, seed=0) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def send(demo, method, path, body=None, headers=None, token=None):
    """Status, headers and body of a request to the demo."""
    connection = http.client.HTTPConnection("127.0.0.1", demo.server_port, timeout=120)
    token = demo.token if token is None else token
    connection.request(method, f"/{token}/{path}", body, headers or {})
    reply = connection.getresponse()
    found = reply.status, reply.headers, reply.read()
    connection.close()
    return found


def order(demo, body=None, words=WORDS, **changes):
    """Status and JSON of an order."""
    numbers = {"members": 2, "steps": 2, "side": 512} | changes
    query = urlencode([("word", word) for word in words] + list(numbers.items()))
    status, _, reply = send(demo, "POST", f"jobs?{query}", png() if body is None else body)
    return status, json.loads(reply)


def wait(demo, job, *states):
    """The order's facts, once it is in one of the states."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        facts = json.loads(send(demo, "GET", f"jobs/{job['id']}")[2])
        if facts["state"] in states:
            return facts
        time.sleep(0.02)
    raise AssertionError(f"still {facts['state']}")


def image(reply) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(reply)))


def test_an_order_gets_the_masks_of_prediction_and_its_files(demo, segmenter):
    status, job = order(demo)
    assert (status, job["width"], job["height"]) == (200, 40, 24)
    done = wait(demo, job, "done", "failed")
    assert (done["state"], done["done"]) == ("done", done["total"])

    # What the engine gives to anybody who watches it.
    want = segmenter(image(png()), WORDS, 2, 2, 3, watch=lambda moment: None)
    half = want.probability.astype(np.float16).astype(np.float32)
    for place in range(2):
        shown = image(send(demo, "GET", f"jobs/{job['id']}/mask/{place}.png")[2])
        np.testing.assert_array_equal(shown, np.rint(255 * half[place]))
    told = json.loads(send(demo, "GET", f"jobs/{job['id']}/pixel?x=30&y=7")[2])["words"]
    assert {row["word"]: row["probability"] for row in told} == dict(
        zip(WORDS, half[:, 7, 30].tolist(), strict=True)
    )
    assert told[0]["probability"] >= told[1]["probability"]

    _, headers, coco = send(demo, "GET", f"jobs/{job['id']}/files/coco")
    assert headers["Content-Disposition"] == 'attachment; filename="masks.coco.json"'
    found = json.loads(coco)
    for note in found["annotations"]:
        mask = decode(note["segmentation"]["counts"], 24, 40)
        np.testing.assert_array_equal(mask, half[note["category_id"] - 1] > 0.5)
    labels = image(send(demo, "GET", f"jobs/{job['id']}/files/labels")[2])
    transparent = image(send(demo, "GET", f"jobs/{job['id']}/labels.png")[2])[..., 3] == 0
    np.testing.assert_array_equal(labels == 255, transparent)


def test_masks_are_there_while_it_works_and_cancel_ends_it(demo, gate):
    gate.clear()
    _, job = order(demo, members=60)
    time.sleep(0.2)
    assert send(demo, "GET", f"jobs/{job['id']}/labels.png")[0] == 404, "no masks before the first step"
    gate.set()
    end = time.monotonic() + 120
    while not (facts := json.loads(send(demo, "GET", f"jobs/{job['id']}")[2]))["version"]:
        assert time.monotonic() < end
    assert facts["state"] == "running" and facts["done"] < facts["total"]
    assert image(send(demo, "GET", f"jobs/{job['id']}/mask/1.png")[2]).shape == (24, 40)
    assert send(demo, "GET", f"jobs/{job['id']}/files/coco")[0] == 404, "not complete yet"
    assert send(demo, "POST", f"jobs/{job['id']}/cancel", b"")[0] == 200
    ended = wait(demo, job, "canceled", "done")
    assert ended["state"] == "canceled" and ended["done"] < ended["total"]


def test_others_queue_see_their_place_and_are_refused_when_it_is_full(demo, gate):
    gate.clear()
    first = order(demo)[1]
    wait(demo, first, "running")
    jobs = [order(demo, members=1, steps=1)[1] for _ in range(WAITING)]
    assert [job["place"] for job in jobs] == list(range(1, WAITING + 1))
    status, reply = order(demo)
    assert status == 400 and "waiting already" in reply["error"]

    send(demo, "POST", f"jobs/{jobs[0]['id']}/cancel", b"")
    assert wait(demo, jobs[0], "canceled")["place"] == 0
    assert wait(demo, jobs[1], "queued")["place"] == 1
    gate.set()
    assert wait(demo, jobs[-1], "done", "failed")["state"] == "done"
    assert send(demo, "GET", f"jobs/{first['id']}")[0] == 404, f"only the last {KEPT} are kept"


def test_a_large_image_is_made_smaller_and_too_many_masks_are_refused(demo):
    _, job = order(demo, png(30, 600), members=1, steps=1, side=256)
    assert (job["width"], job["height"]) == (256, 13)
    with pytest.raises(UserError, match="too many for an image of this size"):
        Order(np.zeros((1000, MAX_VALUES // 2000 + 1, 3), np.uint8), ("a", "b"), None)


@pytest.mark.parametrize(
    ("body", "changes", "told"),
    [
        (b"no image", {}, "the image: cannot be decoded"),
        (b"", {}, "the image: the file is empty"),
        (png()[:80], {}, "the image: cannot be decoded"),
        (b"", {"sample": "/etc/passwd"}, "sample=/etc/passwd: legal are"),
        (None, {"words": []}, "no words"),
        (None, {"words": ["a", "a"]}, "asked twice"),
        (None, {"words": ["water " * 40]}, "at most 20"),
        (None, {"members": 65}, "members=65: legal are whole numbers from 1 to 64"),
        (None, {"steps": "-1"}, "steps=-1"),
        (None, {"side": 4096}, "side=4096"),
    ],
)
def test_a_bad_order_is_one_line(demo, body, changes, told):
    status, reply = order(demo, body, **changes)
    if status == 200:  # the engine itself refuses a query
        reply = wait(demo, reply, "failed", "done")
    assert told in reply["error"] and "\n" not in reply["error"] and "/tmp" not in reply["error"]


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(demo):
    data = bytearray(png())
    data[16:24] = (100_000).to_bytes(4, "big") * 2  # width and height of the header
    status, reply = order(demo, bytes(data))
    assert status == 400 and "the image: " in reply["error"]


def test_a_file_that_is_too_long_is_refused_unread(demo):
    plain = http.client.HTTPConnection("127.0.0.1", demo.server_port, timeout=30)
    with contextlib.closing(plain) as connection:
        connection.putrequest("POST", f"/{demo.token}/jobs?word=a")
        connection.putheader("Content-Length", str(server_lib.MAX_UPLOAD + 1))
        connection.endheaders()
        reply = connection.getresponse()
        assert (reply.status, reply.headers["Connection"]) == (413, "close")
        assert "64 MiB" in reply.read().decode()


def test_a_browser_that_sends_too_long_a_file_reads_why(demo):
    plain = http.client.HTTPConnection("127.0.0.1", demo.server_port, timeout=30)
    with contextlib.closing(plain) as connection:
        body = bytes(server_lib.MAX_UPLOAD + 2**20)
        connection.request("POST", f"/{demo.token}/jobs?word=a", body)  # all of it, then the answer
        reply = connection.getresponse()
        assert reply.status == 413 and "64 MiB" in json.loads(reply.read())["error"]


def test_too_many_words_for_an_address_are_told_as_json(demo):
    plain = http.client.HTTPConnection("127.0.0.1", demo.server_port, timeout=30)
    with contextlib.closing(plain) as connection:
        connection.request("POST", f"/{demo.token}/jobs?word={'a' * 70_000}", b"")
        reply = connection.getresponse()
        assert reply.status == 414 and "too many words" in json.loads(reply.read())["error"]


@pytest.mark.parametrize(
    ("headers", "token", "status"),
    [
        ({"Host": "evil.example"}, None, 403),
        ({"Host": "127.0.0.1"}, None, 403),
        ({"Origin": "http://evil.example"}, None, 403),
        ({"Origin": "null"}, None, 403),
        ({}, "wrong", 404),
        ({}, "", 404),
    ],
)
def test_strangers_are_turned_away(demo, headers, token, status):
    for method in ("GET", "POST"):
        assert send(demo, method, "jobs", b"", headers, token)[0] == status
    assert send(demo, "GET", "", None, headers, token)[0] == status


def test_its_own_page_is_answered_and_allows_nothing_from_outside(demo):
    own = {"Host": f"localhost:{demo.server_port}", "Origin": f"http://localhost:{demo.server_port}"}
    status, headers, page = send(demo, "GET", "", None, own)
    assert status == 200 and b"Segment an image" in page
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "http" not in policy
    assert headers["Referrer-Policy"] == "no-referrer"
    assert demo.token.encode() not in page
    assert demo.server_address[0] == "127.0.0.1"


def summary(demo, job) -> dict:
    assert wait(demo, job, "done", "failed")["state"] == "done"
    return json.loads(send(demo, "GET", f"jobs/{job['id']}/files/summary")[2])


def test_timesteps_are_spaced_as_the_weights_or_the_user_have_it(segmenter, gate):
    spaced = copy.copy(segmenter)
    spaced.settings = dataclasses.replace(segmenter.settings, spacing="leading")
    with serve(spaced, gate) as demo:
        assert summary(demo, order(demo)[1])["estep"] == "2x2:leading"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({"name": "my leaf.png"}, "my leaf.png"),
        ({"name": "C:\\photos\\leaf.png"}, "leaf.png"),
        ({"name": "../../etc/pass\x00wd\u202e"}, "passwd"),
        ({"name": "x" * 900 + ".png"}, "x" * 255),
        ({"sample": "morocco", "side": 256}, "morocco.jpg"),
        ({"name": ".."}, "masks"),
        ({}, "masks"),
    ],
)
def test_annotations_name_the_file_that_was_uploaded(demo, sent, kept):
    job = order(demo, words=["water"], members=1, steps=1, **sent)[1]
    named = summary(demo, job).get("image", "masks")
    coco = json.loads(send(demo, "GET", f"jobs/{job['id']}/files/coco")[2])
    assert named == coco["images"][0]["file_name"] == kept


def test_shares_are_computed_once_and_nobody_waits_for_them():
    queue = Queue(lambda *_, **__: None, seed=0)
    job = Job(Order(np.zeros((4, 6, 3), np.uint8), ("a", "b"), EStep(1, 1)))
    assert [row["share"] for row in job.facts(0)["words"]] == [0.0, 0.0]
    planes = np.zeros((2, 4, 6), np.float32)
    planes[1, :2] = 0.9
    job.show(planes)
    job.planes = None  # a poll does not look at the masks
    held = []

    class Watched(Job):
        def facts(self, place):
            held.append(queue._changed._is_owned())
            return Job.facts(self, place)

    job.__class__ = Watched
    assert [row["share"] for row in queue.facts(job)["words"]] == [0.0, 0.5]
    assert held == [False]
    queue.close()


def test_the_page_tells_the_size_of_the_files(demo):
    assert b"Files have the size at which the image was segmented" in send(demo, "GET", "")[2]


def test_a_taken_port_is_told_before_the_model_is_loaded(demo, monkeypatch):
    monkeypatch.setattr(job_lib, "find_export", lambda model: pytest.fail("the model is looked for"))
    for port, told in ((demo.server_port, "in use"), (70_000, "0-65535")):
        with pytest.raises(UserError, match=f"--port={port}: cannot be used .*{told}") as caught:
            job_lib.demo("weights", port, browser=False)
        assert "\n" not in str(caught.value)


def test_ctrl_c_ends_it_with_the_status_of_an_interrupt(tmp_path):
    command = [sys.executable, "-m", "digseg_jax.main", "demo", "--no_browser"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert errors.splitlines()[-1] == "error: interrupted"
