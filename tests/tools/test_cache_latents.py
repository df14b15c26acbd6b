# SPDX-License-Identifier: Apache-2.0
"""The cache of latents: training from it is the training it stands for; a kill costs nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pod
import pytest
import tiny
from PIL import Image

from digseg_jax.aot import shapes
from digseg_jax.aot.shapes import Architecture
from digseg_jax.config.parse import parse
from digseg_jax.data import pipeline
from digseg_jax.data.crops import central_window, view
from digseg_jax.data.datasets import registry
from digseg_jax.data.shards import files
from digseg_jax.data.shards.latents import LatentSource, cache_folders
from digseg_jax.data.shards.records import stored_spec
from digseg_jax.data.sources import open_part, training_parts
from digseg_jax.data.stream import _stacked
from digseg_jax.errors import UserError
from digseg_jax.io.metric_writer import read_metrics
from digseg_jax.models.vae import AutoencoderKL
from digseg_jax.tools import cache_latents
from digseg_jax.tools.cache_latents import shown_classes
from digseg_jax.tools.prepare_data import prepare_split
from digseg_jax.training.tasks import latents
from digseg_jax.training.tasks.base import example_keys
from digseg_jax.training.tasks.latents import check_cache
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.weights import save_component

COUNT, SHARD = 7, 3
CLASSES = "0: water\n1: forest\n2: snow, ice\n3: city\n9: ignore\n"
MIRROR_ONLY = {
    "data__scale_min": 1.0, "data__scale_max": 1.0, "data__class_share_cap": 1.0, "data__jitter": 0.0,
}  # fmt: skip


def write_data(root: Path, count: int) -> None:
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text(CLASSES)
    for kind in ("images", "masks"):
        (root / kind / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        size = ((40, 36), (70, 50), (32, 32))[i % 3]
        ids = {3: np.ones((3, 4)), 4: np.full((3, 4), 9)}.get(i, rng.choice([0, 1, 2, 3, 9], (3, 4)))
        mask = Image.fromarray(ids.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        image = rng.integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(image).save(root / "images" / "train" / f"{i:03d}.png")
        mask.save(root / "masks" / "train" / f"{i:03d}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A user's folder: images of several sizes; number 3 shows one class, number 4 none."""
    root = tmp_path_factory.mktemp("data")
    write_data(root, COUNT)
    return root


@pytest.fixture(scope="module")
def nested(data, tmp_path_factory) -> Path:
    """The same with nested classes: forest covers water, snow covers both."""
    root = tmp_path_factory.mktemp("nested")
    facts = registry.spec("folder", data)
    covers = ((), (0, 1), (0, 1, 2), ())
    classes = tuple(
        dataclasses.replace(c, covers=own) for c, own in zip(facts.classes, covers, strict=True)
    )
    source = partial(registry.open_source, "folder", data, "train")
    prepare_split(source, dataclasses.replace(facts, classes=classes), "train", root)
    return root


def configured(folders, root, cache, **changes):
    values = {"train__batch_size": 4, "data__num_queries": 3, "data__name": "folder"}
    values |= {"data__root": str(root), "data__latent_cache": str(cache)} | MIRROR_ONLY
    return tiny.config(folders, **(values | changes))


def run(config):
    """Writes the cache of a configuration."""
    size = config.train.batch_size
    cache_latents.run(config.data, config.model, config.compute, config.loading, size)


def check(config, parts):
    check_cache(parts, config.data, config.model)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_latents, "SHARD_EXAMPLES", SHARD)


@pytest.fixture(scope="module")
def cached(folders, data, tmp_path_factory):
    """The configuration of a finished cache."""
    config = configured(folders, data, tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_latents, "SHARD_EXAMPLES", SHARD)
        run(config)
    return config


def folder_of(config) -> Path:
    (folder,) = cache_folders(config.data.latent_cache, training_parts(config.data))
    return Path(folder)


def files_of(config) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder_of(config).iterdir()}


def both_batches(config):
    """All examples as the cache gives them, and the same crops as images with the same queries."""
    ((part, _, split),) = training_parts(config.data)
    source = open_part(part, split)
    (stream,) = pipeline._parts(config.data, "segmentation", 0)
    ours, theirs = [], []
    for i in range(len(source)):
        example = stream.make_example(i, np.random.default_rng(i)) | {"index": np.uint32(i)}
        size = config.data.image_size
        window = central_window(*source[i]["label"].shape, size)
        image, label = view(source[i]["image"], source[i]["label"], window, size)
        if np.random.default_rng(i).random() < config.data.flip:
            image, label = image[:, ::-1], label[:, ::-1]
        np.testing.assert_array_equal(example["label"], label)
        ours.append(example)
        theirs.append({k: v for k, v in example.items() if "latent" not in k} | {"image": image})
    return [_stacked(rows) for rows in (ours, theirs)]


CASES = {
    "binary": {},
    "auxiliary": {"loss__mask_weight": 0.5, "loss__mask_from": 0.0},
    "nested": {},
    "palette": {
        "model__codec": "palette",
        "loss__mask_weight": 0.5,
        "loss__mask_from": 0.0,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_the_same_crops_through_the_autoencoder(
    case, folders, data, nested, tmp_path
):
    config = configured(folders, nested if case == "nested" else data, tmp_path, **CASES[case])
    run(config)
    task = SegmentationTask(config)
    task.prepare()
    check(config, task)
    described = tiny.shapes_of(config).frozen  # for --mode=compile
    assert jax.tree.map(np.shape, described) == jax.tree.map(np.shape, task.frozen)
    ours, theirs = both_batches(config)
    assert ours["mask_latent"].shape[1] == (1 if case == "palette" else 3)
    assert (theirs["query_class"].ndim == 3) == (case == "nested")
    params, keys = task.initial(), example_keys(0, ours["index"])
    loss = jax.jit(lambda f, b: task.loss(params, f, b, keys)[0])
    # as without a cache: the ends of the auxiliary loss come from the autoencoder too
    plain = {name: task.frozen[name] for name in ("vae", "bank")}
    value, expected = float(loss(task.frozen, ours)), float(loss(plain, theirs))
    print(f"loss {value:.6f}, difference {abs(value - expected):.1e}")
    assert value == pytest.approx(expected, abs=1e-5, rel=1e-5)
    other = task.frozen | {"vae": jax.tree.map(lambda x: 2 * x, task.frozen["vae"])}
    assert float(loss(other, ours)) == value  # the autoencoder does not run
    assert float(loss(plain | {"vae": other["vae"]}, theirs)) != expected


def test_both_orientations_and_every_shown_class_are_there(cached):
    source = LatentSource(cache_folders(cached.data.latent_cache, training_parts(cached.data))[0], {})
    assert len(source) == COUNT and [r["examples"] for r in source.manifest["shards"]] == [3, 3, 1]
    for i in range(COUNT):
        plain, mirrored = source.read(i, False), source.read(i, True)
        np.testing.assert_array_equal(plain.label[:, ::-1], mirrored.label)
        shown = tuple(sorted(set(np.unique(plain.label).tolist()) - {-1}))
        assert plain.classes == mirrored.classes == shown
        assert len(plain.masks) == len(shown)
        assert not np.allclose(plain.image[:, ::-1], mirrored.image, atol=1e-3)
    assert source.read(3, False).classes == (1,) and source.read(4, False).classes == ()


def test_a_class_is_shown_where_what_it_covers_is(nested):
    assert shown_classes(np.asarray([[0, -1]], np.int32), stored_spec(nested)) == (0, 1, 2)
    assert shown_classes(np.asarray([[3, 3]], np.int32), stored_spec(nested)) == (3,)


class Killed(BaseException):
    """What SIGKILL looks like from inside: nothing below it catches it."""


@pytest.mark.parametrize("point", ["record", "move", "sidecar", "manifest"])
def test_a_kill_at_any_point_is_made_up_for(cached, folders, data, tmp_path, monkeypatch, point):
    config = configured(folders, data, tmp_path)
    where, name, at = {
        "record": (latents, "encode_record", 10),  # in the second shard
        "move": (files, "move", 2),
        # writes: the plan, three sidecars, the latent of the absent mask, the manifest
        "sidecar": (files, "write", 3),
        "manifest": (files, "write", 6),
    }[point]
    real, calls = getattr(where, name), []

    def dying(*arguments):
        calls.append(name)
        if len(calls) == at:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, dying)
        with pytest.raises(Killed):
            run(config)
    task = latents.FrozenParts(config.data, config.model, config.compute)
    with pytest.raises(UserError, match="not finished"):
        check(config, task)
    whole = files_of(cached)
    for path, content in files_of(config).items():  # what has its name is whole
        if path.endswith(".array_record"):
            assert content == whole[path]
    run(config)
    assert files_of(config) == whole
    check(config, task)


def test_a_finished_cache_is_left_alone(cached):
    before = {p: p.stat().st_mtime_ns for p in folder_of(cached).iterdir()}
    run(cached)
    assert {p: p.stat().st_mtime_ns for p in folder_of(cached).iterdir()} == before


def changed(config, folders, **changes):
    return configured(folders, config.data.root, config.data.latent_cache, **changes)


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "vae"
    save_component((tiny.VAE, tiny.random_params(AutoencoderKL, tiny.VAE, 7)), folder)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__vae": "other"}, "the autoencoder's weights (config.model.vae): legal is the cache's"),
        ({"data__image_size": 64}, "config.data.image_size: legal is the cache's 32, this run has 64"),
        ({"model__codec": "palette"},
         "config.model.codec: legal is the cache's binary, this run has palette"),
        ({"model__dtype": "bfloat16"},
         "config.model.dtype: legal is the cache's float32, this run has bfloat16"),
    ],
)  # fmt: skip
def test_a_cache_of_something_else_is_neither_read_nor_written(
    cached, folders, other_vae, changes, expected
):
    changes = {k: other_vae if v == "other" else v for k, v in changes.items()}
    config = changed(cached, folders, **changes)
    with pytest.raises(UserError) as caught:
        check(config, latents.FrozenParts(config.data, config.model, config.compute))
    assert expected in tiny.one_line(caught.value)
    before = files_of(cached)
    with pytest.raises(UserError, match="holds shards made with .*another config.data.latent_cache"):
        run(config)
    assert files_of(cached) == before


def test_the_name_of_an_autoencoder_does_not_matter_its_weights_do(cached, folders, tmp_path):
    again = tmp_path / "elsewhere"
    save_component((tiny.VAE, tiny.random_params(AutoencoderKL, tiny.VAE, 1)), again)
    config = changed(cached, folders, model__vae=str(again))
    check(config, latents.FrozenParts(config.data, config.model, config.compute))


def test_another_class_list_is_refused_at_the_start(cached, folders, data, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).symlink_to(data / kind)
    (tmp_path / "classes.txt").write_text(CLASSES.replace("city", "town"))
    config = configured(folders, tmp_path, cached.data.latent_cache)
    with pytest.raises(UserError, match="the class list: legal is the cache's"):
        pipeline._parts(config.data, "segmentation", 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"data__jitter": 0.5}, "config.data.jitter=0.5: cached latents are augmented by mirroring "
         "alone; with config.data.latent_cache legal is jitter=0.0"),
        ({"data__scale_min": 0.5, "data__class_share_cap": 0.75},
         "legal is scale_min=1.0, class_share_cap=1.0"),
        ({"data__scale_unit": "pixel"}, "legal is scale_unit=short_side"),
        ({"task": "prior"}, "config.task='prior' does not use it, only segmentation"),
    ],
)  # fmt: skip
def test_what_a_cache_cannot_give_is_told(folders, values, expected):
    with pytest.raises(UserError) as caught:
        configured(folders, "/a", "/b", **values)
    assert expected in tiny.one_line(caught.value)


def test_the_command_needs_a_place(folders, data):
    with pytest.raises(UserError, match="--mode=cache_latents needs --config.data.latent_cache=DIR"):
        run(tiny.config(folders, data__name="folder", data__root=str(data)))


@pytest.fixture
def broken(data, tmp_path):
    """The same data, number 2 cut short."""
    for kind in ("images", "masks"):
        (tmp_path / "broken" / kind / "train").mkdir(parents=True)
        for path in (data / kind / "train").iterdir():
            whole = path.read_bytes()
            cut = whole[:60] if path.name == "002.png" and kind == "images" else whole
            (tmp_path / "broken" / kind / "train" / path.name).write_bytes(cut)
    (tmp_path / "broken" / "classes.txt").write_text(CLASSES)
    return tmp_path / "broken"


def test_a_broken_example_stops_the_job_or_is_left_out_and_named(folders, broken, tmp_path):
    with pytest.raises(UserError, match="002.png"):
        run(configured(folders, broken, tmp_path / "a"))
    config = configured(folders, broken, tmp_path / "b", loading__on_error="skip")
    run(config)
    manifest = json.loads((folder_of(config) / "latents.json").read_text())
    assert manifest["examples"] == COUNT - 1
    assert [r["examples"] for r in manifest["shards"]] == [2, 3, 1]
    assert len(manifest["broken"]) == 1 and "002.png" in manifest["broken"][0]
    assert len(pipeline._parts(config.data, "segmentation", 0)[0].source) == COUNT - 1


def test_a_run_trains_from_the_cache_without_the_images(cached, folders, tmp_path):
    """The last step's batch is what --mode=compile takes it for; the record names the examples."""
    root = tmp_path / "only_classes"
    (root / "images" / "train").mkdir(parents=True)
    (root / "classes.txt").write_text(CLASSES)
    config = configured(
        folders, root, cached.data.latent_cache, train__steps=2, logging__examples=True,
    )  # fmt: skip
    task = SegmentationTask(config)
    trainer = tiny.trainer(config, task, tiny.mesh(), tmp_path / "run")
    trainer.run()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2] and all(np.isfinite(r["loss"]) for r in rows)
    assert pod.examples(tmp_path / "run").keys() == {1, 2}
    parts = Architecture.of(config.model)
    with trainer.batches(0) as stream:
        batch = next(stream)
    described = shapes.train_batch(config.data, task.codec, parts, 4)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in described.items()
    }


@pytest.fixture
def copied(cached, folders, data, tmp_path):
    """The same configuration, with a copy of the data that is as old, so that it may be changed."""
    shutil.copytree(data, tmp_path / "data")
    return configured(folders, tmp_path / "data", cached.data.latent_cache)


def test_data_that_changed_since_the_cache_was_made_are_told_at_the_start(copied, tmp_path):
    """The caught mistake: a corrected mask would have been trained with its old latent."""
    task = SegmentationTask(copied)
    check(copied, task)  # a copy is no change, even with the times of today
    mask = tmp_path / "data" / "masks" / "train" / "000.png"
    cache = folder_of(copied)
    made = (cache / "latents.json").stat().st_mtime
    os.utime(mask, (made - 100, made - 100))
    check(copied, task)
    os.utime(mask, (made + 100, made + 100))
    with pytest.raises(UserError) as caught:
        check(copied, task)
    message = tiny.one_line(caught.value)
    assert str(cache) in message
    assert f"1 of its files are newer than what was made from them, such as {mask}" in message
    assert f"touch {cache / 'latents.json'}" in message
    mask.unlink()
    (tmp_path / "data" / "images" / "train" / "000.png").unlink()
    with pytest.raises(UserError, match="the names or sizes of its files are others now"):
        check(copied, task)


def test_old_shards_beside_corrected_masks_are_told_with_a_cache_too(copied, folders, tmp_path):
    """The cache would be made of the shards, and agree with them: old labels without a word."""
    root = tmp_path / "data"
    opened = partial(registry.open_source, "folder", root, "train")
    prepare_split(opened, registry.spec("folder", root), "train", root)
    manifest, mask = root / "train" / "manifest.json", root / "masks" / "train" / "000.png"
    later = manifest.stat().st_mtime + 60
    os.utime(mask, (later, later))
    with pytest.raises(UserError, match="the shards in .* are read instead of its files"):
        check(copied, SegmentationTask(copied))
    with pytest.raises(UserError, match="the shards in .* are read instead of its files"):
        run(configured(folders, root, tmp_path / "new"))


def test_a_run_with_another_autoencoder_does_not_start(cached, folders, other_vae, tmp_path):
    config = changed(cached, folders, model__vae=other_vae)
    with pytest.raises(UserError, match="the autoencoder's weights"):
        tiny.trainer(config, SegmentationTask(config), tiny.mesh(), tmp_path)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(folders, tmp_path):
    """Through the command; the last bits are those of other batch sizes."""
    data, count = tmp_path / "data", 300  # two shards
    write_data(data, count)
    sources = []
    for processes in (1, 2):
        values = {"data__name": "folder", "data__root": str(data), "train__batch_size": 4}
        values |= MIRROR_ONLY | {"data__latent_cache": str(tmp_path / str(processes))}
        file = tiny.config_file(tmp_path, folders, **values)
        flags = [f"--config={file}", "--mode=cache_latents"]
        pod.Pod(tmp_path / f"log{processes}", flags, processes).check()
        config = parse(tiny.values(folders, **values))
        folder = cache_folders(config.data.latent_cache, training_parts(config.data))[0]
        sources.append(LatentSource(folder, {}))
    one, two = sources
    assert len(one) == len(two) == count and len(one.manifest["shards"]) == 2
    assert one.manifest["statistics"] == two.manifest["statistics"]
    for i in range(0, count, 10):
        for a, b in zip(one.read(i, True), two.read(i, True), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
