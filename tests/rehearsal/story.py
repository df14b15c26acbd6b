# SPDX-License-Identifier: Apache-2.0
"""The way of one configuration, from an empty folder to an export that others read.

`play` goes the way that every pair of a configuration and a version goes: on four devices (data 2,
fsdp 2) training is killed with -9, resumed, evaluated and exported; the export predicts, and torch
reads it.

`play_whole` adds what a configuration, or a version, needs once: the same training on one device must
give the same losses, and the same weights the same counts; every decoder; the suite; --mode=export.
`paint_palette` trains and evaluates the palette codec; `evaluate_tables` makes the paper's tables.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pod
from experiments import get_config
from PIL import Image
from safetensors.numpy import load_file

from rehearsal import trees
from rehearsal.export_check import check_export
from rehearsal.stage import Stage

STEPS, EVERY = 8, 3
NAMES = 2  # of a mask image of the prompted codec
FOUR = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
ONE = ("--config.mesh.data=1", "--config.mesh.fsdp=1")
DEVICES = {FOUR: 4, ONE: 1}
WEIGHTS = "diffusion_pytorch_model.safetensors"
IMAGE_SIZE = 150, 100  # of the prediction's image, width and height; larger than a crop
SIZES = {
    "train.steps": STEPS,
    "train.batch_size": 4,
    "logging.every": 1,
    "checkpoint.every": EVERY,
    "eval.num_images": 2,
    "eval.sweep": "()",
}
# of Stable Diffusion's configurations, whose crops have 512 pixels and whose ensembles eight members
CROPS = {
    "data.image_size": 64,
    "data.num_queries": 2,
    "loading.workers": 0,
    "eval.ensemble": 2,
    "logging.eval_every": STEPS // 2,
    "logging.eval_images": 2,
}
SMALL = ("palette", "binary", "small")  # versions that start from shipped weights
MIXED = ("generalist", "generalist_prior")  # trained on a mixture of domains


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set apart from the product: its classes, and a suite that has it."""

    classes: int
    suite: str = ""
    tree: str = ""  # of `trees`; empty: the data set's own


DATASETS = {
    "ade20k": DataSet(150, "semantic"),
    "ade20k_847": DataSet(847, "open_vocab"),
    "bdd100k": DataSet(19, "driving"),
    "camvid": DataSet(11),
    "cityscapes": DataSet(19, "driving"),
    "coco_stuff": DataSet(171, "semantic"),
    "deepglobe": DataSet(2, "deepglobe"),
    "folder": DataSet(2),
    "monuseg": DataSet(2, "medical"),
    "pascal_context_459": DataSet(459, "open_vocab"),
    "pascal_context_59": DataSet(59, "open_vocab"),
    "pascal_voc": DataSet(20, "open_vocab"),
    "phenobench": DataSet(3, "phenobench"),
    "refuge2": DataSet(3, "medical"),
}


class Run:
    """A working directory, and the commands that a user types for it.

    name: of a file in configs/. version: what stands after the colon; empty: nothing.
    """

    def __init__(self, stage: Stage, folder: Path, name: str, version: str = "", *changes: str):
        self.stage, self.name, self.folder = stage, name, folder
        self.segments = get_config(name).task == "segmentation"
        self.dataset = DATASETS.get(name, DataSet(8))
        self.root = folder / "data" / name
        if name in DATASETS and not self.root.exists():
            trees.write_tree(self.dataset.tree or name, self.root)
        self.sizes = SIZES | (CROPS if name in DATASETS and version not in SMALL else {})
        self.config = f"--config=configs/{name}.py" + (f":{version}" if version else "")
        self.changes = [f"--config.{key}={value}" for key, value in self.sizes.items()] + list(changes)
        if name in MIXED:
            self.root = trees.write_domains(folder / "data")
        if name in (*DATASETS, *MIXED):
            self.changes.append(f"--config.data.root={self.root}")
        self.workdir = folder / "run"
        self.spent: dict[str, float] = {}

    def at(self, workdir: str) -> Run:
        """The same configuration in another working directory of the same folder."""
        other = object.__new__(Run)
        other.__dict__ = self.__dict__ | {"workdir": self.folder / workdir}
        return other

    def do(self, mesh: tuple[str, ...], *arguments: str, name: str) -> None:
        """Runs a command to its end, and notes its time under the name."""
        started = time.monotonic()
        self.stage.run(DEVICES[mesh], *self.command(mesh, *arguments))
        self.spent[f"{name}, {DEVICES[mesh]}"] = time.monotonic() - started

    def command(self, mesh: tuple[str, ...], *arguments: str) -> list[str]:
        changes = [*self.changes, *mesh]
        if not self.segments:  # no evaluation: its settings are refused
            changes = [change for change in changes if not change.startswith("--config.eval.")]

        # A flag that is given twice is refused: the command's own replaces the run's.
        given = {argument.split("=")[0] for argument in arguments}
        changes = [change for change in changes if change.split("=")[0] not in given]
        return [self.config, f"--workdir={self.workdir}", *changes, *arguments]

    def results(self, name: str = "results.json") -> dict[str, Any]:
        return json.loads((self.workdir / "eval" / name).read_text())

    def confusion(self) -> np.ndarray:
        return np.asarray(self.results()["confusion"])


def play(run: Run) -> None:
    """Train, kill, resume, evaluate, export, predict; torch reads the export."""
    kill_and_resume(run)
    check_results(run)
    check_looks(run)
    predict(run)
    check_export(run.workdir / "export")


def play_whole(run: Run) -> None:
    """`play`, and on one device, with every decoder, by the suite and exported again."""
    play(run)
    train_on_one_device(run)
    evaluate_in_every_way(run)
    if run.dataset.suite:
        evaluate_suite(run)
    export_again(run)


def kill_and_resume(run: Run) -> None:
    """kill -9 between two saves; the steps that are run again have the same losses to the bit."""
    started = time.monotonic()
    worker = run.stage.worker(4)
    worker.start(*run.command(FOUR))

    def between_saves() -> bool:
        return EVERY in pod.checkpoints(run.workdir) and pod.last_step(run.workdir) > EVERY

    worker.kill_when(between_saves)
    before, saved = pod.losses(run.workdir), pod.checkpoints(run.workdir)[-1]
    run.spent["killed, 4"] = time.monotonic() - started
    assert saved < STEPS, "it ended before it could be killed"
    run.do(FOUR, name="train")

    after = pod.losses(run.workdir)
    assert list(after) == list(range(1, STEPS + 1))
    assert np.isfinite(list(after.values())).all()
    assert {step: after[step] for step in before} == before
    again = [step for step in before if step > saved]
    assert again or saved > EVERY  # the kill was late by a whole interval
    assert pod.checkpoints(run.workdir)[-1] == STEPS


def check_looks(run: Run) -> None:
    """Training looked at images as often as it was told to, and found finite scores."""
    lines = (run.workdir / "metrics.jsonl").read_text().splitlines()
    looks = {row["step"]: row["val_miou"] for row in map(json.loads, lines) if "val_miou" in row}
    if every := run.sizes.get("logging.eval_every"):
        assert list(looks) == list(range(every, STEPS + 1, every))
    assert all(0.0 <= value <= 1.0 for value in looks.values())


def check_results(run: Run, decoder: str = "") -> None:
    """Every class has its row and column (the last one: no answer), and its bias."""
    results, confusion = run.results(), run.confusion()
    classes = run.dataset.classes
    assert confusion.shape == (classes, classes + 1)
    assert len(results["calibration"]["bias"]) == classes
    assert confusion.sum() > 0 and 0.0 <= results["miou"] <= 1.0
    most = NAMES if results["codec"] == "prompted" else 200  # what is asked for without a gate
    assert results["protocol"].endswith("gated queries" if classes > most else "exhaustive queries")
    if decoder:
        assert results["decoder"] == decoder
    assert (run.workdir / "report" / "index.html").stat().st_size > 10_000


def train_on_one_device(run: Run) -> None:
    """The same losses as on four devices, and the same counts of the same weights.

    Losses are compared in the first half of the steps: a small model at its high learning rate then
    follows every rounding.
    In bfloat16 the partitioned program rounds otherwise, and untrained masks lie near the threshold: a
    hundredth of the pixels may be counted elsewhere.
    """
    alone = run.at("alone")
    alone.do(ONE, name="train")
    ours, theirs = pod.losses(run.workdir), pod.losses(alone.workdir)
    for step in range(1, STEPS // 2 + 1):
        np.testing.assert_allclose(ours[step], theirs[step], rtol=2e-2, err_msg=f"step {step}")
    assert ours.keys() == theirs.keys()

    four = run.confusion()
    shutil.copytree(run.workdir / "export", alone.workdir / "export", dirs_exist_ok=True)
    alone.do(ONE, "--mode=eval", name="eval")
    np.testing.assert_array_equal(alone.confusion().sum(axis=1), four.sum(axis=1))
    moved = np.abs(alone.confusion() - four).sum() / 2
    half = json.loads((run.workdir / "config.json").read_text())["model"]["dtype"] == "bfloat16"
    assert moved <= (0.01 * four.sum() if half else 0)


def evaluate_in_every_way(run: Run) -> None:
    """Each decoder evaluates the same pixels."""
    labeled = run.confusion().sum(axis=1)
    for decoder in ("vae", "probe"):
        decoded = (f"--config.eval.decoder={decoder}", "--accept_changes")
        run.do(FOUR, "--mode=eval", *decoded, name=f"eval {decoder}")
        check_results(run, decoder)
        np.testing.assert_array_equal(run.confusion().sum(axis=1), labeled)


def evaluate_suite(run: Run) -> None:
    """The data set's row has scores; the suite's other sets are named as missing."""
    suite = run.dataset.suite
    parent = f"--config.data.root={run.root.parent}"
    run.do(FOUR, "--mode=eval", f"--suite={suite}", parent, name=f"suite {suite}")
    for row in run.results(f"suite_{suite}.json")["rows"]:
        if row["dataset"] == run.name:
            assert len(row["per_class"]) == run.dataset.classes
            assert 0.0 <= row["miou"] <= 1.0 and row["num_images"] >= 1
        else:
            assert row["missing"]
    assert run.name in (run.workdir / "eval" / f"suite_{suite}.md").read_text()


def evaluate_tables(run: Run) -> None:
    """Every table of the paper with one set of weights, whatever it was trained on."""
    in_tables = {name: facts for name, facts in DATASETS.items() if facts.suite}
    for name in in_tables:
        if not (run.root.parent / name).exists():
            trees.write_tree(name, run.root.parent / name)
    parent = f"--config.data.root={run.root.parent}"
    run.do(FOUR, "--mode=eval", "--suite=all", parent, name="suite all")
    rows = run.results("suite_all.json")["rows"]
    assert {row["dataset"] for row in rows} == in_tables.keys()
    for row in rows:
        assert len(row["per_class"]) == in_tables[row["dataset"]].classes
        assert 0.0 <= row["miou"] <= 1.0 and row["num_images"] >= 1


def evaluate_domains(run: Run, *names: str) -> None:
    """The domains of these names have scores, and so has the land cover; the others are missing."""
    few = run.folder / "few"
    few.mkdir()
    for name in names:
        (few / name).symlink_to(run.root / name)
    flags = ("--suite=domains", f"--config.data.root={few}", "--config.eval.split=val")
    run.do(FOUR, "--mode=eval", *flags, "--accept_changes", name="suite domains")
    for row in run.results("suite_domains.json")["rows"]:
        if row["dataset"] in (*names, "landcover"):
            assert 0.0 <= row["asked_miou"] <= 1.0 and row["num_images"] >= 1
        else:
            assert row["missing"]
    assert (run.workdir / "eval" / "domains" / "index.html").is_file()


def paint_palette(run: Run) -> None:
    """The palette codec, trained and evaluated on four devices, read from the latents and decoded."""
    palette = ("--config.model.codec=palette", "--config.data.num_queries=1")
    short = ("--config.train.steps=2", "--config.checkpoint.every=2")
    run.do(FOUR, *palette, *short, "--config.eval.decoder=probe", name="palette")
    check_results(run, "probe")
    colors = json.loads((run.workdir / "export/palette.json").read_text())["colors"]
    assert len(colors) == run.dataset.classes
    decoded = ("--config.eval.decoder=vae", "--accept_changes")
    run.do(FOUR, "--mode=eval", *palette, *short, *decoded, name="palette, eval vae")
    check_results(run, "vae")
    predict(run)


def paint_names(run: Run) -> None:
    """The prompted codec, two names a pass: trained, evaluated, asked for words; torch reads it."""
    named = ("--config.model.codec=prompted", f"--config.data.num_queries={NAMES}")
    short = ("--config.train.steps=2", "--config.checkpoint.every=2", "--config.logging.eval_every=0")
    run.do(FOUR, *named, *short, "--config.eval.decoder=probe", name="prompted")
    check_results(run, "probe")
    colors = json.loads((run.workdir / "export/prompted.json").read_text())["colors"]
    assert len(colors) == 3  # and one for what nobody named
    decoded = ("--config.eval.decoder=vae", "--accept_changes")
    run.do(FOUR, "--mode=eval", *named, *short, *decoded, name="prompted, eval vae")
    check_results(run, "vae")
    predict(run)
    check_export(run.workdir / "export")


def predict(run: Run) -> None:
    """Two queries on an image larger than a crop: masks of the image's own size.

    Without a configuration: the export knows its own.
    """
    width, height = IMAGE_SIZE
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image, out = run.folder / "photo.png", run.folder / "predicted.png"
    Image.fromarray(pixels).save(image)
    queries = ["sky", "a tree"]
    if run.results()["codec"] == "palette":  # which answers its own classes only
        queries = list(run.results()["per_class"])
    flags = [f"--model={run.workdir}", f"--image={image}", f"--out={out}"]
    flags += [f"--query={query}" for query in queries]
    started = time.monotonic()
    run.stage.run(4, "--mode=predict", *flags)
    run.spent["predict, 4"] = time.monotonic() - started

    with np.load(out.with_suffix(".npz")) as stored:
        soft = stored["probability"]
    assert soft.shape == (len(queries), height, width) and np.isfinite(soft).all()
    assert not np.array_equal(soft[0], soft[1])
    told = json.loads(out.with_suffix(".json").read_text())
    assert [row["query"] for row in told["queries"]] == queries
    for row in told["queries"]:
        with Image.open(out.with_name(row["mask"])) as mask:
            assert mask.size == IMAGE_SIZE


def export_again(run: Run) -> None:
    """--mode=export writes what training wrote; only a segmenter's is a pipeline."""
    folder = run.workdir / "export" / ("unet" if run.segments else "")
    before = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    run.do(FOUR, "--mode=export", "--accept_changes", name="export")
    after = load_file(folder / WEIGHTS)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[key], err_msg=key)
