"""Heptapod: language models that do not read and write in one straight line, for Transformers.

Importing this package registers every family with transformers' Auto classes. Modules with models are imported when
one of their classes is first used.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from . import heptapod, hierarchical_lm, leap, multigrid
from .common import transformers_versions  # refuses untested versions
from .common.lazy_exports import lazy_exports
from .common.registration import register_models, register_processor


try:
    __version__ = version("modeling-heptapod")
except PackageNotFoundError:  # run from a folder that was not installed
    __version__ = "unknown"


register_models(heptapod, heptapod.HeptapodConfig)
register_processor(heptapod, heptapod.HeptapodConfig, "HeptapodProcessor")
register_models(hierarchical_lm, hierarchical_lm.HierarchicalLMConfig)
register_models(leap, leap.LeapConfig)
register_models(multigrid, multigrid.MultiGridConfig)
register_processor(multigrid, multigrid.MultiGridConfig, "MultiGridProcessor")

if TYPE_CHECKING:
    from .heptapod import *
    from .hierarchical_lm import *
    from .leap import *
    from .multigrid import *
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "heptapod": heptapod.__all__,
            "hierarchical_lm": hierarchical_lm.__all__,
            "leap": leap.__all__,
            "multigrid": multigrid.__all__,
        },
    )
