"""Every public function of a batch, exported where the batch's sizes are not known yet."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import ce_jax
from tests.catalogue import CATALOGUE, call

# on_mesh needs rows that divide among the devices: JAX wants to know that of a symbolic size.
BATCHED = [
    name
    for name, entry in CATALOGUE.items()
    if any("b" in draw.axes.split() for draw in entry.draws.values()) and name != "on_mesh"
]


def takes(name, option):
    return option in inspect.signature(getattr(ce_jax, name)).parameters


def exported(function, name):
    """The function of the arrays of an entry, of which `b` and `t` are symbolic."""
    entry, example = CATALOGUE[name], narrow(CATALOGUE[name].arrays())
    sizes = dict(zip("bt", export.symbolic_shape("b, t"), strict=True))
    specs = {
        key: jax.ShapeDtypeStruct(
            tuple(
                sizes.get(axis, size)
                for axis, size in zip(draw.axes.split(), example[key].shape, strict=True)
            ),
            example[key].dtype,
        )
        for key, draw in entry.draws.items()
    }
    return export.export(jax.jit(function))(specs)


def narrow(arrays):
    kinds = {"f": np.float32, "i": np.int32, "b": bool}
    return {k: np.asarray(x).astype(kinds[np.asarray(x).dtype.kind]) for k, x in arrays.items()}


def value_and_gradients(name, arrays, **options):
    """What it returns, and gradients under cotangents that differ from example to example."""
    smooth = {key: arrays[key] for key in CATALOGUE[name].smooth()}

    def scalar(smooth):
        found = jax.tree.leaves(call(name, **{**arrays, **smooth}, **options))
        floating = [x for x in found if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((_unequal_sum(x) for x in floating), jnp.zeros(())), found

    gradients, found = jax.grad(scalar, has_aux=True)(smooth)
    return found, gradients


def _unequal_sum(x):
    return jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape))


def compare(name, sizes, **options):
    function = functools.partial(value_and_gradients, name, **options)
    program = exported(function, name)
    for size in sizes:
        arrays = narrow(CATALOGUE[name].arrays(1, **size))
        found, wanted = program.call(arrays), jax.jit(function)(arrays)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            scale = np.max(np.abs(y), initial=1e-3)
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("name", BATCHED)
def test_symbolic_batch(name):
    """Where there are blocks, of one or two classes or columns each."""
    options = {"memory_budget": 30 * 8192} if takes(name, "memory_budget") else {}
    compare(name, ({"b": 3, "t": 2}, {"b": 17, "t": 5}), **options)


@pytest.mark.parametrize("name", [name for name in BATCHED if takes(name, "reduction")])
def test_symbolic_batch_of_a_mean(name):
    """With rows that do not count; of the linear form in a block of tokens, or several of them."""
    compare(name, ({"b": 3, "t": 2}, {"b": 90, "t": 101}), reduction="mean")
