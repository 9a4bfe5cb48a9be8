"""What a small model learns from bytes, from a larger one, and from its k best classes.

    python -m experiments.distillation

A byte-level transformer, the teacher, learns the Python files of this package. Its predictions for
that text are stored once, as it is done where a teacher is too large to run along.
Students a quarter as wide learn the same text from the bytes alone, from the teacher's whole
distribution, from its k best classes with each way to treat the others (`tail`), and by the
Jensen-Shannon divergence. Every tenth file is held out; the measure is bits per byte on these.
Expect about 2.7 from the bytes alone, and 2.6 from the whole teacher or its 16 best classes with
`tail="bucket"`.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console

import ce_jax
from experiments.output import files
from experiments.output.figures import STYLES, clean
from experiments.studies import command
from experiments.studies.report import Column, Outcome, Record, by_method, values_of
from experiments.training.transformer import LanguageModel

TEXT = Path(ce_jax.__file__).parent
LENGTH, BATCH = 64, 16


class Shape(NamedTuple):
    """Of a transformer."""

    width: int
    blocks: int


TEACHER, STUDENT = Shape(128, 3), Shape(32, 1)
LEARNING_RATE = 3e-3
HELD_OUT = 10  # one file in so many

COLUMNS = (
    Column("bits", "held-out bits per byte", digits=3, scale=1),
    Column("stored", "bytes stored per token", digits=0, scale=1),
    Column("step", "ms per step of all seeds", digits=1, scale=1),
)


class Budget(NamedTuple):
    """Steps of teacher and students, and rows of text."""

    teacher: int
    students: int
    rows: int


FULL, QUICK = Budget(800, 1500, 2048), Budget(4, 4, 64)

Tail: TypeAlias = Literal["bucket", "renormalize", "drop"]
# Arrays `[rows, L, ...]` with what is stored of the teacher's predictions.
Stored: TypeAlias = tuple[jax.Array, ...]
# Of logits `[B, L, 256]`, the labels, and what is stored.
Loss = Callable[[jax.Array, jax.Array, Stored], jax.Array]


def from_bytes(logits: jax.Array, labels: jax.Array, stored: Stored) -> jax.Array:
    """Cross-entropy with the byte that follows."""
    return ce_jax.softmax_cross_entropy_with_integer_labels(logits, labels, reduction="mean")


def from_all(logits: jax.Array, labels: jax.Array, stored: Stored) -> jax.Array:
    """Divergence from the whole distribution of the teacher."""
    (log_probs,) = stored
    return ce_jax.distillation_loss(logits, log_probs, reduction="mean")


def by_jensen_shannon(logits: jax.Array, labels: jax.Array, stored: Stored) -> jax.Array:
    """Jensen-Shannon divergence between the whole distributions."""
    (log_probs,) = stored
    return ce_jax.jensen_shannon_loss(logits, log_probs, reduction="mean")


def from_top_k(logits: jax.Array, labels: jax.Array, stored: Stored, *, tail: Tail) -> jax.Array:
    """Divergence from what is known of the teacher by its k best classes."""
    ids, log_probs = stored
    return ce_jax.top_k_distillation_loss(
        logits, ids.astype(jnp.int32), log_probs, tail=tail, reduction="mean"
    )


def nothing(log_probs: jax.Array) -> Stored:
    """The bytes alone need no teacher."""
    return ()


def everything(log_probs: jax.Array) -> Stored:
    """All log-probabilities, in float16."""
    return (log_probs.astype(jnp.float16),)


def best(log_probs: jax.Array, *, k: int) -> Stored:
    """The k best classes, each a byte, and their log-probabilities, in float16."""
    values, ids = jax.lax.top_k(log_probs, k)
    return ids.astype(jnp.uint8), values.astype(jnp.float16)


class Method(NamedTuple):
    """A loss of the students, and what it needs of the teacher's log-probabilities."""

    loss: Loss
    stored: Callable[[jax.Array], Stored]


METHODS = {
    "bytes alone": Method(from_bytes, nothing),
    "whole teacher": Method(from_all, everything),
    "whole teacher, Jensen-Shannon": Method(by_jensen_shannon, everything),
    **{
        f"top {k}, {tail}": Method(
            functools.partial(from_top_k, tail=tail), functools.partial(best, k=k)
        )
        for k in (1, 4, 16)
        for tail in get_args(Tail)
    },
}


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Rows of `LENGTH + 1` bytes to learn, and rows of the files that are held out."""
    files = sorted(TEXT.rglob("*.py"))
    held_out = b"".join(path.read_bytes() for path in files[::HELD_OUT])
    learnt = b"".join(p.read_bytes() for i, p in enumerate(files) if i % HELD_OUT)

    def rows(text: bytes) -> np.ndarray:
        whole = np.frombuffer(text, np.uint8).astype(np.int32)
        count = (len(whole) - 1) // LENGTH
        return np.lib.stride_tricks.sliding_window_view(whole, LENGTH + 1)[::LENGTH][:count]

    return rows(learnt), rows(held_out)


def model_of(shape: Shape, seed: int | jax.Array) -> LanguageModel:
    """An untrained one."""
    return LanguageModel(LENGTH, width=shape.width, blocks=shape.blocks, rngs=nnx.Rngs(seed))


def logits_of(model: LanguageModel, inputs: jax.Array) -> jax.Array:
    """`[B, L, 256]`."""
    table, _ = model.head()
    return model(inputs) @ table[...].T


def trained(
    shape: Shape, loss: Loss, text: jax.Array, stored: Stored, steps: int, seeds: int
) -> tuple[nnx.GraphDef[Any], Any, float]:
    """Models of all seeds, trained side by side, and the seconds of a step."""
    graph = nnx.split(model_of(shape, 0))[0]
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    def of_seed(seed: jax.Array) -> Any:
        params = nnx.split(model_of(shape, jax.random.fold_in(key, seed)))[1]

        def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
            params, state = carry
            rows = jax.random.randint(key, (BATCH,), 0, len(text))
            of_batch, *known = (x[rows] for x in (text, *stored))

            def of_params(params: Any) -> jax.Array:
                logits = logits_of(nnx.merge(graph, params), of_batch[:, :-1])
                return loss(logits, of_batch[:, 1:], tuple(known))

            updates, state = optimizer.update(jax.grad(of_params)(params), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.fold_in(key, 1000 + seed), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    key = jax.random.key(0)
    run = jax.jit(jax.vmap(of_seed)).lower(jnp.arange(seeds)).compile()
    start = time.perf_counter()
    params = jax.block_until_ready(run(jnp.arange(seeds)))
    return graph, params, (time.perf_counter() - start) / steps


def bits_per_byte(graph: nnx.GraphDef[Any], params: Any, text: jax.Array) -> float:
    """Of one model on rows that it did not see."""
    parts = [cross_entropy(graph, params, text[i : i + 64]) for i in range(0, len(text), 64)]
    nats = sum(parts[1:], parts[0])
    return float(ce_jax.bits_per_byte(nats.total, nats.denominator))


@jax.jit
def cross_entropy(graph: nnx.GraphDef[Any], params: Any, rows: jax.Array) -> ce_jax.Ratio:
    """Cross-entropy of one model, in nats, over all bytes of some rows but their first."""
    logits = logits_of(nnx.merge(graph, params), rows[:, :-1])
    return ce_jax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:], reduction="ratio")


def predictions(graph: nnx.GraphDef[Any], params: Any, text: jax.Array) -> jax.Array:
    """Log-probabilities of the teacher for every byte of the text, `[rows, L, 256]`."""
    parts = [log_softmax(graph, params, text[i : i + 64]) for i in range(0, len(text), 64)]
    return jnp.concatenate(parts)


@jax.jit
def log_softmax(graph: nnx.GraphDef[Any], params: Any, rows: jax.Array) -> jax.Array:
    """Log-probabilities of one model for all bytes of some rows but their first."""
    return jax.nn.log_softmax(logits_of(nnx.merge(graph, params), rows[:, :-1]))


def study(budget: Budget, seeds: int, console: Console) -> Outcome:
    """Trains the teacher, stores what it says, and trains the students of every method."""
    learnt, held_out = texts()
    draw = np.random.default_rng(0)
    learnt = learnt[draw.permutation(len(learnt))[: budget.rows]]
    text, unseen = jnp.asarray(learnt), jnp.asarray(held_out[: budget.rows])
    graph, params, _ = trained(TEACHER, from_bytes, text, (), budget.teacher, 1)
    teacher = jax.tree.map(lambda x: x[0], params)
    log_probs = predictions(graph, teacher, text)
    bits = bits_per_byte(graph, teacher, unseen)
    console.print(f"teacher: {bits:.3f} held-out bits per byte")
    records = []
    for name, method in METHODS.items():
        stored = jax.jit(method.stored)(log_probs)
        size = sum(x.nbytes for x in stored) / text[:, 1:].size
        graph, params, step = trained(STUDENT, method.loss, text, stored, budget.students, seeds)
        for seed in range(seeds):
            own = jax.tree.map(lambda x, seed=seed: x[seed], params)
            figures = {
                "bits": bits_per_byte(graph, own, unseen),
                "stored": size,
                "step": 1e3 * step,
            }
            records.append(Record({"method": name}, seed, figures))
        found = np.mean(values_of(records, "bits", method=name))
        console.print(f"{name}: {found:.3f}, {1e3 * step:.1f} ms per step")
    return Outcome(
        tuple(records),
        by_method(records, COLUMNS),
        {"distillation": picture(records, bits)},
        {"teacher_bits": bits, "rows": len(text), "held_out_rows": len(unseen)},
    )


def picture(records: list[Record], teacher: float) -> Figure:
    """Held-out bits per byte of every student, and of the teacher."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(name.split(",")[0] for name in METHODS))
    for index, method in enumerate(METHODS):
        color, marker = STYLES[kinds.index(method.split(",")[0])]
        values = np.array(values_of(records, "bits", method=method))
        axes.plot(values, [index] * len(values), ".", color=color, alpha=0.45)
        axes.plot(values.mean(), index, marker, color=color, markersize=8)
    axes.axvline(teacher, color="#777777", linestyle="--", linewidth=1, label="teacher")
    axes.set_yticks(range(len(METHODS)), list(METHODS))
    axes.invert_yaxis()
    axes.set_xlabel("held-out bits per byte; small: single seeds")
    axes.legend(frameon=False, fontsize=8.5)
    clean(axes)
    return figure


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Number of students' seeds.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for table, plot and figures of all runs. It has to be new or empty.",
            show_default="runs/distillation-DATE-TIME",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps, to see the study run in a minute.")
    ] = False,
) -> None:
    """Compare what students learn from bytes, from a teacher, and from its k best classes.

    Exit status: 0 for a finished study, 1 for a folder that cannot be used, 2 for wrong options,
    130 for an interrupt.
    """
    budget, notice = (QUICK, command.QUICK) if quick else (FULL, "")
    about = {
        "experiment": "distillation",
        "notice": notice,
        "options": {**budget._asdict(), "seeds": seeds, "length": LENGTH, "batch": BATCH},
        "teacher": TEACHER._asdict(),
        "student": STUDENT._asdict(),
    }
    with command.results_in("distillation", out) as folder:
        files.claim(folder)
        console = command.open_console(notice)
        title = f"distillation of bytes, {budget.students} steps"
        command.finish(lambda: study(budget, seeds, console), title, about, folder, console)


if __name__ == "__main__":
    app()
