"""Arrays over explicit mesh axes, of which JAX knows how each is sharded."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ce_jax
from tests.calls import narrow, truth, unequal, value_and_gradients
from tests.catalogue import CATALOGUE
from tests.comparison import accuracy

pytestmark = [pytest.mark.cpu, pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

DEVICES = 4


def by_example(name):
    """The arrays with one entry for each example."""
    return [key for key, x in CATALOGUE[name].draws.items() if x.axes.split()[:1] == ["b"]]


# All but what is read in blocks, which refuses such arrays, and functions of one array.
OF_ROWS = [
    name
    for name, entry in CATALOGUE.items()
    if len(by_example(name)) > 1
    and not {"hidden", "queries", "images", "embeddings"} & set(entry.draws)
    and name != "on_mesh"
]


def run(name, arrays, cotangents, sharded):
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = {
            key: jax.device_put(x, NamedSharding(mesh, P("x") if key in sharded else P()))
            for key, x in arrays.items()
        }
        return jax.jit(functools.partial(value_and_gradients, name))(placed, cotangents)


@pytest.mark.parametrize("name", OF_ROWS)
def test_examples_of_which_some_arrays_are_on_every_device(name):
    """Those that the first one is not, and then all but the first."""
    arrays = narrow(CATALOGUE[name].arrays(4, b=DEVICES))
    cotangents = [np.float32(x) for x in unequal(truth(name, arrays))]
    wanted = jax.jit(functools.partial(value_and_gradients, name))(arrays, cotangents)
    first, *others = by_example(name)
    for sharded in ([first], others):
        found = run(name, arrays, cotangents, sharded)
        close = functools.partial(
            np.testing.assert_allclose, rtol=4 * accuracy("float32"), atol=1e-6
        )
        jax.tree.map(close, found, wanted)


def test_scalars_beside_sharded_tokens():
    """Without a weight or mask of the tokens' sharding, which would bring all to it."""
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Explicit,))
    x = np.linspace(-2, -1, 8, dtype=np.float32)
    wanted = ce_jax.ppo_clip_loss(x, x - 0.1, 1.0)
    with jax.set_mesh(mesh):
        tokens = jax.device_put(x, NamedSharding(mesh, P("x")))
        found = ce_jax.ppo_clip_loss(tokens, x - 0.1, 1.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
