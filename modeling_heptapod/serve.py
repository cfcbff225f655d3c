"""`heptapod-serve FOLDER [options]`: `transformers serve` for the causal families.

It looks for a model's class on the `transformers` module, so that is where this puts ours.
"""

import sys
from functools import cached_property

from transformers import AutoProcessor
from transformers.cli import transformers as command_line

from .hierarchical_lm.modeling_hierarchical_lm import HierarchicalLMForCausalLM
from .leap.modeling_leap import LeapForCausalLM
from .multigrid.modeling_multigrid import MultiGridForCausalLM


class ServedMultiGridForCausalLM(MultiGridForCausalLM):
    """Annotates prompts that come without axis ids: completions are given to the tokenizer, not to the processor."""

    @cached_property
    def _processor(self):
        revision = getattr(self.config, "_commit_hash", None)
        return AutoProcessor.from_pretrained(self.config._name_or_path, revision=revision)

    def generate(self, *args, **kwargs):
        """As the parent's, with the processor of the model's folder where there are axes and no `axis_ids`."""
        if self.config.num_axes and kwargs.get("axis_ids") is None:
            kwargs.setdefault("processor", self._processor)
        return super().generate(*args, **kwargs)


def main() -> None:
    """Run `transformers serve` with the arguments of this process."""
    import transformers  # here: importing models, which is done by now, puts another module in its place

    transformers.HierarchicalLMForCausalLM = HierarchicalLMForCausalLM
    transformers.LeapForCausalLM = LeapForCausalLM
    transformers.MultiGridForCausalLM = ServedMultiGridForCausalLM
    sys.argv.insert(1, "serve")
    command_line.main()


if __name__ == "__main__":
    main()
