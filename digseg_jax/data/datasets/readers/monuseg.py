# SPDX-License-Identifier: Apache-2.0
"""Reads MoNuSeg: TIFF images with Aperio ImageScope XML; the label is the union of all regions.

Coordinates are taken as they are, with the pixel-center rule of `polygons`. (The challenge's MATLAB
converter counts pixels from 1, which puts its masks one pixel up and left of these.)
"""

from __future__ import annotations

from pathlib import Path
from xml.parsers import expat

import numpy as np

from digseg_jax.data.datasets.pairs import FileSource, pair_up, pick, walk_files
from digseg_jax.data.datasets.readers import polygons
from digseg_jax.data.datasets.spec import DatasetSpec, shipped_list
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError, read_bytes

MAX_VERTICES = 5_000_000  # a file here has some ten thousand
MAX_COORDINATE = 1e6  # pixels


class NucleusLabels:
    """Painter of nuclei: 1 inside any Region of any Annotation, else 0.

    Regions of fewer than three vertices have no inside.
    """

    def __call__(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """Ids, int32 [h, w], for an image of `size` (height, width)."""
        mask = np.zeros(size, bool)
        for points in regions(path):
            if len(points) >= 3:
                polygons.fill(mask, points)
        return mask.astype(np.int32)


def regions(path: Path) -> list[np.ndarray]:
    """Vertices of every Region, each float [n, 2] as (x, y) in pixels.

    Raises:
      UnreadableError: other XML, no region, or a document type. The format needs no entities, so files
        that could declare some are rejected.
    """
    found: list[list[tuple[float, float]]] = []
    total = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        """Handles an opening tag: a new region, or a vertex of the last one."""
        nonlocal total
        if tag == "Region":
            found.append([])
        elif tag == "Vertex":
            total += 1

            x, y = float(attributes["X"]), float(attributes["Y"])
            if total > MAX_VERTICES or not (
                abs(x) <= MAX_COORDINATE and abs(y) <= MAX_COORDINATE  # each: nan satisfies neither
            ):
                raise ValueError(f"vertex {total} at ({x}, {y}) is beyond what is read")
            found[-1].append((x, y))

    def refuse(*_: object) -> None:
        """Stops the parser at a document type: entities could expand without end."""
        raise ValueError("declares a document type, which is refused")

    # A streaming parser: limits apply before anything large has been built.
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.StartDoctypeDeclHandler = start, refuse
    try:
        parser.Parse(read_bytes(path), True)
    except (expat.ExpatError, ValueError, KeyError, IndexError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UnreadableError(f"{path}: not an ImageScope annotation: {error}") from error
    if not found:
        raise UnreadableError(f"{path}: holds no Region")
    return [np.array(points, np.float64).reshape(-1, 2) for points in found]


def open_monuseg(spec: DatasetSpec, root: Path, split: str) -> FileSource:
    """Opens TIFF and XML files by name, wherever the archives put them; splits are lists of names.

    Raises:
      UserError: a name that occurs twice, or a listed file that is missing.
    """
    what = f"{spec.name} {split}"
    images: dict[str, str] = {}
    labels: dict[str, str] = {}

    # Pair by stem: images and annotations come in several archives.
    for file in walk_files(root, (".tif", ".tiff", ".xml")):
        side = labels if file.suffix.lower() == ".xml" else images
        if file.stem in side:
            raise UserError(f"{what}: found both {side[file.stem]} and {file} under {root}; keep one")
        side[file.stem] = str(file)

    # train: the 30 images of Kumar et al. 2017 that the challenge had; the archive holds 7 more.
    if split == "train_37":
        stems = sorted((images.keys() | labels.keys()) - set(shipped_list("monuseg_test")))
    else:
        stems = shipped_list(f"monuseg_{split}")
    images, labels = (pick(side, stems, root, what) for side in (images, labels))
    return FileSource(root, pair_up(root, images, labels, what), NucleusLabels())
