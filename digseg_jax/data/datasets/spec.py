# SPDX-License-Identifier: Apache-2.0
"""Description of a data set: classes, splits, ignore rule, prompts and the rules of its scores.

A spec holds no code that reads files; that is in `readers/`. Class lists are JSON files in `classes/`,
one class per line: name, synonyms, the values that mean it in the official label files, and the
official color.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from digseg_jax.errors import UserError, nearest

Color = tuple[int, int, int]  # RGB, 0..255
IGNORE = -1  # the one ignore label of every int32 label map in this package


@dataclasses.dataclass(frozen=True)
class ClassInfo:
    """A class; its id is its place in `DatasetSpec.classes`.

    Attributes:
      name: the word that it is asked for by.
      synonyms: other words for it; none is a name or synonym of another class of the data set.
      raw: values of the official label file that mean it; empty where the label is no index image.
      color: RGB, official or None; official colors are not always distinct.
      full_name: the official list of synonyms where `name` had to be shortened or disambiguated.
      covers: ids whose pixels belong to its mask, several where classes are nested; empty: its own id.
    """

    name: str
    synonyms: tuple[str, ...] = ()
    raw: tuple[int, ...] = ()
    color: Color | None = None
    full_name: str = ""
    covers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """Description of a data set, without its examples.

    Attributes:
      name: what config.data.name calls it.
      title: full name, for reports.
      classes: in the order of their ids.
      splits: official number of labeled images by split; 0 where only the user knows it.
      extra_splits: splits that overlap others, or that a usual download lacks; `check_data` reads them
        only when they are asked for.
      train_split, eval_split: the splits that the paper's tables (or the field) use.
      ignored_raw: values of the label file that become -1; any value not listed anywhere is an error,
        except where `ignore` says otherwise.
      ignore: the ignore rule in words.
      template: prompt of a class in training, with {} for its name.
      caption: description of an image, with {} for its classes.
      license: what the user has to know before using the data; the data themselves are not shipped.
      undivided: the images come without splits, so that the reader splits them.
      from_package: the data come with Python packages, so the user names no folder.
      metric: "miou" over all classes, "foreground" (IoU, precision, recall, F1 of the last class) or
        "region_dice" (Dice of each class's region, per image, then the mean over images).
      absent: how a class without ground truth enters the mean: "mmseg" (0 if predicted, else left out),
        "detectron2" (left out) or "official" (always counted).
      inference: how an image is shown to the network: "window", in overlapping views of the trained
        scale, or "whole", squeezed into one view, as segmenters of 512 x 512 pixels are tested.
    """

    name: str
    title: str
    classes: tuple[ClassInfo, ...]
    splits: Mapping[str, int]
    ignore: str
    license: str
    ignored_raw: tuple[int, ...] = ()
    extra_splits: tuple[str, ...] = ()
    train_split: str = "train"
    eval_split: str = "val"
    template: str = "{}"
    caption: str = "image of {}"
    metric: str = "miou"
    absent: str = "mmseg"
    inference: str = "window"
    undivided: bool = False
    from_package: bool = False

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in the order of their ids."""
        return tuple(c.name for c in self.classes)

    @property
    def colors(self) -> tuple[Color | None, ...]:
        """Official colors in the order of the classes' ids; None for a class without."""
        return tuple(c.color for c in self.classes)

    def covers(self, class_id: int) -> tuple[int, ...]:
        """Ids whose pixels belong to the mask of a class: its own, and those of nested classes."""
        return self.classes[class_id].covers or (class_id,)


def load_classes(name: str) -> dict[str, Any]:
    """Reads `classes` and `ignored_raw` of a shipped list, as keyword arguments of DatasetSpec."""
    file = resources.files(__package__) / "classes" / f"{name}.json"
    listed = json.loads(file.read_text(encoding="utf-8"))
    classes = [_class_info(row) for row in listed["classes"]]
    return {
        "classes": unambiguous(classes),
        "ignored_raw": tuple(listed.get("ignored_raw", ())),
    }


def shipped_list(name: str) -> list[str]:
    """Names of a split's examples, where the split is defined only by the lists of other projects."""
    return (resources.files(__package__) / "classes" / f"{name}.txt").read_text("ascii").split()


def unambiguous(classes: list[ClassInfo]) -> tuple[ClassInfo, ...]:
    """Drops synonyms that also mean another class: for such a query, two masks would be right."""
    names = Counter(c.name.lower() for c in classes)
    synonyms = Counter(s.lower() for c in classes for s in {*c.synonyms})

    # A class that lists one synonym twice does not contradict itself: count it once.
    def own(synonym: str) -> bool:
        """True if no other class has this name or synonym."""
        return names[synonym.lower()] == 0 and synonyms[synonym.lower()] == 1

    return tuple(
        dataclasses.replace(c, synonyms=tuple(s for s in c.synonyms if own(s))) for c in classes
    )


def with_synonyms(spec: DatasetSpec, lines: Iterable[str]) -> DatasetSpec:
    """Adds synonyms to classes; what a class has already is not repeated.

    lines: as in a class list, "road, street, lane": the name of a class, then other words for it.

    Raises:
      UserError: the data set has no such class, or the word means another one of its classes.
    """
    classes = {c.name: c for c in spec.classes}
    for line in lines:
        name, *words = (word.strip() for word in line.split(","))
        if name not in classes:
            raise UserError(
                f"synonyms {line!r}: {spec.name} has no class {name!r}{nearest(name, classes)}"
            )

        # A word that means two classes would make two masks right.
        for other in classes.values():
            known = {text.lower() for text in (other.name, *other.synonyms)}
            if other.name != name and (taken := [word for word in words if word.lower() in known]):
                raise UserError(
                    f"synonyms {line!r}: {taken[0]!r} already means {other.name!r} in {spec.name}"
                )
        texts = dict.fromkeys((*classes[name].synonyms, *filter(None, words)))
        classes[name] = dataclasses.replace(classes[name], synonyms=tuple(texts))
    return dataclasses.replace(spec, classes=tuple(classes.values()))


def _class_info(row: dict[str, Any]) -> ClassInfo:
    """A class from its row of the JSON file."""
    return ClassInfo(
        name=row["name"],
        synonyms=tuple(row["synonyms"]),
        raw=tuple(row["raw"]),
        color=tuple(row["color"]) if "color" in row else None,
        full_name=row.get("full_name", row["name"]),
        covers=tuple(row.get("covers", ())),
    )
