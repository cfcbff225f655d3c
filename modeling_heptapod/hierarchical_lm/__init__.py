"""Hierarchical LM: causal models that read a text at several resolutions (`docs/families/hierarchical_lm.md`)."""

from typing import TYPE_CHECKING

from ..common.lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .configuration_hierarchical_lm import *
    from .hierarchical_cache import *
    from .modeling_hierarchical_lm import *
    from .static_hierarchical_cache import *
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "configuration_hierarchical_lm": ["HierarchicalLMConfig"],
            "hierarchical_cache": ["HierarchicalCache"],
            "modeling_hierarchical_lm": [
                "HierarchicalLMForCausalLM",
                "HierarchicalLMModel",
                "HierarchicalLMPreTrainedModel",
            ],
            "static_hierarchical_cache": ["StaticHierarchicalCache"],
        },
    )
