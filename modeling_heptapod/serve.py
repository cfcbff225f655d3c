"""`heptapod-serve FOLDER [options]`: `transformers serve` for the causal families.

`transformers serve` looks up model classes as attributes of the `transformers` module, so they are set there.
"""

import sys
from functools import cached_property

from transformers import AutoProcessor
from transformers.cli import transformers as command_line

from .hierarchical_lm.modeling_hierarchical_lm import HierarchicalLMForCausalLM
from .leap.modeling_leap import LeapForCausalLM
from .multigrid.modeling_multigrid import MultiGridForCausalLM


class ServedMultiGridForCausalLM(MultiGridForCausalLM):
    """Model that annotates prompts without axis ids: `transformers serve` calls the tokenizer, not the processor."""

    @cached_property
    def _processor(self):
        revision = getattr(self.config, "_commit_hash", None)
        return AutoProcessor.from_pretrained(self.config._name_or_path, revision=revision)

    def generate(self, *args, **kwargs):
        """Same as the parent's; without `axis_ids` it uses the processor of the model's folder."""
        if self.config.num_axes and kwargs.get("axis_ids") is None:
            kwargs.setdefault("processor", self._processor)
        return super().generate(*args, **kwargs)


def main() -> None:
    """Run `transformers serve` with the arguments of this process."""
    import transformers  # imported here, since importing models replaces the module

    vars(transformers).update(
        HierarchicalLMForCausalLM=HierarchicalLMForCausalLM,
        LeapForCausalLM=LeapForCausalLM,
        MultiGridForCausalLM=ServedMultiGridForCausalLM,
    )
    sys.argv.insert(1, "serve")
    command_line.main()


if __name__ == "__main__":
    main()
