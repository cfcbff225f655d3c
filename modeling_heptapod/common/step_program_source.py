"""The C source of programs for one token, from `step_program_source.c`. In saved folders this module holds the source itself."""

from pathlib import Path


SOURCE = Path(__file__).with_suffix(".c").read_text(encoding="utf-8")

__all__ = ["SOURCE"]
