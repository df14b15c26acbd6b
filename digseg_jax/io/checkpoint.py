# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: DIR/checkpoints/STEP/{state,data,meta}, written by orbax in the background.

`state` is the sharded train state (packed as in `packing`), `data` one integer (the next step of the
stream), `meta` the configuration, the vocabulary, the library versions and the checksums of all three,
which are compared when it is read. An interrupted checkpoint never gets its final name (in a bucket:
its commit marker), so it is never read.

Every process must call every method, at the same step.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from digseg_jax.config.schema import CheckpointConfig
from digseg_jax.errors import Transient, UserError, passes, refusal
from digseg_jax.io import packing, storage
from digseg_jax.io.checksums import array_sums, json_sum
from digseg_jax.io.json_file import parse_object
from digseg_jax.io.workdir import CHECKPOINTS
from digseg_jax.log import log
from digseg_jax.packages import LIBRARIES
from digseg_jax.runtime import malloc

# Entries of `meta` that only this module uses.
_OWN = ("small", "sums", "metrics", "checksum")

# Steps that may run while a checkpoint is being written; then the loop waits for it, so that a kill
# costs at most `every` + OVERLAP - 1 finished steps.
OVERLAP = 1


class Checkpointer:
    """Saves and restores the state of one run; a context manager, so that writes finish.

    Args:
      workdir: the run's directory.
      config: which checkpoints are kept, and how long a save may take.
      create: whether this run writes here. If not, the folder is neither made nor tidied up.
    """

    def __init__(self, workdir: str, config: CheckpointConfig, *, create: bool = True):
        self.config = config
        self.folder = _folder(workdir)
        best = config.best
        options = ocp.CheckpointManagerOptions(
            create=create,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=create,  # never in another run's folder: it may be writing there
            best_fn=(lambda metrics: metrics[best]) if best else None,
            preservation_policy=_policy(config),
            async_options=ocp.AsyncOptions(timeout_secs=int(config.timeout)),
        )

        # An entry that is not named here ("metrics") gets orbax's own handler.
        handlers = {
            # Uncompressed: float weights shrink by only 8 %,
            # at three times the processor time both ways.
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }

        # Orbax reads the metrics of every checkpoint at once.
        with storage.explained(self.folder, "cannot be read or written"):
            try:
                self.manager = ocp.CheckpointManager(
                    self.folder, options=options, item_handlers=handlers
                )
            except ValueError as error:
                if (damaged := _bad_metrics(self.folder)) is None:
                    raise
                raise damaged from error

        self._started: tuple[int, float] | None = None  # step and start time of the save under way

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.wait()
        elif jax.process_count() > 1:
            return  # peers may be gone: waiting for them would hide the error
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self.manager.close()  # waits for the save under way

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self.manager.latest_step()

    def best_step(self) -> int | None:
        """Step with the highest `config.best`; None if that is not set or no checkpoint has it."""
        if not self.config.best:
            return None

        # The save under way may be the best one.
        self.wait()

        values = {
            step: metrics[self.config.best]
            for step in self.manager.all_steps()
            if (metrics := self._metrics(step)) and self.config.best in metrics
        }
        return max(values, key=lambda step: values[step]) if values else None

    def save(
        self, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, float] | None = None
    ) -> None:
        """Starts to write a checkpoint in the background; a step that is already saved is left alone.

        Args:
          step: number of finished steps.
          state: the sharded train state; it may be donated as soon as this returns.
          meta: JSON values to store with it.
          metrics: scores of the evaluation at this step, if there was one, `config.best` among them.

        Raises:
          UserError: this save cannot be started, or the one before it failed.
        """
        self.wait()
        if step in self.manager.all_steps():
            return

        packed = packing.pack(state)
        facts = meta | {
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "small": packing.layout(state),
            "sums": array_sums(packed),
            "metrics": metrics or {},
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(packed),
            data=ocp.args.JsonSave({"next_step": step}),
            meta=ocp.args.JsonSave(facts | {"checksum": json_sum(facts)}),
        )

        self._started = (step, time.monotonic())
        try:
            self.manager.save(step, args=items, metrics=metrics, force=True)
        except Exception as error:  # storage back ends raise unrelated exception types
            raise self._failed(step, error) from error

    def check(self, running: int) -> None:
        """Checks, before step `running` counts as done, whether the save failed or is too slow.

        Does not wait for the save, unless `OVERLAP` steps have begun since it started.

        Raises:
          UserError: names the checkpoint that is missing, and the older ones that are complete.
        """
        if self._started is None:
            return

        step, since = self._started
        if running >= step + OVERLAP:
            self.wait()
            return

        if self.manager.is_saving_in_progress():
            if time.monotonic() - since > self.config.timeout:
                raise self._failed(step, TimeoutError(f"not written after {self.config.timeout:.0f} s"))
            return

        # Finished: collects the error of the background thread, if there is one.
        self.wait()

    def wait(self) -> None:
        """Returns when the save under way is complete; raises UserError if it failed."""
        if self._started is None:
            return

        step, since = self._started

        # Poll, so that a save that hangs ends in an error.
        while self.manager.is_saving_in_progress():
            if time.monotonic() - since > self.config.timeout:
                raise self._failed(step, TimeoutError(f"not written after {self.config.timeout:.0f} s"))
            time.sleep(0.01)

        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except Exception as error:
            raise self._failed(step, error) from error
        self._started = None

    def _failed(self, step: int, why: Exception) -> UserError:
        """The error for a save that failed: why, and which older checkpoints are complete."""
        # The save is over: waiting for it again would raise this error once more.
        self._started = None
        reason = " ".join(str(why).split())[:300] or type(why).__name__

        # List anew: the manager's cached list misses steps that this save was about to delete.
        try:
            known = self.manager.all_steps(read=True)
        except Exception:  # the bucket does not answer
            known = self.manager.all_steps()

        whole = sorted(s for s in known if s != step)
        kept = f"those of steps {', '.join(map(str, whole))} are whole" if whole else "there is none"
        told = (
            f"{self.folder / str(step)}: checkpoint cannot be written ({reason}); of the older ones "
            f"{kept}; make room or access, and the same command continues from there"
        )
        return refusal(told, why)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """Reads the checkpoint of `step` (default: the latest).

        Args:
          abstract_state: shapes, types and shardings of the state; shapes and types must be the stored
            ones.
          step: number of the checkpoint.

        Returns:
          The next step, the state placed as the abstract leaves say, and `meta`.

        Raises:
          UserError: there is no checkpoint, or it is damaged or of another model.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{self.folder}: no checkpoint here; train first")

        # The small entries first: the stored layout shows whether the state fits.
        facts = self._read(step, data=ocp.args.JsonRestore())["data"]
        if facts != {"next_step": step}:
            raise self._unusable(step, f"its data entry is {facts}, not that of step {step}")

        meta = self._read_meta(step)
        state = self._read_state(abstract_state, step, meta)
        return step, state, _without_own(meta)

    def restore_part(self, abstract_part: dict[str, Any], step: int) -> dict[str, Any]:
        """Reads top-level entries of the state, such as {"ema": tree}; raises what `restore` does."""
        return self._read_state(abstract_part, step, self._read_meta(step), partial_restore=True)

    def entries(self, step: int) -> tuple[str, ...]:
        """Names of the state's entries, such as "ema"; () for a checkpoint that does not tell them."""
        return tuple(self._read_meta(step).get("small") or ())

    def read_meta(self, step: int) -> dict[str, Any]:
        """Reads what was saved beside the state; raises what `restore` does."""
        return _without_own(self._read_meta(step))

    def _read_meta(self, step: int) -> dict[str, Any]:
        """Reads `meta` and compares its checksum; logs a line if there is none."""
        meta = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        if not isinstance(meta, dict):
            raise self._unusable(step, "its meta entry is no JSON object")

        # Two entries say that there are checksums: a damaged name does not switch the comparison off.
        if "checksum" not in meta and "sums" not in meta:
            log.warning("%s: has no checksums, so damage would not show", self.folder / str(step))
            return meta
        facts = {name: value for name, value in meta.items() if name != "checksum"}
        if meta.get("checksum") != json_sum(facts):
            raise self._unusable(step, "its meta entry does not have the checksum stored with it")
        return meta

    def _metrics(self, step: int) -> dict[str, float] | None:
        """Scores that were saved with a checkpoint, compared with those in its `meta`."""
        metrics, known = self.manager.metrics(step), self._read_meta(step).get("metrics")
        if known is not None and known != (metrics or {}):
            raise self._unusable(step, f"its metrics entry is {metrics}, its meta entry has {known}")
        return metrics

    def _read_state(
        self,
        abstract: dict[str, Any],
        step: int,
        meta: dict[str, Any],
        **options: bool,
    ) -> dict[str, Any]:
        """Reads the state, or entries of it, and splits its joined arrays.

        Args:
          abstract: shapes, types and shardings of the entries to read.
          step: number of the checkpoint.
          meta: of that checkpoint; an older one may lack the layout ("small") or the checksums.
          **options: options of orbax's restore.

        Raises:
          UserError: another layout, or arrays that are missing, damaged or of another shape.
        """
        small = meta.get("small")
        if small is None:
            return self._read(step, state=_restore_args(abstract, **options))["state"]

        # A joined array of the right length could have other arrays inside: compare names and shapes.
        for entry, wanted in packing.layout(abstract).items():
            if (stored := small.get(entry, {})) != wanted:
                raise self._unusable(step, _difference(entry, stored, wanted))

        packed = packing.abstract_packed(abstract)
        stored = self._read(step, state=_restore_args(packed, **options))["state"]
        self._compare_sums(step, stored, meta.get("sums"))
        return packing.unpack(stored, abstract)

    def _compare_sums(self, step: int, stored: dict[str, Any], known: dict[str, int] | None) -> None:
        """Raises UserError, on every process, if an array is not the one that was saved.

        Args:
          step: number of the checkpoint.
          stored: the packed entries that were read.
          known: sums of the saved arrays; None for a checkpoint older than these.
        """
        if known is None:
            return
        wrong = [path for path, found in array_sums(stored).items() if known.get(path) != found]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise self._unusable(
                step, f"{wrong[0]}{more}: not the values that were saved, the file is damaged"
            )

    def _read(self, step: int, **items: Any) -> Any:
        """Reads entries of a checkpoint; every error becomes a UserError."""
        try:
            # Restoring copies each array twice: reuse the pages.
            with malloc.kept_while_loading():
                return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax raises many types; each means an unusable folder
            reason = " ".join(str(error).split())[:400]
            if passes(error) and storage.is_remote(self.folder):
                told = f"{self.folder / str(step)}: checkpoint cannot be read ({reason})"
                raise Transient(told) from error
            raise self._unusable(step, reason) from error

    def _unusable(self, step: int, reason: str) -> UserError:
        """The error for a checkpoint that cannot be read, with the way back to the one before it."""
        path = self.folder / str(step)
        earlier = [s for s in self.manager.all_steps() if s < step]
        advice = f"; to go back to step {max(earlier)}, remove {path}" if earlier else ""
        return UserError(f"{path}: checkpoint cannot be read ({reason}){advice}")


def _without_own(meta: dict[str, Any]) -> dict[str, Any]:
    """Entries of `meta` that callers of `save` gave."""
    return {name: value for name, value in meta.items() if name not in _OWN}


def _bad_metrics(folder: epath.Path) -> UserError | None:
    """The error for the first checkpoint whose metrics are no JSON; None if there is none."""
    for path in folder.glob("*/metrics/metrics"):
        try:
            parse_object(path.read_bytes())
        except ValueError as error:
            return UserError(f"{path}: {error}; remove the checkpoint {path.parent.parent}")
    return None


def _difference(entry: str, stored: dict[str, list], wanted: dict[str, list]) -> str:
    """Names the first array that differs between two layouts of an entry."""
    # Paths that only the checkpoint has come last.
    for path in [*wanted, *stored]:
        if stored.get(path) != wanted.get(path):
            there, here = (str(side.get(path, "not there")) for side in (stored, wanted))
            return f"another model: {entry}.{path} is {there} in the checkpoint, here {here}"

    return f"another model: the arrays of {entry} are in another order"


def _restore_args(abstract: Any, **options: bool) -> ocp.args.PyTreeRestore:
    """Orbax arguments for a strict restore: tree, shapes and shardings as in `abstract`."""
    leaves = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(item=abstract, restore_args=leaves, **options)


def _folder(workdir: str) -> epath.Path:
    """Folder of a run's checkpoints; absolute, as orbax demands."""
    path = epath.Path(storage.as_path(workdir))
    return (path if storage.is_remote(workdir) else path.absolute()) / CHECKPOINTS


def _policy(config: CheckpointConfig) -> policies.AnyPreservationPolicy:
    """Policy of which checkpoints are kept: the newest, every `keep_every` steps, and the best."""
    # A checkpoint is kept if any of these rules keeps it.
    kept: list[policies.PreservationPolicy] = [policies.LatestN(config.keep)]
    if config.keep_every:
        kept.append(policies.EveryNSteps(config.keep_every))

    if config.best:
        best = config.best
        kept.append(
            policies.BestN(
                get_metric_fn=lambda metrics: metrics[best],
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    return policies.AnyPreservationPolicy(kept)


def abstract_with_shardings(tree: Any, shardings: Any) -> Any:
    """Makes the ShapeDtypeStructs from which orbax knows where each leaf goes."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
