# SPDX-License-Identifier: Apache-2.0
"""tfds:NAME, a data set that TensorFlow Datasets prepared as array_record, read without TensorFlow.

Prepare it once where TensorFlow is installed, `tfds build NAME --file_format=array_record`; reading
needs only the files. Pictures and labels are found by what their features are called.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from digseg_jax.data.datasets.spec import IGNORE, ClassInfo, DatasetSpec
from digseg_jax.errors import UserError

IMAGES = ("image", "image_left")
LABELS = ("label", "segmentation_label", "segmentation_mask", "annotations", "mask")
CLASSES = "classes.txt"  # in `root`, one name a line, for data sets whose features name no classes
VOID = 255  # of 8-bit labels, where it is no class


@functools.cache
def _builder(name: str, root: str) -> Any:
    """Raises UserError: nothing prepared there."""
    folder = epath.Path(root) / name
    # NAME/VERSION, or NAME/CONFIG/VERSION where `name` does not say which configuration
    patterns = ("*/dataset_info.json", "*/*/dataset_info.json")
    versions = sorted(p for pattern in patterns for p in folder.glob(pattern))
    if not versions:
        raise UserError(
            f"tfds:{name}: no prepared data set in {folder}; run `tfds build {name} "
            f"--data_dir={root} --file_format=array_record` where TensorFlow is installed"
        )
    return tfds.builder_from_directory(versions[-1].parent)


def _key(features: Any, names: tuple[str, ...], what: str) -> str:
    found = [key for key in names if key in features]
    if not found:
        raise UserError(f"{what}: features {', '.join(features)}; none of {', '.join(names)}")
    return found[0]


def _names(name: str, root: str) -> list[str]:
    """From the label's feature, or from the file beside the data."""
    features = _builder(name, root).info.features
    feature = features[_key(features, LABELS, f"tfds:{name}")]
    if isinstance(feature, tfds.features.LabeledImage) and feature.names:
        return list(feature.names)
    path = epath.Path(root) / CLASSES
    if not path.exists():
        raise UserError(f"tfds:{name}: its label has no class names; write them to {path}")
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def spec(name: str, root: str) -> DatasetSpec:
    """The facts that a prepared data set tells of itself.

    Raises:
      UserError: nothing prepared there, or no class names.
    """
    info = _builder(name, root).info
    splits = {key: split.num_examples for key, split in info.splits.items()}
    known = [s for s in ("validation", "val", "test", "train") if s in splits]
    return DatasetSpec(
        name=f"tfds:{name}",
        title=info.full_name,
        classes=tuple(ClassInfo(n) for n in _names(name, root)),
        splits=splits,
        ignore=f"{VOID}, unless it is a class",
        licence="see the data set's page",
        eval_split=known[0] if known else next(iter(splits)),
    )


class TfdsSource:
    """[i] -> {"image" uint8 [h, w, 3], "label" int32 [h, w] with ignore = -1, "name"}.

    Raises:
      UserError: nothing prepared there, another file format, or no such split.
    """

    image_is_file = False  # a record holds both

    def __init__(self, name: str, root: str, split: str):
        self.name, self.root, self.split = name, root, split
        builder = _builder(name, root)
        if split not in builder.info.splits:
            legal = ", ".join(builder.info.splits)
            raise UserError(f"tfds:{name} has no split {split!r}; legal: {legal}")
        features = builder.info.features
        self.image, self.label = (_key(features, keys, f"tfds:{name}") for keys in (IMAGES, LABELS))
        self.num_classes = len(_names(name, root))
        try:
            self.examples = builder.as_data_source(split)
        except NotImplementedError as error:
            raise UserError(f"tfds:{name}: {' '.join(str(error).split())}") from error

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        image, label = np.asarray(example[self.image]), np.asarray(example[self.label])
        if image.shape[-1] == 1:
            image = np.repeat(image, 3, axis=-1)
        label = label.reshape(label.shape[:2])
        ids = label.astype(np.int32)
        if self.num_classes <= VOID:
            ids[label == VOID] = IGNORE
        return {"image": image, "label": ids, "name": f"{self.split}/{index}"}

    def files(self, index: int) -> dict[str, Path]:
        """The folder of the data set: its records do not say which file they came from."""
        folder = epath.Path(_builder(self.name, self.root).data_path)
        return {"image": folder, "label": folder}
