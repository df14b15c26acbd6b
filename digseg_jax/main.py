# SPDX-License-Identifier: Apache-2.0
"""digseg --config=NAME --workdir=DIR [--mode=MODE], or python -m digseg_jax.main with the same flags.

A mode may come first, by itself: digseg demo is digseg --mode=demo.

--config takes a file, or the name of one in configs/. Exit statuses are those of `digseg_jax.errors`.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import config_flags

from digseg_jax.config.experiment import NO_FILE, with_config_file
from digseg_jax.config.parse import flat, parse, sampling_settings, to_dict, with_settings
from digseg_jax.config.renamed import explained
from digseg_jax.config.schema import Config
from digseg_jax.errors import OVER_BUDGET, USER_ERROR, Preempted, UserError
from digseg_jax.log import setup
from digseg_jax.runtime.door import tell
from digseg_jax.runtime.interrupts import check_interrupts, remember_interrupts

MODES = ("train", "eval", "export", "predict", "demo", "compile", "cache_latents")

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment: a Python file, or a name in configs/.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, report.")
_ACCEPT_CHANGES = flags.DEFINE_bool(
    "accept_changes", False, "Continue a run although its configuration has changed."
)
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do; train also evaluates and reports.")
_MODEL = flags.DEFINE_string(
    "model", None, "predict, demo, eval: a run, its export, assets:NAME, gs://FOLDER or a hub id."
)
_IMAGE = flags.DEFINE_multi_string(
    "image", None, "predict: an image of any size and mode, a folder or a glob; may be repeated."
)
_QUERY = flags.DEFINE_multi_string("query", None, "predict: what to segment; may be repeated.")
_VOCABULARY = flags.DEFINE_string(
    "vocabulary",
    None,
    "predict: a file with one query per line, or a data set whose classes are the queries.",
)
_TEMPLATE = flags.DEFINE_multi_string(
    "template",
    None,
    'eval, predict, demo: text around each query, such as "a photo of a {}"; may be repeated.',
)
_OUT = flags.DEFINE_string("out", "mask.png", "predict: PNG file or folder to write.")
_FORMAT = flags.DEFINE_multi_enum(
    "format", None, ["coco", "label_studio"],
    "predict: one file of all images for a labeling tool, OUT/all.FORMAT.json; may be repeated.",
)  # fmt: skip
_PORT = flags.DEFINE_integer("port", 0, "demo: port on 127.0.0.1; 0 takes a free one.")
_NO_BROWSER = flags.DEFINE_bool("no_browser", False, "demo: do not open the page in a browser.")
_HUB = flags.DEFINE_string("hub", None, "export: repository to push to, org/name[@branch].")
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "compile: devices to compile for, such as v5e:4x4, v5p:2x2x2, v6e:4x4, h100:8 or cpu:8.",
)
_SUITE = flags.DEFINE_string(
    "suite",
    None,
    "eval: score many data sets under config.data.root: domains, or a table of the paper.",
)
_SAMPLING = flags.DEFINE_string(
    "sampling", None, 'eval, predict, demo: members x steps, such as "8x2" or "20x50:leading".'
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of this run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process: 0 to num_processes - 1.")
_START_TIMEOUT = flags.DEFINE_float(
    "start_timeout", 50.0, "Seconds to wait for all processes; raise it where pods start slowly."
)


# Modes that use a flag; in any other it would silently do nothing, so it is rejected.
_FOR_MODES = {
    "model": ("predict", "demo", "eval"),
    "image": ("predict",),
    "query": ("predict",),
    "vocabulary": ("predict",),
    "template": ("predict", "demo", "eval"),
    "out": ("predict",),
    "format": ("predict",),
    "port": ("demo",),
    "no_browser": ("demo",),
    "hub": ("export",),
    "topology": ("compile",),
    "suite": ("eval",),
    "sampling": ("eval", "predict", "demo"),
    "accept_changes": ("train", "eval", "export"),
    "workdir": ("train", "eval", "export", "predict", "demo", "compile"),
    **dict.fromkeys(
        ("coordinator", "num_processes", "process_id", "start_timeout"),
        ("train", "eval", "export", "cache_latents"),
    ),
}


def check_flags(mode: str) -> None:
    """Checks that the mode has the flags that it needs, and no flag that it would not use.

    Raises:
      UserError: a missing or a useless flag.
    """
    for name, modes in _FOR_MODES.items():
        if flags.FLAGS[name].present and mode not in modes:
            raise UserError(f"--{name}: for --mode={' or '.join(modes)} only, not --mode={mode}")

    # Exported weights and runs know their configuration; other modes need a file.
    if _config_file() is None and mode not in ("predict", "demo", "eval", "export"):
        raise UserError(f"--mode={mode} needs --config")
    if _settings() and mode == "export":
        raise UserError("--config.KEY: --mode=export takes the run's settings, or those of --config")

    # Modes that are not in the table need --workdir only.
    needed = {
        "predict": ("image",),
        "demo": (),
        "compile": ("topology", "workdir"),
        "cache_latents": (),
    }
    for name in needed.get(mode, ("workdir",)):
        value = flags.FLAGS[name].value or ""
        if not "".join(value).strip():  # the value of a flag that may be repeated is a list
            raise UserError(f"--mode={mode} needs --{name}")

    if mode == "demo" and _config_file() is not None:
        raise UserError("--config: not for --mode=demo, which takes the weights' own settings")
    if mode in ("predict", "demo") and _MODEL.value and _WORKDIR.value:
        raise UserError("--model and --workdir: both name the weights; give one of them")
    if mode == "predict" and not _QUERY.value and not _VOCABULARY.value:
        raise UserError("--mode=predict needs --query or --vocabulary")


def _config_file() -> str | None:
    """The experiment file of --config; None without one."""
    if _CONFIG.value is None:
        return None
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    return None if name == NO_FILE else name


def _settings() -> dict[str, Any]:
    """Values of --config.KEY=VALUE without an experiment file; they change the weights' settings."""
    if _CONFIG.value is None or _config_file() is not None:
        return {}
    return dict(config_flags.get_override_values(flags.FLAGS["config"]))


def _chosen() -> dict[str, Any]:
    """Values by key that --sampling and --template stand for."""
    sampling = sampling_settings(_SAMPLING.value) if _SAMPLING.value else {}
    return sampling | ({"eval.templates": tuple(_TEMPLATE.value)} if _TEMPLATE.value else {})


def _experiment() -> Config | None:
    """The configuration of --config with what the other flags change; None without a file."""
    if _config_file() is None:
        return None
    values = _CONFIG.value.copy_and_resolve_references()

    # No suite calibrates: it may score whatever split the file fits a calibration on.
    if _SUITE.value is not None and "calibrate" in values.get("eval", {}):
        values.eval.calibrate = False
    return with_settings(parse(values), _chosen())


def run() -> None:
    """Runs the mode; imports late, so that a wrong flag is reported before JAX loads."""
    # Check the flags before anything slow.
    mode = _MODE.value
    check_flags(mode)
    config = _experiment()

    # Before JAX is imported: choose the devices to compile for, and make the start-up settings for the
    # devices of this machine.
    if mode == "compile":
        from digseg_jax.aot import topology

        topology.prepare(_TOPOLOGY.value)
    from digseg_jax.runtime import cpu, gpu

    cpu.tune()
    gpu.tune()

    if mode == "compile":
        from digseg_jax.aot import job
        from digseg_jax.io.storage import as_path

        if not job.run(config, _TOPOLOGY.value, as_path(_WORKDIR.value))["fits"]:
            _leave(OVER_BUDGET)
    elif mode == "predict":
        _predict()
    elif mode == "demo":
        from digseg_jax.demo.job import demo

        weights, settings = _MODEL.value or _WORKDIR.value, _settings() | _chosen()
        demo(weights, _PORT.value, settings, browser=not _NO_BROWSER.value)
    else:
        _run_on_all_processes(mode)


def _predict() -> None:
    """--mode=predict: on this process alone."""
    from digseg_jax.prediction.job import predict

    weights, queries, out = _MODEL.value or _WORKDIR.value, _QUERY.value or [], Path(_OUT.value)
    options = {"settings": _settings() | _chosen(), "formats": _FORMAT.value or ()}
    predict(_experiment(), weights, _IMAGE.value, queries, out, _VOCABULARY.value, **options)


def _run_on_all_processes(mode: str) -> None:
    """Runs one of the other modes on all processes, joined before JAX touches a device."""
    config = _experiment()
    from digseg_jax import jobs
    from digseg_jax.io.storage import as_path
    from digseg_jax.runtime import distributed
    from digseg_jax.runtime.agreement import check_processes

    # A single process unless the flags or the machine name others.
    timeout = _START_TIMEOUT.value
    cluster = distributed.find_cluster(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, timeout
    )
    distributed.start(cluster, timeout)

    # JAX's coordination service has taken SIGTERM over, for trainings and evaluations to ask it. These
    # modes have no steps that all processes share: there the signal ends each process again.
    check_interrupts()
    if mode in ("cache_latents", "export"):
        remember_interrupts()

    # Different flags on some process are an error now, not a hang in a collective later.
    told = {"--mode": mode, "--workdir": _WORKDIR.value, "--suite": _SUITE.value}
    told |= {"--model": _MODEL.value, "--sampling": _SAMPLING.value, "--hub": _HUB.value}
    told |= {"--template": _TEMPLATE.value, "--accept_changes": _ACCEPT_CHANGES.value}
    check_processes(_settings() if config is None else flat(to_dict(config)), told)

    if mode == "cache_latents":
        from digseg_jax.tools import cache_latents

        cache_latents.run(
            config.data, config.model, config.compute, config.loading, config.train.batch_size
        )
        return

    # With a configuration, `run` has put --sampling and --template into it already.
    workdir, suite = as_path(_WORKDIR.value), _SUITE.value
    settings = _settings() | (_chosen() if config is None else {})
    if suite is not None and config is not None:
        from digseg_jax.evaluation.suite import used_settings

        used_settings(suite, dict(config_flags.get_override_values(flags.FLAGS["config"])))
    options = {"config": config, "accept_changes": _ACCEPT_CHANGES.value}
    if mode == "train":
        jobs.train(workdir=workdir, **options)
    elif mode == "export":
        jobs.export(workdir, hub=_HUB.value or "", **options)
    else:
        jobs.evaluate(workdir, suite, model=_MODEL.value, settings=settings, **options)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags as absl does; an error is one line instead of a traceback.

    argv: with the program's name first. Returns the arguments that are not flags.
    """
    if sys.platform == "win32":
        _fail("this runs on Linux; on Windows install and start it inside WSL2 (wsl --install)")
    if {"--help", "-h", "-?"} & set(argv):
        print(f"{__doc__}\n{flags.FLAGS.module_help(sys.modules[__name__])}")
        sys.exit(0)

    # A mode by itself may come first: digseg demo.
    if len(argv) > 1 and argv[1] in MODES:
        argv = [argv[0], f"--mode={argv[1]}", *argv[2:]]

    # Check keys and the file's name before absl does, for errors that list the legal ones.
    try:
        _check_repeats(argv)
        rest = flags.FLAGS(with_config_file(argv))
        if _CONFIG.value is not None:
            _CONFIG.value.items()  # a broken file is reported only when it is used
        return rest
    except UserError as error:
        _fail(str(error))
    except flags.Error as error:  # the last line of its text is the error of a config file itself
        said = str(error).strip().splitlines()
        _fail(said[0] if len(said) == 1 else said[-1].partition(": ")[2] or said[-1])
    except (ImportError, SyntaxError) as error:  # raised in a config file, by an old module name, say
        _fail(f"--config: {' '.join(str(error).split())}")
    except (AttributeError, KeyError, TypeError, OSError) as error:  # a bad or missing config file
        _fail(f"--config: {explained(error)}")
    except SystemExit as error:  # raised in a config file: nothing would be done, with status 0
        _fail(f"--config: the file ends the program (sys.exit({error.code}))")
    except Exception as error:  # a config file is a program: it may raise anything
        _fail(f"--config: {type(error).__name__}: {explained(error)}")


def _check_repeats(argv: list[str]) -> None:
    """Raises UserError for a flag that is given twice: absl would drop the first value."""
    seen: dict[str, str] = {}  # name -> the argument that set it
    for before, argument in itertools.pairwise(argv):
        name = argument.lstrip("-").partition("=")[0]
        if not argument.startswith("-") or not name:
            continue

        # The value of the flag before it: a negative number, or a text that begins with a dash.
        if before.startswith("--") and "=" not in before and not argument.startswith("--"):
            continue

        # Some flags may be repeated: --query, --image, --template and --format.
        several = name in flags.FLAGS and isinstance(flags.FLAGS[name], flags.MultiFlag)
        if name in seen and not several:
            raise UserError(f"--{name}: given twice, {seen[name]} and {argument}; name one")
        seen[name] = argument


def _fail(message: str) -> NoReturn:
    """Prints one line and exits with USER_ERROR."""
    print(f"error: {message}", file=sys.stderr)
    _leave(USER_ERROR)


def _leave(status: int) -> NoReturn:
    """Exits with a status; if JAX is imported, without waiting for other processes or threads."""
    if "jax" not in sys.modules:
        sys.exit(status)
    from digseg_jax.runtime import distributed

    distributed.leave(status)


def main(argv: list[str]) -> None:
    """Runs the mode and turns an error into an exit status."""
    # Arguments that absl leaves over are not flags, and there are no others.
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}; flags begin with --, such as --mode={argv[1]}")
    setup()
    remember_interrupts()
    try:
        run()
    except (Exception, Preempted, KeyboardInterrupt) as error:
        _leave(tell(error))


def command() -> None:
    """Entry point of the console command `digseg`."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    command()
