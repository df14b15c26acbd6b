# SPDX-License-Identifier: Apache-2.0
"""A task small enough to compile at once, with all that the loop must keep."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from digseg_jax.training.tasks.base import Task, to_unit


class ToyTask(Task):
    """A task small enough to compile at once, with all that the loop must keep: images and keys."""

    frozen = {"shift": np.float32(0.1)}

    def prepare(self):
        """It has no constants."""

    @property
    def abstract(self):
        return jax.eval_shape(self.initial)

    def initial(self):
        return {"kernel": np.full((16, 8), 0.5, np.float32), "bias": np.zeros(3, np.float32)}

    def loss(self, params, frozen, batch, keys):
        image = to_unit(batch["image"])
        noise = jax.vmap(lambda k: jax.random.normal(k, image.shape[1:]))(keys)
        guess = image * params["kernel"].mean() + params["bias"] + frozen["shift"]
        return jnp.square(guess - image - 0.1 * noise).mean(), {"spread": image.std()}
