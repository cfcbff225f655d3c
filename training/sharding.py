"""A `Trainer` that shards weights over processes (FSDP2), also on CPUs."""

from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from checkpoints import WholeCheckpoints
from hub_upload import CleanPushes
from named_losses import NamedLossTrainer
from stopping import Ending
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import EarlyStoppingCallback


class ShardingTrainer(CleanPushes, WholeCheckpoints, NamedLossTrainer):
    """A [`NamedLossTrainer`] with three corrections of `--fsdp`, and stricter checkpoints and uploads.

    On CPUs accelerate ignores `--fsdp` without a warning and trains with DDP. Models are saved sharded on CPUs, and with the code of
    torch's wrapper instead of the model's. Methods other than `forward` and `generate` are called with sharded weights.

    In all runs: a run that is resumed at its last step, or at its early stop, ends there, where `Trainer` continues to train;
    checkpoints are checked, see [`WholeCheckpoints`]; uploads contain no arguments, see [`CleanPushes`]; and `Trainer` writes no
    model card.
    """

    def create_accelerator_and_postprocess(self):
        """Like `Trainer`'s; on CPUs with the same setup as accelerate's on GPUs."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if not self.args.fsdp or state.distributed_type != DistributedType.MULTI_CPU:
            return
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if isinstance(self.model, FSDPModule) and hasattr(self.model, "elbo"):
            register_fsdp_forward_method(self.model, "elbo")
        return prepared

    def _run_epoch(self, *args, **kwargs):
        callbacks = self.callback_handler.callbacks
        early = [each for each in callbacks if isinstance(each, EarlyStoppingCallback)]
        stopped = any(each.early_stopping_patience_counter >= each.early_stopping_patience for each in early)
        stopped |= any(each.has_ended for each in callbacks if isinstance(each, Ending))
        if self.state.global_step < self.state.max_steps and not stopped:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True

    def create_model_card(self, *args, **kwargs):
        """Does nothing: train.py writes the card when all figures are known."""

    def save_model(self, output_dir=None, _internal_call=False):
        """Like `Trainer.save_model`. All processes must call it."""
        if not isinstance(self.model, FSDPModule):
            return super().save_model(output_dir, _internal_call)
        weights = {}
        for name, value in self.model.state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value  # all processes take part
            if self.args.should_save:
                weights[name] = whole.cpu()
        sharded = type(self.model)
        self.model.__class__ = next(kind for kind in sharded.__mro__[1:] if not issubclass(kind, FSDPModule))
        try:
            self._save(output_dir or self.args.output_dir, state_dict=weights)
        finally:
            self.model.__class__ = sharded
