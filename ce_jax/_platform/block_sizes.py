"""Sizes of blocks: of tokens or classes in the linear form, of columns in all that has pairs.

A symbolic number of tokens (`jax.export`) has no value when the program is made. Blocks are then
those for a usual number, and how many there are is left to the program.
"""

from __future__ import annotations

import jax

# In smaller blocks, adding up the kernel's gradient costs more than the matmul that it saves.
_FEWEST_TOKENS = 1024
# Matrix units and vector registers want multiples of this.
_ALIGNMENT = 128
# Indices into a larger tile overflow 32 bits in XLA.
_LARGEST_TILE = 2**31 - 1
# What is taken for a symbolic number: a usual one of tokens in training.
_IF_UNKNOWN = 8192
# What a CPU's cache keeps; blocks of a quarter of it take little more time.
_ON_A_CPU = 17 * 10**6


def default_budget(kernel_bytes: int, logits: tuple[int, int] | None = None) -> int:
    """Bytes of temporaries: a third of the kernel's, within 256 MB and 1 GB; 17 MB on a CPU.

    On an H200 8192 bfloat16 tokens of width 2304 with 256000 classes take 74 to 66 ms in blocks of
    1920 to 12800 classes, and 52 ms in blocks of 1024 tokens, which need 2.4 GB to add up the
    kernel's gradient. Where that is the result itself, `logits` are the tokens and the bytes of
    each one's logits: it is a quarter of them within 1.3 GB, or 1024 tokens within 2 GB.
    """
    if jax.default_backend() == "cpu":
        mesh = jax.sharding.get_abstract_mesh()
        devices = mesh.size if mesh.manual_axes else 1  # manual: inside jax.shard_map
        return max(_ON_A_CPU // devices, _ON_A_CPU // 4)
    if logits is not None and _FEWEST_TOKENS * logits[1] <= 2 * 10**9:
        tokens, token_bytes = logits
        quarter = (tokens if isinstance(tokens, int) else _IF_UNKNOWN) * token_bytes // 4
        return max(min(quarter, 13 * 10**8), _FEWEST_TOKENS * token_bytes)
    return min(max(kernel_bytes // 3, 256 * 10**6), 10**9)


def class_block(tokens: int, classes: int, logit_bytes: int, budget: int) -> int:
    """The largest block of classes that fits the budget with so many bytes for each logit."""
    tokens, classes, entries = _known(tokens, classes, budget // logit_bytes)
    return _block(entries, tokens, classes)


def token_block(tokens: int, classes: int, logit_bytes: int, budget: int) -> int | None:
    """The same of tokens; None where so few fit that it would not pay."""
    tokens, classes, entries = _known(tokens, classes, budget // logit_bytes)
    pays = entries // classes >= min(tokens, _FEWEST_TOKENS)
    return _block(entries, classes, tokens) if pays else None


def _known(tokens: int, classes: int, entries: int) -> tuple[int, int, int]:
    tokens, classes = (n if isinstance(n, int) else _IF_UNKNOWN for n in (tokens, classes))
    return max(tokens, 1), classes, min(entries, _LARGEST_TILE)


def rows(tokens: int) -> int:
    """Rows per tile, where tiles without a row that counts are left out.

    On a CPU at most 512; five tiles or more of more than 800 rows. In each the block of the kernel
    is arranged again: 2048 rows take 1.03 of the time in 5 tiles, and a quarter of them 0.43.
    """
    tokens = max(tokens, 1) if isinstance(tokens, int) else _IF_UNKNOWN
    if jax.default_backend() != "cpu":
        return _block(_FEWEST_TOKENS, 1, tokens)
    return -(-tokens // max(-(-tokens // 512), min(-(-tokens // 200), 5)))


def _block(entries: int, across: int, total: int) -> int:
    """The size of blocks of at most `entries / across`, rounded for the hardware.

    One that leaves no ragged block, which would be compiled beside the loop, if that takes no more
    than a quarter off. Otherwise that of nearly equal blocks.
    """
    most = max(entries // across, 1)
    if most >= total:
        return total
    rounding = _ALIGNMENT if most >= _ALIGNMENT else 1
    most = most // rounding * rounding
    for size in range(most, most * 3 // 4, -rounding):
        if total % size == 0:
            return size
    even = -(-total // -(-total // most))
    return -(-even // rounding) * rounding


def gathers_wide() -> bool:
    """Whether an array to which blocks are written is to be in the dtype of sums.

    XLA for a CPU converts all of a narrow one each time. In float32, value and gradient of the
    linear form take 0.7 of the time of 32768 bfloat16 classes, of 131072 0.3.
    """
    return jax.default_backend() == "cpu"


def ragged_first() -> bool:
    """Whether a ragged block runs before the loop.

    After the loop, XLA may compute it early and hold it in memory. For a TPU it does not do so, but
    a block before the loop would make it copy the array that blocks are written to.
    """
    return jax.default_backend() != "tpu"
