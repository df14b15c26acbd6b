# SPDX-License-Identifier: Apache-2.0
"""A user's own data, without code: images/SPLIT/NAME.jpg, masks/SPLIT/NAME.png and classes.txt.

For the lines of classes.txt see `class_list`. 255 is ignored unless a line gives it a meaning.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from digseg_jax.data.datasets.class_list import COLOR, read_class_list, written
from digseg_jax.data.datasets.decode import LabelValueError, read_color_label
from digseg_jax.data.datasets.pairs import FileSource, first_folder, list_folders, pair_folders
from digseg_jax.data.datasets.readers.index import IndexLabels
from digseg_jax.data.datasets.spec import IGNORE, DatasetSpec
from digseg_jax.io.image_file import IMAGE_ENDINGS

CLASSES = "classes.txt"
VOID = 255  # ignored value of number masks, unless a line of classes.txt gives it a meaning
_MASKS = (".png", ".tif", ".tiff", ".bmp")


def folder_spec(root: Path) -> DatasetSpec:
    """Spec of a folder, from its classes.txt and the folders in images/.

    Raises:
      UserError: no such files, or a line that cannot be read.
    """
    listed = read_class_list(root / CLASSES)
    # 255 is void by convention; colors have no such convention.
    ignored = listed.ignored
    if listed.kind != "color" and VOID not in listed.values:
        ignored += (VOID,)
    return DatasetSpec(
        name="folder",
        title=f"the user's own data in {root.name}",
        classes=listed.classes,
        ignored_raw=ignored,
        splits=dict.fromkeys(list_folders(root / "images"), 0),
        ignore=", ".join(written(v) for v in ignored) or "none",
        licence="the user's own",
    )


class ColorLabels:
    """Reader of RGB masks by the colors of classes.txt."""

    def __init__(self, spec: DatasetSpec):
        pairs = [(v - COLOR, i) for i, c in enumerate(spec.classes) for v in c.raw]
        pairs += [(v - COLOR, IGNORE) for v in spec.ignored_raw]
        self.codes, self.ids = (np.array(side, np.int32) for side in zip(*sorted(pairs), strict=True))

    def __call__(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """Ids, int32 [h, w].

        Raises:
          LabelValueError: names the file, the color and where it first occurs.
        """
        # 24-bit codes; looked up by bisection, as a table would have 16 million entries
        code = read_color_label(path).astype(np.int32) @ np.array([65536, 256, 1], np.int32)
        place = np.searchsorted(self.codes, code).clip(max=len(self.codes) - 1)
        unknown = self.codes[place] != code
        if unknown.any():
            y, x = np.argwhere(unknown)[0]
            raise LabelValueError(
                f"{path}: color #{code[y, x]:06x} at row {y}, column {x} is no class; legal: "
                + ", ".join(f"#{c:06x}" for c in self.codes)
            )
        return self.ids[place]


def open_folder(spec: DatasetSpec, root: Path, split: str) -> FileSource:
    """Opens images/SPLIT with masks/SPLIT or annotations/SPLIT, files of one stem.

    Raises:
      UserError: no such folders, or files without their partner.
    """
    what = f"folder {split}"
    places = (f"masks/{split}", f"annotations/{split}")
    folders = (f"images/{split}", first_folder(root, places, what))
    pairs = pair_folders(root, *folders, IMAGE_ENDINGS, _MASKS, what)

    # All values have one form, so the first tells it. Strict about
    # EXIF: the data are the user's own.
    colored = spec.classes[0].raw[0] >= COLOR
    return FileSource(root, pairs, ColorLabels(spec) if colored else IndexLabels(spec), strict=True)
