"""LoRA by peft on every family and head: no adapter is passed by, and what is saved, merged or trained is what it says."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from torch import nn

from tests.test_export import in_a_clean_room
from tests.tiny import mostly_slow
from tests.tiny_heptapod import random_page, tiny_heptapod
from tests.tiny_hierarchical_lm import VARIANTS as HIERARCHICAL
from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
from tests.tiny_leap import random_ids, tiny_leap
from tests.tiny_multigrid import TWO_AXES, random_grid, tiny_multigrid


ROOT = Path(__file__).parent.parent
LENGTH = 80  # of four rows: enough for the batched products that MultiGrid's training makes of plain leaves
ALL_LOSSES = {
    "reconstruction_loss_weight": 0.1,
    "prophet_loss_weight": 0.1,
    "quantized_prophet_loss_weight": 0.1,
    "next_latent_loss_weight": 0.1,
}


@dataclass
class Case:
    """A model and what it is trained on.

    Attributes:
        make: of the family's tiny models.
        options: of its config.
        unread: a pattern of adapters that change nothing because their module itself changes nothing.
    """

    make: callable
    options: dict = field(default_factory=dict)
    unread: str = "nothing"

    def model(self, **options):
        return self.make(**self.options, **options)

    def inputs(self, model):
        """Inputs with labels."""
        kind = model.config.model_type
        if kind == "heptapod":
            inputs = {"input_ids": random_page(4, 6, 8)}
        elif kind == "multigrid":
            inputs = random_grid(model, 4, LENGTH)
        else:
            inputs = {"input_ids": random_ids(4, LENGTH)}
        if hasattr(model, "score"):
            return {**inputs, "attention_mask": torch.ones(4, LENGTH), "labels": torch.tensor([0, 1, 1, 0])}
        return {**inputs, "labels": inputs["input_ids"]}


def leap(head):
    return lambda **options: tiny_leap(head, num_hidden_layers=2, window_sizes=[None, 3], **options)


CASES = {
    "leap-causal": Case(leap("LeapForCausalLM")),
    "leap-masked": Case(leap("LeapForMaskedLM")),
    "leap-classification": Case(leap("LeapForSequenceClassification")),
    "leap-additive": Case(leap("LeapForCausalLM"), {"mixer": "additive", "position_embedding_type": "alibi"}),
    "hierarchical-concat": Case(tiny_hierarchical_lm, {**HIERARCHICAL["stride"], **ALL_LOSSES}),
    "hierarchical-cross": Case(tiny_hierarchical_lm, HIERARCHICAL["cross"]),
    # The last layer tells hierarchy 1 what nobody reads, and a hierarchy that reads one other has nothing to choose.
    "hierarchical-all": Case(
        tiny_hierarchical_lm, HIERARCHICAL["cross-all"], r"merge\.q_projs\.1|layers\.1\.merge\.o_projs\.1"
    ),
    "hierarchical-attention": Case(tiny_hierarchical_lm, HIERARCHICAL["attention-compressor"]),
    "grid": Case(tiny_heptapod, {"self_conditioning": True, "neighbor_loss_weight": 0.5, "num_global_heads": 1}),
    "multigrid-plain": Case(tiny_multigrid),
    "multigrid-transformer": Case(tiny_multigrid, {**TWO_AXES, "axis_hidden_size": 8}),
    "multigrid-leap": Case(tiny_multigrid, {**TWO_AXES, "core": "leap"}),
    "multigrid-lstm": Case(tiny_multigrid, {**TWO_AXES, "core": "lstm"}),
    "multigrid-factored": Case(tiny_multigrid, {**TWO_AXES, "axis_order": "factored"}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
_FAST = [
    CASES[name] for name in ("leap-causal", "hierarchical-concat", "grid", "multigrid-transformer", "multigrid-lstm")
]
some_fast = pytest.mark.parametrize("case", mostly_slow(CASES.values(), _FAST), ids=CASES)


def adapted(model, std=0.3, **options):
    """With adapters that are not zero from the start, as after training."""
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(**{"target_modules": "all-linear", "r": 2, **options}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return model


def adapters(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def everything(model, inputs):
    """All that a model says of `inputs`, flat: scores of each axis, and each loss. What it draws is drawn alike."""
    torch.manual_seed(7)
    outputs = model(**inputs)
    scores = [outputs.logits, *(outputs.get("axis_logits") or ())]
    losses = [value for name, value in outputs.items() if name.endswith("loss")]
    return torch.cat([part.flatten() for part in (*scores, *losses)])


def is_felt(layer, run, before):
    """Whether another adapter on a layer gives another output. What was there comes back to the last bit."""
    weight = layer.lora_B["default"].weight
    kept = weight.clone()
    weight.add_(0.5)
    after = run()
    weight.copy_(kept)
    return not torch.equal(after, before)


@every_case
def test_all_linear_is_all_linear(case):
    """All but the head that tells tokens, which peft leaves out; and nothing that is no layer of ours."""
    model = case.model()
    head = model.get_output_embeddings()
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    assert {name.removeprefix("base_model.model.") for name in adapters(adapted(model))} == linears


@some_fast
def test_no_adapter_is_passed_by_in_inference(case):
    model = case.model()
    inputs, model = case.inputs(model), adapted(model).eval()
    with torch.no_grad():
        before = everything(model, inputs)
        for name, layer in adapters(model).items():
            if not re.search("neighbor_projs|" + case.unread, name):  # the former are for training only
                assert is_felt(layer, lambda: everything(model, inputs), before), name


@every_case
def test_adapters_learn_and_nothing_else_does(case):
    model = case.model()
    inputs, model = case.inputs(model), adapted(model).train()
    torch.manual_seed(11)  # with which the grid listens to itself
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        if "lora_" not in name:
            assert parameter.grad is None, name
        elif not re.search(case.unread, name):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@some_fast
def test_training_lowers_the_loss_and_keeps_the_model(case):
    model = case.model()
    inputs = case.inputs(model)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4)).train()
    kept = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        torch.manual_seed(7)  # the grid draws the same masks
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.02 * abs(losses[0])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in kept.items())
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(everything(model.eval(), inputs), everything(case.model(), inputs))


@every_case
@pytest.mark.parametrize("use_reentrant", mostly_slow([False, True], (False,)))
def test_gradient_checkpointing_gives_the_same_gradients(case, use_reentrant):
    """Whose inputs peft makes require gradients: those of the embeddings, since nothing before the first adapter does."""
    model = case.model()
    inputs, model, grads = case.inputs(model), adapted(model).train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(11)
        model(**inputs).loss.backward()
        learn = [p for p in model.parameters() if p.requires_grad]
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad for p in learn])
        model.zero_grad()
    assert len(grads[0]) > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


@every_case
def test_saved_adapters_are_the_same_to_the_last_bit(case, tmp_path):
    model = case.model()
    inputs, model = case.inputs(model), adapted(model).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.model(), tmp_path)
    assert_equal_weights(loaded, model.state_dict())
    with torch.no_grad():  # a matrix product of few columns feels where in memory its operands lie
        torch.testing.assert_close(everything(loaded, inputs), everything(model, inputs), rtol=1e-5, atol=1e-5)


def assert_equal_weights(model, weights):
    own = model.state_dict()
    assert set(own) == set(weights)
    assert all(torch.equal(own[name], value) for name, value in weights.items())


@some_fast
def test_merged_adapters_are_the_same_model(case, tmp_path):
    """To rounding in float64, and within 1e-6 in float32 at the size of a model's first weights. What is left is plain."""
    for dtype, std, tolerance in ((torch.float64, 0.3, 1e-12), (torch.float32, 0.02, 1e-6)):
        model = case.model(initializer_range=0.02).to(dtype)
        names, inputs = set(model.state_dict()), case.inputs(model)
        with torch.no_grad():
            plain = everything(model, inputs)
            model = adapted(model, std).eval()
            unmerged = everything(model, inputs)
            merged = model.merge_and_unload()
            assert (everything(merged, inputs) - unmerged).abs().max() <= tolerance * max(1, unmerged.abs().max())
        assert (unmerged - plain).abs().max() > 1000 * tolerance
        assert set(merged.state_dict()) == names
    merged.save_pretrained(tmp_path)
    assert_equal_weights(type(merged).from_pretrained(tmp_path), merged.state_dict())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "Causal" in type(case.model()).__name__])
def test_cached_generation_goes_through_the_adapters(name):
    """LEAP's step in C, attention to one token, single steps of streams: each gives what the whole text gives."""
    model = CASES[name].model()
    inputs, model = CASES[name].inputs(model), adapted(model).eval()
    tracks = {"axis_ids": inputs["axis_ids"][:, :, :24]} if "axis_ids" in inputs else {}
    ids = inputs["input_ids"][:, :24]
    with torch.no_grad():
        whole = model(ids, **tracks).logits
        cache, steps = None, []
        for part in (slice(0, 16), *(slice(i, i + 1) for i in range(16, 24))):
            given = {key: value[:, :, part] for key, value in tracks.items()}
            if name == "multigrid-factored" and part.stop < 24:  # it is told the axis ids that come next
                given["next_axis_ids"] = tracks["axis_ids"][:, :, part.stop]
            outputs = model(ids[:, part], past_key_values=cache, use_cache=True, **given)
            cache = outputs.past_key_values
            steps.append(outputs.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-3, atol=1e-3)


def test_a_classifier_is_saved_with_its_adapters(tmp_path):
    case = CASES["leap-classification"]
    model = case.model()
    inputs, model = case.inputs(model), adapted(model, task_type=TaskType.SEQ_CLS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    untrained = model.base_model.model.score.original_module.weight.clone()
    model(**inputs).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    assert not torch.equal(model.base_model.model.score.modules_to_save["default"].weight, untrained)
    loaded = PeftModel.from_pretrained(case.model(), tmp_path)
    assert_equal_weights(loaded, model.state_dict())
    with torch.no_grad():
        merged = loaded.merge_and_unload()
        assert not torch.equal(merged.score.weight, untrained)
        torch.testing.assert_close(merged(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_an_lstm_is_adapted_by_its_parameters(tmp_path):
    """It is no linear layer, so `all-linear` leaves it alone."""
    case = CASES["multigrid-lstm"]
    names = ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    model = case.model()
    inputs, model = case.inputs(model), adapted(model, target_modules=[], target_parameters=names).eval()
    with torch.no_grad():
        before = everything(model, inputs)
        assert len(adapters(model)) == len(names) * 2 * 3  # of two layers with three streams each
        for name, layer in adapters(model).items():
            assert is_felt(layer, lambda: everything(model, inputs), before), name
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.model(), tmp_path)
        torch.testing.assert_close(everything(loaded, inputs), before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(everything(model.merge_and_unload(), inputs), before, rtol=1e-5, atol=1e-5)


WITH_ADAPTERS = """
import json, sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_heptapod":
            raise ImportError(f"{name} is blocked in this test")


sys.meta_path.insert(0, Blocked())
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel

folder, jobs = sys.argv[1], json.loads(sys.argv[2])
results = {}
for name, auto in jobs:
    inputs = torch.load(f"{folder}/{name}.pt")
    plain = getattr(transformers, auto).from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    model = PeftModel.from_pretrained(plain, f"{folder}/{name}-adapters").eval()
    with torch.no_grad():
        results[name] = model(**inputs).logits
        if auto == "AutoModelForCausalLM":
            model = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/{name}-adapters", trust_remote_code=True)
            results[name, "by the adapters' folder"] = model.eval()(**inputs).logits
    results[name, "adapters"] = {key: value for key, value in model.state_dict().items() if "lora_" in key}
torch.save(results, folder + "/results.pt")
"""


@pytest.mark.slow
def test_adapters_load_onto_exports_where_the_package_is_not(tmp_path):
    jobs = [("leap-masked", "AutoModelForMaskedLM"), ("leap-classification", "AutoModelForSequenceClassification")]
    jobs += [(name, "AutoModelForCausalLM") for name in ("leap-causal", "hierarchical-concat", "multigrid-leap")]
    jobs += [("grid", "AutoModelForMaskedLM")]
    expected = {}
    for name, auto in jobs:
        case = CASES[name]
        model = case.model(pad_token_id=0) if name == "leap-classification" else case.model()
        model.save_pretrained(tmp_path / name)
        inputs = case.inputs(model)
        del inputs["labels"]
        torch.save(inputs, tmp_path / f"{name}.pt")
        task = TaskType.CAUSAL_LM if auto == "AutoModelForCausalLM" else None
        model = adapted(type(model).from_pretrained(tmp_path / name), task_type=task).eval()
        model.save_pretrained(tmp_path / f"{name}-adapters")
        with torch.no_grad():
            expected[name] = model(**inputs).logits
        expected[name, "adapters"] = {key: value for key, value in model.state_dict().items() if "lora_" in key}
        if auto == "AutoModelForCausalLM":
            expected[name, "by the adapters' folder"] = expected[name]
    results, _ = in_a_clean_room(tmp_path, jobs, code=WITH_ADAPTERS)
    assert set(results) == set(expected)
    for key, value in expected.items():
        if isinstance(value, dict):
            assert set(results[key]) == set(value)
            assert all(torch.equal(results[key][name], weight) for name, weight in value.items()), key
        else:
            torch.testing.assert_close(results[key], value, rtol=1e-5, atol=1e-5)


# --- other ways than LoRA --------------------------------------------------------------------------------------------


@every_case
def test_orthogonal_adapters_learn(case):
    """OFT takes activations of at most three dimensions."""
    model = case.model()
    inputs = case.inputs(model)
    torch.manual_seed(11)  # with which the grid listens to itself
    model = get_peft_model(model, OFTConfig(target_modules="all-linear", oft_block_size=4)).train()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if "oft_R" in name and not re.search(case.unread, name):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@every_case
def test_linear_layers_are_given_three_dimensions_at_most(case):
    """`[batch, cells, channels]` on the grid: quantized layers and adapters of others know no more."""
    model = case.model()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            note = lambda module, args, name=name: seen.setdefault(name, set()).add(args[0].dim())
            module.register_forward_pre_hook(note)
    inputs = case.inputs(model)
    for training in (True, False):
        torch.manual_seed(11)
        model.train(training)(**inputs)
    if model.config.model_type == "heptapod":
        model.elbo(inputs["input_ids"], num_samples=2)
    assert {name: dims for name, dims in seen.items() if not dims <= {2, 3}} == {}


CAUSAL = ["leap-causal", "leap-additive", "hierarchical-cross", "multigrid-plain"]
PREFIXED = [
    "leap-causal",
    "leap-masked",
    "leap-classification",
    "hierarchical-cross",
    "multigrid-plain",
    "multigrid-leap",
]


@pytest.mark.parametrize("method", [PromptTuningConfig, PromptEncoderConfig])
@pytest.mark.parametrize("name", CAUSAL)
def test_prompt_tuning(name, method):
    """Virtual tokens are embeddings before those of the text: in training, in generation, and before left pads."""
    torch.manual_seed(3)
    model = CASES[name].model(pad_token_id=0)
    tuned = get_peft_model(model, method(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    ids = random_ids(2, 9).clamp_min(1)
    prompts = tuned.get_prompt(2).detach()
    outputs = tuned(input_ids=ids, labels=ids)
    embeds = torch.cat((prompts, model.get_input_embeddings()(ids)), dim=1)
    torch.testing.assert_close(outputs.logits, model(inputs_embeds=embeds).logits)
    outputs.loss.backward()
    learn = [p for p in tuned.parameters() if p.requires_grad]
    assert learn and all(p.grad is not None for p in learn) and any(p.grad.any() for p in learn)
    options = {"max_new_tokens": 6, "do_sample": False}
    whole = tuned.generate(input_ids=ids, **options)
    assert torch.equal(whole, tuned.generate(input_ids=ids, use_cache=False, **options))
    short = ids[1:, 4:]
    padded = torch.cat((ids[:1], nn.functional.pad(short, (4, 0))))
    mask = (padded != 0).long()
    written = tuned.generate(input_ids=padded, attention_mask=mask, **options)
    assert torch.equal(written[:1], whole[:1])
    assert torch.equal(written[1:, 4:], tuned.generate(input_ids=short, **options))


@pytest.mark.parametrize("name", PREFIXED)
def test_prefix_tuning_is_refused(name):
    """It makes keys and values from outside, which these models do not read."""
    case = CASES[name]
    model = case.model()
    task = {"score": "SEQ_CLS", "generate": "CAUSAL_LM"}
    task = next((kind for has, kind in task.items() if hasattr(model, has)), "FEATURE_EXTRACTION")
    inputs = case.inputs(model)
    tuned = get_peft_model(model, PrefixTuningConfig(task_type=task, num_virtual_tokens=3))
    with pytest.raises((TypeError, ValueError), match="[Pp]refix tuning|a bidirectional model has no past"):
        tuned(**inputs)


@pytest.mark.parametrize("task_type", ["FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("method", [PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig])
def test_a_page_has_no_cell_for_virtual_tokens(method, task_type):
    with pytest.raises(ValueError, match=r"Prompt learning .* no cells for them"):
        get_peft_model(CASES["grid"].model(), method(task_type=task_type, num_virtual_tokens=3))


# --- the docs' table of modules --------------------------------------------------------------------------------------


def documented_names():
    """By family, the names of the layers that mix positions, and of all others."""
    page = (ROOT / "docs" / "fine_tuning.md").read_text(encoding="utf-8").split("\n## LoRA\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    return {family: [re.findall(r"`([\w.]+)`", column) for column in columns] for family, *columns in rows}


def leaf(name):
    """How the table calls a layer: without its number, where it is one of several."""
    *_, parent, last = name.split(".")
    return f"{parent}.0" if last.isdigit() else last


def test_the_documented_names_are_those_of_all_linear_layers():
    found = {}
    for case in CASES.values():
        model = adapted(case.model())
        found.setdefault(case.model().config.model_type, set()).update(map(leaf, adapters(model)))
    assert found == {family: {*mixing, *others} for family, (mixing, others) in documented_names().items()}


@every_case
def test_layers_that_mix_are_adapted_by_name(case):
    """A name that something else has as well, such as a list of layers, would be an error."""
    model = case.model()
    names, _ = documented_names()[model.config.model_type]
    present = {leaf(name) for name, module in model.named_modules() if isinstance(module, nn.Linear) and "." in name}
    wanted = [name for name in names if name in present]
    found = adapters(adapted(case.model(), target_modules=wanted))
    assert {leaf(name) for name in found} == set(wanted)
