import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from typer.testing import CliRunner

from experiments import language_model as lm

pytestmark = pytest.mark.usefixtures("cheap_programs")

LENGTH = 16
ROWS = lm.rows_of(lm.README.read_bytes(), LENGTH)
BATCH = jnp.asarray(ROWS[:8])
# Easier to learn than the README, and it stays as it is.
TABLES = "\n\n".join(f"{a} times {b} makes {a * b}." for a in range(1, 40) for b in range(1, 40))


def dense(model, text):
    """The mean of optax's loss of the logits, over what is not padding."""
    labels = text[:, 1:]
    head, class_axis = model.head()
    kernel = head[...] if class_axis == 1 else head[...].T
    logits = model(text[:, :-1].clip(0)) @ kernel
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels.clip(0))
    counts = labels != lm.PADDING
    hits = jnp.sum(counts & (logits.argmax(-1) == labels))
    return jnp.sum(jnp.where(counts, losses, 0)) / counts.sum(), hits


@pytest.mark.cpu
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(("tied", "parts"), [(True, 2), (False, 1)])
def test_loss_and_gradients_are_those_of_dense_logits(tied, parts):
    """Spread over devices in both ways, and in parts, though their numbers of tokens differ."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    model = lm.LanguageModel(LENGTH, width=8, blocks=1, tied=tied, rngs=nnx.Rngs(0))
    tokens = (np.asarray(BATCH)[:, 1:] != lm.PADDING).reshape(2, -1).sum(-1)
    assert len(set(tokens)) > 1
    gradients = nnx.jit(functools.partial(lm.gradients, mesh=mesh))
    sums, slopes = gradients(model, BATCH.reshape(parts, -1, LENGTH + 1))
    (wanted, hits), wanted_slopes = nnx.jit(nnx.value_and_grad(dense, has_aux=True))(model, BATCH)
    np.testing.assert_allclose(sums.loss.mean(), wanted, rtol=1e-6)
    assert int(sums.hits) == int(hits)
    assert int(sums.loss.denominator) == tokens.sum()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), slopes, wanted_slopes
    )


@pytest.mark.usefixtures("lenient")
def test_padding_is_never_right():
    """A model of zeros predicts byte 0 everywhere, also where a row is padded."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), (AxisType.Auto,) * 2)
    model = lm.LanguageModel(LENGTH, width=8, blocks=1, tied=False, rngs=nnx.Rngs(0))
    head, _ = model.head()
    head[...] = jnp.zeros_like(head[...])
    tally = nnx.jit(functools.partial(lm.tally, mesh=mesh))
    padded = np.asarray(BATCH) == lm.PADDING
    tokens = int((~padded[:, 1:]).sum())
    assert 0 < tokens < padded[:, 1:].size
    for byte, hits in ((0, tokens), (1, 0)):
        sums = tally(model, jnp.asarray(np.where(padded, lm.PADDING, byte)))
        assert (int(sums.hits), int(sums.loss.denominator)) == (hits, tokens)
        np.testing.assert_allclose(sums.loss.mean(), np.log(256), rtol=1e-6)


@pytest.mark.usefixtures("lenient")
def test_a_batch_may_be_larger_than_the_text(tmp_path):
    """Rows are drawn with replacement."""
    (tmp_path / "text").write_text("ab")
    options = ("--text", tmp_path / "text", "--length", 2, "--batch-size", 9, "--steps", 1)
    result = run(*options, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "nan" not in result.output


@pytest.mark.usefixtures("lenient")
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    (tmp_path / "text").write_text(TABLES)
    options = ("--text", tmp_path / "text", "--length", 4, "--batch-size", 2, "--steps", 3)
    result = run(*options, "--learning-rate", 1e38, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert re.fullmatch(r"error: the loss is (nan|inf) at step 3; try a .*\n", result.stderr)


def test_there_has_to_be_a_run_of_this_script_to_resume(tmp_path):
    result = run("--resume", "--out", tmp_path / "absent")
    assert result.exit_code == 1
    assert "absent: no such folder, so there is no run to resume" in result.stderr
    (tmp_path / "config.json").write_text('{"experiment": "mnist"}')
    result = run("--resume", "--out", tmp_path)
    assert result.exit_code == 1
    assert "config.json: not the configuration of this script" in result.stderr


def test_rows_hold_every_byte_once():
    """Each row begins with the byte at which the one before it ends."""
    text = b"abcdefg\n\nh\n\nij\n\n"
    rows = [[byte for byte in row if byte != lm.PADDING] for row in lm.rows_of(text, 3)]
    assert [bytes(row) for row in rows] == [b"abcd", b"defg", b"ij"]


def run(*options):
    return CliRunner().invoke(lm.app, list(map(str, options)))


@pytest.mark.slow
@pytest.mark.usefixtures("lenient")
def test_the_loss_falls_and_a_broken_run_goes_on(tmp_path):
    text = tmp_path / "tables"
    text.write_text(TABLES)
    options = ("--text", text, "--steps", 60, "--length", LENGTH, "--batch-size", 16, "--parts", 2)
    options += ("--out", tmp_path / "run")
    result = run(*options)
    assert result.exit_code == 0, result.output
    losses = [float(found) for found in re.findall(r"loss ([\d.]+) nats", result.output)]
    assert 5.0 < losses[0] < 7.0
    assert losses[-1] < 1.5
    accuracies = [float(found) for found in re.findall(r"accuracy ([\d.]+)%", result.output)]
    assert accuracies[-1] > 50.0

    unbroken = (tmp_path / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    assert "not empty" in run(*options).stderr
    result = run(*options, "--seed", 1, "--tied", "--no-tied", "--resume")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"error: {tmp_path / 'run'}: the run in it has other options:",
        "  --tied: then True, now False",
        "  --seed: then 0, now 1",
    ]
    text.write_text(f"{TABLES}!")
    message = run(*options, "--resume").stderr
    assert message.endswith(f"the run in it learns another text than {text} holds now\n")
    text.write_text(TABLES)
    result = run(*options, "--resume")
    assert result.exit_code == 0, result.output
    assert "resuming after step 50" in result.output
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == unbroken


def test_wrong_use_is_one_line(tmp_path):
    assert "does not divide" in run("--parts", 3).stderr
    assert "--resume needs the folder" in run("--resume").stderr
    result = run("--tensor-parallel", 3, "--out", tmp_path / "run")
    assert "--tensor-parallel 3 does not go with" in result.stderr
    for path, message in ((tmp_path / "absent", "No such file"), (tmp_path, "directory")):
        result = run("--text", path)
        assert result.exit_code == 1
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    (tmp_path / "empty").touch()
    assert "no paragraph" in run("--text", tmp_path / "empty").stderr
