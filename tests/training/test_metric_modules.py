"""The metrics for the library `evaluate`: by hand, on numbers of any size, and without a network."""

import math

import numpy as np
import pytest
from metric_modules import bits_per_byte, load_metric


def test_bits_per_byte_by_hand():
    assert bits_per_byte([math.log(256), math.log(2)], 2) == 4.5
    assert bits_per_byte(np.array([math.log(2)], dtype=np.float32), 8) == pytest.approx(1 / 8, rel=1e-7)


@pytest.mark.parametrize("size", [1, 256, 8193, 100_000])
def test_sums_are_of_float64_in_the_order_of_the_text(size):
    nats = np.random.default_rng(size).gamma(2, 1, size).astype(np.float32)
    assert bits_per_byte(nats, 7) == float(nats.sum(dtype=np.float64)) / math.log(2) / 7


def test_scores_by_hand():
    found = load_metric("classification_scores").compute(predictions=list("abbb"), references=list("aabc"))
    assert (found["accuracy"], found["standard_error"]) == (0.5, 0.25)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


@pytest.mark.parametrize("name", ["bits_per_byte", "classification_scores"])
def test_a_metric_explains_itself(name):
    metric = load_metric(name)
    assert metric.name == name and metric.description.strip() and "Returns:" in metric.inputs_description
    example = metric.inputs_description.split(">>> metric.compute(")[1]
    call, shown = example.split(")\n", 1)
    assert metric.compute(**eval(f"dict({call})")) == eval(shown)
