"""No token reaches figures, cards, logs or what is pushed, by whatever way it came."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import train
from corpora import public_name
from hub_upload import NOT_PUSHED
from model_card import write_card
from provenance import write_figures
from redaction import HIDDEN, CommandLine, Parser, redact, redact_command

from tests.saved_models import save_with_results
from tests.training import kills, tiny_runs


SCRIPTS = Path(train.__file__).parent
TOKEN = "not-of-a-known-form-1234"  # what a Hub of one's own may use
HUB_TOKEN = "hf_SECRETSECRET"


@pytest.mark.parametrize(
    ("words", "secrets", "expected"),
    [
        (["--hub_token", TOKEN, "--seed", "1"], [], ["--hub_token", HIDDEN, "--seed", "1"]),
        (["--hub-token", TOKEN], [], ["--hub-token", HIDDEN]),
        ([f"--hf_token={TOKEN}"], [], [f"--hf_token={HIDDEN}"]),
        (["--push_to_hub_token", TOKEN], [], ["--push_to_hub_token", HIDDEN]),
        (["--api_key", "a"], [], ["--api_key", HIDDEN]),
        (["--hub_t", TOKEN], [TOKEN, None, ""], ["--hub_t", HIDDEN]),
        ([f"--hub_t={TOKEN}", "--run_name", "ab"], [TOKEN, "a"], [f"--hub_t={HIDDEN}", "--run_name", "ab"]),
        (["--hub_t", "a", "--hub_t=a"], ["a"], ["--hub_t", HIDDEN, f"--hub_t={HIDDEN}"]),
        (["anything", HUB_TOKEN], [], ["anything", HIDDEN]),
        (["--dataset_name", f"https://me:{TOKEN}@host/x"], [], ["--dataset_name", f"https://{HIDDEN}@host/x"]),
        (
            ["--dataset_name", f"s3://h/x?api_key={TOKEN}&a=b"],
            [],
            ["--dataset_name", f"s3://h/x?api_key={HIDDEN}&a=b"],
        ),
        (
            ["--dataset_name", f"https://h/x?a=b&X-Amz-Signature={TOKEN}"],
            [],
            ["--dataset_name", f"https://h/x?a=b&X-Amz-Signature={HIDDEN}"],
        ),
        (["hf_oauth_SECRETSECRET"], [], [HIDDEN]),
        (
            ["no hf_oauth_eyJhbGciOiJF.eyJz-dWI_.c2ln-_, no hf_jwt_eyJhbGciOiJF.eyJz."],
            [],
            [f"no {HIDDEN}, no {HIDDEN}."],
        ),
        ([f"no file /tmp/https:/me:{TOKEN}@host/x"], [], [f"no file /tmp/https:/{HIDDEN}@host/x"]),
        ([f"https:/{TOKEN}@host/x", "C:/me@home"], [], [f"https:/{HIDDEN}@host/x", "C:/me@home"]),
        (["--tokenizer_name", "byte", "--train_tokens", "5"], [], ["--tokenizer_name", "byte", "--train_tokens", "5"]),
    ],
)
def test_commands_are_shown_without_secrets(words, secrets, expected):
    assert redact_command(words, secrets) == expected


def test_what_the_environment_holds_is_hidden(monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "DATABASE_PASSWORD"):
        monkeypatch.setenv(name, f"value-of-{name}")
        assert redact(f"x value-of-{name} y") == f"x {HIDDEN} y"
    monkeypatch.setenv("SHORT_KEY", "a")
    monkeypatch.setenv("OTHER", "a word")
    assert redact("a word, hf_hub_download") == "a word, hf_hub_download"


@pytest.mark.parametrize(
    "given", [["--hub_token", TOKEN], [f"--hub-token={TOKEN}"], ["--hub_tok", TOKEN]], ids=lambda given: given[0]
)
def test_no_one_finds_a_token_in_the_command_line(given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *given, "--output_dir", "x"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    (args,) = CommandLine(train.TrainingArguments).parse()
    assert args.hub_token == TOKEN and TOKEN not in " ".join(sys.argv) and HIDDEN in " ".join(sys.argv)
    for wrong in (["--hf_token", TOKEN], [f"--hf_token={TOKEN}"]):
        monkeypatch.setattr(sys, "argv", ["train.py", "--output_dir", "x", *wrong])
        with pytest.raises(ValueError, match="there is no option --hf_token; --help") as caught:
            CommandLine(train.TrainingArguments).parse()
        assert TOKEN not in str(caught.value)
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", HUB_TOKEN])
    with pytest.raises(SystemExit):
        CommandLine(train.TrainingArguments).parse()
    shown = capsys.readouterr().err
    assert "--seed" in shown and HUB_TOKEN not in shown
    sys.excepthook(ValueError, ValueError(f"no {HUB_TOKEN}"), None)
    shown = capsys.readouterr().err
    assert f"no {HIDDEN}" in shown


@pytest.mark.parametrize(
    ("call", "is_short", "flags"),
    [
        ("check_number('--alpha', -1, least=0)", True, []),  # a check of this project
        ("open('missing.txt')", True, []),
        ("check_number('--alpha', 'x', least=0)", False, []),  # an error of the check itself
        ("json.loads('')", False, []),
        ("print(undefined)", False, []),
        ("check_number('--alpha', -1, least=0)", False, ["-X", "dev"]),
        ("open('missing.txt')", False, ["-X", "dev"]),
    ],
)
def test_bad_input_ends_a_script_with_its_message_alone(call, is_short, flags):
    code = f"""
import json, sys
sys.path.insert(0, {str(SCRIPTS)!r})
from argument_checks import check_number
from redaction import Parser
Parser().parse_args([])
{call}
"""
    done = subprocess.run([sys.executable, *flags, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) != is_short, done.stderr
    if is_short:
        assert len(done.stderr.splitlines()) == 1 and (
            "--alpha must be" in done.stderr or "missing.txt" in done.stderr
        )


ADDRESS = f"https://me:{TOKEN}@host/x?token={TOKEN}"


def test_no_error_of_any_script_shows_a_secret(monkeypatch, capsys):
    """Scripts read their options by one of the two parsers, after which tracebacks are redacted."""
    for script in sorted(SCRIPTS.glob("*.py")):
        source = script.read_text(encoding="utf-8")
        if "def main(" in source:
            assert "= Parser(" in source or "CommandLine((" in source, script
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    parser = Parser()
    parser.add_argument("--seed", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--seed", ADDRESS])
    with pytest.raises(SystemExit):
        parser.parse_args(["--token", TOKEN, f"--api_key={TOKEN}"])
    parser.parse_args([])
    sys.excepthook(ValueError, ValueError(f"--dataset_name {ADDRESS} does not exist"), None)
    shown = capsys.readouterr().err
    assert "argument --seed" in shown and "does not exist" in shown and TOKEN not in shown
    assert f"unrecognized arguments: --token {HIDDEN} --api_key={HIDDEN}" in shown
    assert public_name(ADDRESS) == f"https://{HIDDEN}@host/x?token={HIDDEN}"


def test_figures_are_written_without_secrets_and_without_nan(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    monkeypatch.setenv("API_KEY", "123456")
    words = [f'--x {{"url": "https://h/x?token={TOKEN}"}}', "123456"]
    write_figures(path, {"command": f"--x {HUB_TOKEN}", "bits": 1.5, "words": words, HUB_TOKEN: {"count": 1234567}})
    hidden = [f'--x {{"url": "https://h/x?token={HIDDEN}"}}', HIDDEN]
    expected = {"command": f"--x {HIDDEN}", "bits": 1.5, "words": hidden, HIDDEN: {"count": 1234567}}
    assert json.loads(path.read_text(encoding="utf-8")) == expected
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"other.json was not written: losses.text.bits, list.1 of this model"):
            write_figures(tmp_path / "other.json", {"losses": {"text": {"bits": wrong}}, "list": [1.0, wrong]})
    assert not (tmp_path / "other.json").exists()


def test_of_a_path_only_its_last_part_is_named(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "corpus.txt").write_text("")
    for dataset in ("~/private/corpus.txt", str(tmp_path / "private" / "corpus.txt")):
        assert public_name(dataset) == "corpus.txt"
    assert public_name("~/other/corpus.txt") == "~/other/corpus.txt"


def test_a_card_shows_no_token_of_its_figures(tmp_path):
    """Of a version that wrote them into results.json, or of a hand that did."""
    save_with_results("leap", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    (tmp_path / "results.json").write_text(json.dumps({**results, "command": f"python train.py '\"{HUB_TOKEN}\"'"}))
    write_card(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"python train.py '\"{HIDDEN}\"'" in card and HUB_TOKEN not in card


def test_what_is_saved_holds_no_token(tmp_path, monkeypatch):
    """Neither beside the weights nor in checkpoints nor for a tracker, and what is pushed is ignored by its names."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    options = {"save_strategy": "steps", "save_steps": 2, "hub_token": TOKEN, "report_to": ["tensorboard"]}
    run = tiny_runs.trainer("leap", tmp_path, **options)
    run.train()
    run.save_model()
    run.save_state()
    assert run.args.hub_token == TOKEN  # pushes need it
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files) and any(path.name == "optimizer.pt" for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not list(tmp_path.rglob("training_args.bin"))


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_a_checkpoint_is_pushed_with_its_code_and_nothing_else(strategy, tmp_path, monkeypatch):
    pushed = []

    def upload(folder_path, ignore_patterns, path_in_repo, token, **options):
        names = {path.name for path in Path(folder_path).iterdir()}
        pushed.append((path_in_repo, names, ignore_patterns, token))
        job = Future()
        job.set_result(None)
        return job

    def begin(self, *args, **kwargs):
        self.hub_model_id, self.push_in_progress = "me/x", None

    monkeypatch.setattr("hub_upload.upload_folder", upload)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", begin)
    options = {"push_to_hub": True, "hub_token": TOKEN, "hub_strategy": strategy, "hub_model_id": "me/x"}
    tiny_runs.trainer("leap", tmp_path, save_strategy="steps", save_steps=2, max_steps=2, **options).train()
    expected = {"end": [], "every_save": [None], "checkpoint": [None, "last-checkpoint"]}
    assert [path for path, *_ in pushed] == expected.get(strategy, [None, "checkpoint-2"])
    for path, names, ignored, token in pushed:
        assert token == TOKEN and "training_args.bin" not in names
        assert {"model.safetensors", "config.json", "modeling_leap.py", "tokenizer.json"} <= names
        if path is None:
            assert ignored == NOT_PUSHED
            assert not {"optimizer.pt", "rng_state.pth", "trainer_state.json", "run.json", "checksums.json"} & names


def test_no_link_leads_out_of_a_folder_that_is_pushed(tmp_path, monkeypatch):
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "inside").symlink_to(tmp_path / "out")
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self: setattr(self, "hub_model_id", "me/x"))
    options = {"push_to_hub": True, "hub_model_id": "me/x"}
    tiny_runs.trainer("leap", tmp_path / "out", **options)
    (tmp_path / "out" / "runs" / "outside").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="--push_to_hub: .*outside is a link to .*secret, which would be pushed"):
        tiny_runs.trainer("leap", tmp_path / "out", **options)


@pytest.mark.slow
def test_a_run_with_tokens_leaves_none_anywhere(tmp_path):
    command = kills.arguments("leap", tmp_path, 1)
    options = ["--hub_token", TOKEN, "--report_to", "tensorboard", "--cache_dir", str(tmp_path / "cache")]
    env = {
        **os.environ,
        "PYTHONPATH": str(SCRIPTS.parent),
        "HF_TOKEN": "value-of-HF_TOKEN",
        "WANDB_API_KEY": "0123456789",
    }
    process = subprocess.run(
        [sys.executable, str(SCRIPTS / "train.py"), *command, *options], env=env, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert (
        f"--hub_token '{HIDDEN}'"
        in json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["command"]
    )
    files = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, content in {**files, "stdout": process.stdout.encode(), "stderr": process.stderr.encode()}.items():
        for secret in (TOKEN, "value-of-HF_TOKEN", "0123456789"):
            assert secret.encode() not in content, name
