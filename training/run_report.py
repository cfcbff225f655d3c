"""Figures of a finished run, its curve and its summary."""

import bz2
import hashlib
import json
from pathlib import Path

from checkpoints import step_of
from run_settings import Corpus
from token_counts import Reading
from training_callbacks import Speed
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments


def figures_of_corpus(corpus: Corpus) -> dict:
    """Sizes of the text and of an example."""
    held_out = corpus.held_out
    return {
        **corpus.objective.about,
        "train_bytes": corpus.train_bytes,
        "held_out_bytes": len(held_out),
        "held_out_sha256": hashlib.sha256(held_out).hexdigest(),
    }


def figures_of_training(
    trainer: Trainer, reading: Reading, tokens_per_example: int, speed: Speed, resumed_at: int | None
) -> dict:
    """Steps and speed."""
    first, last = (resumed_at or 0) + 1, trainer.state.global_step
    later_tokens = (
        (reading.examples_in(last) - reading.examples_in(first)) * tokens_per_example if last > first else None
    )
    return {
        "steps": trainer.state.global_step,
        "weights_of_step": step_of_weights(trainer.args, trainer.state),
        "resumed_at_step": resumed_at,
        "tokens_per_step": min(reading.per_step, reading.per_epoch) * tokens_per_example,
        "processes": trainer.args.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
        "seconds_to_first_step": speed.seconds,
        "tokens_per_second": later_tokens and round(later_tokens / speed.later_seconds, 1),
    }


def figures_of_quality(history: list[dict], after: dict, held_out: bytes) -> dict:
    """Bits per byte before and after training, with those of `bz2 -9`, and the last sample."""
    return {
        "bits_per_byte_before": bits_before(history),
        **after,
        "bits_per_byte_bz2": 8 * len(bz2.compress(held_out, 9)) / len(held_out),
        "sample": last_sample(history),
    }


def text_loss(entry: dict, names: list[str]) -> float:
    """Loss of the text in a log entry: the sum of the named losses, or `loss` without them."""
    return sum(entry[name] for name in names if name in entry) if set(names) & set(entry) else entry["loss"]


def plot_curve(
    history: list[dict], results: dict, train_bits_per_nat: float, path: Path, text_losses: list[str]
) -> None:
    """Draw bits per byte by step, of training batches and of held-out text, with the figure of bz2."""
    import matplotlib

    matplotlib.use("Agg")  # also without a display
    import matplotlib.pyplot as plt

    losses = [(entry["step"], text_loss(entry, text_losses)) for entry in history if "loss" in entry]
    train = [(step, loss * train_bits_per_nat) for step, loss in losses]
    held_out = [(entry["step"], entry["eval_bits_per_byte"]) for entry in history if "eval_bits_per_byte" in entry]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if train:
        axes.plot(*zip(*train), label="training batches", linewidth=1)
    if held_out:
        axes.plot(*zip(*held_out), "o-", label="held-out text")
    axes.axhline(results["bits_per_byte_bz2"], color="gray", linestyle="--", label="bz2 -9 on the held-out text")
    axes.set(xlabel="optimizer step", ylabel="bits per byte", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def last_sample(history: list[dict]) -> dict | None:
    """Sample of the last evaluation, as `step` and `text`; `None` without one."""
    samples = [{"step": entry["step"], "text": entry["sample"]} for entry in history if "sample" in entry]
    return samples[-1] if samples else None


def bits_before(history: list[dict]) -> float | None:
    """Bits per byte before training, with `--eval_on_start`."""
    return next(
        (entry["eval_bits_per_byte"] for entry in history if entry["step"] == 0 and "eval_loss" in entry), None
    )


def runs_beside(folder: Path, results: dict) -> dict[str, float]:
    """Bits per byte of the other runs next to `folder` that were measured on the same held-out bytes, by name."""
    beside = {}
    for path in sorted(folder.parent.glob("*/results.json")):
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            if path.parent.name != folder.name and other["held_out_sha256"] == results["held_out_sha256"]:
                beside[path.parent.name] = float(other["bits_per_byte"])
        except (OSError, ValueError, TypeError, KeyError):
            continue  # a file of another program
    return beside


def precision_of(args: TrainingArguments, model: PreTrainedModel) -> str:
    """Precision of matrix products: that of autocast, else that of the weights."""
    if args.bf16 or args.fp16:
        return f"{'bfloat16' if args.bf16 else 'float16'} autocast"
    return str(model.dtype).removeprefix("torch.")


def step_of_weights(args: TrainingArguments, state: TrainerState) -> int:
    """Step of the final weights: the last, or that of the best checkpoint. Not every best step has a checkpoint."""
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:
        return int(step_of(Path(state.best_model_checkpoint)))
    return state.global_step


def print_summary(folder: Path, results: dict) -> None:
    """Print bits per byte before and after training, of bz2 and of other runs on the same bytes."""
    print(f"\n{folder}: {results['steps']} steps in {results['train_seconds']:.0f} s, {results['precision']}")
    print(f"bits per byte on {results['held_out_bytes']:,} held-out bytes")
    error = results.get("bits_per_byte_standard_error")
    bound = "" if error is None else f" +- {error:.3f} (an upper bound: the negative ELBO)"
    if results["bits_per_byte_before"] is not None:
        print(f"  before training  {results['bits_per_byte_before']:.3f}")
    print(f"  after training   {results['bits_per_byte']:.3f}{bound}")
    print(f"  bz2 -9           {results['bits_per_byte_bz2']:.3f}")
    for name, bits in runs_beside(folder, results).items():
        print(f"  {name:<16} {bits:.3f} (another run, on the same bytes)")
