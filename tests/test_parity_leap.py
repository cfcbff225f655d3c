"""Our models with the prototype's weights give the prototype's logits."""

import copy
import warnings

import pytest
import torch
from convert_leap import convert

from tests.tiny_leap import random_ids


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    leap = pytest.importorskip("leap", reason="the prototype is not installed: pip install .[parity]")

pytestmark = pytest.mark.filterwarnings("ignore:Using a hidden_size")

# With windows the prototype subtracts prefix sums, which in float32 cost it up to 1e-2 at length 300. There its own
# float64 result is what our float32 is held against; where nothing is subtracted its float32 is as well.
CONFIGS = {
    "default windows": ("leap", {}),
    "custom windows": ("leap", {"window_sizes": [3, 512, 100, 1]}),
    "plain scale": ("leap", {"rescale": None}),
    "other heads": ("leap", {"n_head": 8, "rescale": 4}),
    "six layers": ("leap", {"n_layer": 6, "hidden_size": 48, "n_head": 3}),
    "no windows": ("leap", {"use_local_att": False}),
    "no windows, plain scale": ("leap", {"use_local_att": False, "rescale": None}),
    "no windows, other heads": ("leap", {"use_local_att": False, "n_head": 8, "rescale": 5}),
    "fastformer": ("fastformer", {}),
    "fastformer, custom windows": ("fastformer", {"window_sizes": [3, 512, 100, 1], "rescale": 4, "n_heads": 8}),
    "fastformer, no windows": ("fastformer", {"use_local_att": False}),
}


def prototype(kind, **overrides):
    torch.manual_seed(0)
    config_class, model_class = {
        "leap": (leap.LeapConfig, leap.LeapForCausalLM),
        "fastformer": (leap.FastformerLMConfig, leap.FastformerForCausalLM),
    }[kind]
    model = model_class(config_class(**{"hidden_size": 64, "vocab_size": 50, "n_positions": 512, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or ("boom" in name and "bias" in name):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def logits_of(model, ids, mask):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_prototypes(name):
    kind, overrides = CONFIGS[name]
    theirs = prototype(kind, **overrides)
    ours = convert(theirs.config.to_dict(), theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    references = [theirs, exact] if not overrides.get("use_local_att", True) else [exact]
    for seq in (1, 17, 300, 512):
        ids = random_ids(2, seq)
        whole, right_padded = torch.ones_like(ids), torch.ones_like(ids)
        right_padded[0, (seq + 1) // 2 :] = 0  # the prototype counts positions from the left
        right_padded[1, seq - seq // 4 :] = 0
        for mask in (whole, right_padded):
            logits = logits_of(ours, ids, mask)[mask.bool()]
            for reference in references:
                expected = logits_of(reference, ids, mask)[mask.bool()]
                torch.testing.assert_close(logits.to(expected), expected, rtol=0, atol=1e-5)
                assert seq == 1 or expected.std() > 0.1
        assert torch.equal(logits_of(ours, ids, None), logits_of(ours, ids, whole))


@pytest.mark.parametrize("kind", ["leap", "fastformer"])
def test_losses_and_gradients_equal_the_prototypes(kind):
    theirs = prototype(kind).double()
    ours = convert(theirs.config.to_dict(), theirs.state_dict()).double()
    ids = random_ids(2, 100)
    expected = theirs(ids, attention_mask=torch.ones_like(ids), labels=ids.clone()).loss
    loss = ours(ids, labels=ids).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)  # ours is computed in float32
    loss.backward()
    expected.backward()
    grad, expected_grad = ours.get_input_embeddings().weight.grad, theirs.word_embedding.weight.grad
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)
