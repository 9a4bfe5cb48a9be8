"""Wrong arguments of the linear form raise while tracing, and name what was found and wanted."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests.helpers import WRONG_NAME

LOSS, STATISTICS = "linear_softmax_cross_entropy", "linear_softmax_statistics"
F32 = np.float32
RIGHT = {
    "hidden": np.zeros((5, 2), F32),
    "kernel": np.zeros((2, 4), F32),
    "labels": np.zeros(5, np.int32),
}

# (the argument changed, its value, the exception, what the message must hold besides its name).
CASES = [
    ("hidden", np.zeros((5, 2), np.int32), TypeError, ["int32", "float"]),
    ("hidden", F32(0), ValueError, ["()"]),
    ("kernel", np.zeros((2, 4), np.complex64), TypeError, ["complex64", "float"]),
    ("kernel", np.zeros((2, 4), np.float16), TypeError, ["float16", "float32"]),
    ("kernel", np.zeros((4, 2), F32), ValueError, ["(4, 2)", "class_axis"]),
    ("kernel", np.zeros((3, 4), F32), ValueError, ["(3, 4)", "D = 2"]),
    ("kernel", np.zeros((2, 0), F32), ValueError, ["(2, 0)"]),
    ("kernel", np.zeros(2, F32), ValueError, ["(2,)"]),
    ("labels", np.zeros(5, F32), TypeError, ["float32", "integer"]),
    ("labels", np.zeros(4, np.int32), ValueError, ["(4,)", "(5,)"]),
    ("labels", np.zeros((5, 1), np.int32), ValueError, ["(5, 1)", "(5,)"]),
    ("bias", np.zeros(4, np.int32), TypeError, ["int32", "float"]),
    ("bias", np.zeros(3, F32), ValueError, ["(3,)", "(4,)"]),
    ("bias", F32(0), ValueError, ["()", "(4,)"]),
    ("class_axis", 0.0, TypeError, ["0.0", "int"]),
    ("class_axis", 2, ValueError, ["2"]),
    ("memory_budget", 0, ValueError, ["0"]),
    ("memory_budget", -1, ValueError, ["-1"]),
    ("num_classes", 5, ValueError, ["5", "4"]),
    ("num_classes", 0, ValueError, ["0", "4"]),
    ("num_classes", 3.0, TypeError, ["3.0", "int"]),
    ("logit_soft_cap", 0.0, ValueError, ["0.0", "positive"]),
    ("logit_soft_cap", -1.0, ValueError, ["-1.0"]),
    ("logit_soft_cap", np.inf, ValueError, ["inf"]),
    ("logit_soft_cap", "30", TypeError, ["30"]),
    ("logit_soft_cap", np.ones(5, F32), ValueError, ["(5,)", "scalar"]),
    ("weight", np.ones(5, F32), ValueError, ["(5,)", "(4,)"]),
    ("weight", np.ones(4, np.complex64), TypeError, ["complex64"]),
    ("sample_weight", np.ones(4, F32), ValueError, ["(4,)", "(5,)"]),
    ("where", np.ones(5, F32), TypeError, ["float32", "bool"]),
    ("where", np.ones((5, 4), bool), ValueError, ["(5, 4)", "(5,)"]),
    ("ignore_index", 1.0, TypeError, ["1.0", "int"]),
    ("label_smoothing", 1.5, ValueError, ["1.5", "1"]),
    ("label_smoothing", -0.1, ValueError, ["-0.1"]),
    ("label_smoothing", np.nan, ValueError, ["nan"]),
    ("z_loss", -1.0, ValueError, ["-1.0"]),
    ("z_loss", "1", TypeError, ["1"]),
    ("reduction", "average", WRONG_NAME, ["average", "mean"]),
    ("memory_budget", 1e6, TypeError, ["1000000.0", "int"]),
]


@pytest.mark.parametrize("name", [LOSS, STATISTICS])
@pytest.mark.parametrize(("key", "value", "error", "parts"), CASES)
def test_the_message_names_the_argument(name, key, value, error, parts):
    function = getattr(ce_jax, name)
    if key not in inspect.signature(function).parameters:
        with pytest.raises(TypeError, match=key):
            function(**RIGHT, **{key: value})
        return
    for call in (function, lambda **arguments: jax.eval_shape(lambda: function(**arguments))):
        with pytest.raises(error, match=key) as caught:
            call(**(RIGHT | {key: value}))
        for part in parts:
            assert part in str(caught.value)


@pytest.mark.parametrize("value", [lambda p: p[None], lambda p: p > 0, lambda p: (p, p)])
def test_what_log_prob_loss_must_return(value):
    with pytest.raises((TypeError, ValueError), match="log_prob_loss"):
        ce_jax.linear_softmax_cross_entropy(**RIGHT, log_prob_loss=value)


@pytest.mark.parametrize("key", ["ignore_index", "num_classes", "memory_budget", "class_axis"])
@pytest.mark.parametrize("name", [LOSS, STATISTICS])
def test_a_static_option_is_not_traced(name, key):
    function = getattr(ce_jax, name)
    with pytest.raises((TypeError, ValueError), match=key):
        jax.jit(lambda x: function(**RIGHT, **{key: x}))(jnp.int32(1))


def test_the_axes_of_other_kernels_are_not_traced():
    layer = {"hidden": RIGHT["hidden"], "kernel": RIGHT["kernel"]}
    distilled = functools.partial(
        ce_jax.linear_distillation_loss, **layer, teacher_logits=np.zeros((5, 4), F32)
    )
    sampled = functools.partial(
        ce_jax.linear_sampled_softmax_cross_entropy,
        **RIGHT,
        negatives=ce_jax.uniform_negatives(jax.random.key(0), 3, 4),
    )
    for function, key in (
        (distilled, "class_axis"),
        (distilled, "teacher_class_axis"),
        (sampled, "class_axis"),
    ):
        with pytest.raises(TypeError, match=rf"\b{key}\b"):
            jax.jit(lambda x, function=function, key=key: function(**{key: x}))(1)


def test_a_kernel_that_is_not_sharded():
    with pytest.raises((NameError, ValueError), match="classes"):
        ce_jax.linear_softmax_cross_entropy(**RIGHT, axis_name="classes")
