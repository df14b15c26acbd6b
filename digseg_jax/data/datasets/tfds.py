# SPDX-License-Identifier: Apache-2.0
"""Reads tfds:NAME, a data set that TensorFlow Datasets prepared as array_record, without TensorFlow.

Prepare it once where TensorFlow is installed, `tfds build NAME --file_format=array_record`; reading
needs only the files. Image and label are recognized by the names of their features.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from digseg_jax.data.datasets.catalog import SPECS
from digseg_jax.data.datasets.class_list import read_class_list
from digseg_jax.data.datasets.decode import LabelTable
from digseg_jax.data.datasets.spec import ClassInfo, DatasetSpec
from digseg_jax.data.datasets.splits import split_called
from digseg_jax.errors import UserError
from digseg_jax.io.json_file import read_json
from digseg_jax.io.storage import as_path

# Names of features, in the order of preference.
IMAGES = ("image", "image_left")
LABELS = ("label", "segmentation_label", "segmentation_mask", "annotations", "mask")
FEATURES = "features.json"  # which types of values an example has
OWN = "tensorflow_datasets.core.features."  # begins the names of TFDS's own types
CLASSES = "classes.txt"  # in `root`, see `class_list`, for data sets whose features name no classes
OFFICIAL = ("cityscapes",)  # data sets of `catalog` whose labels come with their official values
VOID = 255  # ignored value of 8-bit labels, unless it is a class


@functools.cache
def _builder(name: str, root: str) -> Any:
    """Builder of the newest prepared version; of several configurations the last one by name.

    Raises:
      UserError: nothing prepared there.
    """
    folder = epath.Path(as_path(root)) / name

    # NAME/VERSION, or NAME/CONFIG/VERSION where `name` does not say which configuration.
    patterns = ("*/dataset_info.json", "*/*/dataset_info.json")
    versions = sorted((p for pattern in patterns for p in folder.glob(pattern)), key=_version)
    if not versions:
        raise UserError(
            f"tfds:{name}: no prepared data set in {folder}; run `tfds build {name} "
            f"--data_dir={root} --file_format=array_record` where TensorFlow is installed"
        )
    _check_features(versions[-1].parent / FEATURES)
    return tfds.builder_from_directory(versions[-1].parent)


def _check_features(path: epath.Path) -> None:
    """Checks that every feature is one of TFDS's own: others' modules would be imported, and run.

    Raises:
      UserError: no such file, or a feature of another package.
    """
    level: list[Any] = [read_json(path)]
    while level:
        rows = [row for row in level if isinstance(row, dict)]
        for row in rows:
            name = str(row.get("pythonClassName", row.get("python_class_name", OWN)))
            if not name.startswith(OWN):
                raise UserError(f"{path}: the feature {name[:200]!r} is none of TFDS's own")
        inner = [value for row in rows for value in row.values()]
        inner += [value for item in level if isinstance(item, list) for value in item]
        level = [value for value in inner if isinstance(value, dict | list)]


def _version(info: epath.Path) -> tuple[str, list[int]]:
    """(configuration, version as numbers) of a dataset_info.json: 10.0.0 comes after 9.0.0."""
    numbers = [int(part) for part in info.parent.name.split(".") if part.isdigit()]
    return info.parent.parent.name, numbers


def _key(features: Any, names: tuple[str, ...], what: str) -> str:
    """The first of `names` that the features have.

    Raises:
      UserError: none of them is; lists the features.
    """
    found = [key for key in names if key in features]
    if not found:
        raise UserError(f"{what}: features {', '.join(features)}; none of {', '.join(names)}")
    return found[0]


def _classes(name: str, root: str) -> tuple[tuple[ClassInfo, ...], tuple[int, ...]]:
    """Classes with their values in the labels, and the ignored values.

    They come from the label's feature, else from the file beside the data, else from the official list
    of a data set whose labels hold official values.

    Raises:
      UserError: none of them is there, or a line that cannot be read.
    """
    features = _builder(name, root).info.features
    feature = features[_key(features, LABELS, f"tfds:{name}")]
    if isinstance(feature, tfds.features.LabeledImage) and feature.names:
        classes, ignored = tuple(ClassInfo(n, raw=(i,)) for i, n in enumerate(feature.names)), ()
        return classes, ignored if len(classes) > VOID else (VOID,)

    # Most segmentation features have no names. The user's file takes precedence over official lists.
    path = Path(as_path(root)) / CLASSES
    if path.exists():
        listed = read_class_list(path)
        if listed.kind == "color":
            raise UserError(f"{path}: colors; labels of tfds hold numbers, as in `0: soil`")
        return listed.classes, listed.ignored + (() if VOID in listed.values else (VOID,))

    if name in OFFICIAL:
        facts = SPECS[name]()
        return facts.classes, facts.ignored_raw
    raise UserError(f"tfds:{name}: its label has no class names; write them to {path}")


def spec(name: str, root: str) -> DatasetSpec:
    """Spec of a prepared data set, from its own metadata.

    Raises:
      UserError: nothing prepared there, or no class names.
    """
    info = _builder(name, root).info
    classes, ignored = _classes(name, root)
    splits = {key: split.num_examples for key, split in info.splits.items()}

    # By default the first of these that exists is evaluated.
    known = [s for s in ("validation", "val", "test", "train") if s in splits]
    return DatasetSpec(
        name=f"tfds:{name}",
        title=info.full_name,
        classes=classes,
        ignored_raw=ignored,
        splits=splits,
        ignore=", ".join(map(str, ignored)) or "none",
        license="see the data set's page",
        eval_split=known[0] if known else next(iter(splits)),
    )


class TfdsSource:
    """Random access: [i] -> {"image" uint8 [h, w, 3], "label" int32 [h, w] with ignore = -1, "name"}.

    Raises:
      UserError: nothing prepared there, another file format, or no such split.
    """

    image_is_file = False  # image and label are in one record

    def __init__(self, name: str, root: str, split: str):
        builder = _builder(name, root)
        split = split_called(split, builder.info.splits)
        self.name, self.root, self.split = name, root, split
        if split not in builder.info.splits:
            legal = ", ".join(builder.info.splits)
            raise UserError(f"tfds:{name} has no split {split!r}; legal: {legal}")

        # Features are recognized by name: there is no convention for segmentation.
        features = builder.info.features
        self.image, self.label = (_key(features, keys, f"tfds:{name}") for keys in (IMAGES, LABELS))
        self.table = LabelTable.of(spec(name, root))

        # TFRecord files would need TensorFlow; tfds says so with NotImplementedError.
        try:
            self.examples = builder.as_data_source(split)
        except NotImplementedError as error:
            raise UserError(f"tfds:{name}: {' '.join(str(error).split())}") from error

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        image, label = np.asarray(example[self.image]), np.asarray(example[self.label])

        # Gray images become RGB; labels come as [h, w, 1].
        if image.shape[-1] == 1:
            image = np.repeat(image, 3, axis=-1)
        label = label.reshape(label.shape[:2])

        ids = self.table(label.astype(np.int32), self.files(index)["label"] / f"{self.split}/{index}")
        return {"image": image, "label": ids, "name": f"{self.split}/{index}"}

    def files(self, index: int) -> dict[str, Path]:
        """Folder of the data set: records carry no name of their file."""
        folder = epath.Path(_builder(self.name, self.root).data_path)
        return {"image": folder, "label": folder}
