import json

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments import distillation

pytestmark = pytest.mark.usefixtures("cheap_programs")


def test_texts_do_not_overlap():
    learnt, held_out = distillation.texts()
    assert learnt.shape[1] == held_out.shape[1] == distillation.LENGTH + 1
    np.testing.assert_array_equal(learnt[:-1, -1], learnt[1:, 0])  # rows share a byte
    assert len(learnt) > 5 * len(held_out) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("lenient")  # for Adam, which is optax's
def test_the_study_runs(tmp_path, monkeypatch):
    """Two methods in a few steps: table, picture and figures of every run."""
    few = {name: distillation.METHODS[name] for name in ("bytes alone", "top 4, bucket")}
    monkeypatch.setattr(distillation, "METHODS", few)
    monkeypatch.setattr(distillation, "TEACHER", distillation.Shape(16, 1))
    monkeypatch.setattr(distillation, "STUDENT", distillation.Shape(8, 1))
    folder = tmp_path / "run"
    result = CliRunner().invoke(distillation.app, ["--quick", "--seeds", "2", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "results.json").read_text())
    assert [x["method"] for x in found["results"]] == list(few)
    assert [x["stored"]["mean"] for x in found["results"]] == [0, 12]
    assert all(0 < x["bits"]["mean"] < 12 for x in found["results"])
    assert "QUICK" in (folder / "table.md").read_text()
    assert (folder / "distillation.png").stat().st_size > 1000

    again = CliRunner().invoke(distillation.app, ["--quick", "--out", str(folder)])
    assert again.exit_code == 1
