# SPDX-License-Identifier: Apache-2.0
"""Eight simulated CPU devices for every test, and the small things that many of them share."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import tempfile

# Compiling is most of what the tests do: no effort at optimizing programs that run a few times, and
# each program only once, also for the processes that tests start. Set before JAX is imported. A folder
# in JAX_COMPILATION_CACHE_DIR keeps the programs for the next session.
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    _CACHE = tempfile.mkdtemp(prefix="digseg_jax_test_cache_")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

# Traces make and drop millions of small objects, in which the collector finds next to nothing:
# looking less often takes a fifth off the tracing of a large model.
gc.set_threshold(100_000, 20, 100)

import jaxtyping  # noqa: E402

# Annotated functions of these rooms are checked while the tests run, the shapes of arrays too. With
# CHECK_TYPES=all those of the whole package are: not every stand-in of the tests is legal there yet.
CHECKED = ["digseg_jax.config", "digseg_jax.diffusion", "digseg_jax.metrics", "digseg_jax.models"]
if os.environ.get("CHECK_TYPES") == "all":
    CHECKED = ["digseg_jax"]
jaxtyping.install_import_hook(CHECKED, "checked_types.check")

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # before any backend starts
flags.FLAGS.mark_as_parsed()  # grain's worker processes look flags up


@pytest.fixture(autouse=True)
def _untouched_log() -> None:
    """Hands every test the package's logger as it is before `log.setup`, whatever ran before.

    pytest reads the lines of a logger that does not propagate by a handler of its own, so that a test
    that switched propagation on saw each line twice, if an earlier test had called `log.setup`.
    """
    log = logging.getLogger("digseg_jax")
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Lets a test pass what annotations forbid, to see how the package itself refuses it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny VAE, 4-channel U-Net and text tower: {"vae", "unet", "text"}."""
    import tiny

    return tiny.write_folders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature hub's repositories, for `hub.serve`; not to be changed."""
    import hub

    return hub.write_all(tmp_path_factory.mktemp("repositories"))


@pytest.fixture(scope="session")
def sd15_folders(repositories: Path) -> dict[str, str]:
    """As `folders`, of the structure-true miniature of Stable Diffusion 1.5."""
    import hub

    return hub.pipeline_folders(repositories, "sd-1.5")


@pytest.fixture(scope="session")
def cover():
    """The real land cover; skips where its packages are not installed."""
    import tiny

    return tiny.land_cover()
