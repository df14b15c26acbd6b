# SPDX-License-Identifier: Apache-2.0
"""Eight simulated CPU devices for every test, and the small things that many of them share."""

from __future__ import annotations

import jax
import pytest
from absl import flags

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # before any backend starts
flags.FLAGS.mark_as_parsed()  # grain's worker processes look flags up


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny VAE, 4-channel U-Net and text tower: {"vae", "unet", "text"}."""
    import tiny

    return tiny.write_folders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def cover():
    """The real land cover; skips where its packages are not installed."""
    import tiny

    return tiny.land_cover()
