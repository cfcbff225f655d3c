"""Fine-tune a trained LEAP as a classifier of texts, and compare it with logistic regression on their words.

    python training/classify.py --model_name_or_path outputs/leap-wiki --train_file en.jsonl --label_column_name topic --output_dir outputs/topics

Copy and edit it like one of transformers' examples: everything here is `Trainer`. All of `TrainingArguments` can be
given as well; `--help` lists them.
"""

from argument_checks import (
    check_can_write,
    check_number,
    check_training_arguments,
    need,
    pin_memory_for_devices_only,
)


need("finetune", "accelerate", "datasets", "evaluate", "sklearn")

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from hub_upload import CleanPushes
from loading import check_family, choose_source
from metric_modules import load_metric
from provenance import write_figures
from redaction import CommandLine
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from starting_model import read_config
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


HELD_OUT = 10  # one row in so many


@dataclass
class ClassificationArguments:
    """Data and model of a classification."""

    train_file: str = field(metadata={"help": "A file of JSON objects, one a line. Every tenth is held out."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A folder of a trained LEAP with its tokenizer, as training/train.py writes it."},
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "A folder with config.json and without weights, as configs/leap-tiny: an untrained model."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "A folder or name for `AutoTokenizer`, by default that of the model."}
    )
    text_column_name: str = field(default="text", metadata={"help": "The column that holds the text."})
    label_column_name: str = field(default="label", metadata={"help": "The column that holds the class."})
    max_seq_length: int = field(default=256, metadata={"help": "Longer texts are truncated to this number of tokens."})


class CleanTrainer(CleanPushes, Trainer):
    """A `Trainer` that pushes no arguments."""


def read_rows(path: str, text_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """Texts and their labels.

    Raises:
        ValueError: naming the column that a line lacks, or `--train_file` if it has fewer than two classes.
    """
    if not Path(path).is_file():
        raise ValueError(f"--train_file {path} must be a file of JSON objects, one a line; there is none")
    texts, labels = [], []
    try:
        content = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--train_file {path} is not UTF-8 text: {error}") from error
    # Not `splitlines`, which also ends lines at characters that JSON may hold.
    for number, line in enumerate(content.rstrip("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"--train_file {path}: line {number} is no JSON object ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"--train_file {path}: line {number} is no JSON object, but {line[:50]}")
        for name, column in (("--text_column_name", text_column), ("--label_column_name", label_column)):
            if column not in row:
                raise ValueError(f"{name} {column}: line {number} of {path} has only {sorted(row)}")
        text, label = row[text_column], row[label_column]
        if not isinstance(text, str) or not text:
            raise ValueError(f"--text_column_name {text_column}: line {number} of {path} must hold text, got {text!r}")
        if not isinstance(label, (str, int)):
            raise ValueError(
                f"--label_column_name {label_column}: line {number} of {path} must hold a word or a whole number, got {label!r}"
            )
        texts.append(text)
        labels.append(str(label))
    found = len(set(split(labels)[0]))
    if found < 2 or len(texts) < 2 * HELD_OUT:
        raise ValueError(
            f"--train_file {path} must have at least {2 * HELD_OUT} rows, with two labels among those that are not held out, got "
            f"{len(texts)} with {found}"
        )
    return texts, labels


def split(rows: list) -> tuple[list, list]:
    """Training rows, and every tenth row, which is held out."""
    return [row for i, row in enumerate(rows) if i % HELD_OUT], rows[::HELD_OUT]


def words_alone(texts: list[str], labels: list[str], held_out: list[str]) -> np.ndarray:
    """Predictions of a logistic regression on the TF-IDF weights of words, for held-out texts.

    If no word occurs in two texts, the most frequent label for all.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2)
    try:
        vectors = vectorizer.fit_transform(texts)
    except ValueError:  # no words are left
        return np.full(len(held_out), Counter(labels).most_common(1)[0][0])
    regression = LogisticRegression(C=10, max_iter=1000)
    return regression.fit(vectors, labels).predict(vectorizer.transform(held_out))


def scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy with its standard error, and macro F1: the metric `classification_scores`."""
    return load_metric("classification_scores").compute(predictions=predicted, references=labels)


def difference(predicted: np.ndarray, other: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Difference of two accuracies on the same rows, and its standard error."""
    gain = (predicted == labels).astype(float) - (other == labels)
    return float(gain.mean()), float(gain.std(ddof=1) / math.sqrt(len(gain)))


def print_scores(results: dict) -> None:
    """Print all scores."""
    gain, error = results["above_words_alone"], results["above_words_alone_standard_error"]
    print(
        f"\n{results['held_out_rows']:,} held-out rows of {len(results['labels'])} classes, {results['train_seconds']:.0f} s on {results['rows']:,} others"
    )
    for name, score in results["scores"].items():
        accuracy = f"{score['accuracy']:.3f} +- {score['standard_error']:.3f}"
        print(f"  {name:<30} accuracy {accuracy}, macro F1 {score['macro_f1']:.3f}")
    print(f"  above words alone, row by row: {gain:+.3f} +- {error:.3f}")


def make_classifier(trained: str | None, config, labels: list[str], tokenizer):
    """A model with a new head: on the body of a trained one, or untrained. `num_labels` follows from the labels."""
    about = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    auto_class = AutoModelForSequenceClassification
    if trained is not None:
        return auto_class.from_pretrained(trained, trust_remote_code=False, **about)
    config.update({**about, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    return auto_class.from_config(config)


def main():
    args, training_args = CommandLine((ClassificationArguments, TrainingArguments)).parse()
    check_training_arguments(training_args)
    pin_memory_for_devices_only(training_args)
    check_number("--max_seq_length", args.max_seq_length, least=1)
    source = choose_source(args.model_name_or_path, args.config_name)
    config = read_config("--config_name" if args.model_name_or_path is None else "--model_name_or_path", source)
    check_family(source, but=("hierarchical_lm", "heptapod", "multigrid"))
    check_can_write("--output_dir", training_args.output_dir)
    set_seed(training_args.seed)

    # Rows -> tokens
    texts, labels = read_rows(args.train_file, args.text_column_name, args.label_column_name)
    names = sorted(set(labels))
    (train_texts, test_texts), (train_labels, test_labels) = split(texts), split(labels)
    by_words = words_alone(train_texts, train_labels, test_texts)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or source, trust_remote_code=False)

    def tokens(texts, labels):
        encoded = tokenizer(texts, truncation=True, max_length=args.max_seq_length)
        return Dataset.from_dict({**encoded, "labels": [names.index(label) for label in labels]})

    model = make_classifier(args.model_name_or_path, config, names, tokenizer)
    trainer = CleanTrainer(
        model=model,
        args=training_args,
        train_dataset=tokens(train_texts, train_labels),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model()
    logits = trainer.predict(tokens(test_texts, test_labels)).predictions
    if not trainer.is_world_process_zero():
        return

    # Beside two baselines: one class for all rows, and words without their order
    truth = np.array(test_labels)
    predicted = {
        "always the same": np.full(len(truth), Counter(train_labels).most_common(1)[0][0]),
        "words alone": by_words,
        type(model).__name__: np.array(names)[logits.argmax(-1)],
    }
    ours, words = predicted[type(model).__name__], predicted["words alone"]
    gain, error = difference(ours, words, truth)
    results = {
        "rows": len(train_texts),
        "held_out_rows": len(test_texts),
        "labels": names,
        "parameters": model.num_parameters(),
        "train_seconds": round(seconds, 1),
        "above_words_alone": gain,
        "above_words_alone_standard_error": error,
        "scores": {name: scores(said, truth) for name, said in predicted.items()},
    }
    write_figures(Path(training_args.output_dir, "classification.json"), results)
    print_scores(results)


if __name__ == "__main__":
    main()
