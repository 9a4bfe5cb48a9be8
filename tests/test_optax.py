"""Equality with optax where it is right, and optax's own tests with our functions in place."""

import functools
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax.losses
import pytest

import ce_jax
from tests.helpers import LAYOUTS, softmax_arguments

pytestmark = pytest.mark.usefixtures("cheap_programs")

FORWARD = (
    "softmax_cross_entropy",
    "safe_softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "sigmoid_binary_cross_entropy",
    "poly_loss_cross_entropy",
)
# Classes of optax's tests -> the functions they are about.
UPSTREAM = {
    "SoftmaxCrossEntropyTest": "softmax_cross_entropy",
    "SafeSoftmaxCrossEntropyTest": "safe_softmax_cross_entropy",
    "SoftmaxCrossEntropyWithIntegerLabelsTest": "softmax_cross_entropy_with_integer_labels",
    "SigmoidCrossEntropyTest": "sigmoid_binary_cross_entropy",
    "SmoothLabelsTest": "smooth_labels",
    "PolyLossTest": "poly_loss_cross_entropy",
    "SigmoidFocalLossTest": "sigmoid_focal_loss",
}
# Where we differ on purpose. Each has a test of its own below.
IN_REVERSE_MODE = {
    "test_gradient": "also takes jax.jvp, which needs forward_mode=True here",
}
IN_BOTH_MODES = {
    "SoftmaxCrossEntropyTest.test_mask": "a target on a masked class is dropped; here it is inf",
    "PolyLossTest.test_mask": "the same",
}


def upstream_tests(forward_mode):
    """optax's test classes, calling our functions instead of optax's."""
    ours = types.SimpleNamespace(**{name: getattr(ce_jax, name) for name in UPSTREAM.values()})
    if forward_mode:
        for name in FORWARD:
            function = functools.partial(getattr(ce_jax, name), forward_mode=True)
            setattr(ours, name, function)
    classes = {}
    for stem in ("_classification", "_smoothing"):
        spec = importlib.util.find_spec(f"optax.losses.{stem}_test")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        setattr(module, stem, ours)
        classes |= {name: vars(module)[name] for name in UPSTREAM if name in vars(module)}
    return classes


def differs(name, test, forward_mode):
    """Whether this test is one of those we deviate from (absl appends a number to its cases)."""
    parents = dict(IN_BOTH_MODES) if forward_mode else IN_BOTH_MODES | IN_REVERSE_MODE
    base = test.rstrip("0123456789")
    return bool({base, f"{name}.{base}"} & parents.keys())


CASES = [
    pytest.param(cls, test, id=f"{name}-{test}{'-forward' * forward_mode}")
    for forward_mode in (False, True)
    for name, cls in upstream_tests(forward_mode).items()
    for test in dir(cls)
    if test.startswith("test") and not differs(name, test, forward_mode)
]


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(("cls", "test"), CASES)
def test_upstream(cls, test):
    cls(test).debug()


def test_upstream_is_all_there():
    """A class that was renamed, or lost its tests, must not pass by silence."""
    for forward_mode in (False, True):
        found = upstream_tests(forward_mode)
        assert found.keys() == UPSTREAM.keys()
        for name, cls in found.items():
            tests = [test for test in dir(cls) if test.startswith("test")]
            assert sum(not differs(name, test, forward_mode) for test in tests) >= 2
    everything = [
        (name, test) for name, cls in found.items() for test in dir(cls) if test.startswith("test")
    ]
    assert sum(differs(name, test, False) for name, test in everything) == 7


@pytest.mark.parametrize("function", FORWARD)
def test_deviation_jvp_needs_a_keyword(function):
    logits = jnp.zeros((2, 3))
    labels = jnp.array([0, 1]) if "integer" in function else jnp.eye(2, 3)
    loss = functools.partial(getattr(ce_jax, function), labels=labels)
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(loss, (logits,), (logits,))
    jax.jvp(functools.partial(loss, forward_mode=True), (logits,), (logits,))


def test_deviation_target_on_a_masked_class():
    """optax returns the loss of the rest of the target, which no longer is a distribution."""
    logits, targets = jnp.zeros(3), jnp.array([0.5, 0.5, 0.0])
    where = jnp.array([True, False, True])
    assert ce_jax.softmax_cross_entropy(logits, targets, where=where) == jnp.inf
    assert ce_jax.poly_loss_cross_entropy(logits, targets, where=where) == jnp.inf
    theirs = optax.losses.softmax_cross_entropy(logits, targets, where=where)
    np.testing.assert_allclose(theirs, 0.5 * np.log(2.0), rtol=1e-6)


def compare(ours, theirs, logits):
    """Values, and gradients under an unequal cotangent."""

    @jax.jit
    def both(logits):
        found = []
        for loss in (ours, theirs):
            value, pull = jax.vjp(loss, logits)
            cotangent = jnp.linspace(-1.0, 2.0, value.size).reshape(value.shape)
            found.append((value, *pull(cotangent)))
        return found

    (value, slopes), (wanted, wanted_slopes) = both(logits)
    np.testing.assert_allclose(value, wanted, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(slopes, wanted_slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", [None, "rows", "classes"])
@pytest.mark.parametrize("soft", [False, True])
def test_softmax_cross_entropy(layout, where, soft):
    arguments = softmax_arguments(layout=layout, where=where, soft=soft)
    # A masked row is safe in optax only while its logits are finite.
    logits = np.nan_to_num(arguments["logits"], posinf=1.0, neginf=1.0).astype(np.float32)
    labels, axis, mask = arguments["labels"], arguments["axis"], arguments.get("where")
    if where == "rows" and isinstance(axis, tuple) and not soft:
        # optax transposes an expanded mask as if it had the logits' shape: give it that.
        mask = np.broadcast_to(mask[None, :, None], logits.shape)
    name = "softmax_cross_entropy" + ("" if soft else "_with_integer_labels")
    labels = labels.astype(np.float32) if soft else labels
    compare(
        lambda z: getattr(ce_jax, name)(z, labels, axis, mask),
        lambda z: getattr(optax.losses, name)(z, labels, axis, mask),
        jnp.asarray(logits),
    )


@pytest.mark.usefixtures("lenient")
def test_soft_labels_over_all_axes():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
    labels = jnp.full((2, 3), 1 / 6)
    compare(
        lambda z: ce_jax.softmax_cross_entropy(z, labels, None),
        lambda z: optax.losses.softmax_cross_entropy(z, labels, None),
        logits,
    )


def test_sigmoid_binary_cross_entropy():
    draw = np.random.default_rng(0)
    logits = jnp.asarray(10 * draw.normal(size=(6, 5)), jnp.float32)
    labels = jnp.asarray(draw.random((6, 5)), jnp.float32)
    compare(
        lambda z: ce_jax.sigmoid_binary_cross_entropy(z, labels),
        lambda z: optax.losses.sigmoid_binary_cross_entropy(z, labels),
        logits,
    )


@pytest.mark.parametrize("axis", [-1, 0, (0, 1), None])
def test_smooth_labels(axis):
    labels = jnp.eye(4, 3)
    compare(
        lambda y: ce_jax.smooth_labels(y, 0.3, axis=axis),
        lambda y: optax.losses.smooth_labels(y, 0.3, axis=axis),
        labels,
    )
