"""The data of a run, and the settings that decide what it computes, which are compared when it is resumed."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from corpora import DataArguments, Texts
from corpus_streaming import StreamedExamples
from objectives import json_of, source_of
from transformers import PreTrainedConfig, TrainingArguments

from modeling_heptapod.multigrid.axis_registry import BUILTIN_AXES


# Fields of a saved config that saving and training write, and that do not define the model.
OF_SAVING = {"architectures", "auto_map", "transformers_version", "use_cache"}
OF_SAVING |= {"bos_token_id", "eos_token_id", "pad_token_id"}  # set from the tokenizer


@dataclass
class Corpus:
    """The data of a run.

    Attributes:
        texts (`Texts`): training and held-out text in memory.
        streamed (`StreamedExamples` or `None`): examples that are read during training.
        objective: of the model's family.
    """

    texts: Texts
    streamed: StreamedExamples | None
    objective: object

    @property
    def held_out(self) -> bytes:
        """Held-out text."""
        return "".join(self.texts.validation).encode()

    @property
    def train_bytes(self) -> int:
        """Bytes of the training text; for a stream, of the part that was read."""
        return self.streamed.bytes_read if self.streamed else sum(len(text.encode()) for text in self.texts.train)


def check_resumable(checkpoint: str, config: PreTrainedConfig, args: TrainingArguments) -> None:
    """Check that a checkpoint holds the model that is to be trained.

    Raises:
        ValueError: naming `--resume_from_checkpoint` and the fields that differ.
    """
    saved = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    ours = json.loads(config.to_json_string())
    for each in (saved, ours):
        each["dtype"] = each.get("dtype") or "float32"
    if args.deepspeed_plugin is not None and (args.bf16 or args.fp16):
        saved["dtype"] = ours["dtype"]  # DeepSpeed casts the weights, and saves their dtype
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


# TrainingArguments that decide the weights.
DECISIVE = """
    seed data_seed full_determinism learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio weight_decay
    optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon max_grad_norm neftune_noise_alpha bf16 fp16
    average_tokens_across_devices dataloader_drop_last train_sampling_strategy group_by_length accelerator_config
""".split()


def settings_of(
    corpus: Corpus, base_model: str | None, data_args: DataArguments, args: TrainingArguments, examples_per_step: int
) -> dict:
    """Settings that decide what a run computes, beside its model and its length, by option."""
    objective, texts, given = corpus.objective, corpus.texts, args.to_dict()
    axes = getattr(objective.processing_class, "axes", None)
    tokenizer = getattr(objective.processing_class, "tokenizer", objective.processing_class)
    settings = {
        "--model_name_or_path": base_model,
        "--dataset_name (SHA-256 of the training text)": digest_of(texts.train),
        "--dataset_name (SHA-256 of the held-out text)": digest_of(texts.validation),
        "--tokenizer_name (SHA-256)": digest_of([json_of(tokenizer)]),
        "--axes (SHA-256)": axes and digest_of([_definition_of(axis) for axis in axes]),
        "--block_size": objective.about.get("block_size"),
        "--packing": data_args.packing,
        "--streaming": data_args.streaming,
        # The whole corpus; the digest above covers the texts in memory.
        "--dataset_name (SHA-256 of its files' names and sizes)": data_args.streaming
        and digest_of(objective.train_dataset.texts.sizes()),
        "--per_device_train_batch_size x --gradient_accumulation_steps x processes": examples_per_step,
        **{f"--{name}": given[name] for name in DECISIVE if name in given},
    }
    return json.loads(json.dumps(settings))  # as they are read back


def _definition_of(axis):
    """Arguments of an axis, with the code of its class where that is not of the package."""
    return json.dumps(axis.to_dict()) if type(axis) in BUILTIN_AXES else source_of(axis)


def digest_of(texts: list[str]) -> str:
    """SHA-256 of texts and their lengths."""
    digest = hashlib.sha256()
    for text in texts:
        part = text.encode()
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def length_of(model_args, args: TrainingArguments) -> dict:
    """The option that decides the length of training, with its value."""
    if args.max_steps > 0:
        return {"--max_steps": args.max_steps}
    if model_args.train_tokens is not None:
        return {"--train_tokens": model_args.train_tokens}
    if model_args.train_minutes is not None:
        return {"--train_minutes": model_args.train_minutes}
    return {"--num_train_epochs": args.num_train_epochs}
