"""What the package promises as a whole: its names, types, documentation, and what it imports."""

import collections.abc
import inspect
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import optax.losses
import pytest

import ce_jax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ce_jax"
NAMES = {
    "CrossEntropyParts",
    "GradientView",
    "Negatives",
    "NextTokens",
    "PriorEstimate",
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
    "kl_divergence",
    "linear_distillation_loss",
    "linear_sampled_softmax_cross_entropy",
    "linear_softmax_cross_entropy",
    "linear_softmax_statistics",
    "log_uniform_log_prob",
    "log_uniform_negatives",
    "mean_denominator",
    "next_tokens",
    "nll_loss",
    "on_mesh",
    "perplexity",
    "poly_loss",
    "poly_loss_cross_entropy",
    "prediction_logit_offset",
    "prior_shift_weights",
    "reliability_bins",
    "safe_softmax_cross_entropy",
    "sampled_softmax_cross_entropy",
    "self_information",
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "siglip_loss",
    "smooth_labels",
    "soft_bootstrapped_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softmax_statistics",
    "supervised_contrastive_loss",
    "symmetric_cross_entropy",
    "training_logit_offset",
    "uncertainty_weighted_loss",
    "uniform_negatives",
}
FUNCTIONS = sorted(name for name in NAMES if name.islower())
# Shared by every function that has it, with one default.
DEFAULTS = {
    "axis": -1,
    "where": None,
    "weight": None,
    "pos_weight": None,
    "sample_weight": None,
    "ignore_index": None,
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "axis_name": None,
    "reduction": "none",
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
    if typing.get_origin(annotation) is collections.abc.Callable:
        return []
    if typing.get_origin(annotation) in (types.UnionType, tuple):
        return [array for part in typing.get_args(annotation) for array in results(part)]
    return [annotation]


def test_public_names():
    found = {
        name
        for name, value in vars(ce_jax).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert found == NAMES


def test_importing_it_imports_no_framework():
    heavy = ["optax", "flax", "torch", "chex", "matplotlib", "sklearn"]
    code = f"import sys, ce_jax; print(*(m for m in {heavy} if m in sys.modules))"
    assert python(code) == []


def test_other_losses_are_those_of_optax():
    assert ce_jax.huber_loss is optax.losses.huber_loss
    assert ce_jax.softmax_cross_entropy is not optax.losses.softmax_cross_entropy
    with pytest.raises(AttributeError, match="no_such_loss"):
        _ = ce_jax.no_such_loss
    assert not hasattr(ce_jax, "__no_such_attribute__")


def test_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("name", FUNCTIONS)
class TestFunction:
    def test_documentation(self, name):
        """In one line what it is; formula, arguments, result, errors, example, source."""
        doc = inspect.getdoc(getattr(ce_jax, name))
        summary, blank, _ = doc.split("\n", 2)
        assert summary.endswith(".")
        assert not blank
        assert "math::" in doc or "`" in summary, "the formula is missing"
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
            if parameter.name in DEFAULTS:
                assert parameter.default == DEFAULTS[parameter.name], parameter
            if parameter.name not in ("axis", "where") and parameter.default is not parameter.empty:
                assert parameter.kind is parameter.KEYWORD_ONLY, parameter


# kl_divergence has other arguments on purpose.
@pytest.mark.parametrize("name", sorted({*FUNCTIONS} & {*dir(optax.losses)} - {"kl_divergence"}))
def test_arguments_stand_where_optax_has_them(name):
    ours = inspect.signature(getattr(ce_jax, name)).parameters
    theirs = inspect.signature(getattr(optax.losses, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for argument, parameter in theirs.items():
        assert ours[argument].default == parameter.default
        assert ours[argument].kind == parameter.kind


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
    for path in tracked_files():
        if path.suffix == ".py" and path.is_file() and path.is_relative_to(PACKAGE):
            assert len(path.read_text().splitlines()) <= 400, path.name
