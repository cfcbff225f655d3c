"""How much of the text the steps of a run read."""

from transformers import TrainingArguments


class Reading:
    """Examples that optimizer steps read, in all processes together.

    The last step of an epoch may be short. Several processes have full batches all the same: accelerate fills up the last
    ones with the first examples of the epoch.

    Args:
        examples (`int`): of an epoch.
        args: sizes of batches and the number of processes.

    Attributes:
        per_step (`int`): of a step that is not short.
        per_epoch (`int`): with those that are read again.
        steps (`int`): of an epoch.
    """

    def __init__(self, examples: int, args: TrainingArguments):
        batch = args.train_batch_size * args.world_size
        batches = examples // batch if args.dataloader_drop_last else -(-examples // batch)
        self.per_step = batch * args.gradient_accumulation_steps
        self.per_epoch = batches * batch if args.dataloader_drop_last or args.world_size > 1 else examples
        self.steps = -(-batches // args.gradient_accumulation_steps)

    def examples_in(self, steps: int) -> int:
        """Of the first `steps` steps of a run."""
        epochs, more = divmod(steps, self.steps)
        return epochs * self.per_epoch + more * self.per_step

    def steps_for(self, examples: int) -> int:
        """The least number of steps that read so many."""
        epochs, more = divmod(examples, self.per_epoch)
        return epochs * self.steps + -(-more // self.per_step)
