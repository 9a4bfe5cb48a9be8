"""What accuracy needs of `clip_loss`: the best match of each pair, from its one pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ce_jax
from tests.test_contrastive import F32, PAIRS, budget, problem
from tests.test_contrastive_sharded import mesh
from tests.test_linear_transforms import dot_products

pytestmark = pytest.mark.usefixtures("cheap_programs")

__all__ = ["mesh"]  # a fixture


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("statistics", [False, True])
def test_one_matrix_serves_both_directions(statistics):
    """Value and gradient take four matmuls: the logits twice, and one for each side."""
    x = jnp.ones((6, 2))
    options = {"reduction": "sum", "return_statistics": statistics}
    loss = functools.partial(ce_jax.clip_loss, **options, **budget("clip_loss", 6, 2, "f8"))
    gradient = jax.grad(loss, (0, 1), has_aux=statistics)
    assert len(dot_products(jax.make_jaxpr(loss)(x, x).jaxpr)) == 1
    assert len(dot_products(jax.make_jaxpr(gradient)(x, x).jaxpr)) == 4


def matches(images, texts, exists):
    """Which text each image is taken for, and which image each text, of those that exist."""
    z = np.where(exists[:, None], images, 0) @ np.where(exists[:, None], texts, 0).T
    z = np.where(exists[:, None] & exists, z, -np.inf)
    return np.where(exists, z.argmax(1), 0), np.where(exists, z.argmax(0), 0)


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("columns", [2, 3, 100])
def test_statistics_of_both_directions(columns, forward_mode):
    """In blocks of any size; the first of equal ones; loss and slopes are what they are without."""
    arguments = problem("clip_loss", rows=11, where=True, sample_weight=True)
    for key in PAIRS["clip_loss"]:
        arguments[key][[8, 10]] = arguments[key][6]
    arguments = {k: jnp.asarray(v, bool if k == "where" else F32) for k, v in arguments.items()}
    options = {"reduction": "mean", "forward_mode": forward_mode}
    options |= budget("clip_loss", 11, columns, F32)

    @jax.jit
    def both(images):
        def loss(images, **more):
            return ce_jax.clip_loss(**(arguments | {"images": images}), **options, **more)

        plain = jax.value_and_grad(loss)(images)
        return plain, jax.value_and_grad(loss, has_aux=True)(images, return_statistics=True)

    (value, slope), ((same_value, found), same_slope) = both(arguments["images"])
    assert value == same_value
    np.testing.assert_array_equal(slope, same_slope)
    wanted = matches(*(np.asarray(arguments[k]) for k in (*PAIRS["clip_loss"], "where")))
    assert {6} <= {*wanted[0]} | {*wanted[1]}
    assert not {8, 10} & {*wanted[0], *wanted[1]}
    for ids, of_direction in zip(found, wanted, strict=True):
        assert ids.dtype == jnp.int32
        np.testing.assert_array_equal(ids, of_direction)


@pytest.mark.cpu
def test_statistics_of_a_sharded_batch(mesh):
    """Ids are those among the pairs of all devices; under vmap too."""
    arguments = [problem("clip_loss", rows=12, where=True, seed=seed) for seed in (0, 1)]
    names = (*PAIRS["clip_loss"], "where")
    stacked = [np.stack([x[name] for x in arguments]) for name in names]
    arrays = [jnp.asarray(x, bool if x.dtype == bool else F32) for x in stacked]

    @jax.jit
    @jax.vmap
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    def sharded(*arrays):
        more = {"axis_name": "data", "return_statistics": True}
        return ce_jax.clip_loss(*arrays, **more, **budget("clip_loss", 3, 5, F32))[1]

    found = sharded(*arrays)
    for i in range(2):
        wanted = matches(*(np.asarray(x[i]) for x in arrays))
        for ids, of_direction in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(ids[i], of_direction)
