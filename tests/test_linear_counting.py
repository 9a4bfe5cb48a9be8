"""Rows of the linear form that do not count are left out of the work, and of nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ce_jax
from ce_jax._platform import block_sizes
from tests import linear

pytestmark = pytest.mark.usefixtures("cheap_programs")

ROWS, WIDTH, CLASSES, TILE = 12, 3, 10, 4
WAYS = {
    "none": {"memory_budget": linear.class_budget(ROWS, 4)},
    "mean": {"memory_budget": linear.class_budget(ROWS, 4), "reduction": "mean"},
    "tokens": {"memory_budget": linear.token_budget(CLASSES, TILE), "reduction": "mean"},
}
MASKS = {
    "scattered": np.arange(ROWS) % 4 == 1,
    "run": (np.arange(ROWS) >= 5) & (np.arange(ROWS) < 8),
    "one": np.arange(ROWS) == 11,
    "nothing": np.zeros(ROWS, bool),
    "all": np.ones(ROWS, bool),
}


@pytest.fixture(autouse=True)
def tile(request, one_device, monkeypatch):
    """Rows per tile; None for what the platform takes."""
    rows = getattr(request, "param", TILE)
    if rows is not None:
        monkeypatch.setattr(block_sizes, "rows", lambda tokens: rows)
        monkeypatch.setattr(block_sizes, "_FEWEST_TOKENS", TILE)


# Tiles of 5 of 12 rows: three places without a row are left.
with_places_left = pytest.mark.parametrize("tile", [TILE, 5], indirect=True)


def problem(seed=0):
    draw = np.random.default_rng(seed)
    arrays = {
        "hidden": draw.normal(size=(ROWS, WIDTH)),
        "kernel": draw.normal(size=(WIDTH, CLASSES)),
        "bias": draw.normal(size=CLASSES),
        "sample_weight": draw.uniform(0.5, 2.0, size=ROWS),
        "temperature": draw.uniform(0.5, 2.0, size=ROWS),
    }
    labels = jnp.asarray(draw.integers(CLASSES, size=ROWS))
    return {k: jnp.asarray(x, jnp.float32) for k, x in arrays.items()}, labels


def dense(hidden, kernel, labels, bias, **options):
    logits = jnp.matmul(hidden, kernel, precision="highest") + bias[None]
    return ce_jax.softmax_cross_entropy_with_integer_labels(logits, labels, **options)


def agree(ours, theirs, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.sweep
@with_places_left
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_the_dense_form(way):
    """In the order given, for any mask; garbage in what does not count is not noticed."""
    arrays, labels = problem()
    options = WAYS[way]
    plain = {k: v for k, v in options.items() if k != "memory_budget"}
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=ROWS), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def both(loss, arrays, where):
        def total(arrays):
            found = loss(**arrays, labels=labels, where=where)
            return jnp.vdot(cotangent, found) if way == "none" else found

        return jax.value_and_grad(total)(arrays)

    ours = functools.partial(ce_jax.linear_softmax_cross_entropy, **options)
    theirs = functools.partial(dense, **plain)
    for where in MASKS.values():
        garbage = jnp.where(where[:, None], arrays["hidden"], jnp.nan)
        agree(both(ours, arrays | {"hidden": garbage}, where), both(theirs, arrays, where))


def test_statistics_are_in_the_order_given():
    arrays, labels = problem()
    del arrays["sample_weight"]
    where = MASKS["scattered"]
    found = ce_jax.linear_softmax_statistics(**arrays, labels=labels, where=where)
    logits = arrays["hidden"] @ arrays["kernel"] + arrays["bias"][None]
    temperature = arrays["temperature"]
    expected = ce_jax.softmax_statistics(logits, labels, where=where, temperature=temperature)
    agree(found, expected)


@with_places_left
@pytest.mark.parametrize("way", WAYS)
def test_transforms(way):
    """vmap over masks, second derivatives, forward mode: as of the dense form."""
    arrays, labels = problem()
    where = jnp.asarray(np.stack(list(MASKS.values())))
    direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), arrays)

    def total(loss, options, arrays, where):
        return jnp.sum(loss(**arrays, labels=labels, where=where, **options))

    def slope(loss, options, arrays, where):
        def along(arrays):
            slopes = jax.grad(total, 2)(loss, options, arrays, where)
            products = jax.tree.map(jnp.vdot, slopes, direction)
            return sum(jax.tree.leaves(products))

        return jax.grad(along)(arrays)

    def all_of(loss, options):
        forward = options | {"forward_mode": True}
        tangent = jax.jvp(
            lambda arrays: total(loss, forward, arrays, where[0]), (arrays,), (direction,)
        )
        batched = jax.vmap(jax.value_and_grad(functools.partial(total, loss, options)), (None, 0))
        return batched(arrays, where), slope(loss, options, arrays, where[1]), tangent

    options = WAYS[way]
    plain = {k: v for k, v in options.items() if k != "memory_budget"}
    ours = jax.jit(lambda: all_of(ce_jax.linear_softmax_cross_entropy, options))()
    agree(ours, jax.jit(lambda: all_of(dense, plain))(), 2e-4)


@pytest.mark.parametrize("way", WAYS)
def test_blocks_without_a_row_that_counts_are_not_computed(way):
    """A tile's matmuls stand behind a condition, none outside of it."""
    inside, outside = matmuls(step_with_mask(way), False)
    assert outside == 0
    assert inside >= 3


@pytest.mark.parametrize("tile", [5], indirect=True)
def test_no_program_is_made_for_a_rest_of_rows(tile):
    """Three tiles of 5 rows take one program."""
    assert matmuls(step_with_mask("none"), False)[0] == 4  # 1 of the loss, 3 of its gradient


@pytest.mark.parametrize("tile", [ROWS], indirect=True)
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_one_tile_stay_where_they_are(way, tile):
    """There would be nothing to leave out."""
    program = step_with_mask(way)
    assert "sort[" not in str(program)
    assert matmuls(program, False)[0] == 0


def step_with_mask(way):
    """The program of value and gradient."""
    arrays, labels = problem()
    where = MASKS["one"]

    def loss(hidden, kernel):
        options = WAYS[way]
        return jnp.sum(
            ce_jax.linear_softmax_cross_entropy(hidden, kernel, labels, where=where, **options)
        )

    step = jax.value_and_grad(loss, (0, 1))
    return jax.make_jaxpr(step)(arrays["hidden"], arrays["kernel"]).jaxpr


def matmuls(jaxpr, conditional):
    """How many matmuls a program holds, inside of conditions and outside of them."""
    found = np.zeros(2, int)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found += [conditional, not conditional]
        inner = conditional or equation.primitive.name == "cond"
        for part in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(part, "jaxpr"):
                part = part.jaxpr
            if hasattr(part, "eqns"):
                found += matmuls(part, inner)
    return found


@pytest.mark.cpu
@pytest.mark.parametrize("tile", [2], indirect=True)
def test_each_device_has_its_own_number_of_rows_that_count(tile):
    arrays, labels = problem()
    del arrays["temperature"]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jnp.asarray(MASKS["run"])  # none of the first three rows, none of the last
    for reduction in ("none", "mean"):
        loss = ce_jax.on_mesh(ce_jax.linear_softmax_cross_entropy, mesh, rows=P("data"))

        def total(loss, arrays, reduction=reduction):
            found = loss(**arrays, labels=labels, where=where, reduction=reduction)
            return jnp.sum(found * found)

        ours = jax.jit(jax.value_and_grad(functools.partial(total, loss)))(arrays)
        agree(ours, jax.value_and_grad(functools.partial(total, dense))(arrays))


def test_without_a_mask_nothing_is_sorted_or_conditional():
    arrays, labels = problem()
    loss = functools.partial(ce_jax.linear_softmax_cross_entropy, reduction="mean")
    text = str(jax.make_jaxpr(jax.grad(loss))(arrays["hidden"], arrays["kernel"], labels))
    assert "sort[" not in text
    assert "cond[" not in text


@pytest.mark.cpu
@pytest.mark.parametrize("tile", [None], indirect=True)
def test_on_a_cpu_tiles_are_a_small_part_of_the_rows(tile):
    """With a quarter of the rows and one more, at most 0.45 of them are in tiles with one."""
    for rows in (*range(1001, 6000), 8192, 100_000):
        size = block_sizes.rows(rows)
        assert 200 <= size <= 512
        assert -(-(rows // 4 + 1) // size) * size <= 0.45 * rows
        assert -rows % size <= rows // size  # places without a row
