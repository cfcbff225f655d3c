"""Callbacks of a run: samples, speed, and the best checkpoint of a resumed run."""

import json
import math
import time
from pathlib import Path

import psutil
import torch
from checkpoints import damage_of
from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)


def state_of(checkpoint: str) -> dict:
    """State of `Trainer` in a checkpoint."""
    return json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))


class BestCheckpoint(TrainerCallback):
    """Drops the best checkpoint of a resumed run if it is missing or damaged, so that a later one is chosen.

    Args:
        checkpoint: the resumed checkpoint, if any.
    """

    def __init__(self, checkpoint: str | None):
        self.checkpoint = checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        # As it was saved: of a folder that is not there any more `Trainer` remembers nothing. The best step has none where
        # evaluations come more often than checkpoints.
        best = self.checkpoint and state_of(self.checkpoint).get("best_model_checkpoint")
        if not args.load_best_model_at_end or best is None:
            return
        here = Path(args.output_dir, Path(best).name)
        damages = {}
        for folder in (best, here):  # the output folder may have been moved
            damages[folder] = damage_of(Path(folder), args.world_size)
            if damages[folder] is None:
                state.best_model_checkpoint = str(folder)
                return
        logger.warning(
            f"--load_best_model_at_end: {here}, the best so far, is not a complete checkpoint ({damages[here]}): the best later one "
            "is used"
        )
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None


class Samples(TrainerCallback):
    """Prints and logs a sample of the model at each evaluation.

    The sample has its own seed, so that training does not depend on it.
    """

    def __init__(self, sample):
        self.sample = sample

    def on_evaluate(self, args, state, control, model, metrics=None, **kwargs):
        if not all(math.isfinite(value) for value in (metrics or {}).values()):
            return  # without finite logits there is no sample
        was_training = model.training
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            text = self.sample(model)  # in all processes, since weights may be sharded
        model.train(was_training)
        state.log_history.append({"sample": text, "step": state.global_step})
        if state.is_world_process_zero:
            print(f"--- a sample at step {state.global_step}\n{text}\n---", flush=True)


class Speed(TrainerCallback):
    """Time from the start of the process to the end of its first optimizer step, and of later steps.

    Attributes:
        seconds (`float`): to the end of the first step.
        later_seconds (`float`): of the steps after it, without evaluating and saving.
    """

    seconds = None

    def __init__(self):
        self.timer = StepTimer()

    def on_step_begin(self, *args, **kwargs):
        self.timer.on_step_begin(*args, **kwargs)

    @property
    def later_seconds(self):
        return sum(self.timer.seconds[1:])

    def on_step_end(self, args, state, control, **kwargs):
        self.timer.on_step_end(args, state, control)
        if self.seconds is None:
            self.seconds = round(time.time() - psutil.Process().create_time(), 2)
            if state.is_world_process_zero:
                print(f"seconds to the first step: {self.seconds:.1f}", flush=True)


class StepTimer(TrainerCallback):
    """Seconds that each optimizer step took."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)
