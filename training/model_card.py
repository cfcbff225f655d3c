"""Fill the model card of folders that train.py wrote, from the figures beside the weights.

    python training/model_card.py outputs/leap-tiny outputs/heptapod-tiny --output_dir hub_cards

Without `--output_dir` each folder gets its own README.md, as train.py and publish.py write it. `results.json` is what
train.py measured, `evaluation.json` what evaluate_model.py did, if it is there and of these weights.
"""

from argument_checks import need


need("eval", "jinja2")  # of which the card is made

import os
import re
import shutil
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from loading import check_folder, read_json
from provenance import weights_digest
from redaction import Parser, redact_all


ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "hub_cards" / "template.md"


def write_card(folder: Path, path: Path | None = None, repo_id: str | None = None) -> None:
    """A model card from the files of an output folder.

    Args:
        folder: with `config.json`, `results.json` and perhaps `evaluation.json`.
        path: where the card goes, `README.md` in the folder by default, beside which the picture of the architecture is copied.
            Elsewhere it shows no curve, and the picture from docs/.
        repo_id: the name that its examples load, that of the folder by default.

    Raises:
        ValueError: naming the folder, where it holds no results, or those of other weights.
    """
    check_folder(folder)
    config = read_json(folder / "config.json")
    try:
        results = redact_all(read_json(folder / "results.json"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no results.json, which train.py writes and a card is filled from") from error
    if results.get("weights_sha256") != weights_digest(folder):
        raise ValueError(
            f"{folder}: results.json is of other weights than those beside it, so no card can be filled from it"
        )
    evaluation = read_evaluation(folder)
    is_grid = config["model_type"] == "heptapod"
    card_data = ModelCardData(
        license="mit",
        library_name="transformers",
        pipeline_tag="other" if is_grid else "text-generation",  # none of the Hub's pipelines reads pages
        tags=["heptapod", config["model_type"], "custom_code"],
        model_name=folder.resolve().name,
        eval_results=_eval_results(results, evaluation),
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=repo_id or folder.resolve().name,
        has_curve=path is None and (folder / "curve.png").is_file(),
        picture=_picture(config["model_type"], folder, path),
        sample=_readable(results["sample"]["text"]) if results.get("sample") else None,
        config=config,
        results=results,
        evaluation=evaluation,
        transformers=tested_transformers(folder),
    )
    card.save(path or folder / "README.md")


def _picture(family, folder, path):
    """Where a card finds the picture of its architecture, relative to itself."""
    picture = ROOT / "docs" / "figures" / f"{family}.svg"
    if path is None:
        shutil.copyfile(picture, folder / "architecture.svg")
        return "architecture.svg"
    return Path(os.path.relpath(picture, path.resolve().parent)).as_posix()


def _readable(text):
    """A sample as it can stand in a block of code: bytes may be any characters."""
    text = "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in text)
    return text.replace("```", "\ufffd" * 3)


def tested_transformers(folder: Path) -> str | None:
    """Which versions of Transformers the code of a folder takes, as `>=5.17,<5.25`; `None` for code that does not say."""
    try:
        code = (folder / "transformers_versions.py").read_text(encoding="utf-8")
    except OSError:
        return None
    window = re.search(r"^OLDEST, NEWEST = \((\d+), (\d+)\), \((\d+), (\d+)\)$", code, re.MULTILINE)
    if window is None:
        return None
    oldest, first, newest, last = map(int, window.groups())
    return f">={oldest}.{first},<{newest}.{last + 1}"


def read_evaluation(folder: Path) -> dict | None:
    """What evaluate_model.py measured of a folder; `None` if it did not, or if the weights have changed since.

    Raises:
        ValueError: for figures under names that were changed since.
    """
    try:
        evaluation = read_json(folder / "evaluation.json")
    except FileNotFoundError:
        return None
    if evaluation.get("weights_sha256") != weights_digest(folder):
        return None
    if "num_iterations" in evaluation.get("generation", {}):
        raise ValueError(
            f"{folder / 'evaluation.json'} was written by an earlier version: run evaluate_model.py again"
        )
    return evaluation


def _eval_results(results, evaluation):
    """What the Hub shows beside the card: bits per byte, each figure by what it is of."""
    is_grid = "page" in results
    task = "other" if is_grid else "text-generation"

    def result(dataset, name, value, args):
        return EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="held out",
            metric_type="bits_per_byte",
            metric_name=name,
            metric_value=round(value, 4),
            metric_args=args,
        )

    if is_grid:
        name = "bits per byte, upper bound (negative ELBO)"
        if evaluation is None:
            figures = [(results["dataset"], name, results["bits_per_byte"], {"mask_samples": results["elbo_samples"]})]
        else:
            args = {"mask_samples": evaluation["mask_samples"]}
            figures = [(evaluation["dataset"], name, evaluation["bound_bits_per_byte"], args)]
    else:
        name, args = "bits per byte, blocks without shared context", {"block_size": results["block_size"]}
        figures = [(results["dataset"], name, results["bits_per_byte"], args)]
        if evaluation is not None:
            args = {"window": evaluation["window"], "stride": evaluation["stride"]}
            value = evaluation["sliding_window_bits_per_byte"]
            figures.append((evaluation["dataset"], "bits per byte, sliding window", value, args))
    return [result(*figure) for figure in figures]


def main():
    parser = Parser(description="Fill the model cards of folders that train.py wrote.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders that train.py wrote")
    parser.add_argument(
        "--output_dir", type=Path, help="cards go here as <folder>.md, else to README.md in each folder"
    )
    args = parser.parse_args()
    for folder in args.folders:
        path = args.output_dir and args.output_dir / f"{folder.resolve().name}.md"
        write_card(folder, path)
        print(f"written: {path or folder / 'README.md'}")


if __name__ == "__main__":
    main()
