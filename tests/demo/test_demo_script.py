# SPDX-License-Identifier: Apache-2.0
"""The demo's script without a browser: what it sends, and what stays shown when an order fails."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "digseg_jax"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node")


@pytest.mark.parametrize("name", ["demo/demo.js", "report/slider.js", "report/page.js"])
def test_a_script_can_be_read(name):
    subprocess.run([NODE, "--check", str(SCRIPTS / name)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def told():
    """What happened on a page of stand-ins."""
    stand_ins = Path(__file__).with_name("without_browser.js")
    command = [NODE, str(stand_ins), str(SCRIPTS / "demo" / "demo.js")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_click_before_there_are_masks_asks_nothing(told):
    assert told["before"] == []


def test_text_may_be_dropped_into_the_words_and_a_file_anywhere(told):
    assert (told["textPrevented"], told["filePrevented"]) == (0, 1)
    assert told["chosen"] == "photo of a leaf.png"


def test_an_upload_brings_the_name_of_its_file(told):
    assert told["name"] == "photo of a leaf.png"


def test_a_refused_order_leaves_the_masks_that_are_shown(told):
    assert (told["first"], told["refused"]) == ("Done.", "8 images are waiting already")
    assert told["clicked"] == "jobs/one/pixel?x=10&y=5"
    assert told["column"] == "jobs/one/pixel?x=7&y=5" and told["rows"] == 1


def test_an_order_that_is_lost_does_not_block_the_next(told):
    assert (told["lost"], told["third"]) == ("gone", "Done.")
