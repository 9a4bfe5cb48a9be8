"""Wrong arguments raise while tracing; the message names them, what was found, what is wanted."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests.helpers import WRONG_NAME, only_type_checked

INTEGER = "softmax_cross_entropy_with_integer_labels"
SOFT = "softmax_cross_entropy"
SIGMOID = "sigmoid_binary_cross_entropy"
BINARY = "binary_cross_entropy"
NLL = "nll_loss"
STATISTICS = "softmax_statistics"

F32 = np.float32
LOGITS = np.zeros((5, 4), F32)
IDS = np.zeros(5, np.int32)
# Arguments every function accepts; each case below changes one.
RIGHT = {
    INTEGER: {"logits": LOGITS, "labels": IDS},
    SOFT: {"logits": LOGITS, "labels": LOGITS},
    SIGMOID: {"logits": LOGITS, "labels": LOGITS},
    BINARY: {"probs": LOGITS + F32(0.5), "labels": LOGITS},
    NLL: {"log_probs": LOGITS, "labels": IDS},
    STATISTICS: {"logits": LOGITS, "labels": IDS},
    "mean_denominator": {"labels": IDS},
    "smooth_labels": {"labels": LOGITS, "alpha": 0.1},
}
SOFTMAX = (INTEGER, SOFT)
OF_IDS = (INTEGER, NLL, STATISTICS)
WITH_AXIS = (INTEGER, SOFT, NLL, STATISTICS)
WITH_OPTIONS = (INTEGER, SOFT, SIGMOID, BINARY, NLL)


INTEGERS = np.zeros((5, 4), np.int32)
COMPLEX = np.zeros((5, 4), np.complex64)


def ones(*shape):
    return np.ones(shape, F32)


# (functions, the argument changed, its value, the exception, what the message must hold besides
# the argument's name). Found and wanted are both there wherever both are known.
CASES = [
    # Dtypes.
    ((INTEGER, SOFT, SIGMOID, STATISTICS), "logits", INTEGERS, TypeError, ["int32", "float"]),
    ((NLL,), "log_probs", INTEGERS, TypeError, ["int32", "float"]),
    ((BINARY,), "probs", INTEGERS, TypeError, ["int32", "float"]),
    ((INTEGER, SOFT, SIGMOID), "logits", COMPLEX, TypeError, ["complex64", "float"]),
    (OF_IDS, "labels", np.zeros(5, F32), TypeError, ["float32", "integer"]),
    (OF_IDS, "labels", np.zeros(5, bool), TypeError, ["bool", "integer"]),
    (OF_IDS, "labels", np.zeros(5, object), TypeError, ["object", "numbers"]),
    ((SOFT,), "labels", np.zeros(5, F32), ValueError, ["class ids", INTEGER]),
    ((INTEGER, SOFT), "logits", np.full((5, 4), "1"), TypeError, ["<U1", "numbers"]),
    ((INTEGER, SOFT), "logits", np.zeros((5, 4), np.longdouble), TypeError, ["float", "JAX"]),
    ((SOFT, SIGMOID, BINARY), "labels", COMPLEX, TypeError, ["complex64"]),
    (("smooth_labels",), "labels", INTEGERS, TypeError, ["int32", "float"]),
    ((*WITH_OPTIONS, STATISTICS), "where", INTEGERS, TypeError, ["int32", "bool"]),
    (WITH_OPTIONS, "weight", COMPLEX[0], TypeError, ["complex64"]),
    (WITH_OPTIONS, "sample_weight", COMPLEX[:, 0], TypeError, ["complex64"]),
    # Shapes.
    (OF_IDS, "labels", np.zeros(4, np.int32), ValueError, ["(4,)", "(5,)"]),
    (OF_IDS, "labels", INTEGERS, ValueError, ["(5, 4)", "(5,)"]),
    (OF_IDS, "labels", np.zeros((5, 1), np.int32), ValueError, ["(5, 1)", "(5,)"]),
    ((SOFT, SIGMOID, BINARY), "labels", ones(5, 3), ValueError, ["(5, 3)", "(5, 4)"]),
    ((SOFT, SIGMOID, BINARY), "labels", ones(5), ValueError, ["(5,)", "(5, 4)"]),
    ((INTEGER, SOFT, NLL), "weight", ones(5), ValueError, ["(5,)", "(4,)"]),
    ((INTEGER, SOFT, NLL), "weight", ones(1, 4), ValueError, ["(1, 4)", "(4,)"]),
    ((SIGMOID, BINARY), "weight", ones(5), ValueError, ["(5,)", "(5, 4)"]),
    ((SIGMOID,), "pos_weight", ones(3), ValueError, ["(3,)", "(5, 4)"]),
    ((INTEGER, SOFT, NLL), "sample_weight", ones(4), ValueError, ["(4,)", "(5,)"]),
    ((INTEGER, SOFT, NLL), "sample_weight", ones(5, 1), ValueError, ["(5, 1)", "(5,)"]),
    ((SIGMOID, BINARY), "sample_weight", ones(5), ValueError, ["(5,)", "(5, 4)"]),
    (("mean_denominator",), "sample_weight", ones(4), ValueError, ["(4,)", "(5,)"]),
    (WITH_AXIS, "where", np.ones(4, bool), ValueError, ["(4,)", "(5,)"]),
    (WITH_AXIS, "where", np.ones((5, 3), bool), ValueError, ["(5, 3)", "(5, 4)"]),
    (WITH_AXIS, "where", np.ones((1, 5, 4), bool), ValueError, ["(1, 5, 4)"]),
    ((SIGMOID, BINARY), "where", np.ones((5, 3), bool), ValueError, ["(5, 3)", "(5, 4)"]),
    # Axes.
    (WITH_AXIS, "axis", 2, ValueError, ["2"]),
    (WITH_AXIS, "axis", -3, ValueError, ["-3"]),
    (WITH_AXIS, "axis", (0, 0), ValueError, ["(0, 0)"]),
    ((SOFT, INTEGER), "axis", (-1, 1), ValueError, ["(-1, 1)"]),
    ((SOFT, INTEGER), "axis", 0.5, TypeError, ["0.5"]),
    ((SOFT, INTEGER), "axis", {}, TypeError, ["{}", "int"]),
    ((SOFT, INTEGER), "axis", (np.ones(2),), TypeError, ["(array([1", "int"]),
    # Options.
    (WITH_OPTIONS, "reduction", "average", WRONG_NAME, ["'average'", "none", "sum", "mean"]),
    (WITH_OPTIONS, "label_smoothing", -0.1, ValueError, ["-0.1", "0", "1"]),
    (WITH_OPTIONS, "label_smoothing", 1.5, ValueError, ["1.5", "0", "1"]),
    (WITH_OPTIONS, "label_smoothing", float("nan"), ValueError, ["nan", "0", "1"]),
    (WITH_OPTIONS, "label_smoothing", jnp.array(1.5), ValueError, ["1.5", "0", "1"]),
    (WITH_OPTIONS, "label_smoothing", "0.1", TypeError, ["0.1"]),
    (WITH_OPTIONS, "label_smoothing", ones(5), (TypeError, ValueError), []),
    (SOFTMAX, "z_loss", -1e-4, ValueError, ["-0.0001", "0"]),
    (SOFTMAX, "z_loss", float("nan"), ValueError, ["nan", "0"]),
    (SOFTMAX, "z_loss", ones(5), (TypeError, ValueError), []),
    (("smooth_labels",), "alpha", -0.1, ValueError, ["-0.1"]),
    ((INTEGER, NLL, STATISTICS), "ignore_index", 1.5, TypeError, ["1.5", "int"]),
    ((INTEGER, NLL, STATISTICS), "ignore_index", "pad", TypeError, ["pad", "int"]),
]


def words(text):
    """Each as itself, not as a part of a longer word or number."""
    return rf"(?<![\w.\-]){re.escape(text)}" if text[-1].isalnum() else re.escape(text)


@pytest.mark.parametrize(
    ("function", "argument", "value", "error", "holds"),
    [
        pytest.param(function, argument, value, error, holds, id=f"{function}-{argument}-{i}")
        for i, (functions, argument, value, error, holds) in enumerate(CASES)
        for function in functions
    ],
)
def test_wrong_argument(function, argument, value, error, holds):
    with pytest.raises(error) as raised:
        getattr(ce_jax, function)(**RIGHT[function] | {argument: value})
    message = str(raised.value)
    for text in (argument, *holds):
        assert re.search(words(text), message), f"{text!r} is not in {message!r}"


@pytest.mark.parametrize("function", RIGHT)
def test_right_arguments_are_accepted(function):
    """Or the cases above would prove nothing."""
    getattr(ce_jax, function)(**RIGHT[function])


@pytest.mark.parametrize(
    ("function", "arguments", "error", "match"),
    [
        (INTEGER, {"labels": np.zeros(5, F32)}, TypeError, "labels"),
        (INTEGER, {"labels": np.zeros(4, np.int32)}, ValueError, "labels"),
        (SOFT, {"weight": ones(3)}, ValueError, "weight"),
        (SIGMOID, {"pos_weight": ones(3)}, ValueError, "pos_weight"),
    ],
)
def test_errors_come_while_tracing(function, arguments, error, match):
    """Abstract values are enough: nothing runs."""
    with pytest.raises(error, match=match):
        jax.eval_shape(getattr(ce_jax, function), **RIGHT[function] | arguments)


LINEAR = "linear_softmax_cross_entropy"
HIDDEN = np.zeros((5, 2), F32)
LAYER = {"hidden": HIDDEN, "kernel": np.zeros((2, 4), F32), "labels": IDS}
RIGHT[LINEAR] = LAYER
TOP_K, LINEAR_TOP_K = "top_k_distillation_loss", "linear_top_k_distillation_loss"
KNOWN = {"teacher_ids": np.zeros((5, 1), int), "teacher_log_probs": -ones(5, 1)}
RIGHT[TOP_K] = {"logits": LOGITS, **KNOWN}
RIGHT[LINEAR_TOP_K] = {"hidden": HIDDEN, "kernel": LAYER["kernel"], **KNOWN}
MORE_OF_IDS = ("brier_score", "fit_temperature", "gradient_view")
RIGHT |= dict.fromkeys(MORE_OF_IDS, RIGHT[INTEGER])
NOISY = ("forward_corrected_cross_entropy", "backward_corrected_cross_entropy")
RIGHT |= dict.fromkeys(NOISY, RIGHT[INTEGER] | {"transition": np.eye(4, dtype=F32)})
FOCAL, OTHER_SOFT = "sigmoid_focal_loss", ("poly_loss_cross_entropy", "cross_entropy_parts")
RIGHT |= dict.fromkeys(OTHER_SOFT, RIGHT[SOFT]) | {FOCAL: RIGHT[SIGMOID]}
SAMPLERS = "uniform_negatives", "log_uniform_negatives"
KEY = jax.random.key(0)
DRAW = {"key": KEY, "num_samples": 2, "num_items": 9}
RIGHT |= dict.fromkeys(SAMPLERS, DRAW)
SOFT_FORM = "softmax_cross_entropy"
IDS_FORM = "softmax_cross_entropy_with_integer_labels"
# (function, the argument changed, its value, what the message says to write).
CURES = [
    *((name, "labels", np.eye(5, 4, dtype=F32), SOFT_FORM) for name in (*OF_IDS, LINEAR)),
    *((name, "labels", np.eye(5, 4, dtype=int), SOFT_FORM) for name in (*OF_IDS, LINEAR)),
    *((name, "labels", np.eye(5, 4, dtype=int), "jnp.argmax") for name in (*OF_IDS, LINEAR)),
    *((name, "labels", IDS[:, None], "labels[:, 0]") for name in (*OF_IDS, LINEAR)),
    *((name, "labels", IDS[None], "labels[0, :]") for name in (*OF_IDS, LINEAR)),
    *((name, "labels", IDS.astype(F32), "labels.astype(int)") for name in (*OF_IDS, LINEAR)),
    *(
        (name, "labels", np.zeros(4, int), "write axis=0")
        for name in (*OF_IDS, *MORE_OF_IDS, *NOISY)
    ),
    (TOP_K, "teacher_ids", ones(5, 2), "before the log-probabilities"),
    (LINEAR_TOP_K, "teacher_ids", ones(5, 2), "before the log-probabilities"),
    (SOFT, "labels", IDS, IDS_FORM),
    *((name, "where", np.ones(5, int), "where != 0") for name in (INTEGER, NLL, LINEAR)),
    *((name, "where", np.ones(5, F32), "sample_weight") for name in (INTEGER, NLL, LINEAR)),
    (INTEGER, "where", np.ones(4, bool), "where[None, :]"),
    (LINEAR, "kernel", np.zeros((4, 2), F32), "class_axis=0 for a kernel of shape [V, D]"),
    (LINEAR, "logit_soft_cap", 0.0, "logit_soft_cap=None"),
    *((name, "axis", "mean", "reduction='mean'") for name in (INTEGER, SOFT, NLL)),
    *(
        (name, "logits", INTEGERS, "jnp.asarray(logits, float)")
        for name in (INTEGER, SOFT, SIGMOID)
    ),
    (INTEGER, "logits", IDS, "class ids as labels"),
    ("focal_loss", "log_prob", IDS, "jnp.asarray(log_prob, float)"),
    *((name, "labels", IDS, "jax.nn.one_hot(labels, 4)") for name in (SIGMOID, BINARY, FOCAL)),
    *((name, "labels", IDS, "jax.nn.one_hot") for name in (SOFT, *OTHER_SOFT, "smooth_labels")),
    (INTEGER, "where", np.ones(5, bool)[:, None, None], "where[:, 0, 0]"),
    (LINEAR, "log_prob_loss", ones(5), "functools.partial"),
    (LINEAR, "log_prob_loss", [1], "functools.partial"),
    *((name, "key", 0, "jax.random.key(0)") for name in SAMPLERS),
    *((name, "key", jax.random.split(KEY), "one key") for name in SAMPLERS),
    *((name, "axis", ones(5), "sample_weight=") for name in (INTEGER, SOFT, NLL, STATISTICS)),
]


@pytest.mark.parametrize(("function", "argument", "value", "cure"), CURES)
def test_the_message_says_what_to_write(function, argument, value, cure):
    with pytest.raises((TypeError, ValueError)) as raised:
        getattr(ce_jax, function)(**RIGHT.get(function, {}) | {argument: value})
    if not only_type_checked(raised):
        assert argument in str(raised.value)
        assert cure in str(raised.value)


@pytest.mark.parametrize("option", [{"axis": 1}, {"ignore_index": -1}, {"return_statistics": True}])
def test_a_traced_constant(option):
    """Options of a function that was given to `jax.jit` itself are traced."""
    loss = ce_jax.softmax_cross_entropy_with_integer_labels
    with pytest.raises(TypeError, match=r"functools\.partial.*static_argnames"):
        jax.jit(loss)(**RIGHT[INTEGER], **option)
    run = jax.jit(loss, static_argnames=list(option))
    assert jax.tree.leaves(run(**RIGHT[INTEGER], **option))[0].shape == (5,)


@pytest.mark.parametrize("given", [{"logits": ones(5)}, {"axis": None}])
def test_a_label_for_each_logit(given):
    with pytest.raises(ValueError, match=r"labels must have shape \(\).*sigmoid_binary"):
        ce_jax.softmax_cross_entropy_with_integer_labels(**RIGHT[INTEGER] | given)


def test_the_message_speaks_of_what_was_given():
    """A kernel that fits neither way says nothing of `class_axis`, nor of one that is left out."""
    with pytest.raises(ValueError, match="kernel must have shape") as raised:
        ce_jax.linear_softmax_cross_entropy(**LAYER | {"kernel": np.zeros((3, 4), F32)})
    assert "class_axis" not in str(raised.value)
    with pytest.raises(ValueError, match=r"class_axis=1 for a kernel of shape \[D, V\]"):
        ce_jax.linear_softmax_cross_entropy(**LAYER, class_axis=0)
    teacher = {"teacher_hidden": HIDDEN, "teacher_kernel": np.zeros((4, 2), F32)}
    layer = {"hidden": HIDDEN, "kernel": LAYER["kernel"]}
    with pytest.raises(ValueError, match="write teacher_class_axis=0"):
        ce_jax.linear_distillation_loss(**layer, **teacher)
    teacher["teacher_kernel"] = layer["kernel"]
    with pytest.raises(ValueError, match="write teacher_logit_soft_cap=None"):
        ce_jax.linear_distillation_loss(**layer, **teacher, teacher_logit_soft_cap=0.0)
    with pytest.raises(TypeError) as raised:
        ce_jax.softmax_cross_entropy(LOGITS, None)
    if not only_type_checked(raised):
        assert "labels must be an array, got None" in str(raised.value)
    with pytest.raises(TypeError) as raised:
        ce_jax.softmax_statistics(LOGITS, IDS, "last")
    assert "reduction" not in str(raised.value)


def test_no_advice_that_leads_to_another_error():
    """Another axis would not make the shapes equal."""
    rows = ones(2)
    for function, arguments in (
        (ce_jax.dpo_loss, (ones(2, 3), ones(2, 3), rows, rows)),
        (ce_jax.distillation_loss, (ones(2, 3), rows)),
        (ce_jax.kl_estimate, (ones(2, 3), rows)),
    ):
        with pytest.raises(ValueError, match="must have shape") as raised:
            function(*arguments)
        assert "write" not in str(raised.value)
    by_axes = {"logits": np.zeros((2, 3, 4), F32), "labels": np.zeros((2, 3), int)}
    for function, arguments in (
        (LINEAR, LAYER | {"labels": np.zeros(4, int)}),
        (INTEGER, by_axes | {"axis": 1}),
        (INTEGER, by_axes | {"labels": np.zeros(12, int), "axis": (1, 2)}),
    ):
        with pytest.raises(ValueError, match="labels must have shape") as raised:
            getattr(ce_jax, function)(**arguments)
        assert "axis" not in str(raised.value)


def test_forward_mode_can_be_found():
    """What JAX says without it stands in the documentation of the argument."""
    for function in (INTEGER, SOFT, SIGMOID, "poly_loss_cross_entropy", LINEAR):
        call = getattr(ce_jax, function)
        right = RIGHT.get(function, RIGHT[SOFT])
        x, name = right.get("logits", HIDDEN), "hidden" if function == LINEAR else "logits"
        with pytest.raises(TypeError) as raised:
            jax.jvp(lambda x, call=call, a=right, n=name: call(**a | {n: x}), (x,), (x,))
        said = str(raised.value).partition(" to a ")[0]
        text = " ".join(inspect.getdoc(call).split())
        assert said in text.partition("forward_mode: ")[2]


def test_ignore_index_needs_integer_labels():
    with pytest.raises(TypeError, match="ignore_index"):
        ce_jax.softmax_cross_entropy(LOGITS, LOGITS, ignore_index=-100)


def test_options_are_keywords():
    """Only optax's four arguments are positional: no option can land in another's place."""
    for function in (INTEGER, SOFT):
        with pytest.raises(TypeError, match="positional"):
            getattr(ce_jax, function)(*RIGHT[function].values(), -1, None, ones(4))
    with pytest.raises(TypeError, match="positional"):
        ce_jax.sigmoid_binary_cross_entropy(LOGITS, LOGITS, ones(4))


EVEN, PAIR = np.full((4, 4), 0.25, F32), (ones(5, 3), ones(3, 4))


def test_a_traced_option_out_of_range_is_not_checked():
    """Its value is unknown while tracing; the formula holds for any."""
    loss = jax.jit(lambda eps: ce_jax.softmax_cross_entropy(LOGITS, LOGITS, label_smoothing=eps))
    np.testing.assert_allclose(loss(2.0), 2 * np.log(4.0), rtol=1e-6)
    np.testing.assert_allclose(loss(2), 2 * np.log(4.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        (INTEGER, (LOGITS, IDS), {"temperature": 0.0}),
        (INTEGER, (LOGITS, IDS), {"label_smoothing": 2.0}),
        (INTEGER, (LOGITS, IDS), {"z_loss": -1}),
        ("softmax_cross_entropy", (LOGITS, LOGITS), {"temperature": np.float32(-1)}),
        # Infinite in float32.
        (INTEGER, (LOGITS, IDS), {"temperature": 1e39}),
        (INTEGER, (LOGITS, IDS), {"z_loss": np.float64(1e300)}),
        ("linear_softmax_cross_entropy", (*PAIR, IDS), {"logit_soft_cap": 1e39}),
        ("linear_softmax_cross_entropy", (*PAIR, IDS), {"logit_soft_cap": 0}),
        ("focal_loss", (-np.ones(4, F32),), {"gamma": -1.0}),
        ("jensen_shannon_loss", (LOGITS, LOGITS), {"beta": 1.0}),
        ("clip_loss", (LOGITS, LOGITS), {"logit_scale": -1.0}),
        ("smooth_labels", (LOGITS, 3.0), {}),
        ("smoothing_over_others", (0.95, 5), {}),
        ("balanced_weights", (np.array([-1, 2]),), {}),
        ("focal_alpha", (np.array([5, 2]), 3), {}),
        ("fit_temperature", (LOGITS, IDS), {"low": 2.0, "high": 1.0}),
        ("forward_corrected_cross_entropy", (LOGITS, IDS, 4 * EVEN), {}),
    ],
)
def test_a_known_option_out_of_range_is_refused_under_jit_too(function, arguments, options):
    def call():
        return getattr(ce_jax, function)(*arguments, **options)

    for run in (call, jax.jit(call)):
        with pytest.raises(ValueError, match="must"):
            run()


def test_no_batch_to_wrap_in():
    with pytest.raises(ValueError, match="logits"):
        ce_jax.softmax_cross_entropy_with_integer_labels(np.zeros((), F32), np.int32(0))


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [
        ("linear_softmax_cross_entropy", (*PAIR, None), {}, TypeError, "labels .* None"),
        (
            "linear_sampled_softmax_cross_entropy",
            (*PAIR, IDS, IDS[:2]),
            {},
            TypeError,
            r"negatives must be Negatives\(ids, log_expected_count\)",
        ),
        (
            "linear_jensen_shannon_loss",
            PAIR,
            {"teacher_logits": LOGITS, "teacher_class_axis": 0},
            ValueError,
            "teacher_class_axis is an axis of teacher_kernel",
        ),
        (INTEGER, (LOGITS, IDS), {"forward_mode": ones()}, TypeError, "forward_mode .* True or"),
        (INTEGER, (LOGITS, IDS), {"return_statistics": "no"}, TypeError, "True or False.* 'no'"),
        (INTEGER, (LOGITS, IDS), {"axis_name": ["data"]}, TypeError, "axis_name .* one mesh axis"),
        (INTEGER, (LOGITS, IDS), {"axis_name": "data"}, ValueError, "jax.shard_map .* 'data'"),
        ("mean_denominator", (IDS,), {"weight": 3.0}, ValueError, r"weight .* \[C\], .* \(\)"),
        ("sequence_log_prob", (LOGITS,), {"mean": "yes"}, TypeError, "mean .* True or False"),
        ("focal_alpha", (100, 30), {}, ValueError, "positives must be at most total"),
        ("balanced_weights", (5,), {}, ValueError, r"counts .* \[C\], .* \(\)"),
        ("smooth_labels", (LOGITS, None), {}, TypeError, "alpha .* None"),
        ("next_tokens", (IDS,), {"shift": None}, TypeError, "shift must be an int, got None"),
        ("uniform_negatives", (KEY, 3, 10), {"shape": 4}, TypeError, "shape must be a tuple"),
        (
            "forward_corrected_cross_entropy",
            (LOGITS, IDS, 4 * EVEN),
            {},
            ValueError,
            "rows of transition must sum to 1",
        ),
        (INTEGER, (LOGITS, IDS), {"temperature": True}, TypeError, "temperature .* True"),
        (INTEGER, (LOGITS, IDS), {"z_loss": np.inf}, ValueError, "z_loss must be finite"),
    ],
)
def test_what_was_meant_otherwise(function, arguments, options, error, message):
    with pytest.raises(error) as raised:
        getattr(ce_jax, function)(*arguments, **options)
    if not only_type_checked(raised):
        assert re.search(message, str(raised.value))
