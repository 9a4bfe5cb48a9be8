"""Contrastive losses against the whole matrix of pairs in float64."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import reference, reference_contrastive
from tests.comparison import close, compare
from tests.helpers import GARBAGE, WRONG_NAME, compilations
from tests.test_memory import temporaries

pytestmark = pytest.mark.usefixtures("cheap_programs")

N, WIDTH = 7, 3
PAIRS = {"info_nce_loss": ("queries", "keys"), "clip_loss": ("images", "texts")}
PAIRS |= {"siglip_loss": ("images", "texts"), "supervised_contrastive_loss": ("embeddings",)}
every_loss = pytest.mark.parametrize("name", PAIRS)
SCALARS = ("logit_scale", "logit_bias")
# Labels of 0, 1 or more other examples, one of them beside an example that does not exist.
LABELS = np.array([5, -3, 5, 200, 5, 200, 8])


def of(name, module=ce_jax):
    return getattr(module, name)


def problem(name, *, rows=N, where=False, sample_weight=False, seed=0, **options):
    draw = np.random.default_rng(seed)
    arguments = {key: draw.normal(size=(rows, WIDTH)) for key in PAIRS[name]}
    if name == "info_nce_loss":
        arguments["keys"] = draw.normal(size=(rows + 2, WIDTH))
    arguments["logit_scale"] = 1.7
    if name == "siglip_loss":
        arguments["logit_bias"] = -0.8
    if name == "supervised_contrastive_loss":
        arguments["labels"] = np.resize(LABELS, rows)
    if where:
        options["where"] = np.arange(rows) % N != 2
        for key in PAIRS[name]:
            arguments[key][2::N] = np.resize(GARBAGE, WIDTH)
    if sample_weight:
        options["sample_weight"] = draw.uniform(0.5, 2.0, size=rows)
        options["sample_weight"][1] = 0.0
    return arguments | options


def scalars(arguments):
    return tuple(key for key in SCALARS if key in arguments)


def budget(name, rows, columns, dtype):
    """For blocks of so many columns."""
    tiles = {"info_nce_loss": 2, "clip_loss": 3, "siglip_loss": 4}.get(name, 6)
    return {"memory_budget": columns * rows * tiles * jnp.dtype(dtype).itemsize}


@pytest.mark.sweep
@every_loss
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float64", {"where": True, "sample_weight": True}),
        ("float32", {"reduction": "mean"}),
    ],
    ids=["masked and weighted", "mean"],
)
def test_value_and_gradients(name, dtype, options):
    arguments, dtype = problem(name, **options), jnp.dtype(dtype)
    truth = of(name, reference_contrastive)
    blocks = budget(name, N, 3, dtype) if dtype == jnp.float64 else {}
    compare(of(name), truth, arguments, scalars(arguments), dtype=dtype, loosen=3.0, **blocks)


@pytest.mark.sweep
@pytest.mark.usefixtures("x64")
@every_loss
def test_a_scale_of_zero_has_a_gradient(name):
    """Whatever the embeddings are, all logits are 0; the slope is that of the formula."""
    arguments = problem(name) | {"logit_scale": 0.0}
    truth, slope_of = of(name, reference_contrastive), functools.partial(of(name), **arguments)
    for forward_mode in (False, True):
        slope = jax.jacfwd if forward_mode else jax.jacrev
        found = slope(lambda s, mode=forward_mode: slope_of(logit_scale=s, forward_mode=mode))(0.0)
        expected = reference.vjp(truth, arguments, "logit_scale", np.ones(N))
        np.testing.assert_allclose(found.sum(), expected, rtol=1e-12)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["info_nce_loss", "siglip_loss"])
def test_a_query_that_weighs_nothing_may_hold_anything(name):
    """It has a part in its own loss alone, and so reaches no other's gradient."""
    arguments = problem(name, sample_weight=True)
    arguments = {k: np.asarray(v, np.float32) for k, v in arguments.items()}
    spoiled = dict(arguments)
    first = PAIRS[name][0]
    spoiled[first] = arguments[first].copy()
    spoiled[first][1] = np.nan, np.inf, 0
    both = jax.jit(jax.value_and_grad(lambda x: of(name)(**x, reduction="sum")))
    found, expected = both(spoiled), both(arguments)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for key in (PAIRS[name][1], "logit_scale"):
        np.testing.assert_allclose(found[1][key], expected[1][key], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[1][first][1], 0)


@every_loss
def test_the_order_of_the_pairs_does_not_matter(name):
    """Losses and gradients move with their pairs; those of equal embeddings are equal."""
    arguments = problem(name, where=True, sample_weight=True)
    arguments = {k: np.asarray(v) for k, v in arguments.items()}
    for key in PAIRS[name]:  # ties
        arguments[key][5] = arguments[key][4]
    if "labels" in arguments:
        arguments["labels"] = np.array([5, -3, 5, 200, 5, 5, 8])
    moved = np.random.default_rng(1).permutation(N)
    shuffled = {k: v if v.ndim == 0 else v[moved] for k, v in arguments.items()}
    if name == "info_nce_loss":
        shuffled["keys"] = np.concatenate([arguments["keys"][moved], arguments["keys"][:-3:-1]])

    def found(arguments):
        where = arguments.pop("where")
        return value_and_gradients(name, arguments)[0](where)

    value, gradients = found(dict(arguments))
    again, again_gradients = found(shuffled)
    np.testing.assert_allclose(again, value[moved], rtol=1e-5, atol=1e-6)
    for key in PAIRS[name]:
        expected = gradients[key][:N][moved]
        np.testing.assert_allclose(again_gradients[key][:N], expected, rtol=1e-4, atol=1e-5)
    weight = arguments["sample_weight"]
    np.testing.assert_allclose(value[4] / weight[4], value[5] / weight[5], rtol=1e-5)


@pytest.mark.usefixtures("x64")
@every_loss
def test_transformations(name):
    """As one program: vmap of grad, forward over reverse through remat, and forward mode.

    The sigmoid loss, which compiles fastest, is taken in several blocks, and by reverse over
    reverse too: the loop is one for all.
    """
    arguments = problem(name, rows=4)
    smooth = {k: np.asarray(v) for k, v in arguments.items() if k != "labels"}
    ids = {k: v for k, v in arguments.items() if k == "labels"}
    x = np.concatenate([v.ravel() for v in smooth.values()])
    ends = np.cumsum([v.size for v in smooth.values()])
    cotangent = np.array([0.7, -1.3, 2.0, 0.4])

    def inputs(x):
        parts = zip(smooth.items(), (0, *ends[:-1]), ends, strict=True)
        return ids | {k: x[start:end].reshape(v.shape) for (k, v), start, end in parts}

    fastest = name == "siglip_loss"
    options = budget(name, 4, 2, jnp.float64) if fastest else {}

    def f(x, **more):
        return jnp.vdot(cotangent, of(name)(**inputs(x), **options, **more))

    def truth(x):
        return of(name, reference_contrastive)(**inputs(x))

    v = np.random.default_rng(2).normal(size=x.shape)

    @jax.jit
    def derivatives(x, v):
        gradient = jax.vmap(jax.grad(f))(jnp.stack([x, x]))[1]
        forward = jax.jvp(jax.grad(jax.checkpoint(f)), (x,), (v,))[1]
        reverse = jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x) if fastest else forward
        pushed = jax.jvp(functools.partial(f, forward_mode=True), (x,), (v,))[1]
        return gradient, forward, reverse, pushed

    gradient, forward, reverse, pushed = derivatives(x, v)
    slope = reference.vjp(truth, {"x": x}, "x", cotangent)
    product = reference.hessian_product(truth, {"x": x}, "x", cotangent, v)
    np.testing.assert_allclose(gradient, slope, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(pushed, slope @ v, rtol=1e-11)
    np.testing.assert_allclose(forward, product, rtol=0, atol=1e-8)
    np.testing.assert_allclose(reverse, product, rtol=0, atol=1e-8)


@every_loss
def test_a_symbolic_batch(name):
    """One exported program for batches of any size, value and gradients."""
    (batch,) = jax.export.symbolic_shape("batch")

    def both(sides, labels):
        labels = {"labels": labels} if len(PAIRS[name]) == 1 else {}
        where = jnp.arange(sides[0].shape[0]) != 1

        def total(sides):
            sides = dict(zip(PAIRS[name], sides, strict=True))
            return of(name)(**sides, **labels, where=where, reduction="mean", logit_scale=1.7)

        return jax.value_and_grad(total)(sides)

    sides = tuple(jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32) for _ in PAIRS[name])
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    exported = jax.export.export(jax.jit(both))(sides, labels)
    for rows in (4, 9):
        arguments = problem(name, rows=rows)
        given = tuple(jnp.asarray(arguments[key][:rows], jnp.float32) for key in PAIRS[name])
        labels = jnp.resize(jnp.int32(LABELS), rows)
        found, wanted = exported.call(given, labels), both(given, labels)
        jax.tree.map(lambda a, b: close(a, b, 1e-5, size=1.0), found, wanted)


@pytest.mark.usefixtures("usual_programs")
@every_loss
def test_no_matrix_of_all_pairs(name):
    """Value and gradient; the matrix alone would take 64 MB."""
    rows, width = 4096, 32
    assert 4 * rows * rows == 64 * 2**20

    def loss(*arrays):
        names = (*PAIRS[name], "labels")[: len(arrays)]
        arrays = dict(zip(names, arrays, strict=True))
        return of(name)(**arrays, memory_budget=4 * 10**6, reduction="mean")

    sides = [((rows, width), jnp.float32) for _ in PAIRS[name]]
    labels = [((rows,), jnp.int32)] if len(sides) == 1 else []
    gradient = jax.value_and_grad(loss, tuple(range(len(sides))))
    assert temporaries(gradient, *sides, *labels) < 8 * 10**6


def value_and_gradients(name, arguments, **options):
    """Of the sum of the losses, by all floating arguments; and the same for others."""
    labels = {k: v for k, v in arguments.items() if k == "labels"}
    smooth = {k: jnp.asarray(v, jnp.float32) for k, v in arguments.items() if v.dtype.kind == "f"}

    @jax.jit
    def both(smooth, where=None):
        loss = functools.partial(of(name), where=where, **labels, **options)
        value, pull = jax.vjp(lambda smooth: loss(**smooth), smooth)
        return value, pull(jnp.ones_like(value))[0]

    return functools.partial(both, smooth), both, smooth


@pytest.mark.sweep
@pytest.mark.usefixtures("usual_programs")
@every_loss
def test_extremes(name):
    """Pairs that do not exist, and hold anything; no pair at all; enormous logits."""
    arguments = problem(name, where=True)
    truth, exists = of(name, reference_contrastive), arguments["where"]
    arguments = {k: np.asarray(v) for k, v in arguments.items()}
    of_mask, both, smooth = value_and_gradients(name, arguments)

    value, gradients = of_mask(exists)
    close(value, truth(**arguments), 1e-5)
    np.testing.assert_array_equal(value[~exists], 0.0)
    for key in PAIRS[name]:
        np.testing.assert_array_equal(gradients[key][:N][~exists], 0.0)

    for zeros in jax.tree.leaves(of_mask(np.zeros(N, bool))):
        np.testing.assert_array_equal(zeros, 0.0)

    smooth["logit_scale"] = jnp.float32(2e4)  # the exponentials are 0 or inf
    value, gradients = both(smooth, exists)
    exact = {k: np.asarray(v, np.float64) for k, v in smooth.items()}
    expected = truth(**(arguments | exact))
    close(value, expected, 1e-6)
    assert np.max(expected) > 1e4
    for gradient in gradients.values():
        assert np.isfinite(gradient).all()
        assert np.any(gradient != 0)


@pytest.mark.sweep
@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("rows", [0, 1])
@every_loss
def test_smallest_batches(name, rows):
    """Nothing at all; and one pair alone, which a softmax can only get right."""
    arguments = problem(name, rows=rows)
    arguments |= {key: arguments[key][:rows] for key in PAIRS[name]}
    arguments = {k: np.asarray(v) for k, v in arguments.items()}
    value, gradients = value_and_gradients(name, arguments, reduction="mean")[0]()
    expected = of(name, reference_contrastive)(**arguments, reduction="mean") if rows else 0.0
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)
    assert name == "siglip_loss" or value == 0
    for gradient in gradients.values():
        assert np.isfinite(gradient).all()


def test_labels_are_names():
    """Of any integer dtype and value."""
    arguments = problem("supervised_contrastive_loss")
    wanted = ce_jax.supervised_contrastive_loss(**arguments)
    np.testing.assert_array_equal(np.asarray(wanted) == 0, np.isin(LABELS, (-3, 8)))
    for names in (np.uint8(LABELS + 3), np.int32(LABELS + 2**31 - 1000)):
        arguments["labels"] = names
        np.testing.assert_array_equal(ce_jax.supervised_contrastive_loss(**arguments), wanted)


def test_eager_calls_run_one_cached_program():
    images, texts = np.ones((5, 2), np.float32), np.eye(5, 2, dtype=np.float32)
    ce_jax.siglip_loss(images[1:], texts[1:])  # what arrays of any shape need
    with compilations() as seen:
        for scale in (1.0, 2.0):
            ce_jax.siglip_loss(images, texts, logit_scale=scale, logit_bias=-scale)
        assert len(seen) == 1


F32 = np.float32
FIRST, SECOND = 0, -1
ERRORS = [
    (FIRST, np.zeros((5, 2), np.int32), TypeError, ["int32", "float"]),
    (FIRST, np.zeros(5, F32), ValueError, ["(5,)", "[N, D]"]),
    (SECOND, np.zeros((5, 2), np.float16), TypeError, ["float16", "float32"]),
    (SECOND, np.zeros((5, 3), F32), ValueError, ["(5, 3)", "(5, 2)"]),
    (SECOND, np.zeros((4, 2), F32), ValueError, ["(4, 2)", "(5, 2)"]),
    ("labels", np.zeros(5, F32), TypeError, ["float32", "integer"]),
    ("labels", np.zeros(4, np.int32), ValueError, ["(4,)", "(5,)"]),
    ("where", np.ones(5, F32), TypeError, ["float32", "bool"]),
    ("where", np.ones((5, 5), bool), ValueError, ["(5, 5)", "(5,)"]),
    ("logit_scale", -1.0, ValueError, ["-1.0"]),
    ("logit_scale", "1", TypeError, ["1"]),
    ("logit_bias", np.nan, ValueError, ["nan", "finite"]),
    ("sample_weight", np.ones(4, F32), ValueError, ["(4,)", "(5,)"]),
    ("reduction", "average", WRONG_NAME, ["average", "mean"]),
    ("memory_budget", 0, ValueError, ["0"]),
]
# The supervised loss has one side; an option is tried on the losses that have it.
ERRORS_OF = [
    (name, sides[key] if isinstance(key, int) else key, *case)
    for name, sides in PAIRS.items()
    for key, *case in ERRORS
    if (key != SECOND or len(sides) == 2)
    and (isinstance(key, int) or key in inspect.signature(of(name)).parameters)
]


@pytest.mark.parametrize(("name", "key", "value", "error", "parts"), ERRORS_OF)
def test_the_message_names_the_argument(name, key, value, error, parts):
    right = {k: np.zeros((5, 2), F32) for k in PAIRS[name]}
    if name == "supervised_contrastive_loss":
        right["labels"] = np.zeros(5, np.int32)
    with pytest.raises(error, match=key) as caught:
        of(name)(**(right | {key: value}))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["clip_loss", "siglip_loss", "info_nce_loss"])
def test_the_hessian_outside_of_jit(name):
    """Forward over reverse, step by step, as reverse over reverse."""
    rows, columns = (jnp.asarray(f(np.arange(18.0)).reshape(6, 3)) for f in (np.sin, np.cos))
    loss = functools.partial(getattr(ce_jax, name), reduction="sum")
    found = jax.hessian(loss)(rows, columns)
    assert jnp.abs(found).max() > 0.01
    np.testing.assert_allclose(found, jax.jacrev(jax.grad(loss))(rows, columns), atol=1e-5)
