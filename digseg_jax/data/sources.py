# SPDX-License-Identifier: Apache-2.0
"""Opens the configured data sets: downloads, prepared shards, TFDS data sets, and mixtures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.config.schema import DataConfig, EvalConfig, PartConfig
from digseg_jax.data.checked import Guarded
from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.judgment import judge
from digseg_jax.data.datasets.pairs import FileSource
from digseg_jax.data.datasets.readers.folder import IMAGES
from digseg_jax.data.datasets.registry import Source
from digseg_jax.data.datasets.spec import DatasetSpec, with_synonyms
from digseg_jax.data.datasets.splits import split_called
from digseg_jax.data.datasets.statistics import SAMPLE, ClassStatistics, sampled
from digseg_jax.data.shards import records
from digseg_jax.data.shards.fingerprint import StaleShards, check_unchanged
from digseg_jax.errors import Transient, UserError
from digseg_jax.io.storage import is_remote
from digseg_jax.log import log

HELD_OUT = "held_out"  # split of the training images that a mixture's part keeps aside


def parts_of(config: DataConfig) -> tuple[PartConfig, ...]:
    """Data sets that training draws from; a single one of weight 1 if there is no mixture.

    A part's folder is looked for below config.root; the root that comes back is a path.

    Raises:
      UserError: parts have folders, and config.root is not set.
    """
    if not config.mixture:
        return (PartConfig(config.name, config.root, split=config.split),)

    below = [part.folder for part in config.mixture if part.folder and not part.root]
    if below and not config.root:
        more = f" and {len(below) - 1} more" if len(below) > 1 else ""
        raise UserError(f"config.data.root is not set: name the folder that holds {below[0]}{more}")
    return tuple(
        dataclasses.replace(part, root=os.path.join(os.path.expanduser(config.root), part.folder))
        if part.folder and not part.root
        else part
        for part in config.mixture
    )


def scored_part(config: DataConfig) -> PartConfig:
    """The data set that a run's own evaluations score: config.name, in config.root.

    Of a mixture of that data set alone it is the part itself: its folder below config.root, with the
    classes that nobody asks for, the images that are held out, and the scale of its crops.

    Raises:
      UserError: as for `parts_of`.
    """
    if [part.name for part in config.mixture] == [config.name]:
        (part,) = parts_of(config)
        if config.mixture[0].root in ("", config.root):  # else another folder is to be scored
            return dataclasses.replace(part, root=part.root or config.root)
    return PartConfig(config.name, config.root)


def title_of(part: PartConfig) -> str:
    """Name of a part's data set for a person: several parts may be folders of the user's own."""
    place = part.folder or os.path.basename(os.path.normpath(part.root))
    return f"{part.name} {place}" if part.name == "folder" else part.name


def labels_of(parts: Sequence[PartConfig]) -> tuple[str, ...]:
    """A name for each part of a mixture in logs: its folder or data set, numbered if that repeats."""
    names = [part.folder or part.name for part in parts]
    return tuple(name if names.count(name) == 1 else f"{name}_{k}" for k, name in enumerate(names))


def spec_of(part: PartConfig) -> DatasetSpec:
    """Spec of a data set, with the part's own synonyms.

    Raises:
      UserError: no such data set, or synonyms for a class that it lacks.
    """
    # Shards of a user's own folder carry its class list; the folder itself may be elsewhere.
    stored = records.stored_spec(part.root) if part.name == "folder" else None
    found = stored or registry.spec(part.name, part.root)
    return with_synonyms(found, part.synonyms) if part.synonyms else found


def is_asked(part: PartConfig, name: str) -> bool:
    """Whether a class is asked for by name; capitals do not count."""
    return name.lower() not in {unasked.lower() for unasked in part.unasked}


def training_parts(config: DataConfig) -> list[tuple[PartConfig, DatasetSpec, str]]:
    """Data sets that training draws from, each with its spec and the name of its split.

    Raises:
      UserError: no such data set.
    """
    specs = [(part, spec_of(part)) for part in parts_of(config)]
    return [(part, facts, part.split or facts.train_split) for part, facts in specs]


def training_examples(config: DataConfig, *, by_class: bool = True) -> dict[str, list[Any]]:
    """What the drawing of each part's examples depends on, JSON-ready: number, names, class counts.

    A run draws examples by their number and queries by the classes' frequencies, so with others it
    would continue in another order. Of the names and of the counts there is a digest: "" where examples
    are not files of their own, and where the counts are of a sample or do not matter. Latent caches,
    which have their own checks, are left out.

    by_class: whether the counts matter.

    Raises:
      UserError: no such data set, split or folder.
    """
    found: dict[str, list[Any]] = {}
    parts = [] if config.latent_cache else training_parts(config)
    for label, (part, _, split) in zip(labels_of([p for p, _, _ in parts]), parts, strict=True):
        source = open_part(part, split)
        names = "\n".join(pair.name for pair in getattr(source, "pairs", ()))

        # Of a small data set the sample is all that there is.
        counts = ""
        if by_class and isinstance(source, records.RecordSource) and len(source) > SAMPLE:
            counts = _digest(json.dumps(source.statistics().to_dict()))
        found[label] = [len(source), names and _digest(names), counts]
    return found


def _digest(text: str) -> str:
    """Sixteen hexadecimal digits that tell texts, file names among them, from one another."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()[:16]


def open_dataset(name: str, root: str = "", split: str = "") -> Source:
    """Opens a split of a data set; nothing is decoded until an example is asked for.

    Args:
      name: one of `digseg_jax.dataset_names()`, or tfds:NAME.
      root: the download as it unpacks, or prepared shards, on a disk or on gs://; the land cover needs
        none.
      split: by default the one that is evaluated.

    Returns:
      A sequence of {"image" uint8 [h, w, 3], "label" int32 [h, w] (-1: ignored), "name"}.

    Raises:
      UserError: no such data set, split or folder.

    Example:
        >>> dj.open_dataset("landcover", split="test")[0]["image"].dtype
        dtype('uint8')
    """
    part = PartConfig(name, root)
    return open_part(part, split or spec_of(part).eval_split)


class Rows:
    """Some examples of single files, in the order of their source."""

    def __init__(self, source: FileSource, rows: Sequence[int]):
        self.source, self.rows = source, tuple(rows)
        self.image_is_file = source.image_is_file
        self.pairs = tuple(source.pairs[row] for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.rows[index]]

    def files(self, index: int) -> dict[str, Path]:
        return self.source.files(self.rows[index])


def open_part(part: PartConfig, split: str, *, narrow: bool = False) -> Source:
    """Opens the examples of a split; a root that holds prepared shards of the split is read as such.

    What a part with `held_out` trains on lacks the images that it names; the split HELD_OUT has them
    alone.

    narrow: shards give labels of the narrowest type, see `RecordSource`.

    Raises:
      UserError: no such data set, split or folder, or nothing is left of the split.
    """
    train = ""
    if part.held_out:  # a split may be called by another name, and capitals do not count
        facts = spec_of(part)
        train, named = (split_called(s, facts.splits) for s in (part.split or facts.train_split, split))
        split = train if named == train else split
    if not part.held_out or split not in (HELD_OUT, train):
        whole = _open_whole(part, split, narrow)
        if not len(whole):  # an export that lists no image, or shards from which all were left out
            raise UserError(f"{title_of(part)} {split}: no example in {part.root}")
        return whole

    # Shards hold many images in a file: only single files have names of their own.
    source = _open_whole(part, train, narrow)
    if not isinstance(source, FileSource):
        raise UserError(f"{part.root}: config.data.mixture's held_out needs single files, not shards")
    kept_out = [bool(re.search(part.held_out, pair.name)) for pair in source.pairs]
    rows = [i for i, is_kept_out in enumerate(kept_out) if is_kept_out == (split == HELD_OUT)]
    if not rows:
        raise UserError(f"{part.root}: held_out={part.held_out!r} leaves no image in {split!r}")
    return Rows(source, rows)


def _open_whole(part: PartConfig, split: str, narrow: bool) -> Source:
    """Opens all examples of a split of the data set itself; see `open_part`."""
    if part.name.startswith(registry.TFDS):
        return registry.open_source(part.name, part.root, split)

    # Shards go first: they are faster than the download's files, which may lie beside them.
    prepared = records.prepared_splits(part.root)
    split = split_called(split, prepared)
    if records.is_prepared(part.root, split):
        return records.RecordSource(part.root, split, spec_of(part), narrow=narrow)

    # Shards of other splits only, or a bucket, where downloads are
    # not read: say how to make shards.
    if prepared:
        raise UserError(
            f"{part.root}: shards of {', '.join(prepared)} only; digseg_jax.tools.prepare_data "
            f"--split={split} makes those of {split!r}"
        )
    if part.root.startswith("gs://"):
        raise UserError(f"{part.root}: no shards here; digseg_jax.tools.prepare_data makes them")
    return registry.open_source(part.name, part.root, split)


def statistics_of(source: Source, guarded: Guarded) -> ClassStatistics:
    """Class statistics of a training split, for drawing queries.

    Prepared data sets carry them; for others a sample of examples is read (through the guard).
    """
    if isinstance(source, records.RecordSource):
        return source.statistics()
    return sampled(guarded, guarded.num_classes)


def check_labels(
    spec: DatasetSpec, title: str, split: str, statistics: ClassStatistics, count: int
) -> None:
    """Logs what is odd about the labels of a training split; see `judge`.

    Args:
      spec: the data set's classes and ignore rule.
      title: what the data set is called in the log.
      split: name of the split.
      statistics: what was counted in all or some of its labels.
      count: number of the split's examples.

    Raises:
      UserError: a run on them would be pointless.
    """
    # A sample may lack what the rest shows, so its findings are warnings only.
    whole = statistics.examples == count
    for finding in judge(spec, statistics.pixels, statistics.ignored, statistics.examples):
        text = f"{title} {split}: {finding.text}"
        if finding.wrong and whole:
            raise UserError(text)
        log.warning("%s%s", text, "" if whole else f" (of {count})")


def check_training_data(data: DataConfig) -> None:
    """Opens every data set that is trained on, before anything expensive is loaded.

    Raises:
      UserError: no such data set, split or folder, one class alone, or shards that are older than the
        files beside them.
    """
    for part, facts, split in training_parts(data):
        _check_classes(facts)
        if not data.latent_cache:  # a cache replaces the images and labels
            open_fresh(part, split)


def check_scored_splits(
    data: DataConfig, evaluation: EvalConfig, *, while_training: bool = False, chosen_by: str = ""
) -> None:
    """Opens every split that a run evaluates, before anything expensive is loaded.

    while_training: also during the training. chosen_by: see `validation_split`.

    Raises:
      UserError: as for `check_training_data`.
    """
    part = scored_part(data)
    facts = spec_of(part)
    _check_classes(facts)
    splits: list[str] = [evaluation.split]
    splits += [evaluation.calibrate_split] if evaluation.calibrate else []
    splits += [validation_split(data, evaluation.split, chosen_by)] if while_training else []
    for split in dict.fromkeys(splits):
        open_fresh(part, split)
    if facts.undivided:
        log.info("data: %s", facts.title)


def open_fresh(part: PartConfig, split: str) -> Source:
    """Opens a split as `open_part` does, but no shards that are older than the files beside them.

    Raises:
      StaleShards: a file was changed, added or removed since, or the list of classes: the shards hold
        the old labels.
      UserError: no such data set, split or folder.
    """
    shards = open_part(part, split)
    if not isinstance(shards, records.RecordSource):
        return shards
    split = shards.folder.name
    title = f"{title_of(part)} {split}: the shards in {shards.folder} are read instead of its files"
    try:
        files = registry.open_source(part.name, part.root, split)
    except Transient:
        raise
    except UserError as error:
        if _has_own_files(part, split):
            raise StaleShards(
                f"{title}, and cannot be compared with them: {error}; put that right, or move the "
                "files away"
            ) from error
        return shards  # nothing but shards there

    root = shlex.quote(part.root)
    renewal = (
        f"renew them: python -m digseg_jax.tools.prepare_data --dataset={part.name} --root={root} "
        f"--out={root} --split={split} --renew"
    )
    # A class list of the user's own may name or number the classes otherwise since.
    facts = registry.spec(part.name, part.root)
    if not records.has_classes_of(shards.manifest, facts):
        raise StaleShards(f"{title}: its classes have other names or values now; {renewal}")

    # Files of a package are as new as its installation, whatever is in them.
    manifest = shards.folder / records.MANIFEST
    check_unchanged(files, shards.manifest, manifest, title, renewal, times=not facts.from_package)
    return shards


def _has_own_files(part: PartConfig, split: str) -> bool:
    """Whether a user's own folder has files of a split beside its shards, readable or not."""
    if part.name != "folder" or is_remote(part.root):
        return False
    try:
        return split in registry.spec(part.name, part.root).splits
    except UserError:  # such as a list of classes that cannot be read; or there are shards alone
        root = Path(part.root)
        folders = (*root.glob("*"), *root.glob("*/*"))  # images/SPLIT, or SPLIT/images
        return any(place.name.lower() in IMAGES and place.is_dir() for place in folders)


def validation_split(data: DataConfig, scored: str, chosen_by: str = "") -> str:
    """Chooses the split of the evaluations during training: val, or the scored one without a val.

    scored: the split of the final evaluation. chosen_by: the metric that chooses the exported weights;
    "" if they are the last ones.

    Raises:
      UserError: there is no val, and the best checkpoint would be chosen on the scored split.
    """
    part = scored_part(data)
    try:
        open_part(part, "val")
    except Transient:
        raise
    except UserError as error:
        # One that is there, but cannot be read, is not replaced in silence.
        if _has_own_files(part, "val"):
            raise

        # The scored split may be looked at, but must not choose the weights that are scored on it.
        if chosen_by:
            raise UserError(
                f"config.checkpoint.best={chosen_by!r}: without val it would be chosen on "
                f"the scored split ({error})"
            ) from error
        log.info("no val (%s): evaluations during the training look at %r", error, scored)
        return scored
    return "val"


def _check_classes(facts: DatasetSpec) -> None:
    """Raises UserError for a single class: a query needs something to separate it from."""
    if facts.num_classes == 1:
        (finding,) = judge(facts, np.ones(1, int), 0, 1)
        raise UserError(f"{facts.name}: {finding.text}")
