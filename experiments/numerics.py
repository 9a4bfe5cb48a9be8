"""Measures the errors of losses and gradients, by dtype, beside those of optax and torch.

    python -m experiments.numerics

The truth is NumPy in float64, on the same inputs, which are rounded to the dtype first. torch takes
part where it is installed. The whole takes half a minute. `--out experiments/results/numerics`
replaces the tables that the documentation shows.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console

import ce_jax
from experiments.output import files
from experiments.output.errors import reported

TABLE_FILE, JSON_FILE = "table.md", "results.json"

SMOOTHING = 0.1
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = ((256, 10), (256, 1000), (16, 131072))
LINEAR_SHAPE = (256, 64, 8192)
QUICK_SHAPES = ((16, 10),)
QUICK_LINEAR_SHAPE = (16, 8, 64)
# Of the logits: models are surer than random weights are, and there errors are larger.
SCALE = 4.0


class Inputs(NamedTuple):
    """Arrays of one problem in one dtype, and the float64 values that they hold.

    Attributes:
      logits: `[rows, classes]`; for the linear form hidden states `[rows, width]`.
      kernel: `[width, classes]`, an array for the linear form, else None.
      labels: class ids `[rows]`.
      targets: distributions or numbers in [0, 1], `[rows, classes]`, float32.
    """

    logits: jax.Array
    kernel: Any
    labels: jax.Array
    targets: jax.Array


class Found(NamedTuple):
    """Losses of the rows (or elements) and the gradient of their sum by the logits or hidden."""

    losses: np.ndarray
    gradient: np.ndarray


class Row(NamedTuple):
    """One line of the table: errors of one peer at one problem."""

    operation: str
    shape: str
    dtype: str
    peer: str
    loss_error: float
    gradient_error: float


Measured = Callable[[Inputs], Found]


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _softmax(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-sum-exp and probabilities of each row."""
    top = z.max(-1, keepdims=True)
    exp = np.exp(z - top)
    return (top + np.log(exp.sum(-1, keepdims=True)))[:, 0], exp / exp.sum(-1, keepdims=True)


def _truth(operation: str, inputs: Inputs) -> Found:
    x = _wide(inputs.logits)
    z = x if inputs.kernel is None else x @ _wide(inputs.kernel)
    one_hot = (np.asarray(inputs.labels)[:, None] == np.arange(z.shape[-1])).astype(np.float64)
    if operation == "sigmoid":
        y = _wide(inputs.targets)
        losses = np.logaddexp(0.0, z) - y * z
        return Found(losses, 1 / (1 + np.exp(-z)) - y)
    target = {
        "soft labels": _wide(inputs.targets),
        "smoothed": (1 - SMOOTHING) * one_hot + SMOOTHING / z.shape[-1],
    }.get(operation, one_hot)
    lse, probs = _softmax(z)
    total = target.sum(-1)
    slope = total[:, None] * probs - target
    losses = total * lse - (target * z).sum(-1)
    return Found(losses, slope if inputs.kernel is None else slope @ _wide(inputs.kernel).T)


def _in_jax(loss: Callable[[jax.Array, Inputs], jax.Array]) -> Measured:
    def measure(inputs: Inputs) -> Found:
        def total(x: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
            losses = loss(x, inputs)
            return jnp.sum(losses.astype(jnp.float32)), losses

        # As an argument: XLA would spend its time on computing with constants.
        gradient, losses = jax.jit(jax.grad(total, has_aux=True))(inputs.logits, inputs)
        return Found(_wide(losses), _wide(gradient))

    return measure


def _in_torch(operation: str) -> Measured:
    torch = importlib.import_module("torch")
    functional = torch.nn.functional

    def tensor(x: jax.Array) -> Any:
        wide = torch.tensor(np.asarray(x.astype(jnp.float32)))
        return wide.to(getattr(torch, str(x.dtype)))

    def measure(inputs: Inputs) -> Found:
        x = tensor(inputs.logits).requires_grad_()
        z = x if inputs.kernel is None else x @ tensor(inputs.kernel)
        labels = torch.tensor(np.asarray(inputs.labels)).long()
        targets = tensor(inputs.targets.astype(inputs.logits.dtype))
        if operation == "sigmoid":
            losses = functional.binary_cross_entropy_with_logits(z, targets, reduction="none")
        elif operation == "soft labels":
            losses = functional.cross_entropy(z, targets, reduction="none")
        else:
            smoothing = SMOOTHING if operation == "smoothed" else 0.0
            losses = functional.cross_entropy(
                z, labels, reduction="none", label_smoothing=smoothing
            )
        losses.float().sum().backward()
        return Found(_wide(losses.detach().float()), _wide(x.grad.float()))

    return measure


def _one_hot(inputs: Inputs, dtype: Any) -> jax.Array:
    return jax.nn.one_hot(inputs.labels, inputs.logits.shape[-1], dtype=dtype)


def _linear(x: jax.Array, inputs: Inputs) -> jax.Array:
    return ce_jax.linear_softmax_cross_entropy(x, inputs.kernel, inputs.labels)


_IDS = ce_jax.softmax_cross_entropy_with_integer_labels
_OPTAX_IDS = optax.losses.softmax_cross_entropy_with_integer_labels
_PEERS: dict[str, dict[str, Callable[[jax.Array, Inputs], jax.Array]]] = {
    "class ids": {
        "ce_jax": lambda x, i: _IDS(x, i.labels),
        "optax": lambda x, i: _OPTAX_IDS(x, i.labels),
    },
    "smoothed": {
        "ce_jax": lambda x, i: _IDS(x, i.labels, label_smoothing=SMOOTHING),
        "optax": lambda x, i: optax.losses.softmax_cross_entropy(
            x, optax.losses.smooth_labels(_one_hot(i, x.dtype), SMOOTHING)
        ),
    },
    "soft labels": {
        "ce_jax": lambda x, i: ce_jax.softmax_cross_entropy(x, i.targets),
        "optax": lambda x, i: optax.losses.softmax_cross_entropy(x, i.targets.astype(x.dtype)),
    },
    "sigmoid": {
        "ce_jax": lambda x, i: ce_jax.sigmoid_binary_cross_entropy(x, i.targets),
        "optax": lambda x, i: optax.losses.sigmoid_binary_cross_entropy(
            x, i.targets.astype(x.dtype)
        ),
    },
    "linear": {
        "ce_jax": _linear,
        "optax": lambda x, i: _OPTAX_IDS(x @ i.kernel, i.labels),
    },
}


def _inputs(operation: str, shape: Sequence[int], dtype: str) -> Inputs:
    rng = np.random.default_rng(0)
    rows, classes = shape[0], shape[-1]
    kernel: Any = None
    x = SCALE * rng.normal(size=(rows, shape[1]))
    if operation == "linear":
        x = rng.normal(size=(rows, shape[1]))
        kernel = jnp.asarray(
            SCALE / np.sqrt(shape[1]) * rng.normal(size=(shape[1], classes)), dtype
        )
    targets = rng.uniform(size=(rows, classes))
    if operation == "soft labels":
        targets = rng.dirichlet(np.full(classes, 0.1), size=rows)
    # Rounded once, so that every peer is given the same numbers.
    rounded = jnp.asarray(targets, dtype).astype(jnp.float32)
    labels = jnp.asarray(rng.integers(classes, size=rows))
    return Inputs(jnp.asarray(x, dtype), kernel, labels, rounded)


def measure(*, quick: bool = False) -> list[Row]:
    """Errors of every peer at every problem.

    Args:
      quick: one small shape of each, for a look.
    """
    rows = []
    dense = QUICK_SHAPES if quick else SHAPES
    has_torch = importlib.util.find_spec("torch") is not None
    for operation, peers in _PEERS.items():
        shapes = [QUICK_LINEAR_SHAPE if quick else LINEAR_SHAPE] if operation == "linear" else dense
        for shape in shapes:
            for dtype in DTYPES:
                inputs = _inputs(operation, shape, dtype)
                truth = _truth(operation, inputs)
                ways = {peer: _in_jax(loss) for peer, loss in peers.items()}
                if has_torch:
                    ways["torch"] = _in_torch(operation)
                name = "x".join(map(str, shape))
                for peer, way in ways.items():
                    rows.append(Row(operation, name, dtype, peer, *errors(way(inputs), truth)))
    return rows


def errors(found: Found, truth: Found) -> tuple[float, float]:
    """The largest error of a loss, in nats, and of the gradient, relative to its largest element.

    Anything that is not finite is an infinite error.
    """

    def largest(found: np.ndarray, truth: np.ndarray) -> float:
        return float(np.abs(found - truth).max()) if np.isfinite(found).all() else float("inf")

    scale = np.abs(truth.gradient).max()
    return largest(found.losses, truth.losses), largest(found.gradient, truth.gradient) / scale


def table(rows: Sequence[Row]) -> str:
    """A Markdown table: a line for each problem and dtype, a pair of columns for each peer."""
    peers = list(dict.fromkeys(row.peer for row in rows))
    columns = [f"{peer}, {what}" for what in ("loss", "gradient") for peer in peers]
    lines = [
        "| operation | shape | dtype | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---:|" * len(columns),
    ]
    found = {(r.operation, r.shape, r.dtype, r.peer): r for r in rows}
    for operation, shape, dtype in dict.fromkeys(key[:3] for key in found):
        cells = [found[operation, shape, dtype, peer] for peer in peers]
        numbers = [c.loss_error for c in cells] + [c.gradient_error for c in cells]
        texts = ["not finite" if np.isinf(n) else f"{n:.1e}" for n in numbers]
        lines.append(f"| {operation} | {shape} | {dtype} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the tables. It has to be new or empty, or to hold nothing but such "
            "tables, which are replaced.",
            show_default="runs/numerics-DATE-TIME",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One small shape of each, for a look.")
    ] = False,
) -> None:
    """Errors of losses and gradients by dtype, beside optax and torch, against float64.

    Exit status: 0 for finished tables, 1 for a folder that cannot be used, 2 for wrong options,
    130 for an interrupt.
    """
    folder = files.folder_of(out, "numerics", datetime.now())
    with reported(folder, "Tables are written at the end: start again."):
        run(folder, quick=quick)


def run(folder: Path, *, quick: bool) -> None:
    """Measures, and writes the tables into a folder, over those of an earlier run."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if present != {TABLE_FILE, JSON_FILE}:
        files.claim(folder)
    rows = measure(quick=quick)
    versions = {"jax": jax.__version__, "optax": optax.__version__}
    if importlib.util.find_spec("torch") is not None:
        versions["torch"] = importlib.import_module("torch").__version__
    device = jax.devices()[0].device_kind
    heading = ", ".join(f"{name} {version}" for name, version in versions.items())
    console = Console()
    console.print(table(rows), soft_wrap=True, highlight=False)
    files.write_whole(folder / TABLE_FILE, f"Device: {device}; {heading}.\n\n{table(rows)}")
    record = {"device": device, "versions": versions, "rows": [row._asdict() for row in rows]}
    files.write_whole(folder / JSON_FILE, json.dumps(record, indent=1) + "\n")
    console.print(f"tables: {folder.absolute()}", soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    app()
