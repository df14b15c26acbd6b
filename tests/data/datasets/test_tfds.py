# SPDX-License-Identifier: Apache-2.0
"""tfds:NAME, against a tiny data set written in TFDS's own layout, without TensorFlow."""

from __future__ import annotations

import io
import json
import shutil
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from digseg_jax.config.schema import PartConfig
from digseg_jax.data.checked import Guarded
from digseg_jax.data.datasets.tfds import _builder
from digseg_jax.data.sources import open_part, spec_of
from digseg_jax.errors import UserError
from digseg_jax.tools import check_data

tfds = pytest.importorskip("tensorflow_datasets")

COUNT, NAMES = 3, ["road", "tree"]


def pictures(i):
    rng = np.random.default_rng(i)
    image = rng.integers(0, 256, (6 + i, 8, 3), np.uint8)
    return image, rng.choice(np.array([0, 1, 255], np.uint8), size=(6 + i, 8))


def png(value):
    out = io.BytesIO()
    Image.fromarray(value).save(out, "PNG")
    return out.getvalue()


def varint(n):
    out = b""
    while True:
        out += bytes([n & 127 | (128 if n > 127 else 0)])
        n >>= 7
        if not n:
            return out


def field(number, data):
    """A length-delimited field of a protocol buffer."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(features):
    """tf.train.Example by hand: Example.features.feature{key: bytes_list}."""
    entries = b"".join(
        field(1, field(1, key.encode()) + field(2, field(1, field(1, value))))
        for key, value in features.items()
    )
    return field(1, entries)


def write(root, names, label_key="segmentation_label"):
    """ROOT/tiny/1.0.0 with features.json, dataset_info.json and one array_record file."""
    folder = root / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    label = (
        tfds.features.LabeledImage(labels=names, shape=(None, None, 1))
        if names
        else tfds.features.Image(shape=(None, None, 1))
    )
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), label_key: label})
    features.save_config(folder)
    records = [
        example({"image": png(image), label_key: png(ids)})
        for image, ids in map(pictures, range(COUNT))
    ]
    writer = ArrayRecordWriter(str(folder / "tiny-train.array_record-00000-of-00001"), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    info = {
        "name": "tiny",
        "version": "1.0.0",
        "fileFormat": "array_record",
        "moduleName": "tiny",
        "splits": [
            {
                "name": "train",
                "shardLengths": [str(COUNT)],
                "numBytes": str(sum(map(len, records))),
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return PartConfig("tfds:tiny", str(root))


def test_a_feature_of_another_package_is_not_imported(tmp_path, monkeypatch):
    """TFDS imports the module of every type that the file names."""
    part = write(tmp_path, NAMES)
    (tmp_path / "planted.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "tiny/1.0.0/features.json"
    own = "tensorflow_datasets.core.features.image_feature.Image"
    path.write_text(path.read_text().replace(own, "planted.Image"))
    with pytest.raises(UserError, match="'planted.Image' is none of TFDS's own"):
        spec_of(part)


def test_it_is_checked_as_any_other_data_set(tmp_path, capsys):
    write(tmp_path, NAMES)
    assert check_data.main(["--dataset=tfds:tiny", f"--root={tmp_path}", "--sheet=-"]) == 0
    assert f"train: {COUNT} examples" in capsys.readouterr().out


def test_the_highest_version_is_read(tmp_path):
    write(tmp_path, NAMES)
    for version in ("9.0.0", "10.0.0"):
        shutil.copytree(tmp_path / "tiny" / "1.0.0", tmp_path / "tiny" / version)
        info = tmp_path / "tiny" / version / "dataset_info.json"
        info.write_text(info.read_text().replace("1.0.0", version))
    assert _builder("tiny", str(tmp_path)).info.version == "10.0.0"


@pytest.fixture(params=[True, False], ids=["named labels", "classes.txt"])
def part(request, tmp_path):
    if not request.param:
        (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return write(tmp_path, NAMES if request.param else None)


def test_images_and_labels_are_those_that_were_written(part):
    source = open_part(part, "train")
    assert len(source) == COUNT
    for i in range(COUNT):
        image, ids = pictures(i)
        got = Guarded(source, len(NAMES))[i]
        np.testing.assert_array_equal(got["image"], image)
        np.testing.assert_array_equal(got["label"], np.where(ids == 255, -1, ids.astype(int)))
        assert got["name"] == f"train/{i}"
    assert "tensorflow" not in sys.modules


def test_the_facts_come_from_the_data_set(part):
    facts = spec_of(part)
    assert facts.names == tuple(NAMES) and dict(facts.splits) == {"train": COUNT}


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(UserError, match="tfds:tiny: no prepared data set"):
        spec_of(PartConfig("tfds:tiny", str(tmp_path)))
    part = write(tmp_path, None)
    with pytest.raises(UserError, match=r"no class names; write them to .*classes.txt"):
        spec_of(part)
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    with pytest.raises(UserError, match="tfds:tiny has no split 'val'; legal: train"):
        open_part(part, "val")


def test_features_of_other_names_are_told(tmp_path):
    part = write(tmp_path, NAMES, label_key="target")
    with pytest.raises(UserError, match="features .*target"):
        spec_of(part)
