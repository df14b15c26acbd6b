# SPDX-License-Identifier: Apache-2.0
"""An evaluation that does not fit is refused before the job's first step, with the setting to lower."""

from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from experiments import get_config
from PIL import Image

from digseg_jax import jobs
from digseg_jax.aot import dry_run
from digseg_jax.aot.dry_run import check_evaluation, device_need, host_need, image_sizes
from digseg_jax.aot.programs import abstract_task
from digseg_jax.aot.shapes import Architecture
from digseg_jax.config.parse import parse, with_settings
from digseg_jax.data.datasets.landcover import GROUPS
from digseg_jax.errors import OVER_BUDGET, DoesNotFit
from digseg_jax.evaluation.examples import eval_examples
from digseg_jax.runtime.door import tell

GB = 1e9
pytestmark = pytest.mark.usefixtures("cover")


@pytest.fixture(scope="module")
def task():
    """The land cover's task of mere shapes, two views a device."""
    config = with_settings(parse(get_config("landcover")), {"eval.batch_size": 2, "eval.num_images": 1})
    return abstract_task(config, Architecture.of(config.model))


@pytest.fixture
def pictures(tmp_path):
    """A user's own folder with one large image among small ones."""
    (tmp_path / "classes.txt").write_text("soil\nroad\n")
    for i, shape in enumerate([(60, 80), (3000, 4000), (60, 80)]):
        for kind, channels in (("images", (3,)), ("masks", ())):
            (tmp_path / kind / "val").mkdir(parents=True, exist_ok=True)
            zeros = np.zeros((*shape, *channels), np.uint8)
            Image.fromarray(zeros).save(tmp_path / kind / "val" / f"{i}.png")
    return tmp_path


def test_a_device_holds_its_own_views_whatever_others_there_are(task):
    one = device_need(task, tiny.mesh(), 4, 0.0).bytes
    assert device_need(task, tiny.mesh(data=8), 4, 0.0).bytes == one
    assert device_need(task, tiny.mesh(), 4, 1e6).bytes == one + 1e6


def test_what_does_not_fit_is_one_line_with_the_setting_and_a_status_of_its_own(task, caplog, capsys):
    beside, classes = dry_run.placed_bytes(task.abstract, tiny.mesh()), len(GROUPS)
    need = device_need(task, tiny.mesh(), classes, beside).bytes
    with pytest.raises(DoesNotFit) as caught:
        check_evaluation(task, tiny.mesh(), memory=need / 2)
    line = tiny.one_line(caught.value)
    assert re.search(r"a device has \d\.\d GB: lower config.eval.batch_size=2$", line)
    assert tell(caught.value) == OVER_BUDGET and "Traceback" not in capsys.readouterr().err

    # Near to the limit an estimate is no reason to refuse.
    check_evaluation(task, tiny.mesh(), memory=need)
    assert "if it does not fit, lower config.eval.batch_size=2" in caplog.text
    caplog.clear()
    check_evaluation(task, tiny.mesh(), memory=100 * need)
    assert not caplog.records

    # The training's state stays on the device if it is evaluated while it trains.
    with pytest.raises(DoesNotFit):
        check_evaluation(task, tiny.mesh(), while_training=True, memory=need / 1.2)


def test_a_small_network_is_not_traced(task, monkeypatch):
    monkeypatch.setattr(dry_run, "device_need", lambda *a: pytest.fail("traced"))
    check_evaluation(task, tiny.mesh(), memory=64 * GB)


def test_the_largest_image_of_the_split_is_found_by_the_heads_of_the_files(pictures):
    config = parse(get_config("folder", "small"))
    config = with_settings(config, {"data.root": str(pictures), "eval.batch_size": 2})
    examples = eval_examples(config.data, "val")
    assert image_sizes(examples) == [(60, 80), (3000, 4000), (60, 80)]

    # Counts by hand: windows of 128 pixels three quarters of a side apart, 2 planes of 2 classes.
    task = SimpleNamespace(
        config=with_settings(config, {"data.scale_unit": "pixel"}),
        codec=SimpleNamespace(one_by_one=True),
    )
    views = len(range(0, 3000 - 128 + 96, 96)) * len(range(0, 4000 - 128 + 96, 96))
    need = host_need(task, examples, views=2)
    masks = 4 * 128 * 128 * 2 * 2
    assert need.bytes == pytest.approx((views + 1) * masks + 24 * 3000 * 4000)
    assert f"up to 4000x3000 pixels, {views} views each, 2 classes" in need.what

    # Scaled to the training's short side it is a few views.
    scaled = host_need(
        SimpleNamespace(config=config, codec=SimpleNamespace(one_by_one=True)), examples, views=2
    )
    assert "2 views each" in scaled.what


def test_stable_diffusion_is_traced_for_a_large_vocabulary():
    """Close to what is known of it: 3.2 GB for 16 queries of one image (aot/RECORD.md)."""
    config = parse(get_config("cityscapes"))
    mesh = tiny.mesh()
    task = abstract_task(config, Architecture.of(config.model))
    need = device_need(task, mesh, 16, 0.0)
    assert 1.5 * GB < need.bytes < 6 * GB
    assert need.keys.startswith("config.compute.unet_batch=")

    # Of the weights a device holds its share.
    whole, shared = (dry_run.placed_bytes(task.abstract, m) for m in (mesh, tiny.mesh(fsdp=8)))
    assert 0.12 * whole < shared < 0.2 * whole


@pytest.mark.parametrize("suite", [None, "phenobench"])
def test_eval_says_so_before_the_first_image(tmp_path, monkeypatch, suite):
    for name in ("images", "semantics"):
        (tmp_path / "phenobench" / "val" / name).mkdir(parents=True)
    zeros = np.zeros((8, 8), np.uint8)
    Image.fromarray(np.stack([zeros] * 3, -1)).save(tmp_path / "phenobench/val/images/a.png")
    Image.fromarray(zeros.astype(np.uint16)).save(tmp_path / "phenobench/val/semantics/a.png")
    monkeypatch.setattr(dry_run, "least_memory", lambda devices: 1e6)
    settings = {"data.root": str(tmp_path)} if suite else {}
    with pytest.raises(DoesNotFit, match="lower config"):
        jobs.evaluate(tmp_path / "out", suite, model="assets:segmenter", settings=settings)


def test_training_says_so_before_its_first_step(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "Trainer", lambda *a, **k: pytest.fail("begun"))
    monkeypatch.setattr(dry_run, "host_memory", lambda: 1e3)
    assert jax.device_count() > 1
    with pytest.raises(DoesNotFit, match="the host has 0.0 GB: lower config.eval."):
        jobs.train(tiny.config(folders), tmp_path / "run")
