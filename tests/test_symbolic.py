"""Every public function of a batch, exported where the batch's sizes are not known yet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from tests.calls import batched, call, narrow, takes, value_and_gradients
from tests.catalogue import CATALOGUE, flags
from tests.comparison import close

pytestmark = pytest.mark.usefixtures("cheap_programs")

# on_mesh needs rows that divide among the devices: JAX wants to know that of a symbolic size.
BATCHED = [name for name in CATALOGUE if batched(name) and name != "on_mesh"]
# Of one or two classes or columns each: for a number of rows that is not known, 8192 are assumed.
SMALL_BLOCKS = 30 * 8192


@pytest.mark.parametrize("name", BATCHED)
def test_symbolic_batch(name):
    in_blocks = takes(name, "memory_budget")  # of which the last is seldom full
    sizes = [{"b": 17, "t": 5}, {"b": 3, "t": 2}]
    options = {"memory_budget": SMALL_BLOCKS} if in_blocks else {}
    compare(name, sizes if in_blocks else sizes[:1], **options)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in BATCHED if takes(name, "reduction")])
def test_symbolic_batch_of_a_mean(name):
    """With rows that do not count; of a linear form in a block of tokens, or two of them."""
    sizes = [{"b": 3, "t": 2}, {"b": 90, "t": 101}]
    sizes = sizes if takes(name, "memory_budget") else sizes[:1]
    compare(name, sizes, {"where": flags(CATALOGUE[name].out[0])}, reduction="mean")


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in BATCHED if takes(name, "forward_mode")])
def test_symbolic_batch_in_forward_mode(name):
    options = {"memory_budget": SMALL_BLOCKS} if takes(name, "memory_budget") else {}
    compare(name, [{"b": 5, "t": 3}], forward_mode=True, **options)


def compare(name, sizes, more_draws=None, **options):
    """The exported program gives what the plain call gives, and so do its gradients."""
    draws = CATALOGUE[name].draws | (more_draws or {})
    entry = CATALOGUE[name]._replace(draws=draws)

    run = functools.partial(waving, name, **options)
    program = export.export(jax.jit(run))(symbolic(entry))
    for size in sizes:
        arrays = narrow(entry.arrays(1, **size))
        found, wanted = program.call(arrays), jax.jit(run)(arrays)
        size = max(np.max(np.abs(x), initial=1e-3) for x in wanted[0])
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            close(x, y, 1e-5, size=size)


def symbolic(entry):
    """The arrays of an entry, where `b` and `t` are symbolic."""
    example = narrow(entry.arrays())
    sizes = dict(zip("bt", export.symbolic_shape("b, t"), strict=True))

    def of(axes, x):
        shape = (sizes.get(axis, n) for axis, n in zip(axes.split(), x.shape, strict=True))
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    return {key: of(draw.axes, example[key]) for key, draw in entry.draws.items()}


def waving(name, arrays, **options):
    """Results and gradients under cotangents that differ from example to example."""

    def wave(x):
        # Not an `arange` of all entries: jax 0.8 cannot reshape it to a shape such as `(b, t - 1)`.
        axes = (jax.lax.broadcasted_iota(jnp.float32, x.shape, a) for a in range(x.ndim))
        return jnp.cos(sum(np.float32(7**a) * axis for a, axis in enumerate(axes)))

    results = jax.eval_shape(lambda arrays: call(name, arrays, **options), arrays)
    return value_and_gradients(name, arrays, [wave(x) for x in results], **options)
