"""Sizes of blocks: of tokens or classes in the linear form, of columns in all that has pairs.

A symbolic number of tokens (`jax.export`) has no value yet: blocks are those for a usual number.
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

    Blocks of tokens save a matmul, but need 2.4 GB to add up the gradient of a bfloat16 kernel of
    2304x256000. A float32 kernel's is added up in the result. Then `logits` are the tokens and the
    bytes of each one's: the budget is a quarter of all within 1.3 GB, or 1024 tokens' within 2 GB.
    """
    if jax.default_backend() == "cpu":
        mesh = jax.sharding.get_abstract_mesh()
        devices = mesh.size if mesh.manual_axes else 1  # manual: inside jax.shard_map
        return max(_ON_A_CPU // devices, _ON_A_CPU // 4)
    if logits is not None and _FEWEST_TOKENS * logits[1] <= 2 * 10**9:
        quarter = _known(logits[0]) * logits[1] // 4
        return max(min(quarter, 13 * 10**8), _FEWEST_TOKENS * logits[1])
    return min(max(kernel_bytes // 3, 256 * 10**6), 10**9)


def class_block(tokens: int, classes: int, logit_bytes: int, budget: int) -> int:
    """The largest block of classes that fits the budget with so many bytes for each logit."""
    return _block(_fitting(budget, logit_bytes, tokens), _known(classes))


def token_block(tokens: int, classes: int, logit_bytes: int, budget: int) -> int | None:
    """The same of tokens; None where so few fit that it would not pay."""
    most, tokens = _fitting(budget, logit_bytes, classes), _known(tokens)
    return _block(most, tokens) if most >= min(tokens, _FEWEST_TOKENS) else None


def _fitting(budget: int, logit_bytes: int, across: int) -> int:
    return min(budget // logit_bytes, _LARGEST_TILE) // _known(across)


def _known(size: int) -> int:
    return max(size, 1) if isinstance(size, int) else _IF_UNKNOWN


def rows(tokens: int) -> int:
    """Rows per tile, where tiles without a row that counts are left out.

    On a CPU at most 512, and five tiles of more than 800 rows: more take longer if all rows count.
    """
    tokens = _known(tokens)
    if jax.default_backend() != "cpu":
        return _block(_FEWEST_TOKENS, tokens)
    return -(-tokens // max(-(-tokens // 512), min(-(-tokens // 200), 5)))


def _block(most: int, total: int) -> int:
    """The size of blocks of at most so many, rounded for the hardware.

    The largest down to three quarters of `most` that divides the total; or of nearly equal blocks.
    """
    if most >= total:
        return total
    rounding = _ALIGNMENT if most >= _ALIGNMENT else 1
    most = max(most // rounding * rounding, 1)
    for size in range(most, most * 3 // 4, -rounding):
        if total % size == 0:
            return size
    even = -(-total // -(-total // most))
    return -(-even // rounding) * rounding


def gathers_wide() -> bool:
    """Whether blocks go to an array in the dtype of sums: a narrow one would be converted whole."""
    return jax.default_backend() == "cpu"


def ragged_first() -> bool:
    """Whether a ragged block runs before the loop: after it, XLA would hold one more in memory."""
    return jax.default_backend() != "tpu"  # there XLA would copy what blocks are written to
