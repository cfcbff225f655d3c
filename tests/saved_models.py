"""Tiny models of all families in folders, with the tokenizer or processor that reads bytes: what train.py leaves, untrained."""

from collections.abc import Sequence
from pathlib import Path

from data import build_tokenizer

from modeling_heptapod import HeptapodProcessor, MultiGridProcessor
from tests.tiny_heptapod import tiny_heptapod
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import tiny_leap
from tests.tiny_multigrid import tiny_multigrid


FAMILIES = ["leap", "hierarchical_lm", "heptapod", "multigrid"]
PAGE = 4, 16
AXES = ["token_kind", "bracket"]


def save_tiny(family: str, folder: Path, seed: int = 0, axes: Sequence[str] = AXES, **options) -> None:
    """Save a model of random weights over bytes, with its code, and what turns text into its inputs."""
    tokenizer = build_tokenizer("byte", [], for_pages=family == "heptapod")
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if family != "heptapod":
        ids |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if family == "heptapod":
        processing = HeptapodProcessor(tokenizer, *PAGE)
        model = tiny_heptapod(seed=seed, mask_token_id=tokenizer.mask_token_id, grid_size=PAGE, **ids, **options)
        model.generation_config.num_iterations = 3
    elif family == "multigrid":
        processing = MultiGridProcessor(tokenizer, axes)
        names = {"axis_names": processing.axis_names, "axis_vocab_sizes": processing.axis_vocab_sizes}
        model = tiny_multigrid(seed=seed, **names, **ids, **options)
    else:
        processing = tokenizer
        make = {"leap": tiny_leap, "hierarchical_lm": tiny_hierarchical_lm}[family]
        model = make(seed=seed, **ids, **options)
    model.save_pretrained(folder)
    processing.save_pretrained(folder)
