"""What the compiled linear form allocates beside arguments and results. Compiled, never run."""

import re

import jax
import jax.numpy as jnp
import pytest

import ce_jax
from ce_jax._platform import block_sizes
from tests.test_memory import temporaries

pytestmark = pytest.mark.cpu

SHAPES = {"2048x256x32768": (2048, 256, 32768), "1024x512x65536": (1024, 512, 65536)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
LIMIT = 18 * 10**6


def used(rows, width, classes, dtype=jnp.float32, class_axis=1, reduction="mean", **options):
    def loss(hidden, kernel, labels, cotangent):
        losses = ce_jax.linear_softmax_cross_entropy(
            hidden, kernel, labels, class_axis=class_axis, reduction=reduction, **options
        )
        return jnp.vdot(cotangent, losses) if reduction == "none" else losses

    kernel = (width, classes) if class_axis == 1 else (classes, width)
    return temporaries(
        jax.value_and_grad(loss, (0, 1)),
        ((rows, width), dtype),
        (kernel, dtype),
        ((rows,), jnp.int32),
        ((rows,), jnp.float32),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_shape
def test_value_and_gradients_of_all(shape, reduction):
    """Also of rows with cotangents of their own; dense logits alone would take 268 MB."""
    assert used(*shape, reduction=reduction) <= LIMIT


@every_shape
def test_it_does_not_grow_with_the_classes(shape):
    """Fourfold."""
    rows, width, classes = shape
    assert used(rows, width, 4 * classes) <= LIMIT


def test_a_ragged_block_is_not_held_beside_the_others():
    """50257 classes in blocks of 3968 and a rest, which behind their loop would take 17 MB."""
    assert used(1024, 256, 50257) <= 13 * 10**6


def test_no_block_rewrites_a_narrow_gradient():
    """XLA for a CPU would convert all of it each time, so that the time grew with V squared."""

    def loss(hidden, kernel, labels):
        return jnp.sum(ce_jax.linear_softmax_cross_entropy(hidden, kernel, labels))

    arrays = (((1024, 64), "bfloat16"), ((64, 32768), "bfloat16"), ((1024,), "int32"))
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays]
    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).as_text()
    written = re.findall(r"dynamic_update_slice .*?: \(tensor<64x32768x(\w+)>", text)
    assert written == ["f32"]


@every_shape
def test_an_embedding_table_is_not_transposed(shape):
    assert used(*shape, class_axis=0) <= LIMIT


OPTIONS = {
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.1},
    "logit_soft_cap": {"logit_soft_cap": 30.0},
    "ignore_index": {"ignore_index": -1},
    "num_classes": {"num_classes": 32000},
    "bias": {"bias": jnp.ones(32768)},
    "weight": {"weight": jnp.ones(32768)},
    "forward_mode": {"forward_mode": True},
}


@pytest.mark.usefixtures("one_device")  # several read the sums of smoothing one by one
@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_takes_a_second_block(option):
    """XLA may hold one more array of the size of the logits' block, which is half the budget."""
    shape = SHAPES["2048x256x32768"]
    assert used(*shape, **OPTIONS[option]) <= used(*shape) + 8 * 10**6


def test_forward_mode_has_the_same_memory():
    """Its reverse mode recomputes blocks instead of storing them."""
    rows, width, classes = 512, 64, 8192
    options = {"memory_budget": 2 * 10**6, "forward_mode": True}
    assert used(rows, width, classes, **options) <= 8 * 10**6
    assert 4 * rows * classes > 16 * 10**6


@pytest.mark.parametrize("by_token", [False, True])
def test_a_budget_is_kept(monkeypatch, by_token):
    """Blocks fit it, whichever way the work is divided."""
    monkeypatch.setattr(block_sizes, "_FEWEST_TOKENS", 64)
    rows, width, classes = 1024, 32, 8192
    for budget in (6 * 10**6, 12 * 10**6, 24 * 10**6):
        assert block_sizes.token_block(rows, classes, 8, budget) is not None
        reduction = "sum" if by_token else "none"
        kernel = 4 * width * classes
        spent = used(rows, width, classes, reduction=reduction, memory_budget=budget)
        assert spent <= 1.1 * budget + by_token * kernel + 10**6


def test_a_tile_has_an_index_of_32_bits():
    """However large the budget."""
    for rows, classes in ((2**20, 2**18), (2**14, 2**18), (2**18, 2**14), (3, 2**30)):
        assert block_sizes.class_block(rows, classes, 6, 2**60) * rows < 2**31
        assert (block_sizes.token_block(rows, classes, 6, 2**60) or 0) * classes < 2**31


def test_blocks_fit_the_budget_and_are_even():
    """No block is larger than allowed, and the last is no sliver but by rounding."""
    assert block_sizes._block(7936, 256000) == 6400
    for total in (*range(1, 40), 127, 128, 129, 1000, 50257, 128256, 151936, 256000):
        for most in (1, 2, 3, 7, 127, 128, 129, 255, 1000, 4096, 10**6):
            size = block_sizes._block(most, total)
            assert 1 <= size <= min(most, total)
            aligned = most >= 128 and size < total
            assert not aligned or size % 128 == 0
            blocks = -(-total // size)
            assert aligned or total - (blocks - 1) * size > size - blocks
