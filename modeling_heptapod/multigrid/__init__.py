"""MultiGrid: causal models of text with further axes, such as parts of speech (`docs/families/multigrid.md`)."""

from typing import TYPE_CHECKING

from ..common.lazy_exports import lazy_exports


if TYPE_CHECKING:
    from .axes import *
    from .axis_registry import *
    from .configuration_multigrid import *
    from .decision_tree_axis import *
    from .generation_multigrid import *
    from .modeling_multigrid import *
    from .multigrid_cache import *
    from .processing_multigrid import *
    from .python_axes import *
    from .text_axes import *
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "axes": ["Axis", "ConstantAxis", "RandomAxis", "check_axis", "find_lookahead"],
            "axis_registry": ["make_axis"],
            "configuration_multigrid": ["MultiGridConfig"],
            "decision_tree_axis": ["DecisionTreeAxis"],
            "generation_multigrid": ["MultiGridGenerationMixin"],
            "modeling_multigrid": ["MultiGridForCausalLM", "MultiGridModel", "MultiGridPreTrainedModel"],
            "multigrid_cache": ["MultiGridCache", "StaticMultiGridCache"],
            "processing_multigrid": ["MultiGridProcessor"],
            "python_axes": [
                "PythonBracketAxis",
                "PythonIndentationAxis",
                "PythonStringAxis",
                "PythonTokenKindAxis",
            ],
            "text_axes": ["AffixAxis", "GoldTagAxis", "PartOfSpeechAxis"],
        },
    )
