"""Distillation: dense, from a layer, and from two layers, against both softmaxes in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ce_jax
from tests import reference, reference_distillation
from tests.comparison import close, compare
from tests.helpers import GARBAGE, WRONG_NAME, compilations

pytestmark = pytest.mark.usefixtures("cheap_programs")

INF, NAN = np.inf, np.nan
DENSE, LINEAR = "distillation_loss", "linear_distillation_loss"
CLASSES = 7
COLD = np.array([0.5, 0.8, 1.2, 2.0, 3.0])  # a temperature for each row


def dense_arguments(*, where=None, sample_weight=False, masked=False, first=False, **options):
    draw = np.random.default_rng(0)
    student, teacher = 2 * draw.normal(size=(5, CLASSES)), 2 * draw.normal(size=(5, CLASSES))
    if masked:  # what the teacher allows, the student must, and with `reverse` the other way round
        banned = draw.random((5, CLASSES)) < 0.4
        banned[:, 0] = False
        (student if options.get("reverse") else teacher)[banned] = -INF
        student[:, 2] = teacher[:, 2] = -INF
    if where == "rows":
        options["where"] = np.arange(5) != 3
        student[3], teacher[3] = np.resize(GARBAGE, (2, CLASSES))
    if where == "classes":
        options["where"] = draw.random((5, CLASSES)) < 0.7
        options["where"][1] = False
        student[~options["where"]] = teacher[~options["where"]] = 9.0
    if sample_weight:
        options["sample_weight"] = draw.uniform(0.5, 2.0, size=5)
        options["sample_weight"][2] = 0.0
    arguments = {"logits": student, "teacher_logits": teacher} | options
    if first:
        arguments["axis"] = 0
        for name in ("logits", "teacher_logits", "where"):
            if np.ndim(arguments.get(name)) == 2:
                arguments[name] = arguments[name].T.copy()
    return arguments


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float64", {"temperature": 2.5, "where": "rows", "sample_weight": True, "masked": True}),
        ("float64", {"temperature": 0.7, "reverse": True, "masked": True, "first": True}),
        ("float64", {"temperature": COLD, "where": "rows", "sample_weight": True}),
        ("float32", {"temperature": COLD, "where": "classes", "reverse": True}),
        ("float32", {"reduction": "mean", "sample_weight": True, "first": True}),
    ],
)
def test_dense(dtype, options):
    wrt = ("temperature",) if isinstance(options.get("temperature"), float) else ()
    truth = reference_distillation.distillation_loss
    arguments = dense_arguments(**options)
    compare(ce_jax.distillation_loss, truth, arguments, wrt, dtype=jnp.dtype(dtype), loosen=4.0)


def linear_arguments(*, given=False, padded=False, options=False, masked=False, **more):
    """A teacher that is wider than the student, or its logits; garbage where nothing counts."""
    draw = np.random.default_rng(0)
    rows = (2, 3)
    arguments = {"hidden": draw.normal(size=(*rows, 2)), "kernel": draw.normal(size=(2, CLASSES))}
    teacher = {"hidden": draw.normal(size=(*rows, 3)), "kernel": draw.normal(size=(CLASSES, 3))}
    if given:
        arguments["teacher_logits"] = 2 * draw.normal(size=(*rows, CLASSES))
    else:
        arguments |= {f"teacher_{k}": v for k, v in teacher.items()}
        arguments["teacher_class_axis"] = 0
    if options:
        arguments |= {"bias": draw.normal(size=CLASSES), "logit_soft_cap": 2.0}
        if not given:
            arguments["teacher_bias"] = draw.normal(size=CLASSES)
            arguments["teacher_logit_soft_cap"] = 3.0
    if padded:
        arguments["num_classes"] = CLASSES
        garbage = np.resize(GARBAGE, (2, 4))
        arguments["kernel"] = np.concatenate([arguments["kernel"], garbage], 1)
        if options:
            arguments["bias"] = np.append(arguments["bias"], GARBAGE)
    if masked:
        more["where"] = np.arange(6).reshape(rows) != 4
        more["sample_weight"] = draw.uniform(0.5, 2.0, size=rows)
        for name in ("hidden", "teacher_hidden", "teacher_logits"):
            if name in arguments:
                arguments[name][1, 1] = np.resize(GARBAGE, arguments[name].shape[-1])
    return arguments | more


def budget(columns, dtype="float64"):
    """For blocks of so many columns, without options."""
    return {"memory_budget": 6 * columns * 2 * 3 * jnp.dtype(dtype).itemsize}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float64", {"temperature": 2.5, "options": True, "padded": True, "masked": True}),
        ("float64", {"temperature": np.linspace(0.5, 2.0, 6), "given": True, "masked": True}),
        ("float32", {"reverse": True, "reduction": "mean"}),
    ],
    ids=["two layers", "logits given", "reverse"],
)
def test_linear(dtype, options):
    wrt = ("temperature",) if isinstance(options.get("temperature"), float) else ()
    if "given" in options:  # one for each row
        options = options | {"temperature": options["temperature"].reshape(2, 3)}
    arguments = linear_arguments(**options)
    wrt += tuple(k for k in arguments if k.endswith("soft_cap"))
    truth = reference_distillation.linear_distillation_loss
    options = {"dtype": jnp.dtype(dtype), "loosen": 4.0, **budget(3, dtype)}
    compare(ce_jax.linear_distillation_loss, truth, arguments, wrt, **options)


@pytest.mark.usefixtures("x64")
def test_transformations():
    """As one program: vmap of grad, second derivatives of both kinds, and forward mode."""
    arguments = linear_arguments(temperature=1.3)
    kernels = {k: arguments.pop(k) for k in ("kernel", "teacher_kernel")}
    x = np.concatenate([v.ravel() for v in kernels.values()])
    cotangent = np.random.default_rng(1).normal(size=(2, 3))

    def inputs(x):
        parts = np.split(x, [2 * CLASSES]) if isinstance(x, np.ndarray) else jnp.split(x, [14])
        return {k: p.reshape(v.shape) for (k, v), p in zip(kernels.items(), parts, strict=True)}

    def f(x, **more):
        loss = ce_jax.linear_distillation_loss(**inputs(x), **arguments, **more)
        return jnp.vdot(cotangent, loss)

    def truth(x):
        return reference_distillation.linear_distillation_loss(**inputs(x), **arguments)

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
@pytest.mark.parametrize("given", [False, True], ids=["two layers", "logits given"])
def test_no_logits_are_held(given):
    """Value and the student's gradients; the logits of one alone would take 134 MB.

    The teacher's gradient, which nobody asks for, is not computed: 6 matmuls are left of 8.
    """
    rows, width, classes = 1024, 64, 32768
    assert 4 * rows * classes == 134217728

    def loss(student, teacher):
        names = ["teacher_logits"] if given else ["teacher_hidden", "teacher_kernel"]
        teacher = dict(zip(names, teacher, strict=True))
        return ce_jax.linear_distillation_loss(*student, **teacher, reduction="mean")

    layer = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, width), (width, classes))
    ]
    teacher = [jax.ShapeDtypeStruct((rows, classes), jnp.float32)] if given else layer
    compiled = jax.jit(jax.value_and_grad(loss)).lower(layer, teacher).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 18 * 10**6
    if not given:
        both = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(layer, teacher).compile()
        spent = [x.cost_analysis()["flops"] for x in (compiled, both)]
        np.testing.assert_allclose(spent[0] / spent[1], 6 / 8, atol=0.03)


@pytest.mark.sweep
@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("loss", [ce_jax.distillation_loss, ce_jax.jensen_shannon_loss])
def test_one_row_with_a_temperature(loss):
    """Without an axis of rows: alone, with all axes as classes, and under vmap."""
    student, teacher = jnp.array([[0.0, 1.0, 2.0], [1.0, 0.0, -1.0]])

    def of(student, **options):
        theirs = jnp.broadcast_to(teacher, student.shape)
        return loss(student, theirs, temperature=jnp.float32(2), **options)

    def slopes(student):
        yield jax.value_and_grad(lambda z: of(z[None]).sum())(student)
        for options in ({}, {"axis": None}, {"forward_mode": True}):
            yield jax.value_and_grad(functools.partial(of, **options))(student)
        yield jax.tree.map(lambda x: x[0], jax.vmap(jax.value_and_grad(of))(student[None]))

    (want, slope), *others = jax.jit(lambda z: list(slopes(z)))(student)
    for value, found in others:
        np.testing.assert_allclose(value, want, rtol=1e-6)
        np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-7)


def test_close_to_the_teacher():
    """Where cross-entropy less entropy has no digit left, the divergence has many."""
    draw = np.random.default_rng(0)
    teacher = jnp.asarray(10 * draw.normal(size=(4, 100)), jnp.float32)
    student = teacher + jnp.asarray(1e-3 * draw.normal(size=(4, 100)), jnp.float32) + 50
    exact = {"logits": np.float64(student), "teacher_logits": np.float64(teacher)}
    truth = reference_distillation.distillation_loss(**exact)
    assert np.max(truth) < 1e-6
    found = ce_jax.distillation_loss(student, teacher)
    np.testing.assert_allclose(found, truth, rtol=0, atol=3e-7)
    np.testing.assert_array_equal(ce_jax.distillation_loss(teacher, teacher), 0.0)


@pytest.mark.sweep
@pytest.mark.usefixtures("usual_programs")
def test_bfloat16():
    """Of student or teacher alone: both are compared in float32, gradients have their dtypes."""
    arguments = linear_arguments()
    arguments |= {k: jnp.asarray(arguments[k], jnp.bfloat16) for k in ("hidden", "kernel")}
    names = ("hidden", "kernel", "teacher_hidden", "teacher_kernel")
    arguments |= {k: jnp.asarray(arguments[k], jnp.float32) for k in names[2:]}
    exact = arguments | {k: np.asarray(arguments[k], np.float64) for k in names}

    @jax.jit
    def value_and_gradients(*arrays):
        def loss(*x):
            return ce_jax.linear_distillation_loss(
                **dict(zip(names, x, strict=True)), teacher_class_axis=0
            )

        value, pull = jax.vjp(loss, *arrays)
        return value, pull(jnp.ones_like(value))

    value, gradients = value_and_gradients(*(arguments[k] for k in names))
    assert value.dtype == jnp.float32
    truth = reference_distillation.linear_distillation_loss
    close(value, truth(**exact), 1e-5)
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient.dtype == arguments[name].dtype
        slope = reference.vjp(truth, exact, name, np.ones((2, 3)))
        close(gradient, slope, 2**-6 if name in names[:2] else 1e-5, name)


@pytest.mark.sweep
@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("reverse", [False, True])
def test_extremes(reverse):
    """Rows: huge logits; one class; a class only one side allows; nothing allowed, weight 0."""
    student = jnp.array([[1e4, -1e4, 0], [3.0, -INF, -INF], [1.0, 2.0, -INF], [-INF] * 3])
    teacher = jnp.array([[-1e4, 1e4, 0], [9.0, -INF, -INF], [1.0, 2.0, 3.0], [NAN] * 3])
    weights = jnp.array([1.0, 1.0, 1.0, 0.0])

    @jax.jit
    def both(student, teacher):
        loss = functools.partial(
            ce_jax.distillation_loss, sample_weight=weights, temperature=2.0, reverse=reverse
        )
        value, pull = jax.vjp(loss, student, teacher)
        return value, pull(jnp.ones_like(value))

    value, (d_student, d_teacher) = both(student, teacher)
    p, q = (np.array([1, np.exp(0.5), c]) for c in (0, np.e))
    p, q = p[:2] / p.sum(), q[:2] / q.sum()
    missing = 4 * np.sum(p * np.log(p / q)) if reverse else INF
    np.testing.assert_allclose(value, [4e4, 0, missing, 0], rtol=1e-6)
    np.testing.assert_array_equal(d_student[1], 0)
    np.testing.assert_array_equal(d_student[3], 0)
    np.testing.assert_array_equal(d_teacher[3], 0)
    assert np.isfinite(d_student).all()
    empty = ce_jax.distillation_loss(jnp.zeros((0, 3)), jnp.zeros((0, 3)), reduction="mean")
    assert empty == 0


@pytest.mark.sweep
@pytest.mark.parametrize("side", ["hidden", "teacher_hidden"])
def test_a_row_that_weighs_nothing_may_hold_anything(side):
    """It reaches no gradient, that of the kernel beside it least of all."""
    arguments = linear_arguments(sample_weight=np.ones((2, 3)))
    arguments["sample_weight"][0, 1] = 0
    smooth = [k for k, v in arguments.items() if isinstance(v, np.ndarray)]
    arrays = {k: jnp.asarray(arguments[k], jnp.float32) for k in smooth}
    spoiled = arrays | {side: arrays[side].at[0, 1, 0].set(NAN)}
    loss = functools.partial(
        ce_jax.linear_distillation_loss, teacher_class_axis=0, reduction="sum", temperature=1.3
    )
    both = jax.jit(jax.value_and_grad(lambda x: loss(**x)))
    (found, slopes), (value, wanted) = both(spoiled), both(arrays)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    for key, slope in slopes.items():
        if key != "sample_weight":  # whose slope is the loss of the row
            np.testing.assert_allclose(slope, wanted[key], rtol=1e-5, atol=1e-6, err_msg=key)
    np.testing.assert_array_equal(slopes[side][0, 1], 0)


@pytest.mark.cpu
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["dense", "two layers", "logits given"])
def test_sharded_classes(form):
    """Over four devices, the last of which hold padding: value and all gradients are whole."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    arguments = linear_arguments(temperature=1.5, given=form == "logits given")
    specs = {"hidden": P(), "kernel": P(None, "model"), "temperature": P()}
    specs |= {"teacher_hidden": P(), "teacher_kernel": P("model")}
    specs |= {"teacher_logits": P(None, None, "model")}
    static = {"axis_name": "model"}
    if form != "dense":
        static |= {"num_classes": CLASSES, **budget(1)}
        arguments["kernel"] = np.pad(arguments["kernel"], ((0, 0), (0, 1)), constant_values=NAN)
        if form == "two layers":
            static["teacher_class_axis"] = 0
            arguments["teacher_kernel"] = np.pad(arguments["teacher_kernel"], ((0, 1), (0, 0)))
        else:
            beyond = np.full((2, 3, 1), INF)
            arguments["teacher_logits"] = np.append(arguments["teacher_logits"], beyond, -1)
        arguments["num_classes"] = CLASSES
    else:
        logits = 2 * np.random.default_rng(0).normal(size=(2, 3, 8))
        arguments = {"logits": logits, "teacher_logits": -logits[::-1], "temperature": 1.5}
        specs = {k: P(None, None, "model") if np.ndim(v) else P() for k, v in arguments.items()}
    name = DENSE if form == "dense" else LINEAR
    truth = getattr(reference_distillation, name)
    smooth = {k: jnp.asarray(v, float) for k, v in arguments.items() if k in specs}
    specs = {k: specs[k] for k in smooth}

    def local(smooth):
        return getattr(ce_jax, name)(**smooth, **static)

    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P()))
    value, pull = jax.vjp(sharded, smooth)
    close(value, truth(**arguments), 1e-12)
    cotangent = np.random.default_rng(3).normal(size=(2, 3))
    for key, gradient in pull(jnp.asarray(cotangent))[0].items():
        close(gradient, reference.vjp(truth, arguments, key, cotangent), 1e-11, key)
    unchecked = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=False)
    with pytest.raises(ValueError, match=r"(logits|kernel) must vary .*'model'"):
        unchecked(smooth)


@pytest.mark.cpu
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_global_logits_under_plain_jit(axis_type):
    """Sharded over rows and classes, without a mesh argument."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    draw = np.random.default_rng(0)
    arguments = {k: np.float32(draw.normal(size=(4, 8))) for k in ("logits", "teacher_logits")}
    truth = functools.partial(reference_distillation.distillation_loss, reduction="sum")
    with jax.set_mesh(mesh):
        spread = NamedSharding(mesh, P("data", "model"))
        placed = [jax.device_put(x, spread) for x in arguments.values()]
        loss = functools.partial(ce_jax.distillation_loss, reduction="sum")
        value, gradient = jax.jit(jax.value_and_grad(loss))(*placed)
    close(value, truth(**arguments), 4e-6)
    close(gradient, reference.vjp(truth, arguments, "logits", 1.0), 4e-6)


def test_eager_calls_run_one_cached_program():
    x = np.ones((5, 3), np.float32)
    ce_jax.distillation_loss(x[1:], x[1:], temperature=4.0)  # what arrays of any shape need
    with compilations() as seen:
        for temperature in (2.0, 3.0):
            ce_jax.distillation_loss(x, x, temperature=temperature)
        assert len(seen) == 1


F32 = np.float32
RIGHT = {DENSE: {"logits": np.zeros((5, 4), F32), "teacher_logits": np.zeros((5, 4), F32)}}
RIGHT[LINEAR] = {
    "hidden": np.zeros((5, 2), F32),
    "kernel": np.zeros((2, 4), F32),
    "teacher_hidden": np.zeros((5, 3), F32),
    "teacher_kernel": np.zeros((3, 4), F32),
}
ERRORS = [
    (DENSE, "logits", np.zeros((5, 4), int), TypeError, ["int", "float"]),
    (DENSE, "teacher_logits", np.zeros((5, 3), F32), ValueError, ["(5, 3)", "(5, 4)"]),
    (DENSE, "temperature", 0.0, ValueError, ["0.0"]),
    (DENSE, "temperature", np.ones(4, F32), ValueError, ["(4,)", "(5,)"]),
    (LINEAR, "temperature", np.ones((5, 1), F32), ValueError, ["(5, 1)", "(5,)"]),
    (DENSE, "axis", 2, ValueError, ["2"]),
    (DENSE, "where", np.ones(5, F32), TypeError, ["float32", "bool"]),
    (DENSE, "sample_weight", np.ones(4, F32), ValueError, ["(4,)", "(5,)"]),
    (DENSE, "reduction", "average", WRONG_NAME, ["average"]),
    (LINEAR, "kernel", np.zeros((3, 4), F32), ValueError, ["(3, 4)"]),
    (LINEAR, "teacher_kernel", np.zeros((2, 4), F32), ValueError, ["(2, 4)", "D = 3"]),
    (LINEAR, "teacher_kernel", np.zeros((3, 5), F32), ValueError, ["4", "5", "num_classes"]),
    (LINEAR, "teacher_kernel", None, ValueError, ["teacher_logits"]),
    (LINEAR, "teacher_logits", np.zeros((5, 4), F32), ValueError, ["teacher_hidden"]),
    (LINEAR, "teacher_hidden", np.zeros((4, 3), F32), ValueError, ["(4,)", "(5,)"]),
    (LINEAR, "teacher_bias", np.zeros(3, F32), ValueError, ["(3,)", "(4,)"]),
    (LINEAR, "teacher_class_axis", 2, ValueError, ["2"]),
    (LINEAR, "num_classes", 5, ValueError, ["5", "4"]),
    (LINEAR, "memory_budget", 0, ValueError, ["0"]),
    (LINEAR, "logit_soft_cap", 0.0, ValueError, ["0.0"]),
]


@pytest.mark.parametrize(("name", "key", "value", "error", "parts"), ERRORS)
def test_the_message_names_the_argument(name, key, value, error, parts):
    with pytest.raises(error, match=key) as caught:
        getattr(ce_jax, name)(**(RIGHT[name] | {key: value}))
    for part in parts:
        assert part in str(caught.value)


def test_a_class_that_the_student_bans_costs_infinity_however_rare():
    """Its probability of e^-200 rounds to 0; one that the teacher bans, too, costs nothing."""
    student = jnp.array([0.0, -jnp.inf])
    assert ce_jax.distillation_loss(student, jnp.array([0.0, -200.0])) == jnp.inf
    assert ce_jax.distillation_loss(student, student) == 0
    by_class = functools.partial(ce_jax.linear_distillation_loss, memory_budget=1)
    layer = {"hidden": jnp.zeros((1, 2)), "kernel": jnp.zeros((2, 2)), "bias": student}
    assert by_class(**layer, teacher_logits=jnp.array([[0.0, -200.0]])) == jnp.inf
