"""Metrics in `metrics/` for the library `evaluate`, loaded by path and offline."""

from functools import cache
from pathlib import Path

import numpy as np


@cache
def load_metric(name: str):
    """Load a metric: `evaluate.load("training/metrics/<name>")`."""
    from evaluate import load  # not at the start, since it imports `datasets`

    return load(str(Path(__file__).parent / "metrics" / name), keep_in_memory=True)


def bits_per_byte(nats: np.ndarray, num_bytes: int) -> float:
    """The metric `bits_per_byte` from the nats of all parts of a text."""
    return load_metric("bits_per_byte").compute(predictions=nats, num_bytes=num_bytes)["bits_per_byte"]
