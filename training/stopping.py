"""Runs that end before their last step: by the clock, or because somebody asks them to."""

import signal
import time
from contextlib import contextmanager

import torch
from transformers import TrainerCallback


class Ending(TrainerCallback):
    """Ends training after the step in which time runs out or a signal came, in all processes after the same one, and saves.

    Args:
        seconds: that training may take, with evaluations and all else; `None`: as long as it takes.
        used: of them by the runs that this one goes on from.

    Attributes:
        by_clock (`bool`): whether time ran out.
        signal (`int` or `None`): of any process.
    """

    def __init__(self, seconds: float | None = None, used: float = 0.0):
        self.seconds, self.used = seconds, used
        self.by_clock, self.signal = False, None
        self._seen, self._was_interrupted = 0, False  # by this process
        self._began = time.monotonic()

    @property
    def seconds_used(self) -> float:
        """Of training, by this run and those before it."""
        return self.used + time.monotonic() - self._began

    @property
    def has_ended(self) -> bool:
        """Whether there are to be no more steps."""
        return self.by_clock or self.signal is not None

    @contextmanager
    def signals(self):
        """While in the block, SIGTERM and Ctrl-C wait for the end of the step. A second Ctrl-C does not."""

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
        """Make what one process has seen known to all, which must call this together."""
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
