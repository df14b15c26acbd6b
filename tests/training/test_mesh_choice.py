# SPDX-License-Identifier: Apache-2.0
"""`config.mesh.fsdp=0`: what is chosen for which devices, and that nobody else is asked."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from digseg_jax import jobs
from digseg_jax.aot import programs
from digseg_jax.aot.shapes import Architecture
from digseg_jax.config.parse import parse
from digseg_jax.config.schema import Config, MeshConfig
from digseg_jax.prediction.pretrained import load_segmenter
from digseg_jax.recipes import stable_diffusion
from digseg_jax.runtime.hardware import CHIPS
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.training import mesh_choice
from digseg_jax.training.mesh_choice import (
    Needs,
    choose_accumulation,
    choose_mesh,
    count_joined,
    fsdp_for,
)

SD = Needs(state=17.3e9, frozen=0.4e9, temporaries=2.8e9)  # two images a device


def devices(count: int, kind: str, platform: str, group: int, attribute: str) -> list[SimpleNamespace]:
    """Devices by their facts: `group` of them in each slice or host."""
    facts = {"device_kind": kind, "platform": platform, "process_index": 0}
    facts["memory_stats"] = lambda: {}
    return [SimpleNamespace(**facts | {attribute: i // group}) for i in range(count)]


@pytest.fixture(scope="module")
def sd15():
    """The literal configuration of ADE20K and its task, shapes alone."""
    config = parse(stable_diffusion("sd15", "ade20k"))
    task = programs.abstract_task(config, Architecture.of(config.model))
    return config, task


def needs_on(config, task):
    """What the configuration's train step needs, by the parts that its batch is split into."""
    return partial(mesh_choice.needs_of, task, config.optim, config.train.batch_size)


def chosen(config, task, devices):
    """The mesh for the configuration's train step."""
    return choose_mesh(config.mesh, needs_on(config, task), devices)


@pytest.mark.parametrize(
    ("chip", "group", "wanted"),
    [
        ("v5e", 16, 16), ("v5e", 64, 16), ("v5e", 4, 4), ("v6e", 16, 16), ("v5p", 8, 8), ("h100", 8, 8),
        ("v5e", 24, 12), ("v5e", 1, 1),
    ],
)  # fmt: skip
def test_fast_links_share_a_large_state_by_up_to_sixteen(chip, group, wanted):
    assert fsdp_for(SD, CHIPS[chip], group, 0.75 * CHIPS[chip].hbm_bytes) == wanted


def test_more_share_it_where_it_would_not_fit_otherwise():
    huge = dataclasses.replace(SD, state=300e9)
    assert fsdp_for(huge, CHIPS["v5e"], 64, 0.75 * CHIPS["v5e"].hbm_bytes) == 32
    assert fsdp_for(dataclasses.replace(SD, temporaries=1e12), CHIPS["v5e"], 64, 1e10) == 64


def test_without_known_links_only_as_many_as_it_takes():
    assert fsdp_for(SD, None, 8, 75e9) == 1
    assert fsdp_for(SD, None, 8, 15e9) == 2
    assert fsdp_for(SD, None, 8, 1e9) == 8


@pytest.mark.parametrize(("count", "wanted"), [(2, 2), (3, 3), (4, 4), (6, 2), (7, 1), (8, 8), (12, 4)])
def test_a_number_that_divides_no_dimension_shares_nothing(sd15, count, wanted):
    """Of 320, 640 and 1,280 channels six devices would hold nearly as much as one."""
    config, task = sd15
    needs = mesh_choice.needs_of(task, config.optim, config.train.batch_size, count)
    assert fsdp_for(needs, CHIPS["h100"], count, 1e12) == wanted
    even = (needs.state + needs.frozen) / wanted + needs.temporaries
    assert even <= needs.on_a_device(wanted) < 1.3 * even


@pytest.mark.parametrize(
    ("kind", "reported", "memory"),
    [
        ("NVIDIA H100 80GB HBM3", {}, 80e9),
        ("NVIDIA H100 80GB HBM3", {"bytes_limit": 60e9}, 80e9),  # what JAX takes of it
        ("NVIDIA H100 80GB HBM3", {"bytes_limit": 30e9}, 40e9),  # XLA_CLIENT_MEM_FRACTION
        ("NVIDIA GeForce RTX 4090 Laptop GPU", {"bytes_limit": 12e9}, 12e9),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", {"bytes_limit": 7e9}, 7e9),
    ],
)
def test_a_device_may_have_less_than_its_kind(kind, reported, memory):
    there = devices(2, kind, "gpu", 2, "slice_index")
    for device in there:
        device.memory_stats = lambda: reported
    assert mesh_choice._facts(there, None, None)[1] == pytest.approx(memory)
    assert mesh_choice._facts(there, 5e9, None)[1] == 5e9
    assert mesh_choice._facts(there, None, CHIPS["v5e"])[1] == CHIPS["v5e"].hbm_bytes


def test_a_small_state_is_held_whole():
    small = Needs(state=0.9e9, frozen=0.1e9, temporaries=5e9)
    assert fsdp_for(small, CHIPS["v5e"], 16, 1e9) == 1


def test_links_join_a_slice_or_a_host():
    assert count_joined(devices(32, "TPU v5 lite", "tpu", 16, "slice_index")) == 16
    assert count_joined(devices(16, "NVIDIA H100", "gpu", 8, "slice_index")) == 8
    assert count_joined(devices(4, "cpu", "cpu", 2, "process_index")) == 2
    alike = {"platform": "tpu", "process_index": 3}
    assert (
        count_joined([SimpleNamespace(**alike), SimpleNamespace(platform="tpu", process_index=0)]) == 2
    )


@pytest.mark.parametrize(
    ("kind", "platform", "count", "group", "wanted"),
    [
        ("TPU v5 lite", "tpu", 16, 16, 16),
        ("TPU v5 lite", "tpu", 64, 64, 16),
        ("TPU v5 lite", "tpu", 32, 16, 16),  # two slices
        ("TPU v6 lite", "tpu", 16, 16, 16),
        ("NVIDIA H100 80GB HBM3", "gpu", 16, 8, 8),
        ("NVIDIA H100 80GB HBM3", "gpu", 1, 1, 1),
    ],
)
def test_the_users_own_command(sd15, caplog, kind, platform, count, group, wanted):
    caplog.set_level(logging.INFO, "digseg_jax")
    there = devices(count, kind, platform, group, "slice_index")
    assert chosen(*sd15, there) == MeshConfig(data=-1, fsdp=wanted, tensor=1)
    (line,) = [r.getMessage() for r in caplog.records]
    assert f"{wanted} chosen for {count} x {kind[:6]}" in line and "\n" not in line


def test_the_estimate_is_near_what_was_compiled(sd15):
    """4 images a chip, 16 chips of v5e: compiled, Stable Diffusion 2.1 needs 6.5 GB (aot/RECORD.md)."""
    config, task = sd15
    needs = mesh_choice.needs_of(task, config.optim, 64, 16)
    assert 6e9 < needs.on_a_device(16) < 8e9


@pytest.mark.parametrize(
    ("memory", "shape", "wanted", "told"),
    [
        (80e9, (1, 1), 2, "16 of 32 images at a time"),
        (40e9, (1, 1), 8, "4 of 32 images"),
        (24e9, (1, 1), 32, "it may not fit: see --mode=compile"),
        (16e9, (1, 16), 1, ""),
    ],
)
def test_a_batch_is_split_into_the_fewest_parts_that_fit(sd15, caplog, memory, shape, wanted, told):
    caplog.set_level(logging.INFO, "digseg_jax")
    config, task = sd15
    mesh = SimpleNamespace(
        shape={"data": shape[0], "fsdp": shape[1]}, devices=np.array(devices(1, "x", "gpu", 1, "slice"))
    )
    needs = needs_on(config, task)
    assert choose_accumulation(config.train.batch_size, needs, mesh, memory) == wanted
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == bool(told) and told in "".join(lines)


def test_what_is_set_stays(sd15):
    config, task = sd15
    there = devices(16, "TPU v5 lite", "tpu", 16, "slice_index")
    for mesh in (MeshConfig(fsdp=4), MeshConfig(data=2, fsdp=-1)):
        assert chosen(dataclasses.replace(config, mesh=mesh), task, there) == mesh
    asked = dataclasses.replace(config, mesh=MeshConfig(data=4, fsdp=0))
    assert chosen(asked, task, there) == MeshConfig(data=4, fsdp=-1)


def test_simulated_devices_hold_small_models_whole(folders):
    config = tiny.config(folders, mesh__fsdp=0)
    task = programs.abstract_task(config, Architecture.of(config.model))
    mesh = make_mesh(chosen(config, task, jax.devices()))
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}


def test_processes_of_one_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(mesh_choice, "host_memory", lambda: 64e9)
    alone = mesh_choice.least_memory(jax.devices())
    assert alone == 64e9 / jax.device_count()
    monkeypatch.setattr(mesh_choice, "processes_on_this_host", lambda: 4)
    assert mesh_choice.least_memory(jax.devices()) == alone / 4


def test_an_evaluation_by_itself_runs_on_the_mesh_of_its_training(folders, tmp_path, monkeypatch):
    """--mode=eval, a suite and --mode=predict; a small model on devices that must share it."""
    monkeypatch.setattr(mesh_choice, "SMALL", 0)
    monkeypatch.setattr(mesh_choice, "least_memory", lambda devices: 1e3)
    monkeypatch.setattr(mesh_choice, "held_share", lambda trees, fsdp: 1 / fsdp)
    config = tiny.config(folders, mesh__fsdp=0)
    tiny.export(config, tmp_path / "export")
    task = programs.abstract_task(config, Architecture.of(config.model))
    trained = make_mesh(chosen(config, task, jax.devices()))
    assert trained.shape["fsdp"] == len(jax.devices()) > 1

    meshes = []
    monkeypatch.setattr(jobs, "evaluate_and_report", lambda *parts, **_: meshes.append(parts[5]))
    jobs.evaluate(tmp_path, config=config)
    segmenter = load_segmenter(tmp_path / "export", config)
    assert [*meshes, segmenter.mesh] == [trained, trained]


def test_a_mesh_that_nobody_chose_for_is_not_split():
    assert make_mesh(MeshConfig(fsdp=0)).shape["fsdp"] == 1
    assert Config().mesh.fsdp == 1
