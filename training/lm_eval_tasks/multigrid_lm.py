"""lm_eval for a MultiGrid with axes: `--model hf` passes tokens alone, `--model multigrid` annotates them first.

    python training/lm_eval_tasks/multigrid_lm.py --model multigrid --model_args pretrained=outputs/multigrid-tiny \\
        --include_path training/lm_eval_tasks --tasks stdlib_next_line

The command line is lm_eval's. Tokens are annotated from the start of each of lm_eval's windows, so a window in the middle of a
long text is annotated without the text before it; evaluate_model.py annotates complete texts.
"""

import sys
from pathlib import Path


# At the end of the path, where no module of ours hides a library.
sys.path.append(str(Path(__file__).parent.parent))

from loading import may_run_code  # isort: skip  # before lm_eval imports transformers, see argument_checks.py

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoProcessor


@register_model("multigrid")
class MultiGridLM(HFLM):
    """A MultiGrid in the parallel order with annotated axis ids.

    The code of a name on the Hub runs only with `trust_remote_code=True` in `--model_args`.

    Raises:
        ValueError: in the factored order, where a token is predicted from axis ids that it decides itself.
    """

    def __init__(self, pretrained: str, trust_remote_code: bool = False, **kwargs):
        trust = may_run_code(pretrained, trust_remote_code)
        super().__init__(pretrained, trust_remote_code=trust, **kwargs)
        if self.config.axis_order == "factored":
            raise ValueError(
                f"pretrained={pretrained}: with axis_order='factored' a token is predicted from its own axis ids, "
                "which lm_eval does not count; training/evaluate_model.py measures the bits per byte of such a model"
            )
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=trust)

    def _model_call(self, inps, attn_mask=None, labels=None):
        with torch.no_grad():
            return self.model(inps, axis_ids=self._annotate(inps)).logits

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        annotated = {"axis_ids": self._annotate(context), "axis_source": "annotated", "processor": self.processor}
        return super()._model_generate(context, max_length, stop, **annotated, **generation_kwargs)

    def _annotate(self, ids):
        """[batch, tokens] -> [batch, axes, tokens], token by token as in `generate`; padding does not change the state."""
        axis_ids = []
        for row in ids.tolist():
            pending, states = (), [axis.start() for axis in self.processor.axes]
            columns = []
            for token in row:
                new, pending = self.processor.new_characters(pending, token)
                steps = [axis.step(state, new) for axis, state in zip(self.processor.axes, states)]
                states = [state for _, state in steps]
                columns.append([axis_id for axis_id, _ in steps])
            axis_ids.append(list(zip(*columns)))
        return torch.tensor(axis_ids, device=ids.device)


if __name__ == "__main__":
    cli_evaluate()
