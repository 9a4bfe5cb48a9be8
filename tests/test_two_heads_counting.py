"""Rows that do not count are left out of the work of distillation between layers, too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ce_jax
from tests import linear
from tests.test_linear_counting import MASKS, ROWS, WIDTH, agree, matmuls, tile, with_places_left

pytestmark = pytest.mark.usefixtures("cheap_programs")

CLASSES = 10
BUDGET = 2 * linear.class_budget(ROWS, 4)
LINEAR = {
    "distillation": ce_jax.linear_distillation_loss,
    "reverse": functools.partial(ce_jax.linear_distillation_loss, reverse=True),
    "jensen_shannon": functools.partial(ce_jax.linear_jensen_shannon_loss, beta=0.3),
}
DENSE = {
    "distillation": ce_jax.distillation_loss,
    "reverse": functools.partial(ce_jax.distillation_loss, reverse=True),
    "jensen_shannon": functools.partial(ce_jax.jensen_shannon_loss, beta=0.3),
}
BOTH_KINDS = ("distillation", "jensen_shannon")

__all__ = ["tile"]  # a fixture of every test here


def problem(seed=0):
    draw = np.random.default_rng(seed)
    arrays = {
        "hidden": draw.normal(size=(ROWS, WIDTH)),
        "kernel": draw.normal(size=(WIDTH, CLASSES)),
        "teacher_hidden": draw.normal(size=(ROWS, WIDTH + 1)),
        "teacher_kernel": draw.normal(size=(WIDTH + 1, CLASSES)),
        "bias": draw.normal(size=CLASSES),
        "sample_weight": draw.uniform(0.5, 2.0, size=ROWS),
        "temperature": draw.uniform(0.5, 2.0, size=ROWS),
    }
    return {k: jnp.asarray(x, jnp.float32) for k, x in arrays.items()}


def ours(name, arrays, where, **options):
    return LINEAR[name](**arrays, where=where, memory_budget=BUDGET, **options)


def theirs(name, arrays, where, **options):
    rest = dict(arrays)

    def logits(prefix):
        hidden, kernel = rest.pop(f"{prefix}hidden"), rest.pop(f"{prefix}kernel")
        return jnp.matmul(hidden, kernel, precision="highest")

    student, teacher = logits(""), logits("teacher_")
    student = student + rest.pop("bias")[None]
    return DENSE[name](student, teacher, where=where, **rest, **options)


@pytest.mark.sweep
@with_places_left
@pytest.mark.parametrize("name", LINEAR)
def test_values_and_gradients_are_those_of_the_dense_form(name):
    """Of both heads, in the order given, for any mask; garbage that does not count is not seen."""
    arrays = problem()
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=ROWS), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def both(loss, arrays, where):
        return jax.value_and_grad(lambda a: jnp.vdot(cotangent, loss(name, a, where)))(arrays)

    for where in MASKS.values():
        garbage = {
            k: jnp.where(where[:, None], arrays[k], jnp.nan) for k in ("hidden", "teacher_hidden")
        }
        agree(both(ours, arrays | garbage, where), both(theirs, arrays, where), 1e-4)


@pytest.mark.sweep
@pytest.mark.parametrize("name", BOTH_KINDS)
def test_a_weight_of_zero_silences_rows_that_are_not_finite(name):
    arrays = problem()
    where = MASKS["scattered"]
    silent = {"sample_weight": jnp.where(where, arrays["sample_weight"], 0)}
    garbage = silent | {"hidden": jnp.where(where[:, None], arrays["hidden"], jnp.inf)}
    for counts in (None, MASKS["run"] | where):

        def total(loss, arrays, counts=counts):
            return loss(name, arrays, counts, reduction="sum")

        value, found = jax.jit(jax.value_and_grad(functools.partial(total, ours)))(arrays | garbage)
        true, slopes = jax.jit(jax.value_and_grad(functools.partial(total, theirs)))(
            arrays | silent
        )
        # A row without a softmax has no loss that its weight could scale.
        slopes["sample_weight"] = jnp.where(where, slopes["sample_weight"], 0)
        agree((value, found), (true, slopes), 1e-4)


@pytest.mark.parametrize("name", BOTH_KINDS)
def test_transforms(name):
    """vmap over masks, second derivatives, forward mode: as of the dense form."""
    arrays = problem()
    where = jnp.asarray(np.stack(list(MASKS.values())))
    direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), arrays)

    def all_of(loss):
        def total(arrays, where, **options):
            return jnp.sum(loss(name, arrays, where, **options))

        def along(arrays):
            slopes = jax.grad(total)(arrays, where[1])
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slopes, direction)))

        forward = jax.jvp(
            lambda arrays: total(arrays, where[0], forward_mode=True), (arrays,), (direction,)
        )
        batched = jax.vmap(jax.value_and_grad(total), (None, 0))(arrays, where)
        return batched, jax.grad(along)(arrays), forward

    agree(jax.jit(lambda: all_of(ours))(), jax.jit(lambda: all_of(theirs))(), 5e-4)


@pytest.mark.parametrize("name", BOTH_KINDS)
def test_tiles_without_a_row_that_counts_are_not_computed(name):
    """Their matmuls stand behind a condition, none outside of it."""
    step = jax.grad(lambda arrays: jnp.sum(ours(name, arrays, MASKS["one"])))
    inside, outside = matmuls(jax.make_jaxpr(step)(problem()).jaxpr, False)
    assert outside == 0
    assert inside >= 6


@pytest.mark.parametrize("tile", [ROWS], indirect=True)
@pytest.mark.parametrize("name", BOTH_KINDS)
def test_rows_of_one_tile_stay_where_they_are(name, tile):
    """There would be nothing to leave out."""
    step = jax.grad(lambda arrays: jnp.sum(ours(name, arrays, MASKS["one"])))
    program = jax.make_jaxpr(step)(problem()).jaxpr
    assert "sort[" not in str(program)
    assert matmuls(program, False)[0] == 0


@pytest.mark.cpu
@pytest.mark.parametrize("tile", [2], indirect=True)
@pytest.mark.parametrize("name", BOTH_KINDS)
def test_each_device_has_its_own_number_of_rows_that_count(name, tile):
    arrays = problem()
    where = jnp.asarray(MASKS["run"])  # none of the first three rows, none of the last
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    by_row = {"hidden", "teacher_hidden", "sample_weight", "temperature"}
    specs = {k: P("data") if k in by_row else P() for k in arrays}

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))
    def sharded(arrays, where):
        return ours(name, arrays, where)

    def total(loss, arrays):
        found = loss(arrays, where)
        return jnp.sum(found * found)

    found = jax.jit(jax.value_and_grad(functools.partial(total, sharded)))(arrays)
    plain = functools.partial(total, functools.partial(theirs, name))
    agree(found, jax.jit(jax.value_and_grad(plain))(arrays), 1e-4)
