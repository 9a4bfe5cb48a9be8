"""What several test modules share: problems to solve, and counters."""

import contextlib
import itertools
import random

import jax
import jaxtyping
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from tests import reference

# (shape of the logits, class axis): last, first, in the middle, a tuple out of order, no batch.
LAYOUTS = {
    "last": ((5, 4), -1),
    "first": ((4, 5), 0),
    "middle": ((2, 4, 3), 1),
    "tuple": ((2, 3, 2), (2, 0)),
    "vector": ((4,), -1),
}
# A row that does not count may hold anything.
GARBAGE = (np.nan, np.inf, -np.inf, 7.0)


def covering(seed=0, **options):
    """Few combinations among which every two options meet in all pairs of their values."""
    names, chosen, choose = list(options), [], random.Random(seed)
    missing = {
        tuple(zip(pair, values, strict=True)): None
        for pair in itertools.combinations(names, 2)
        for values in itertools.product(*(range(len(options[name])) for name in pair))
    }

    def newly_met(candidate):
        return [pair for pair in itertools.combinations(candidate.items(), 2) if pair in missing]

    while missing:
        wanted = dict(next(iter(missing)))
        fills = (
            {name: wanted.get(name, choose.randrange(len(options[name]))) for name in names}
            for _ in range(30)
        )
        best = max(fills, key=lambda fill: len(newly_met(fill)))
        for pair in newly_met(best):
            del missing[pair]
        chosen.append({name: options[name][index] for name, index in best.items()})
    return chosen


def combinations(**options):
    """All combinations of the values of the options."""
    return [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]


def named(case):
    """A readable test id: the options that are set."""
    return "-".join(
        name if value is True else f"{name}={value}"
        for name, value in case.items()
        if value is not None and value is not False
    )


def in_layout(rows, shape, axis):
    """Inverse of moving the class axes last: [..., C] back to the layout of the logits."""
    order = reference._class_last(np.arange(np.prod(shape, dtype=int)).reshape(shape), axis)
    out = np.empty(order.size, rows.dtype)
    out[order] = rows
    return out.reshape(shape)


def softmax_arguments(
    *,
    layout="last",
    soft=False,
    where=None,
    weight=False,
    sample_weight=False,
    ignore_index=None,
    masked=False,
    temperature=None,
    seed=0,
    **options,
):
    """Logits, labels and the options asked for, with rows that do not count holding garbage."""
    shape, axis = LAYOUTS[layout]
    draw = np.random.default_rng(seed)
    logits = reference._class_last(2 * draw.normal(size=shape), axis)
    *batch, classes = logits.shape
    labels = draw.integers(classes, size=batch)
    is_label = labels[..., None] == np.arange(classes)
    targets = draw.uniform(0.1, 1.5, size=logits.shape)

    counts = np.ones(batch, bool)
    allowed = np.ones(logits.shape, bool)
    if where == "rows":
        counts &= draw.random(batch) < 0.7
        options["where"] = counts.copy()
    if where == "classes":
        allowed &= is_label | (draw.random(logits.shape) < 0.7)
        if batch:
            allowed[(0,) * len(batch)] = counts[(0,) * len(batch)] = False
        options["where"] = in_layout(allowed, shape, axis)
    if ignore_index is not None and not soft:
        if batch:
            labels[(-1,) * len(batch)] = ignore_index
        counts &= labels != ignore_index
        options["ignore_index"] = ignore_index
    if masked:
        hidden = ~is_label & (draw.random(logits.shape) < 0.4)
        logits[hidden] = -np.inf
        allowed &= ~hidden
    targets[~allowed] = 0.0
    logits[~counts] = np.resize(GARBAGE, classes)

    if weight:
        options["weight"] = draw.uniform(0.5, 2.0, size=classes)
    if temperature == "one":
        options["temperature"] = np.array(0.7)
    if temperature == "rows":
        options["temperature"] = draw.uniform(0.5, 2.0, size=batch)
    if sample_weight:
        weights = draw.uniform(0.5, 2.0, size=batch)
        if batch:
            weights[(1,) * len(batch)] = 0.0
        options["sample_weight"] = weights
    return {
        "logits": in_layout(logits, shape, axis),
        "labels": in_layout(targets, shape, axis) if soft else labels,
        "axis": axis,
        **options,
    }


# A wrong name or type of an option, where the suite checks annotations, which speak first.
WRONG_NAME = (ValueError, jaxtyping.TypeCheckError)


def only_type_checked(raised):
    """Whether the check of the annotations, which is the suite's own, spoke before the library."""
    return isinstance(raised.value, jaxtyping.TypeCheckError)


_watching = []


def _listen(event, duration, **kwargs):
    del duration, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        for seen in _watching:
            seen.append(event)


# Once: not every supported JAX lets a listener be taken away again.
jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def compilations():
    """Counts the programs XLA compiles inside the block: `with compilations() as seen: ...`."""
    seen = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching[:] = [other for other in _watching if other is not seen]


def inner_programs(eqn):
    """The programs among the parameters of an equation, e.g. the body of a loop."""
    kinds = (Jaxpr, ClosedJaxpr)
    leaves = jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, kinds))
    return [getattr(x, "jaxpr", x) for x in leaves if isinstance(x, kinds)]
