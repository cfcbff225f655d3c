"""Train a language model on text, measure it in bits per byte, and leave a folder that is ready to be pushed.

    python training/train.py --config_name configs/leap-tiny --output_dir outputs/leap-tiny --train_minutes 3
    torchrun --nproc_per_node 2 training/train.py ...    # several processes, --fsdp to shard the weights over them

Copy and edit it like one of transformers' examples: everything here is `Trainer`. All of `TrainingArguments` can be
given as well; `--help` lists them.
"""

import gc


gc.disable()  # until all is imported, which makes many objects and no garbage: half a second of the start

from argument_checks import check_can_write, check_number, check_training_arguments, need


need("train", "accelerate", "matplotlib", "jinja2", "psutil")  # the last three only at the end, when all is trained

import bz2
import copy
import dataclasses
import hashlib
import json
import math
import os
import signal
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from accelerate.utils import broadcast_object_list
from checkpoints import alone_in, check_begins_alone, check_same_run, damage_of, find_checkpoint, read_run, step_of
from corpora import DataArguments, check_data_arguments, load_texts, public_name
from corpus_streaming import StreamedExamples, stream_texts
from hub_upload import NOT_PUSHED
from huggingface_hub import upload_folder
from loading import choose_source
from model_card import write_card
from objectives import json_of, objective_for, source_of
from provenance import provenance, weights_digest, write_figures
from redaction import CommandLine
from sharding import ShardingTrainer
from starting_model import load_trained, make_untrained, read_config, read_processing_class
from stopping import Ending
from token_counts import Reading
from transformers import (
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import is_torch_bf16_gpu_available, logging

from modeling_heptapod.multigrid.axis_registry import BUILTIN_AXES


gc.freeze()  # nor is any of it ever garbage: another second
gc.enable()


logger = logging.get_logger(__name__)

# Fields of a saved config that saving and training write, and that make no other model.
OF_SAVING = {"architectures", "auto_map", "transformers_version", "use_cache"}
OF_SAVING |= {"bos_token_id", "eos_token_id", "pad_token_id"}  # which Trainer takes from the tokenizer

TIMED_SHARE = 0.1  # of --train_minutes, for finding out what fits into them


@dataclass
class ModelArguments:
    """What to train, and for how long."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A folder that this script wrote, or a name on the Hub: its weights are trained further, with its "
            "tokenizer or processor."
        },
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "A folder with config.json and generation_config.json and without weights: an untrained model."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the axes that the name on the Hub in --model_name_or_path brings in files."},
    )
    train_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Sets --max_steps to what fits into these minutes, by timing the first steps of a copy, and ends by the clock "
            "where that takes longer, with evaluations and all else."
        },
    )
    train_tokens: int | None = field(
        default=None,
        metadata={"help": "Sets --max_steps to what it takes to read this many tokens, or cells, in all processes."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many evaluations that were no better than the best; needs --load_best_model_at_end."
        },
    )
    bf16_if_fast: bool = field(
        default=False,
        metadata={"help": "--bf16 if this device multiplies bfloat16 matrices in hardware, else float32."},
    )


def has_bf16_matrix_units(device: torch.device) -> bool:
    """Whether bfloat16 autocast is worth it: a GPU that supports it or a CPU with AMX."""
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return is_torch_bf16_gpu_available()


def choose_precision(model_args: ModelArguments, training_args: TrainingArguments) -> TrainingArguments:
    """The training arguments, with bf16 set if `--bf16_if_fast` asks for it and the device is up to it."""
    if not model_args.bf16_if_fast or not has_bf16_matrix_units(training_args.device):
        return training_args
    # TrainingArguments rejects bf16 on a CPU unless it is told that the CPU is meant.
    return dataclasses.replace(training_args, bf16=True, use_cpu=training_args.device.type == "cpu")


def check_arguments(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    """What does not go together.

    Raises:
        ValueError: naming the arguments.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"--label_smoothing_factor {args.label_smoothing_factor}: Trainer would put a loss of its own in place of the "
            "model's, unshifted and without its other losses; it must be 0"
        )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != args.world_size:
        raise ValueError(
            f"torchrun started {started} processes, which would train on their own: without GPUs they need --use_cpu true"
        )
    check_training_arguments(args)
    choose_source(model_args.model_name_or_path, model_args.config_name)
    if model_args.model_name_or_path is not None:
        for name, value in (("--tokenizer_name", data_args.tokenizer_name), ("--axes", data_args.axes)):
            if value is not None:
                raise ValueError(
                    f"{name} {value}: with --model_name_or_path the tokenizer and the axes are those of the model"
                )
    check_number("--train_minutes", model_args.train_minutes, above=0)
    check_number("--train_tokens", model_args.train_tokens, least=1)
    check_number("--early_stopping_patience", model_args.early_stopping_patience, least=1)
    check_data_arguments(data_args)
    lengths = {"--train_minutes": model_args.train_minutes, "--train_tokens": model_args.train_tokens}
    lengths["--max_steps"] = args.max_steps if args.max_steps > 0 else None
    given = [name for name, value in lengths.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} say how long to train; give one of them")
    if data_args.streaming and not given and args.resume_from_checkpoint is None:
        raise ValueError(
            "--streaming needs --max_steps, --train_tokens or --train_minutes: nobody knows the corpus's end"
        )
    if model_args.early_stopping_patience is not None and not args.load_best_model_at_end:
        raise ValueError("--early_stopping_patience needs --load_best_model_at_end, and what that needs")
    check_can_write("--output_dir", args.output_dir)


def check_resumable(checkpoint: str, config: PreTrainedConfig, args: TrainingArguments) -> None:
    """A checkpoint goes on as the model that it was, or not at all.

    Raises:
        ValueError: naming `--resume_from_checkpoint` and the fields that differ.
    """
    saved = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    ours = json.loads(config.to_json_string())
    for each in (saved, ours):
        each["dtype"] = each.get("dtype") or "float32"
    if args.deepspeed_plugin is not None and (args.bf16 or args.fp16):
        saved["dtype"] = ours["dtype"]  # DeepSpeed casts the weights, and saves what it cast them to
    differ = {
        name: (saved.get(name), ours.get(name))
        for name in (saved.keys() | ours.keys()) - OF_SAVING
        if saved.get(name) != ours.get(name)
    }
    if differ:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} is of another model than --model_name_or_path or --config_name, --tokenizer_name "
            f"and --axes make; (its, theirs): {differ}"
        )


# Of TrainingArguments, what decides how the weights change.
DECISIVE = """
    seed data_seed full_determinism learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio weight_decay
    optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon max_grad_norm neftune_noise_alpha bf16 fp16
    average_tokens_across_devices dataloader_drop_last train_sampling_strategy group_by_length accelerator_config
""".split()


def settings_of(objective, texts, data_args: DataArguments, args: TrainingArguments, examples_per_step: int) -> dict:
    """All that decides what a run computes, beside its model and its length, by the options that say it."""
    given, axes = args.to_dict(), getattr(objective.processing_class, "axes", None)
    tokenizer = getattr(objective.processing_class, "tokenizer", objective.processing_class)
    settings = {
        "--dataset_name (SHA-256 of the training text)": digest_of(texts.train),
        "--dataset_name (SHA-256 of the held-out text)": digest_of(texts.validation),
        "--tokenizer_name (SHA-256)": digest_of([json_of(tokenizer)]),
        "--axes (SHA-256)": axes and digest_of([_definition_of(axis) for axis in axes]),
        "--block_size": objective.about.get("block_size"),
        "--packing": data_args.packing,
        "--streaming": data_args.streaming,
        # Beyond what is held in memory, which the first of these digests is of.
        "--dataset_name (SHA-256 of its files' names and sizes)": data_args.streaming
        and digest_of(objective.train_dataset.texts.sizes()),
        "--per_device_train_batch_size x --gradient_accumulation_steps x processes": examples_per_step,
        **{f"--{name}": given[name] for name in DECISIVE if name in given},
    }
    return json.loads(json.dumps(settings))  # as they are read again


def _definition_of(axis):
    """An axis of the package by its arguments, one of a class in a file of the user's by its code as well."""
    return json.dumps(axis.to_dict()) if type(axis) in BUILTIN_AXES else source_of(axis)


def digest_of(texts: list[str]) -> str:
    """SHA-256 of texts and of where they end."""
    digest = hashlib.sha256()
    for text in texts:
        part = text.encode()
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def length_of(model_args: ModelArguments, args: TrainingArguments) -> dict:
    """The option that says how long to train, and what it says."""
    if args.max_steps > 0:
        return {"--max_steps": args.max_steps}
    if model_args.train_tokens is not None:
        return {"--train_tokens": model_args.train_tokens}
    if model_args.train_minutes is not None:
        return {"--train_minutes": model_args.train_minutes}
    return {"--num_train_epochs": args.num_train_epochs}


def choose_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to resume, if any; the first process looks at the files, for all.

    Raises:
        ValueError: naming `--resume_from_checkpoint` or `--output_dir`.
    """
    found = [None]
    if args.process_index == 0:
        if args.resume_from_checkpoint is not None:
            found = [find_checkpoint(args.resume_from_checkpoint, args.output_dir, args.world_size)]
        if args.save_strategy != "no":
            check_begins_alone(args.output_dir, found[0], args.world_size)
    return broadcast_object_list(found)[0]


def state_of(checkpoint: str) -> dict:
    """What `Trainer` saved of its state."""
    return json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))


def patience_spent(checkpoint: str) -> int:
    """How many evaluations before a checkpoint were no better than the best; 0 for a run that did not count them."""
    saved = state_of(checkpoint)["stateful_callbacks"]
    return saved.get("EarlyStoppingCallback", {}).get("attributes", {}).get("early_stopping_patience_counter", 0)


class BestCheckpoint(TrainerCallback):
    """A resumed run whose best checkpoint is gone or damaged takes the best of those to come for it.

    Args:
        checkpoint: that is resumed, if any.
    """

    def __init__(self, checkpoint: str | None):
        self.checkpoint = checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        # As it was saved: of a folder that is not there any more `Trainer` remembers nothing. The best step has none where
        # evaluations come more often than checkpoints.
        best = self.checkpoint and state_of(self.checkpoint).get("best_model_checkpoint")
        if not args.load_best_model_at_end or best is None:
            return
        here = Path(args.output_dir, Path(best).name)
        damages = {}
        for folder in (best, here):  # the output may have been moved
            damages[folder] = damage_of(Path(folder), args.world_size)
            if damages[folder] is None:
                state.best_model_checkpoint = str(folder)
                return
        logger.warning(
            f"--load_best_model_at_end: {here}, the best so far, is no whole checkpoint ({damages[here]}): the best of those "
            "to come is taken"
        )
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None


class Samples(TrainerCallback):
    """At each evaluation a sample of what the model writes, printed and among the log's entries.

    It draws from a seed of its own, so that training goes as it would without it.
    """

    def __init__(self, sample):
        self.sample = sample

    def on_evaluate(self, args, state, control, model, metrics=None, **kwargs):
        if not all(math.isfinite(value) for value in (metrics or {}).values()):
            return  # of a model that gives no numbers nothing can be drawn
        was_training = model.training
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            text = self.sample(model)  # in all processes, since weights may be sharded
        model.train(was_training)
        state.log_history.append({"sample": text, "step": state.global_step})
        if state.is_world_process_zero:
            print(f"--- a sample at step {state.global_step}\n{text}\n---", flush=True)


class Speed(TrainerCallback):
    """How long it took from the start of this process until its first optimizer step was done, and from then on.

    Attributes:
        seconds (`float`): to the end of the first step.
        later_seconds (`float`): that those after it took, without evaluating and saving.
    """

    seconds = None

    def __init__(self):
        self.timer = StepTimer()

    def on_step_begin(self, *args, **kwargs):
        self.timer.on_step_begin(*args, **kwargs)

    @property
    def later_seconds(self):
        return sum(self.timer.seconds[1:])

    def on_step_end(self, args, state, control, **kwargs):
        self.timer.on_step_end(args, state, control)
        if self.seconds is None:
            self.seconds = round(time.time() - psutil.Process().create_time(), 2)
            if state.is_world_process_zero:
                print(f"seconds to the first step: {self.seconds:.1f}", flush=True)


class StepTimer(TrainerCallback):
    """Seconds that each optimizer step took."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def steps_within(minutes: float, model: PreTrainedModel, args: TrainingArguments, train_dataset) -> int:
    """How many optimizer steps fit into `minutes`, by timing a few on a copy of the model, which takes a tenth of them at most.

    Known beforehand, the number of steps gives a learning-rate schedule that a resumed run repeats exactly.
    """
    check_number("--train_minutes", minutes, above=0)
    args = copy.copy(args)
    args.max_steps, args.disable_tqdm = 20, True
    args.eval_strategy = args.save_strategy = args.logging_strategy = "no"
    args.load_best_model_at_end = args.eval_on_start = args.push_to_hub = False
    args.report_to = []
    timer, ending = StepTimer(), Ending(minutes * 60 * TIMED_SHARE)
    trainer = ShardingTrainer(copy.deepcopy(model), args, train_dataset=train_dataset, callbacks=[timer, ending])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    steps = [int(minutes * 60 / statistics.median(timer.seconds[len(timer.seconds) // 4 :]))]
    return max(1, broadcast_object_list(steps)[0])


def text_loss(entry: dict, names: list[str]) -> float:
    """What the text costs by a log entry: of the losses that a model may add up, those named, or the only one."""
    return sum(entry[name] for name in names if name in entry) if set(names) & set(entry) else entry["loss"]


def plot_curve(
    history: list[dict], results: dict, train_bits_per_nat: float, path: Path, text_losses: list[str]
) -> None:
    """Bits per byte by step: of the training batches, and of the held-out text beside bz2's."""
    import matplotlib

    matplotlib.use("Agg")  # into a file, on machines without a screen as well
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


def bits_before(history: list[dict]) -> float | None:
    """Bits per byte of the untrained model, where `--eval_on_start` asked for them."""
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
            continue  # not ours
    return beside


def precision_of(args: TrainingArguments, model: PreTrainedModel) -> str:
    """What products were computed in: that of autocast, else that of the weights."""
    if args.bf16 or args.fp16:
        return f"{'bfloat16' if args.bf16 else 'float16'} autocast"
    return str(model.dtype).removeprefix("torch.")


def step_of_weights(args: TrainingArguments, state: TrainerState) -> int:
    """Which step the weights are of in the end: the last, or that of the best checkpoint, which not every best step has."""
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:
        return int(step_of(Path(state.best_model_checkpoint)))
    return state.global_step


def set_use_cache(config: PreTrainedConfig, value: bool | None) -> None:
    """What Trainer writes into every config, also of models without a cache, which have no such field: `None`."""
    if value is not None:
        config.use_cache = value
    elif hasattr(config, "use_cache"):
        del config.use_cache


def main():
    arguments = CommandLine((ModelArguments, DataArguments, TrainingArguments)).parse()
    check_arguments(*arguments)
    training_args = arguments[-1]
    with alone_in(training_args.output_dir) if training_args.process_index == 0 else nullcontext():
        run_with(*arguments)


def run_with(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """From text to a folder that is ready to be pushed."""
    training_args = choose_precision(model_args, training_args)
    training_args.include_for_metrics = ["loss"]
    if training_args.load_best_model_at_end and training_args.metric_for_best_model == "loss":
        training_args.metric_for_best_model = "bits_per_byte"
    training_args.greater_is_better = False  # in every metric there is
    checkpoint = choose_checkpoint(training_args)
    if checkpoint is not None:
        training_args.eval_on_start = False
    set_seed(training_args.seed)

    # Text -> tokens -> blocks or pages; the first process does it, the others find what it kept
    source, is_trained = (
        choose_source(model_args.model_name_or_path, model_args.config_name),
        model_args.config_name is None,
    )
    config = read_config("--model_name_or_path" if is_trained else "--config_name", source)
    processing_class = read_processing_class(source, config, model_args.trust_remote_code) if is_trained else None
    base_model = public_name(source) if is_trained else None
    with training_args.main_process_first(desc="reading the corpus"):
        streamed = None
        if data_args.streaming:
            documents, texts = stream_texts(data_args)
            streamed = StreamedExamples(documents, seed=training_args.seed)
        else:
            texts = load_texts(
                data_args.dataset_name,
                data_args.dataset_config_name,
                data_args.text_column_name,
                data_args.validation_split_percentage,
                data_args.max_validation_bytes,
            )
        objective = objective_for(config)(texts, data_args, config, streamed, processing_class)
    eval_text = "".join(texts.validation).encode()

    training_args.label_names = objective.label_names

    model = load_trained(source, objective) if is_trained else make_untrained(source, objective)
    config = model.config
    parameters = model.num_parameters()
    head_dims = getattr(config, "head_dim", None)
    if training_args.save_strategy != "no" and isinstance(head_dims, list) and len(set(head_dims)) > 1:
        raise ValueError(
            f"--config_name: Trainer cannot resume a model whose `head_dim` differs between hierarchies, got {head_dims}; "
            "set --save_strategy no"
        )

    processes = training_args.world_size
    batch = training_args.train_batch_size * processes
    # A stream has no end, and no short steps.
    examples = batch * training_args.gradient_accumulation_steps if streamed else len(objective.train_dataset)
    if training_args.dataloader_drop_last and examples < batch:
        raise ValueError(
            f"--dataloader_drop_last leaves nothing to train on: all of --dataset_name is {examples} examples, fewer than the "
            f"{batch} of a batch in each of {processes} processes"
        )
    reading, tokens_per_example = Reading(examples, training_args), objective.about["tokens_per_example"]
    resumed_at, minutes, seconds_used = None, model_args.train_minutes, 0.0
    run = {
        "settings": {
            "--model_name_or_path": base_model,
            **settings_of(objective, texts, data_args, training_args, reading.per_step),
        },
        "length": length_of(model_args, training_args),
        "processes": processes,
        "sharded": bool(training_args.fsdp),
    }
    if checkpoint is not None:
        check_resumable(checkpoint, config, training_args)
        check_same_run(checkpoint, run, training_args.resume_from_checkpoint == "last")
        saved = read_run(Path(checkpoint))
        run["length"] = saved.get("length", run["length"])
        minutes, seconds_used = run["length"].get("--train_minutes"), saved.get("seconds", 0.0)
        # The schedule of the run that is being resumed, not one that is measured anew.
        state = state_of(checkpoint)
        scheduled, resumed_at = state["max_steps"], state["global_step"]
        if training_args.max_steps not in (-1, scheduled):
            raise ValueError(
                f"--max_steps {training_args.max_steps}: the run that is resumed has a schedule of {scheduled} steps"
            )
        training_args.max_steps = scheduled
    elif model_args.train_tokens is not None:
        training_args.max_steps = reading.steps_for(-(-model_args.train_tokens // tokens_per_example))
    elif model_args.train_minutes is not None:
        training_args.max_steps = steps_within(model_args.train_minutes, model, training_args, objective.train_dataset)

    use_cache = getattr(model.config, "use_cache", None)
    speed = Speed()
    ending = Ending(minutes and minutes * 60, seconds_used)
    callbacks = [Samples(objective.sample), speed, ending, BestCheckpoint(checkpoint)]
    if model_args.early_stopping_patience is not None:
        stopping = EarlyStoppingCallback(model_args.early_stopping_patience)
        if checkpoint is not None:  # how many evaluations it has been patient for already
            stopping.early_stopping_patience_counter = patience_spent(checkpoint)
        callbacks.append(stopping)
    trainer = ShardingTrainer(
        model=model,
        args=training_args,
        train_dataset=objective.train_dataset,
        eval_dataset=objective.eval_dataset,
        processing_class=objective.processing_class,
        callbacks=callbacks,
        **objective.trainer_options(),
    )
    trainer.describe_run = lambda: {**run, "seconds": ending.seconds_used}
    with ending.signals() if training_args.save_strategy != "no" else nullcontext():
        # No evaluation before this line: Trainer would take the model for wrapped, and train each process on its own.
        train_result = trainer.train(resume_from_checkpoint=checkpoint, ignore_keys_for_eval=objective.ignore_keys)
        ending.agree(training_args)
    steps, where = f"step {trainer.state.global_step} of {trainer.state.max_steps}", training_args.output_dir
    if ending.signal is not None:
        if trainer.is_world_process_zero():
            name = signal.Signals(ending.signal).name
            print(f"ended by {name} after {steps}: --resume_from_checkpoint last goes on from there, in {where}")
        raise SystemExit(128 + ending.signal)
    if ending.by_clock and trainer.state.global_step < trainer.state.max_steps and trainer.is_world_process_zero():
        print(f"ended by the clock after {steps}: --train_minutes {minutes}")

    # Model, its code, tokenizer, generation config; before it is measured, so that an error there costs no training
    set_use_cache(model.config, use_cache)
    trainer.save_model()
    set_use_cache(model.config, training_args.use_cache)
    precision = precision_of(training_args, model)  # of the training: --bf16_full_eval casts the weights
    after = objective.evaluate(trainer)
    set_use_cache(model.config, use_cache)

    # Curve, results, card
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    folder = Path(training_args.output_dir)
    first, last = (resumed_at or 0) + 1, trainer.state.global_step
    later_tokens = (
        (reading.examples_in(last) - reading.examples_in(first)) * tokens_per_example if last > first else None
    )
    results = {
        "dataset": public_name(data_args.dataset_name),
        "base_model": base_model,
        "tokenizer": base_model or data_args.tokenizer_name or "byte",
        **objective.about,
        "train_bytes": streamed.bytes_read if streamed else sum(len(text.encode()) for text in texts.train),
        "held_out_bytes": len(eval_text),
        "held_out_sha256": hashlib.sha256(eval_text).hexdigest(),
        "parameters": parameters,
        "steps": trainer.state.global_step,
        "weights_of_step": step_of_weights(training_args, trainer.state),
        "resumed_at_step": resumed_at,
        "tokens_per_step": min(reading.per_step, reading.per_epoch) * tokens_per_example,
        "processes": processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "seconds_to_first_step": speed.seconds,
        "tokens_per_second": later_tokens and round(later_tokens / speed.later_seconds, 1),
        "train_seconds": round(train_result.metrics["train_runtime"], 1),
        "precision": precision,
        "bits_per_byte_before": bits_before(trainer.state.log_history),
        **after,
        "bits_per_byte_bz2": 8 * len(bz2.compress(eval_text, 9)) / len(eval_text),
        "weights_sha256": weights_digest(folder),
        **provenance(training_args.device),
    }
    write_figures(folder / "results.json", results)
    history, factor = trainer.state.log_history, objective.bits_per_byte_of_loss
    plot_curve(history, results, factor, folder / "curve.png", objective.text_losses)
    write_card(folder)
    if training_args.push_to_hub:
        upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=folder,
            commit_message="Figures and card",
            token=training_args.hub_token,
            revision=training_args.hub_revision,
            ignore_patterns=NOT_PUSHED,
        )

    print(f"\n{folder}: {results['steps']} steps in {results['train_seconds']:.0f} s, {results['precision']}")
    print(f"bits per byte on {len(eval_text):,} held-out bytes")
    error = results.get("bits_per_byte_standard_error")
    bound = "" if error is None else f" +- {error:.3f} (an upper bound: the negative ELBO)"
    if results["bits_per_byte_before"] is not None:
        print(f"  before training  {results['bits_per_byte_before']:.3f}")
    print(f"  after training   {results['bits_per_byte']:.3f}{bound}")
    print(f"  bz2 -9           {results['bits_per_byte_bz2']:.3f}")
    beside = runs_beside(folder, results)
    for name, bits in beside.items():
        print(f"  {name:<16} {bits:.3f} (its own run, on the same bytes)")
    if not beside:
        print(f"  (other runs in {folder.parent} on the same bytes would be listed here)")


if __name__ == "__main__":
    main()
