"""What the package promises as a whole: its names, types, documentation, and what it imports."""

import ast
import inspect
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax.losses
import pytest

import ce_jax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ce_jax"
NAMES = {
    "ClipStatistics",
    "CrossEntropyParts",
    "GradientView",
    "Negatives",
    "NextTokens",
    "PriorEstimate",
    "Ratio",
    "ReliabilityBins",
    "SoftmaxStatistics",
    "backward_corrected_cross_entropy",
    "balanced_weights",
    "binary_cross_entropy",
    "binary_entropy",
    "bits_per_byte",
    "bpr_loss",
    "brier_score",
    "clip_loss",
    "cross_entropy",
    "cross_entropy_parts",
    "distillation_loss",
    "dpo_loss",
    "effective_number_weights",
    "entropy",
    "estimate_prior",
    "expected_calibration_error",
    "fit_temperature",
    "focal_alpha",
    "focal_loss",
    "forward_corrected_cross_entropy",
    "gbce_loss",
    "generalized_cross_entropy",
    "gradient_view",
    "hard_bootstrapped_cross_entropy",
    "in_batch_negatives",
    "info_nce_loss",
    "init_log_variances",
    "inverse_frequency_weights",
    "ipo_loss",
    "jensen_shannon_loss",
    "kl_divergence",
    "kl_estimate",
    "kto_loss",
    "linear_distillation_loss",
    "linear_jensen_shannon_loss",
    "linear_sampled_softmax_cross_entropy",
    "linear_softmax_cross_entropy",
    "linear_softmax_statistics",
    "linear_top_k_distillation_loss",
    "log_uniform_log_prob",
    "log_uniform_negatives",
    "mean_denominator",
    "next_tokens",
    "nll_loss",
    "on_mesh",
    "orpo_loss",
    "perplexity",
    "poly_loss",
    "poly_loss_cross_entropy",
    "ppo_clip_loss",
    "prediction_logit_offset",
    "prior_shift_weights",
    "reliability_bins",
    "safe_softmax_cross_entropy",
    "sampled_softmax_cross_entropy",
    "self_information",
    "sequence_log_prob",
    "siglip_loss",
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "simpo_loss",
    "smooth_labels",
    "smoothed_label_entropy",
    "smoothing_over_others",
    "soft_bootstrapped_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softmax_statistics",
    "supervised_contrastive_loss",
    "symmetric_cross_entropy",
    "top_k_distillation_loss",
    "training_logit_offset",
    "uncertainty_weighted_loss",
    "uniform_negatives",
}
FUNCTIONS = sorted(name for name in NAMES if name.islower())
# Other losses of optax, which come from there: all that `optax.losses` has and we have not.
FORWARDED = {
    name
    for name, value in vars(optax.losses).items()
    if not name.startswith("_") and not inspect.ismodule(value) and name not in NAMES
}
# What versions of optax up to 0.2.6 take by place, and later ones by name.
ONCE_BY_PLACE = {
    "softmax_statistics": ["labels"],
    "linear_softmax_statistics": ["labels"],
    "poly_loss_cross_entropy": ["logits", "labels", "epsilon", "axis", "where"],
    "sigmoid_focal_loss": ["logits", "labels", "alpha", "gamma"],
}
# Shared by every function that has it, with one default.
DEFAULTS = {
    "axis": -1,
    "where": None,
    "weight": None,
    "pos_weight": None,
    "sample_weight": None,
    "ignore_index": None,
    "reduction_axis": None,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "axis_name": None,
    "reduction": "none",
    "return_statistics": False,
    "forward_mode": False,
    "bias": None,
    "class_axis": -1,
    "num_classes": None,
    "logit_soft_cap": None,
    "memory_budget": None,
    "logit_scale": 1.0,
}


def python(code):
    """What a fresh interpreter prints, with the checkout as its working directory."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def results(annotation):
    """What a function may return, taken out of unions and tuples.

    A function that returns a function of the type that it is given has no result of its own.
    """
    if isinstance(annotation, typing.TypeVar):
        return []
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple):
        return [array for part in typing.get_args(annotation) for array in results(part)]
    return [annotation]


def test_public_names():
    assert set(ce_jax.__all__) == NAMES | FORWARDED
    assert dir(ce_jax) == sorted(ce_jax.__all__)
    assert all(hasattr(ce_jax, name) for name in ce_jax.__all__)


def test_importing_it_imports_no_framework():
    heavy = ["optax", "flax", "torch", "chex", "matplotlib", "sklearn"]
    code = f"import sys, ce_jax; print(*(m for m in {heavy} if m in sys.modules))"
    assert python(code) == []


def test_other_losses_are_those_of_optax():
    for name in FORWARDED:
        assert getattr(ce_jax, name) is getattr(optax.losses, name)
    assert ce_jax.softmax_cross_entropy is not optax.losses.softmax_cross_entropy
    assert not hasattr(ce_jax, "__no_such_attribute__")


def test_they_are_typed_as_optax_types_them():
    """What a type checker reads, and the names at run time, are listed apart."""
    imports = re.findall(
        r"^    from optax.losses import (\w+) as \1$", inspect.getsource(ce_jax), re.MULTILINE
    )
    assert set(imports) == FORWARDED


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("softmax_crossentropy", "'softmax_cross_entropy'"),
        ("huberloss", "'huber_loss'"),
        ("sigmoid_cross_entropy", "'sigmoid_binary_cross_entropy'"),
    ],
)
def test_unknown_names(name, meant):
    with pytest.raises(AttributeError, match=f"no attribute {name!r}; did you mean {meant}"):
        getattr(ce_jax, name)
    with pytest.raises(AttributeError, match=r"no attribute 'xyz'$"):
        _ = ce_jax.xyz


def test_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


# A type checker finds fault with the lines that say so, and with no others.
SNIPPET = """
from typing import assert_type

import jax
import ce_jax
from ce_jax import Ratio, SoftmaxStatistics

x = jax.numpy.zeros((2, 3))
ce_jax.huber_loss(x, x)
ce_jax.nonexistent(x)  # error
ce_jax.softmax_cross_entropy([[0.0, 1.0]], [[0.5, 0.5]], axis=(-1,), reduction="mean")
ce_jax.softmax_cross_entropy(x, x, reduction="avg")  # error
ce_jax.softmax_cross_entropy(x, x, forward=True)  # error
assert_type(ce_jax.softmax_cross_entropy(x, x), jax.Array)
assert_type(ce_jax.softmax_cross_entropy(x, x), float)  # error

assert_type(ce_jax.softmax_cross_entropy(x, x, reduction="ratio"), Ratio)
assert_type(ce_jax.clip_loss(x, x, reduction="ratio") + ce_jax.clip_loss(x, x), Ratio)  # error

linear = ce_jax.linear_softmax_cross_entropy
linear(x, x, x, reduction="ratio").mean()
pair = linear(x, x, x, return_statistics=True, reduction="ratio")
assert_type(pair, tuple[Ratio, SoftmaxStatistics])
linear(x, x, x, return_statistics=True, reduction="avg")  # error
assert_type(linear(x, x, x), jax.Array)
assert_type(linear(x, x, x, return_statistics=True), tuple[jax.Array, SoftmaxStatistics])
either = linear(x, x, x, return_statistics=bool(x.size))
assert_type(either, jax.Array | tuple[jax.Array, SoftmaxStatistics])
spread = ce_jax.on_mesh(linear, jax.make_mesh((1,), ("data",)))
loss, found = spread(x, x, x, return_statistics=True)
assert_type(found.lse, jax.Array)
"""


@pytest.mark.slow
def test_what_a_type_checker_says(tmp_path):
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    path = tmp_path / "snippet.py"
    path.write_text(SNIPPET)
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--no-pretty"]
    printed, errors, _ = api.run([*options, "--cache-dir", str(ROOT / ".mypy_cache"), str(path)])
    assert not errors
    found = {int(n) for n in re.findall(r"snippet\.py:(\d+): error", printed)}
    lines = enumerate(SNIPPET.splitlines(), 1)
    assert found == {number for number, line in lines if line.endswith("# error")}, printed


@pytest.mark.parametrize("name", FUNCTIONS)
class TestFunction:
    def test_documentation(self, name):
        """In one line what it is; formula, arguments, result, errors, example, source."""
        doc = inspect.getdoc(getattr(ce_jax, name))
        summary, blank, _ = doc.split("\n", 2)
        assert summary.endswith(".")
        assert not blank
        assert "math::" in doc or ":math:" in doc, "the formula is missing"
        for part in ("Args:", "Returns:", "Raises:", "Example:", ">>> ", "References:"):
            assert part in doc, f"{part} is missing"

    def test_every_argument_is_documented(self, name):
        function = getattr(ce_jax, name)
        described = inspect.getdoc(function).split("Args:")[1].split("Returns:")[0]
        for parameter in inspect.signature(function).parameters:
            assert re.search(rf"^  {parameter}: ", described, re.MULTILINE), parameter

    def test_signature(self, name):
        """Every array is annotated, and an option has one default and place everywhere."""
        signature = inspect.signature(getattr(ce_jax, name), eval_str=True)
        for array in results(signature.return_annotation):
            if name != "init_log_variances":  # of the caller's own structure
                assert "jaxtyping" in array.__module__ or array.__name__ in NAMES, array
        for parameter in signature.parameters.values():
            assert parameter.annotation is not parameter.empty, parameter
            # What a function cannot do without is no option of it.
            if parameter.name in DEFAULTS and parameter.default is not parameter.empty:
                assert parameter.default == DEFAULTS[parameter.name], parameter
            if parameter.name in ("axis", "where", *ONCE_BY_PLACE.get(name, ())):
                continue
            if parameter.default is not parameter.empty:
                assert parameter.kind is parameter.KEYWORD_ONLY, parameter

    def test_the_signature_can_be_read(self, name):
        """`help` shows the names of types, not what these are made of."""
        for parameter in inspect.signature(getattr(ce_jax, name)).parameters.values():
            assert isinstance(parameter.annotation, str)
            assert parameter.annotation.count("|") <= 3, parameter


# kl_divergence has other arguments on purpose.
@pytest.mark.parametrize("name", sorted({*FUNCTIONS} & {*dir(optax.losses)} - {"kl_divergence"}))
def test_arguments_stand_where_optax_has_them(name):
    ours = inspect.signature(getattr(ce_jax, name)).parameters
    theirs = inspect.signature(getattr(optax.losses, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for argument, parameter in theirs.items():
        assert ours[argument].default == parameter.default
        by_place = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if by_place or argument in ONCE_BY_PLACE.get(name, ()):
            assert ours[argument].kind is parameter.POSITIONAL_OR_KEYWORD, argument
        else:  # and no option of ours takes its place
            assert ours[argument].kind is parameter.KEYWORD_ONLY, argument
    if name in ONCE_BY_PLACE:
        places = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert places == ONCE_BY_PLACE[name]


def test_optax_arguments_by_place():
    logits, labels = jnp.array([[0.5, -1.0]]), jnp.array([[1.0, 0.0]])
    np.testing.assert_array_equal(
        ce_jax.sigmoid_focal_loss(logits, labels, 0.25, 2.0),
        ce_jax.sigmoid_focal_loss(logits, labels, alpha=0.25, gamma=2.0),
    )
    where = jnp.array([True])
    np.testing.assert_array_equal(
        ce_jax.poly_loss_cross_entropy(logits, labels, 1.0, -1, where),
        ce_jax.poly_loss_cross_entropy(logits, labels, epsilon=1.0, axis=-1, where=where),
    )


def tracked_files():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    return [ROOT / name for name in listed.decode().split("\0") if name]


def test_no_file_names_a_folder_of_somebodys_machine():
    absolute = re.compile(r"(?<![\w./}])/(?:home|root|Users|work|tmp|mnt|opt)/\w", re.ASCII)
    for path in tracked_files():
        if path.suffix in {".png"} or not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not absolute.search(line), f"{path.relative_to(ROOT)}:{number}: {line}"


def test_files_stay_small():
    """And what serves platforms alone all together."""
    ways = (PACKAGE / "_platform").glob("*.py")
    assert sum(len(path.read_text().splitlines()) for path in ways) <= 350
    for path in tracked_files():
        if path.suffix == ".py" and path.is_file() and path.is_relative_to(PACKAGE):
            assert len(path.read_text().splitlines()) <= 400, path.name


@pytest.mark.parametrize(
    ("folder", "others"),
    [
        ("_rows", {"_platform"}),
        ("_platform", {"_rows"}),
        ("_arguments", {"_platform", "_rows", "ratio"}),
    ],
)
def test_imports_go_one_way(folder, others):
    """Private folders use no public family, and what is computed no checks of arguments."""
    for path in (PACKAGE / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                assert {name.split(".")[0] for name in names} <= others, f"{path.name}: {names}"
