# SPDX-License-Identifier: Apache-2.0
"""Small arrays joined for storage: nothing is lost, nothing moves, the layout tells what is where."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from digseg_jax.config.schema import CheckpointConfig
from digseg_jax.errors import UserError
from digseg_jax.io import packing
from digseg_jax.io.checkpoint import Checkpointer
from digseg_jax.runtime.sharding import FSDP_MIN_SIZE, infer_shardings, place

LARGE = (FSDP_MIN_SIZE // 64, 64)


def make_state(**changes):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=LARGE).astype(np.float32)
    params = {
        "a": {"kernel": kernel, "bias": np.arange(5.0, dtype=np.float32)},
        "b": {"scale": np.ones((2, 3), np.float32), "count": np.array([7, 8], np.int32)},
    }
    optimizer = (jnp.zeros((), jnp.int32), {"mu": jax.tree.map(lambda x: 2 * x, params)}, ())
    return {"step": np.array(3, np.int32), "params": params, "opt": optimizer} | changes


def on(mesh, state):
    return place(state, infer_shardings(state, mesh))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.mark.parametrize("axes", [{}, {"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_unpacking_undoes_packing_on_any_mesh(axes):
    state = on(tiny.mesh(**axes), make_state())
    packed = packing.pack(state)
    assert packed["params"]["large"]["a"]["kernel"] is state["params"]["a"]["kernel"]
    assert {k: v.shape for k, v in packed["params"]["small"].items()} == {
        "float32": (11,), "int32": (2,),
    }  # fmt: skip
    again = packing.unpack(packed, abstract(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_unpacking_compiles_nothing(caplog):
    """To compile a program that cuts hundreds of arrays takes longer than to read a checkpoint."""
    state = on(tiny.mesh(fsdp=4), make_state(ema={"bias": np.ones(3), "scale": np.ones(17)}))
    packed, wanted = packing.pack(state), abstract(state)
    with jax.log_compiles():
        packing.unpack(packed, wanted)
        assert not [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]
        jax.jit(lambda x: x + len(packed))(1.0)
    assert [r for r in caplog.records if "ompil" in r.getMessage()]  # it would have been told


def test_shapes_are_packed_as_arrays_are():
    state = on(tiny.mesh(fsdp=4), make_state())
    expected = abstract(packing.pack(state))
    found = packing.abstract_packed(abstract(state))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.sharding.is_equivalent_to(y.sharding, len(x.shape))


def test_the_layout_names_every_small_array():
    layout = packing.layout(make_state())
    assert layout["params"] == {
        "a.bias": ["float32", 5], "b.count": ["int32", 2], "b.scale": ["float32", 2, 3],
    }  # fmt: skip
    assert layout["step"] == {"value": ["int32"]}
    assert "1.mu.a.bias" in layout["opt"] and json.loads(json.dumps(layout)) == layout


def test_a_checkpoint_has_few_arrays_and_restores_on_another_mesh(tmp_path):
    state = on(tiny.mesh(fsdp=4), make_state())
    with Checkpointer(str(tmp_path), CheckpointConfig()) as checkpointer:
        checkpointer.save(3, state, {"config": {}})
    wanted = abstract(on(tiny.mesh(data=2), make_state()))
    with Checkpointer(str(tmp_path), CheckpointConfig()) as checkpointer:
        step, again, meta = checkpointer.restore(wanted)
        part = checkpointer.restore_part({"params": wanted["params"]}, 3)
    assert step == 3 and "small" not in meta
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(part["params"]["a"]["bias"], state["params"]["a"]["bias"])


def test_a_small_array_of_another_model_is_named(tmp_path):
    mesh = tiny.mesh()
    with Checkpointer(str(tmp_path), CheckpointConfig()) as checkpointer:
        checkpointer.save(3, on(mesh, make_state()), {})
        other = make_state()
        # as many numbers in all
        other["params"]["a"]["bias"] = np.zeros(6, np.float32)
        other["params"]["b"]["scale"] = np.zeros(5, np.float32)
        with pytest.raises(UserError) as caught:
            checkpointer.restore(abstract(on(mesh, other)))
    message = tiny.one_line(caught.value)
    assert "params.a.bias is ['float32', 5] in the checkpoint, here ['float32', 6]" in message
    assert str(tmp_path / "checkpoints" / "3") in message


def test_arrays_without_a_mesh_are_packed_too():
    packed = packing.pack({"x": jnp.arange(3.0), "y": jnp.ones(2)})
    assert packed["x"]["small"]["float32"].shape == (3,)
