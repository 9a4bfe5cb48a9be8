"""A logit of -inf in one row: what a CPU adds up at once leaves it out, and no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import reference
from tests.comparison import close

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.usefixtures("x64", "module_on_one_device", "cheap_programs"),
]

ROWS, CLASSES = 4, 20
draw = np.random.default_rng(21)
LOGITS = draw.normal(size=(ROWS, CLASSES)) * 3
LABELS = np.array([2, 0, 19, 7])
PROBS = draw.uniform(size=(ROWS, CLASSES)) * (draw.random((ROWS, CLASSES)) < 0.7)
WEIGHT = draw.uniform(0.5, 2.0, CLASSES)
COTANGENT = draw.normal(size=ROWS)

SMOOTHED = {"labels": LABELS, "label_smoothing": 0.2}
# Name -> (function, its options, what it is differentiated with respect to).
CASES = {
    "smoothed": ("softmax_cross_entropy_with_integer_labels", SMOOTHED, ["logits"]),
    "smoothed and weighted": (
        "softmax_cross_entropy_with_integer_labels",
        {**SMOOTHED, "weight": WEIGHT},
        ["logits", "weight"],
    ),
    "soft": ("softmax_cross_entropy", {"labels": PROBS}, ["logits", "labels"]),
    "entropy": ("softmax_statistics", {"labels": LABELS}, ["logits"]),
}
MASKED = {
    "nothing": [],
    "one": [(1, 5)],
    "some": [(0, 4), (0, 5), (3, 19)],
    "all but the label": [(2, c) for c in range(CLASSES - 1)],
}


def loss_of(name, library):
    function = getattr(library, name)
    if name != "softmax_statistics":
        return function
    return lambda **arguments: function(**arguments).entropy


@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("case", CASES)
def test_masked_and_unmasked_batches(case, masked):
    name, options, wrt = CASES[case]
    logits = LOGITS.copy()
    for at in MASKED[masked]:
        logits[at] = -np.inf
    if "labels" in wrt:  # where a class is masked, a label of more than 0 costs +inf
        options = {"labels": np.where(np.isinf(logits), 0.0, PROBS)}
    arguments = {"logits": logits, **options}
    ours, truth = loss_of(name, ce_jax), loss_of(name, reference)

    def run(smooth, **more):
        return ours(**{**arguments, **smooth, **more})

    smooth = {key: jnp.asarray(arguments[key]) for key in wrt}
    for more in ({}, {"forward_mode": True}):
        losses, pull = jax.vjp(lambda s, more=more: run(s, **more), smooth)
        close(losses, truth(**arguments), 1e-13)
        for key, slope in pull(jnp.asarray(COTANGENT))[0].items():
            wanted = reference.vjp(truth, arguments, key, COTANGENT)
            if key == "labels":  # a label costs what it costs where it may be, else nothing
                slope = jnp.where(np.isinf(logits), 0.0, slope)
                wanted = np.where(np.isinf(logits), 0.0, wanted)
            close(slope, wanted, 1e-12, f"d {key}, {more}")

    # Under vmap both ways are computed, and one is taken.
    masks = jnp.stack([jnp.asarray(LOGITS), jnp.asarray(logits)])
    if "labels" not in wrt:
        both = jax.vmap(lambda z: run({"logits": z}))(masks)
        close(both[0], truth(**{**arguments, "logits": LOGITS}), 1e-13)
        close(both[1], truth(**arguments), 1e-13)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", [jax.jacrev, jax.jacfwd], ids=["reverse", "forward"])
def test_second_derivatives_of_a_masked_row(case, mode):
    name, options, _ = CASES[case]
    logits = LOGITS[:1, :6].copy()
    logits[0, 4] = -np.inf
    options = {**options, "labels": options["labels"][:1]}
    if options["labels"].ndim > 1:
        options["labels"] = np.where(np.isinf(logits), 0.0, options["labels"][:, :6])
    if "weight" in options:
        options["weight"] = WEIGHT[:6]
    truth = reference.hessian(
        loss_of(name, reference), {"logits": logits, **options}, "logits", np.ones(1)
    )

    def total(z):
        return jnp.sum(loss_of(name, ce_jax)(logits=z, **options))

    found = mode(jax.grad(total))(jnp.asarray(logits))
    finite = np.isfinite(logits[0])
    np.testing.assert_allclose(
        found[0][finite][:, 0][:, finite], truth[0][finite][:, 0][:, finite], rtol=0, atol=1e-9
    )
    assert not np.any(np.asarray(found)[0, ~finite])


def test_a_weight_that_is_nan_where_its_class_is_masked():
    logits, weight = LOGITS.copy(), WEIGHT.copy()
    logits[:, 11], weight[11] = -np.inf, np.nan
    losses = ce_jax.softmax_cross_entropy_with_integer_labels(
        logits, LABELS, weight=weight, label_smoothing=0.2
    )
    kept = np.arange(CLASSES) != 11
    truth = reference.softmax_cross_entropy_with_integer_labels(
        logits[:, kept],
        LABELS - (LABELS > 11),
        weight=weight[kept],
        label_smoothing=0.2,
    )
    close(losses, truth, 1e-13)


@pytest.mark.usefixtures("usual_programs")
def test_the_entropy_of_linear_logits_that_overflow():
    """Without a bias no logit counts as masked; one that overflows has no part in the entropy."""
    hidden, kernel = jnp.ones((1, 1), jnp.float32), jnp.array([[2e38, 2e38, -2e38]], jnp.float32)
    found = ce_jax.linear_softmax_statistics(hidden, kernel, jnp.array([0]))
    close(found.entropy, [np.log(2.0)], 1e-6)
