"""Heptapod: masked diffusion models of text on a grid (`docs/families/heptapod.md`)."""

from typing import TYPE_CHECKING

from ..common.lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .configuration_heptapod import *
    from .generation_config_heptapod import *
    from .generation_heptapod import *
    from .modeling_heptapod import *
    from .processing_heptapod import *
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "configuration_heptapod": ["HeptapodConfig"],
            "generation_config_heptapod": ["HeptapodGenerationConfig"],
            "generation_heptapod": ["HeptapodGenerationMixin"],
            "modeling_heptapod": ["HeptapodForMaskedLM", "HeptapodModel", "HeptapodPreTrainedModel"],
            "processing_heptapod": ["HeptapodProcessor"],
        },
    )
