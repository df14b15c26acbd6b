# SPDX-License-Identifier: Apache-2.0
"""Cached latents on disk: what is written is read, in any order and number of readers, or refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
from etils import epath
from made_latents import (
    ABSENT,
    COUNT,
    LATENT,
    SHARD,
    SIZE,
    SPEC,
    batches,
    config,
    label_of,
    record,
    value_of,
    write_cache,
)
from same import assert_same

from digseg_jax.config.schema import LoadingConfig, PartConfig
from digseg_jax.data.shards import files
from digseg_jax.data.shards import latents as latent_records
from digseg_jax.data.shards.latents import (
    LatentSource,
    cache_folders,
    decode_record,
    encode_record,
    read_manifest,
)
from digseg_jax.data.sources import training_parts
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    write_cache(root)
    return root


@pytest.fixture(scope="module")
def whole(root):
    return batches(config(root), 8)


@pytest.mark.parametrize("top", [0, 254, 255, 847])
def test_a_record_gives_back_what_went_in(top):
    rng = np.random.default_rng(top)
    label = rng.choice([-1, 0, top], (SIZE, SIZE)).astype(np.int32)
    latents = rng.normal(size=(3, *LATENT)).astype(np.float32)
    got = decode_record(encode_record("näme", label, (0, top), latents), str)
    np.testing.assert_array_equal(got.label, label)
    assert got.label.dtype == np.int32 and got.classes == (0, top)
    np.testing.assert_array_equal(np.concatenate([got.image[None], got.masks]), latents)


def test_a_foreign_record_is_an_error():
    whole = record(0, False)
    for data in (b"", b"\x00", b"\xff\xff\xff\xff", b"\x02\x00\x00\x00{}", b"\x02\x00\x00\x0012",
                 whole[:-1], whole[:40]):  # fmt: skip
        with pytest.raises(UnreadableError, match="here, record 3"):
            decode_record(data, lambda: "here, record 3")


def test_shapes_and_types(whole):
    assert {k: (v.shape, v.dtype) for k, v in whole[0].items()} == {
        "image_latent": ((4, *LATENT), np.float32),
        "mask_latent": ((4, 4, *LATENT), np.float32),
        "label": ((4, SIZE, SIZE), np.int32),
        "query": ((4, 4), np.int32),
        "query_class": ((4, 4), np.int32),
        "query_kind": ((4, 4), np.int32),
        "index": ((4,), np.uint32),
    }


def examples(batches):
    for batch in batches:
        for i in range(len(batch["label"])):
            yield {key: value[i] for key, value in batch.items()}


def test_every_latent_is_of_its_example_orientation_and_query(whole):
    seen = set()
    for example in examples(whole):
        value = example["image_latent"].flat[0]
        i, mirrored = int(value // 1000), bool(value % 1000)
        seen.add((i, mirrored))
        label = label_of(i)[:, ::-1] if mirrored else label_of(i)
        np.testing.assert_array_equal(example["label"], label)
        assert (example["image_latent"] == value_of(i, mirrored, None)).all()
        for c, latent in zip(example["query_class"], example["mask_latent"], strict=True):
            expected = value_of(i, mirrored, c) if (label == c).any() else ABSENT
            assert (latent == expected).all()
    assert {i for i, _ in seen} == set(range(COUNT)) and {m for _, m in seen} == {False, True}


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_rate_of_mirrored_crops_is_that_of_the_configuration(root, flip):
    got = examples(batches(config(root, flip=flip), 4))
    assert {bool(e["image_latent"].flat[0] % 1000) for e in got} == {bool(flip)}


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_give_the_same_bits(root, whole, workers):
    assert_same(batches(config(root), 6, loading=LoadingConfig(workers=workers)), whole[:6])


@pytest.mark.parametrize("start", [1, 5])
def test_a_restart_at_any_step_goes_on(root, whole, start):
    assert_same(batches(config(root), 8 - start, start=start), whole[start:])


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_shares_the_same_global_batches(root, whole, hosts):
    parts = [batches(config(root), 4, host=h, hosts=hosts) for h in range(hosts)]
    for step in range(4):
        together = {k: np.concatenate([p[step][k] for p in parts]) for k in whole[0]}
        order = np.argsort(together["index"])
        for key, value in whole[step].items():
            np.testing.assert_array_equal(together[key][order], value, err_msg=key)


def test_a_mixture_has_a_folder_for_each_part(tmp_path):
    names = ("camvid", "camvid", "tfds:things", "camvid")
    parts = [(PartConfig(n), SPEC, "val" if k == 3 else "train") for k, n in enumerate(names)]
    got = [str(f.relative_to(tmp_path)) for f in cache_folders(str(tmp_path), parts)]
    assert got == ["camvid/train", "camvid-2/train", "tfds_things/train", "camvid/val"]
    assert cache_folders("gs://b/c", parts)[0] == epath.Path("gs://b/c/camvid/train")


def test_two_parts_are_trained_from_their_two_caches(root, tmp_path):
    parts = (PartConfig("camvid"), PartConfig("camvid", split="val"))
    mixed = config(root, mixture=parts)
    with pytest.raises(UserError, match="camvid/val: no cached latents here"):
        batches(mixed, 1)
    for split in ("train", "val"):
        shutil.copytree(root / "camvid" / "train", tmp_path / "camvid" / split)
    got = list(examples(batches(dataclasses.replace(mixed, latent_cache=str(tmp_path)), 4)))
    assert {int(e["part"]) for e in got} == {0, 1}

    # Each data set asks in the rows of its own vocabulary.
    words = sum(1 + len(c.synonyms) for c in SPEC.classes)
    assert all((e["query"] // words == e["part"]).all() for e in got)


class TestRefused:
    """One line that says what is wrong, at the start."""

    @pytest.fixture
    def folder(self, tmp_path):
        return write_cache(tmp_path)

    def refusal(self, folder, **changes):
        with pytest.raises(UserError) as caught:
            batches(config(folder.parent.parent, **changes), 1)
        return tiny.one_line(caught.value)

    def test_a_missing_or_shortened_shard(self, folder):
        shard = sorted(folder.glob("*.array_record"))[1]
        data = shard.read_bytes()
        shard.write_bytes(data[:-7])
        assert f"{shard}: has {len(data) - 7} bytes" in self.refusal(folder)
        shard.unlink()
        assert f"{shard}: is missing; the manifest says {len(data)} bytes" in self.refusal(folder)

    def test_one_that_is_not_finished_or_not_there(self, folder):
        (folder / latent_records.MANIFEST).unlink()
        shards = -(-COUNT // SHARD)
        (folder / files.sidecar(1, shards)).unlink()
        message = self.refusal(folder)
        assert "not finished, 1 of 3 shards are missing; --mode=cache_latents continues it" in message
        (folder / files.PLAN).unlink()
        assert "no cached latents here; --mode=cache_latents makes them" in self.refusal(folder)

    def test_another_size(self, folder):
        message = self.refusal(folder, image_size=64)
        assert "config.data.image_size: legal is the cache's 32, this run has 64" in message

    def test_another_class_list(self, tmp_path):
        folder = write_cache(tmp_path, class_hash="0" * 16)
        assert f"the class list: legal is the cache's {'0' * 16}" in self.refusal(folder)

    def test_another_format_or_no_json(self, folder):
        path = folder / latent_records.MANIFEST
        whole = json.loads(path.read_text())
        path.write_text(json.dumps(whole | {"format": 99}))
        assert "format 99; this version reads 1" in self.refusal(folder)
        for text in ("{", "[]", "{}"):
            path.write_text(text)
            assert "not the manifest of cached latents" in self.refusal(folder)

    def test_a_latent_of_the_absent_mask_that_is_damaged_or_gone(self, folder):
        path = folder / latent_records.ABSENT
        path.write_bytes(path.read_bytes()[:-1] + b"\x07")
        assert "not the file that latents.json names" in self.refusal(folder)
        path.unlink()
        assert f"{path}: cannot be read" in self.refusal(folder)

    def test_a_damaged_record_is_named_when_it_is_read(self, folder):
        shard = sorted(folder.glob("*.array_record"))[0]
        data = bytearray(shard.read_bytes())
        data[bytes(data).index(b"IDAT") + 30] ^= 4
        shard.write_bytes(bytes(data))
        source = LatentSource(folder, {})
        with pytest.raises(UnreadableError, match=f"{shard.name}, record 0"):
            source.read(0, False)
        assert source.read(1, True).classes == (1, 2)

    def test_a_place_of_another_kind(self, root):
        with pytest.raises(UserError, match="legal are a folder on a disk and gs://"):
            batches(config("s3://bucket/cache"), 1)


def test_the_statistics_are_of_the_crops(root):
    (_, _, split), *_ = training_parts(config(root))
    source = LatentSource(epath.Path(root) / "camvid" / split, {})
    assert source.statistics().examples == len(source) == COUNT
    assert read_manifest(source.folder)["image_size"] == SIZE
