"""Rows too long, or too many, to be added up as they are: the same numbers in parts."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax._platform import parts
from ce_jax._rows import sums
from tests import reference
from tests.comparison import accuracy, check, close, together
from tests.helpers import LAYOUTS, covering, softmax_arguments

IDS = "softmax_cross_entropy_with_integer_labels"


pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_device")]


@pytest.fixture
def all_long(monkeypatch):
    """Limits so small that every row is cut and rows are stacked."""
    monkeypatch.setattr(parts, "_LONGEST", 2)
    monkeypatch.setattr(parts, "_SHORTEST", 1)


@pytest.mark.sweep
@pytest.mark.usefixtures("all_long")
@together(
    covering(
        seed=3,
        layout=[layout for layout in LAYOUTS if layout != "vector"],
        soft=[False, True],
        where=[None, "rows", "classes"],
        masked=[False, True],
        weight=[False, True],
        label_smoothing=[0.0, 0.3],
        dtype=["float32", "float64", "bfloat16"],
    ),
    size=4,
)
def test_losses_in_parts(case):
    dtype = jnp.dtype(case.pop("dtype"))
    arguments = softmax_arguments(**case)
    name = "softmax_cross_entropy" if case["soft"] else IDS
    check(name, arguments, dtype=dtype)
    # And where no derivative is taken.
    smooth = {k for k, v in arguments.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"}
    with jax.enable_x64(dtype == jnp.float64):
        rounded = {k: jnp.asarray(v, dtype) for k, v in arguments.items() if k in smooth}
        value = getattr(ce_jax, name)(**arguments | rounded)
    exact = {k: np.asarray(v, np.float64) for k, v in rounded.items()}
    close(value, getattr(reference, name)(**arguments | exact), accuracy(value.dtype))


@pytest.mark.usefixtures("all_long")
def test_a_single_row_in_parts():
    check(IDS, softmax_arguments(layout="vector"))


@pytest.mark.parametrize("longest", [1, 2])  # in two parts, or one
def test_parts_as_on_a_gpu(longest, monkeypatch):
    """In an axis of their own, halves joined; here a CPU runs what a GPU would."""
    monkeypatch.setattr(parts, "_LONGEST_ON_GPU", longest)
    monkeypatch.setattr(parts, "_SHORTEST", 1)
    monkeypatch.setattr(sums, "FEW_CLASSES", 0)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, **own: own.get("cuda", own["default"])(*args)
    )
    options = {"layout": "middle", "masked": True, "label_smoothing": 0.3}
    check("softmax_cross_entropy", softmax_arguments(soft=True, **options))
    check(IDS, softmax_arguments(**options))
    check(IDS, softmax_arguments(weight=True, **options))


@pytest.mark.usefixtures("all_long", "x64")
def test_entropy_second_derivatives_and_batches_in_parts():
    draw = np.random.default_rng(5)
    logits = draw.normal(size=(2, 6))
    labels = np.array([1, 5])

    def entropy(logits, labels, library=ce_jax):
        return library.softmax_statistics(logits, labels).entropy

    arguments = {"logits": logits, "labels": labels}
    truth = reference.hessian(
        lambda **a: entropy(**a, library=reference), arguments, "logits", np.ones(2)
    )
    found = jax.hessian(lambda z: entropy(z, labels).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-8)

    batch = draw.normal(size=(3, 2, 6))
    found = jax.jit(jax.vmap(entropy, (0, None)))(jnp.asarray(batch), jnp.asarray(labels))
    for one, z in zip(found, batch, strict=True):
        close(one, entropy(z, labels, reference), 1e-13)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 40000), "float32"),  # two parts
        ((700, 50257), "float32"),  # 29 parts
        ((5, 32771), "float32"),  # a prime number of classes
        ((33000, 512), "float32"),  # many rows
        ((2, 3, 16384), "bfloat16"),
    ],
    ids=str,
)
def test_real_sizes(shape, dtype):
    draw = np.random.default_rng(8)
    logits = jnp.asarray(draw.normal(size=shape), dtype)
    labels = draw.integers(shape[-1], size=shape[:-1])
    z = np.asarray(logits, np.float64)
    total = np.exp(z).sum(-1)
    expected = np.log(total) - np.take_along_axis(z, labels[..., None], -1)[..., 0]
    loss = jax.jit(ce_jax.softmax_cross_entropy_with_integer_labels)
    close(loss(logits, labels), expected, 2e-6)

    cotangent = draw.normal(size=shape[:-1])
    value, pull = jax.vjp(lambda z: loss(z, labels), logits)
    close(value, expected, 2e-6)
    slope = np.exp(z) / total[..., None]
    slope[(*np.indices(labels.shape), labels)] -= 1
    close(
        pull(jnp.asarray(cotangent, value.dtype))[0], cotangent[..., None] * slope, accuracy(dtype)
    )


def test_which_tiles_are_cut():
    def shape(*shape, dtype=jnp.float32, alone=False, entropy=False, platform="cpu"):
        z = jnp.zeros(shape, dtype)
        found = parts.best_shapes(z, alone=alone, entropy=entropy).get(platform)
        assert found is None or np.prod(found, dtype=int) == z.size
        return found

    assert shape(8, 32768) is None
    assert shape(8, 65536) == (16, 32768)
    assert shape(2, 4, 50257) == (8 * 29, 1733)
    assert shape(65536) == (2, 32768)
    assert shape(0, 65536) == (0, 32768)
    assert shape(8, 32771) is None  # a prime number
    assert shape(32769 // 3, 3, 512) is None
    # Where nothing is shared with a derivative, rows of which there are too many.
    assert shape(40000, 512) is None
    assert shape(40000, 512, alone=True) == (2, 20000, 512)
    assert shape(200, 200, 512, alone=True) is None
    # So that narrow logits are not widened in memory.
    assert shape(8, 8192, dtype=jnp.bfloat16) == (16, 4096)
    assert shape(8, 8192, dtype=jnp.bfloat16, entropy=True) is None
    assert shape(8, 4096, dtype=jnp.bfloat16) is None
    # A GPU has a limit of its own, reads each row's parts in an axis of their own, and a part of up
    # to twice the limit half by half.
    assert shape(8, 16384, platform="cuda") is None
    assert shape(8, 32768, platform="cuda") == (8, 1, 32768)
    assert shape(8, 50257, platform="cuda") == (8, 29, 1733)
    assert shape(2, 4, 256000, dtype=jnp.bfloat16, platform="cuda") == (2, 4, 8, 32000)


# A GPU reads halves of its parts where it looks for maxima first, as in a tile that is in cache.
@pytest.mark.parametrize(
    ("rows", "own"),
    [
        (8, {"cpu": {"16x32768"}, "cuda": {"8x2x32768", "8x2x16384"}, "tpu": set()}),
        (64, {"cuda": {"64x2x32768"}, "tpu": set()}),
    ],
)
def test_a_program_has_the_shapes_of_its_platform(rows, own):
    loss = jax.jit(ce_jax.softmax_cross_entropy_with_integer_labels)
    logits, labels = jnp.zeros((rows, 65536)), jnp.zeros(rows, jnp.int32)
    for platform, shapes in own.items():
        text = loss.trace(logits, labels).lower(lowering_platforms=(platform,)).as_text()
        found = set(re.findall(r"tensor<([0-9x]*\d{5})xf32>", text))
        assert found == {f"{rows}x65536"} | shapes


@pytest.mark.parametrize("shape", [(0, 1000), (2, 0, 65536)], ids=str)
def test_no_rows(shape):
    logits, labels = jnp.zeros(shape), jnp.zeros(shape[:-1], int)
    for field in ce_jax.softmax_statistics(logits, labels):
        assert field.shape == shape[:-1]

    def loss(z):
        weight = jnp.ones(shape[-1])
        return ce_jax.softmax_cross_entropy_with_integer_labels(
            z, labels, label_smoothing=0.1, weight=weight
        ).sum()

    value, slopes = jax.value_and_grad(loss)(logits)
    assert value == 0.0
    assert slopes.shape == shape


@pytest.mark.sweep  # a symbolic size is no int, as annotations would have it
@pytest.mark.parametrize("spec", ["b, 1000", "b, t, 65536", "8, c"])
def test_axes_of_any_length_can_be_exported(spec):
    shape = jax.export.symbolic_shape(spec)
    sizes = {"b": 3, "t": 2, "c": 70}
    draw = np.random.default_rng(13)

    def both(z, y):
        return ce_jax.softmax_statistics(z, y), jax.grad(
            lambda z: ce_jax.softmax_cross_entropy_with_integer_labels(
                z, y, label_smoothing=0.1, weight=jnp.ones(z.shape[-1]), reduction="mean"
            )
        )(z)

    exported = jax.export.export(jax.jit(both))(
        jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:-1], jnp.int32)
    )
    given = [sizes.get(name) or int(name) for name in spec.split(", ")]
    logits = jnp.asarray(draw.normal(size=given), jnp.float32)
    labels = jnp.asarray(draw.integers(given[-1], size=given[:-1]), jnp.int32)
    for found, wanted in zip(
        jax.tree.leaves(exported.call(logits, labels)),
        jax.tree.leaves(both(logits, labels)),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("classes", [64, 100, 127, 1000, 50257])
def test_the_first_of_the_largest_logits(classes):
    draw = np.random.default_rng(11)
    logits = draw.integers(-3, 3, size=(2, 5, classes)).astype(np.float32)  # many are equal
    logits[0, 1] = -np.inf
    logits[0, 2, 7:9] = np.nan
    logits[0, 3, -1] = 9.0
    logits[0, 4] = np.inf
    labels = np.zeros((2, 5), np.int32)
    with np.errstate(invalid="ignore"):
        expected = np.argmax(logits, -1)
    for of in (jax.jit(ce_jax.softmax_statistics), jax.vmap(ce_jax.softmax_statistics)):
        found = of(logits, labels).argmax
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)


def test_narrow_logits_are_not_widened_in_memory():
    rows, classes = 256, 8192

    def loss(z, y):
        return ce_jax.softmax_cross_entropy_with_integer_labels(z, y, reduction="mean")

    arguments = (
        jax.ShapeDtypeStruct((rows, classes), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    for function in (loss, jax.value_and_grad(loss)):
        compiled = jax.jit(function).lower(*arguments).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < rows * classes / 16


@pytest.mark.parametrize("n", [0, 1, 7, 16, 17, 31, 63, 64, 65, 100, 257, 1000, 1024, 2003, 50257])
@pytest.mark.parametrize("count", [2, 3])
def test_sums_in_one_are_sums(n, count):
    """Of integers, so that no order of additions makes a difference."""
    draw = np.random.default_rng(n)
    numbers = {str(k): draw.integers(-9, 9, (3, 2, n)) for k in range(count)}
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}
    tangents = {name: 2 * x + 1 for name, x in arrays.items()}
    found = jax.jit(parts.sums_in_one)(arrays)
    again, slopes = jax.jvp(parts.sums_in_one, (arrays,), (tangents,))
    assert found.keys() == numbers.keys()
    for name, x in numbers.items():
        np.testing.assert_array_equal(found[name], x.sum(-1))
        np.testing.assert_array_equal(again[name], x.sum(-1))
        np.testing.assert_array_equal(slopes[name], (2 * x + 1).sum(-1))


def test_sums_in_one_hold_partial_sums_alone():
    """The selected numbers themselves are stored by XLA where one sum is taken of them."""

    def summands(x):
        return {"dot": jnp.where(x > -jnp.inf, x, 0), "count": (x > -jnp.inf).astype(x.dtype)}

    def temporaries(function):
        x = jax.ShapeDtypeStruct((64, 4096), jnp.float32)
        return jax.jit(function).lower(x).compile().memory_analysis().temp_size_in_bytes

    size = 4 * 64 * 4096
    assert temporaries(lambda x: parts.sums_in_one(summands(x))) <= 1.05 * size / 8
    assert temporaries(lambda x: jax.tree.map(lambda s: jnp.sum(s, -1), summands(x))) >= size
