"""One look at every public function: value, gradient, vmap under jit, and a mesh if it has one."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ce_jax
from tests.calls import narrow, takes, true_slope, truth, unequal, value_and_gradients
from tests.catalogue import CATALOGUE
from tests.comparison import accuracy, close

pytestmark = pytest.mark.smoke

VALUES = accuracy("float32")
SLOPES = 4 * VALUES  # where terms cancel
SHARDED = [name for name, entry in CATALOGUE.items() if entry.sharded]


def test_the_catalogue_has_every_public_function():
    functions = {name for name, value in vars(ce_jax).items() if inspect.isfunction(value)}
    public = {name for name in functions if not name.startswith("_")}
    assert public == {name.split()[0] for name in CATALOGUE}


def test_the_catalogue_knows_what_takes_an_axis_name():
    assert [name for name in CATALOGUE if takes(name, "axis_name")] == SHARDED


@pytest.mark.parametrize("name", CATALOGUE)
def test_value_and_gradient(name):
    """Of two problems at once, under vmap and jit."""
    problems = [CATALOGUE[name].arrays(seed) for seed in (1, 2)]
    pulled = [unequal(truth(name, x)) for x in problems]
    run = jax.jit(jax.vmap(functools.partial(value_and_gradients, name)))
    found = run(*(stacked(x) for x in ([narrow(x) for x in problems], pulled)))
    for i, (problem, cotangents) in enumerate(zip(problems, pulled, strict=True)):
        compare(name, problem, cotangents, *jax.tree.map(lambda x, i=i: x[i], found))


@pytest.mark.cpu
@pytest.mark.parametrize("name", SHARDED)
def test_sharded(name):
    """Value and gradient where `axis_name` spreads the classes, or the examples, over devices."""
    entry = CATALOGUE[name]
    problem = entry.arrays(3, **{entry.sharded: 8})
    cotangents = unequal(truth(name, problem))
    names = {key: draw.axes.split() for key, draw in entry.draws.items()}
    specs = {k: P(*("x" if axis == entry.sharded else None for axis in names[k])) for k in names}
    of_result = P("x") if entry.sharded == "b" else P()

    # The derivative is taken inside, by what each device holds of the arguments.
    run = jax.shard_map(
        lambda arrays, g: value_and_gradients(name, arrays, g, axis_name="x"),
        mesh=jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,)),
        in_specs=(specs, of_result),
        out_specs=(of_result, {key: specs[key] for key in entry.smooth()}),
    )
    compare(
        name, problem, cotangents, *jax.jit(run)(narrow(problem), jax.tree.map(single, cotangents))
    )


def compare(name, problem, cotangents, values, gradients):
    wanted = truth(name, problem)
    assert [x.shape for x in values] == [x.shape for x in wanted]
    assert len(wanted) == len(CATALOGUE[name].out)
    for x, y in zip(values, wanted, strict=True):
        close(x, y, VALUES)
    size = max(np.max(np.abs(x), initial=0.0) for x in wanted)
    for key, gradient in gradients.items():
        slope = true_slope(name, problem, key, cotangents)
        close(gradient, slope, SLOPES, f"d {key}", size)


def stacked(trees):
    return jax.tree.map(lambda *x: jnp.stack([single(y) for y in x]), *trees)


def single(x):
    return jnp.asarray(x, jnp.float32 if jnp.issubdtype(jnp.result_type(x), jnp.floating) else None)
