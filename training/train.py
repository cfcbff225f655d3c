"""Train a language model on text, evaluate it in bits per byte, and write a folder that is ready to be pushed.

    python training/train.py --config_name configs/leap-tiny --output_dir outputs/leap-tiny --train_minutes 3
    torchrun --nproc_per_node 2 training/train.py ...    # several processes, --fsdp to shard the weights over them

Copy and edit it like one of transformers' examples: everything here is `Trainer`. All of `TrainingArguments` can be
given as well; `--help` lists them.
"""

import gc


gc.disable()  # during the imports, which create many objects and no garbage: half a second of the start

from argument_checks import (
    check_can_write,
    check_number,
    check_training_arguments,
    need,
    pin_memory_for_devices_only,
)


need("train", "accelerate", "evaluate", "matplotlib", "jinja2", "psutil")  # the last three are imported after training

import copy
import dataclasses
import os
import signal
import statistics
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import broadcast_object_list
from checkpoints import alone_in, check_begins_alone, check_same_run, find_checkpoint, read_run
from corpora import DataArguments, check_data_arguments, load_texts, public_name
from corpus_streaming import StreamedExamples, stream_texts
from hub_upload import NOT_PUSHED
from huggingface_hub import upload_folder
from loading import choose_source
from model_card import write_card
from objectives import objective_for
from precision import is_faster_in_bf16
from provenance import provenance, weights_digest, write_figures
from redaction import CommandLine
from run_report import (
    figures_of_corpus,
    figures_of_quality,
    figures_of_training,
    plot_curve,
    precision_of,
    print_summary,
)
from run_settings import Corpus, check_resumable, length_of, settings_of
from sharding import ShardingTrainer
from starting_model import load_trained, make_untrained, read_config, read_processing_class
from stopping import Ending
from token_counts import Reading
from training_callbacks import BestCheckpoint, Samples, Speed, StepTimer, state_of
from transformers import (
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import is_torch_bf16_gpu_available


gc.freeze()  # imported objects are never garbage: another second
gc.enable()


TIMED_SHARE = 0.1  # share of --train_minutes in which steps are timed


@dataclass
class ModelArguments:
    """Arguments for the model and the length of training."""

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
        metadata={"help": "Run the code of axes of a --model_name_or_path on the Hub."},
    )
    train_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Sets --max_steps to the number that fits into these minutes, from the time of the first steps of a copy, and stops "
            "by the clock if training with evaluations takes longer."
        },
    )
    train_tokens: int | None = field(
        default=None,
        metadata={"help": "Sets --max_steps to the number that reads this many tokens, or cells, in all processes."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many evaluations that were no better than the best; needs --load_best_model_at_end."
        },
    )
    bf16_if_fast: bool = field(
        default=False,
        metadata={
            "help": "Sets --bf16 if training steps are faster with it on this device, which takes about a second to measure; else "
            "float32 is used. A resumed run keeps its precision."
        },
    )


def choose_precision(
    model_args: ModelArguments, args: TrainingArguments, objective, model: PreTrainedModel, checkpoint: str | None
) -> TrainingArguments:
    """The training arguments, with bf16 if `--bf16_if_fast` finds it faster. A resumed run keeps its precision."""
    if not model_args.bf16_if_fast or args.bf16 or args.fp16:
        return args
    if checkpoint is not None:
        in_bf16 = bool(read_run(Path(checkpoint)).get("settings", {}).get("--bf16"))
    elif args.device.type == "cuda" and not is_torch_bf16_gpu_available():
        in_bf16 = False
    else:
        faster = is_faster_in_bf16(model, objective.train_dataset, args.train_batch_size, args.device)
        in_bf16 = broadcast_object_list([faster])[0]
    # TrainingArguments rejects bf16 on a CPU without `use_cpu`.
    return dataclasses.replace(args, bf16=True, use_cpu=args.device.type == "cpu") if in_bf16 else args


def check_arguments(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    """Check that arguments fit together.

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
                value = " ".join(value) if isinstance(value, list) else value
                raise ValueError(
                    f"{name} {value}: with --model_name_or_path the tokenizer and the axes are those of the model; leave it out"
                )
    check_number("--train_minutes", model_args.train_minutes, above=0)
    check_number("--train_tokens", model_args.train_tokens, least=1)
    check_number("--early_stopping_patience", model_args.early_stopping_patience, least=1)
    check_data_arguments(data_args)
    lengths = {"--train_minutes": model_args.train_minutes, "--train_tokens": model_args.train_tokens}
    lengths["--max_steps"] = args.max_steps if args.max_steps > 0 else None
    given = [name for name, value in lengths.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} all set the length of training; give one of them")
    if data_args.streaming and not given and args.resume_from_checkpoint is None:
        raise ValueError(
            "--streaming needs --max_steps, --train_tokens or --train_minutes: a stream has no known length"
        )
    if model_args.early_stopping_patience is not None and not args.load_best_model_at_end:
        raise ValueError("--early_stopping_patience needs --load_best_model_at_end, and what that needs")
    check_can_write("--output_dir", args.output_dir)


def choose_checkpoint(args: TrainingArguments) -> str | None:
    """Find the checkpoint to resume, if any. Only the first process reads the files.

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


def patience_spent(checkpoint: str) -> int:
    """Number of evaluations before a checkpoint that were no better than the best; 0 without early stopping."""
    saved = state_of(checkpoint)["stateful_callbacks"]
    return saved.get("EarlyStoppingCallback", {}).get("attributes", {}).get("early_stopping_patience_counter", 0)


def steps_within(minutes: float, model: PreTrainedModel, args: TrainingArguments, train_dataset) -> int:
    """Number of optimizer steps that fit into `minutes`, from the time of a few steps of a copy, at most a tenth of `minutes`.

    A number that is known beforehand gives a learning-rate schedule that a resumed run repeats exactly.
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


def set_use_cache(config: PreTrainedConfig, value: bool | None) -> None:
    """Set `use_cache`, which `Trainer` writes into every config. `None` removes it, for models without a cache."""
    if value is not None:
        config.use_cache = value
    elif hasattr(config, "use_cache"):
        del config.use_cache


def choose_metrics(args: TrainingArguments) -> None:
    """Choose what evaluations return and the metric of the best checkpoint."""
    args.include_for_metrics = ["loss"]
    if args.load_best_model_at_end and args.metric_for_best_model == "loss":
        args.metric_for_best_model = "bits_per_byte"
    args.greater_is_better = False  # in all metrics


def base_model_of(model_args: ModelArguments) -> str | None:
    """Name of the model that is trained further, in figures. `None` for an untrained one."""
    return None if model_args.model_name_or_path is None else public_name(model_args.model_name_or_path)


def read_corpus(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> Corpus:
    """Read the text and prepare it. The first process does the work, and the others read its cache."""
    source, is_trained = model_args.model_name_or_path or model_args.config_name, model_args.config_name is None
    config = read_config("--model_name_or_path" if is_trained else "--config_name", source)
    processing_class = read_processing_class(source, config, model_args.trust_remote_code) if is_trained else None
    with args.main_process_first(desc="reading the corpus"):
        streamed = None
        if data_args.streaming:
            documents, texts = stream_texts(data_args)
            streamed = StreamedExamples(documents, seed=args.seed)
        else:
            texts = load_texts(
                data_args.dataset_name,
                data_args.dataset_config_name,
                data_args.text_column_name,
                data_args.validation_split_percentage,
                data_args.max_validation_bytes,
            )
        return Corpus(texts, streamed, objective_for(config)(texts, data_args, config, streamed, processing_class))


def make_model(model_args: ModelArguments, objective, args: TrainingArguments) -> PreTrainedModel:
    """Make or load the model to train.

    Raises:
        ValueError: naming the option, for a model that cannot be loaded or that `Trainer` could not resume.
    """
    if model_args.model_name_or_path is not None:
        model = load_trained(model_args.model_name_or_path, objective)
    else:
        model = make_untrained(model_args.config_name, objective)
    head_dims = getattr(model.config, "head_dim", None)
    if args.save_strategy != "no" and isinstance(head_dims, list) and len(set(head_dims)) > 1:
        raise ValueError(
            f"--config_name: Trainer cannot resume a model whose `head_dim` differs between hierarchies, got {head_dims}; "
            "set --save_strategy no"
        )
    return model


def examples_of(corpus: Corpus, args: TrainingArguments) -> int:
    """Number of examples of an epoch. For a stream, which has no end, that of one step.

    Raises:
        ValueError: naming `--dataloader_drop_last`, if it leaves none.
    """
    batch = args.train_batch_size * args.world_size
    examples = batch * args.gradient_accumulation_steps if corpus.streamed else len(corpus.objective.train_dataset)
    if args.dataloader_drop_last and examples < batch:
        raise ValueError(
            f"--dataloader_drop_last leaves nothing to train on: all of --dataset_name is {examples} examples, fewer than the "
            f"{batch} of a batch in each of {args.world_size} processes"
        )
    return examples


def resume(checkpoint: str, run: dict, config: PreTrainedConfig, args: TrainingArguments) -> tuple[int, float]:
    """Set length and schedule to those of the run that saved a checkpoint.

    Returns:
        Step of the checkpoint, and seconds of training before it.

    Raises:
        ValueError: naming the settings that differ from those of that run.
    """
    check_resumable(checkpoint, config, args)
    check_same_run(checkpoint, run, args.resume_from_checkpoint == "last")
    saved, state = read_run(Path(checkpoint)), state_of(checkpoint)
    run["length"] = saved.get("length", run["length"])
    # The schedule of the resumed run, not a new one.
    scheduled = state["max_steps"]
    if args.max_steps not in (-1, scheduled):
        raise ValueError(f"--max_steps {args.max_steps}: the run that is resumed has a schedule of {scheduled} steps")
    args.max_steps = scheduled
    return state["global_step"], saved.get("seconds", 0.0)


def set_max_steps(
    model_args: ModelArguments, args: TrainingArguments, reading: Reading, objective, model: PreTrainedModel
) -> None:
    """Set `--max_steps` from `--train_tokens` or `--train_minutes`."""
    if model_args.train_tokens is not None:
        tokens_per_example = objective.about["tokens_per_example"]
        args.max_steps = reading.steps_for(-(-model_args.train_tokens // tokens_per_example))
    elif model_args.train_minutes is not None:
        args.max_steps = steps_within(model_args.train_minutes, model, args, objective.train_dataset)


def early_stopping(patience: int | None, checkpoint: str | None) -> list[EarlyStoppingCallback]:
    """Callback for `--early_stopping_patience`, in a list; none without it."""
    if patience is None:
        return []
    stopping = EarlyStoppingCallback(patience)
    if checkpoint is not None:  # continue its count
        stopping.early_stopping_patience_counter = patience_spent(checkpoint)
    return [stopping]


def make_trainer(model: PreTrainedModel, objective, args: TrainingArguments, callbacks: list) -> ShardingTrainer:
    """Make the trainer."""
    return ShardingTrainer(
        model=model,
        args=args,
        train_dataset=objective.train_dataset,
        eval_dataset=objective.eval_dataset,
        processing_class=objective.processing_class,
        callbacks=callbacks,
        **objective.trainer_options(),
    )


def train(trainer: ShardingTrainer, ending: Ending, checkpoint: str | None, ignore_keys: list[str] | None) -> float:
    """Train, and print the reason where training ends before its last step.

    Returns:
        Seconds of training.

    Raises:
        SystemExit: after a signal.
    """
    args = trainer.args
    with ending.signals() if args.save_strategy != "no" else nullcontext():
        # No evaluation before this line: Trainer would regard the model as wrapped, and train each process separately.
        train_result = trainer.train(resume_from_checkpoint=checkpoint, ignore_keys_for_eval=ignore_keys)
        ending.agree(args)
    steps = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
    if ending.signal is not None:
        if trainer.is_world_process_zero():
            name = signal.Signals(ending.signal).name
            print(
                f"ended by {name} after {steps}: --resume_from_checkpoint last continues from there, in {args.output_dir}"
            )
        raise SystemExit(128 + ending.signal)
    if ending.by_clock and trainer.state.global_step < trainer.state.max_steps and trainer.is_world_process_zero():
        print(f"ended by the clock after {steps}: --train_minutes {ending.seconds / 60:g}")
    return train_result.metrics["train_runtime"]


def save_and_measure(trainer: ShardingTrainer, objective, use_cache: bool | None) -> tuple[str, dict[str, float]]:
    """Save model, code, tokenizer and generation config, then measure the model.

    Args:
        trainer: the trainer after training.
        objective: objective of the model.
        use_cache: value in the config before training, which `Trainer` has changed.

    Returns:
        The precision of the training, and the figures.
    """
    model, training_args = trainer.model, trainer.args
    set_use_cache(model.config, use_cache)
    trainer.save_model()
    set_use_cache(model.config, training_args.use_cache)
    precision = precision_of(training_args, model)  # before --bf16_full_eval casts the weights
    after = objective.evaluate(trainer)
    set_use_cache(model.config, use_cache)
    return precision, after


def write_results(trainer: ShardingTrainer, objective, results: dict) -> None:
    """Write results, curve and card, and push them with `--push_to_hub`."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    write_figures(folder / "results.json", results)
    history, factor = trainer.state.log_history, objective.bits_per_byte_of_loss
    plot_curve(history, results, factor, folder / "curve.png", objective.text_losses)
    write_card(folder)
    if args.push_to_hub:
        upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=folder,
            commit_message="Figures and card",
            token=args.hub_token,
            revision=args.hub_revision,
            ignore_patterns=NOT_PUSHED,
        )


def main():
    arguments = CommandLine((ModelArguments, DataArguments, TrainingArguments)).parse()
    check_arguments(*arguments)
    training_args = arguments[-1]
    with alone_in(training_args.output_dir) if training_args.process_index == 0 else nullcontext():
        run_with(*arguments)


def run_with(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Train from text, and write a folder that is ready to be pushed."""
    pin_memory_for_devices_only(training_args)
    choose_metrics(training_args)
    checkpoint = choose_checkpoint(training_args)
    if checkpoint is not None:
        training_args.eval_on_start = False
    set_seed(training_args.seed)

    # Text -> tokens -> blocks or pages -> model; how long to train
    corpus = read_corpus(model_args, data_args, training_args)
    training_args.label_names = corpus.objective.label_names
    model = make_model(model_args, corpus.objective, training_args)
    training_args = choose_precision(model_args, training_args, corpus.objective, model, checkpoint)
    parameters = model.num_parameters()  # before they are sharded
    reading = Reading(examples_of(corpus, training_args), training_args)
    run = {
        "settings": settings_of(corpus, base_model_of(model_args), data_args, training_args, reading.per_step),
        "length": length_of(model_args, training_args),
        "processes": training_args.world_size,
        "sharded": bool(training_args.fsdp),
    }
    resumed_at, seconds_used = None, 0.0
    if checkpoint is not None:
        resumed_at, seconds_used = resume(checkpoint, run, model.config, training_args)
    else:
        set_max_steps(model_args, training_args, reading, corpus.objective, model)

    # Training; the model is saved before its evaluation, so that an error there loses no training
    minutes, use_cache = run["length"].get("--train_minutes"), getattr(model.config, "use_cache", None)
    speed, ending = Speed(), Ending(minutes and minutes * 60, seconds_used)
    callbacks = [Samples(corpus.objective.sample), speed, ending, BestCheckpoint(checkpoint)]
    callbacks += early_stopping(model_args.early_stopping_patience, checkpoint)
    trainer = make_trainer(model, corpus.objective, training_args, callbacks)
    trainer.describe_run = lambda: {**run, "seconds": ending.seconds_used}
    train_seconds = train(trainer, ending, checkpoint, corpus.objective.ignore_keys)
    precision, after = save_and_measure(trainer, corpus.objective, use_cache)

    # Curve, results, card
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    base_model = base_model_of(model_args)
    results = {
        "dataset": public_name(data_args.dataset_name),
        "base_model": base_model,
        "tokenizer": base_model or data_args.tokenizer_name or "byte",
        **figures_of_corpus(corpus),
        "parameters": parameters,
        **figures_of_training(trainer, reading, corpus.objective.about["tokens_per_example"], speed, resumed_at),
        "train_seconds": round(train_seconds, 1),
        "precision": precision,
        **figures_of_quality(trainer.state.log_history, after, corpus.held_out),
        "weights_sha256": weights_digest(Path(training_args.output_dir)),
        **provenance(training_args.device),
    }
    write_results(trainer, corpus.objective, results)
    print_summary(Path(training_args.output_dir), results)


if __name__ == "__main__":
    main()
