"""The table of errors: what it measures, and what the documentation promises of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from experiments import numerics

# Half of the distance between 1 and the next number.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture(scope="module")
def rows():
    """Measured once: it compiles thirty programs."""
    return numerics.measure(quick=True)


@pytest.mark.sweep
def test_losses_are_float32_and_gradients_are_rounded_once(rows):
    ours = [row for row in rows if row.peer == "ce_jax"]
    assert len(ours) == 15
    for row in ours:
        assert row.loss_error < 1e-5, row
        # Twice in the linear form: before the product with the kernel, and after it.
        twice = 2 if row.operation == "linear" else 1
        assert row.gradient_error < twice * ROUNDING[row.dtype] + 2e-6, row


@pytest.mark.sweep
def test_it_sees_the_losses_that_optax_rounds(rows):
    theirs = [row for row in rows if row.peer == "optax" and row.dtype == "bfloat16"]
    assert theirs
    assert all(row.loss_error > 1e-3 for row in theirs)


def test_what_is_not_finite_is_an_infinite_error():
    truth = numerics.Found(np.ones(2), np.array([[2.0, -4.0]]))
    found = numerics.Found(np.array([1.0, np.nan]), np.array([[2.0, -3.0]]))
    assert numerics.errors(found, truth) == (np.inf, 0.25)
    row = numerics.Row("class ids", "1x2", "float16", "optax", np.inf, 0.25)
    assert "| class ids | 1x2 | float16 | not finite | 2.5e-01 |" in numerics.table([row])


def test_the_truth_of_a_smoothed_loss():
    inputs = numerics.Inputs(jnp.zeros((1, 4)), None, jnp.array([1]), jnp.zeros((1, 4)))
    truth = numerics._truth("smoothed", inputs)
    np.testing.assert_allclose(truth.losses, np.log(4))
    np.testing.assert_allclose(truth.gradient, [[0.225, -0.675, 0.225, 0.225]])


def test_the_command_writes_its_files(tmp_path, monkeypatch):
    rows = [numerics.Row("class ids", "1x2", "float16", "optax", 0.5, 0.25)]
    monkeypatch.setattr(numerics, "measure", lambda quick: rows if quick else [])
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(numerics.app, ["--quick"]).exit_code == 0
    (folder,) = tmp_path.glob("runs/numerics-*")
    # Again, over the tables of the first run.
    (folder / "table.md").write_text("old")
    options = ["--quick", "--out", str(folder)]
    result = CliRunner().invoke(numerics.app, options)
    assert result.exit_code == 0, result.output
    assert numerics.table(rows) in (folder / "table.md").read_text()
    assert len(json.loads((folder / "results.json").read_text())["rows"]) == len(rows)
    # But not into a folder of something else.
    (folder / "thesis.tex").touch()
    result = CliRunner().invoke(numerics.app, options)
    assert result.exit_code == 1
    assert result.stderr == f"error: {folder}: not empty; name another --out\n"
