"""What has to hold under every version of Transformers; `make compat` runs it in an environment for each.

`run_versions.py` says in `COMPAT_FOLDERS` where each version has written its folders, and in `COMPAT_SAID` what the models in
them said to this version, in a process without the package. No test of `make test`: its name is not collected.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from corpora import build_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, pipeline

from modeling_heptapod.common.transformers_versions import CACHE
from tests.compat.models import AUTO, CAUSAL, MODELS, inputs_of, labels_of, make, what_it_says


FOLDERS = Path(os.environ["COMPAT_FOLDERS"])
VERSIONS = sorted(folder.name for folder in FOLDERS.iterdir())
LEARNING = [name for name in MODELS if not name.endswith("-base")]
TRAINED = ["leap", "hierarchical_lm-losses", "heptapod", "multigrid-axes"]
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def gradients(model, inputs):
    """Of every parameter that gets one, after a loss in training mode."""
    torch.manual_seed(3)  # the grid draws its masks
    model.train().zero_grad()
    labels = labels_of(model, inputs)
    out = model(**inputs) if labels is None else model(**inputs, labels=labels)
    (out[0].square().mean() if labels is None else out.loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestForward:
    @pytest.mark.parametrize("name", MODELS)
    def test_gradients_reach_all_layers(self, name):
        model = make(name)
        found = gradients(model, inputs_of(model))
        assert all(grad.isfinite().all() for grad in found.values())
        for layer in range(model.config.num_hidden_layers):
            assert any(f"layers.{layer}." in name and grad.abs().max() > 0 for name, grad in found.items())

    @pytest.mark.parametrize("name", LEARNING)
    def test_checkpointed_layers_learn_the_same(self, name):
        model = make(name)
        inputs = inputs_of(model)
        expected = gradients(model, inputs)
        model.gradient_checkpointing_enable()
        model.config.use_cache = True  # which checkpointing takes away from the layers
        got = gradients(model, inputs)
        for parameter, grad in expected.items():
            torch.testing.assert_close(got[parameter], grad)

    @pytest.mark.parametrize("name", CAUSAL)
    def test_a_prompt_in_pieces(self, name):
        model = make(name)
        inputs = inputs_of(model)
        expected, cache, logits = model(**inputs).logits, None, []
        for start, end in ((0, 5), (5, 6), (6, 12)):
            piece = {key: x[..., start:end] for key, x in inputs.items()}
            with torch.no_grad():
                out = model(**piece, **{CACHE: cache}, use_cache=True)
            cache = out[CACHE]
            logits.append(out.logits)
        if getattr(model, "next_axes", None) is None:  # whose last logits of a piece lack the next axis ids
            torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-5, rtol=1e-4)
        assert cache.get_seq_length() == 12 and out.past_key_values is cache


class TestGeneration:
    @pytest.mark.parametrize("beams", [1, 3])
    @pytest.mark.parametrize("name", CAUSAL)
    def test_a_cache_changes_nothing(self, name, beams):
        model = make(name)
        inputs = inputs_of(model)
        written = [model.generate(**inputs, **GREEDY, num_beams=beams, use_cache=use) for use in (True, False)]
        assert torch.equal(*written) and written[0].shape[1] == 20

    @pytest.mark.parametrize("name", CAUSAL)
    def test_left_padded_rows_are_the_rows_alone(self, name):
        model = make(name)
        inputs = inputs_of(model)
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, :5] = 0
        batch = {key: x.masked_fill(mask.view(2, *[1] * (x.dim() - 2), 12) == 0, 0) for key, x in inputs.items()}
        written = model.generate(**batch, attention_mask=mask, **GREEDY)
        alone = model.generate(**{key: x[:1, ..., 5:] for key, x in inputs.items()}, **GREEDY)
        assert torch.equal(written[0, 5:], alone[0])

    @pytest.mark.parametrize("argument", ["past_key_values", CACHE])
    @pytest.mark.parametrize("name", CAUSAL)
    def test_generation_goes_on_from_its_cache(self, name, argument):
        model = make(name)
        inputs = inputs_of(model)
        long = {**GREEDY, "max_new_tokens": 14, "return_dict_in_generate": True}
        expected = model.generate(**inputs, **long).sequences
        first = model.generate(**inputs, **{**long, "max_new_tokens": 6})
        if "axis_ids" in inputs:
            inputs["axis_ids"] = first.axis_sequences
        inputs["input_ids"] = first.sequences
        more = model.generate(**inputs, **{**long, "max_new_tokens": 8}, **{argument: first[CACHE]})
        assert torch.equal(more.sequences, expected)

    @pytest.mark.parametrize("name", CAUSAL)
    def test_a_cache_that_was_reset_is_as_new(self, name):
        model = make(name)
        inputs = inputs_of(model)
        out = model(**inputs, use_cache=True)
        out[CACHE].reset()
        again = model(**inputs, **{CACHE: out[CACHE]})
        torch.testing.assert_close(again.logits, out.logits)

    def test_static_caches(self):
        model = make("leap")
        inputs = inputs_of(model)
        expected = model.generate(**inputs, **GREEDY)
        static = model.generate(**inputs, **GREEDY, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, expected)

    def test_given_cells_stay(self):
        model = make("heptapod")
        page = inputs_of(model)["input_ids"]
        is_masked = torch.zeros_like(page, dtype=torch.bool)
        is_masked[:, 1:, 1:3] = True
        written = model.generate(page.masked_fill(is_masked, model.config.mask_token_id), max_denoising_steps=3)
        assert torch.equal(written[~is_masked], page[~is_masked]) and (written != model.config.mask_token_id).all()


class TestFolders:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("version", VERSIONS)
    def test_without_the_package(self, version, name):
        said = torch.load(os.environ["COMPAT_SAID"])[version, name]
        expected = torch.load(FOLDERS / version / "said.pt")[name]
        assert not isinstance(said, str), said
        assert said.keys() == expected.keys()
        for what, value in expected.items():
            assert torch.equal(said[what], value), what
        if "tokens, use_cache=True" in said:
            assert torch.equal(said["tokens, use_cache=True"], said["tokens, use_cache=False"])

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("version", VERSIONS)
    def test_with_the_package(self, version, name):
        auto = getattr(transformers, AUTO[MODELS[name][0]])
        model = auto.from_pretrained(FOLDERS / version / name).eval()
        assert type(model).__module__.startswith("modeling_heptapod.")
        for what, value in what_it_says(model).items():
            assert torch.equal(value, torch.load(FOLDERS / version / "said.pt")[name][what]), what


class TestTrainer:
    @pytest.mark.parametrize("name", TRAINED)
    def test_three_steps_and_a_resumed_one(self, name, tmp_path):
        weights = []
        for resume in (False, True):
            model = make(name)
            inputs = inputs_of(model, batch=12)
            inputs["labels"] = labels_of(model, inputs)
            rows = [{key: x[row] for key, x in inputs.items()} for row in range(12)]
            arguments = TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=3,
                save_steps=2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                seed=5,
            )
            trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3])
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
            assert trainer.state.global_step == 3 and trainer.evaluate()["eval_loss"] > 0
            weights.append([p.detach().clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*weights))
        assert any(not torch.equal(a, b) for a, b in zip(weights[0], make(name).parameters()))


class TestAdapters:
    @pytest.mark.parametrize("name", LEARNING)
    def test_a_step_of_lora_is_saved_and_merged(self, name, tmp_path):
        model = get_peft_model(make(name), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        found = gradients(model, inputs_of(model))
        assert found and all("lora_" in parameter for parameter in found)
        torch.optim.SGD(model.parameters(), 0.1).step()
        inputs = inputs_of(model)
        expected = model.eval()(**inputs)[0]
        model.save_pretrained(tmp_path)
        for again in (PeftModel.from_pretrained(make(name), tmp_path).eval(), model.merge_and_unload()):
            torch.testing.assert_close(again(**inputs)[0], expected, atol=1e-5, rtol=1e-4)


class TestPipelines:
    @pytest.fixture
    def tokenizer(self):
        return build_tokenizer("byte", [], for_pages=True)

    @pytest.mark.parametrize("name", ["leap", "hierarchical_lm", "multigrid"])
    def test_text_generation(self, name, tokenizer):
        model = make(name, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        prompts = ["def f(x):", "import"]
        batch = pipe(prompts, batch_size=2, return_tensors=True, **GREEDY)
        for prompt, (row,) in zip(prompts, batch):
            ids = tokenizer(prompt, return_tensors="pt")
            expected = model.generate(**ids, **GREEDY, use_cache=False)[0].tolist()
            assert row["generated_token_ids"][-len(expected) :] == expected

    @pytest.mark.parametrize("name", ["leap-masked", "heptapod"])
    def test_fill_mask(self, name, tokenizer):
        ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        if name == "heptapod":
            ids |= {"mask_token_id": tokenizer.mask_token_id, "grid_size": (2, 4)}
        pipe = pipeline("fill-mask", model=make(name, **ids), tokenizer=tokenizer)
        filled = pipe(f"def{tokenizer.mask_token}f(x)", top_k=2)  # eight tokens
        assert len(filled) == 2 and filled[0]["score"] >= filled[1]["score"]

    def test_text_classification(self, tokenizer):
        model = make("leap-classification", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
        texts = ["def f(x):", "import"]
        for text, got in zip(texts, pipe(texts, batch_size=2)):
            scores = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)
            assert got["score"] == pytest.approx(scores.max().item(), abs=1e-5)


def test_imports_print_nothing():
    """Transformers prints `[ERROR]` lines about arguments and fields of models whose docstrings it does not understand."""
    names = sorted({head for head, _ in MODELS.values()})
    code = f"import modeling_heptapod; [getattr(modeling_heptapod, name) for name in {names}]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and "ERROR" not in done.stderr, done.stdout + done.stderr
