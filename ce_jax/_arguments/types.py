"""Types of arguments and results, with short names for signatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    cast,
    overload,
    runtime_checkable,
)

import jax.typing
from jaxtyping import Array, Float

from ..ratio import Ratio

# As in NumPy: an array, a number, or a nested list of numbers.
ArrayLike: TypeAlias = jax.typing.ArrayLike | list[Any] | tuple[Any, ...]
# A number, traced or not. The type is wide, so that our own checks find a wrong shape or dtype.
Scalar: TypeAlias = jax.typing.ArrayLike
Axes: TypeAlias = int | Sequence[int] | None
_ToArray: TypeAlias = Literal["none", "sum", "mean"]
Reduction: TypeAlias = Literal["none", "sum", "mean", "ratio"]
if TYPE_CHECKING:  # `reducible` says when it is a ratio
    Loss: TypeAlias = Float[Array, "..."]
else:
    Loss = Float[Array, "..."] | Ratio

# Type checkers take the first overload that fits. The last overload accepts every call with the
# arguments of the loss; mypy is told to ignore this overlap.
_P = ParamSpec("_P")
_Statistics = TypeVar("_Statistics", covariant=True)


@runtime_checkable
class Reducible(Protocol[_P]):
    """A loss: an array or, as a ratio, total and denominator."""

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, *args: Any, reduction: Literal["ratio"], **options: Any
    ) -> Ratio: ...
    @overload
    def __call__(self, *args: _P.args, **options: _P.kwargs) -> Array: ...


@runtime_checkable
class WithStatistics(Protocol[_P, _Statistics]):
    """A loss, and statistics beside it if they are asked for."""

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self,
        *args: Any,
        reduction: Literal["ratio"],
        return_statistics: Literal[True],
        **options: Any,
    ) -> tuple[Ratio, _Statistics]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self,
        *args: Any,
        reduction: Literal["ratio"],
        return_statistics: Literal[False] = False,
        **options: Any,
    ) -> Ratio: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self,
        *args: Any,
        reduction: _ToArray = "none",
        return_statistics: Literal[True],
        **options: Any,
    ) -> tuple[Array, _Statistics]: ...
    @overload
    def __call__(
        self,
        *args: Any,
        reduction: _ToArray = "none",
        return_statistics: Literal[False],
        **options: Any,
    ) -> Array: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self,
        *args: Any,
        reduction: _ToArray = "none",
        return_statistics: bool,
        **options: Any,
    ) -> Array | tuple[Array, _Statistics]: ...
    @overload
    def __call__(self, *args: _P.args, **options: _P.kwargs) -> Array: ...


def reducible(loss: Callable[_P, Array]) -> Reducible[_P]:
    """Tells type checkers which `reduction` of a loss gives what."""
    return cast(Reducible[_P], loss)


def with_statistics(
    loss: Callable[_P, Array | tuple[Array, _Statistics]],
) -> WithStatistics[_P, _Statistics]:
    """The same of a loss that can return statistics."""
    return cast(WithStatistics[_P, _Statistics], loss)
