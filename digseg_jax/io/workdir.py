# SPDX-License-Identifier: Apache-2.0
"""The working directory of a run: it belongs to one configuration, stored there and compared."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from typing import Any, TextIO

from etils import epath

from digseg_jax.config.parse import flat, parse, to_dict
from digseg_jax.config.renamed import CONSTANT, with_current_names
from digseg_jax.config.schema import Config, DataConfig, PartConfig, is_free
from digseg_jax.errors import UserError
from digseg_jax.io import storage
from digseg_jax.io.json_file import read_json
from digseg_jax.io.lease import leased
from digseg_jax.io.metric_writer import METRICS_NAME
from digseg_jax.io.storage import AnyPath
from digseg_jax.log import log

CONFIG_NAME = "config.json"
LOCK = "train.lock"  # held while a run trains there; names the process that holds it
CHECKPOINTS = "checkpoints"
EXPORT = "export"  # folder of the trained weights, in diffusers' layout
VALIDATION = "validation"  # folder of the images that the last validation during training shows
FOLDERS = (CHECKPOINTS, EXPORT, VALIDATION, "eval")
CALIBRATION = "calibration.json"  # in EXPORT; what an evaluation fitted for these weights


def claim(
    workdir: AnyPath, values: dict[str, Any], *, accept_changes: bool = False, keep: bool = False
) -> None:
    """Writes DIR/config.json, or checks that the stored one trains the same weights.

    A run that ended before it made anything, say because of a wrong path, does not bind the directory.

    Args:
      workdir: the run's directory; made if missing.
      values: configuration of the run that begins, as `to_dict` gives it.
      accept_changes: continue a run despite a changed configuration, and store the new one.
      keep: compare only; what is stored stays. For an evaluation, whose settings are of one time.

    Raises:
      UserError: the directory holds a run of another configuration (the message has the differing
        keys), or it, or a folder of results in it, cannot be read or written.
    """
    path = workdir / CONFIG_NAME

    with storage.explained(path, "cannot be read"):
        known = path.exists()
        _check_folders(workdir)

    # Compare only what changes the training: `differences` leaves out free keys.
    if known:
        stored = _stored(path)
        changes = differences(stored, values)

        # Correcting a mistake of the first start, say in a flag, needs no confirmation.
        if changes and _unused(workdir) and _ours(stored):
            log.info("%s: nothing was trained there yet, so its configuration is replaced", workdir)
            changes = []

        if changes and not accept_changes:
            raise UserError(
                f"{workdir} holds a run of another configuration ({'; '.join(changes)}); "
                "nothing was touched: use another --workdir, the configuration it was made with, or "
                "--accept_changes to continue with the new one"
            )

        # The run continues with the new configuration; the log keeps the old values.
        if changes:
            log.warning("configuration changed: %s", "; ".join(changes))
        if keep:
            return

    try:
        storage.write_json(path, values)
    except UserError as error:
        raise UserError(f"--workdir={workdir}: {error}") from error


def _check_folders(workdir: AnyPath) -> None:
    """Checks what a run writes into at its end, when it would be too late to find out.

    Raises:
      UserError: one of `FOLDERS` is a file, or cannot be written.
    """
    for place in () if storage.is_remote(workdir) else (workdir / name for name in FOLDERS):
        if place.exists() and not (place.is_dir() and os.access(place, os.W_OK)):
            raise UserError(f"--workdir={workdir}: {place} is no folder that can be written")


def stored_config(workdir: AnyPath) -> Config | None:
    """Reads the configuration of the run in `workdir`; None if there is no run.

    Raises:
      UserError: it cannot be read, or has keys that this program does not know.
    """
    path = workdir / CONFIG_NAME
    with storage.explained(path, "cannot be read"):
        if not path.is_file():
            return None
    try:
        return parse(_stored(path))
    except UserError as error:
        raise UserError(f"{path}: {error}; name one with --config") from error


@contextlib.contextmanager
def hold(workdir: AnyPath) -> Iterator[None]:
    """Keeps other processes from training in `workdir`: two would write each file twice.

    On a disk the lock is the operating system's, so it ends with the process, however that ends; a lock
    file left behind has no meaning. Disks without locks are not guarded. In a bucket it is a `lease`.

    Raises:
      UserError: another process trains there; the message has its number and host.
    """
    with contextlib.ExitStack() as stack:
        if storage.is_remote(workdir):
            stack.enter_context(leased(epath.Path(workdir) / LOCK))
        else:
            with contextlib.suppress(OSError):  # not a directory: `claim` reports it better
                workdir.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((workdir / LOCK).open("a+", encoding="utf-8"))
                _lock(file, workdir)
        yield


def _lock(file: TextIO, workdir: AnyPath) -> None:
    """Locks the open file for this process and writes the process's name into it.

    Raises:
      UserError: another process holds the lock.
    """
    try:
        # lockf, not flock: flock is inherited, so orphaned workers of a killed run would keep the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # EACCES and EAGAIN mean a held lock; any other error, a disk without locks.
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return

        # The holder has written its name into the file.
        file.seek(0)
        raise UserError(
            f"--workdir={workdir}: {file.read().strip() or 'another process'} trains there; wait for "
            "it, end it, or use another --workdir"
        ) from error

    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def _unused(workdir: AnyPath) -> bool:
    """True if nothing was trained in the directory: no weights, no checkpoint, no line of metrics."""
    with storage.explained(workdir, "cannot be read"):
        checkpoints, metrics = workdir / CHECKPOINTS, workdir / METRICS_NAME
        return not (
            (workdir / EXPORT).exists()
            or (checkpoints.exists() and any(checkpoints.iterdir()))
            or (metrics.exists() and metrics.stat().st_size)
        )


def _ours(stored: dict[str, Any]) -> bool:
    """True for a configuration of this program: other programs also have files named config.json."""
    try:
        parse(stored)
    except UserError:
        return False
    return True


def _stored(path: AnyPath) -> dict[str, Any]:
    """The stored configuration as nested dictionaries, with every key under its current name.

    Raises:
      UserError: the file cannot be read, or is not a JSON object.
    """
    return with_current_names(read_json(path, remedy="use another --workdir"))


def differences(stored: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Lists changes such as `train.steps: 600 -> 700`, without free settings.

    A setting that is newer than the run counts as its default, because the run behaved like that.
    """
    # Stored values override the defaults, which stand for settings that did not exist then; constants
    # stand for settings that do not exist any more.
    old, new = flat(to_dict(Config())) | CONSTANT | flat(stored), CONSTANT | flat(values)
    return [
        f"{key}: {was} -> {now}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not is_free(name)
        for key, was, now in _changed(name, old.get(name, "absent"), new.get(name, "absent"))
    ]


def _changed(name: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Key, old and new value of each change of a setting; of a mixture, one for each changed entry."""
    if not (_is_mixture(old) and _is_mixture(new)) or len(old) != len(new):
        return [(name, old, new)]

    # Entries that are newer than the run count as their defaults, as other settings do.
    default = to_dict(Config(data=DataConfig(mixture=(PartConfig(),))))["data"]["mixture"][0]
    return [
        (f"{name}.{index}.{key}", (default | was).get(key), (default | now).get(key))
        for index, (was, now) in enumerate(zip(old, new, strict=True))
        for key in sorted(default.keys() | was.keys() | now.keys())
        if (default | was).get(key) != (default | now).get(key)
    ]


def _is_mixture(value: Any) -> bool:
    """Whether a setting is a list of data sets, each with keys of its own."""
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)
