# SPDX-License-Identifier: Apache-2.0
"""Build of WORKDIR/report/index.html from the files of a run: one static page, all in one file.

Script, style and images are inlined, so that the page opens from disk and can be passed on.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from digseg_jax.data.datasets.registry import title
from digseg_jax.errors import UserError
from digseg_jax.io import storage
from digseg_jax.io.json_file import read_json
from digseg_jax.io.metric_writer import METRICS_NAME, read_metrics
from digseg_jax.io.storage import AnyPath
from digseg_jax.log import log
from digseg_jax.report import sections
from digseg_jax.report.cards import gallery_cards
from digseg_jax.report.chart import training_charts
from digseg_jax.report.circumstances import circumstances
from digseg_jax.report.confusions import confusions
from digseg_jax.report.suites import suite_tables
from digseg_jax.viz.colors import class_colors, from_hex, to_hex
from digseg_jax.viz.templates import render

T = TypeVar("T")

# files and folders that a report reads, beside eval/suite_*.json
_SOURCES = (
    METRICS_NAME, "config.json", "eval/results.json", "eval/speed.json", "eval/estep.json",
    "eval/gallery", "bench",
)  # fmt: skip
# facts that tell the weights of two trainings, or of two steps of one, apart
_IDENTITY = ("datasets", "steps", "checkpoint", "started_from", "seed", "parts")

# keys of results.json without which there is no page
_REQUIRED = (
    "dataset", "split", "protocol", "num_images", "miou", "per_class", "ensemble", "steps", "seed",
)  # fmt: skip


def read_object(path: Path, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """JSON object of a file, with nan and infinities read as null.

    Raises:
      UserError: no JSON, not an object, or without one of `keys`.
    """
    # An older or edited file may be sound JSON and still lack keys: name them.
    value = read_json(path, nan_as_null=True)
    missing = [key for key in keys if key not in value]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; required are {', '.join(keys)}")
    return value


def optional_object(path: Path, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """JSON object of a file; empty if the file does not exist."""
    return read_object(path, keys) if path.exists() else {}


def _results(workdir: Path) -> dict[str, Any]:
    """Content of eval/results.json.

    Raises:
      UserError: no evaluation (the message names the command that makes one), or not of its form.
    """
    path = workdir / "eval" / "results.json"
    if not path.exists():
        raise UserError(
            f"no evaluation at {path}; make it with: python -m digseg_jax.main "
            f"--config=CONFIG --workdir={workdir} --mode=eval"
        )
    results = read_object(path, _REQUIRED)
    if not isinstance(results["per_class"], dict):
        raise UserError(f"{path}: per_class must be an object of class name to IoU or null")
    return results


def class_table(results: Mapping[str, Any], gallery: Mapping[str, Any]) -> dict[str, str]:
    """Color (#rrggbb) of each class name: the gallery's own, so that the page agrees with its images.

    Raises:
      UserError: a color of the gallery that is none.
    """
    names = list(results["per_class"])
    table = {n: to_hex(c) for n, c in zip(names, class_colors(len(names), names), strict=True)}
    for entry in gallery.get("classes", []):
        table[entry["name"]] = to_hex(from_hex(entry["color"]))  # raises for anything but a color
    return table


def read_training(workdir: Path) -> list[dict[str, Any]]:
    """The run's metrics; none if it has no record."""
    path = workdir / METRICS_NAME
    return read_metrics(path) if path.exists() else []


def shaped(path: Path, make: Callable[[], T]) -> T:
    """Calls `make`, which reads one file; a file that is not of the expected form is a UserError."""
    try:
        return make()
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not of the expected form: {error!r}") from error


@contextlib.contextmanager
def on_disk(folder: AnyPath, names: tuple[str, ...], patterns: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields the folder, or of one in a bucket a copy of these files: rendering reads local files only.

    names: files and folders in it. patterns: of more files, such as eval/suite_*.json.

    Raises:
      UserError: what is raised inside the block; it names the folder, never its copy.
    """
    if not storage.is_remote(folder):
        yield Path(folder)
        return

    with tempfile.TemporaryDirectory(prefix="digseg_jax_") as scratch:
        copy = Path(scratch) / folder.name
        with storage.explained(folder, "cannot be read"):
            found = [path for pattern in patterns for path in folder.glob(pattern)]
        more = tuple(str(path).removeprefix(f"{folder}/") for path in found)
        storage.download(folder, copy, names + more)
        try:
            yield copy
        except UserError as error:
            raise type(error)(str(error).replace(str(copy), str(folder))) from error


def _suites(workdir: Path, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of eval/suite_*.json; those of other weights than the results' are left out."""
    tables = []
    for path in sorted((workdir / "eval").glob("suite_*.json")):
        found = read_object(path)
        if _other_weights(found.get("weights"), results.get("weights")):
            log.info("%s: of other weights than results.json, so no part of the report", path.name)
        else:
            tables.append(shaped(path, partial(suite_tables, found)))
    return tables


def _other_weights(one: Any, other: Any) -> bool:
    """Whether two records of weights are of different ones; False if either is missing."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    known = [key for key in _IDENTITY if key in one and key in other]
    return any(one[key] != other[key] for key in known)


def page_of(workdir: Path) -> str:
    """The page as HTML; parts whose files are absent are left out."""
    results, results_path = _results(workdir), workdir / "eval" / "results.json"
    gallery_path, config_path = workdir / "eval" / "gallery" / "gallery.json", workdir / "config.json"
    estep_path, run_path = workdir / "eval" / "estep.json", workdir / "eval" / "speed.json"
    bench_paths, metrics = sorted((workdir / "bench").glob("*.json")), read_training(workdir)

    # Only results.json is required.
    gallery, estep = optional_object(gallery_path), optional_object(estep_path)
    benches = {path: read_object(path, ("title", "columns", "rows")) for path in bench_paths}
    config = read_object(config_path) if config_path.exists() else None
    colors = shaped(gallery_path, lambda: class_table(results, gallery))

    # A section is empty where there is nothing to show.
    data = shaped(config_path, lambda: {**((config or {}).get("data") or {})})
    root = data.get("root") or ""
    name = results.get("title") or shaped(config_path, lambda: title(results["dataset"], root))
    trained_in = "" if data.get("mixture") else root
    suites = _suites(workdir, results)
    return render(
        "report/run.html.j2",
        name=name,
        run=workdir.resolve().name,
        scores=shaped(results_path, lambda: sections.headline(results, name, trained_in)),
        listening=sections.listening(results),
        gallery=shaped(gallery_path, lambda: gallery_cards(gallery, gallery_path.parent, colors)),
        classes=sections.class_bars(results["per_class"], colors),
        confusions=shaped(results_path, lambda: confusions(results, colors)),
        charts=training_charts(metrics),
        estep=shaped(estep_path, lambda: sections.estep_table(estep)),
        domains=[suite for suite in suites if suite["name"] == "domains"],
        papers=[suite for suite in suites if suite["name"] != "domains"],
        benches=[
            table
            for path, found in benches.items()
            for table in shaped(path, partial(sections.bench_tables, [found]))
        ],
        circumstances=shaped(
            run_path, lambda: circumstances(optional_object(run_path), metrics, config, results)
        ),
    )


def build_report(workdir: AnyPath | str) -> AnyPath:
    """Writes WORKDIR/report/index.html and returns its path.

    Reads eval/results.json and, where they exist, eval/speed.json, metrics.jsonl,
    eval/gallery/gallery.json, eval/estep.json, eval/suite_*.json, bench/*.json and config.json.

    Raises:
      UserError: no results (naming the command that makes them), or a file not of the expected form.
    """
    workdir = storage.as_path(workdir)
    with on_disk(workdir, _SOURCES, ("eval/suite_*.json",)) as source:
        text = page_of(source)

    out = workdir / "report" / "index.html"
    storage.write_bytes(out, text.encode("utf-8"))
    return out
