"""Under `jax.debug_nans` what is finite raises nothing, whatever lies where nothing counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax import Negatives
from tests.arguments import ARGUMENTS

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

NAN, INF = np.nan, np.inf
ROWS = 5
COUNTS = np.arange(ROWS) != 2
DRAW = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(DRAW.normal(size=shape), jnp.float32)


Z, SIDE, OTHER, KERNEL = array(ROWS, 4), array(ROWS, 3), array(ROWS, 3), array(3, 9)
SCORES = array(ROWS), array(ROWS, 4)
ANSWERS = tuple(-jnp.exp(array(ROWS)) for _ in range(4))
LABELS = np.array([0, 1, 0, 1, 0])
TRANSITION = jnp.full((4, 4), 0.1) + 0.6 * jnp.eye(4)
NEGATIVES = Negatives(jnp.array([1, 5, 3]), jnp.zeros(3))
ENTRIES = np.array([[0, 1]] * ROWS), jnp.log(jnp.full((ROWS, 2), 0.4))
WHERE = {"where": COUNTS}
SILENT = {"sample_weight": COUNTS.astype(np.float32)}
IGNORED = {"ignore_index": 0}  # the label of the spoiled row, among others
BY = {"where": WHERE, "sample_weight": SILENT, "ignore_index": IGNORED}


def only(*names):
    return {name: BY[name] for name in names}


# Function, arrays whose row 2 is spoiled, how it is kept from counting, further arguments.
CASES = {
    "brier_score": ((Z,), BY, (LABELS,), {}),
    "gradient_view": ((Z,), only("where", "ignore_index"), (LABELS,), {}),
    "cross_entropy_parts": ((Z,), only("where"), (jnp.eye(4)[LABELS],), {}),
    "forward_corrected_cross_entropy": ((Z,), BY, (LABELS, TRANSITION), {}),
    "backward_corrected_cross_entropy": ((Z,), BY, (LABELS, TRANSITION), {}),
    "sampled_softmax_cross_entropy": (SCORES, only("where", "sample_weight"), (), {}),
    "bpr_loss": (SCORES, only("where", "sample_weight"), (), {}),
    "gbce_loss": (SCORES, only("where", "sample_weight"), (), {"num_items": 9}),
    "linear_sampled_softmax_cross_entropy": ((SIDE,), BY, (KERNEL, LABELS, NEGATIVES), {}),
    "info_nce_loss": ((SIDE, OTHER), only("where"), (), {}),
    "clip_loss": ((SIDE, OTHER), only("where"), (), {}),
    "siglip_loss": ((SIDE, OTHER), only("where"), (), {}),
    "supervised_contrastive_loss": ((SIDE,), only("where"), (LABELS,), {}),
    "dpo_loss": (ANSWERS, only("where", "sample_weight"), (), {}),
    "ipo_loss": (ANSWERS, only("where", "sample_weight"), (), {}),
    "simpo_loss": (ANSWERS[:2], only("where", "sample_weight"), (), {}),
    "orpo_loss": (ANSWERS[:2], only("where", "sample_weight"), (), {}),
    "kto_loss": (ANSWERS[:2], only("where", "sample_weight"), (LABELS == 1, 0.1), {}),
    "ppo_clip_loss": (ANSWERS[:3], only("where", "sample_weight"), (), {}),
    "kl_estimate": (ANSWERS[:2], only("where", "sample_weight"), (), {}),
    "sequence_log_prob": (ANSWERS[:1], only("where"), (), {"mean": True}),
    "distillation_loss": ((Z, Z[::-1]), only("where", "sample_weight"), (), {"temperature": 2.0}),
    "jensen_shannon_loss": ((Z, Z[::-1]), only("where", "sample_weight"), (), {"temperature": 2.0}),
    "top_k_distillation_loss": ((Z,), only("where", "sample_weight"), ENTRIES, {}),
    "linear_top_k_distillation_loss": (
        (SIDE,),
        only("where", "sample_weight"),
        (KERNEL, *ENTRIES),
        {"temperature": 2.0},
    ),
    "estimate_prior": ((Z,), only("sample_weight"), (jnp.full(4, 0.25),), {}),
    "fit_temperature": ((Z,), BY, (LABELS,), {}),
}
NO_GRADIENT = ("estimate_prior", "fit_temperature")
ALL = [(name, by) for name, (_, ways, _, _) in CASES.items() for by in ways]


@pytest.mark.parametrize("spoil", [NAN, INF, -INF])
@pytest.mark.parametrize(("name", "by"), ALL)
def test_a_row_that_does_not_count(name, by, spoil):
    arrays, ways, rest, options = CASES[name]
    spoiled = tuple(x.at[2].set(spoil) for x in arrays)

    def of(*arrays):
        found = getattr(ce_jax, name)(*arrays, *rest, **ways[by], **options)
        return sum(
            jnp.sum(x) for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.floating)
        )

    with jax.debug_nans(True):
        found = of(*spoiled)
        if name not in NO_GRADIENT:
            found = found, jax.grad(of, tuple(range(len(arrays))))(*spoiled)
    for x in jax.tree.leaves(found):
        assert np.isfinite(x).all()


OTHERS = [
    (function, name)
    for function, arguments in ARGUMENTS.items()
    for name in ("logits", "hidden", "log_probs", "label_logits", "images", "queries", "embeddings")
    if {"where", name} <= arguments.keys() and function not in CASES
]


@pytest.mark.parametrize(("function", "name"), OTHERS)
def test_where_in_every_other_function(function, name):
    """Outside `jit`: what is kept for the gradient is no NaN either."""
    arguments = dict(ARGUMENTS[function])
    call, where = getattr(ce_jax, function), arguments["where"]

    def total(x):
        leaves = jax.tree.leaves(call(**arguments | {name: x}))
        return sum(jnp.sum(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))

    for fault in (INF, -INF):  # where a NaN was made, there the alarm is
        x = np.array(arguments[name])
        x[~where] = fault
        x = jnp.asarray(x)
        with jax.debug_nans(True):
            value, slope = jax.value_and_grad(total)(x)
        assert jnp.isfinite(value)
        assert jnp.all(jnp.isfinite(slope))


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_empty_bin(adaptive):
    """Two of seven bins hold anything."""
    confidence, correct = jnp.array([0.1, NAN, 0.9]), np.ones(3, bool)
    error = functools.partial(
        ce_jax.expected_calibration_error, bins=7, adaptive=adaptive, where=np.arange(3) != 1
    )
    with jax.debug_nans(True):
        value, slope = jax.value_and_grad(error)(confidence, correct)
    np.testing.assert_allclose(value, 0.5, rtol=1e-6)
    np.testing.assert_allclose(slope, [-0.5, 0, -0.5])
