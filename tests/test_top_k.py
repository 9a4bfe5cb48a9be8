"""Distillation from k known classes per row, dense and from a layer, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ce_jax
from tests import reference, reference_distillation
from tests.comparison import accuracy, close, compare, together
from tests.helpers import GARBAGE, WRONG_NAME

pytestmark = pytest.mark.usefixtures("cheap_programs")

INF, NAN = np.inf, np.nan
DENSE, LINEAR = "top_k_distillation_loss", "linear_top_k_distillation_loss"
TAILS = ("bucket", "renormalize", "drop")
ROWS, CLASSES, K = (2, 3), 7, 3
sweep = pytest.mark.sweep


def known(draw, rows=ROWS, classes=CLASSES, k=K, share=0.9):
    """Ids that differ within each row, and log-probabilities of `share` in all."""
    ids = np.array([draw.permutation(classes)[:k] for _ in range(np.prod(rows, dtype=int))])
    p = draw.uniform(0.1, 1.0, (*rows, k))
    p *= share / p.sum(-1, keepdims=True)
    return {"teacher_ids": ids.reshape(*rows, k), "teacher_log_probs": np.log(p)}


def spoiled(arguments, ignore_index=None):
    """With an entry that is absent, one to which the teacher gives nothing, and a row of none."""
    ids, log_probs = arguments["teacher_ids"], arguments["teacher_log_probs"]
    ids[0, 0, 1], log_probs[0, 0, 1] = -1, NAN
    log_probs[0, 1, 0] = -INF
    ids[1, 0], log_probs[1, 0] = -1 if ignore_index is None else ignore_index, 7.0
    return arguments


def arguments_of(form, *, masked=False, options=False, **more):
    draw = np.random.default_rng(0)
    arguments = known(draw)
    if form == DENSE:
        arguments["logits"] = 2 * draw.normal(size=(*ROWS, CLASSES))
    else:
        arguments["hidden"] = draw.normal(size=(*ROWS, 2))
        arguments["kernel"] = draw.normal(size=(2, CLASSES))
        if options:
            arguments |= {"bias": draw.normal(size=CLASSES), "logit_soft_cap": 2.0}
            arguments["kernel"] = np.append(arguments["kernel"], [GARBAGE] * 2, 1)
            arguments["bias"] = np.append(arguments["bias"], GARBAGE)
            arguments["num_classes"] = CLASSES
    if options:
        arguments["temperature"] = draw.uniform(0.5, 2.0, ROWS)
    if masked:
        arguments = spoiled(arguments, more.get("ignore_index"))
        more["where"] = np.arange(6).reshape(ROWS) != 4
        more["sample_weight"] = draw.uniform(0.5, 2.0, ROWS)
        more["sample_weight"][0, 2] = 0
        first = arguments["logits" if form == DENSE else "hidden"]
        first[1, 0] = first[1, 1] = np.resize(GARBAGE, first.shape[-1])
    return arguments | more


def budget(columns, dtype="float64"):
    """For blocks of so many columns of three rows, the half of all."""
    return {"memory_budget": 3 * columns * 5 * jnp.dtype(dtype).itemsize}


CASES = [
    {"form": DENSE, "dtype": "float64", "tail": "bucket", "masked": True, "options": True},
    {"form": DENSE, "dtype": "float64", "tail": "renormalize", "masked": True, "options": True},
    {"form": DENSE, "dtype": "float64", "tail": "drop", "masked": True, "options": True},
    {"form": DENSE, "dtype": "float32", "tail": "bucket", "reduction": "mean", "masked": True},
    {"form": LINEAR, "dtype": "float64", "tail": "bucket", "masked": True, "options": True},
    {"form": LINEAR, "dtype": "float64", "tail": "drop", "masked": True, "ignore_index": 99},
    {"form": LINEAR, "dtype": "float32", "tail": "renormalize", "reduction": "sum"},
]


@pytest.mark.sweep
@together(CASES)
def test_value_and_gradients(case):
    form, dtype = case.pop("form"), case.pop("dtype")
    arguments = arguments_of(form, **case)
    wrt = ("logit_soft_cap",) if "logit_soft_cap" in arguments else ()
    ours, truth = getattr(ce_jax, form), getattr(reference_distillation, form)
    static = budget(3, dtype) if form == LINEAR else {}
    compare(ours, truth, arguments, wrt, dtype=jnp.dtype(dtype), loosen=4.0, **static)


@pytest.mark.parametrize("form", [DENSE, LINEAR])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mask", [-np.inf, -1e9])
def test_a_rest_that_is_none_but_for_rounding(form, dtype, mask):
    """The teacher knows all classes that the student allows: no row is infinite, nor its slopes."""
    draw = np.random.default_rng(11)
    rows, known, others = 200, 6, 3
    logits, theirs = 3 * draw.normal(size=(2, rows, known)).astype(np.float32)
    log_p = jnp.asarray(jax.nn.log_softmax(theirs), dtype)
    ids = jnp.broadcast_to(jnp.arange(known), (rows, known))

    def loss(logits, log_p):
        bias = jnp.append(jnp.zeros(known), jnp.full(others, mask))
        z = jnp.pad(logits, ((0, 0), (0, others)))
        if form == LINEAR:
            eye = jnp.eye(known + others)
            return ce_jax.linear_top_k_distillation_loss(z, eye, ids, log_p, bias=bias)
        return ce_jax.top_k_distillation_loss(z + bias[None], ids, log_p)

    z, p = np.asarray(logits, np.float64), np.exp(np.asarray(log_p, np.float64))
    log_q = z - np.log(np.sum(np.exp(z), -1, keepdims=True))
    want = np.sum(p * (np.asarray(log_p, np.float64) - log_q), -1)
    found, pull = jax.vjp(loss, logits, log_p)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-6)
    g = draw.normal(size=rows).astype(np.float32)
    slopes = pull(g)
    mass = p.sum(-1, keepdims=True)
    np.testing.assert_allclose(slopes[0], g[:, None] * (mass * np.exp(log_q) - p), atol=2e-2)
    assert np.isfinite(np.asarray(slopes[1], np.float32)).all()
    lacking = jnp.full_like(log_p, np.log(0.95 / known))  # more than rounding explains
    assert np.min(loss(logits, lacking)) > 1e6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tail", ["bucket", *(pytest.param(x, marks=sweep) for x in TAILS[1:])])
def test_transformations(tail):
    """As one program: vmap of grad, second derivatives of both kinds, and forward mode."""
    arguments = arguments_of(LINEAR, masked=True, temperature=1.3, tail=tail)
    kernel = arguments.pop("kernel")
    x = np.append(kernel.ravel(), arguments["teacher_log_probs"][0, 2])
    cotangent = np.random.default_rng(1).normal(size=ROWS)

    def inputs(x, library):
        log_probs = library.asarray(arguments["teacher_log_probs"])
        if library is jnp:
            log_probs = log_probs.at[0, 2].set(x[-K:])
        else:
            log_probs = log_probs.astype(x.dtype)
            log_probs[0, 2] = x[-K:]
        return arguments | {"kernel": x[:-K].reshape(kernel.shape), "teacher_log_probs": log_probs}

    def f(x, **more):
        loss = ce_jax.linear_top_k_distillation_loss(**inputs(x, jnp), **budget(2), **more)
        return jnp.vdot(cotangent, loss)

    def truth(x):
        return reference_distillation.linear_top_k_distillation_loss(**inputs(x, np))

    v = np.random.default_rng(2).normal(size=x.shape)

    @jax.jit
    def derivatives(x, v):
        gradient = jax.vmap(jax.grad(f))(jnp.stack([x, x]))[1]
        forward = jax.jvp(jax.grad(jax.checkpoint(f)), (x,), (v,))[1]
        backward = jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x)
        pushed = jax.jvp(functools.partial(f, forward_mode=True), (x,), (v,))[1]
        return gradient, forward, backward, pushed

    gradient, forward, backward, pushed = derivatives(x, v)
    slope = reference.vjp(truth, {"x": x}, "x", cotangent)
    product = reference.hessian_product(truth, {"x": x}, "x", cotangent, v)
    np.testing.assert_allclose(gradient, slope, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(pushed, slope @ v, rtol=1e-11)
    np.testing.assert_allclose(forward, product, rtol=0, atol=1e-8)
    np.testing.assert_allclose(backward, product, rtol=0, atol=1e-8)


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.cpu
def test_memory():
    """A quarter more than the plain linear loss at the most: nothing of `[N, k, D]` is gathered."""
    rows, width, classes, k = 1024, 64, 32768, 64
    assert 4 * rows * k * width == 16777216

    def temporaries(loss, *more):
        layer = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((rows, width), (width, classes))]
        run = jax.value_and_grad(functools.partial(loss, reduction="mean"), (0, 1))
        return jax.jit(run).lower(*layer, *more).compile().memory_analysis().temp_size_in_bytes

    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    entries = [jax.ShapeDtypeStruct((rows, k), x) for x in (jnp.int32, jnp.float32)]
    plain = temporaries(ce_jax.linear_softmax_cross_entropy, labels)
    assert temporaries(ce_jax.linear_top_k_distillation_loss, *entries) <= 1.25 * plain


@pytest.mark.sweep
@pytest.mark.parametrize("form", [DENSE, LINEAR])
def test_a_row_of_nonsense_is_nan(form):
    """And its gradient, and no other row's; not so if it does not count."""
    arguments = arguments_of(form)
    arguments |= {k: arguments[k][..., :2] for k in ("teacher_ids", "teacher_log_probs")}
    first = "logits" if form == DENSE else "hidden"

    @jax.jit
    def both(arguments):
        def loss(x):
            value = getattr(ce_jax, form)(**{**arguments, first: x})
            return jnp.sum(value), value

        return jax.grad(loss, has_aux=True)(jnp.float32(arguments[first]))

    bad = np.zeros(ROWS, bool)
    bad[0, 1] = True
    for ids, log_probs in (
        ([0, CLASSES], [-1.0, -2.0]),  # no class
        ([0, -2], [-1.0, -2.0]),
        ([3, 3], [-1.0, -2.0]),  # twice
        ([0, 1], [0.5, -2.0]),  # no log-probability
        ([0, 1], [-0.1, -0.2]),  # more than 1 in all
    ):
        arguments["teacher_ids"][0, 1], arguments["teacher_log_probs"][0, 1] = ids, log_probs
        slope, value = both(arguments)
        np.testing.assert_array_equal(np.isnan(value), bad, err_msg=str(ids))
        np.testing.assert_array_equal(np.isnan(slope).all(-1), bad)
        np.testing.assert_array_equal(np.isnan(slope).any(-1), bad)
        for way in ({"where": ~bad}, {"sample_weight": np.float32(~bad)}):
            slope, value = both(arguments | way)
            np.testing.assert_array_equal(value[0, 1], 0)
            np.testing.assert_array_equal(slope[0, 1], 0)
            assert np.isfinite(slope).all()


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_ids_of_any_integer_dtype(dtype):
    """Of 300 classes, 255 is one, though -1 is stored as it in 8 bits without a sign."""
    logits = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    largest = min(299, np.iinfo(dtype).max)
    ids = np.array([[0, largest], [5, 7]], dtype)
    log_probs = np.log(np.array([[0.5, 0.25]] * 2))
    wanted = reference_distillation.top_k_distillation_loss(logits, ids.astype(int), log_probs)
    found = ce_jax.top_k_distillation_loss(logits, ids, jnp.float32(log_probs), ignore_index=1000)
    close(found, wanted, 1e-6)


def test_renormalize_takes_logits():
    arguments = arguments_of(DENSE, tail="renormalize")
    wanted = ce_jax.top_k_distillation_loss(**arguments)
    arguments["teacher_log_probs"] = arguments["teacher_log_probs"] + 30
    close(ce_jax.top_k_distillation_loss(**arguments), wanted, 1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_all_classes_known_is_distillation(tail):
    """Then nothing is left for the tail to differ in."""
    draw = np.random.default_rng(6)
    logits, teacher = draw.normal(size=(2, 4, CLASSES)).astype(np.float32)
    ids = np.array([draw.permutation(CLASSES) for _ in range(4)])
    log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(teacher / 2)), ids, -1)
    found = ce_jax.top_k_distillation_loss(logits, ids, log_probs, tail=tail, temperature=2.0)
    wanted = ce_jax.distillation_loss(logits, teacher, temperature=2.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.cpu
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", [DENSE, LINEAR])
def test_sharded_classes(form):
    """Over four devices, the last of which hold padding: value and all gradients are whole."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    arguments = arguments_of(form, masked=True, temperature=1.5)
    specs = {"hidden": P(), "kernel": P(None, "model"), "logits": P(None, None, "model")}
    specs |= {"teacher_log_probs": P(), "temperature": P(), "sample_weight": P()}
    static = {k: arguments[k] for k in ("teacher_ids", "where")} | {"axis_name": "model"}
    exact = dict(arguments)
    if form == DENSE:
        arguments["logits"] = np.append(arguments["logits"], np.full((*ROWS, 1), -INF), -1)
    else:
        arguments["kernel"] = np.append(arguments["kernel"], [[NAN]] * 2, 1)
        static |= {"num_classes": CLASSES, **budget(1)}
    smooth = {k: jnp.asarray(v, float) for k, v in arguments.items() if k in specs}
    specs = {k: specs[k] for k in smooth}

    def local(smooth):
        return getattr(ce_jax, form)(**smooth, **static)

    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P()))
    value, pull = jax.vjp(sharded, smooth)
    truth = getattr(reference_distillation, form)
    close(value, truth(**exact), 1e-12)
    cotangent = np.random.default_rng(3).normal(size=ROWS)
    for key, gradient in pull(jnp.asarray(cotangent))[0].items():
        wanted = reference.vjp(truth, exact, key, cotangent)
        close(gradient[..., : wanted.shape[-1]] if wanted.ndim else gradient, wanted, 1e-11, key)
    unchecked = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=False)
    with pytest.raises(ValueError, match=r"(logits|kernel) must vary .*'model'"):
        unchecked(smooth)


@pytest.mark.cpu
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("classes", [None, "model"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_global_logits_under_plain_jit(axis_type, classes, dtype):
    """Sharded over rows, or over rows and classes, without a mesh argument."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    draw = np.random.default_rng(0)
    arguments = {"logits": draw.normal(size=(4, 8)).astype(dtype), **known(draw, (4,), 8)}
    arguments["teacher_log_probs"] = np.float32(arguments["teacher_log_probs"])
    truth = functools.partial(reference_distillation.top_k_distillation_loss, reduction="sum")
    with jax.set_mesh(mesh):
        by_row, spread = (NamedSharding(mesh, P("data", x)) for x in (None, classes))
        logits, *rest = (
            jax.device_put(x, spread if name == "logits" else by_row)
            for name, x in arguments.items()
        )
        loss = functools.partial(ce_jax.top_k_distillation_loss, reduction="sum")
        value, gradient = jax.jit(jax.value_and_grad(loss))(logits, *rest)
    assert gradient.sharding == logits.sharding
    arguments["logits"] = np.float64(arguments["logits"])
    close(value, truth(**arguments), 4e-6)
    close(gradient, reference.vjp(truth, arguments, "logits", 1.0), accuracy(dtype))


def test_class_axes():
    """Ids are flat indices over several, and stand last whatever the axis of the classes."""
    arguments = arguments_of(DENSE)
    wanted = ce_jax.top_k_distillation_loss(**arguments)
    logits = arguments.pop("logits")
    first = ce_jax.top_k_distillation_loss(np.moveaxis(logits, -1, 0), **arguments, axis=0)
    np.testing.assert_allclose(first, wanted, rtol=1e-6)
    one = {k: v[0, 0] for k, v in arguments.items()}
    both = np.append(logits[0, 0], -INF).reshape(2, 4)
    found = ce_jax.top_k_distillation_loss(both, **one, axis=None)
    np.testing.assert_allclose(found, wanted[0, 0], rtol=1e-6)


F32 = np.float32
IDS, LOG_PROBS = np.array([[0, 1]] * 5), np.full((5, 2), -1.0, F32)
RIGHT = {DENSE: {"logits": np.zeros((5, 4), F32)}}
RIGHT[LINEAR] = {"hidden": np.zeros((5, 2), F32), "kernel": np.zeros((2, 4), F32)}
OF_BOTH = [
    ("teacher_ids", np.zeros((5, 2), F32), TypeError, ["float32", "integer"]),
    ("teacher_ids", np.zeros(5, int), ValueError, ["(5, k)", "(5,)"]),
    ("teacher_ids", np.zeros((4, 2), int), ValueError, ["(5, k)", "(4, 2)"]),
    ("teacher_ids", np.zeros((5, 0), int), ValueError, ["(5, k)", "(5, 0)"]),
    ("teacher_log_probs", np.zeros((5, 2), int), TypeError, ["int", "float"]),
    ("teacher_log_probs", np.zeros((5, 3), F32), ValueError, ["(5, 2)", "(5, 3)"]),
    ("tail", "buckets", WRONG_NAME, ["buckets"]),
    ("temperature", 0.0, ValueError, ["0.0"]),
    ("temperature", np.ones(4, F32), ValueError, ["(4,)", "(5,)"]),
    ("where", np.ones(5, F32), TypeError, ["float32", "bool"]),
    ("where", np.ones(4, bool), ValueError, ["(4,)", "(5,)"]),
    ("sample_weight", np.ones(4, F32), ValueError, ["(4,)", "(5,)"]),
    ("ignore_index", 1.5, (TypeError, *WRONG_NAME[1:]), ["1.5"]),
    ("reduction", "average", WRONG_NAME, ["average"]),
]
ERRORS = [
    *((form, *error) for form in (DENSE, LINEAR) for error in OF_BOTH),
    (DENSE, "logits", np.zeros((5, 4), int), TypeError, ["int", "float"]),
    (DENSE, "axis", 2, ValueError, ["2"]),
    (LINEAR, "kernel", np.zeros((3, 4), F32), ValueError, ["(3, 4)"]),
    (LINEAR, "num_classes", 5, ValueError, ["5", "4"]),
    (LINEAR, "memory_budget", 0, ValueError, ["0"]),
    (LINEAR, "logit_soft_cap", 0.0, ValueError, ["0.0"]),
]


@pytest.mark.parametrize(("name", "key", "value", "error", "parts"), ERRORS)
def test_the_message_names_the_argument(name, key, value, error, parts):
    right = RIGHT[name] | {"teacher_ids": IDS, "teacher_log_probs": LOG_PROBS}
    with pytest.raises(error, match=key) as caught:
        getattr(ce_jax, name)(**(right | {key: value}))
    for part in parts:
        assert part in str(caught.value)
