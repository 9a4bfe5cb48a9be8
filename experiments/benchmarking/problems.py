"""What is measured: operations, shapes, and the inputs that all peers share."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SMOOTHING = 0.1
ENTROPY_BONUS = 0.01

# Which arrays an operation takes, and with respect to how many of them it is differentiated.
ARGUMENTS = {
    "integer": (("logits", "labels"), 1),
    "one-hot": (("logits", "probs"), 1),
    "ignored": (("logits", "labels"), 1),
    "weighted": (("logits", "labels", "weight"), 1),
    "smoothed": (("logits", "labels"), 1),
    "sigmoid": (("logits", "targets"), 1),
    "statistics": (("logits", "labels"), 1),
    "linear": (("hidden", "kernel", "labels"), 2),
    "masked": (("hidden", "kernel", "labels"), 2),
    "mixed": (("hidden", "kernel", "labels"), 2),
}
# Those of a linear layer.
LINEAR = ("linear", "masked", "mixed")
# Its kernel is float32, as optimisers keep it, and what it is multiplied with is narrow.
MIXED = "mixed"
EAGER = "eager "
# Class ids, one of them with a logit that is this much too low.
UNLIKELY, TOO_LOW = "unlikely", 100.0
# The label of rows that do not count, and how many of them there are.
IGNORED, IGNORED_SHARE = -100, {"ignored": 0.2, "masked": 0.75}

SHAPES = ((128, 10), (65536, 10), (16384, 100), (8192, 1000), (1024, 32768), (512, 131072))
LINEAR_SHAPES = ((2048, 256, 32768), (1024, 512, 65536))
EAGER_SHAPES = ((128, 10), (8192, 1000))
DTYPES = ("float32", "bfloat16")

# An accelerator is done with less before the next call reaches it. Libraries differ in what their
# float32 products round to there, so the linear form is bfloat16.
ACCELERATOR_SHAPES = ((8192, 1000), (8192, 32768), (2048, 131072))
ACCELERATOR_LINEAR_SHAPES = ((8192, 2304, 256000), (8192, 4096, 128256))

QUICK_SHAPES = ((128, 10), (2048, 1000))
QUICK_LINEAR_SHAPES = ((512, 64, 8192),)


class Problem(NamedTuple):
    """One operation at one shape.

    Attributes:
      operation: a key of `ARGUMENTS`, or one behind `EAGER`: not under `jit`; or `UNLIKELY`.
      rows: examples or tokens.
      classes: classes, or independent binary questions.
      dtype: of logits, or of hidden states and kernel.
      features: width of the hidden states; 0 without a linear layer.
      group: the table, or the picture, that this belongs to.
    """

    operation: str
    rows: int
    classes: int
    dtype: str = "float32"
    features: int = 0
    group: str = "table"

    @property
    def formula(self) -> str:
        """The operation, whether it is compiled or not, and whatever the numbers."""
        if self.operation == UNLIKELY:
            return "integer"
        return self.operation.removeprefix(EAGER)

    @property
    def is_eager(self) -> bool:
        """Whether the calls are not under `jit`."""
        return self.operation.startswith(EAGER)

    def dtype_of(self, name: str) -> str:
        """The dtype of one of the arrays."""
        if name == "labels":
            return "int32"
        wide = name == "weight" or (name == "kernel" and self.operation == MIXED)
        return "float32" if wide else self.dtype

    @property
    def shape(self) -> str:
        """The shape in words of few letters."""
        if self.features:
            return f"{self.rows}x{self.features}x{self.classes}"
        return f"{self.rows}x{self.classes}"

    def inputs(self) -> dict[str, np.ndarray]:
        """The arrays that the operation takes, by name, floats as float32."""
        draw = np.random.default_rng(0)
        names, _ = ARGUMENTS[self.formula]
        labels = draw.integers(0, self.classes, self.rows, dtype=np.int32)
        if self.operation in IGNORED_SHARE:
            labels[draw.random(self.rows) < IGNORED_SHARE[self.operation]] = IGNORED
        arrays: dict[str, np.ndarray] = {"labels": labels}
        if "logits" in names:
            arrays["logits"] = 3 * _normal(self.rows, self.classes)
        if self.operation == UNLIKELY:
            arrays["logits"][-1, labels[-1]] -= TOO_LOW
        if "probs" in names:
            arrays["probs"] = np.zeros((self.rows, self.classes), np.float32)
            np.put_along_axis(arrays["probs"], labels[:, None], 1.0, axis=1)
        if "targets" in names:
            arrays["targets"] = (_normal(self.rows, self.classes, seed=1) > 0).astype(np.float32)
        if "weight" in names:
            arrays["weight"] = draw.uniform(0.5, 2.0, self.classes).astype(np.float32)
        if "hidden" in names:
            arrays["hidden"] = _normal(self.rows, self.features)
            arrays["kernel"] = _normal(self.features, self.classes, seed=1) * self.features**-0.5
        return {name: arrays[name] for name in names}


# The same for most operations, and of large ones it takes seconds.
@functools.lru_cache(maxsize=8)
def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32)
    numbers.flags.writeable = False
    return numbers


def table(operations: Sequence[str], quick: bool, *, on_accelerator: bool = False) -> list[Problem]:
    """The problems of the table, for these operations."""
    problems = []
    dense_shapes: Sequence[tuple[int, int]] = SHAPES
    linear_shapes: Sequence[tuple[int, int, int]] = LINEAR_SHAPES
    if on_accelerator:
        dense_shapes, linear_shapes = ACCELERATOR_SHAPES, ACCELERATOR_LINEAR_SHAPES
    if quick:
        dense_shapes, linear_shapes = QUICK_SHAPES, QUICK_LINEAR_SHAPES
    linear_dtype = "bfloat16" if on_accelerator else "float32"
    for operation in operations:
        if operation == MIXED and not (on_accelerator or quick):
            continue  # a CPU has no fast products of narrow numbers
        if operation in LINEAR:
            dtype = "bfloat16" if operation == MIXED else linear_dtype
            problems += [Problem(operation, n, v, dtype, d) for n, d, v in linear_shapes]
        elif operation == "eager":
            shapes_ = QUICK_SHAPES if quick else EAGER_SHAPES
            problems += [
                Problem(EAGER + formula, *shape)
                for formula in ("integer", "sigmoid")
                for shape in shapes_
            ]
        elif operation == UNLIKELY:
            problems += [Problem(UNLIKELY, *shape) for shape in dense_shapes[1:]]
        elif operation in ARGUMENTS:
            dtypes = DTYPES if operation == "integer" or not quick else DTYPES[:1]
            problems += [
                Problem(operation, *shape, dtype) for shape in dense_shapes for dtype in dtypes
            ]
    return problems


def scaling(quick: bool) -> list[Problem]:
    """The problems of the scaling curves."""
    classes = [2**k for k in range(10, (13 if quick else 19) + 1, 3 if quick else 1)]
    problems = [Problem("integer", 64, v, group="classes") for v in classes]
    rows = [2**k for k in range(6, (9 if quick else 16) + 1, 2)]
    problems += [Problem("integer", n, 1024, group="rows") for n in rows]
    problems += [Problem("linear", 256, v, "float32", 128, "classes") for v in classes]
    rows = [2**k for k in range(6, (8 if quick else 13) + 1, 2 if quick else 1)]
    problems += [Problem("linear", n, 8192, "float32", 128, "rows") for n in rows]
    return problems
