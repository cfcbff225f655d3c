"""Accuracy with its standard error and macro F1 as a metric of the library `evaluate`."""

import math

import datasets
import evaluate
import numpy as np
from sklearn.metrics import f1_score


_DESCRIPTION = """
Accuracy with its standard error, and the mean of the classes' F1.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): the predicted class of each row.
    references (`list[str]`): its class.

Returns:
    `accuracy`, `standard_error` of the accuracy and `macro_f1` (`float`).

Example:

    >>> metric = evaluate.load("training/metrics/classification_scores")
    >>> metric.compute(predictions=["a", "b"], references=["a", "a"])
    {'accuracy': 0.5, 'standard_error': 0.3535533905932738, 'macro_f1': 0.3333333333333333}
"""


class ClassificationScores(evaluate.Metric):
    """Scores of classes with string labels."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        predicted, labels = np.asarray(predictions), np.asarray(references)
        accuracy = float((predicted == labels).mean())
        return {
            "accuracy": accuracy,
            "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(labels)),
            "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        }
