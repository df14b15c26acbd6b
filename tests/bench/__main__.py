# SPDX-License-Identifier: Apache-2.0
"""python -m tests.bench JOB [--json] ...: figures of ours and of a reference, from one run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from digseg_jax.errors import UserError
from digseg_jax.io.storage import write_bytes
from digseg_jax.log import setup
from digseg_jax.runtime import cpu


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    cover = jobs.add_parser("landcover", help="our segmenter against boosted trees; text")
    cover.add_argument("--weights", default="assets:segmenter", help="assets:NAME or DIR/export")
    grid = jobs.add_parser("estep", help="E-Step rows and decoders over seeds, on the land cover")
    grid.add_argument("--weights", default="assets:segmenter", help="assets:NAME or DIR/export")
    grid.add_argument("--rows", default="1x2,2x2,4x2,8x2", help="members x steps, with commas")
    grid.add_argument("--decoders", default="vae", help="vae, latent_mean, probe, with commas")
    grid.add_argument("--seeds", type=int, default=3, help="how many seeds of the noise")
    grid.add_argument("--first-seed", type=int, default=0)
    grid.add_argument("--images", type=int, default=0, help="tiles, evenly spread; 0: all")
    vocabulary = jobs.add_parser("open_vocab", help="oracle, gated, exhaustive on 17 IGBP classes")
    vocabulary.add_argument("--weights", default="assets:segmenter", help="assets:NAME or DIR/export")
    vocabulary.add_argument("--sampling", default="8x2")
    vocabulary.add_argument("--images", type=int, default=24, help="tiles, evenly spread; 0: all")
    vocabulary.add_argument("--limit", type=int, default=6, help="classes the gate lets through")
    vocabulary.add_argument("--cut", type=float, default=0.3, help="least presence score")
    stamps = jobs.add_parser("stamps", help="masks by name: trained, never trained and wrong names")
    stamps.add_argument("--weights", required=True, help="RUN/export of tests/bench/stamps_config.py")
    stamps.add_argument("--root", type=Path, required=True, help="what tests.bench.stamp_data made")
    stamps.add_argument("--sampling", default="1x1")
    stamps.add_argument("--images", type=int, default=200, help="scenes of each set; 0: all")
    stamps.add_argument("--sheet", type=Path, help="PNG of some scenes, names and masks to write")
    prior = jobs.add_parser("prior", help="fine-tuning from the prior against from scratch")
    prior.add_argument("--seeds", type=int, default=3)
    prior.add_argument("--steps", type=int, default=300)
    pathway = jobs.add_parser("pathway", help="text by adapters against a parallel pathway")
    pathway.add_argument("--seeds", type=int, default=3)
    pathway.add_argument("--steps", type=int, default=300)
    pathway.add_argument("--scales", default="1,10", help="optim.new_lr_scale, with commas")
    drawn = jobs.add_parser("schedules", help="what members and steps bring, by training's timesteps")
    drawn.add_argument("--seeds", type=int, default=3)
    drawn.add_argument("--first-seed", type=int, default=0)
    drawn.add_argument("--steps", type=int, default=300)
    drawn.add_argument("--images", type=int, default=24, help="tiles, evenly spread; 0: all")
    drawn.add_argument("--schedules", default="", help="names, with semicolons; empty: all")
    drawn.add_argument("--weights", default="assets:prior", help="what every run starts from")
    named = jobs.add_parser("prompted", help="the prompted codec against the binary one, equal FLOPs")
    named.add_argument("--seeds", type=int, default=3)
    named.add_argument("--steps", type=int, default=300, help="of the binary codec")
    named.add_argument("--images", type=int, default=0, help="tiles, evenly spread; 0: all")
    named.add_argument("--weights", help="RUN/export of the prompted codec: scored, nothing is trained")
    named.add_argument("--binary", default="assets:segmenter", help="what it is compared with")
    named.add_argument("--data", choices=("landcover", "landcover_igbp"), default="landcover")
    step = jobs.add_parser("step", help="one step of the full-size Stable Diffusion 1.5 model")
    step.add_argument("--size", type=int, default=256, help="pixels of a side of the one image")
    step.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    step.add_argument("--no-ema", action="store_true", help="keep no moving average: 3.4 GB less")
    checkpoint = jobs.add_parser("checkpoint", help="what saving holds up; restoring against reading")
    checkpoint.add_argument("--part", choices=("both", "save", "restore"), default="both")
    checkpoint.add_argument("--saves", type=int, default=3, help="intervals of 50 steps with a save")
    models = jobs.add_parser("models", help="time of our models against torch's, on the CPU")
    models.add_argument("--size", choices=("full", "small"), default="full")
    models.add_argument("--case", choices=("unet", "vae_encode", "vae_decode"), action="append")
    models.add_argument("--forward-only", action="store_true", help="time no backward pass")
    models.add_argument("--threads", type=int, default=2)
    models.add_argument("--repeats", type=int, default=3, help="the best of so many counts")
    models.add_argument("--conv", choices=("cpu", "xla"), default="cpu")
    models.add_argument("--attention", choices=("plain", "chunked", "headwise"), default="headwise")
    train = jobs.add_parser("train", help="time of a U-Net train step with AdamW against torch's")
    train.add_argument("--size", choices=("full", "small"), default="full")
    train.add_argument("--cells", type=int, default=32, help="a side of the latents; 64 needs 30 GB")
    train.add_argument("--threads", type=int, default=2)
    train.add_argument("--repeats", type=int, default=3, help="the best of so many steps counts")
    train.add_argument("--attention", choices=("plain", "chunked", "headwise"), default="headwise")
    sample = jobs.add_parser("sample", help="the E-Step grid against the same loop in torch diffusers")
    sample.add_argument("--size", choices=("full", "small"), default="full")
    sample.add_argument("--pixels", type=int, default=0, help="a side of the image; 0: 256, small 64")
    sample.add_argument("--rows", default="1x1,1x2,4x2,8x2", help="members x steps, with commas")
    sample.add_argument("--queries", type=int, default=1)
    sample.add_argument("--threads", type=int, default=2)
    sample.add_argument("--repeats", type=int, default=2, help="the best of so many counts")
    sample.add_argument("--torch-batch", type=int, default=1, help="members of a call of torch's")
    sample.add_argument("--conv", choices=("cpu", "xla"), default="cpu")
    sample.add_argument("--attention", choices=("plain", "chunked", "headwise"), default="headwise")
    shared = jobs.add_parser("suite_on_two", help="a suite on two processes against one, a core each")
    shared.add_argument("--weights", default="assets:segmenter", help="assets:NAME or DIR/export")
    shared.add_argument("--suite", default="open_vocab", help="as --mode=eval --suite takes it")
    shared.add_argument("--images", type=int, default=8, help="of every data set")
    shared.add_argument("--sampling", default="2x2", help="members x steps")
    trip = jobs.add_parser("round_trip", help="each domain's images and masks through an autoencoder")
    trip.add_argument("--vae", default="assets:vae", help="as --config.model.vae takes it")
    trip.add_argument("--root", required=True, help="folder of all domains, as --suite=domains has it")
    trip.add_argument("--images", type=int, default=12, help="of each domain's val, evenly spread")
    trip.add_argument("--size", type=int, default=96, help="side of the crops, pixels")
    words = jobs.add_parser("words", help="a generalist's masks by names, unseen synonyms, wrong names")
    words.add_argument("--weights", default="assets:generalist", help="assets:NAME or DIR/export")
    words.add_argument("--root", required=True, help="folder of all domains, as --suite=domains has it")
    words.add_argument("--images", type=int, default=12, help="of each domain's val; 0: all")
    words.add_argument("--only", default="", help="names of domains, with commas; empty: all")
    words.add_argument("--rarer", action="store_true", help="ask with rarer synonyms")
    foreign = jobs.add_parser("foreign_names", help="a generalist's masks of what images cannot show")
    foreign.add_argument("--weights", default="assets:generalist", help="assets:NAME or DIR/export")
    foreign.add_argument(
        "--root", required=True, help="folder of all domains, as --suite=domains has it"
    )
    foreign.add_argument("--split", default="val", choices=("val", "train"))
    foreign.add_argument("--images", type=int, default=4, help="of each domain, evenly spread")
    foreign.add_argument("--only", default="", help="names of domains, with commas; empty: all")
    forest = jobs.add_parser("domain_trees", help="boosted trees on the pixels of each domain")
    nets = jobs.add_parser("domain_unets", help="a torch U-Net trained on each domain alone")
    nets.add_argument("--minutes", type=float, default=23.0, help="of a core, for each training")
    nets.add_argument(
        "--sees", default="pixels", choices=("pixels", "decoded", "latents"),
        help="the images, or what the generalist's autoencoder makes of them",
    )  # fmt: skip
    own = jobs.add_parser("domain_specialists", help="a specialist of ours for each domain")
    own.add_argument("--runs", required=True, help="folder of the trainings, which go on after a kill")
    own.add_argument("--steps", type=int, default=0, help="of each training; 0: the recipe's")
    for job in (forest, nets, own):
        root = "folder of all domains, as --suite=domains has it"
        job.add_argument("--root", required=True, help=root)
        job.add_argument("--split", default="val", help="as the suite takes config.eval.split")
        job.add_argument("--images", type=int, default=0, help="of the scored split; 0: all")
        job.add_argument("--only", default="", help="names of domains, with commas; empty: all")
        job.add_argument("--seed", type=int, default=0)
    few = jobs.add_parser("labels", help="starts of a training by the share of the labels")
    few.add_argument("--root", required=True, help="folder of all domains, as --suite=domains has it")
    few.add_argument("--journal", type=Path, required=True, help="file of the runs that have ended")
    few.add_argument("--only", default="nuclei_dsb2018,cells_wbc,roads_epfl", help="with commas")
    few.add_argument("--starts", default="random,prior", help="with commas")
    few.add_argument("--percents", default="100,25,10,5", help="of the training images")
    few.add_argument("--seeds", type=int, default=3)
    few.add_argument("--steps", type=int, default=250, help="of each training")
    few.add_argument("--images", type=int, default=12, help="of val, evenly spread; 0: all")
    data = jobs.add_parser("data", help="training crops per second against decoding and torch")
    data.add_argument("--torch-python", help="an interpreter with torch, for the comparison")
    data.add_argument("--crops", type=int, default=1024, help="how many each figure is taken from")
    for job in jobs.choices.values():
        job.add_argument("--json", action="store_true", help="print JSON alone on stdout")
        job.add_argument("--out", type=Path, help="also write the JSON to this file")
    return parser


def _check_counts(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if (value := getattr(arguments, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')}={value}: must be at least 1")


def _landcover(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import landcover

    return landcover.run(arguments.weights)


def _estep(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import estep

    _check_counts(arguments, "seeds")
    rows, decoders = arguments.rows.split(","), arguments.decoders.split(",")
    result = estep.run(
        arguments.weights,
        tuple(rows),
        tuple(decoders),
        range(arguments.first_seed, arguments.first_seed + arguments.seeds),
        arguments.images,
    )
    if not arguments.json:
        print(estep.table(result))
    return result


def _open_vocab(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import open_vocab

    return open_vocab.run(
        arguments.weights, arguments.sampling, arguments.images, arguments.limit, arguments.cut
    )


def _stamps(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import stamps

    result = stamps.run(
        arguments.weights, arguments.root, arguments.sampling, arguments.images, arguments.sheet
    )
    if not arguments.json:
        print(stamps.table(result))
    return result


def _prior(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import prior

    return prior.run(arguments.seeds, arguments.steps)


def _pathway(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import pathway

    _check_counts(arguments, "seeds", "steps")
    scales = tuple(float(scale) for scale in arguments.scales.split(","))
    return pathway.run(arguments.seeds, arguments.steps, scales)


def _schedules(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import schedules

    _check_counts(arguments, "seeds", "steps")
    only = tuple(filter(None, arguments.schedules.split(";"))) or tuple(schedules.SCHEDULES)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    return schedules.run(seeds, arguments.steps, arguments.images, only, arguments.weights)


def _prompted(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import prompted

    _check_counts(arguments, "seeds", "steps")
    if arguments.weights:
        return prompted.compare(arguments.weights, arguments.binary, arguments.data, arguments.images)
    return prompted.run(arguments.seeds, arguments.steps, arguments.images)


def _step(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import step

    return step.run(arguments.size, arguments.dtype, ema=not arguments.no_ema)


def _checkpoint(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import checkpoint

    return checkpoint.run(arguments.part, arguments.saves)


def _models(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import models

    _check_counts(arguments, "threads", "repeats")
    return models.run(
        arguments.size,
        cases=tuple(arguments.case or models.CASES),
        passes=models.PASSES[:1] if arguments.forward_only else models.PASSES[:2],
        threads=arguments.threads,
        repeats=arguments.repeats,
        conv=arguments.conv,
        attention=arguments.attention,
    )


def _train(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import models

    _check_counts(arguments, "threads", "repeats", "cells")
    return models.run(
        arguments.size,
        cases=("unet",),
        passes=("forward", "train_step"),
        threads=arguments.threads,
        repeats=arguments.repeats,
        attention=arguments.attention,
        cells=arguments.cells,
    )


def _sample(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import sample

    _check_counts(arguments, "queries", "threads", "repeats", "torch_batch")
    return sample.run(
        arguments.size,
        pixels=arguments.pixels,
        rows=tuple(arguments.rows.split(",")),
        queries=arguments.queries,
        threads=arguments.threads,
        repeats=arguments.repeats,
        torch_batch=arguments.torch_batch,
        conv=arguments.conv,
        attention=arguments.attention,
    )


def _suite_on_two(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import suite_on_two

    _check_counts(arguments, "images")
    return suite_on_two.run(arguments.weights, arguments.suite, arguments.images, arguments.sampling)


def _data(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import data

    return data.run(arguments.torch_python, arguments.crops)


def _round_trip(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import round_trip

    _check_counts(arguments, "images", "size")
    return round_trip.run(arguments.vae, arguments.root, arguments.images, arguments.size)


def _words(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import words

    only = tuple(filter(None, arguments.only.split(",")))
    synonyms = words.RARER if arguments.rarer else words.SYNONYMS
    return words.run(arguments.weights, arguments.root, arguments.images, only, synonyms)


def _foreign_names(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import foreign_names

    _check_counts(arguments, "images")
    only = tuple(filter(None, arguments.only.split(",")))
    given = arguments.weights, arguments.root, arguments.split, arguments.images
    return foreign_names.run(*given, only)


def _domains(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the comparisons on domains are asked alike."""
    given = {name: getattr(arguments, name) for name in ("root", "split", "images", "seed")}
    return given | {"only": tuple(filter(None, arguments.only.split(",")))}


def _domain_trees(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import domain_trees

    return domain_trees.run(**_domains(arguments))


def _domain_unets(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import sides

    sides.require_torch("domain_unets")
    from tests.bench import domain_unets

    own = {"minutes": arguments.minutes, "sees": arguments.sees}
    return domain_unets.run(**own, **_domains(arguments))


def _domain_specialists(arguments: argparse.Namespace) -> dict[str, Any]:
    from tests.bench import domain_specialists

    own = {"runs": arguments.runs, "steps": arguments.steps}
    return domain_specialists.run(**own, **_domains(arguments))


def _labels(arguments: argparse.Namespace) -> dict[str, Any]:
    _check_counts(arguments, "seeds", "steps")
    from tests.bench import labels

    return labels.run(
        arguments.root,
        arguments.journal,
        arguments.only.split(","),
        arguments.starts.split(","),
        [int(percent) for percent in arguments.percents.split(",")],
        arguments.seeds,
        arguments.steps,
        arguments.images,
    )


JOBS = {
    "landcover": _landcover,
    "estep": _estep,
    "open_vocab": _open_vocab,
    "stamps": _stamps,
    "prior": _prior,
    "pathway": _pathway,
    "schedules": _schedules,
    "prompted": _prompted,
    "step": _step,
    "checkpoint": _checkpoint,
    "models": _models,
    "train": _train,
    "sample": _sample,
    "suite_on_two": _suite_on_two,
    "round_trip": _round_trip,
    "words": _words,
    "foreign_names": _foreign_names,
    "domain_trees": _domain_trees,
    "domain_unets": _domain_unets,
    "domain_specialists": _domain_specialists,
    "labels": _labels,
    "data": _data,
}


def main() -> int:
    arguments = _parser().parse_args()
    flags.FLAGS.mark_as_parsed()  # grain reads absl's flags outside absl.app
    setup(quiet=arguments.json)
    cpu.tune()
    try:
        result = JOBS[arguments.job](arguments)
        text = json.dumps(result, indent=None if arguments.json else 2)
        print(text)
        if arguments.out:
            write_bytes(arguments.out, f"{text}\n".encode())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
