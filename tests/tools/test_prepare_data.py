# SPDX-License-Identifier: Apache-2.0
"""Prepared shards: what is read from them is what the download holds; a kill costs nothing."""

from __future__ import annotations

import dataclasses
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import official_trees as trees
import pytest
import tiny
from PIL import Image

from digseg_jax.config.schema import PartConfig
from digseg_jax.data.datasets.pairs import orient
from digseg_jax.data.datasets.spec import ClassInfo, DatasetSpec
from digseg_jax.data.datasets.statistics import ClassStatistics
from digseg_jax.data.shards import files as shard_files
from digseg_jax.data.shards import records
from digseg_jax.data.shards.records import RecordSource
from digseg_jax.data.sources import open_part, spec_of
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError
from digseg_jax.io.image_file import read_image
from digseg_jax.tools import prepare_data
from digseg_jax.tools.prepare_data import prepare_split

COUNT = 11
CLASSES = 300  # 255 is a class: labels need 16 bits as soon as it occurs


def spec(classes=CLASSES, **changes):
    infos = tuple(ClassInfo(f"thing {i}") for i in range(classes))
    values = {"name": "things", "title": "", "splits": {"train": COUNT}, "ignore": "", "license": ""}
    return DatasetSpec(classes=infos, **(values | changes))


class Folder:
    """Images on disk, and labels made of their number; some images are odd."""

    image_is_file = True

    def __init__(self, root: Path, broken: tuple[int, ...] = ()):
        self.root, self.broken = root, broken

    def __len__(self):
        return COUNT

    def files(self, i):
        return {"image": self.root / f"{i}.jpg", "label": self.root / f"{i}.png"}

    def __getitem__(self, i):
        if i in self.broken:
            raise OSError("gone")
        path = self.files(i)["image"]
        label = label_of(i)
        image = orient(read_image(path), label.shape, path, False)
        return {"image": image, "label": label, "name": f"näme {i}"}


class Resized(Folder):
    """Gives half the image that the file holds."""

    image_is_file = False

    def __getitem__(self, i):
        example = super().__getitem__(i)
        half = {k: np.ascontiguousarray(example[k][::2, ::2]) for k in ("image", "label")}
        return example | half


def label_of(i):
    generator = np.random.default_rng(i)
    top = (254, 255, 299, 2)[i % 4]
    return generator.choice([-1, 0, i, top], size=(24 + i, 36)).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("download")
    for i in range(COUNT):
        height, width = label_of(i).shape
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        picture = Image.fromarray(pixels)
        exif = Image.Exif()
        if i == 1:  # turned: stored on its side, the label upright
            picture, exif[0x0112] = picture.transpose(Image.Transpose.ROTATE_90), 6
        if i == 2:
            picture = picture.convert("L")
        if i == 3:
            picture = picture.convert("CMYK")
        kind = "PNG" if i == 4 else "JPEG"  # a PNG with the wrong suffix
        data = io.BytesIO()
        picture.save(data, kind, exif=exif, **({"quality": 90} if kind == "JPEG" else {}))
        (root / f"{i}.jpg").write_bytes(data.getvalue())
    return root


def make(folder, out, kind=Folder, **options):
    options = {"shard_examples": 4} | options
    return prepare_split(partial(kind, folder), spec(), "train", out, **options)


def assert_equal_sources(a, b):
    assert len(a) == len(b)
    for i in range(len(a)):
        x, y = a[i], b[i]
        np.testing.assert_array_equal(x["image"], y["image"], err_msg=str(i))
        np.testing.assert_array_equal(x["label"], y["label"], err_msg=str(i))
        assert x["label"].dtype == y["label"].dtype == np.int32
        assert x["name"] == y["name"]


@pytest.mark.parametrize("kind", [Folder, Resized])
def test_shards_give_exactly_what_the_download_gives(folder, tmp_path, kind):
    manifest = make(folder, tmp_path, kind)
    assert manifest["examples"] == COUNT
    assert [s["examples"] for s in manifest["shards"]] == [4, 4, 3]
    assert_equal_sources(kind(folder), RecordSource(tmp_path, "train", spec()))


@pytest.mark.parametrize("classes, dtype", [(127, np.int8), (128, np.int16), (300, np.int16)])
def test_narrow_labels_are_the_same_ids(classes, dtype):
    rng = np.random.default_rng(classes)
    label = rng.integers(-1, classes, (20, 30)).astype(np.int32)
    data = records.encode_record(np.zeros((20, 30, 3), np.uint8), label, "one", None)
    got = records.decode_record(data, str, dtype)["label"]
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, label)


def test_training_reads_labels_in_the_narrowest_type(folder, tmp_path):
    make(folder, tmp_path)
    wide, narrow = (RecordSource(tmp_path, "train", spec(), narrow=n) for n in (False, True))
    for a, b in zip(wide, narrow, strict=True):
        assert a["label"].dtype == np.int32 and b["label"].dtype == np.int16
        np.testing.assert_array_equal(a["label"], b["label"])


def test_jpegs_stay_as_they_are(folder, tmp_path):
    make(folder, tmp_path)
    shards = b"".join(p.read_bytes() for p in sorted(tmp_path.glob("train/*.array_record")))
    kept = [(folder / f"{i}.jpg").read_bytes() in shards for i in range(COUNT)]
    # 3 is CMYK, whose colors OpenCV would convert otherwise, 4 is no JPEG: both become PNG
    assert [i for i, k in enumerate(kept) if not k] in ([3, 4], [4])
    assert kept[0] and kept[1] and kept[2]


def test_the_statistics_are_those_of_the_labels(folder, tmp_path):
    make(folder, tmp_path)
    expected = ClassStatistics.empty(CLASSES)
    for i in range(COUNT):
        expected.add(label_of(i))
    got = RecordSource(tmp_path, "train", spec()).statistics()
    np.testing.assert_array_equal(got.pixels, expected.pixels)
    np.testing.assert_array_equal(got.together, expected.together)
    assert got.examples == COUNT


def test_worker_processes_write_the_same_shards(folder, tmp_path):
    one, two = make(folder, tmp_path / "0"), make(folder, tmp_path / "2", workers=2)
    assert [s["sha256"] for s in one["shards"]] == [s["sha256"] for s in two["shards"]]
    assert one["statistics"] == two["statistics"]


class Killed(BaseException):
    """What SIGKILL looks like from inside: nothing below it catches it."""


@pytest.mark.parametrize("point", ["writer", "move", "sidecar", "manifest"])
def test_a_kill_at_any_point_is_made_up_for(folder, tmp_path, monkeypatch, point):
    whole = make(folder, tmp_path / "whole")
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        calls = {"n": 0}

        def dying(real, at):
            def call(*arguments, **options):
                calls["n"] += 1
                if calls["n"] == at:
                    raise Killed
                return real(*arguments, **options)

            return call

        if point == "writer":
            patch.setattr(records, "encode_record", dying(records.encode_record, 6))
        elif point == "move":
            patch.setattr(shard_files, "move", dying(shard_files.move, 2))
        else:  # writes: the plan, three sidecars, the manifest
            at = 3 if point == "sidecar" else 5
            patch.setattr(shard_files, "write", dying(shard_files.write, at))
        with pytest.raises(Killed):
            make(folder, out)
    with pytest.raises(UserError, match="no readable manifest"):
        RecordSource(out, "train", spec())
    written = {p.name: p.stat().st_mtime_ns for p in out.glob("train/*.array_record")}
    assert make(folder, out) == whole
    done = {p.name for p in out.glob("train/*.array_record")}
    assert done == {s["file"] for s in whole["shards"]}
    if point != "manifest":
        assert len(written) < 3
    assert_equal_sources(Folder(folder), RecordSource(out, "train", spec()))
    left = {p.name for p in (out / "train").iterdir()} - done
    assert left == {"manifest.json", "plan.json"}


def test_a_finished_split_is_left_alone(folder, tmp_path):
    first = make(folder, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert make(folder, tmp_path) == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("changes", [{"shard_examples": 5}, {"on_error": "skip"}])
def test_another_plan_in_the_same_folder_is_refused(folder, tmp_path, changes):
    make(folder, tmp_path)
    with pytest.raises(UserError, match="holds shards made with"):
        make(folder, tmp_path, **changes)


def test_a_broken_example_stops_the_job_or_is_left_out_and_named(folder, tmp_path):
    source = partial(Folder, folder, (5,))
    with pytest.raises(UserError, match="5.jpg.*gone"):
        prepare_split(source, spec(), "train", tmp_path / "a", shard_examples=4)
    manifest = prepare_split(source, spec(), "train", tmp_path / "b", shard_examples=4, on_error="skip")
    assert manifest["examples"] == COUNT - 1 and len(manifest["broken"]) == 1
    assert "5.jpg" in manifest["broken"][0]
    names = [e["name"] for e in RecordSource(tmp_path / "b", "train", spec())]
    assert names == [f"näme {i}" for i in range(COUNT) if i != 5]


class TestReader:
    """What the reader says when manifest and shards do not agree."""

    @pytest.fixture
    def out(self, folder, tmp_path):
        make(folder, tmp_path)
        return tmp_path

    def test_another_class_list_is_refused(self, out):
        renamed = spec()
        classes = (ClassInfo("other"), *renamed.classes[1:])
        with pytest.raises(UserError, match="another class list than things"):
            RecordSource(out, "train", _with(renamed, classes))

    def test_other_nesting_is_another_class_list(self):
        nested = (ClassInfo("disc", covers=(0, 1)), ClassInfo("cup"))
        flat = (ClassInfo("disc"), ClassInfo("cup"))
        assert records.class_hash(_with(spec(2), nested)) != records.class_hash(_with(spec(2), flat))

    def test_a_missing_or_shortened_shard_is_told_at_the_start(self, out):
        shard = sorted(out.glob("train/*.array_record"))[1]
        data = shard.read_bytes()
        shard.write_bytes(data[:-7])
        with pytest.raises(UserError, match=f"{shard.name}.*the manifest says {len(data)}"):
            RecordSource(out, "train", spec())
        shard.unlink()
        with pytest.raises(UserError, match=f"{shard.name}.*is missing"):
            RecordSource(out, "train", spec())

    @pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd"])
    def test_a_shard_outside_of_the_folder_is_refused(self, out, name):
        """Whoever made the shards wrote the manifest too."""
        path = out / "train" / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["shards"][0]["file"] = name
        path.write_text(json.dumps(manifest))
        for read in (lambda: RecordSource(out, "train", spec()), lambda: records.verify(out, "train")):
            with pytest.raises(UserError, match="does not stay inside that folder"):
                read()

    def test_flipped_bits_are_an_error_of_that_record_and_of_verify(self, out):
        assert records.verify(out, "train") == []
        shard = sorted(out.glob("train/*.array_record"))[0]
        data = bytearray(shard.read_bytes())
        place = bytes(data).index(b"IDAT") + 30
        data[place] ^= 4
        shard.write_bytes(bytes(data))
        assert shard.name in records.verify(out, "train")[0]
        source = RecordSource(out, "train", spec())
        failed = []
        for i in range(COUNT):
            try:
                source[i]
            except UnreadableError as error:
                failed.append(i)
                assert f"{shard.name}, record {i}" in str(error)
        assert len(failed) == 1

    def test_another_format_or_no_manifest(self, out):
        path = out / "train" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
        with pytest.raises(UserError, match="format 99"):
            RecordSource(out, "train", spec())
        path.write_text("{")
        with pytest.raises(UserError, match="no readable manifest"):
            RecordSource(out, "train", spec())
        assert not records.is_prepared(out, "val") and not records.is_prepared("", "train")


def _with(facts, classes):
    return dataclasses.replace(facts, classes=classes)


def test_a_folder_of_ones_own_needs_only_its_shards(folder, tmp_path):
    nested = _with(spec(), (ClassInfo("disc", ("plate",), covers=(0, 1)), *spec().classes[1:]))
    facts = dataclasses.replace(nested, name="folder", template="a {} seen")
    source = partial(Folder, folder)
    prepare_split(source, facts, "train", tmp_path / "shards", shard_examples=4)
    part = PartConfig("folder", str(tmp_path / "shards"))
    got = spec_of(part)
    assert [(c.name, c.synonyms, c.covers) for c in got.classes] == [
        (c.name, c.synonyms, c.covers) for c in facts.classes
    ]
    assert (got.template, dict(got.splits)) == ("a {} seen", {"train": 0})
    assert_equal_sources(Folder(folder), open_part(part, "train"))


@pytest.mark.parametrize("template", ["{0.__class__}", "{:>1000000000}", ["{}"]])
def test_a_manifests_template_is_never_formatted_and_its_other_facts_are_left(
    folder, tmp_path, template
):
    facts = dataclasses.replace(spec(), name="folder")
    prepare_split(partial(Folder, folder), facts, "train", tmp_path)
    path = tmp_path / "train" / records.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["spec"]["caption"] = "{0.__class__}"
    path.write_text(json.dumps(manifest))
    assert spec_of(PartConfig("folder", str(tmp_path))).caption == spec().caption
    manifest["spec"]["template"] = template
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="needs one {}") as caught:
        spec_of(PartConfig("folder", str(tmp_path)))
    assert tiny.one_line(caught.value).startswith(str(tmp_path))


def test_shards_of_an_earlier_version_are_complete_and_read_though_it_spelled_a_fact_otherwise(
    folder, tmp_path
):
    facts = dataclasses.replace(spec(), name="folder")
    prepare = partial(prepare_split, partial(Folder, folder), facts, "train", tmp_path)
    prepare()
    for path in (tmp_path / "train").glob("*.json"):
        values = json.loads(path.read_text())
        if "spec" in values:
            values["spec"]["licence"] = values["spec"].pop("license")
            path.write_text(json.dumps(values))
    prepare()
    assert spec_of(PartConfig("folder", str(tmp_path))).license == facts.license


def test_a_foreign_record_is_an_error():
    for data in (b"", b"\x00", b"\xff\xff\xff\xff", b"\x02\x00\x00\x00{}", b"\x02\x00\x00\x0012"):
        with pytest.raises(UnreadableError, match="here, record 3"):
            records.decode_record(data, lambda: "here, record 3")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dataset": "camvit"}, "camvit"),
        ({"root": ""}, "folder: no folder given; set --config.data.root=DIR (or --root)"),
        ({"out": ""}, "--out: no folder given"),  # not the current one
        ({"workers": -3}, "--workers=-3: must be at least 0"),
        ({"shard-examples": 0}, "--shard-examples=0: must be at least 1"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys, monkeypatch, changes, told):
    trees.folder(tmp_path)
    options = {"dataset": "folder", "root": tmp_path, "out": tmp_path} | changes
    monkeypatch.setattr("sys.argv", ["prepare", *(f"--{k}={v}" for k, v in options.items())])
    monkeypatch.setattr(prepare_data, "setup", lambda: None)  # its log handler would outlive this test
    assert prepare_data.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
