"""Upload a folder that train.py wrote to the Hub: weights, code, tokenizer or processor, figures and the card, in one commit.

    python training/publish.py outputs/leap-tiny --repo_id me/leap-tiny --dry_run
    python training/publish.py outputs/leap-tiny --repo_id me/leap-tiny --private

A model that has not been evaluated, or whose weights have changed since, is evaluated first, on the held-out text of its
training. The card is written again. Checkpoints, optimizer and logs are not uploaded.
"""

from argument_checks import need


need("eval", "jinja2")  # the card is a jinja2 template

import hashlib
from pathlib import Path

from corpora import load_texts
from evaluate_model import evaluate
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from loading import check_folder, from_elsewhere, may_run_code, read_json, references_of
from model_card import read_evaluation, write_card
from provenance import write_figures
from redaction import Parser, redact
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_imports


# Files of a folder on the Hub, beside its code and the tokenizer's files. All are at its top level;
# other files are not uploaded.
PUBLISHED = """
    *.safetensors *.safetensors.index.json config.json generation_config.json processor_config.json
    tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja
    results.json evaluation.json curve.png architecture.svg
""".split()
# Files that users write, too, so that they may contain a token.
READABLE = ["README.md", *(name for name in PUBLISHED if name.endswith((".json", ".jinja")) and "*" not in name)]


def published_files(folder: Path) -> list[Path]:
    """The files of a folder that belong on the Hub, the card first.

    Raises:
        ValueError: for missing files that loading needs, links that point out of the folder, and files that contain a token; the
            message contains their names.
    """
    check_links(folder)
    config = folder / "config.json"
    if not config.is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no model: config.json and *.safetensors are needed")
    code = _code(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=may_run_code(str(folder)))
    names = [*PUBLISHED, *code, *tokenizer.vocab_files_names.values()]
    found = {path for name in names for path in folder.glob(name)}
    missing = sorted(code - {path.name for path in found})
    if missing:
        raise ValueError(f"{folder} lacks code that it is loaded with: {', '.join(missing)}; save it again")
    files = [folder / "README.md", *sorted(found)]
    for path in files:
        if path.resolve().parent != folder.resolve():
            raise ValueError(f"{path} is a file of another folder, {path.resolve().parent}, and nothing was pushed")
        if path.name not in READABLE or not path.exists():  # the card is written later
            continue
        text = path.read_text(encoding="utf-8")
        if redact(text) != text:
            raise ValueError(f"{path} holds a token or a key, and nothing was pushed: remove it there, and revoke it")
    return files


def check_links(folder: Path) -> None:
    """Check that files to publish or to write are no links out of the folder.

    Raises:
        ValueError: naming the link, or what is not a file.
    """
    for path in folder.iterdir():
        # Only the tokenizer has the list of its files.
        is_named = any(path.match(pattern) for pattern in ("README.md", *PUBLISHED))
        if path.is_symlink() and (path.is_file() or is_named) and path.resolve().parent != folder.resolve():
            raise ValueError(f"{path} is a link to {path.resolve()}: copy the file if it is to be published")
        if is_named and path.exists() and not path.is_file():
            raise ValueError(f"{path} must be a file, and is a folder, a pipe or a device")


def _code(folder):
    """Names of the modules that the Auto classes import from a folder, with those that these import."""
    names = set()
    for path in folder.glob("*config.json"):
        names |= {f"{reference.split('.')[0]}.py" for reference in references_of(path)}
    waiting = set(names)
    while waiting:
        module = folder / waiting.pop()
        if module.is_file():
            imported = {f"{name}.py" for name in get_relative_imports(module)}
            waiting |= imported - names
            names |= imported
    return names


def evaluate_if_needed(folder: Path) -> None:
    """Write a missing `evaluation.json` of the weights, on as much held-out text as in training.

    Raises:
        ValueError: if the path of the text is not known, if the text is not the held-out text of the training, and for a folder without
            results.
    """
    if read_evaluation(folder) is not None:
        return
    try:
        results = read_json(folder / "results.json")
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no results.json, which train.py writes") from error
    if results["dataset"] != "stdlib":
        raise ValueError(
            f"{folder} has no evaluation of its weights, and it is not known where {results['dataset']} is; evaluate "
            f"first: python training/evaluate_model.py {folder} --dataset_name ..."
        )
    texts = load_texts("stdlib", max_validation_bytes=results["held_out_bytes"]).validation
    if hashlib.sha256("".join(texts).encode()).hexdigest() != results["held_out_sha256"]:
        raise ValueError(
            f"{folder} has no evaluation of its weights, and this machine holds out another part of stdlib than training did "
            f"(another Python, or --streaming); evaluate first: python training/evaluate_model.py {folder} --dataset_name ..."
        )
    evaluation = evaluate(folder, texts, "stdlib")
    write_figures(folder / "evaluation.json", evaluation)


def main():
    parser = Parser(description="Publish a folder that train.py wrote on the Hub.")
    parser.add_argument("folder", type=Path, help="a folder that train.py wrote")
    parser.add_argument("--repo_id", required=True, help="name of the repository on the Hub, such as me/my-model")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--dry_run", action="store_true", help="evaluate, write the card and list the files, without pushing them"
    )
    args = parser.parse_args()

    if args.folder.is_dir():
        check_links(args.folder)  # before any of it is read
    check_folder(args.folder)
    elsewhere = from_elsewhere(args.folder)
    if elsewhere:
        raise ValueError(
            f"{args.folder} has its code from {', '.join(elsewhere)}, and only a folder with its own code is published, as train.py saves it"
        )
    evaluate_if_needed(args.folder)
    write_card(args.folder, repo_id=args.repo_id)
    files = published_files(args.folder)
    for path in files:
        print(f"{path.stat().st_size:>13,}  {path.name}")
    print(f"{sum(path.stat().st_size for path in files):>13,}  bytes in {len(files)} files")
    if args.dry_run:
        print(f"nothing was pushed to {args.repo_id}, because of --dry_run")
        return
    api = HfApi()
    api.create_repo(args.repo_id, private=args.private or None, exist_ok=True)
    if args.private and not api.model_info(args.repo_id).private:
        raise ValueError(f"--private: {args.repo_id} is there and public; nothing was pushed")
    operations = [CommitOperationAdd(path.name, path) for path in files]
    # Old shards of the weights would be loaded instead of the new ones.
    names = {path.name for path in files}
    old = [
        name for name in api.list_repo_files(args.repo_id) if Path(name).match("*.safetensors*") and "/" not in name
    ]
    operations += [CommitOperationDelete(name) for name in old if name not in names]
    commit = api.create_commit(args.repo_id, operations, commit_message=f"Add {args.folder.resolve().name}")
    print(f'pushed: {args.repo_id}, revision="{commit.oid}"')


if __name__ == "__main__":
    main()
