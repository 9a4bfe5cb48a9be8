"""How tests over all public functions call them, and what the references say of such a call."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np

import ce_jax
from tests.catalogue import CATALOGUE


def function_of(name):
    """The public function; a name in the catalogue may go on with what is special about a call."""
    return getattr(ce_jax, name.split()[0])


def takes(name, option):
    return option in inspect.signature(function_of(name)).parameters


def batched(name):
    """Whether the function is one of a number of examples."""
    return any("b" in draw.axes.split() for draw in CATALOGUE[name].draws.values())


def call(name, arrays, **options):
    """The results, as a list."""
    entry = CATALOGUE[name]
    function = entry.call or function_of(name)
    return jax.tree.leaves(function(**arrays, **{**entry.options, **options}))


def value_and_gradients(name, arrays, cotangents, **options):
    """The results, and the gradients of their inner product with the cotangents."""

    def scalar(smooth):
        found = call(name, {**arrays, **smooth}, **options)
        return _inner(found, cotangents), found

    smooth = {key: arrays[key] for key in CATALOGUE[name].smooth()}
    gradients, found = jax.grad(scalar, has_aux=True)(smooth)
    return found, gradients


def narrow(arrays):
    """The arrays in the dtypes that JAX has without x64."""
    kinds = {"f": np.float32, "i": np.int32, "b": bool}
    return {k: np.asarray(x).astype(kinds[np.asarray(x).dtype.kind]) for k, x in arrays.items()}


def truth(name, arrays, **options):
    """What the reference returns, as a list."""
    entry = CATALOGUE[name]
    found = entry.truth(**arrays, **{**entry.options, **options})
    return [np.asarray(x) for x in (found if isinstance(found, tuple) else (found,))]


def true_slope(name, arrays, key, cotangents, step=1e-6, **options):
    """The gradient of the inner product by `arrays[key]`: central differences of the reference."""

    def moved(at, size):
        x = arrays[key].copy()
        x[at] += size
        return float(_inner(truth(name, {**arrays, key: x}, **options), cotangents, np))

    slope = np.zeros_like(arrays[key])
    with np.errstate(divide="ignore", invalid="ignore"):  # a share of a class that is banned
        for at in np.ndindex(slope.shape):
            slope[at] = (moved(at, step) - moved(at, -step)) / (2 * step)
    return slope


def unequal(results):
    """A cotangent for each result, different for each example."""
    draw = np.random.default_rng(5)
    return [draw.normal(size=np.shape(x)) for x in results]


def _inner(results, cotangents, numpy=jnp):
    """Over the results that are floating numbers: integers have no derivative."""
    pairs = zip(results, cotangents, strict=True)
    floating = [(x, g) for x, g in pairs if numpy.issubdtype(x.dtype, np.floating)]
    return sum((numpy.sum(x * numpy.asarray(g, x.dtype)) for x, g in floating), numpy.zeros(()))
