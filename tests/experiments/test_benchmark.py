import csv
import errno
import json
import os
import platform
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from rich.console import Console
from typer.testing import CliRunner

from experiments import benchmark
from experiments.benchmarking import (
    epoch,
    jax_peers,
    measure,
    pictures,
    problems,
    report,
    sharded,
    startup,
    timing,
    torch_peers,
)
from experiments.benchmarking.problems import ARGUMENTS, Problem
from experiments.benchmarking.programs import Peer, Program, on_device
from experiments.benchmarking.timing import Effort, Samples, interleave

TINY = Effort(0.001, 2, 2)


def tiny(operation):
    return Problem(operation, 6, 5, "float32", 3 if operation in problems.LINEAR else 0)


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
    # A CPU has no fast products of narrow numbers.
    assert not problems.table(["mixed"], quick=False)
    (mixed, *_) = problems.table(["mixed"], quick=False, on_accelerator=True)
    dtypes = {name: x.dtype for name, x in on_device(mixed._replace(rows=2, classes=3)).items()}
    assert dtypes == {"hidden": "bfloat16", "kernel": "float32", "labels": "int32"}
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
    assert [*columns.split(), *figures, "temporaries", "notice"] == list(rows[0])
    assert all("QUICK RUN" in row["notice"] for row in rows)
    assert "QUICK RUN" in result.output
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
@pytest.mark.parametrize(
    ("part", "others"),
    [
        (lambda peers: epoch.rows(TINY, peers, quick=True), {"optax", "torch", "torch.compile"}),
        pytest.param(
            lambda peers: sharded.rows(TINY, peers, quick=True, kept=False),
            {"optax", "jax.nn"},
            marks=pytest.mark.cpu,
        ),
        (lambda peers: startup.import_rows(peers, 1), {"optax"}),
        (lambda peers: startup.compile_rows(peers, ["integer"], 1), {"optax"}),
    ],
)
def test_who_is_left_out_takes_no_part(monkeypatch, part, others):
    monkeypatch.setattr(epoch, "QUICK_EXAMPLES", 256)
    monkeypatch.setattr(startup, "_COMPILED_SHAPES", ((6, 5),))
    peers = jax_peers.peers() + torch_peers.peers(compiled=False)
    gone = [p if p.name == "ce_jax" else p._replace(missing="left out") for p in peers]
    status = {(row.peer, row.status) for row in part(gone)}
    assert status == {("ce_jax", "measured")} | {(name, "left out") for name in others}


ABOUT = {
    "date": "2026-01-02T03:04:05+00:00",
    "processor": "a processor",
    "cores": 4,
    "load": 0.9,
    "others": 0.3,
    "devices": ["cpu"],
    "python": "3.11",
    "versions": {"jax": "0.1"},
    "options": {"quick": False, "freed memory": "kept"},
}
QUICK = "QUICK RUN: small shapes and few samples, not for conclusions"
LOADED = "BUSY MACHINE: load 1.1 when the run began; do not trust the ratios"
SHARED = "BUSY MACHINE: other programs used 0.5 of 4 cores during the run; do not trust the ratios"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"others": None}, []),
        ({"load": None}, []),
        ({"options": {**ABOUT["options"], "quick": True}}, [QUICK]),
        ({"load": 1.1}, [LOADED]),
        ({"others": 0.5}, [SHARED]),
        (
            {"load": 1.1, "others": 0.5, "options": {**ABOUT["options"], "quick": True}},
            [QUICK, LOADED, SHARED],
        ),
    ],
)
def test_every_table_says_when_it_is_not_to_be_trusted(tmp_path, change, said):
    times = Samples((2e-3, 1e-3))
    rows = [
        measure.Row(tiny("integer"), peer, gradient=times, to_optax=times)
        for peer in ("ce_jax", "optax")
    ]
    report.save(tmp_path, rows, {**ABOUT, **change})
    for name in (report.SUMMARY_FILE, report.TABLE_FILE):
        text = (tmp_path / name).read_text()
        assert text.startswith("".join(f"**{sentence}**\n\n" for sentence in said) + "2026-01-02")
    assert json.loads((tmp_path / report.JSON_FILE).read_text())["notices"] == said
    with (tmp_path / report.CSV_FILE).open(newline="") as file:
        assert [row["notice"] for row in csv.DictReader(file)] == ["; ".join(said)] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "results.csv", "results.json", "summary.md", "table.md"
    ]  # fmt: skip


def everything():
    """Rows for each kind of picture."""
    times, ratio = Samples((2e-3, 1e-3, 9e-4)), Samples((1.0, 0.9, 1.1))
    integer = Problem("integer", 8, 16)
    problems_ = [
        (integer, 1),
        (integer._replace(dtype="bfloat16"), 1),
        (Problem("import", 0, 0), 1),
        (Problem("compile integer", 1024, 1000), 1),
        *((integer._replace(rows=n, group="rows"), 1) for n in (8, 16)),
        *((Problem("vocab-parallel", 8, 16), n) for n in (1, 2)),
    ]
    return [
        measure.Row(problem, peer, gradient=times, temporaries=9, to_optax=ratio, devices=devices)
        for problem, devices in problems_
        for peer in ("ce_jax", "optax", "jax.nn", "torch", "torch.compile", "keras", "limit")
    ]


def test_every_picture_says_it_too(tmp_path, monkeypatch):
    said = {}

    def keep(self, path, **_):
        self.draw_without_rendering()
        said[path.stem] = self

    monkeypatch.setattr(pictures.Figure, "savefig", keep)
    for notices in ([], [QUICK, LOADED]):
        pictures.save_all(tmp_path, everything(), "a title", notices)
        assert set(said) == {"ratios", "startup", "scaling_rows", "scaling_devices"}
        for name, figure in said.items():
            assert figure.get_supxlabel() == "\n".join(notices), name


def test_pictures_can_be_read_on_a_page(tmp_path, monkeypatch):
    """At 900 pixels no text is below 12 of them, and none lies over another."""
    figures = {}

    def keep(self, path, **_):
        self.draw_without_rendering()
        figures[path.stem] = self

    monkeypatch.setattr(pictures.Figure, "savefig", keep)
    pictures.save_all(tmp_path, everything(), "a title", [QUICK, LOADED, SHARED])
    for name in ("ratios", "startup"):
        figure = figures[name]
        per_point = 900 / (72 * figure.get_size_inches()[0])
        texts = [
            text
            for text in figure.findobj(lambda artist: isinstance(artist, Text))
            if text.get_visible() and text.get_text() and text.get_window_extent().width > 0
        ]
        assert min(text.get_fontsize() * per_point for text in texts) > 12, name
        shown = {text.get_text() for text in texts}
        assert {"a title", "ce_jax"} < shown
    assert {"integer", "8x16", "float32", "bfloat16", "torch.compile"} < {
        text.get_text() for text in figures["ratios"].findobj(Text)
    }
    for name, figure in figures.items():
        notice = next(text for text in figure.texts if text.get_text().startswith("QUICK"))
        title = next(text for text in figure.texts if text.get_text() == "a title")
        for axes in figure.axes:
            box = axes.get_tightbbox()
            assert notice.get_window_extent().y1 < box.y0 + 1, name
            assert box.y1 < title.get_window_extent().y0 + 1, name


def test_the_points_of_a_picture_are_on_the_lines_of_their_shapes():
    times, other = Samples((1.0,)), Samples((3.0,))
    shapes = [(8, 16), (4, 32)]
    rows = [
        measure.Row(Problem(operation, *shape, dtype), "ce_jax", gradient=times, to_optax=ratio)
        for operation, ratio in (("integer", times), ("sigmoid", other))
        for shape in shapes
        for dtype in ("float32", "bfloat16")
    ]
    figure = pictures.ratios(rows[:-1])  # the last has no figure in bfloat16
    _, left, right = figure.axes
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == ["integer", "8x16", "4x32", "sigmoid", "8x16", "4x32"]
    points = [axes.collections[0].get_offsets().tolist() for axes in (left, right)]
    assert points[0] == [[1, 1], [1, 2], [3, 4], [3, 5]]
    assert points[1] == points[0][:-1]


STEPS = """
import sys, time
from experiments.benchmarking.contention import Contention

contention = Contention()
print("ready", flush=True)
end = time.monotonic() + 1.5
while time.monotonic() < end:
    pass
print(contention.cores())
"""


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system has no /proc/stat")
def test_what_others_do_is_told_from_what_the_process_does():
    """Of two programs at work at once, each sees the other one and not itself."""
    command = [sys.executable, "-c", STEPS]
    cores = len(os.sched_getaffinity(0))
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    seen = [float(process.communicate()[0].split()[1]) for process in both]
    # Both could start a little apart, and the machine may have other work as well.
    assert all(0.2 < found <= cores - 0.1 for found in seen), seen


def test_compile_times_are_those_of_value_and_gradient_beside_optax(monkeypatch):
    assert startup._COMPILED_SHAPES == ((1024, 1000), (65536, 10))
    monkeypatch.setattr(startup, "_COMPILED_SHAPES", ((6, 5), (8, 3)))
    rows = startup.compile_rows(jax_peers.peers(), ["integer", "linear"], 1)
    assert [(row.problem.operation, row.problem.shape, row.peer) for row in rows] == [
        (f"compile {operation}", shape, peer)
        for operation, shape in (("integer", "6x5"), ("integer", "8x3"), ("linear", "6x64x5"))
        for peer in ("ce_jax", "optax")
    ]
    assert all(row.gradient.median > 0 for row in rows)
    console = Console(record=True, width=120)
    benchmark.print_rows(console, rows)
    assert "compile integer 8x3: ce_jax" in console.export_text()
    table = report.full_table(rows)
    assert "| compile integer | 8x3 | float32 | CPU | optax |" in table


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_run_that_cannot_go_on_is_one_line(tmp_path, monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(report, "save", broken)
    monkeypatch.setattr(startup, "import_rows", lambda *_: [])
    out = tmp_path / "run"
    options = ["--quick", "--fresh-memory", "--only", "import", "--out", str(out)]
    result = CliRunner().invoke(benchmark.app, options)
    assert result.exit_code == (1 if isinstance(error, OSError) else 130)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert f"What was measured until then is in {out}" in result.stderr


def test_an_unknown_operation_is_a_wrong_option():
    result = CliRunner().invoke(benchmark.app, ["--only", "cosine"])
    assert result.exit_code == 2


@pytest.mark.parametrize("peer", ["numpy", "ce_jax"])
def test_who_cannot_be_left_out(peer, tmp_path):
    out = tmp_path / "run"
    options = ["--fresh-memory", "--without", peer, "--out", str(out)]
    result = CliRunner().invoke(benchmark.app, options)
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
