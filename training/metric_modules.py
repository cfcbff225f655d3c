"""Our metrics for the library `evaluate`, in `metrics/`: loaded by path, without a network."""

from functools import cache
from pathlib import Path

import numpy as np


@cache
def load_metric(name: str):
    """The metric of this name, `evaluate.load("training/metrics/<name>")`."""
    from evaluate import load  # when something is measured: it imports `datasets`

    return load(str(Path(__file__).parent / "metrics" / name), keep_in_memory=True)


def bits_per_byte(nats: np.ndarray, num_bytes: int) -> float:
    """The metric `bits_per_byte` of the code lengths of all parts of a text, in nats."""
    return load_metric("bits_per_byte").compute(predictions=nats, num_bytes=num_bytes)["bits_per_byte"]
