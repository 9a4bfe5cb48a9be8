"""One look at every public function: value, gradient, vmap under jit, and a mesh if it has one."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ce_jax
from tests.catalogue import CATALOGUE, call
from tests.comparison import accuracy, close

pytestmark = pytest.mark.smoke

FUNCTIONS = {name for name, value in vars(ce_jax).items() if inspect.isfunction(value)}
SHARDED = [name for name, entry in CATALOGUE.items() if entry.sharded]


def test_the_catalogue_has_every_public_function():
    public = {name for name in FUNCTIONS if not name.startswith("_")}
    assert public == set(CATALOGUE)


def test_the_catalogue_knows_what_takes_an_axis_name():
    takes = [
        f for f in CATALOGUE if "axis_name" in inspect.signature(getattr(ce_jax, f)).parameters
    ]
    assert sorted(takes) == sorted(SHARDED)


@pytest.mark.parametrize("name", CATALOGUE)
def test_value_and_gradient(name):
    """Of two problems at once, under vmap and jit."""
    entry = CATALOGUE[name]
    problems = [entry.arrays(seed) for seed in (1, 2)]
    truths = [_leaves(entry.truth(**x, **entry.options)) for x in problems]
    cotangents = [_cotangents(truth) for truth in truths]
    smooth = entry.smooth()

    @jax.jit
    @jax.vmap
    def run(arrays, cotangents):
        def scalar(smooth):
            found = _leaves(call(name, **arrays, **smooth))
            return _inner(found, cotangents), found

        others = {k: arrays.pop(k) for k in smooth}
        return jax.grad(scalar, has_aux=True)(others)

    gradients, values = run(*(_stacked(x) for x in (problems, cotangents)))
    for i, (problem, truth) in enumerate(zip(problems, truths, strict=True)):
        assert len(values) == len(truth) == len(entry.out)
        for found, wanted in zip(values, truth, strict=True):
            close(found[i], wanted, accuracy("float32"))
        for key in smooth:
            slope = _slope(entry, problem, key, cotangents[i])
            close(gradients[key][i], slope, 4 * accuracy("float32"), f"d {key}")


@pytest.mark.cpu
@pytest.mark.parametrize("name", SHARDED)
def test_sharded(name):
    """Value and gradient where `axis_name` spreads the classes, or the examples, over devices."""
    entry = CATALOGUE[name]
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    arrays = entry.arrays(3, **{entry.sharded: 8})
    truth = _leaves(entry.truth(**arrays, **entry.options))
    cotangents = _cotangents(truth)
    specs = {
        key: P(*("x" if axis == entry.sharded else None for axis in draw.axes.split()))
        for key, draw in entry.draws.items()
    }
    out = P("x") if entry.sharded == "b" else P()

    @jax.jit
    def run(arrays):
        def scalar(smooth):
            found = jax.shard_map(
                lambda arrays: _leaves(call(name, **arrays, axis_name="x")),
                mesh=mesh,
                in_specs=(specs,),
                out_specs=out,
            )({**arrays, **smooth})
            return _inner(found, cotangents), found

        return jax.grad(scalar, has_aux=True)({k: arrays[k] for k in entry.smooth()})

    gradients, values = run({k: _narrow(x) for k, x in arrays.items()})
    for found, wanted in zip(values, truth, strict=True):
        close(found, wanted, accuracy("float32"))
    for key, gradient in gradients.items():
        close(gradient, _slope(entry, arrays, key, cotangents), 4 * accuracy("float32"), f"d {key}")


def _leaves(found):
    """The results as a list; a reference may leave those off that are not there in float64."""
    return list(found) if isinstance(found, tuple | list) else jax.tree.leaves(found)


def _narrow(x):
    x = np.asarray(x)
    return x.astype({"f": np.float32, "i": np.int32, "b": bool}[x.dtype.kind])


def _stacked(trees):
    return jax.tree.map(lambda *x: jnp.asarray(np.stack([_narrow(y) for y in x])), *trees)


def _cotangents(results):
    draw = np.random.default_rng(5)
    return [draw.normal(size=np.shape(x)) for x in results]


def _inner(results, cotangents):
    """Of the results that are floating numbers, as integers have no derivative."""
    pairs = zip(results, cotangents, strict=True)
    floating = [(x, g) for x, g in pairs if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    return sum((jnp.sum(x * jnp.asarray(g, x.dtype)) for x, g in floating), jnp.zeros(()))


def _slope(entry, arrays, key, cotangents, step=1e-6):
    """The gradient of the reference, by central differences."""

    def scalar(x):
        found = _leaves(entry.truth(**{**arrays, key: x}, **entry.options))
        pairs = zip(found, cotangents, strict=True)
        return sum(np.sum(x * g) for x, g in pairs if np.asarray(x).dtype.kind == "f")

    slope = np.zeros_like(arrays[key])
    for at in np.ndindex(slope.shape):
        up, down = (arrays[key].copy() for _ in range(2))
        up[at], down[at] = up[at] + step, down[at] - step
        slope[at] = (scalar(up) - scalar(down)) / (2 * step)
    return slope
