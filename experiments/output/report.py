"""What a classifier achieves on a test set, computed on the host from its log-probabilities.

Figures by class are scikit-learn's, those of calibration are of `ce_jax`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

import ce_jax


@dataclass(frozen=True)
class Evaluation:
    """Predictions on a test set and what follows from them.

    Attributes:
      loss: the training objective, on the test set.
      log_probs: `[n, classes]` log-probability of each class; one-vs-rest sigmoids need not sum to
        one.
      labels: `[n]` true classes.
      class_names: one name per class.
    """

    loss: float
    log_probs: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    @cached_property
    def predicted(self) -> np.ndarray:
        """Most probable class of each example, `[n]`."""
        return self.log_probs.argmax(axis=-1)

    @cached_property
    def nll(self) -> np.ndarray:
        """Negative log-probability in nats that each example's true class was given, `[n]`."""
        return -self.log_probs[np.arange(len(self.labels)), self.labels]

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return float(np.mean(self.predicted == self.labels))

    @cached_property
    def confusion(self) -> np.ndarray:
        """Number of examples of each true class (row) by predicted class (column)."""
        # Imported here because it takes a second, which only the end of a run needs to wait for.
        from sklearn import metrics

        classes = range(len(self.class_names))
        return metrics.confusion_matrix(self.labels, self.predicted, labels=classes)

    @cached_property
    def reliability(self) -> ce_jax.ReliabilityBins:
        """Confidence in the predicted class against how often it is the true one."""
        with jax.enable_x64(True):
            return jax.device_get(ce_jax.reliability_bins(*self._bets))

    @cached_property
    def calibration_error(self) -> float:
        """Expected calibration error: the mean gap, weighted by the number of examples."""
        with jax.enable_x64(True):
            return float(ce_jax.expected_calibration_error(*self._bets))

    @property
    def _bets(self) -> tuple[np.ndarray, np.ndarray]:
        """The confidence in each prediction, and whether it is right."""
        confidence = np.exp(self.log_probs.max(axis=-1).astype(np.float64))
        return confidence, self.predicted == self.labels

    @property
    def per_class(self) -> list[dict[str, Any]]:
        """One row per class: examples, precision, recall, F1 and mean negative log-probability.

        A figure that would divide by zero (no example, or none predicted) is NaN.
        """
        from sklearn import metrics

        classes = len(self.class_names)
        precision, recall, f1, examples = metrics.precision_recall_fscore_support(
            self.labels, self.predicted, labels=range(classes), zero_division=np.nan
        )
        with np.errstate(invalid="ignore"):
            nll = np.bincount(self.labels, self.nll, classes) / examples
        columns = {"precision": precision, "recall": recall, "f1": f1, "nll": nll}
        return [
            {
                "class": name,
                "examples": int(examples[index]),
                **{key: float(values[index]) for key, values in columns.items()},
            }
            for index, name in enumerate(self.class_names)
        ]

    @property
    def summary(self) -> dict[str, float]:
        """The figures that describe the whole test set."""
        return {
            "test_loss": self.loss,
            "test_accuracy": self.accuracy,
            "test_nll": float(np.mean(self.nll)),
            "calibration_error": self.calibration_error,
        }
