import csv
import json
import platform
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments import benchmark
from experiments.benchmarking import (
    epoch,
    jax_peers,
    measure,
    pictures,
    problems,
    report,
    timing,
    torch_peers,
)
from experiments.benchmarking.problems import ARGUMENTS, Problem
from experiments.benchmarking.programs import Peer, Program, on_device
from experiments.benchmarking.timing import Effort, Samples, interleave

TINY = Effort(0.001, 2, 2)


def tiny(operation):
    return Problem(operation, 6, 5, "float32", 3 if operation == "linear" else 0)


def outputs(peer, problem):
    """Loss and first gradient, as a peer computed them."""
    loss, gradients = peer.build(problem, on_device(problem)).gradient()
    if isinstance(loss, tuple):
        loss, _ = loss
    as_array = [
        x.detach().cpu().numpy() if hasattr(x, "detach") else x for x in (loss, gradients[0])
    ]
    return [np.asarray(x, np.float64) for x in as_array]


@pytest.mark.parametrize("operation", [*ARGUMENTS, problems.UNLIKELY])
def test_all_peers_compute_the_same(operation):
    problem = tiny(operation)
    everybody = jax_peers.peers() + torch_peers.peers(compiled=False)
    here = [p for p in everybody if problem.formula in p.operations and not p.missing]
    assert {"ce_jax", "optax", "jax.nn"} <= {peer.name for peer in here}
    want = outputs(next(peer for peer in here if peer.name == "optax"), problem)
    for peer in here:
        for x, y in zip(outputs(peer, problem), want, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=peer.name)


def test_one_label_is_unlikely():
    problem = tiny(problems.UNLIKELY)
    ours, *_ = jax_peers.peers()
    losses = [outputs(ours, p)[0] for p in (problem, problem._replace(operation="integer"))]
    assert 0.9 * problems.TOO_LOW < problem.rows * (losses[0] - losses[1]) < problems.TOO_LOW


FAULTS = """
import resource, sys
import numpy as np
from experiments.benchmarking.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "kept" and not keep_freed_memory(1 << 27):
    sys.exit("no glibc")
before = faults()
for _ in range(8):
    np.ones(1 << 26, np.uint8)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_kept():
    counts = {
        kind: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, kind], check=True, capture_output=True, text=True
            ).stdout
        )
        for kind in ("kept", "left to malloc")
    }
    assert counts["left to malloc"] > 8 * (1 << 26) / (1 << 21)  # in pages of 2 MiB at the most
    assert counts["kept"] < counts["left to malloc"] / 4


def test_calls_take_turns_in_a_new_order_each_round(monkeypatch):
    turns = []
    monkeypatch.setattr(timing, "_sample", lambda call, cost: turns.append(call()) or 1.0)
    timings = interleave({name: lambda name=name: name for name in "abc"}, Effort(0.0, 9, 9))
    rounds = ["".join(turns[i : i + 3]) for i in range(0, 27, 3)]
    assert {"".join(sorted(round_)) for round_ in rounds} == {"abc"}
    # Nobody always suffers from what the same other one leaves behind.
    assert {before + name for before, name in pairwise("".join(rounds))} >= {
        before + name for before in "abc" for name in "abc" if name != before
    }
    assert all(t.samples == 9 and t.lower <= t.median <= t.upper for t in timings.values())


def test_a_slow_start_costs_no_repeats(monkeypatch):
    clock, calls = [0.0], []

    def call():
        calls.append(None)
        clock[0] += 5e-3 if len(calls) < 4 else 1e-4

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    cost = timing._cost(call)
    assert cost == pytest.approx(1e-4)
    calls_before = len(calls)
    assert timing._sample(call, cost) == pytest.approx(1e-4)
    # For 20 ms to wake up, and for 4 ms that count.
    assert len(calls) - calls_before == pytest.approx(200 + 40, abs=1)


def test_the_spread_is_that_of_the_samples(monkeypatch):
    samples = Samples((4.0, 1.0, 3.0, 2.0, 5.0))
    assert (samples.median, samples.lower, samples.upper) == (3.0, 2.0, 4.0)
    monkeypatch.setattr(timing.time, "perf_counter", iter(range(10**6)).__next__)
    assert interleave({"a": lambda: None}, TINY)["a"].median == 1.0


def test_a_missing_peer_is_a_row_that_says_so():
    def build(*_):
        raise AssertionError("must not be built")

    ours, *_ = jax_peers.peers()
    gone = Peer("gone", frozenset({"integer"}), build, "not installed")
    other = Peer("other", frozenset({"sigmoid"}), build)
    rows = measure.measure(tiny("integer"), [gone, ours, other], TINY)
    assert [(row.peer, row.status) for row in rows] == [
        ("gone", "not installed"),
        ("ce_jax", "measured"),
        ("limit", "measured"),
    ]
    assert "- gone: not installed" in report.summary(rows)
    assert "| gone | not installed |" in report.full_table(rows)


def test_a_failing_peer_is_a_row_but_ours_is_an_error():
    def build(*_):
        raise RuntimeError("no such kernel")

    ours, *_ = jax_peers.peers()
    broken = Peer("broken", frozenset({"integer"}), build)
    rows = measure.measure(tiny("integer"), [ours, broken], TINY)
    assert rows[0].status == "failed: RuntimeError: no such kernel"
    with pytest.raises(RuntimeError, match="no such kernel"):
        measure.measure(tiny("integer"), [ours._replace(build=build)], TINY)


def test_a_ratio_is_that_of_calls_in_the_same_round():
    # Half as fast from the fourth round on, which the median of each meets in another round.
    ours, optax = Samples((1.0, 1.0, 1.0, 2.0, 2.0)), Samples((2.0, 2.0, 4.0, 4.0, 4.0))
    assert ours.over(optax) == Samples((0.5, 0.5, 0.25, 0.5, 0.5))
    assert ours.over(optax).median == 0.5 != ours.median / optax.median


def test_ratios_are_those_of_the_rounds():
    def program(steps):
        return Program(None, lambda: sum(range(steps)), lambda: steps, "CPU")

    programs = {"ce_jax": program(10_000), "optax": program(100_000)}
    limits = {"limit": (lambda: sum(range(10_000)), 4.0)}
    rows = measure.compare(tiny("integer"), programs, Effort(0.05, 5, 9), limits)
    ours, optax, limit = rows
    for ratio, other, most in ((ours.to_optax, optax, 0.5), (ours.to_limit, limit, 0.7)):
        pairs = zip(ours.gradient.values, other.gradient.values, strict=True)
        assert ratio.median == np.median([a / b for a, b in pairs]) < most
    assert limit.to_optax == limit.gradient.over(optax.gradient)
    assert (ours.temporaries, limit.temporaries) == (10_000, None)
    assert report.slower(rows) == []
    swapped = measure.compare(
        tiny("integer"), {"ce_jax": programs["optax"], "optax": programs["ce_jax"]}, Effort(0.05)
    )
    assert report.slower(swapped) == swapped[:1]


def test_temporaries_of_torch_leave_the_results_out():
    pytest.importorskip("torch", reason="torch is not installed")
    torch_peer, *_ = torch_peers.peers(compiled=False)
    problem = Problem("integer", 64, 1000)
    used = torch_peer.build(problem, on_device(problem)).temporaries()
    logits = 64 * 1000 * 4
    # The log-probabilities and their gradient; not the logits' gradient, which is the result.
    assert 2 * logits <= used < 2.1 * logits


def test_shapes_and_dtypes_of_the_table():
    found = problems.table(["integer", "linear", "eager"], quick=False)
    assert {(p.rows, p.classes, p.dtype) for p in found if p.operation == "integer"} == {
        (n, c, dtype)
        for n, c in ((128, 10), (65536, 10), (16384, 100), (8192, 1000), (1024, 32768))
        for dtype in ("float32", "bfloat16")
    } | {(512, 131072, "float32"), (512, 131072, "bfloat16")}
    linear = {(p.rows, p.features, p.classes) for p in found if p.operation == "linear"}
    assert linear == {(2048, 256, 32768), (1024, 512, 65536)}
    assert all(p.is_eager and p.formula in ARGUMENTS for p in found if "eager" in p.operation)
    on_accelerator = problems.table(["integer", "linear"], quick=False, on_accelerator=True)
    assert max(p.rows * p.classes for p in on_accelerator) == 8192 * 256000
    assert {p.dtype for p in on_accelerator if p.operation == "linear"} == {"bfloat16"}
    curves = problems.scaling(quick=False)
    assert {p.classes for p in curves if p.group == "classes"} == {2**k for k in range(10, 20)}


@pytest.mark.slow
def test_a_run_leaves_figures_tables_and_pictures(tmp_path, monkeypatch):
    few = [tiny("integer"), tiny("integer")._replace(dtype="bfloat16"), tiny("sigmoid")]
    curve = [Problem("integer", 4, v, group="classes") for v in (8, 16)]
    monkeypatch.setattr(problems, "table", lambda *_, **__: few)
    monkeypatch.setattr(problems, "scaling", lambda *_: curve)
    out = tmp_path / "run"
    options = ["--quick", "--seconds", "0.01", "--only", "integer", "--only", "scaling"]
    options += ["--out", str(out), "--without", "jax.nn"]
    options += ["--fresh-memory"]  # no later test is to notice
    result = CliRunner().invoke(benchmark.app, options)
    assert result.exit_code == 0, result.output

    about = json.loads((out / report.JSON_FILE).read_text())
    assert about["cores"] >= 1
    assert about["processor"]
    assert about["date"].startswith("20")
    assert about["versions"]["jax"]
    assert about["options"]["quick"] is True
    assert about["options"]["freed memory"] == "left to malloc"
    with (out / report.CSV_FILE).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(about["rows"])
    columns = "operation rows classes dtype features group devices device peer status"
    figures = [
        f"{figure}_{column}"
        for figure in ("forward", "gradient", "to_optax", "to_limit")
        for column in ("median", "lower", "upper", "samples")
    ]
    assert [*columns.split(), *figures, "temporaries"] == list(rows[0])
    for row in about["rows"]:
        assert (row["status"] == "measured") == (row["gradient_median"] is not None)
        if row["peer"] == "optax":
            assert row["to_optax_median"] == 1.0
    summary = (out / report.SUMMARY_FILE).read_text()
    assert "| integer | 6x5 | float32 |" in summary
    assert "jax.nn: left out by --without" in summary
    assert "torch.compile: " in summary  # left out, or not installed: never dropped silently
    assert sorted(path.name for path in out.glob("*.png")) == ["ratios.png", "scaling_classes.png"]

    again = CliRunner().invoke(benchmark.app, options)
    assert again.exit_code == 1
    assert "not empty" in again.stderr


@pytest.mark.usefixtures("lenient")  # for Adam, which is optax's
def test_who_is_left_out_has_no_epoch_either(monkeypatch):
    monkeypatch.setattr(epoch, "QUICK_EXAMPLES", 256)
    peers = jax_peers.peers() + torch_peers.peers(compiled=False)
    gone = [p if p.name == "ce_jax" else p._replace(missing="left out") for p in peers]
    status = {row.peer: row.status for row in epoch.rows(TINY, gone, quick=True)}
    others = dict.fromkeys(("optax", "torch", "torch.compile"), "left out")
    assert status == {"ce_jax": "measured"} | others


def test_an_unknown_operation_is_a_wrong_option():
    result = CliRunner().invoke(benchmark.app, ["--only", "cosine"])
    assert result.exit_code == 2


@pytest.mark.parametrize("peer", ["numpy", "ce_jax"])
def test_who_cannot_be_left_out(peer, tmp_path):
    out = tmp_path / "run"
    result = CliRunner().invoke(benchmark.app, ["--without", peer, "--out", str(out)])
    assert result.exit_code == 1
    assert repr(peer) in result.stderr
    assert "torch.compile" in result.stderr
    assert not out.exists()


def test_pictures_need_no_figures_of_everybody(tmp_path):
    times, ratio = Samples((2e-3, 1e-3, 9e-4)), Samples((1.0, 0.9, 1.1))
    rows = [
        measure.Row(problem, peer, gradient=times, temporaries=0, to_optax=ratio, devices=devices)
        for peer in ("ce_jax", "optax", "a new one")
        for problem in (Problem("vocab-parallel", 8, 16), Problem("linear", 8, 16, group="rows"))
        for devices in (1, 2)
    ]
    rows.append(measure.Row(Problem("linear", 8, 16, group="rows"), "gone", "not installed"))
    paths = pictures.save_all(tmp_path, rows, "a title")
    assert [path.name for path in paths] == ["scaling_rows.png", "scaling_devices.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
