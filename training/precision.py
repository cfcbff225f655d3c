"""The faster of float32 and bfloat16 autocast, by the time of training steps on this device."""

import copy
import statistics
import time
from collections.abc import Iterable
from itertools import islice

import torch
from transformers import PreTrainedModel, default_data_collator


SECONDS = 1.0  # of all timed passes
LEAST_ROUNDS = 2
FASTER = 0.97  # a tie is float32


def is_faster_in_bf16(model: PreTrainedModel, examples: Iterable, batch_size: int, device: torch.device) -> bool:
    """Whether forward and backward passes take less time with bfloat16 autocast than in float32.

    Passes of a copy of the model are timed in turns, for about a second. The medians are compared.

    Args:
        model: the model to train.
        examples: examples of its training, with labels. The first batch is used.
        batch_size: number of examples in a batch.
        device: where the model is trained.
    """
    batch = default_data_collator(list(islice(iter(examples), batch_size)))
    batch = {name: value.to(device) for name, value in batch.items()}
    model = copy.deepcopy(model).to(device).train()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # training draws what it would have drawn
        for in_bf16 in seconds:
            _seconds_of_pass(model, batch, device, in_bf16)  # compiles and allocates
        began = time.perf_counter()
        while len(seconds[False]) < LEAST_ROUNDS or time.perf_counter() - began < SECONDS:
            for in_bf16, passes in seconds.items():
                passes.append(_seconds_of_pass(model, batch, device, in_bf16))
    return statistics.median(seconds[True]) < FASTER * statistics.median(seconds[False])


def _seconds_of_pass(model, batch, device, in_bf16):
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
        loss = model(**batch).loss
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    model.zero_grad()
    return time.perf_counter() - began
