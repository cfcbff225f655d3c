"""Logs of all named losses of a model, `ce_loss`, `prophet_loss` ..., beside their sum `loss`."""

from collections import defaultdict

import torch
from accelerate.utils import find_batch_size
from transformers import Trainer


def losses_by_name(outputs, config) -> dict[str, torch.Tensor]:
    """The losses `<name>_loss` of a model's output; `axis_losses` have the names of the config's axes."""
    losses = {name: value for name, value in outputs.items() if name.endswith("_loss")}
    metas = outputs.get("axis_losses") or ()
    return losses | {f"{axis}_loss": value for axis, value in zip(getattr(config, "axis_names", ()), metas)}


class NamedLossTrainer(Trainer):
    """A `Trainer` that also logs the losses `<name>_loss` of a model's output, see [`losses_by_name`].

    In training, they are means over the optimizer steps since the last log, as `loss` is; in evaluation, means over the
    examples, as `eval_loss` is. Losses that are `None` are not logged.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._batch_losses = {}  # of the last batch
        self._sums, self._steps = defaultdict(float), 0.0  # since the last log
        self._evaluated = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Like `Trainer.compute_loss`, and keeps the losses by name."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        share = 1 / self.current_gradient_accumulation_steps if model.training else 1.0
        scale = of_total = share
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # Already weighted by the batch's share of a step; `Trainer` has multiplied the total, in place, for all devices.
            devices = max(self.accelerator.num_processes, self.args.n_gpu)
            scale, of_total = devices if self.args.average_tokens_across_devices else 1.0, 1.0
        self._batch_losses = {
            name: value.detach().mean() * (of_total if value is loss else scale)
            for name, value in losses_by_name(outputs, self.model.config).items()
        }
        if model.training:
            self._steps += share
            for name, value in self._batch_losses.items():
                self._sums[name] += value
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        """Like `Trainer.log`, with the means in the entries that have a training loss."""
        if "loss" in logs:
            means = {name: self.accelerator.reduce(total, "mean").item() for name, total in self._sums.items()}
            logs = {"loss": logs["loss"], **{name: total / self._steps for name, total in means.items()}, **logs}
        if "loss" in logs or "train_loss" in logs:  # the latter at the end
            self._sums.clear()
            self._steps = 0.0
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Like `Trainer.prediction_step`, which every batch of an evaluation goes through."""
        self._batch_losses = {}  # stays empty where there are no labels
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        for name, value in self._batch_losses.items():
            self._evaluated[name].append(self.gather_function(value.repeat(find_batch_size(inputs))))
        return result

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """Like `Trainer.evaluation_loop`, with the means among its metrics."""
        self._evaluated.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, values in self._evaluated.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = torch.cat(values).mean().item()
        return output
