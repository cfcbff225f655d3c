"""lm_eval for a MultiGrid with axes: `--model hf` gives it tokens alone, `--model multigrid` annotates them first.

    python training/lm_eval_tasks/multigrid_lm.py --model multigrid --model_args pretrained=outputs/multigrid-tiny \\
        --include_path training/lm_eval_tasks --tasks stdlib_next_line

Everything else is lm_eval's own command line. Tokens are annotated from the beginning of what lm_eval gives at once, so a
window in the middle of a long text starts as if nothing came before it; evaluate_model.py annotates whole texts.
"""

import sys
from pathlib import Path

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoProcessor


# At the end of the path, where no module of ours hides a library.
sys.path.append(str(Path(__file__).parent.parent))
from loading import may_run_code


@register_model("multigrid")
class MultiGridLM(HFLM):
    """A MultiGrid in the parallel order, whose axis ids are those that its annotators give.

    A name on the Hub brings code that runs only with `trust_remote_code=True` among the model's arguments.

    Raises:
        ValueError: in the factored order, where a token is predicted from axis ids that it decides itself.
    """

    def __init__(self, pretrained: str, trust_remote_code: bool = False, **kwargs):
        trust = may_run_code(pretrained, trust_remote_code)
        super().__init__(pretrained, trust_remote_code=trust, **kwargs)
        if self.config.axis_order == "factored":
            raise ValueError(
                f"pretrained={pretrained}: with axis_order='factored' a token is predicted from its own axis ids, "
                "which lm_eval does not count; training/evaluate_model.py measures what such a text costs"
            )
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=trust)

    def _model_call(self, inps, attn_mask=None, labels=None):
        with torch.no_grad():
            return self.model(inps, axis_ids=self._annotate(inps)).logits

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        annotated = {"axis_ids": self._annotate(context), "axis_source": "annotated", "processor": self.processor}
        return super()._model_generate(context, max_length, stop, **annotated, **generation_kwargs)

    def _annotate(self, ids):
        """[batch, tokens] -> [batch, axes, tokens], token by token as when writing; pads leave no trace."""
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
