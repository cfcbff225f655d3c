"""Which versions of Transformers this package was tested with, and everything that differs between them.

No other module asks for a version.
"""

import transformers
from packaging.version import Version


# Of the minor versions from the first to the last, both included, the oldest and the newest patch are tested.
OLDEST, NEWEST = (5, 23), (5, 23)


def check_version(installed: str) -> None:
    """Raise an `ImportError` where `installed`, a version of Transformers, was not tested."""
    if not OLDEST <= Version(installed).release[:2] <= NEWEST:
        window = f">={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"
        raise ImportError(
            f"Heptapod is tested with transformers{window}, but {installed} is installed, with which models could compute "
            f'something else without an error: `pip install "transformers{window}"`, or another version of Heptapod.'
        )


check_version(transformers.__version__)

__all__ = ["NEWEST", "OLDEST", "check_version"]
