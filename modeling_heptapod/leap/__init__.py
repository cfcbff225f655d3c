"""LEAP: causal, masked and classification models in linear time (`docs/families/leap.md`)."""

from typing import TYPE_CHECKING

from ..common.lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .configuration_leap import *
    from .modeling_leap import *
    from .recurrent_cache import *
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "configuration_leap": ["LeapConfig"],
            "modeling_leap": [
                "LeapForCausalLM",
                "LeapForMaskedLM",
                "LeapForSequenceClassification",
                "LeapModel",
                "LeapPreTrainedModel",
            ],
            "recurrent_cache": ["RecurrentCache", "StaticRecurrentCache"],
        },
    )
