"""What is measured: operations, shapes, and the inputs that all peers share."""

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
}
EAGER = "eager "
# Class ids, one of them with a logit that is this much too low.
UNLIKELY, TOO_LOW = "unlikely", 100.0
# The label of rows that do not count, and how many of them there are.
IGNORED, IGNORED_SHARE = -100, 0.2

SHAPES = ((128, 10), (65536, 10), (16384, 100), (8192, 1000), (1024, 32768), (512, 131072))
LINEAR_SHAPES = ((2048, 256, 32768), (1024, 512, 65536))
EAGER_SHAPES = ((128, 10), (8192, 1000))
DTYPES = ("float32", "bfloat16")

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

        def normal(*shape: int) -> np.ndarray:
            return draw.standard_normal(shape, np.float32)

        if self.operation == "ignored":
            labels[draw.random(self.rows) < IGNORED_SHARE] = IGNORED
        arrays: dict[str, np.ndarray] = {"labels": labels}
        if "logits" in names:
            arrays["logits"] = 3 * normal(self.rows, self.classes)
        if self.operation == UNLIKELY:
            arrays["logits"][-1, labels[-1]] -= TOO_LOW
        if "probs" in names:
            arrays["probs"] = np.zeros((self.rows, self.classes), np.float32)
            np.put_along_axis(arrays["probs"], labels[:, None], 1.0, axis=1)
        if "targets" in names:
            arrays["targets"] = (normal(self.rows, self.classes) > 0).astype(np.float32)
        if "weight" in names:
            arrays["weight"] = draw.uniform(0.5, 2.0, self.classes).astype(np.float32)
        if "hidden" in names:
            arrays["hidden"] = normal(self.rows, self.features)
            arrays["kernel"] = normal(self.features, self.classes) * self.features**-0.5
        return {name: arrays[name] for name in names}


def table(operations: Sequence[str], quick: bool) -> list[Problem]:
    """The problems of the table, for these operations."""
    problems = []
    dense_shapes = QUICK_SHAPES if quick else SHAPES
    for operation in operations:
        if operation == "linear":
            shapes = QUICK_LINEAR_SHAPES if quick else LINEAR_SHAPES
            problems += [Problem("linear", n, v, "float32", d) for n, d, v in shapes]
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


def scaling(operations: Sequence[str], quick: bool) -> list[Problem]:
    """The problems of the scaling curves, for these operations."""
    problems = []
    top = 13 if quick else 19
    if "integer" in operations:
        classes = [2**k for k in range(10, top + 1, 3 if quick else 1)]
        problems += [Problem("integer", 64, v, group="classes") for v in classes]
        rows = [2**k for k in range(6, (9 if quick else 16) + 1, 2)]
        problems += [Problem("integer", n, 1024, group="rows") for n in rows]
    if "linear" in operations:
        classes = [2**k for k in range(10, top + 1, 3 if quick else 1)]
        problems += [Problem("linear", 256, v, "float32", 128, "classes") for v in classes]
        rows = [2**k for k in range(6, (8 if quick else 13) + 1, 2 if quick else 1)]
        problems += [Problem("linear", n, 8192, "float32", 128, "rows") for n in rows]
    return problems
