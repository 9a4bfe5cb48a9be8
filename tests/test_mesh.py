"""Losses of global arrays on meshes of eight devices, against the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

import ce_jax
from ce_jax._platform import block_sizes
from tests import hlo, linear, reference, reference_linear
from tests.comparison import close
from tests.helpers import GARBAGE, compilations
from tests.mesh import LAYOUTS, Layout
from tests.test_linear_transforms import dot_products

BATCH, LENGTH, WIDTH, CLASSES, HELD = 8, 2, 8, 21, 24
OPTIONS = {
    "label_smoothing": 0.1,
    "z_loss": 0.05,
    "ignore_index": 3,
    "num_classes": CLASSES,
    "logit_soft_cap": 3.0,
}
STATISTICS = {k: OPTIONS[k] for k in ("ignore_index", "num_classes", "logit_soft_cap")}
SMOOTH = ("hidden", "kernel", "bias", "weight", "sample_weight")
SLOPES = 1e-11

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.usefixtures("x64", "cheap_programs", "tiles_of_one_row"),
]


@functools.cache
def problem():
    """Arguments of the linear form with padded classes, and rows that do not count."""
    draw = np.random.default_rng(11)
    shape = (BATCH, LENGTH)
    labels = draw.integers(0, CLASSES, shape)
    labels[:, 0] = [3, 0, CLASSES - 1, 3, 5, 11, 12, 17]
    where = draw.random(shape) < 0.8
    where[4:6] = [[True, True], [False, True]]
    hidden, kernel = draw.normal(size=(*shape, WIDTH)), draw.normal(size=(WIDTH, HELD))
    hidden[~where | (labels == 3)] = np.resize(GARBAGE, WIDTH)
    kernel[:, CLASSES:] = np.resize(GARBAGE, HELD - CLASSES)
    bias, weight = draw.normal(size=HELD), draw.uniform(0.5, 2.0, HELD)
    bias[CLASSES:] = weight[CLASSES:] = np.nan
    return {
        "hidden": hidden,
        "kernel": kernel,
        "labels": labels,
        "bias": bias,
        "weight": weight,
        "sample_weight": draw.uniform(0.5, 2.0, shape),
        "where": where,
    }


def cotangent():
    return np.random.default_rng(12).normal(size=(BATCH, LENGTH))


@functools.cache
def truth(reduction):
    """Value and gradients; of a mean with the cotangent 1."""
    function = functools.partial(
        reference_linear.linear_softmax_cross_entropy, reduction=reduction, **OPTIONS
    )
    pulled = cotangent() if reduction == "none" else 1.0
    arguments = problem()
    return function(**arguments), {
        name: reference.vjp(function, arguments, name, pulled) for name in SMOOTH
    }


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
CASES = [
    ("data", EXPLICIT),
    ("fsdp", AUTO),
    ("tensor", EXPLICIT),
    ("data-tensor", AUTO),
    ("fsdp-tensor", EXPLICIT),
    ("data-fsdp-tensor", EXPLICIT),
    ("data-sequence-tensor", AUTO),
]


@pytest.mark.parametrize(("layout", "axis_type"), CASES, ids=lambda x: getattr(x, "name", x))
def test_linear_form(layout, axis_type):
    """All options together: rows with cotangents of their own, and the mean; as arguments lie."""
    layout = LAYOUTS[layout]
    mesh = layout.mesh(axis_type)
    loss = ce_jax.on_mesh(ce_jax.linear_softmax_cross_entropy, mesh, **layout.spread)
    arrays = {k: layout.place(mesh, k, v) for k, v in problem().items()}
    smooth = {name: arrays.pop(name) for name in SMOOTH}

    @jax.jit
    def run(smooth, arrays, cotangent):
        def both(smooth):
            # A budget of several blocks of classes; the mean's is one block, of tokens if it may.
            losses = loss(**smooth, **arrays, **OPTIONS, memory_budget=16 * 4 * 40)
            return losses, loss(**smooth, **arrays, **OPTIONS, reduction="mean")

        (losses, mean), pull = jax.vjp(both, smooth)
        (of_losses,) = pull((cotangent, jnp.zeros_like(mean)))
        (of_mean,) = pull((jnp.zeros_like(losses), jnp.ones_like(mean)))
        return losses, mean, of_losses, of_mean

    with jax.set_mesh(mesh):
        losses, mean, of_losses, of_mean = run(
            smooth, arrays, layout.place(mesh, "labels", cotangent())
        )
    for found, gradients, reduction in ((losses, of_losses, "none"), (mean, of_mean, "mean")):
        value, slopes = truth(reduction)
        close(found, value, 1e-12)
        for name, gradient in gradients.items():
            close(gradient, slopes[name], SLOPES, f"d {name} of {reduction}")
            sharding = smooth[name].sharding
            assert gradient.sharding.is_equivalent_to(sharding, gradient.ndim), name
    assert losses.sharding.is_equivalent_to(NamedSharding(mesh, layout.row_spec), 2)
    assert mean.sharding.is_fully_replicated


def compare(function, true, layout, arguments, wrt, axis_type=AUTO, **options):
    """Losses and gradients under random cotangents, from arrays that are on one device."""
    loss = ce_jax.on_mesh(function, layout.mesh(axis_type), **layout.spread)
    true = functools.partial(true, **options)
    expected = true(**arguments)
    pulled = np.random.default_rng(13).normal(size=np.shape(expected))
    smooth = {name: jnp.asarray(arguments[name]) for name in wrt}
    others = {name: jnp.asarray(x) for name, x in arguments.items() if name not in wrt}

    @jax.jit
    def run(smooth, others, cotangent):
        value, pull = jax.vjp(lambda smooth: loss(**smooth, **others, **options), smooth)
        return value, *pull(cotangent)

    value, gradients = run(smooth, others, jnp.asarray(pulled))
    close(value, expected, 1e-12)
    for name in wrt:
        close(gradients[name], reference.vjp(true, arguments, name, pulled), SLOPES, f"d {name}")


def dense_problem():
    """Logits with the class axis in the middle, three classes of padding, masked classes."""
    draw = np.random.default_rng(14)
    logits = draw.normal(size=(4, HELD, 6))
    labels = draw.integers(0, 5, (4, 6))
    labels[0, :3] = [9, CLASSES - 1, -100]
    allowed = np.ones(logits.shape, bool)
    allowed[:, CLASSES:] = allowed[1, 5:] = allowed[2, :, 0] = False
    logits[~allowed] = np.resize(GARBAGE, np.sum(~allowed))
    return {
        "logits": logits,
        "labels": labels,
        "where": allowed,
        "weight": draw.uniform(0.5, 2.0, HELD),
        "sample_weight": draw.uniform(0.5, 2.0, (1, 6)),  # of positions; broadcast over the batch
    }


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_integer_labels(reduction):
    """Data, sequence and vocabulary spread, and classes masked by `where`, some of them padding."""
    options = {"axis": 1, "ignore_index": -100, "label_smoothing": 0.1, "z_loss": 0.05}
    compare(
        ce_jax.softmax_cross_entropy_with_integer_labels,
        reference.softmax_cross_entropy_with_integer_labels,
        LAYOUTS["data-sequence-tensor"],
        dense_problem(),
        ("logits", "weight", "sample_weight"),
        axis_type=EXPLICIT if reduction == "mean" else AxisType.Auto,
        reduction=reduction,
        **options,
    )


# Along one mesh axis, which is for something else, devices do the same.
UNUSED_AXIS = Layout({"data": 2, "other": 2, "model": 2}, rows="data", classes="model")


@pytest.mark.parametrize("stretched", [False, True])
def test_distributions(stretched):
    """Labels for every class; also the same ones for all rows, whole on devices with other rows."""
    draw = np.random.default_rng(15)
    arguments = {k: v for k, v in dense_problem().items() if k != "labels"}
    logits, rows = arguments["logits"], draw.random((4, 6)) < 0.8
    logits[~np.isfinite(logits)] = 0.5
    arguments["where"] = rows
    arguments["labels"] = draw.uniform(0.1, 1.0, (1, HELD, 1) if stretched else logits.shape)

    def true(labels, **rest):
        return reference.softmax_cross_entropy(labels=np.broadcast_to(labels, logits.shape), **rest)

    compare(
        ce_jax.softmax_cross_entropy,
        true,
        LAYOUTS["data-sequence-tensor"],
        arguments,
        ("logits", "labels", "weight", "sample_weight"),
        axis=1,
        label_smoothing=0.1,
        z_loss=0.05,
        reduction="mean" if stretched else "none",
    )


def test_distributions_of_fewer_axes():
    """As many classes as rows: labels `[C]` are one for each class, not for each row."""
    draw = np.random.default_rng(19)
    arguments = {"logits": draw.normal(size=(8, 8)), "labels": draw.random(8)}
    layout = UNUSED_AXIS
    found = ce_jax.on_mesh(ce_jax.softmax_cross_entropy, layout.mesh(), **layout.spread)(
        **arguments
    )
    labels = np.broadcast_to(arguments.pop("labels"), (8, 8))
    close(found, reference.softmax_cross_entropy(**arguments, labels=labels), 1e-12)


def test_statistics_over_several_class_axes():
    """The first class axis is spread, so that flat ids are those of the whole row."""
    draw = np.random.default_rng(16)
    arguments = {"logits": draw.normal(size=(4, 6, 5)), "labels": draw.integers(0, 20, 6)}
    arguments["logits"][[1, 3], 2, [4, 0]] = 9.0  # equal: the first wins
    layout = UNUSED_AXIS
    found = ce_jax.on_mesh(ce_jax.softmax_statistics, layout.mesh(), **layout.spread)(
        **arguments, axis=(0, 2)
    )
    truth = reference.softmax_statistics(**arguments, axis=(0, 2))
    assert found.argmax[2] == 9
    for name, value in zip(found._fields, found, strict=True):
        close(value, getattr(truth, name), 1e-12, name)


def test_loss_and_statistics_on_the_mesh_in_use():
    """From one pass; the row loss is a closure, whose parameter has a gradient."""
    layout, arguments = LAYOUTS["data-fsdp-tensor"], problem()
    options = {**OPTIONS, "reduction": "sum"}
    loss = ce_jax.on_mesh(ce_jax.linear_softmax_cross_entropy, None, **layout.spread)

    def total(gamma):
        return loss(
            **arguments,
            **options,
            log_prob_loss=lambda log_prob: linear.focal(log_prob, gamma),
            return_statistics=True,
        )

    with jax.set_mesh(layout.mesh()):
        run = jax.jit(jax.value_and_grad(total, has_aux=True))
        (value, found), slope = run(jnp.asarray(1.5))
    true = functools.partial(reference_linear.linear_softmax_cross_entropy, **options)
    close(value, true(**arguments, gamma=1.5), 1e-12)
    close(slope, reference.vjp(true, {**arguments, "gamma": 1.5}, "gamma", 1.0), SLOPES)
    check_statistics(found)


@pytest.mark.parametrize("traced", [False, True])
def test_a_row_loss_of_the_library(traced):
    """With a parameter that is traced, but not differentiated; without, by blocks of tokens."""
    hidden, kernel = draws(BATCH, LENGTH, WIDTH), draws(WIDTH, HELD)

    @jax.jit
    def run(gamma):
        of_row = functools.partial(ce_jax.focal_loss, gamma=gamma if traced else 1.5)
        mean = plain(LAYOUTS["fsdp"], reduction="mean", log_prob_loss=of_row)
        return jax.value_and_grad(mean)(hidden, kernel)

    value, slope = run(jnp.asarray(1.5))
    labels = drawn_labels((BATCH, LENGTH))
    true = functools.partial(
        reference_linear.linear_softmax_cross_entropy, gamma=1.5, reduction="mean"
    )
    arguments = {"hidden": np.asarray(hidden), "kernel": np.asarray(kernel), "labels": labels}
    close(value, true(**arguments), 1e-12)
    close(slope, reference.vjp(true, arguments, "hidden", 1.0), SLOPES)


def check_statistics(found):
    arguments = {k: problem()[k] for k in ("hidden", "kernel", "labels", "bias", "where")}
    truth = reference_linear.linear_softmax_statistics(**arguments, **STATISTICS)
    for name, value in zip(found._fields, found, strict=True):
        close(value, getattr(truth, name), 1e-12, name)


def test_eager_calls_run_one_cached_program():
    """For all functions made with the same arguments, and whatever the float options."""
    layout = LAYOUTS["fsdp-tensor"]
    mesh = layout.mesh()
    arrays = {k: layout.place(mesh, k, v) for k, v in problem().items()}

    def call(label_smoothing):
        loss = ce_jax.on_mesh(ce_jax.linear_softmax_cross_entropy, mesh, **layout.spread)
        return loss(**arrays, **{**OPTIONS, "label_smoothing": label_smoothing}, reduction="mean")

    with compilations() as seen:
        first = call(0.1)
        assert seen
        seen.clear()
        second = call(0.2)
        assert not seen
    close(first, truth("mean")[0], 1e-12)
    assert second != first
    statistics = ce_jax.on_mesh(ce_jax.linear_softmax_statistics, mesh, **layout.spread)
    check_statistics(
        statistics(
            **{k: arrays[k] for k in ("hidden", "kernel", "labels", "bias", "where")}, **STATISTICS
        )
    )


def drawn_labels(shape):
    return np.random.default_rng(17).integers(0, HELD, shape)


def plain(layout, **options):
    """Losses without options, as a function of hidden states and kernel on the mesh."""
    loss = ce_jax.on_mesh(ce_jax.linear_softmax_cross_entropy, layout.mesh(), **layout.spread)

    def losses(hidden, kernel):
        return loss(hidden, kernel, drawn_labels(hidden.shape[:-1]), **options)

    return losses


def draws(*shape):
    return jnp.asarray(np.random.default_rng(18).normal(size=shape))


@pytest.mark.parametrize(
    ("layout", "matmuls"), [("data", 3), ("fsdp", 3), ("tensor", 4), ("fsdp-tensor", 4)]
)
def test_sums_go_by_tokens_where_classes_are_whole(layout, matmuls):
    """Three matmuls instead of four."""
    total = plain(LAYOUTS[layout], reduction="mean")
    arguments = draws(BATCH, LENGTH, WIDTH), draws(WIDTH, HELD)
    gradients = jax.make_jaxpr(jax.grad(total, (0, 1)))(*arguments)
    assert len(dot_products(gradients.jaxpr)) == matmuls


def test_several_blocks_of_tokens(monkeypatch):
    """On each device, after the kernel has been gathered."""
    monkeypatch.setattr(block_sizes, "_FEWEST_TOKENS", 1)
    layout = LAYOUTS["fsdp"]
    loss = ce_jax.on_mesh(ce_jax.linear_softmax_cross_entropy, layout.mesh(), **layout.spread)
    budget = linear.token_budget(HELD, 1, "float64", steps=3)

    def mean(kernel):
        arguments = {**problem(), "kernel": kernel}
        return loss(**arguments, **OPTIONS, reduction="mean", memory_budget=budget)

    program = jax.jit(jax.grad(mean)).lower(jnp.asarray(problem()["kernel"])).compile()
    assert hlo.has_loop(program)
    close(program(jnp.asarray(problem()["kernel"])), truth("mean")[1]["kernel"], SLOPES)


def test_batched_by_vmap():
    losses = plain(LAYOUTS["fsdp-tensor"])
    hidden, kernel = draws(3, BATCH, LENGTH, WIDTH), draws(WIDTH, HELD)
    together = jax.jit(jax.vmap(losses, (0, None)))(hidden, kernel)
    alone = jax.jit(losses)
    for x, found in zip(hidden, together, strict=True):
        close(found, alone(x, kernel), 1e-12)


@pytest.mark.parametrize("layout", ["fsdp", "fsdp-tensor"])
def test_batched_masks(layout):
    """Each of a batch of masks has its own number of rows that count, on each device."""
    layout = LAYOUTS[layout]
    loss = ce_jax.on_mesh(ce_jax.linear_softmax_cross_entropy, layout.mesh(), **layout.spread)
    hidden, kernel = draws(BATCH, LENGTH, WIDTH), draws(WIDTH, HELD)
    labels = jnp.asarray(problem()["labels"])
    where = jnp.asarray(np.random.default_rng(3).random((3, BATCH, LENGTH)) < 0.4)

    # Blocks of classes for the rows' losses, blocks of tokens for the mean where it may.
    budget = linear.token_budget(HELD, 2, "float64")

    def total(loss, hidden, kernel, where):
        run = functools.partial(loss, hidden, kernel, labels, where=where, ignore_index=3)
        return jnp.sum(jnp.sin(run())) + run(reduction="mean", memory_budget=budget)

    def batched(loss):
        run = jax.value_and_grad(functools.partial(total, loss), (0, 1))
        return jax.jit(jax.vmap(run, (None, None, 0)))(hidden, kernel, where)

    found, wanted = batched(loss), batched(ce_jax.linear_softmax_cross_entropy)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        close(x, y, 1e-12)


@pytest.mark.usefixtures("lenient")
def test_a_mask_that_alone_is_sharded():
    """Over an explicit mesh axis, along which rows cannot be sorted."""
    mesh = LAYOUTS["data"].mesh(EXPLICIT)
    hidden, kernel = draws(BATCH, WIDTH), draws(WIDTH, HELD)
    where, labels = np.arange(BATCH) % 3 != 1, np.arange(BATCH)
    wanted = ce_jax.linear_softmax_cross_entropy(hidden, kernel, labels, where=where)
    teacher = {"teacher_hidden": hidden[::-1], "teacher_kernel": kernel}
    divergence = ce_jax.linear_distillation_loss(hidden, kernel, where=where, **teacher)
    with jax.set_mesh(mesh):
        placed = jax.device_put(where, NamedSharding(mesh, jax.P("data")))
        whole = NamedSharding(mesh, jax.P())
        hidden, kernel, labels = jax.device_put((hidden, kernel, labels), whole)
        teacher = jax.device_put(teacher, whole)
        found = ce_jax.linear_softmax_cross_entropy(hidden, kernel, labels, where=placed)
        close(found, wanted, 1e-12)
        found = ce_jax.linear_distillation_loss(hidden, kernel, where=placed, **teacher)
        close(found, divergence, 1e-12)


def test_forward_mode_and_second_derivatives():
    """A tangent pushed forward, and a Hessian-vector product, are those of one device."""
    layout = LAYOUTS["fsdp-tensor"]
    one_device = Layout({"data": 1})
    primal = draws(BATCH, LENGTH, WIDTH), draws(WIDTH, HELD)
    tangent = tuple(jnp.cos(x) for x in primal)

    def derivatives(layout):
        forward = plain(layout, reduction="sum", forward_mode=True)
        reverse = plain(layout, reduction="sum")

        @jax.jit
        def run(primal, tangent):
            _, slope = jax.jvp(forward, primal, tangent)

            def directional(primal):
                gradients = jax.grad(reverse, (0, 1))(*primal)
                return sum(jnp.vdot(g, t) for g, t in zip(gradients, tangent, strict=True))

            return slope, *jax.grad(directional)(primal)

        return run(primal, tangent)

    for found, wanted in zip(derivatives(layout), derivatives(one_device), strict=True):
        close(found, wanted, 1e-11)


def test_empty_batch():
    mean = plain(LAYOUTS["fsdp"], reduction="mean")
    run = jax.jit(jax.value_and_grad(mean, 1))
    value, slope = run(draws(0, WIDTH), draws(WIDTH, HELD))
    assert value == 0
    assert not np.any(slope)
