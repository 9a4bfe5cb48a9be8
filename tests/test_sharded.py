"""Classes spread over a mesh axis: eight simulated devices against the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ce_jax
from tests import hlo, reference, reference_linear
from tests.comparison import close

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("cheap_programs")]

ROWS, CLASSES, WIDTH = 8, 20, 6
REAL_CLASSES = 17  # the last of the four shards is padding but for two classes
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.05, "ignore_index": 3}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def problem():
    draw = np.random.default_rng(7)
    labels = draw.integers(0, REAL_CLASSES, ROWS)
    labels[:3] = [3, 0, REAL_CLASSES - 1]
    soft = draw.random((ROWS, CLASSES))
    soft[0, :5] = 0.0
    return {
        "logits": draw.normal(size=(ROWS, CLASSES)),
        "hidden": draw.normal(size=(ROWS, WIDTH)),
        "kernel": draw.normal(size=(WIDTH, CLASSES)),
        "bias": draw.normal(size=CLASSES),
        "labels": labels,
        "soft": soft,
        "weight": draw.uniform(0.5, 2.0, CLASSES),
        "sample_weight": draw.uniform(0.5, 2.0, ROWS),
        "cotangent": draw.normal(size=ROWS),
    }


SPECS = {
    "logits": P("data", "model"),
    "hidden": P("data"),
    "kernel": P(None, "model"),
    "bias": P("model"),
    "labels": P("data"),
    "weight": P("model"),
    "sample_weight": P("data"),
}


def on_mesh(function, mesh, names, specs=SPECS, **options):
    """`function` of the named arguments inside shard_map, by keyword, its loss by rows."""

    def local(*arguments):
        return function(**dict(zip(names, arguments, strict=True)), axis_name="model", **options)

    in_specs = tuple(specs[name] for name in names)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P("data"))


def check(function, truth, arguments, wrt, cotangent, mesh, **options):
    """Value and gradients under jit are the reference's."""
    names = tuple(arguments)
    sharded = jax.jit(on_mesh(function, mesh, names, **options))
    value, pull = jax.vjp(sharded, *(jnp.asarray(x) for x in arguments.values()))
    close(value, truth(**arguments), 1e-12)
    gradients = dict(zip(names, pull(jnp.asarray(cotangent)), strict=True))
    for name in wrt:
        close(gradients[name], reference.vjp(truth, arguments, name, cotangent), 1e-11, f"d {name}")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("forward_mode", [False, True])
def test_integer_labels(mesh, problem, forward_mode):
    arguments = {k: problem[k] for k in ("logits", "labels", "weight", "sample_weight")}
    check(
        ce_jax.softmax_cross_entropy_with_integer_labels,
        functools.partial(reference.softmax_cross_entropy_with_integer_labels, **OPTIONS),
        arguments,
        ("logits", "weight", "sample_weight"),
        problem["cotangent"],
        mesh,
        forward_mode=forward_mode,
        **OPTIONS,
    )


@pytest.mark.usefixtures("x64")
def test_masked_classes_of_a_whole_shard(mesh, problem):
    """Smoothing spreads over the allowed classes of all devices; a shard may have none."""
    logits = problem["logits"].copy()
    logits[:, 5:10] = -np.inf
    logits[1, 10:] = -np.inf
    labels = np.full(ROWS, 2)
    check(
        ce_jax.softmax_cross_entropy_with_integer_labels,
        functools.partial(reference.softmax_cross_entropy_with_integer_labels, label_smoothing=0.3),
        {"logits": logits, "labels": labels},
        ("logits",),
        problem["cotangent"],
        mesh,
        label_smoothing=0.3,
    )


@pytest.mark.usefixtures("x64")
def test_distributions(mesh, problem):
    arguments = {k: problem[k] for k in ("logits", "weight", "sample_weight")}
    arguments["labels"] = problem["soft"]
    options = {"label_smoothing": 0.1, "z_loss": 0.05}

    check(
        ce_jax.softmax_cross_entropy,
        functools.partial(reference.softmax_cross_entropy, **options),
        arguments,
        ("logits", "labels", "weight", "sample_weight"),
        problem["cotangent"],
        mesh,
        specs={**SPECS, "labels": P("data", "model")},
        **options,
    )


@pytest.mark.usefixtures("x64")
def test_statistics(mesh, problem):
    """Also the argmax: the first of equal maxima on different devices; 0 where one is NaN."""
    logits = problem["logits"].copy()
    logits[0, [4, 5, 19]] = 9.0
    spoilt = logits.copy()
    spoilt[:, 7], spoilt[:, 2] = np.nan, 20.0
    of_spoilt = on_mesh(ce_jax.softmax_statistics, mesh, ("logits", "labels"))
    np.testing.assert_array_equal(of_spoilt(spoilt, problem["labels"]).argmax, 0)
    arguments = {"logits": logits, "labels": problem["labels"]}
    found = jax.jit(on_mesh(ce_jax.softmax_statistics, mesh, tuple(arguments)))(
        *map(jnp.asarray, arguments.values())
    )
    truth = reference.softmax_statistics(**arguments)
    assert found.argmax[0] == 4
    for name, value in zip(found._fields, found, strict=True):
        close(value, getattr(truth, name), 1e-12, name)

    def entropy_and_lse(**rest):
        found = ce_jax.softmax_statistics(**rest)
        return found.entropy * found.lse

    def true_entropy_and_lse(**rest):
        truth = reference.softmax_statistics(**rest)
        return truth.entropy * truth.lse

    cotangent = problem["cotangent"]
    check(entropy_and_lse, true_entropy_and_lse, arguments, ("logits",), cotangent, mesh)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("forward_mode", [False, True])
def test_linear_form_with_a_padded_vocabulary(mesh, problem, forward_mode):
    names = ("hidden", "kernel", "bias", "labels", "weight", "sample_weight")
    options = {**OPTIONS, "num_classes": REAL_CLASSES, "logit_soft_cap": 3.0}
    check(
        functools.partial(ce_jax.linear_softmax_cross_entropy, memory_budget=4 * 2 * 40),
        functools.partial(reference_linear.linear_softmax_cross_entropy, **options),
        {k: problem[k] for k in names},
        ("hidden", "kernel", "bias", "weight", "sample_weight"),
        problem["cotangent"],
        mesh,
        forward_mode=forward_mode,
        **options,
    )


@pytest.mark.usefixtures("x64")
def test_linear_sum_over_a_sharded_batch(mesh, problem):
    """The blocks of tokens inside shard_map: the replicated kernel gets the sum of gradients."""
    cotangent = 0.7

    def local(hidden, kernel, labels):
        total = ce_jax.linear_softmax_cross_entropy(hidden, kernel, labels, reduction="sum")
        return jax.lax.psum(total, ("data", "model"))

    rows = P(("data", "model"))
    summed = jax.shard_map(local, mesh=mesh, in_specs=(rows, P(), rows), out_specs=P())
    arguments = {k: problem[k] for k in ("hidden", "kernel", "labels")}
    value, pull = jax.vjp(jax.jit(summed), *map(jnp.asarray, arguments.values()))
    truth = functools.partial(reference_linear.linear_softmax_cross_entropy, reduction="sum")
    close(value, truth(**arguments), 1e-12)
    for name, gradient in zip(("hidden", "kernel"), pull(jnp.asarray(cotangent)), strict=False):
        close(gradient, reference.vjp(truth, arguments, name, cotangent), 1e-11, name)


def test_what_would_be_silently_wrong_raises(mesh, problem):
    logits, labels = jnp.asarray(problem["logits"], jnp.float32), jnp.asarray(problem["labels"])
    loss = functools.partial(
        ce_jax.softmax_cross_entropy_with_integer_labels, axis_name="model", reduction="sum"
    )

    def total(logits, labels):
        return jax.lax.psum(loss(logits, labels), "data")

    specs = {"in_specs": (P("data", "model"), P("data")), "out_specs": P()}
    unchecked = jax.shard_map(total, mesh=mesh, check_vma=False, **specs)
    with pytest.raises(ValueError, match=r"logits must vary .*'model'.*check_vma"):
        jax.grad(unchecked)(logits, labels)
    specs["in_specs"] = (P("data"), P("data"))
    with pytest.raises(ValueError, match=r"logits must vary .*'model'"):
        jax.shard_map(total, mesh=mesh, **specs)(logits, labels)


@pytest.mark.usefixtures("usual_programs")
def test_devices_exchange_only_rows(mesh):
    """No collective of a vocab-parallel loss and its gradient is larger than the local rows."""
    rows, classes = 64, 512

    def loss(logits, labels):
        local = on_mesh(
            ce_jax.softmax_cross_entropy_with_integer_labels, mesh, ("logits", "labels"), **OPTIONS
        )
        return jnp.sum(local(logits, labels))

    shapes = (jnp.zeros((rows, classes)), jnp.zeros(rows, jnp.int32))
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(shapes, (SPECS["logits"], SPECS["labels"]), strict=True)
    ]
    found = hlo.collectives(jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile())
    assert {c.kind for c in found} == {"all-reduce"}
    assert max(c.largest for c in found) == rows // 2


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("data", None), P("data", "model"), P(None, "model")])
@pytest.mark.parametrize("soft", [False, True])
def test_global_logits_under_plain_jit(problem, axis_type, spec, soft):
    """No mesh argument, no gather, and the gradient comes back sharded like the logits."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    logits = problem["logits"].astype(np.float32)
    labels = problem["soft"].astype(np.float32) if soft else problem["labels"]
    name = "softmax_cross_entropy" + ("" if soft else "_with_integer_labels")
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    arguments = {"logits": logits, "labels": labels}
    truth = functools.partial(getattr(reference, name), **options)
    with jax.set_mesh(mesh):
        placed = (
            jax.device_put(logits, NamedSharding(mesh, spec)),
            jax.device_put(labels, NamedSharding(mesh, spec if soft else P(spec[0]))),
        )
        run = jax.jit(jax.value_and_grad(functools.partial(getattr(ce_jax, name), **options)))
        compiled = run.lower(*placed).compile()
        value, gradient = run(*placed)
    close(value, truth(**arguments), 4e-6)
    close(gradient, reference.vjp(truth, arguments, "logits", 1.0), 4e-6)
    assert gradient.sharding.is_equivalent_to(placed[0].sharding, 2)
    found = hlo.collectives(compiled)
    assert {c.kind for c in found} == {"all-reduce"}
    assert max(c.largest for c in found) == (
        1 if spec[1] is None else ROWS // (2 if spec[0] else 1)
    )


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("spec", [P("data", None), P("data", "model"), P(None, "model")])
@pytest.mark.parametrize("classes", [65536, 96000])
def test_long_rows_are_not_gathered_under_plain_jit(spec, classes):
    """One device reads them in parts; where they may be sharded, these would have to be moved."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def loss(logits, labels):
        found = ce_jax.softmax_statistics(logits, labels)
        return -found.log_prob.sum(), found.argmax

    arguments = (
        jax.ShapeDtypeStruct((8, classes), jnp.float32, sharding=NamedSharding(mesh, spec)),
        jax.ShapeDtypeStruct((8,), jnp.int32, sharding=NamedSharding(mesh, P(spec[0]))),
    )
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    found = hlo.collectives(run.lower(*arguments).compile())
    assert max(c.largest for c in found) <= 8 * 4


def test_second_derivative_of_the_entropy_beside_other_devices(mesh):
    """Relative to the maximum of all devices, exponentials of most devices add up to e^-60."""
    draw = np.random.default_rng(2)
    z, along = np.float32(draw.normal(size=(2, 3, CLASSES)))
    z -= np.float32(60) * (np.arange(CLASSES) >= 5)

    def entropy(logits, labels):
        options = {"axis_name": "model", "forward_mode": True}
        return ce_jax.softmax_statistics(logits, labels, **options).entropy

    spread = jax.shard_map(entropy, mesh=mesh, in_specs=(P(None, "model"), P()), out_specs=P(None))

    def slope(t):
        return jax.jvp(lambda t: spread(z + t * along, jnp.zeros(3, int)), (t,), (1.0,))[1]

    found = jax.jit(lambda t: jax.jvp(slope, (t,), (1.0,))[1])(0.0)

    # With surprise s = lse - z and the mean <.>: H = <s>, H' = -cov(z, z'), and H'' as follows.
    z, v = np.asarray(z, float), np.asarray(along, float)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    z, v = (x - np.sum(p * x, -1, keepdims=True) for x in (z, v))
    truth = -np.sum(p * v * v, -1) - np.sum(p * z * v * v, -1)
    close(found, truth, 1e-5)


@pytest.mark.parametrize("option", ["sample_weight", "where"])
@pytest.mark.parametrize("forward_mode", [False, True])
def test_what_counts_differs_between_devices_that_hold_the_same_logits(option, forward_mode):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    draw = np.random.default_rng(5)
    z = jnp.asarray(draw.normal(size=(3, 7)), jnp.float32)
    share = draw.uniform(0.5, 2.0, (4, 3)) * (draw.random((4, 3)) < 0.6)
    labels = jnp.array([6, 0, 2])

    def local(z, share):
        loss = ce_jax.softmax_cross_entropy_with_integer_labels(
            z, labels, reduction="sum", forward_mode=forward_mode, **{option: share[0]}
        )
        return jax.lax.psum(loss, "data")

    total = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    given = share != 0 if option == "where" else share.astype(np.float32)
    found = jax.jit(jax.grad(total))(z, given)
    p = np.exp(np.asarray(z, float))
    p /= p.sum(-1, keepdims=True)
    close(found, np.sum(given, 0)[:, None] * (p - np.eye(7)[labels]), 1e-6)
