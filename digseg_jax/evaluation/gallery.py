# SPDX-License-Identifier: Apache-2.0
"""Images that an evaluation's gallery shows: their choice, and their masks until it is written."""

from __future__ import annotations

import io

import cv2
import numpy as np

from digseg_jax.evaluation.counts import Counted, covers_matrix
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.evaluation.scores import Scores
from digseg_jax.io.storage import AnyPath, explained, filled_locally, write_bytes
from digseg_jax.metrics import confusion
from digseg_jax.runtime.distributed import barrier, is_main, together
from digseg_jax.segmentation.resize import resize_image
from digseg_jax.viz.colors import class_colors
from digseg_jax.viz.gallery import GalleryItem, write_gallery

IMAGES = 24  # images shown in a report
EXTREMES = 3  # number of worst, of best and of typical images; the former are shown beside the spread
LONGEST = 1024  # longer side of a shown image, pixels


class Shown:
    """Images to show: some spread evenly over the split, and the worst and the best so far.

    The choice depends only on the order and the scores of the images, so a resumed run and any number
    of processes choose the same ones. Masks of a chosen image go to `folder` at once.

    Args:
      count: images to show; 0 shows none.
      total: images of the split.
      folder: scratch folder for the masks, of all processes; None keeps none.
      extremes: most of the worst and of the best images; with 0 the choice does not follow the scores.
    """

    def __init__(self, count: int, total: int, folder: AnyPath | None, *, extremes: int = EXTREMES):
        count = min(count, total)
        self.extremes = min(extremes, count // 4)  # at most half of the places go to the extremes
        spread = count - 2 * self.extremes
        self.spread = {i * total // spread for i in range(spread)} if spread else set()
        self.folder = folder
        self.scores: dict[int, float] = {}

    @property
    def wanted(self) -> bool:
        """Whether any image is shown."""
        return bool(self.spread)

    def offer(self, image: int, score: float, counted: Counted | None) -> None:
        """Records an image's score, and keeps its masks if it is to be shown.

        Args:
          score: `Scores.of_an_image`; nan for an image without labels, which is never an extreme.
          counted: counts with masks, on the process that has them; None elsewhere, and for an image
            that was counted before a kill.
        """
        if not np.isnan(score):
            self.scores[image] = score
        if counted is None or self.folder is None:
            return

        # Worst and best are known only so far: some masks are written that are not shown in the end.
        if image in self.spread or image in self.worst() + self.best():
            write_bytes(self.folder / f"{image}.npz", _packed(counted))

    def worst(self) -> list[int]:
        """Images of the lowest scores so far; ties go to the earlier image."""
        return sorted(self.scores, key=lambda i: (self.scores[i], i))[: self.extremes]

    def best(self) -> list[int]:
        """Images of the highest scores so far; ties go to the earlier image."""
        return sorted(self.scores, key=lambda i: (-self.scores[i], i))[: self.extremes]

    def typical(self) -> list[int]:
        """Images of the spread whose scores are nearest to the median; ties go to the earlier image."""
        # The median may move until the end, and only the masks of the spread are sure to be kept.
        known = sorted(self.spread & self.scores.keys())
        median = float(np.median(list(self.scores.values()))) if self.scores else 0.0
        return sorted(known, key=lambda i: abs(self.scores[i] - median))[: self.extremes]

    def final(self) -> tuple[list[int], dict[int, str]]:
        """Chosen images in the order of the split, and which of them are worst, typical or best."""
        # In a small split an image may be several; one of the worst counts as such.
        worst, best = self.worst(), self.best()
        kinds = {i: "typical" for i in self.typical()}
        kinds |= {i: "best" for i in best} | {i: "worst" for i in worst}
        return sorted(self.spread | set(worst) | set(best)), kinds

    def write(self, folder: AnyPath, examples: EvalExamples, scores: Scores) -> None:
        """Replaces the gallery in `folder`, once all images have been offered.

        Every process must call it; process 0 writes.
        """
        scratch = self.folder
        if scratch is None:
            return

        # Masks of the last images may still be on their way from other processes.
        barrier("the masks of a gallery")
        with together("a gallery"):
            if is_main():
                # An image that was counted before a kill may be an extreme only now, without masks.
                chosen, kinds = self.final()
                chosen = [i for i in chosen if (scratch / f"{i}.npz").exists()]
                items = (_item(i, examples, scores, scratch, kinds.get(i, "")) for i in chosen)
                colors = class_colors(len(examples.classes), examples.classes, examples.colors)

                # Many small files: filled on a local disk, then moved or uploaded as a whole.
                with filled_locally(folder, replace=True) as local:
                    write_gallery(local, items, examples.classes, colors)


def _packed(counted: Counted) -> bytes:
    """Prediction and masks as .npz bytes, reduced to the size at which they are shown."""
    height, width = counted.prediction.shape
    scale = min(1.0, LONGEST / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))

    # Class ids must not be mixed: nearest neighbor. Probabilities are averaged over the area.
    prediction = cv2.resize(counted.prediction.astype(np.int16), size, interpolation=cv2.INTER_NEAREST)
    masks = [
        cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA).astype(np.float16)
        for mask in counted.masks.values()
    ]
    data = io.BytesIO()
    np.savez_compressed(
        data,
        prediction=prediction,
        classes=np.array(list(counted.masks), np.int64),
        masks=np.stack(masks) if masks else np.zeros((0, size[1], size[0]), np.float16),
    )
    return data.getvalue()


def _item(
    image: int, examples: EvalExamples, scores: Scores, folder: AnyPath, kind: str
) -> GalleryItem:
    """Reads one image's kept masks and makes its gallery item, with IoU per query."""
    path = folder / f"{image}.npz"
    with explained(path, "cannot be read"):
        stored = np.load(io.BytesIO(path.read_bytes()))
    example = examples[image]

    # Bring the label to the size of the kept prediction.
    height, width = stored["prediction"].shape
    label = cv2.resize(
        example["label"].astype(np.int16), (width, height), interpolation=cv2.INTER_NEAREST
    )

    # Masks were kept in the order of the queries; show them in the order of the classes.
    order = np.argsort(stored["classes"])
    shown = [int(c) for c in stored["classes"][order]]

    # Scores come from the counts, which were made at the image's full resolution.
    row = Scores(examples, scores.protocol, (scores.rows[image],), scores.absent_rule)
    iou = confusion.query_iou(row.overlaps, row.areas, covers_matrix(examples))
    return GalleryItem(
        id=str(example["name"]),
        image=resize_image(example["image"], height, width),
        label=label.astype(np.int32),
        prediction=stored["prediction"].astype(np.int32),
        masks=stored["masks"][order].astype(np.float32),
        queries=[examples.classes[c] for c in shown],
        ious=[None if np.isnan(iou[c]) else float(iou[c]) for c in shown],
        miou=row.of_an_image,
        kind=kind,
    )
