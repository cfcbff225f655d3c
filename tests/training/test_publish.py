"""training/publish.py, Trainer's own push and LoRA adapters, over HTTP to a Hub of this test, and back in another process."""

import argparse
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import model_card
import publish
import pytest
import torch
import yaml
from corpora import load_texts
from evaluate_model import evaluate, load_model
from huggingface_hub import ModelCard
from peft import PeftModel
from provenance import weights_digest
from safetensors.torch import save_file

from tests.hub_server import HubServer, find_errors
from tests.saved_models import AXES, FAMILIES, results_of, save_tiny, save_with_results


FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
SCRIPTS = Path(publish.__file__).parent
CORPUS = argparse.__file__
PRIVATE = "multigrid"

# Publishes folders as the command line does; then one step of Trainer and one adapter for each family.
PUBLISH = """
import json, runpy, sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoProcessor, AutoTokenizer, Trainer, TrainingArguments

import modeling_heptapod

script, folder, commands, families = sys.argv[1], Path(sys.argv[2]), *map(json.loads, sys.argv[3:])
sys.path.insert(0, script.rsplit("/", 1)[0])
for command in commands:
    sys.argv = [script, *command]
    runpy.run_path(script, run_name="__main__")

for family in families:
    auto_class = AutoModelForMaskedLM if family == "heptapod" else AutoModelForCausalLM
    processing_class = AutoProcessor if family in ("heptapod", "multigrid") else AutoTokenizer
    processing = processing_class.from_pretrained(folder / family)
    model = auto_class.from_pretrained(folder / family)
    ids = torch.arange(64).view(4, 16) + 40
    example = {"input_ids": ids if family == "heptapod" else ids.flatten()}
    example["labels"] = example["input_ids"]
    if family == "multigrid":
        example["axis_ids"] = torch.zeros(2, 64, dtype=torch.long)
    arguments = TrainingArguments(
        str(folder / f"{family}-trained"), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        push_to_hub=True, hub_model_id=f"me/{family}-trained", save_strategy="no", disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=[example] * 2, processing_class=processing)
    trainer.train()
    trainer.push_to_hub()

    torch.manual_seed(1)
    model = auto_class.from_pretrained(folder / family)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.push_to_hub(f"me/{family}-lora")
    adapted.save_pretrained(folder / f"{family}-lora")
"""

# Loads by name, in a process that cannot import this package and has an empty cache.
LOAD = """
import json, sys
sys.modules["modeling_heptapod"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoProcessor, AutoTokenizer

results = {}
for key, name, revision, adapter in json.loads(sys.argv[1]):
    is_grid = name.startswith("me/heptapod")
    options = {"trust_remote_code": True, "revision": revision}
    auto_class = AutoModelForMaskedLM if is_grid else AutoModelForCausalLM
    model = auto_class.from_pretrained(name, **options)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    has_processor = is_grid or name.startswith("me/multigrid")
    processing = (AutoProcessor if has_processor else AutoTokenizer).from_pretrained(name, **options)
    inputs = processing("import os\\n", return_tensors="pt")
    with torch.no_grad():
        results[key] = model.eval()(**inputs).logits
torch.save(results, sys.argv[2])
"""


def evaluate_here(folder):
    (text,) = load_texts(CORPUS, max_validation_bytes=200).validation
    (folder / "evaluation.json").write_text(json.dumps(evaluate(folder, [text], CORPUS)))


def run(*command, cwd, hub):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent), **hub.environment(cwd / "home")}
    process = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """The folder of all that was pushed, and what was printed."""
    folder = tmp_path_factory.mktemp("published")
    commands = [[str(folder / "leap"), "--repo_id", "me/other", "--dry_run"]]
    for family in FAMILIES:
        save_with_results(family, folder / family)
        if family != "leap":  # which is evaluated when it is published
            evaluate_here(folder / family)
        private = ["--private"] if family == PRIVATE else []
        commands.append([str(folder / family), "--repo_id", f"me/{family}", *private])
    save_with_results("leap", folder / "changed" / "leap", seed=7)
    evaluate_here(folder / "changed" / "leap")
    commands.append([str(folder / "changed" / "leap"), "--repo_id", "me/leap"])
    script = folder / "script.py"
    script.write_text(PUBLISH)
    printed = run(
        script, SCRIPTS / "publish.py", folder, json.dumps(commands), json.dumps(FAMILIES), cwd=folder, hub=hub
    )
    return folder, printed


@pytest.fixture(scope="module")
def loaded(hub, published, tmp_path_factory):
    """Logits of what another process loaded from the Hub."""
    folder = tmp_path_factory.mktemp("loaded")
    (folder / "script.py").write_text(LOAD)
    jobs = []
    for family in FAMILIES:
        first = hub.repos[f"me/{family}"].commits[1].oid
        jobs.append([family, f"me/{family}", first, None])
        jobs.append([f"{family}-trained", f"me/{family}-trained", "main", None])
        jobs.append([f"{family}-lora", f"me/{family}", first, f"me/{family}-lora"])
    jobs.append(["changed", "me/leap", None, None])
    run(folder / "script.py", json.dumps(jobs), folder / "results.pt", cwd=folder, hub=hub)
    return torch.load(folder / "results.pt")


def logits_of(folder, adapter=None):
    """Those of the local folder, from the same text."""
    model, processing = load_model(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(**processing("import os\n", return_tensors="pt")).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_published_loads_by_name_bit_for_bit(family, published, loaded):
    assert torch.equal(loaded[family], logits_of(published[0] / family))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_is_pushed_in_one_commit_and_no_leftovers(family, hub, published):
    commits = hub.repos[f"me/{family}"].commits
    assert len(commits) == (3 if family == "leap" else 2)  # the first is the empty repository
    files = commits[1].files
    local = {path.name for path in (published[0] / family).iterdir() if path.is_file()}
    left_behind = {
        "training_args.bin",
        "optimizer.pt",
        "trainer_state.json",
        "notes.txt",
        "secrets.json",
        "scratch.py",
    }
    assert set(files) == (local - left_behind) | {".gitattributes"}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json", "evaluation.json"} <= set(files)
    for name in set(files) - {".gitattributes"}:
        assert files[name] == (published[0] / family / name).read_bytes()


@pytest.mark.slow
def test_a_pinned_revision_gives_the_older_weights(hub, published, loaded):
    new = logits_of(published[0] / "changed" / "leap")
    assert torch.equal(loaded["changed"], new)
    assert not torch.equal(loaded["leap"], new)
    for commit in hub.repos["me/leap"].commits[1:]:
        assert f'pushed: me/leap, revision="{commit.oid}"' in published[1]


@pytest.mark.slow
def test_a_pinned_revision_is_evaluated(hub, published, tmp_path):
    folder, first = published[0], hub.repos["me/leap"].commits[1].oid
    options = ("--dataset_name", CORPUS, "--max_validation_bytes", "50", "--max_length", "8")
    command = (SCRIPTS / "evaluate_model.py", "me/leap", "--revision", first, *options)
    with pytest.raises(AssertionError, match="me/leap brings its own code, .*: --trust_remote_code allows it"):
        run(*command, cwd=tmp_path, hub=hub)
    assert not list((tmp_path / "home").rglob("*.py")) and not (tmp_path / "evaluation.json").exists()
    run(*command, "--trust_remote_code", cwd=tmp_path, hub=hub)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert (
        evaluation["weights_sha256"] == weights_digest(folder / "leap") != weights_digest(folder / "changed" / "leap")
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_pushes_what_loads_without_the_package(family, published, loaded):
    trained = logits_of(published[0] / f"{family}-trained")
    assert torch.equal(loaded[f"{family}-trained"], trained) and not torch.equal(trained, loaded[family])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_pushed_and_loaded(family, hub, published, loaded):
    files = hub.repos[f"me/{family}-lora"].commits[-1].files
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files) and "model.safetensors" not in files
    adapted = logits_of(published[0] / family, published[0] / f"{family}-lora")
    assert torch.equal(loaded[f"{family}-lora"], adapted) and not torch.equal(adapted, loaded[family])


def test_private_is_private(hub, published):
    for family in FAMILIES:
        url = f"{hub.url}/me/{family}/resolve/main/config.json"
        if family == PRIVATE:
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(url)
        else:
            assert json.load(urllib.request.urlopen(url))["model_type"] == family


def test_a_dry_run_shows_files_and_pushes_nothing(hub, published):
    folder, printed = published
    assert "me/other" not in hub.repos and "nothing was pushed to me/other" in printed
    shown = printed[: printed.index("nothing was pushed")]
    for name in ("model.safetensors", "modeling_leap.py", "tokenizer.json"):
        assert f"{(folder / 'leap' / name).stat().st_size:>13,}  {name}\n" in shown
    assert "README.md" in shown and "optimizer.pt" not in shown
    *files, total = shown.splitlines()
    sizes = [int(line.split()[0].replace(",", "")) for line in files]
    assert total == f"{sum(sizes):>13,}  bytes in {len(sizes)} files"


@pytest.mark.slow
def test_publishing_again_in_other_files_leaves_no_old_weights(hub, published, tmp_path):
    save_with_results("leap", tmp_path / "leap")
    evaluate_here(tmp_path / "leap")
    run(SCRIPTS / "publish.py", tmp_path / "leap", "--repo_id", "me/again", cwd=tmp_path, hub=hub)
    assert "model.safetensors" in hub.repos["me/again"].commits[-1].files
    hub.repos["me/again"].commits[-1].files["other/model.safetensors"] = b"which nothing loads with the folder"
    model, _ = load_model(tmp_path / "leap")
    (tmp_path / "leap" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "leap", max_shard_size="10KB")
    evaluate_here(tmp_path / "leap")
    run(SCRIPTS / "publish.py", tmp_path / "leap", "--repo_id", "me/again", cwd=tmp_path, hub=hub)
    files = hub.repos["me/again"].commits[-1].files
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert "other/model.safetensors" in files
    with pytest.raises(AssertionError, match="--private: me/again is there and public; nothing was pushed"):
        run(SCRIPTS / "publish.py", tmp_path / "leap", "--repo_id", "me/again", "--private", cwd=tmp_path, hub=hub)


@pytest.mark.slow
def test_a_run_pushes_its_code_with_each_checkpoint_and_in_the_end_its_card(hub, tmp_path):
    config = {"model_type": "leap", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps({**config, "window_sizes": [None, 4]}))
    options = f"--max_steps 4 --save_steps 2 --block_size 32 --dataset_name {CORPUS} --max_validation_bytes 500 --use_cpu true"
    options += " --push_to_hub true --hub_model_id me/run --hub_always_push true --hub_token hf_of_this_test --config_name config --output_dir out"
    run(SCRIPTS / "train.py", *options.split(), cwd=tmp_path, hub=hub)
    commits = hub.repos["me/run"].commits
    with_weights = [commit.files for commit in commits if "model.safetensors" in commit.files]
    assert len(with_weights) >= 3 and all("modeling_leap.py" in files for files in with_weights)
    files = commits[-1].files
    assert files["README.md"] == (tmp_path / "out" / "README.md").read_bytes()
    assert b"4 steps of 256 tokens" in files["README.md"] and "results.json" in files
    assert not any(name.endswith("training_args.bin") for commit in commits for name in commit.files)
    assert not any(b"hf_of_this_test" in content for commit in commits for content in commit.files.values())
    assert not any(name.startswith("checkpoint-") for name in files)


def test_what_is_not_evaluated_is_evaluated_on_what_training_held_out(published):
    evaluation = json.loads((published[0] / "leap" / "evaluation.json").read_text(encoding="utf-8"))
    assert (evaluation["dataset"], evaluation["held_out_bytes"], evaluation["window"]) == ("stdlib", 150, 20)


def test_an_evaluation_of_other_weights_does_not_count(tmp_path, monkeypatch):
    save_with_results("leap", tmp_path)
    calls = []
    monkeypatch.setattr(
        publish, "evaluate", lambda *_: calls.append(1) or {"weights_sha256": weights_digest(tmp_path)}
    )
    with pytest.raises(ValueError, match="holds out another part of stdlib than training did"):
        monkeypatch.setattr(publish, "load_texts", lambda *_, **__: argparse.Namespace(validation=["other text"]))
        publish.evaluate_if_needed(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(
        publish, "evaluate", lambda *_: calls.append(1) or {"weights_sha256": weights_digest(tmp_path)}
    )
    for _ in range(2):
        publish.evaluate_if_needed(tmp_path)
    assert len(calls) == 1
    save_with_results("leap", tmp_path, seed=1)
    model_card.write_card(tmp_path)  # as train.py does after training again
    assert "`evaluate_model.py` has not been run on these weights" in (tmp_path / "README.md").read_text(
        encoding="utf-8"
    )
    publish.evaluate_if_needed(tmp_path)
    assert len(calls) == 2
    (tmp_path / "results.json").write_text(json.dumps({"dataset": "book.txt"}))
    save_tiny("leap", tmp_path, seed=2)
    with pytest.raises(
        ValueError, match=r"not known where book.txt is; evaluate first: python training/evaluate_model.py"
    ):
        publish.evaluate_if_needed(tmp_path)


@pytest.mark.parametrize(
    "family, left_out",
    [("leap", "auto_mapping.py"), ("leap", "native_library.py"), ("heptapod", "processing_heptapod.py")],
)
def test_a_folder_without_its_code_is_refused(family, left_out, tmp_path):
    save_with_results(family, tmp_path)
    publish.published_files(tmp_path)
    (tmp_path / left_out).unlink()
    with pytest.raises(ValueError, match=f"lacks code that it is loaded with: {left_out}"):
        publish.published_files(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no model"):
        publish.published_files(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_says_what_was_measured(family, hub, published):
    card = hub.repos[f"me/{family}"].commits[1].files["README.md"].decode()
    evaluation = json.loads((published[0] / family / "evaluation.json").read_text(encoding="utf-8"))
    results = results_of(family)
    assert "{{" not in card and "{%" not in card and "None" not in card and "unknown" not in card.replace("`", "")
    for said in (results["command"], results["commit"], "12,345 bytes", "17 steps of 99 tokens in 12 s", "a computer"):
        assert said in card
    assert evaluation["command"] in card and f"{results['bits_per_byte']:.3f}" in card
    assert f"{evaluation['standard_error_over_text']:.3f} (over" in card
    assert f"writes {evaluation['generation']['tokens_per_second']:,.0f} tokens per second" in card
    assert "blocks of 20 tokens that share no context" in card or family == "heptapod"
    assert f'name = "me/{family}"' in card and "What does not work:" in card
    stated = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.search(r'^dependencies = \["(torch>=.*?),<3", "(transformers.*?)"\]$', stated, re.MULTILINE)
    assert f'pip install "{needed[1]}" "{needed[2]}"' in card.split("## Use")[1].split("```python")[0]
    if family == "heptapod":
        assert f"{evaluation['bound_bits_per_byte']:.3f} | {evaluation['bound_standard_error']:.3f} (draw" in card
    else:
        assert f"**{evaluation['sliding_window_bits_per_byte']:.3f}**" in card
        assert "sliding window of 512 tokens" in card or "sliding window of 20 tokens" in card
    if family == "multigrid":
        for axis in AXES:
            assert f"| {axis} | {evaluation['losses'][axis]['nats_per_token']:.3f} |" in card


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hub_accepts_the_metadata_and_reads_the_figures(family, hub, published):
    content = hub.repos[f"me/{family}"].commits[1].files["README.md"].decode()
    assert ("POST", "/api/validate-yaml") in hub.log and find_errors(content) == []
    data = ModelCard(content).data
    assert data.license == "mit" and data.library_name == "transformers" and data.model_name == family
    assert data.pipeline_tag == ("other" if family == "heptapod" else "text-generation")
    evaluation = json.loads((published[0] / family / "evaluation.json").read_text(encoding="utf-8"))
    figures = {result.metric_name: (result.dataset_name, result.metric_value) for result in data.eval_results}
    conditions = [result.metric_args for result in data.eval_results]
    if family == "heptapod":
        bound = round(evaluation["bound_bits_per_byte"], 4)
        assert figures == {"bits per byte, upper bound (negative ELBO)": ("argparse.py", bound)}
        assert conditions == [{"mask_samples": evaluation["mask_samples"]}]
    else:
        assert figures == {
            "bits per byte, blocks without shared context": ("stdlib", 7.654),
            "bits per byte, sliding window": (
                evaluation["dataset"],
                round(evaluation["sliding_window_bits_per_byte"], 4),
            ),
        }
        window = {"window": evaluation["window"], "stride": evaluation["stride"]}
        assert conditions == [{"block_size": 20}, window] and window["window"] == 2 * window["stride"]
    # And the test's Hub does refuse what the Hub refuses.
    header = yaml.safe_load(content.split("---\n")[1])
    for key, wrong in [("license", "mine"), ("pipeline_tag", "page-writing"), ("model-index", [{"name": family}])]:
        broken = yaml.safe_dump({**header, key: wrong})
        assert len(find_errors(f"---\n{broken}---\n")) == 1
        body = json.dumps({"repoType": "model", "content": f"---\n{broken}---\n"}).encode()
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(f"{hub.url}/api/validate-yaml", body)


def test_code_of_a_card_runs(published):
    """The example of the card, with the folder for the name."""
    for family in FAMILIES:
        card = (published[0] / family / "README.md").read_text(encoding="utf-8")
        code = card.split("```python\n")[1].split("```")[0].replace(f'"me/{family}"', repr(str(published[0] / family)))
        exec(code.replace("max_new_tokens=200", "max_new_tokens=3"), {"print": lambda text: None})


def test_cards_of_folders_without_an_evaluation(published, tmp_path):
    for family in FAMILIES:
        save_with_results(family, tmp_path / family)
        (tmp_path / family / "curve.png").touch()
        model_card.write_card(tmp_path / family)
        assert "curve.png" in (tmp_path / family / "README.md").read_text(encoding="utf-8")
        model_card.write_card(tmp_path / family, tmp_path / f"{family}.md")
        card = (tmp_path / f"{family}.md").read_text(encoding="utf-8")
        assert "`evaluate_model.py` has not been run" in card and "{{" not in card and find_errors(card) == []
        assert "curve.png" not in card  # it lies elsewhere
    (tmp_path / "leap" / "transformers_versions.py").unlink()  # code from before there was a window
    model_card.write_card(tmp_path / "leap")
    card = (tmp_path / "leap" / "README.md").read_text(encoding="utf-8")
    assert "pip install" not in card and "takes the versions" not in card
    save_tiny("leap", tmp_path / "leap", seed=3)
    with pytest.raises(ValueError, match=r"leap: results\.json is of other weights than those beside it"):
        model_card.write_card(tmp_path / "leap")
    (tmp_path / "leap" / "results.json").unlink()
    with pytest.raises(ValueError, match=r"has no results\.json"):
        model_card.write_card(tmp_path / "leap")
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        model_card.write_card(tmp_path / "nowhere")


def test_the_card_of_a_run_that_was_resumed_or_not_used_to_its_end_says_so(tmp_path):
    save_with_results("leap", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    (tmp_path / "results.json").write_text(json.dumps({**results, "resumed_at_step": 9, "weights_of_step": 11}))
    model_card.write_card(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "17 steps of 99 tokens, resumed at step 9 and from there in 12 s" in card
    assert "The weights are those of step 11, the best by the held-out text when they were saved." in card


@pytest.mark.parametrize("family", FAMILIES)
def test_cards_show_a_sample_and_a_picture(family, tmp_path):
    save_with_results(family, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    sample = {"step": 1234, "text": "def f():\n\treturn `1`\x00```\n# Ende {{ name }} \u00e9"}
    (tmp_path / "results.json").write_text(json.dumps({**results, "sample": sample}))
    model_card.write_card(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    did = "filled the centre of the first page" if family == "heptapod" else "continued the beginning"
    assert f"At step 1,234 of its training it {did} of the held-out text" in card
    # Neither bytes that are no text nor backticks get out of the block.
    fence = "\ufffd" * 3
    assert f"```text\ndef f():\n\treturn `1`\ufffd{fence}\n# Ende {{{{ name }}}} \u00e9\n```" in card
    assert "![how it computes](architecture.svg)" in card
    assert (tmp_path / "architecture.svg").read_bytes() == (FIGURES / f"{family}.svg").read_bytes()
    elsewhere = tmp_path / "cards" / "card.md"
    elsewhere.parent.mkdir()
    model_card.write_card(tmp_path, elsewhere)
    picture = re.search(r"!\[how it computes\]\((.*)\)", elsewhere.read_text(encoding="utf-8")).group(1)
    assert (elsewhere.parent / picture).resolve() == FIGURES / f"{family}.svg"
    assert tmp_path / "architecture.svg" in publish.published_files(tmp_path)


def test_weights_are_known_by_their_values(tmp_path):
    save_tiny("leap", tmp_path)
    digest = weights_digest(tmp_path)
    model, _ = load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and weights_digest(tmp_path) == digest
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert weights_digest(tmp_path) != digest
    for names in ("ab", "ac", "ba"):  # which weights these are, not their values alone
        tensors = dict(zip(names, (torch.zeros(2), torch.ones(2))))
        (tmp_path / names).mkdir()
        save_file(tensors, tmp_path / names / "model.safetensors")
    assert len({weights_digest(tmp_path / names) for names in ("ab", "ac", "ba")}) == 3


@pytest.mark.parametrize("name", ["tokenizer.json", "curve.png", "modeling_leap.py", "README.md", "evaluation.json"])
def test_no_link_leads_out_of_a_published_folder(name, tmp_path, monkeypatch):
    """Neither is what it leads to published nor is it written."""
    save_with_results("leap", tmp_path / "leap")
    secret, path = tmp_path / "secret", tmp_path / "leap" / name
    secret.write_text("mine")
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    command = ["publish.py", str(tmp_path / "leap"), "--repo_id", "me/leap"]
    for more in ([], ["--dry_run"]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        monkeypatch.setattr(publish, "HfApi", None)
        with pytest.raises(ValueError, match=f"{name} is a link to .*secret"):
            publish.main()
    assert secret.read_text() == "mine"
    path.unlink()
    path.symlink_to("config.json")  # within the folder
    publish.check_links(tmp_path / "leap")


@pytest.mark.parametrize("name", ["results.json", "x.safetensors", "curve.png"])
def test_what_is_no_file_is_not_published(name, tmp_path):
    """Nor waited for, as for who writes into a pipe."""
    save_with_results("leap", tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} must be a file, and is a folder, a pipe or a device"):
            publish.published_files(tmp_path)
        os.rmdir(tmp_path / name) if make is os.mkdir else os.unlink(tmp_path / name)


def test_code_from_elsewhere_is_not_published(tmp_path, monkeypatch):
    save_with_results("leap", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["auto_map"]["AutoModelForCausalLM"] = "someone/else--modeling.Model"
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["publish.py", str(tmp_path), "--repo_id", "me/x", "--dry_run"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(
        ValueError, match="has its code from someone/else on the Hub, and only a folder with its own code is"
    ):
        publish.main()


def test_code_of_a_slow_and_of_a_fast_tokenizer_is_needed(tmp_path):
    save_with_results("leap", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoTokenizer": [None, "mine.Fast"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert "mine.py" in publish._code(tmp_path)


@pytest.mark.parametrize("content", ["", "[1", "[]"])
def test_damaged_figures_are_named(content, tmp_path):
    save_with_results("leap", tmp_path)
    for name, call in {
        "results.json": lambda: model_card.write_card(tmp_path),
        "evaluation.json": lambda: publish.evaluate_if_needed(tmp_path),
        "config.json": lambda: publish.published_files(tmp_path),
    }.items():
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} (cannot be read, or )?is damaged"):
            call()
        (tmp_path / name).unlink() if before is None else (tmp_path / name).write_bytes(before)


def test_no_folder_that_is_a_link_is_published(tmp_path):
    save_with_results("leap", tmp_path / "leap")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "added_tokens.json").write_text("{}")
    (tmp_path / "leap" / "special_tokens_map.json").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="special_tokens_map.json is a link to .*other"):
        publish.published_files(tmp_path / "leap")


def test_the_folder_itself_may_be_a_link(tmp_path):
    save_with_results("leap", tmp_path / "leap")
    (tmp_path / "link").symlink_to(tmp_path / "leap")
    (tmp_path / "link" / "README.md").write_text("card")
    names = {path.name for path in publish.published_files(tmp_path / "link")}
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= names and "training_args.bin" not in names


def test_names_that_lead_out_of_the_folder_are_not_published(tmp_path, monkeypatch):
    """As a tokenizer of one's own could have them."""
    save_with_results("leap", tmp_path / "leap")
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "leap" / "README.md").write_text("card")
    tokenizer = argparse.Namespace(vocab_files_names={"x": "../secret"})
    monkeypatch.setattr(publish.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    with pytest.raises(ValueError, match="secret is a file of another folder"):
        publish.published_files(tmp_path / "leap")


@pytest.mark.parametrize(
    "name",
    ["results.json", "evaluation.json", "README.md", "config.json", "tokenizer_config.json", "chat_template.jinja"],
)
def test_what_holds_a_token_is_not_published(name, tmp_path):
    """Figures of an older version, say, which held the whole command. A card filled from them does not."""
    save_with_results("leap", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    results["command"] = "python training/train.py --hub_token hf_SECRETSECRET"
    (tmp_path / "results.json").write_text(json.dumps(results))
    model_card.write_card(tmp_path)
    assert "hf_SECRET" not in (tmp_path / "README.md").read_text()
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps({"command": results["command"], "model_type": "leap", "auto_map": {}}))
    with pytest.raises(ValueError, match=f"{name} holds a token or a key, and nothing was pushed"):
        publish.published_files(tmp_path)


def test_one_command_writes_the_cards_of_many_folders(published, tmp_path, monkeypatch, capsys):
    folders = [str(published[0] / family) for family in FAMILIES]
    monkeypatch.setattr(sys, "argv", ["model_card.py", *folders, "--output_dir", str(tmp_path)])
    model_card.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{family}.md" for family in FAMILIES)
    assert capsys.readouterr().out.count("written: ") == len(FAMILIES)
