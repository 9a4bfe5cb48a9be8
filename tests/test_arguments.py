"""What every public function takes for an array, and of which shapes: one test over all of them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import ce_jax
from tests.arguments import ARGUMENTS, CLASSES, IDS, LOGITS, PROBS, ROWS, WITHOUT_ARRAYS
from tests.helpers import only_type_checked

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

# A number for each row (or element), or one for all.
PER_ROW = {
    "sample_weight",
    "where",
    "temperature",
    "count",
    "kl",
    "advantage",
    "num_bytes",
    "total",
    "label_log_expected_count",
}
# They say of what they stand beside, which has no other to be compared with.
FIRST = {("bits_per_byte", "total"), ("perplexity", "total")}
PER_ROW_CASES = [
    (function, name)
    for function, arguments in ARGUMENTS.items()
    for name in sorted(PER_ROW & arguments.keys())
    if (function, name) not in FIRST
]


def test_all_public_functions_are_here():
    public = {name for name in ce_jax.__all__ if inspect.isfunction(vars(ce_jax).get(name))}
    assert ARGUMENTS.keys() | WITHOUT_ARRAYS == public


def as_list(x):
    if isinstance(x, ce_jax.Negatives):
        return ce_jax.Negatives(*map(as_list, x))
    return x.tolist() if isinstance(x, np.ndarray) else x


@pytest.mark.parametrize("function", ARGUMENTS)
def test_nested_lists_are_arrays(function):
    call, arguments = getattr(ce_jax, function), ARGUMENTS[function]
    wanted = call(**arguments)
    found = call(**{name: as_list(x) for name, x in arguments.items()})
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, wanted)


@pytest.mark.parametrize("function", ARGUMENTS)
def test_what_is_no_array(function):
    """Each argument in turn: the message names it."""
    arguments = ARGUMENTS[function]
    for name, right in arguments.items():
        if isinstance(right, np.ndarray):
            for wrong in ([[1.0], [1.0, 2.0]], "text", {"a": 1.0}):
                with pytest.raises(TypeError) as raised:
                    getattr(ce_jax, function)(**arguments | {name: wrong})
                if not only_type_checked(raised):
                    assert raised.match(rf"\b{name} must be an array or a nested list")


@pytest.mark.parametrize(("function", "name"), PER_ROW_CASES)
def test_what_belongs_to_rows_has_their_axes(function, name):
    call, arguments = getattr(ce_jax, function), ARGUMENTS[function]
    right = arguments[name]
    one = np.ones_like(right)
    # One for all, in each of the ways that are right.
    fitting = (one[:1], one[..., :1], one[(0,) * one.ndim])
    wanted, *others = jax.jit(lambda every: [call(**arguments | {name: x}) for x in every])(
        (one, *fitting)
    )
    for found in others:
        jax.tree.map(np.testing.assert_array_equal, found, wanted)

    for wrong in (one[None], one[..., None], one[0] if one.ndim > 1 else np.ones(7, one.dtype)):
        classes_too = name == "where" and {"logits", "log_probs", "negative_logits"} & {*arguments}
        if classes_too and wrong.shape == (*right.shape, 1):
            continue  # all classes of a row
        with pytest.raises(ValueError, match=rf"\b{name} must have") as raised:
            call(**arguments | {name: wrong})
        assert str(wrong.shape) in str(raised.value)
        if wrong.ndim < one.ndim or (wrong.ndim > one.ndim and not classes_too):
            assert raised.match(rf"write .*\b{name}\[")


@pytest.mark.parametrize("form", ["sample_weight", "where"])
def test_the_message_says_what_to_write(form):
    """And what it says works."""
    right = ARGUMENTS["nll_loss"]
    weight = np.array([1, 0, 1], right[form].dtype)
    with pytest.raises(ValueError, match=form) as raised:
        ce_jax.nll_loss(**right | {form: weight})
    by_first, by_last = f"{form}[:, None]", f"{form}[None, :]"
    assert f"write {by_first} or {by_last}" in str(raised.value)
    for cure in (weight[:, None], weight[None, :]):
        ce_jax.nll_loss(**right | {form: cure})


ELEMENTWISE = [
    ("sigmoid_binary_cross_entropy", "logits"),
    ("sigmoid_focal_loss", "logits"),
    ("binary_cross_entropy", "probs"),
]


@pytest.mark.parametrize(("function", "name"), ELEMENTWISE)
def test_logits_are_not_broadcast_to_labels(function, name):
    call = getattr(ce_jax, function)
    column, vector = np.full((4, 1), 0.5, np.float32), np.full(4, 0.25, np.float32)
    with pytest.raises(ValueError, match=rf"labels .*{name}.* write labels\[:, None\]"):
        call(column, vector)
    with pytest.raises(ValueError, match=rf"labels .*{name}.* write labels\[:, 0\]"):
        call(vector, column)
    with pytest.raises(ValueError, match="labels"):
        call(vector[0], vector)
    assert call(column, vector[:, None]).shape == (4, 1)
    assert call(PROBS, vector).shape == PROBS.shape  # one for each class
    assert call(vector, 1).shape == (4,)


DISTRIBUTIONS = [
    name
    for name, arguments in ARGUMENTS.items()
    if name in ("cross_entropy_parts", "safe_softmax_cross_entropy")
    or name in ("softmax_cross_entropy", "poly_loss_cross_entropy")
]
SQUARE = np.zeros((CLASSES, CLASSES), np.float32)


@pytest.mark.parametrize("function", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("logits", "labels", "options"),
    [
        (SQUARE, np.arange(CLASSES), {}),
        (SQUARE, np.zeros((CLASSES, 1), np.int32), {}),
        (SQUARE, np.zeros((CLASSES, 1), np.float32), {}),
        (SQUARE, np.int32(1), {}),
        (SQUARE, np.float32(1), {}),
        (LOGITS, IDS, {}),
        (LOGITS, IDS[..., None], {}),
        (LOGITS, np.zeros(CLASSES, np.int32), {}),
        (SQUARE, np.zeros(CLASSES, np.float32), {"axis": 0}),
        (SQUARE, np.zeros((1, CLASSES), np.float32), {"axis": 0}),
        (LOGITS, np.zeros((3, 1), np.float32), {"axis": (1, 2)}),
    ],
)
def test_class_ids_are_no_distributions(function, logits, labels, options):
    with pytest.raises(ValueError, match=r"labels .*softmax_cross_entropy_with_integer_labels"):
        getattr(ce_jax, function)(logits, labels, **options)


@pytest.mark.parametrize("function", DISTRIBUTIONS)
def test_distributions_that_are_shared(function):
    call = getattr(ce_jax, function)
    prior = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    everywhere = np.broadcast_to(prior, LOGITS.shape)
    for labels in (prior, prior[None], everywhere):
        found, wanted = call(LOGITS, labels), call(LOGITS, everywhere)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    for counts in (np.ones(LOGITS.shape, np.int32), np.ones(LOGITS.shape, bool)):
        call(LOGITS, counts)
    call(LOGITS[..., :1], np.ones((*ROWS, 1), np.float32))


def test_rows_of_symbolic_size(request):
    """A size that is a symbol is equal to itself, and to no number."""
    if request.config.getoption("--jaxtyping-packages", None):
        pytest.skip("annotations are checked, and of them a size that is a symbol is no int")
    b, t = export.symbolic_shape("b, t")
    logits = jax.ShapeDtypeStruct((b, t, 4), jnp.float32)
    labels = jax.ShapeDtypeStruct((b, t), jnp.int32)
    loss = jax.jit(ce_jax.softmax_cross_entropy_with_integer_labels)
    for shape in ((b, t), (b, 1), (1, t), ()):
        weights = jax.ShapeDtypeStruct(shape, jnp.float32)
        out = jax.eval_shape(loss, logits, labels, sample_weight=weights)
        assert out.shape == (b, t)
    for shape in ((b,), (t, b), (b, t, 1)):
        weights = jax.ShapeDtypeStruct(shape, jnp.float32)
        with pytest.raises(ValueError, match="sample_weight must have"):
            jax.eval_shape(loss, logits, labels, sample_weight=weights)
