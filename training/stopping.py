"""Runs that end before their last step: by the clock or by a signal."""

import signal
import time
from contextlib import contextmanager

import torch
from transformers import TrainerCallback


class Ending(TrainerCallback):
    """Callback that ends training and saves after the step in which time runs out or a signal arrives, the same step in all processes.

    Args:
        seconds: limit of the training, evaluations included; `None` for no limit.
        used: seconds used by the runs before the resumed checkpoint.

    Attributes:
        by_clock (`bool`): whether time ran out.
        signal (`int` or `None`): signal that any process received.
    """

    def __init__(self, seconds: float | None = None, used: float = 0.0):
        self.seconds, self.used = seconds, used
        self.by_clock, self.signal = False, None
        self._seen, self._was_interrupted = 0, False  # by this process
        self._began = time.monotonic()

    @property
    def seconds_used(self) -> float:
        """Seconds of training, by this run and those before it."""
        return self.used + time.monotonic() - self._began

    @property
    def has_ended(self) -> bool:
        """Returns whether training ends."""
        return self.by_clock or self.signal is not None

    @contextmanager
    def signals(self):
        """Context manager in which SIGTERM and Ctrl-C take effect at the end of the step. A second Ctrl-C takes effect at once."""

        def note(number, frame):
            if number == signal.SIGINT and self._was_interrupted:
                raise KeyboardInterrupt
            self._was_interrupted |= number == signal.SIGINT
            self._seen = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agree(self, args) -> None:
        """Share time-outs and signals between all processes, which must call this together."""
        is_over = self.seconds is not None and self.seconds_used >= self.seconds
        seen = [self._seen, int(is_over)]
        if args.world_size > 1:
            shared = torch.tensor(seen, device=args.device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
            seen = shared.tolist()
        self.signal, self.by_clock = seen[0] or None, bool(seen[1])

    def on_train_begin(self, args, state, control, **kwargs):
        self._began = time.monotonic()
        # `used` is of the same checkpoint in all processes, so they need not agree.
        self.by_clock = self.seconds is not None and self.used >= self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        self.agree(args)
        if self.has_ended:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
