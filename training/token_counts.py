"""Number of examples that the steps of a run read."""

from transformers import TrainingArguments


class Reading:
    """Number of examples that optimizer steps read, in all processes together.

    The last step of an epoch may be short. Several processes always have full batches: accelerate fills the last
    ones with the first examples of the epoch.

    Args:
        examples (`int`): number of examples of an epoch.
        args: the training arguments.

    Attributes:
        per_step (`int`): examples of a step that is not short.
        per_epoch (`int`): examples of an epoch, repeated ones included.
        steps (`int`): steps of an epoch.
    """

    def __init__(self, examples: int, args: TrainingArguments):
        batch = args.train_batch_size * args.world_size
        batches = examples // batch if args.dataloader_drop_last else -(-examples // batch)
        self.per_step = batch * args.gradient_accumulation_steps
        self.per_epoch = batches * batch if args.dataloader_drop_last or args.world_size > 1 else examples
        self.steps = -(-batches // args.gradient_accumulation_steps)

    def examples_in(self, steps: int) -> int:
        """Number of examples in the first `steps` steps of a run."""
        epochs, more = divmod(steps, self.steps)
        return epochs * self.per_epoch + more * self.per_step

    def steps_for(self, examples: int) -> int:
        """The smallest number of steps that read as many examples."""
        epochs, more = divmod(examples, self.per_epoch)
        return epochs * self.steps + -(-more // self.per_step)
