# SPDX-License-Identifier: Apache-2.0
"""One file of all predictions of a folder, for labeling tools: masks that people correct.

It is made of each image's NAME.coco.json, so that a resumed prediction has the images of both runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.arraytypes import Bool, Int
from digseg_jax.data.datasets.readers import rle
from digseg_jax.errors import UserError
from digseg_jax.io.files import shown
from digseg_jax.io.json_file import read_json
from digseg_jax.io.names import key
from digseg_jax.io.storage import write_bytes
from digseg_jax.prediction.targets import PredictionFiles, read_summary

Content = dict[str, Any]  # of a COCO file of one image
# Label Studio's run lengths: bits of a value, and the numbers of bits that a length may have.
_WORD, _SIZES = 8, (3, 4, 8, 16)


def labeling_file(kind: str, out: Path, planned: Sequence[PredictionFiles]) -> Path:
    """The file of a kind in the folder `out`.

    Raises:
      UserError: `out` is not a folder, or an image's prediction has a file of that name.
    """
    if out.suffix.lower() == ".png":
        raise UserError(
            f"--format={kind}: needs a folder as --out, which gets the file all.{kind}.json"
        )
    path = out / f"all.{kind}.json"
    if key(path.name) in {key(file.name) for files in planned for file in files}:
        raise UserError(f"--format={kind}: an image called {path.name.partition('.')[0]!r} has a file "
                        f"of the name {path.name}; rename the image")  # fmt: skip
    return path


def write_labeling(kind: str, path: Path, predictions: Sequence[PredictionFiles]) -> None:
    """Writes the file of a kind, whole or not at all, from the COCO files of some predictions.

    Raises:
      UserError: a file cannot be read or written.
    """
    try:
        found = _named_apart([read_json(files.coco) for files in predictions], predictions)
        made = json.dumps(KINDS[kind](found), ensure_ascii=False).encode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--format={kind}: {shown(path)} cannot be made ({error})") from error
    write_bytes(path, made)


def _named_apart(found: Sequence[Content], predictions: Sequence[PredictionFiles]) -> list[Content]:
    """COCO files whose images have different names: their files', from their common folder if needed.

    found: the COCO files of the predictions, in their order.
    """
    names = [one["images"][0]["file_name"] for one in found]
    if len(set(names)) == len(names):
        return list(found)

    # Images of several folders: what follows the folder that holds them all.
    summaries = [read_summary(files) or {} for files in predictions]
    paths = [
        os.path.abspath(summary.get("image", name))
        for summary, name in zip(summaries, names, strict=True)
    ]
    common = os.path.commonpath(paths)
    images = [Path(os.path.relpath(path, common)).as_posix() for path in paths]
    return [
        one | {"images": [one["images"][0] | {"file_name": name}]}
        for one, name in zip(found, images, strict=True)
    ]


def coco_of(found: Sequence[Content]) -> Content:
    """One COCO file of many: their images and annotations under new numbers."""
    images: list[Content] = []
    annotations: list[Content] = []
    for number, one in enumerate(found, start=1):
        images += [image | {"id": number} for image in one["images"]]
        for annotation in one["annotations"]:
            ids = {"id": len(annotations) + 1, "image_id": number}
            annotations.append(annotation | ids)
    categories = found[0]["categories"] if found else []
    return {"images": images, "categories": categories, "annotations": annotations}


def label_studio_of(found: Sequence[Content]) -> list[dict[str, Any]]:
    """Label Studio's tasks with predictions, for a BrushLabels tag "label" on an Image tag "image".

    An image is named as a file of a local storage, relative to its root.
    """
    tasks = []
    for one in found:
        (image,) = one["images"]
        names = {category["id"]: category["name"] for category in one["categories"]}

        # A brush region for each mask.
        results = [
            {
                "id": str(annotation["id"]),
                "type": "brushlabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": image["width"],
                "original_height": image["height"],
                "image_rotation": 0,
                "score": annotation["score"],
                "value": {
                    "format": "rle",
                    "rle": brush_rle(rle.decode(**_runs(annotation))),
                    "brushlabels": [names[annotation["category_id"]]],
                },
            }
            for annotation in one["annotations"]
        ]

        data = {"image": f"/data/local-files/?d={image['file_name']}"}
        tasks.append({
            "data": data, "predictions": [{"model_version": "digseg_jax", "result": results}]
        })  # fmt: skip
    return tasks


def _runs(annotation: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `rle.decode` for an annotation."""
    height, width = annotation["segmentation"]["size"]
    return {"counts": annotation["segmentation"]["counts"], "height": height, "width": width}


def brush_rle(mask: Bool[np.ndarray, "h w"]) -> list[int]:
    """Label Studio's brush: run lengths of the mask's RGBA pixels (all 0 or all 255), as bytes.

    A header of 53 bits (number of values, bits of a value, bits of each size of length), then for each
    run a 1, the number of its size, its length less one and its value. The format is that of
    @thi.ng/rle-pack, which Label Studio uses.
    """
    # Runs along the rows, of four values a pixel; those of more than 65536 values are split.
    values = mask.ravel()
    starts = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
    lengths = 4 * np.diff(np.append(starts, values.size))
    parts = -(-lengths // 2 ** _SIZES[-1])
    value = np.repeat(255 * values[starts].astype(np.int64), parts)
    length = np.full(parts.sum(), 2 ** _SIZES[-1], np.int64)
    length[np.cumsum(parts) - 1] = lengths - (parts - 1) * 2 ** _SIZES[-1]

    # Each run takes the smallest size that holds its length less one.
    size = np.searchsorted([2**bits for bits in _SIZES], length)
    bits = np.array(_SIZES)[size]
    codes = ((4 + size) << (bits + _WORD)) | ((length - 1) << _WORD) | value
    header = [(4 * values.size, 32), (_WORD - 1, 5), *((bits - 1, 4) for bits in _SIZES)]
    head, widths = (np.array(part, np.int64) for part in zip(*header, strict=True))
    packed = np.packbits(np.concatenate([_bits(head, widths), _bits(codes, 3 + bits + _WORD)]))
    return packed.tolist()


def _bits(numbers: Int[np.ndarray, " n"], widths: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " m"]:
    """The lowest `widths` bits of each number, one after the other, the highest first."""
    place = np.arange(int(widths.max()))
    shift = widths[:, None] - 1 - place
    return ((numbers[:, None] >> np.maximum(shift, 0)) & 1).astype(bool)[shift >= 0]


KINDS: dict[str, Callable[[Sequence[Content]], Any]] = {
    "coco": coco_of,
    "label_studio": label_studio_of,
}
