"""Arrays spread over a mesh under plain jit, without `axis_name`.

Explicit mesh axes ask what every gather's output is sharded as.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ce_jax
from tests import reference, reference_beyond
from tests.comparison import close

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("cheap_programs")]

ROWS, CLASSES = 8, 20
PLACED = [(P("data", None), P()), (P("data", "model"), P("model")), (P("data", "model"), P())]


@pytest.fixture(scope="module")
def problem():
    draw = np.random.default_rng(7)
    return {
        "logits": draw.normal(size=(ROWS, CLASSES)),
        "labels": draw.integers(0, CLASSES, ROWS),
        "weight": draw.uniform(0.5, 2.0, CLASSES),
    }


def placed(mesh, arguments, specs):
    return {
        k: jax.device_put(x, NamedSharding(mesh, specs.get(k, P()))) for k, x in arguments.items()
    }


def check_global(mesh, function, truth, arguments, specs, wrt, **options):
    """Losses by rows lie as the labels do, and gradients as what they are of."""
    truth = functools.partial(truth, **options)
    expected = truth(**arguments)
    cotangent = np.random.default_rng(3).normal(size=np.shape(expected))
    with jax.set_mesh(mesh):
        arrays = placed(mesh, arguments, specs)
        smooth = {k: arrays.pop(k) for k in wrt}

        @jax.jit
        def run(smooth, arrays, cotangent):
            value, pull = jax.vjp(lambda smooth: function(**smooth, **arrays, **options), smooth)
            return value, pull(cotangent)[0]

        rows = specs["labels"] if np.ndim(expected) else P()
        pulled = jax.device_put(cotangent, NamedSharding(mesh, rows))
        value, gradients = run(smooth, arrays, pulled)
    close(value, expected, 1e-12)
    assert value.sharding.is_equivalent_to(NamedSharding(mesh, rows), value.ndim)
    for k, gradient in gradients.items():
        close(gradient, reference.vjp(truth, arguments, k, cotangent), 1e-10, f"d {k}")
        if AxisType.Auto not in mesh.axis_types:  # what lies where is then XLA's choice
            assert gradient.sharding.is_equivalent_to(smooth[k].sharding, gradient.ndim), k


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("of_logits", "of_weight"), PLACED)
def test_class_weights_under_plain_jit(problem, axis_type, of_logits, of_weight):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = {"logits": of_logits, "labels": P("data"), "weight": of_weight}
    arguments = {k: problem[k] for k in specs}
    name = "softmax_cross_entropy_with_integer_labels"
    function, truth = getattr(ce_jax, name), getattr(reference, name)
    for reduction in ("none", "mean"):
        check_global(
            mesh, function, truth, arguments, specs, ("logits", "weight"), reduction=reduction
        )
    del arguments["logits"]
    check_global(
        mesh, ce_jax.mean_denominator, reference.mean_denominator, arguments, specs, ("weight",)
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("of_logits", [P("data", None), P("data", "model")])
def test_rows_without_effect_under_plain_jit(problem, axis_type, of_logits):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = {"logits": of_logits, "labels": P("data"), "sample_weight": P("data")}
    arguments = {k: problem[k].copy() for k in ("logits", "labels")}
    arguments["labels"][::3] = -7
    arguments["sample_weight"] = np.arange(len(arguments["labels"])) % 2.0
    name = "softmax_cross_entropy_with_integer_labels"
    function, truth = getattr(ce_jax, name), getattr(reference, name)
    options = {"ignore_index": -7, "label_smoothing": 0.1, "reduction": "mean"}
    check_global(mesh, function, truth, arguments, specs, ("logits",), **options)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("spoilt", [0.5, np.inf])
def test_elements_under_plain_jit(axis_type, reduction, spoilt):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    draw = np.random.default_rng(6)
    arguments = {
        "logits": draw.normal(size=(6, 8)).astype(np.float32),
        "labels": draw.integers(2, size=(6, 8)).astype(np.float32),
    }
    arguments["logits"][2, 3], arguments["labels"][2, 3] = spoilt, 1.0
    specs = dict.fromkeys(arguments, P("data", "model"))

    def total(logits, labels):
        loss = ce_jax.sigmoid_binary_cross_entropy(logits, labels, reduction=reduction)
        return jnp.sum(loss), loss

    found = jax.jit(jax.value_and_grad(total, has_aux=True))
    with jax.set_mesh(mesh):
        (_, loss), slope = found(*placed(mesh, arguments, specs).values())
    exact = {k: np.float64(x) for k, x in arguments.items()}
    close(loss, reference.sigmoid_binary_cross_entropy(**exact, reduction=reduction), 1e-6)
    p_less_y = 1 / (1 + np.exp(-exact["logits"])) - exact["labels"]
    close(slope, p_less_y if reduction == "none" else p_less_y / p_less_y.size, 1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize(("of_logits", "of_classes"), PLACED)
def test_noisy_labels_under_plain_jit(problem, name, of_logits, of_classes):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"logits": of_logits, "labels": P("data"), "transition": of_classes}
    arguments = {k: problem[k] for k in ("logits", "labels")}
    noise = np.random.default_rng(4).dirichlet(np.ones(CLASSES), CLASSES)
    arguments["transition"] = 0.7 * np.eye(CLASSES) + 0.3 * noise
    name += "_corrected_cross_entropy"
    function, truth = getattr(ce_jax, name), getattr(reference_beyond, name)
    check_global(mesh, function, truth, arguments, specs, ("logits", "transition"))


def test_class_weights_of_a_batch_that_vmap_takes_apart():
    """Of the explicit mesh axis over which it is spread the loss sees nothing."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    draw = np.random.default_rng(5)
    arguments = {
        "logits": draw.normal(size=(8, 3, 5)).astype(np.float32),
        "labels": draw.integers(5, size=(8, 3)),
        "weight": draw.uniform(0.5, 2.0, 5).astype(np.float32),
    }
    loss = ce_jax.softmax_cross_entropy_with_integer_labels
    over_rows = jax.vmap(lambda z, y, w: loss(z, y, weight=w), (0, 0, None))
    with jax.set_mesh(mesh):
        specs = {"logits": P("data"), "labels": P("data")}
        found = jax.jit(over_rows)(*placed(mesh, arguments, specs).values())
    close(found, reference.softmax_cross_entropy_with_integer_labels(**arguments), 4e-6)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)


BITS = np.arange(ROWS) % 3 == 0
MATRIX = np.full((CLASSES, CLASSES), 0.5 / CLASSES) + 0.5 * np.eye(CLASSES)
# Functions of sharded logits `z` and labels `y`, whose other arrays are on every device.
BESIDE = {
    "sigmoid_binary_cross_entropy": lambda z, y: ce_jax.sigmoid_binary_cross_entropy(
        z, MATRIX[:ROWS], pos_weight=2.0, sample_weight=MATRIX[:ROWS], where=MATRIX[:ROWS] < 1
    ),
    "sigmoid_focal_loss": lambda z, y: ce_jax.sigmoid_focal_loss(z, MATRIX[:ROWS], alpha=0.3),
    "binary_cross_entropy": lambda z, y: ce_jax.binary_cross_entropy(
        jax.nn.sigmoid(z), MATRIX[:ROWS], weight=MATRIX[0]
    ),
    "generalized_cross_entropy": lambda z, y: ce_jax.generalized_cross_entropy(-jnp.abs(z[:, 0])),
    "top_k_distillation_loss": lambda z, y: ce_jax.top_k_distillation_loss(
        z, np.tile(np.arange(3), (ROWS, 1)), np.full((ROWS, 3), -2.0)
    ),
    "gradient_view": lambda z, y: ce_jax.gradient_view(z, y).by_label,
    "expected_calibration_error": lambda z, y: ce_jax.expected_calibration_error(
        jax.nn.sigmoid(z[:, 0]), BITS, adaptive=True
    ),
    "reliability_bins": lambda z, y: (
        ce_jax.reliability_bins(jax.nn.sigmoid(z[:, 0]), BITS).accuracy
    ),
    "example by example": lambda z, y: jax.vmap(
        lambda z, y: (
            ce_jax.softmax_cross_entropy_with_integer_labels(z, y, weight=MATRIX[0])
            + ce_jax.forward_corrected_cross_entropy(z, y, MATRIX)
        )
    )(z, y),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", BESIDE)
def test_other_arrays_may_be_on_every_device(problem, name):
    """Beside sharded logits; value and gradient are those of one device."""
    function = BESIDE[name]

    def both(z, y):
        value, pull = jax.vjp(lambda z: function(z, y), z)
        return value, *pull(jnp.cos(value) if name != "reliability_bins" else value)

    arguments = {key: problem[key] for key in ("logits", "labels")}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        found = both(*placed(mesh, arguments, dict.fromkeys(arguments, P("data"))).values())
    for ours, alone in zip(found, both(*map(jnp.asarray, arguments.values())), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-12, atol=1e-14)


OF_CLASSES = {
    "nll_loss": lambda z, y: ce_jax.nll_loss(z, y),
    "nll_loss, smoothed": lambda z, y: ce_jax.nll_loss(z, y, label_smoothing=0.1),
    "fit_temperature": lambda z, y: ce_jax.fit_temperature(z, y),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize("of_logits", [P("data", None), P("data", "model")])
def test_spread_classes(problem, name, of_logits):
    def both(z, y):
        value, pull = jax.vjp(lambda z: OF_CLASSES[name](z, y), z)
        return value, *(pull(jnp.cos(value)) if name != "fit_temperature" else ())

    arguments = {key: problem[key].copy() for key in ("logits", "labels")}
    arguments["labels"][2:] = np.argmax(arguments["logits"][2:], -1)  # or no temperature is best
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        specs = {"logits": of_logits, "labels": P("data")}
        found = jax.jit(both)(*placed(mesh, arguments, specs).values())
    for ours, alone in zip(found, both(*map(jnp.asarray, arguments.values())), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-12, atol=1e-14)


def test_what_is_read_in_blocks_says_how_to_spread_it():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        rows = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("data")))
        kernel, labels = jnp.ones((8, 4)), jnp.zeros(8, int)
        with pytest.raises(ValueError, match=r"hidden .* jax.shard_map, which ce_jax.on_mesh"):
            ce_jax.linear_softmax_cross_entropy(rows, kernel, labels)
        with pytest.raises(ValueError, match=r"kernel .* jax.shard_map, which ce_jax.on_mesh"):
            ce_jax.linear_softmax_cross_entropy(jnp.ones((2, 8)), rows, labels[:2])
        with pytest.raises(ValueError, match=r"texts .* jax.shard_map, with axis_name="):
            ce_jax.clip_loss(jnp.ones((8, 8)), rows)
