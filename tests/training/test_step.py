# SPDX-License-Identifier: Apache-2.0
"""One optimizer step: accumulation, rematerialization, precision and freezing change nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from digseg_jax import trees
from digseg_jax.errors import UserError
from digseg_jax.models import remat
from digseg_jax.runtime import sharding
from digseg_jax.runtime.sharding import infer_shardings, place, place_batch
from digseg_jax.training.optim import B1, make_optimizer
from digseg_jax.training.step import averaged, initial_state
from digseg_jax.training.tasks.base import example_keys
from digseg_jax.training.tasks.segmentation import SegmentationTask


def uneven_batch():
    """Eight examples; ignored pixels are spread so that every part has another share of them."""
    batch = tiny.batch()
    rng = np.random.default_rng(5)
    cells = rng.random((8, 8, 8)) < np.linspace(0.0, 0.9, 8)[:, None, None]
    batch["label"][cells.repeat(4, 1).repeat(4, 2)] = -1
    return batch


def one_step(config, mesh=None, batch=None, task=None):
    """Metrics and state after one step from the tiny prior."""
    mesh = mesh or tiny.mesh()
    task = task or SegmentationTask(config)
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = initial_state(task.initial(), optimizer, config.optim)
    shardings, frozen = infer_shardings(state, mesh), infer_shardings(task.frozen, mesh)
    state = place(state, shardings)
    step = tiny.train_step(task, config, mesh, (shardings, frozen))
    batch = place_batch(uneven_batch() if batch is None else batch, mesh)
    state, metrics = step(state, place(task.frozen, frozen), batch)
    return jax.device_get(metrics), jax.device_get(state)


def abstract_step(config):
    """Shapes and dtypes of the state and the metrics after a step; nothing is compiled."""
    task, mesh = SegmentationTask(config), tiny.mesh()
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = jax.eval_shape(lambda p: initial_state(p, optimizer, config.optim), task.abstract)
    shardings = infer_shardings((state, task.frozen), mesh)
    step = tiny.train_step(task, config, mesh, shardings)
    return jax.eval_shape(step, state, task.frozen, tiny.batch())


def adam(state):
    """Adam's part of the optimizer state, with the moments `mu` and `nu`."""
    leaves = jax.tree.leaves(state["opt"], is_leaf=lambda node: hasattr(node, "mu"))
    return next(x for x in leaves if hasattr(x, "mu"))


def gradients(state):
    """The clipped gradients, from Adam's first moment after one step."""
    moments = trees.flatten(adam(state).mu)
    return {path: x / (1.0 - B1) for path, x in moments.items()}


def dtypes(tree):
    return {np.dtype(x.dtype).name for x in jax.tree.leaves(tree)}


PLAIN = ("none", "block")  # modes that are compared always; each takes a compilation
OPTIONS = {"optim__clip_norm": 1e9, "optim__learning_rate": 1e-3, "data__text_noise": 0.2}


@pytest.fixture(scope="module")
def reference(folders):
    config = tiny.config(folders, **OPTIONS)
    metrics, state = one_step(config)
    return metrics, gradients(state)


def assert_same_step(got, reference, config, atol):
    metrics, state = got
    assert metrics["loss"] == pytest.approx(reference[0]["loss"], abs=atol)
    assert metrics["grad_norm"] == pytest.approx(reference[0]["grad_norm"], rel=atol)
    assert metrics["mean_timestep"] == pytest.approx(reference[0]["mean_timestep"], rel=1e-6)
    grads = gradients(state)
    assert grads.keys() == reference[1].keys()
    for path, expected in reference[1].items():
        np.testing.assert_allclose(grads[path], expected, atol=atol, err_msg=path)


class TestAccumulation:
    @pytest.mark.parametrize(
        "devices", [2, pytest.param(1, marks=pytest.mark.slow)], ids=["fsdp", "one device"]
    )
    def test_four_parts_of_two_give_the_gradients_of_eight(
        self, devices, folders, reference, monkeypatch
    ):
        """With unequal counts of valid cells and text noise, which both look at the whole batch."""
        monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)
        config = tiny.config(folders, compute__accumulation=4, **OPTIONS)
        got = one_step(config, tiny.mesh(fsdp=devices))
        assert_same_step(got, reference, config, atol=1e-5)

    def test_a_mean_of_the_parts_own_losses_would_be_another_loss(self, folders, reference):
        config = tiny.config(folders, **OPTIONS)
        task, batch = SegmentationTask(config), uneven_batch()
        params = task.initial()

        @jax.jit
        def loss(part):
            return task.loss(params, task.frozen, part, example_keys(0, part["index"]))[0]

        parts = [{k: v[i::4] for k, v in batch.items()} for i in range(4)]
        naive = np.mean([loss(part) for part in parts])
        assert abs(naive - reference[0]["loss"]) > 1e-3

    def test_clipping_and_average_happen_once_per_step(self, folders):
        config = tiny.config(folders, compute__accumulation=2, **OPTIONS | {"optim__clip_norm": 0.01})
        task = SegmentationTask(config)
        before = trees.flatten(task.initial())
        metrics, state = one_step(config, task=task)
        assert state["step"] == 1
        squares = sum(np.square(g).sum() for g in gradients(state).values())
        assert np.sqrt(squares) == pytest.approx(0.01, rel=1e-3)
        assert metrics["grad_norm"] > 0.02  # before clipping
        params, ema = (trees.flatten(state[kind]) for kind in ("params", "ema"))
        for path, start in before.items():  # the average starts with a rate of 1 / 10
            expected = start + 0.9 * (params[path] - start)
            np.testing.assert_allclose(ema[path], expected, atol=1e-6, err_msg=path)

    def test_a_batch_that_cannot_be_parted_is_refused(self, folders, tmp_path):
        config = tiny.config(folders, compute__accumulation=4)
        with pytest.raises(UserError) as caught:
            tiny.trainer(config, SegmentationTask(config), tiny.mesh(data=4), tmp_path).check_batch()
        message = tiny.one_line(caught.value)
        assert "config.train.batch_size=8" in message and "multiple of 16" in message
        assert "config.compute.accumulation=4" in message


class TestRematerialization:
    @pytest.mark.parametrize(
        "mode",
        ["block", *(pytest.param(m, marks=pytest.mark.slow) for m in remat.MODES if m not in PLAIN)],
    )
    def test_it_changes_no_gradient(self, mode, folders, reference):
        config = tiny.config(folders, compute__remat=mode, **OPTIONS)
        assert_same_step(one_step(config), reference, config, atol=1e-6)

    @staticmethod
    def kept(folders, mode) -> int:
        """Bytes that the forward pass hands to the backward pass."""
        task = SegmentationTask(tiny.config(folders, compute__remat=mode))
        batch = tiny.batch(4)
        keys = example_keys(0, batch["index"])

        def residuals(params):
            return jax.vjp(lambda p: task.loss(p, task.frozen, batch, keys)[0], params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, task.abstract))
        return sum(x.size * x.dtype.itemsize for x in leaves)

    def test_each_mode_keeps_less_for_the_backward_pass(self, folders):
        kept = {mode: self.kept(folders, mode) for mode in remat.MODES}
        assert kept["block"] < kept["dots"] < kept["none"], kept
        assert kept["attention"] < kept["none"], kept

    def test_the_parameters_keep_their_paths(self, folders):
        shapes = [SegmentationTask(tiny.config(folders, compute__remat=mode)).abstract
                  for mode in ("none", "block")]  # fmt: skip
        assert trees.flatten(shapes[0]) == trees.flatten(shapes[1])

    @pytest.mark.parametrize(("shape", "again"), [((1, 8, 8, 63), True), ((1, 8, 8, 64), False)])
    def test_large_is_block_where_a_map_has_more_pixels_than_channels(self, shape, again):
        def eqns(mode):
            run = remat.block(lambda x, time: jnp.sin(x), mode)
            return [e.primitive for e in jax.make_jaxpr(lambda x: run(x, None))(jnp.ones(shape)).eqns]

        assert eqns("large") == eqns("block" if again else "none")
        assert eqns("block") != eqns("none")

    def test_an_unknown_mode_is_refused_by_the_models(self):
        with pytest.raises(ValueError, match="legal: none, block, large, attention, dots"):
            remat.block(abs, "some")


def equations(jaxpr):
    """Every equation, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.fixture(scope="module")
def program(folders):
    """The loss and its gradient with bfloat16 activations, and the shapes of its results."""
    task = SegmentationTask(tiny.config(folders, model__dtype="bfloat16"))
    batch = tiny.batch(4)
    keys = example_keys(0, batch["index"])
    grad = jax.value_and_grad(lambda p: task.loss(p, task.frozen, batch, keys)[0])
    return jax.make_jaxpr(grad, return_shape=True)(task.abstract)


class TestPrecision:
    def test_products_and_convolutions_are_bfloat16(self, program):
        products = [e for e in equations(program[0].jaxpr)
                    if e.primitive.name in ("dot_general", "conv_general_dilated")]  # fmt: skip
        wide = [e for e in products if e.invars[1].aval.dtype != jnp.bfloat16]
        assert len(products) > 50
        # what is left are products with the float32 gradients of attention's scores
        assert all(e.primitive.name == "dot_general" for e in wide) and len(wide) < len(products) / 4

    def test_softmax_norms_and_loss_are_float32(self, program):
        closed, (loss, grads) = program
        seen = set()
        for equation in equations(closed.jaxpr):
            name, result = equation.primitive.name, equation.outvars[0].aval
            # the exponentials of three dimensions belong to GELU, those of four to softmax
            if name in ("rsqrt", "reduce_max") or (name == "exp" and result.ndim == 4):
                assert result.dtype == jnp.float32, equation
                seen.add(name)
        assert seen == {"rsqrt", "reduce_max", "exp"}
        assert loss.dtype == jnp.float32
        assert dtypes(grads) == {"float32"}

    def test_weights_moments_and_average_stay_float32(self, folders):
        state, metrics = abstract_step(tiny.config(folders, model__dtype="bfloat16"))
        assert dtypes(state) == {"float32", "int32"} and metrics["loss"].dtype == jnp.float32
        assert dtypes((state["params"], state["ema"], adam(state).mu)) == {"float32"}

    def test_only_the_first_moment_may_be_bfloat16(self, folders):
        state, _ = abstract_step(tiny.config(folders, optim__mu_dtype="bfloat16"))
        assert dtypes(adam(state).mu) == {"bfloat16"}
        assert dtypes((state["params"], state["ema"], adam(state).nu)) == {"float32"}

    def test_the_loss_is_that_of_float32_to_a_few_percent(self, folders, reference):
        task = SegmentationTask(tiny.config(folders, model__dtype="bfloat16", **OPTIONS))
        batch = uneven_batch()
        keys = example_keys(0, batch["index"])
        loss = jax.jit(lambda p: task.loss(p, task.frozen, batch, keys)[0])(task.initial())
        assert float(loss) == pytest.approx(reference[0]["loss"], rel=0.03)


class TestFreezing:
    PATTERNS = ("^down_blocks", r"\.norm\d?\.")

    def test_what_matches_stays_and_has_no_moments(self, folders):
        config = tiny.config(
            folders, optim__freeze=self.PATTERNS, optim__weight_decay=0.1, optim__ema_decay=0.5
        )
        task = SegmentationTask(config)
        before = trees.flatten(task.initial())
        metrics, state = one_step(config, task=task)
        learned = gradients(state)
        for kind in ("params", "ema"):
            for path, value in trees.flatten(state[kind]).items():
                frozen = path.startswith("down_blocks") or ".norm" in path
                assert (path in learned) != frozen
                if frozen:
                    np.testing.assert_array_equal(value, before[path], err_msg=path)
        moved = trees.flatten(state["params"])
        assert any((moved[p] != before[p]).any() for p in learned)
        squares = sum(np.square(g).sum() for g in learned.values())
        assert np.sqrt(squares) == pytest.approx(min(metrics["grad_norm"], 1.0), rel=1e-4)

    def test_a_pattern_that_matches_nothing_names_what_is_near(self, folders, tmp_path):
        config = tiny.config(folders, optim__freeze=("^down_block\\.0",))
        with pytest.raises(UserError) as caught:
            tiny.trainer(config, SegmentationTask(config), tiny.mesh(), tmp_path)
        message = tiny.one_line(caught.value)
        assert "config.optim.freeze" in message and "'down_blocks.0'" in message
        assert "mid_block" in message  # the list of what there is

    def test_freezing_everything_is_refused(self, folders, tmp_path):
        config = tiny.config(folders, optim__freeze=(".",))
        with pytest.raises(UserError, match="nothing is left to train"):
            tiny.trainer(config, SegmentationTask(config), tiny.mesh(), tmp_path)

    def test_a_pattern_that_is_none_is_refused_with_the_configuration(self, folders):
        with pytest.raises(UserError, match="config.optim.freeze.*not a regular expression"):
            tiny.config(folders, optim__freeze=("(",))


def test_without_a_decay_no_average_is_kept(folders):
    state, _ = abstract_step(tiny.config(folders, optim__ema_decay=0.0))
    assert "ema" not in state and averaged(state) is state["params"]
    kept, _ = abstract_step(tiny.config(folders))
    assert averaged(kept) is kept["ema"]
