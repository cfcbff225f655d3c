"""The C source of windowed attention, from `windowed_attention_cpu_source.c`. In saved folders this module holds the source itself."""

from pathlib import Path


SOURCE = Path(__file__).with_suffix(".c").read_text(encoding="utf-8")

__all__ = ["SOURCE"]
