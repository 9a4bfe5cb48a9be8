"""Losses of global arrays that are spread over a mesh of devices."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from . import (
    distillation,
    jensen_shannon,
    linear,
    linear_statistics,
    softmax,
    statistics,
    top_k,
)
from ._arguments import checks, placement, reductions
from ._arguments.compiled import array, check_constant
from ._arguments.options import not_zero, soft_cap, temperature
from ._rows import sharded
from ._rows.blocks import with_slope_of
from ._rows.sharded import psum

# Of overloaded functions this keeps all signatures.
_Function = TypeVar("_Function", bound=Callable[..., Any])

_OF_LOGITS: tuple[Callable[..., Any], ...] = (
    softmax.softmax_cross_entropy_with_integer_labels,
    softmax.softmax_cross_entropy,
    statistics.softmax_statistics,
    distillation.distillation_loss,
    jensen_shannon.jensen_shannon_loss,
    top_k.top_k_distillation_loss,
)
_OF_LAYER: tuple[Callable[..., Any], ...] = (
    linear.linear_softmax_cross_entropy,
    linear_statistics.linear_softmax_statistics,
    distillation.linear_distillation_loss,
    jensen_shannon.linear_jensen_shannon_loss,
    top_k.linear_top_k_distillation_loss,
)
_TRACED = (
    *("logits", "hidden", "kernel", "labels", "bias"),
    *("weight", "sample_weight", "where", "temperature"),
    *("teacher_logits", "teacher_hidden", "teacher_kernel", "teacher_bias"),
    *("teacher_ids", "teacher_log_probs"),
    *("label_smoothing", "z_loss", "logit_soft_cap", "teacher_logit_soft_cap", "beta"),
)
# What the functions check of a value they know, before it is traced.
_CHECKS: dict[str, Callable[..., Any]] = {
    "axis": checks.static_axis,
    "reduction_axis": functools.partial(checks.hashable_axes, "reduction_axis"),
    "label_smoothing": functools.partial(not_zero, "label_smoothing", high=1.0),
    "z_loss": functools.partial(not_zero, "z_loss"),
    "temperature": temperature,
    "beta": jensen_shannon.beta_option,
    **{
        name: functools.partial(soft_cap, name)
        for name in ("logit_soft_cap", "teacher_logit_soft_cap")
    },
    **{
        name: functools.partial(checks.int_option, name)
        for name in ("class_axis", "teacher_class_axis")
    },
    **{
        name: functools.partial(checks.integer_option, name)
        for name in ("ignore_index", "num_classes")
    },
    "memory_budget": checks.memory_budget,
}


def on_mesh(
    function: _Function,
    mesh: Mesh | AbstractMesh | None,
    *,
    rows: str | tuple[str, ...] | PartitionSpec | None = None,
    classes: str | None = None,
    width: str | tuple[str, ...] | None = None,
) -> _Function:
    r"""Runs a softmax loss, or its statistics, on global arrays that are sharded over a mesh.

    Let :math:`\mathcal{D}` be the devices. Each device holds some rows and some classes:

    .. math::
      \mathrm{lse}_i = \log \sum_{d \in \mathcal{D}} \sum_{c \in d} e^{z_{ic}}, \qquad
      L = \sum_{d \in \mathcal{D}} \sum_{i \in d} \ell_i

    With every option the result is that of `function` on one device. Sharded rows are data (or
    sequence) parallelism, sharded classes are tensor (vocabulary) parallelism, and `rows` with
    `width` is FSDP of the kernel. All three can be combined. Each device computes its part inside
    one `jax.shard_map`. The devices exchange a few numbers per row; for the linear form see also
    the table of costs in the documentation. Nothing is exchanged inside a loop over blocks. The
    parts of a gradient are added up in the dtype of its argument.

    Args:
      function: `softmax_cross_entropy_with_integer_labels`, `softmax_cross_entropy`,
        `softmax_statistics`, `distillation_loss`, `top_k_distillation_loss`, `jensen_shannon_loss`,
        or the linear form of one of them.
      mesh: its axes may be of type Auto or Explicit. None: the mesh of `jax.set_mesh` at the time
        of the call.
      rows: mesh axis or axes over which the rows are sharded: a name or a tuple of names for the
        first axis of the loss, or a `PartitionSpec` for its leading axes.
      classes: mesh axis over which the classes are sharded: the classes of the logits (the first
        class axis, if there are several) or of the kernel. Bias, class weights, a `where` over
        classes, and labels that hold a number for each class are sharded with them. Pad the
        classes of a teacher like those of the student.
      width: for the linear form: mesh axis or axes over which the kernel's other axis, D, is
        sharded. They must be among those of `rows`. The kernel, and that of a teacher, is gathered
        along this axis once, in the dtype of the hidden states. Its gradient is reduced and
        scattered in the dtype of the kernel.

    Returns:
      A function with the arguments of `function` except `axis_name`. It takes whole (global)
      arrays, also under `jit`, `grad` and `vmap`; outside `jit` it runs one cached executable.
      Losses and statistics of rows are sharded like the rows, and a sum or mean is on all devices.
      Arguments and gradients are sharded as described above; JAX moves arguments that are placed
      differently at each call.

    Raises:
      TypeError: for another function, a `mesh` that is not a mesh, or an axis that is not a name.
      ValueError: for an axis that the mesh does not have, or that is named twice; when called, for
        `axis_name`, for symbolic sizes (`jax.export`), and for rows, classes or a width that do not
        divide evenly among the devices.

    Example:
      >>> import jax, jax.numpy as jnp, ce_jax
      >>> mesh = jax.make_mesh((1, jax.device_count()), ("data", "model"))
      >>> loss = ce_jax.on_mesh(
      ...     ce_jax.softmax_cross_entropy_with_integer_labels, mesh, rows="data", classes="model"
      ... )
      >>> logits = jnp.zeros((2, 4 * jax.device_count()))
      >>> total = loss(logits, jnp.array([0, 3]), reduction="mean")
      >>> print(jnp.allclose(jnp.exp(total), 4 * jax.device_count()))
      True

    References:
      Shoeybi et al., `Megatron-LM`, 2019 (classes); Zhao et al., `PyTorch FSDP`, 2023 (width).
    """
    if function not in _OF_LOGITS + _OF_LAYER:
        raise TypeError(
            f"function must be one of {[f.__name__ for f in _OF_LOGITS + _OF_LAYER]} of ce_jax "
            f"itself (its options are given when it is called), got {function!r}"
        )
    if width is not None and function not in _OF_LAYER:
        raise ValueError(f"width is for functions of a kernel; {function.__name__} has no kernel")
    fixed = None if mesh is None else placement.plan(mesh, rows, classes, width)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["axis_name"] is not None:
            raise ValueError("axis_name is for use inside jax.shard_map; write classes= in on_mesh")
        options = {
            name: _CHECKS[name](value) if name in _CHECKS else value
            for name, value in bound.arguments.items()
            if name != "axis_name"
        }
        for name, value in options.items():
            check_constant(name, signature.parameters[name].annotation, value)
        arrays = {k: array(k, x) for k, x in options.items() if k in _TRACED and x is not None}
        static = tuple((k, x) for k, x in options.items() if k not in _TRACED)
        plan = fixed
        if plan is None:
            plan = placement.plan(jax.sharding.get_abstract_mesh(), rows, classes, width)
        return _run(_Task(function, plan, static), arrays)

    return cast(_Function, call)


class _Task(NamedTuple):
    """What is fixed when the function is compiled.

    Attributes:
      function: the function to run on each device.
      plan: what is spread over which mesh axes.
      options: its static options, with their names.
    """

    function: Callable[..., Any]
    plan: placement.Plan
    options: tuple[tuple[str, Any], ...]


@functools.partial(jax.jit, static_argnames=("task",), inline=True)
def _run(task: _Task, arrays: dict[str, Array]) -> Any:
    plan, options = task.plan, dict(task.options)
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    # Checks the global arguments, so that errors show their shapes, not those of one device.
    whole = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays.items()}
    # Without a mesh: before jax 0.9, arrays made inside a loop would be on the mesh in use, and
    # these arguments are not.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        jax.eval_shape(functools.partial(task.function, **options), **whole)
    shapes = {name: x.shape for name, x in arrays.items()}
    if not all(isinstance(size, int) for shape in shapes.values() for size in shape):
        raise ValueError(
            f"on_mesh needs shapes that are known, got {shapes}: JAX exports jax.shard_map with "
            "symbolic sizes, but the program crashes; export one program for each size"
        )
    if task.function in _OF_LAYER:
        axes = options["class_axis"], options.get("teacher_class_axis", -1)
        specs, rows = placement.of_layer(plan, shapes, *axes)
    else:
        soft = task.function is softmax.softmax_cross_entropy
        specs, rows = placement.of_logits(plan, shapes, options["axis"], soft=soft)
    placement.check_divisible(plan, shapes, specs)

    names = tuple(arrays)
    place = placement.placer(plan)
    by_row = PartitionSpec(*rows)
    reducer = _reducer(options)
    reduced = () if reducer.kind == "none" else reducer.axes(len(rows))
    over = tuple(name for a in reduced for name in placement.names(rows[a]))
    loss = PartitionSpec(*(entry for a, entry in enumerate(rows) if a not in reduced))
    return jax.shard_map(
        lambda *parts: _local(task, over, dict(zip(names, parts, strict=True))),
        mesh=plan.mesh,
        in_specs=tuple(PartitionSpec(*specs[name]) for name in names),
        out_specs=(loss, by_row) if options.get("return_statistics") else loss,
    )(*(place(arrays[name], specs[name]) for name in names))


def _reducer(options: dict[str, Any]) -> reductions.Reducer:
    return reductions.reducer(options.get("reduction", "none"), options.get("reduction_axis"))


def _gathered(plan: placement.Plan, kernel: Array, dtype: DTypeLike, axis: int) -> Array:
    """The kernel, whole along this axis, gathered in the narrow dtype of the hidden states."""
    # Cast before gathering. In the derivative, the sum over the other row axes then comes after
    # the reduce-scatter, and sums only this device's part.
    kernel = sharded.vary(kernel, plan.row_axes)
    gather = functools.partial(jax.lax.all_gather, axis_name=plan.width, axis=axis, tiled=True)
    narrow = kernel.astype(dtype)
    if narrow.dtype == kernel.dtype:
        return gather(kernel)
    # Its gradient is summed in the wide dtype.
    read = jax.lax.stop_gradient(gather(narrow)).astype(kernel.dtype)
    return with_slope_of(gather(kernel), read)


def _local(task: _Task, over: tuple[str, ...], parts: dict[str, Array]) -> Any:
    """What each device does with its parts of the arrays.

    Its loss is that of its rows; `over` are the mesh axes over which rows that are reduced lie.
    """
    plan, options = task.plan, dict(task.options)
    if plan.width:
        for prefix in ("", "teacher_"):
            if f"{prefix}kernel" in parts:
                kernel = _gathered(
                    plan,
                    parts[f"{prefix}kernel"],
                    parts[f"{prefix}hidden"].dtype,
                    1 - options[f"{prefix}class_axis"] % 2,
                )
                parts = {**parts, f"{prefix}kernel": kernel}
    reducer = _reducer(options)
    if reducer.kind == "mean":
        options["reduction"] = "ratio"  # ratios add up over the devices
    found = task.function(**parts, **options, axis_name=plan.classes)
    if reducer.kind == "none":
        return found
    loss, *others = found if options.get("return_statistics") else (found,)
    loss = psum(loss, over)
    if reducer.kind == "mean":
        loss = loss.mean()
    return (loss, *others) if others else loss
