"""The precision that `--bf16_if_fast` chooses: the faster one, and that of the first part of a run that is resumed."""

import json
from types import SimpleNamespace

import precision
import pytest
import torch
import train
from torch import nn
from transformers import TrainingArguments

from tests.tiny_leap import random_ids, tiny_leap


@pytest.fixture
def clock(monkeypatch):
    """The time of `Sleeper`, which other work on the machine does not change."""
    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=lambda: Sleeper.now))


class Sleeper(nn.Module):
    """A model whose passes take the given seconds on the clock `now`, in float32 and in bfloat16."""

    now = 0.0

    def __init__(self, single, half):
        super().__init__()
        self.weight, self.seconds = nn.Parameter(torch.ones(3)), {False: single, True: half}
        self.passes = []

    def forward(self, input_ids, labels):
        assert self.training and input_ids.shape == labels.shape == (2, 5)
        in_bf16 = torch.is_autocast_enabled("cpu")
        assert not in_bf16 or torch.get_autocast_dtype("cpu") == torch.bfloat16
        self.passes.append(in_bf16)
        Sleeper.now += self.seconds[in_bf16]
        return SimpleNamespace(loss=self.weight.sum() * torch.rand(()))

    def __deepcopy__(self, memo):
        copied = Sleeper(*self.seconds.values())
        copied.passes = self.passes
        return copied


EXAMPLES = [{"input_ids": [1] * 5, "labels": [2] * 5} for _ in range(3)]


@pytest.fixture(autouse=True)
def in_a_moment(monkeypatch):
    monkeypatch.setattr(precision, "SECONDS", 0.1)


@pytest.mark.parametrize("single, half, faster", [(0.02, 0.01, True), (0.01, 0.02, False), (0.02, 0.02, False)])
@pytest.mark.usefixtures("clock")
def test_the_faster_one(single, half, faster):
    model = Sleeper(single, half)
    state = torch.get_rng_state()
    assert precision.is_faster_in_bf16(model, EXAMPLES, 2, torch.device("cpu")) == faster
    assert torch.equal(torch.get_rng_state(), state) and model.weight.grad is None
    assert model.passes.count(True) == model.passes.count(False) >= 3


def test_at_least_two_passes_of_each_however_long_they_take(monkeypatch):
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    model = Sleeper(0.0, 0.0)
    precision.is_faster_in_bf16(model, EXAMPLES, 2, torch.device("cpu"))
    assert model.passes == [True, False] * 3


def test_a_model_is_left_as_it_was():
    model, ids = tiny_leap().eval(), random_ids(2, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    examples = [{"input_ids": row, "labels": row} for row in ids]
    assert precision.is_faster_in_bf16(model, examples, 2, torch.device("cpu")) in (True, False)
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def choose(folder, asked=True, checkpoint=None, **options):
    model_args = train.ModelArguments(config_name="", bf16_if_fast=asked)
    args = TrainingArguments(str(folder), use_cpu=True, per_device_train_batch_size=2, **options)
    objective = SimpleNamespace(train_dataset=EXAMPLES)
    return train.choose_precision(model_args, args, objective, Sleeper(0.02, 0.01), checkpoint)


@pytest.mark.usefixtures("clock")
def test_bf16_is_set_where_it_is_asked_for_and_faster(tmp_path, monkeypatch):
    assert choose(tmp_path).bf16
    assert not choose(tmp_path, asked=False).bf16
    monkeypatch.setattr(train, "is_faster_in_bf16", lambda *_: False)
    assert not choose(tmp_path).bf16
    assert choose(tmp_path, bf16=True).bf16


@pytest.mark.parametrize("before", [True, False])
def test_a_resumed_run_keeps_its_precision(before, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "is_faster_in_bf16", lambda *_: not before)
    run = {"settings": {"--bf16": before}, "length": {}, "processes": 1}
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    assert choose(tmp_path, checkpoint=str(tmp_path)).bf16 == before
