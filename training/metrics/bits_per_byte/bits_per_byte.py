"""Bits per byte as a metric of the library `evaluate`."""

import math

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Bits per byte: the code length of a text under a language model, over the text's bytes in UTF-8. Unlike perplexity it does not
depend on the tokenizer.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[float]`): code lengths in nats, -log p, of any parts of the text that together are all of it, such as
        tokens or rows. Tokens that end a text count, too.
    num_bytes (`int`): bytes of the text.

Returns:
    `bits_per_byte` (`float`).

Example:

    >>> metric = evaluate.load("training/metrics/bits_per_byte")
    >>> metric.compute(predictions=[0.5, 2.0], num_bytes=4)
    {'bits_per_byte': 0.9016844005556022}
"""


class BitsPerByte(evaluate.Metric):
    """Sum of the nats, in float64, over ln 2 and the bytes."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, predictions, num_bytes):
        nats = np.asarray(predictions, dtype=np.float64)
        return {"bits_per_byte": float(nats.sum()) / math.log(2) / num_bytes}
