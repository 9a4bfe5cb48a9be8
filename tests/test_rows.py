"""What holds for rows in every public function: their order, and rows that do not count."""

import functools

import jax
import numpy as np
import pytest

import ce_jax
from tests.calls import (
    batched,
    call,
    narrow,
    takes,
    true_slope,
    truth,
    unequal,
    value_and_gradients,
)
from tests.catalogue import CATALOGUE
from tests.comparison import accuracy, close
from tests.helpers import GARBAGE

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

BATCHED = [name for name in CATALOGUE if batched(name)]
REDUCED = [name for name in BATCHED if takes(name, "reduction")]


def axes_of(name):
    """The names of the axes of each argument."""
    return {key: draw.axes.split() for key, draw in CATALOGUE[name].draws.items()}


@pytest.mark.parametrize("name", BATCHED)
def test_results_go_with_their_examples(name):
    """And what belongs to no example does not change with their order."""
    arrays = narrow(CATALOGUE[name].arrays(b=8))
    order = np.random.default_rng(3).permutation(8)
    run = jax.jit(lambda arrays: call(name, arrays))
    moved = {k: x[order] if axes_of(name)[k][:1] == ["b"] else x for k, x in arrays.items()}
    for found, before, axes in zip(run(moved), run(arrays), CATALOGUE[name].out, strict=True):
        close(found, before[order] if axes[:1] == "b" else before, 1e-5)


@pytest.mark.parametrize("name", REDUCED)
def test_a_sum_or_mean_does_not_depend_on_the_order(name):
    arrays = narrow(CATALOGUE[name].arrays(b=8))
    order = np.random.default_rng(3).permutation(8)
    one = [np.ones((), np.float32)]
    run = jax.jit(
        lambda arrays: [
            value_and_gradients(name, arrays, one, reduction=x) for x in ("sum", "mean")
        ]
    )
    axes = axes_of(name)
    moved = {k: x[order] if axes[k][:1] == ["b"] else x for k, x in arrays.items()}
    for (found, slopes), (before, slopes_before) in zip(run(moved), run(arrays), strict=True):
        close(found[0], before[0], 1e-6)
        for key, slope in slopes.items():
            wanted = slopes_before[key]
            wanted = wanted[order] if axes[key][:1] == ["b"] else wanted
            close(slope, wanted, 1e-5, key, abs(before[0]))


# Rows that do not count.

ROWS, LENGTH = 5, 2
# Of these a row that does not count is no row of zeros, and `where` of the last two tells classes
# or tokens.
NO_LOSS = ("next_tokens", "in_batch_negatives", "smooth_labels", "sequence_log_prob")
# Whose other rows are compared with it, whatever it weighs.
PAIRS = ("info_nce_loss", "clip_loss", "siglip_loss", "supervised_contrastive_loss")
WAYS = [
    (name, way)
    for name in BATCHED
    for way in ("where", "ignore_index", "sample_weight")
    if takes(name, way)
    and not name.startswith(NO_LOSS)
    and not (way == "sample_weight" and name.startswith(PAIRS))
]
# What a class is banned by, where there are classes. With a matrix of transitions that is inverted,
# a banned class costs infinitely much.
BANNED = {
    "logits": -np.inf,
    "teacher_logits": -np.inf,
    "log_probs": -np.inf,
    "bias": -np.inf,
    "teacher_bias": -np.inf,
}


def problem(name, way):
    """Arguments with rows that do not count and hold garbage, and which rows those are.

    In the other rows class 0 is banned: the one that a label that is not to be used is set to.
    """
    entry = CATALOGUE[name]
    arrays, axes = entry.arrays(7, b=ROWS, t=LENGTH), axes_of(name)
    rows = ["b", "t"] if any("t" in x for x in axes.values()) else ["b"]
    counts = np.random.default_rng(8).random((ROWS, LENGTH)[: len(rows)]) < 0.6
    counts.flat[:2] = [True, False]
    for key, x in arrays.items():
        if key in ("labels", "teacher_ids") and x.dtype.kind == "i":
            x[:] = np.maximum(x, 1)
            x[~counts] = -100 if way == "ignore_index" else 99
        if "c" in axes[key] and key in BANNED and not name.startswith("backward"):
            x[..., 0] = -np.inf
        if key == "labels" and axes[key][-1:] == ["c"]:
            x[..., 0] = 0
        if axes[key][: len(rows)] == rows and x.dtype.kind == "f" and key != way:
            x[~counts] = np.resize(GARBAGE, x[~counts].shape)
    if way == "where":
        arrays["where"] = counts
    if way == "sample_weight":
        weight = arrays.get("sample_weight", np.ones(counts.shape))
        arrays["sample_weight"] = np.where(counts, weight, 0)
    return arrays, counts


def of_counting(name, arrays, counts):
    """The arguments of the rows that count alone."""
    axes = axes_of(name)
    return {
        key: x[counts].reshape(-1, *(1,) * (counts.ndim - 1), *x.shape[counts.ndim :])
        if axes[key][:1] == ["b"]
        else x
        for key, x in arrays.items()
        if key in axes
    }


CASES = [
    (name, way, option)
    for name, way in WAYS
    for option in ({}, {"reduction": "mean"}, {"forward_mode": True})
    if all(takes(name, key) for key in option)
]


@pytest.mark.parametrize(("name", "way", "option"), CASES, ids=str)
def test_rows_that_do_not_count(name, way, option):
    """All is as if they were not there, and exactly 0 where they are."""
    entry = CATALOGUE[name]
    arrays, counts = problem(name, way)
    alone = of_counting(name, arrays, counts)
    options = {k: x for k, x in option.items() if k == "reduction"}  # what the reference has too
    wanted = truth(name, alone, **options)
    pulled = unequal(wanted)
    by_row = [x.ndim > 0 and axes[:1] == "b" for x, axes in zip(wanted, entry.out, strict=True)]
    whole = [counts if of_rows else None for of_rows in by_row]
    cotangents = [spread(g, at) for g, at in zip(pulled, whole, strict=True)]
    ours = option | ({"ignore_index": -100} if way == "ignore_index" else {})
    run = jax.jit(lambda arrays, g: value_and_gradients(name, arrays, g, **ours))
    found, slopes = run(narrow(arrays), [np.float32(g) for g in cotangents])

    for x, y, at in zip(found, wanted, whole, strict=True):
        x = np.asarray(x)
        close(x if at is None else x[at].reshape(y.shape), y, accuracy("float32"))
        if at is not None:
            np.testing.assert_array_equal(x[~at], 0)
    size = max(np.max(np.abs(y), initial=0.0, where=np.isfinite(y)) for y in wanted)
    for key, slope in slopes.items():
        slope = np.asarray(slope)
        if axes_of(name)[key][:1] == ["b"]:
            if key != way:  # by its weight, a row that weighs nothing has a derivative
                np.testing.assert_array_equal(slope[~counts], 0, err_msg=key)
            assert np.isfinite(slope[~counts]).all(), key
            slope = slope[counts].reshape(alone[key].shape)
        expected = true_slope(name, alone, key, pulled, **options)
        # What a share of a banned class costs is infinite, and no matter.
        usable = np.isfinite(expected) & np.isfinite(alone[key])
        slope, expected = np.where(usable, slope, 0), np.where(usable, expected, 0)
        close(slope, expected, 4 * accuracy("float32"), f"d {key}", size)


def spread(x, counts):
    """Cotangents for the rows that count; the others have some too."""
    if counts is None:
        return x
    everywhere = np.ones((*counts.shape, *x.shape[counts.ndim :]))
    everywhere[counts] = x.reshape(-1, *x.shape[counts.ndim :])
    return everywhere


def test_a_banned_class_and_a_label_to_ignore():
    """The ignored row is given id 0, whose class is banned: that must not reach any option."""
    hidden, kernel, labels = np.ones((2, 3)), np.ones((3, 4)), np.array([1, -100])
    bias = np.array([-np.inf, 0, 0, 0])

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def slopes(weight, sample_weight, label_smoothing):
        return ce_jax.linear_softmax_cross_entropy(
            *(hidden, kernel, labels),
            bias=bias,
            ignore_index=-100,
            reduction="sum",
            weight=weight,
            sample_weight=sample_weight,
            label_smoothing=label_smoothing,
        )

    by_weight, by_sample_weight, by_smoothing = slopes(np.ones(4), np.ones(2), 0.0)
    close(by_weight, [0, np.log(3), 0, 0], 1e-6)
    close(by_sample_weight, [np.log(3), 0], 1e-6)
    assert by_smoothing == 0
