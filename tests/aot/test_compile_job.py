# SPDX-License-Identifier: Apache-2.0
"""--mode=compile: the real programs from shapes alone, for simulated devices; budget and advice."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
import tiny
from absl.testing import flagsaver

from digseg_jax import main, trees
from digseg_jax.aot import advice, cuda, programs, shapes, topology
from digseg_jax.aot import job as compiling
from digseg_jax.aot.advice import Needs, advise
from digseg_jax.aot.shapes import Architecture
from digseg_jax.aot.table import as_text, size
from digseg_jax.aot.topology import Topology
from digseg_jax.config.parse import with_settings
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import CompileConfig
from digseg_jax.data.datasets import registry
from digseg_jax.data.pipeline import training_stream
from digseg_jax.errors import OVER_BUDGET, UserError
from digseg_jax.io.storage import as_path
from digseg_jax.prediction import programs as prediction
from digseg_jax.prediction.request import Request
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.runtime import gpu, tpu
from digseg_jax.runtime.hardware import CHIPS
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.tools import performance_page
from digseg_jax.training.flops import step_flops
from digseg_jax.training.tasks.segmentation import SegmentationTask

FEW_MODES = ("none", "block")  # of rematerialization, for the advice: each of them is traced twice
KEYS = {
    "topology", "chips", "fits", "hbm_args_bytes", "hbm_temp_bytes", "hbm_peak_bytes", "flops",
    "bytes_accessed", "collective_bytes", "compile_seconds",
}  # fmt: skip


def config(folders, **changes):
    changes = {"mesh__data": 2, "mesh__fsdp": 4, "train__batch_size": 8} | changes
    return tiny.config(folders, **changes)


@pytest.fixture(scope="module")
def compiled(folders, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compile")
    return compiling.run(config(folders), "cpu:8", as_path(workdir)), workdir


def test_the_file_has_what_others_read(compiled):
    result, workdir = compiled
    stored = json.loads((workdir / "compile.json").read_text())
    assert stored.keys() >= KEYS and stored["chips"] == 8 and stored["fits"] is True
    assert stored["hbm_peak_bytes"] >= stored["hbm_args_bytes"] + stored["hbm_temp_bytes"] > 0
    assert stored["flops"] > 0 and stored["bytes_accessed"] > 0
    assert stored["collective_bytes"] == sum(c["bytes"] for c in stored["collectives"].values()) > 0
    text = (workdir / "compile.txt").read_text()
    assert "memory a chip" in text and "all-" in text
    assert stored["tuned"] and "without a search" not in text  # which is the TPU compiler's
    assert "without a search for fast convolutions" in as_text(stored | {"tuned": False})


def test_the_time_that_a_chip_waits_for_others_is_told_beside_the_roofline(compiled):
    chip = CHIPS["v5e"]
    target = Topology("v5e:2x4", [], chip, chip.hbm_bytes)
    parts = {"bytes": 3e9, "overlapped_bytes": 2e9}
    result = compiled[0] | {
        "collective_bytes": 3e9,
        "collectives": {"all-gather": {"count": 7, **parts}},
    }
    found = compiling.roofline(result, target)
    assert found["roofline_seconds"]["collectives"] == 3e9 / chip.ici_bandwidth
    assert found["exposed_collective_seconds"] == 1e9 / chip.ici_bandwidth
    text = as_text(result | found)
    assert "3.00 GB, 2.00 GB of it while the chip computes" in text
    assert "waits for the rest, 5 ms at least" in text


def test_effort_is_an_option_that_this_compiler_takes():
    device = jax.devices("cpu")[0]
    assert compiling.effort_options(0.0, device) == {}
    low, high = (compiling.effort_options(value, device) for value in (-0.5, 0.5))
    assert low != high
    for options in (low, high):
        assert tpu.refusal(options, device) is None
        assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_without_an_exact_effort_its_level_is_taken(monkeypatch):
    def refusal(options, device):
        return "No such compile option" if "exec_time_optimization_effort" in options else None

    monkeypatch.setattr(tpu, "refusal", refusal)
    assert compiling.effort_options(-1.0, jax.devices()[0]) == {"optimization_level": "O1"}
    assert compiling.effort_options(0.1, jax.devices()[0]) == {"optimization_level": "O3"}


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_compiled(
    folders, tmp_path, monkeypatch
):
    monkeypatch.delattr(compiling, "open_topology")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        compiling.run(config(folders), "cpu:8", as_path(tmp_path / "file" / "out"))


def test_nothing_is_needed_but_shapes(folders):
    """The task without values has the shapes of the real one, and the same step."""
    made = config(folders)
    real = SegmentationTask(made)
    task = SegmentationTask(made, tiny.shapes_of(made))
    described = jax.eval_shape(lambda: (real.frozen, task.abstract))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (task.frozen, real.abstract)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), described
    )
    batch = shapes.train_batch(made.data, task.codec, Architecture.of(made.model), 8)
    for name, value in tiny.batch().items():
        assert (batch[name].shape, batch[name].dtype) == (value.shape, value.dtype), name


@pytest.mark.parametrize("mixture", [(), ({"name": "landcover"}, {"name": "landcover_igbp"})])
def test_the_described_batch_is_that_of_the_stream(folders, mixture):
    made = config(folders, data__mixture=mixture)
    place = {"start": 0, "host": 0, "hosts": 1, "loading": made.loading}
    with training_stream(made.data, made.task, seed=0, batch_size=8, **place) as stream:
        got = {name: (value.shape, value.dtype) for name, value in next(iter(stream)).items()}
    codec = SegmentationTask(made, tiny.shapes_of(made)).codec
    described = shapes.train_batch(made.data, codec, Architecture.of(made.model), 8)
    assert got == {name: (value.shape, value.dtype) for name, value in described.items()}


def test_the_evaluation_is_its_own_program_with_its_own_file(folders, tmp_path):
    changes = {"compile__program": "eval", "compile__eval_queries": 3, "eval__batch_size": 1}
    made = config(folders, **changes)
    result = compiling.run(made, "cpu:8", as_path(tmp_path))
    # three queries share a call of four places
    assert (result["program"], result["images"], result["queries"]) == ("eval", 8, 32)
    assert result["calls"] == {"sample": 1, "read": 1}
    assert result["flops"] > result["programs"]["sample"]["flops"] > 0
    # the weights, which the decoding does not take, stay on the devices meanwhile
    unet = programs.abstract_task(made, Architecture.of(made.model))
    weights = {name: p["hbm_waiting_bytes"] for name, p in result["programs"].items()}
    assert weights == {"sample": 0, "read": 4 * programs.count(unet.abstract)}
    assert (tmp_path / "compile_eval.json").exists() and not (tmp_path / "compile.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"decoder": "vae", "calibrate": False}, marks=pytest.mark.slow),
        {"decode_limit": 2},
    ],
)
def test_it_compiles_the_programs_that_an_evaluation_runs(folders, monkeypatch, changes):
    """The same functions, their arguments of the same shapes."""
    seen: list[str] = []
    trace = prediction.trace

    def note(program, shared, batch, mesh):
        arguments = jax.tree.map(lambda x: (tuple(np.shape(x)), str(x.dtype)), (shared, batch))
        seen.append(repr((program.func.__name__, program.keywords, arguments)))
        return trace(program, shared, batch, mesh)

    monkeypatch.setattr(prediction, "trace", note)
    settings = {f"eval__{key}": value for key, value in changes.items()}
    made = config(folders, eval__batch_size=1, **settings)
    names = registry.spec(made.data.name).names
    task = tiny.load_task(made, prompts=names)
    segmenter = Segmenter(task, task.initial(), mesh=make_mesh(made.mesh))
    bias = (0.5,) * len(names) if made.eval.calibrate else None
    pixels = np.zeros((20, 30, 3), np.uint8)
    estep = EStep(made.eval.ensemble, made.eval.steps)
    segmenter.segment([Request(pixels, 0, names, bias)], estep)
    ran, seen[:] = sorted(seen), []

    mere = programs.abstract_task(made, Architecture.of(made.model))
    programs.trace_evaluation(mere, Architecture.of(made.model), make_mesh(made.mesh), 1)
    assert sorted(seen) == ran and len(ran) == 2


@pytest.fixture(scope="module")
def estimated(folders, tmp_path_factory):
    """The same for two GPUs, with what `auto` chooses there."""
    workdir = tmp_path_factory.mktemp("h100")
    changes = {"compute__attention": "auto", "model__dtype": "bfloat16", "train__batch_size": 2}
    made = config(folders, mesh__data=1, mesh__fsdp=2, **changes)
    return compiling.run(made, "h100:2", as_path(workdir)), workdir


def test_of_a_gpu_it_is_an_estimate_with_the_same_keys(compiled, estimated):
    result, workdir = estimated
    stored = json.loads((workdir / "compile.json").read_text())
    assert stored.keys() >= compiled[0].keys() | {"estimate", "estimated_by", "chip_source"}
    assert stored["estimate"] is True and "CPU" in stored["estimated_by"]
    assert "estimate" not in compiled[0]
    assert stored["device_kind"] == "NVIDIA H100" and stored["chips"] == 2
    assert stored["config"]["compute"]["attention"] == "cudnn"  # what runs there, not what stood in
    assert "memory" not in stored["roofline_seconds"]
    parts = ("hbm_args_bytes", "hbm_temp_bytes", "hbm_result_bytes", "hbm_waiting_bytes")
    assert stored["hbm_peak_bytes"] == sum(stored[part] for part in parts)
    assert stored["hbm_limit_bytes"] == 0.9 * CHIPS["h100"].hbm_bytes and stored["fits"]
    assert 0 < stored["mfu_bound"] <= 1
    assert "an estimate: lowered for CUDA" in (workdir / "compile.txt").read_text()
    assert "(estimate)" in performance_page.page(performance_page.read([workdir]))


def test_the_evaluation_of_a_gpu_is_estimated_too(folders, tmp_path):
    changes = {"compute__attention": "auto", "model__dtype": "bfloat16", "mesh__fsdp": 1}
    made = config(folders, mesh__data=1, compile__program="eval", compile__eval_queries=3, **changes)
    result = compiling.run(made, "rtx3090:1", as_path(tmp_path))
    assert result["estimate"] and result["fits"] and result["programs"].keys() == {"sample", "read"}
    assert all(p["hbm_temp_bytes"] > 0 for p in result["programs"].values())


def test_the_unet_alone_on_a_gpu_that_lacks_memory_ends_the_command_with_its_own_status(
    compiled, folders, tmp_path, monkeypatch
):
    ended = []
    monkeypatch.setattr(main, "_leave", ended.append)
    monkeypatch.setattr(topology, "prepare", lambda _: None)  # the simulated devices are there
    monkeypatch.setattr(gpu, "memory_share", lambda: 1e-5)
    monkeypatch.setattr(advice, "MODES", FEW_MODES)
    changes = {"compute__attention": "auto", "model__dtype": "bfloat16"}
    changes |= {"compile__unet_only": True, "compile__per_device_batch": 1}
    file = tiny.config_file(tmp_path, folders, mesh__data=1, mesh__fsdp=1, **changes)
    flags = ["--mode=compile", "--topology=a100-40gb:1", f"--config={file}", f"--workdir={tmp_path}"]
    with flagsaver.flagsaver():
        main.parse_flags(["main", *flags])
        main.run()
    result = json.loads((tmp_path / "compile.json").read_text())
    assert ended == [OVER_BUDGET] == [3] and result["fits"] is False
    assert result["hbm_limit_bytes"] == pytest.approx(400_000)
    assert result["compiler_options"].keys() == {"on", "left_out", "xla_flags"}
    assert any(line.startswith("rematerialization") for line in result["advice"])
    assert result["config"]["compute"]["attention"] == "cudnn"

    # The whole step computes more, for the same parameters.
    assert result["program"] == "unet" and result["images_per_chip"] == 1
    assert result["parameter_bytes"] == compiled[0]["parameter_bytes"]
    assert result["flops"] < compiled[0]["flops"]


@pytest.mark.parametrize("task", ["autoencoder", "prior"])
def test_other_tasks_than_a_segmenters_are_refused(folders, tmp_path, task):
    made = dataclasses.replace(config(folders), task=task)
    with pytest.raises(UserError, match=f"for segmenters only, config.task is '{task}'"):
        compiling.run(made, "cpu:8", tmp_path)


def test_a_gpus_program_is_really_lowered_for_it(folders, monkeypatch):
    """What JAX refuses for CUDA must not be told to fit."""
    seen = []
    monkeypatch.setattr(programs, "lower", lambda *a: seen.append(a[3:]) or ["program"])
    made = config(folders, compute__attention="cudnn", model__dtype="bfloat16")
    parts = Architecture.of(made.model)
    task = programs.abstract_task(made, parts)
    assert cuda.stand_in(task, parts, make_mesh(made.mesh)) == ["program"]
    assert seen == [("cuda",), ()]


def test_a_gpu_before_ampere_gets_what_it_can_compute(folders):
    meant = topology.open_topology("t4:1").meant
    made = config(folders, compute__attention="auto", model__dtype="bfloat16")
    assert tiny.for_devices(made, meant).compute.attention == "chunked"


def test_the_share_of_a_gpus_memory_is_the_users_choice(monkeypatch):
    for key in gpu.KEYS:
        monkeypatch.delenv(key, raising=False)
    assert topology.open_topology("rtx3090:1").hbm_bytes == 0.9 * 24e9
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    gpu.tune()
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ  # JAX refuses both together
    assert topology.open_topology("h200:8").hbm_bytes == 0.5 * 141e9


@pytest.mark.parametrize("gigabytes", [16, 24, 40, 80, 141])
def test_there_is_a_gpu_of_every_size(gigabytes):
    chips = [CHIPS[name] for name in topology.GPUS]
    assert any(chip.hbm_bytes == gigabytes * 1e9 and chip.source for chip in chips)


def test_rematerialization_is_no_part_of_the_models_flops(folders):
    parts = Architecture.of(config(folders).model)
    modes = ("none", "block")
    tasks = [programs.abstract_task(config(folders, compute__remat=mode), parts) for mode in modes]
    counted = [step_flops(task, programs.train_batch(task, parts, 8)) for task in tasks]
    assert counted[0] == counted[1] > 0


def test_what_the_backward_pass_keeps_shrinks_with_rematerialization(folders):
    parts = Architecture.of(config(folders).model)
    kept = {}
    for mode in ("none", "block"):
        made = config(folders, compute__remat=mode)
        kept[mode] = programs.kept_bytes(programs.abstract_task(made, parts), parts)
    assert 0 < kept["block"] < kept["none"]


def test_over_the_budget_the_advice_is_computed(folders, monkeypatch):
    monkeypatch.setattr(advice, "MODES", FEW_MODES)
    made = config(folders, mesh__data=8, mesh__fsdp=1)
    parts, mesh = Architecture.of(made.model), make_mesh(made.mesh)
    needs = Needs(arguments=3e6, temporaries=8e6, images=8, budget=6e6)
    task = programs.abstract_task(made, parts)
    batch, *others = advise(task, parts, mesh, needs)
    assert "per_device_batch=3 " in batch  # 3 MB of arguments and a MB an image leave room for three
    assert any(line.startswith("fsdp: ") for line in others)
    assert any("config.compute.remat=block keeps" in line for line in others)
    roomy = dataclasses.replace(needs, budget=1e12)
    untraced = programs.abstract_task(with_settings(made, {"compile.advice": False}), parts)
    assert not any(line.startswith("batch") for line in advise(untraced, parts, mesh, roomy))


def test_of_several_programs_the_one_that_needs_most_is_told_whether_it_fits_or_not():
    fitting = {"fits": True, "hbm_peak_bytes": 2e9, "compile_seconds": 1.0}
    too_large = {
        "fits": False,
        "hbm_peak_bytes": 2e10,
        "hbm_limit_bytes": 1.6e10,
        "compile_seconds": 1.0,
    }
    for measured in ([fitting, too_large], [too_large, fitting]):
        result = compiling.combined(measured, [1, 1])
        assert (result["fits"], result["hbm_peak_bytes"]) == (False, 2e10)


def test_over_the_budget_of_the_compiler():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.\n\nTotal hbm usage >= 20.75G:\n"
        "    reserved        258.00M\n    program          17.85G\n    arguments         2.65G\n"
    )
    found = compiling.over_budget(message)
    assert found["fits"] is False and found["hbm_peak_bytes"] == 20.5 * 2**30
    assert found["hbm_args_bytes"] == 2.65 * 2**30 and found["hbm_limit_bytes"] == 15.75 * 2**30
    other = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(23.60G) exceeds available HBM (15.75G)."
    )
    found = compiling.over_budget(other)
    assert found["fits"] is False and found["hbm_temp_bytes"] == 23.6 * 2**30
    with pytest.raises(UserError, match="rejects the program: INTERNAL"):
        compiling.over_budget("INTERNAL: something else")


@pytest.mark.parametrize(
    "text",
    ["v5e", "v9x:4x4", "cpu:2x2", "v5e:0x4", "tpu:8", "v5e:4x4x4x4", "", "h100", "h100:2x2", "b7:1"],
)
def test_a_wrong_topology_is_told_with_the_legal_ones(text):
    with pytest.raises(UserError, match="legal are cpu:N, a TPU slice such as v5e:4x4.* h100:1"):
        topology.prepare(text)
    with pytest.raises(UserError, match="at most 4096 simulated devices"):
        topology.prepare("cpu:1000000")


def test_without_the_tpu_compiler_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the TPU compiler.*pip install"):
        topology.prepare("v5e:4x4")


def test_a_batch_that_does_not_divide_becomes_the_next_that_does(folders, caplog):
    mesh = make_mesh(config(folders).mesh)
    assert programs.train_images(12, 0, 1, mesh) == 16
    assert "config.train.batch_size=12 is no multiple of 8 devices: compiling for 16" in caplog.text
    with pytest.raises(UserError, match="makes a batch=16: must be a multiple of 24.*nearest: 24"):
        programs.train_images(12, 2, 3, mesh)


def test_known_repositories_need_no_network():
    parts = Architecture.of(dataclasses.replace(tiny_model(), unet="sd-2.1:unet", vae="sd-2.1:vae",
                                         text="sd-2.1:text_encoder"))  # fmt: skip
    assert parts.unet.cross_attention_dim == parts.text_width == 1024
    assert parts.unet.heads == (5, 10, 20, 20) and parts.vae.factor == 8
    parts = Architecture.of(dataclasses.replace(tiny_model(), unet="sd-1.5:unet", vae="sd-1.5:vae",
                                         text="clip-b16"))  # fmt: skip
    assert parts.unet.cross_attention_dim == 768 and parts.text_width == 512
    made = SegmentationTask(sd_config(), tiny.shapes_of(sd_config(), parts, prompts=1))
    assert programs.count(made.abstract) > 859_520_964  # conv_in is wider, adapters come on top
    assert trees.flatten(made.frozen)["bank.tokens"].shape[0] == 1


def tiny_model():
    from digseg_jax.config.schema import ModelConfig

    return ModelConfig()


def sd_config():
    from digseg_jax.config.schema import Config

    return dataclasses.replace(Config(), compile=CompileConfig(unet_only=True))


def test_the_page_has_a_row_for_each_compilation(compiled, tmp_path, capsys):
    _, workdir = compiled
    out = tmp_path / "performance.html"
    assert performance_page.main([str(workdir), f"--out={out}"]) == 0
    text = out.read_text()
    assert "cpu:8" in text and text.count("<tr") == 2 and "data 2 x fsdp 4" in text
    assert performance_page.main([str(tmp_path)]) == 2
    assert "no compile.json or compile_eval.json here" in capsys.readouterr().err
    (tmp_path / "compile.json").write_text("[]")
    assert performance_page.main([str(tmp_path)]) == 2
    assert "not made by --mode=compile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (171e9, "171 GB"), (2.654e9, "2.65 GB"), (12.3e6, "12.3 MB")]
)
def test_sizes_have_three_digits(count, text):
    assert size(count) == text
