"""Tiny models of all families in folders, with the tokenizer or processor that reads bytes: what train.py leaves, untrained."""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from corpora import build_tokenizer, load_texts
from provenance import weights_digest

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
        model.generation_config.max_denoising_steps = 3
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


@cache
def _held_out_digest():
    return hashlib.sha256("".join(load_texts("stdlib", max_validation_bytes=150).validation).encode()).hexdigest()


def results_of(family: str) -> dict:
    """As train.py writes them; of no real run."""
    common = {
        "dataset": "stdlib",
        "tokenizer": "byte",
        "vocab_size": 260 if family == "heptapod" else 258,
        "train_bytes": 12345,
        "held_out_bytes": 150,
        "held_out_sha256": _held_out_digest(),
        "parameters": 4321,
        "steps": 17,
        "weights_of_step": 17,
        "resumed_at_step": None,
        "tokens_per_step": 99,
        "train_seconds": 12.3,
        "precision": "float32",
        "bits_per_byte_before": None if family == "leap" else 9.876,
        "bits_per_byte": 7.654,
        "bits_per_byte_bz2": 3.21,
        "device": "a computer",
        "threads": 1,
        "versions": {"python": "3.1", "torch": "2.3"},
        "command": "python training/train.py --of_this test",
        "commit": "abcdef123456",
    }
    if family == "heptapod":
        return {**common, "page": list(PAGE), "bits_per_byte_standard_error": 0.012, "elbo_samples": 8}
    return {**common, "block_size": 20, **({"axes": dict.fromkeys(AXES, 5)} if family == "multigrid" else {})}


def save_with_results(family: str, folder: Path, seed: int = 0) -> None:
    """As `save_tiny`, with the results of training and what else it leaves."""
    save_tiny(family, folder, seed=seed)
    results = {**results_of(family), "weights_sha256": weights_digest(folder)}
    (folder / "results.json").write_text(json.dumps(results))
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "notes.txt", "secrets.json", "scratch.py"):
        (folder / name).write_text("{}")
    (folder / "checkpoint-1").mkdir(exist_ok=True)
    (folder / "checkpoint-1" / "model.safetensors").write_text("old")
