"""What stands for an array in every public function, and what looks as if it did."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

import ce_jax
from tests.arguments import ARGUMENTS

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

OF_ARRAYS = [
    (function, name)
    for function, arguments in ARGUMENTS.items()
    for name, x in arguments.items()
    if isinstance(x, np.ndarray)
]


class Parameter:
    """As a parameter of Flax NNX: an array for JAX; if that is traced, NumPy cannot have it."""

    def __init__(self, x):
        self.x = x

    def __jax_array__(self):
        return self.x

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.x, dtype)


class Pair(NamedTuple):
    first: np.ndarray
    second: np.ndarray


@pytest.mark.parametrize("function", ARGUMENTS)
def test_parameters_of_a_model(function):
    """Under `jit`, all arrays at once."""
    call, arguments = getattr(ce_jax, function), ARGUMENTS[function]
    arrays = {k: x for k, x in arguments.items() if isinstance(x, np.ndarray)}

    def run(arrays, wrap):
        return call(**arguments | {k: wrap(x) for k, x in arrays.items()})

    found = jax.jit(lambda arrays: run(arrays, Parameter))(arrays)
    wanted = jax.jit(lambda arrays: run(arrays, lambda x: x))(arrays)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(("function", "name"), OF_ARRAYS)
def test_a_named_tuple_is_no_array(function, name):
    """Statistics in the place of one of their fields would be stacked."""
    x = ARGUMENTS[function][name]
    with pytest.raises(TypeError, match=f"{name} must be .*Pair.*first, second"):
        getattr(ce_jax, function)(**ARGUMENTS[function] | {name: Pair(x, x)})
