"""What the losses over sampled classes, and the samplers, refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax import Negatives
from tests.helpers import WRONG_NAME

pytestmark = pytest.mark.usefixtures("cheap_programs")

F32 = np.float32
RIGHT = {
    "label_logits": np.zeros(5, F32),
    "negative_logits": np.zeros((5, 3), F32),
}
LINEAR = {
    "hidden": np.zeros((5, 2), F32),
    "kernel": np.zeros((2, 4), F32),
    "labels": np.zeros(5, np.int32),
    "negatives": Negatives(jnp.zeros(3, int), jnp.zeros(3)),
}
ERRORS = [
    ("bpr_loss", "label_logits", np.zeros(5, int), TypeError, ["int", "float"]),
    ("bpr_loss", "negative_logits", np.zeros(5, F32), ValueError, ["(5,)"]),
    ("bpr_loss", "negative_logits", np.zeros((4, 3), F32), ValueError, ["(4, 3)", "(5,)"]),
    ("bpr_loss", "where", np.ones(5, F32), TypeError, ["float32", "bool"]),
    ("bpr_loss", "where", np.ones((5, 3, 1), bool), ValueError, ["(5, 3, 1)", "(5, 3)"]),
    ("bpr_loss", "sample_weight", np.ones(4, F32), ValueError, ["(4,)", "(5,)"]),
    ("bpr_loss", "reduction", "average", WRONG_NAME, ["average", "mean"]),
    ("gbce_loss", "num_items", 1, ValueError, ["1", "2"]),
    ("gbce_loss", "num_items", 5.0, TypeError, ["5.0"]),
    ("gbce_loss", "calibration", 1.5, ValueError, ["1.5"]),
    ("sampled_softmax_cross_entropy", "log_expected_count", np.ones(4, F32), ValueError, ["(4,)"]),
    ("linear_sampled_softmax_cross_entropy", "kernel", np.zeros((3, 4), F32), ValueError, ["3"]),
    ("linear_sampled_softmax_cross_entropy", "labels", np.zeros(5, F32), TypeError, ["float32"]),
    ("linear_sampled_softmax_cross_entropy", "bias", np.zeros(3, F32), ValueError, ["(3,)"]),
    (
        "linear_sampled_softmax_cross_entropy",
        "negatives",
        Negatives(jnp.zeros((4, 3), int), jnp.zeros((4, 3))),
        ValueError,
        ["(4, 3)", "(5,)"],
    ),
    (
        "linear_sampled_softmax_cross_entropy",
        "negatives",
        Negatives(jnp.zeros(3, int), jnp.zeros(4)),
        ValueError,
        ["negatives.log_expected_count", "(3,)", "(4,)"],
    ),
    (
        "linear_sampled_softmax_cross_entropy",
        "negatives",
        Negatives(jnp.zeros(3, int), jnp.zeros(())),
        ValueError,
        ["negatives.log_expected_count", "(3,)", "()"],
    ),
]


@pytest.mark.parametrize(("name", "key", "value", "error", "parts"), ERRORS)
def test_the_message_names_the_argument(name, key, value, error, parts):
    right = LINEAR if name.startswith("linear") else RIGHT
    right = right | ({"num_items": 9} if name == "gbce_loss" else {})
    with pytest.raises(error, match=key) as caught:
        getattr(ce_jax, name)(**(right | {key: value}))
    for part in parts:
        assert part in str(caught.value)


def test_samplers_check_their_numbers():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="num_samples must be an int of at least 1, got 0"):
        ce_jax.uniform_negatives(key, 0, 5)
    with pytest.raises(ValueError, match="num_items must be an int of at least 1"):
        ce_jax.log_uniform_negatives(key, 5, 0)
    with pytest.raises(ValueError, match=r"log_prob must have shape \(3,\)"):
        ce_jax.in_batch_negatives(np.arange(3), np.zeros(2, F32))
    with pytest.raises(ValueError, match=r"labels must have shape \[N\]"):
        ce_jax.in_batch_negatives(np.zeros((3, 1), int), np.zeros((3, 1), F32))
