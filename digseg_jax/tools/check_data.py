# SPDX-License-Identifier: Apache-2.0
"""Comparison of a download with its spec.

    python -m digseg_jax.tools.check_data --dataset=NAME --root=DIR

Opens the splits as a run opens them, prepared shards included. Reads every image and label and compares
their number with the official one; finds labels of another size, unknown label values and unreadable
files; prints pixel shares of the classes and draws a contact sheet. The exit status is 1 if something
is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from digseg_jax.config.schema import PartConfig
from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.decode import LabelValueError, SizeError
from digseg_jax.data.datasets.judgment import judge
from digseg_jax.data.datasets.spec import DatasetSpec
from digseg_jax.data.datasets.splits import split_called
from digseg_jax.data.sources import open_fresh, spec_of
from digseg_jax.errors import UserError
from digseg_jax.io.storage import as_path, explained
from digseg_jax.runtime.door import run_tool
from digseg_jax.tools.contact_sheet import Tile, contact_sheet

_KINDS = ("unreadable", "size_mismatch", "unknown_value")  # of broken examples
_SUBSET = (
    "the data's own list names {count} of the official {official} examples: scores on them are not "
    "comparable with published ones"
)
TEST = "test"
_NO_VAL = f"there is no val: have this split scored by --config.eval.split={TEST}"
_SHEETS = (".png", ".jpg", ".jpeg")  # endings of contact sheets
_SHOWN = 20  # messages kept per kind


def kind_of(error: UserError) -> str:
    """The kind, one of _KINDS, that an example's error belongs to."""
    if isinstance(error, SizeError):
        return "size_mismatch"
    return "unknown_value" if isinstance(error, LabelValueError) else "unreadable"


def check_split(
    spec: DatasetSpec,
    source: registry.Source,
    split: str,
    *,
    limit: int = 0,
    sheet: int = 0,
    seen: dict[bytes, str] | None = None,
) -> tuple[dict[str, Any], list[Tile]]:
    """Reads a split's examples, or `limit` of them evenly spread; returns findings and tiles to show.

    sheet: number of tiles. seen: checksum of each image that was read so far -> its split; receives
    those of this split.
    """
    listed = getattr(source, "listed_as", "") or split
    count, official = len(source), spec.splits.get(listed, 0)
    chosen = np.arange(count)
    if 0 < limit < count:
        chosen = np.linspace(0, count - 1, limit).round().astype(int)
    shown = set(chosen[np.linspace(0, len(chosen) - 1, min(sheet, len(chosen))).astype(int)])

    # Counts over all examples that can be read.
    pixels = np.zeros(spec.num_classes + 1, np.int64)  # the last one: ignored
    images = np.zeros(spec.num_classes, np.int64)
    errors: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    counts = dict.fromkeys(_KINDS, 0)
    tiles: list[Tile] = []
    seen = {} if seen is None or split in spec.extra_splits else seen
    elsewhere: list[tuple[str, str]] = []  # split and name of images that another split has too

    # Only the first messages of a kind are kept, as a wrong folder makes one per file; all are counted.
    for index, example in _examples(source, chosen.tolist()):
        if isinstance(example, UserError):
            kind = kind_of(example)
            counts[kind] += 1
            errors[kind] += [str(example)] if len(errors[kind]) < _SHOWN else []
            continue

        image = np.ascontiguousarray(example["image"])
        digest = hashlib.blake2b(image.data, digest_size=16).digest()
        if (other := seen.setdefault(digest, split)) != split:
            elsewhere.append((other, str(example["name"])))

        # Shifted by one: ignored pixels (-1) are the first entry here, and the last in `pixels`.
        found = np.bincount(example["label"].ravel() + 1, minlength=spec.num_classes + 1)
        pixels += np.roll(found, -1)
        images += found[1:] > 0
        if index in shown:
            tiles.append(Tile(example["image"], example["label"], f"{split} {example['name']}"))

    # Fewer than officially: a download that is not complete, or a subset that says so itself.
    subset = getattr(source, "own_list", False) and count < official
    notes = [_SUBSET.format(count=count, official=official)] if subset else []
    if elsewhere:
        other, name = elsewhere[0]
        notes.append(f"{other} has {len(elsewhere)} of these images as well, such as {name}")

    # What the counts say; of a part of the split only the notes are sure.
    findings = judge(spec, pixels[:-1], int(pixels[-1]), len(chosen) - sum(counts.values()))
    used = split in (spec.train_split, spec.eval_split) and len(chosen) == count
    wrong = [f.text for f in findings if f.wrong and used]

    # JSON-ready.
    total = max(int(pixels.sum()), 1)
    return {
        "count": count,
        "official_count": official or None,
        "subset": subset,
        "read": len(chosen),
        **{f"{kind}_files": counts[kind] for kind in _KINDS},
        "errors": {kind: messages for kind, messages in errors.items() if messages},
        "pixel_share": dict(zip(spec.names, (pixels[:-1] / total).tolist(), strict=True)),
        "ignored_share": float(pixels[-1] / total),
        "images_with_class": dict(zip(spec.names, images.tolist(), strict=True)),
        "pointless": wrong if not sum(counts.values()) else [],
        "notes": notes + [f.text for f in findings if f.text not in wrong],
    }, tiles


def _examples(source: registry.Source, chosen: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Reads examples with a few threads, in order: (index, example or its error).

    Threads help, as decoding releases the GIL.
    """

    def read(index: int) -> Any:
        """The example, or the UserError that names its file."""
        try:
            return source[int(index)]
        except UserError as error:
            return error

    workers = os.cpu_count() or 1
    chosen = list(chosen)
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(chosen), 8 * workers):  # bounded: examples wait in memory
            part = chosen[start : start + 8 * workers]
            yield from zip(part, pool.map(read, part), strict=True)


def violations(name: str, findings: dict[str, Any]) -> list[str]:
    """What is wrong with a split, one line per finding."""
    if "error" in findings:
        return [f"{name}: {findings['error']}"]

    lines = []
    count, official = findings["count"], findings["official_count"]
    if official and count != official and not findings["subset"]:
        lines.append(f"{name}: {count} examples, officially {official}")

    # One line for each kind of broken example, with the first message.
    words = {"unreadable": "unreadable", "size_mismatch": "label size is not the image's",
             "unknown_value": "unknown label values"}  # fmt: skip
    for kind, text in words.items():
        if findings[f"{kind}_files"]:
            first = findings["errors"][kind][0]
            lines.append(f"{name}: {findings[f'{kind}_files']} files, {text}; the first: {first}")
    return lines + [f"{name}: {text}" for text in findings["pointless"]]


def run(
    name: str, root: str | Path, splits: list[str], *, limit: int, sheet: Path | None
) -> dict[str, Any]:
    """Checks splits (all but the extra ones if none is named) and writes the contact sheet.

    Raises:
      UserError: no such data set.
    """
    part = PartConfig(name, str(root))
    spec = spec_of(part)
    results: dict[str, Any] = {}
    tiles: list[Tile] = []
    seen: dict[bytes, str] = {}

    # By default also the two splits that a run opens at its start, whether they are there or not.
    splits = [split_called(s, spec.splits) for s in splits]
    every = [s for s in spec.splits if s not in spec.extra_splits]
    for split in splits or dict.fromkeys((*every, spec.train_split, spec.eval_split)):
        # Opened as a run opens it: what that refuses is a finding, and the others are checked.
        try:
            source = open_fresh(part, split)
        except UserError as error:
            results[split] = {"error": str(error)}
            continue
        results[split], shown = check_split(
            spec, source, split, limit=limit, sheet=8 if sheet else 0, seen=seen
        )
        tiles += shown

    # Recipes for a user's own data score val.
    if name == "folder" and spec.eval_split == TEST and "notes" in results.get(TEST, {}):
        results[TEST]["notes"].append(_NO_VAL)

    # Without the sheet the findings are still worth hours of reading.
    problem = ""
    if sheet and tiles:
        try:
            with explained(sheet, "cannot write it"):
                contact_sheet(spec, tiles).save(sheet)
        except UserError as error:
            problem = str(error)
    return {
        "dataset": name,
        "title": spec.title,
        "root": str(root),
        "license": spec.license,
        "ignore_rule": spec.ignore,
        "splits": results,
        "contact_sheet": str(sheet) if sheet and tiles and not problem else None,
        "violations": [v for s, found in results.items() for v in violations(s, found)]
        + [problem] * bool(problem),
    }


def text(result: dict[str, Any]) -> str:
    """The result as text for people."""
    lines = [f"{result['dataset']}: {result['title']}", f"license: {result['license']}"]
    for split, found in result["splits"].items():
        if "error" in found:
            continue
        official = found["official_count"]
        beside = f" (official: {official})" if official else ""
        lines.append(f"{split}: {found['count']} examples{beside}, {found['read']} read")

        # Classes by their share of the pixels, largest first.
        shares = {**found["pixel_share"], "ignored": found["ignored_share"]}
        ranked = sorted(shares.items(), key=lambda item: -item[1])
        lines += [f"  {100 * share:7.3f} %  {name}" for name, share in ranked if share > 0]
        lines += [f"  {note}" for note in found["notes"]]

    # The verdict comes last, where a terminal shows it.
    if result["contact_sheet"]:
        lines.append(f"contact sheet: {result['contact_sheet']}")
    lines += [f"WRONG  {line}" for line in result["violations"]] or ["nothing is wrong"]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m digseg_jax.tools.check_data", description=__doc__)
    parser.add_argument("--dataset", required=True, help=", ".join(registry.names()))
    parser.add_argument("--root", default="", help="the folder of the download, as it unpacks")
    parser.add_argument(
        "--split", action="append", default=[], help="may be repeated; default: all but the extra ones"
    )
    parser.add_argument("--limit", type=int, default=0, help="read only this many images of each split")
    parser.add_argument("--sheet", type=Path, help="contact sheet; default: NAME_check.png; '-': none")
    parser.add_argument("--json", action="store_true", help="print JSON alone on stdout")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; exit status 0: nothing wrong, 1: something wrong, 2: not checked."""
    arguments = _parser().parse_args(argv)
    flags.FLAGS.mark_as_parsed()
    return run_tool(partial(_run, arguments))


def _run(arguments: argparse.Namespace) -> int:
    """Checks and prints what the options name; returns the exit status."""
    if arguments.limit < 0:
        raise UserError(f"--limit={arguments.limit}: must be at least 0 (all images)")
    place = arguments.sheet or f"{arguments.dataset}_check.png"
    sheet = None if str(place) == "-" else Path(as_path(place))

    # Hours of reading come before it is drawn.
    if sheet and sheet.suffix.lower() not in _SHEETS:
        raise UserError(f"--sheet={place}: must end in {' or '.join(_SHEETS)}, or be - for none")
    if sheet and not sheet.parent.is_dir():
        raise UserError(f"--sheet={place}: no such folder {sheet.parent}")
    if sheet and not os.access(sheet.parent, os.W_OK):
        raise UserError(f"--sheet={place}: {sheet.parent} is not yours to write in; - for no sheet")
    result = run(arguments.dataset, arguments.root, arguments.split, limit=arguments.limit, sheet=sheet)
    print(json.dumps(result) if arguments.json else text(result))
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
