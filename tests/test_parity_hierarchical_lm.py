"""Our models with the prototype's weights give the prototype's logits, losses and gradients."""

import pytest
import torch
from convert_hierarchical import convert, convert_state_dict


prototypes = pytest.importorskip(
    "simple_hierarchical_transformer", reason="the prototype is not installed: pip install .[parity]"
)

THREE = {
    "hierarchies": (1, 2, 4),
    "dim": (16, 24, 32),
    "heads": (2, 4, 3),
    "dim_head": (8, 4, 8),
    "ff_mult": (2, 3, 4),
}
STRIDED = {"hierarchies": (1, 2, 8), "hierarchical_stride": (1, 1, 4)}
CONFIGS = {
    "one": {},
    "one, window": {"window_sizes": 5},
    "one, no attention": {"window_sizes": 0},
    "two": {"hierarchies": (1, 2)},
    "three widths": THREE,
    "three widths, windows": {**THREE, "window_sizes": (4, 0, None)},
    "strides": STRIDED,
    "strides, windows": {**STRIDED, "window_sizes": (7, 3, 2)},
    "strides of whole factors": {"hierarchies": (1, 4), "hierarchical_stride": (1, 4), "window_sizes": (3, None)},
    "predicts from all": {**THREE, **STRIDED, "predict_use_all_hierarchy": True},
    "merges into all": {**THREE, **STRIDED, "hierarchy_merge_all": True, "window_sizes": (6, 6, 6)},
    "both": {**THREE, "hierarchy_merge_all": True, "predict_use_all_hierarchy": True},
    "predicts from another": {**THREE, "predict_hierarchy": 2, "window_sizes": (4, 5, 0)},
    "in another order": {"hierarchies": (4, 1, 2), "dim": (32, 16, 24), "window_sizes": (None, 4, 0)},
    "windows wider than it can see": {"hierarchies": (1, 4), "window_sizes": (64, 17), "seq_len": 64},
}
LOSSES = {
    "defaults": {},
    "cosine and squares, rollouts": {"num_rollouts": 3, "rollout_weights": (3.0, 2.0, 1.0), "dynamic_loss_decay": 0.5},
    "squares": {"next_latent_loss_type": "mse", "num_rollouts": 2, "dynamic_rollout_loss_weight": False},
    "smooth": {"next_latent_loss_type": "smooth_l1", "detach_summaries": False},
    "reconstruction alone": {"next_latent_loss_weight": 0.0, "recon_loss_weight": 1.5},
    "latents alone": {"recon_loss_weight": 0.0, "dynamics_hidden_dim": 9, "dynamics_num_layers": 2},
    "one layer": {"dynamics_num_layers": 1},
}
SEQ = 93  # no multiple of any factor or window


def prototype(block_windows=False, **overrides):
    """The prototype and its arguments. Norms, biases and what starts at zero are random as well."""
    arguments = {"num_tokens": 50, "dim": 32, "depth": 3, "seq_len": 128, "heads": 4, "dim_head": 8, **overrides}
    torch.manual_seed(0)
    model = prototypes.HierarchicalTransformer(**arguments).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "gamma" in name or "bias" in name or "dynamics" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    for module in model.modules():
        if hasattr(module, "attn_fn"):
            module.attn_fn.exact_windowsize = not block_windows
    return model, arguments


def pair(block_windows=False, **overrides):
    theirs, arguments = prototype(block_windows, **overrides)
    return theirs, convert(arguments, theirs.state_dict(), block_windows)


def random_ids(batch, seq):
    return torch.randint(1, 50, (batch, seq))  # 0 is what the prototype leaves out of its losses


def check_logits(theirs, ours, **kwargs):
    for seq in (1, 2, 16, 63, SEQ):
        if seq > theirs.seq_len:
            continue
        ids = random_ids(2, seq)
        with torch.no_grad():
            expected, logits = theirs(ids, **kwargs), ours(ids, ablate_merge=bool(kwargs)).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_prototypes(name):
    check_logits(*pair(**CONFIGS[name]))


@pytest.mark.parametrize("name", ["one, window", "three widths, windows", "strides, windows"])
def test_logits_with_windows_of_blocks(name):
    exact, _ = prototype(**CONFIGS[name])
    theirs, ours = pair(block_windows=True, **CONFIGS[name])
    check_logits(theirs, ours)
    ids = random_ids(2, SEQ)
    with torch.no_grad():
        assert (exact(ids) - theirs(ids)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["three widths, windows", "merges into all"])
def test_merging_ablated(name):
    check_logits(*pair(**CONFIGS[name]), ablate_hierarchical_merge=True)


@pytest.mark.parametrize("name", ["three widths, windows", "merges into all"])
def test_hierarchy_embeddings(name):
    theirs, ours = pair(**CONFIGS[name])
    ids = random_ids(2, SEQ)
    with torch.no_grad():
        expected = theirs(ids, return_hierarchical_embeds=True)
        found = ours(ids, output_hierarchy_hidden_states=True).hierarchy_hidden_states
    torch.testing.assert_close(list(found), list(expected), rtol=0, atol=1e-5)


def losses_of_both(theirs, ours, ids):
    """Ours and theirs by name. The prototype takes the last token for a label only, so we tell ours its labels."""
    total, (ce, next_latent, reconstruction, _) = theirs(ids, return_loss=True)
    out = ours(ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous())
    expected = {"loss": total, "ce_loss": ce, "next_latent_loss": next_latent, "reconstruction_loss": reconstruction}
    found = {name: getattr(out, name) for name in expected}
    return {name: torch.zeros(()) if value is None else value for name, value in found.items()}, expected


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("name", ["one", "three widths, windows", "strides", "predicts from all", "merges into all"])
def test_losses_equal_the_prototypes(name, losses):
    theirs, ours = pair(**CONFIGS[name], **LOSSES[losses])
    found, expected = losses_of_both(theirs, ours, random_ids(2, SEQ))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if losses != "reconstruction alone":
        assert expected["next_latent_loss"] > 0.1


@pytest.mark.parametrize("losses", ["defaults", "cosine and squares, rollouts", "smooth"])
@pytest.mark.parametrize("name", ["one", "three widths, windows", "strides, windows", "predicts from all", "both"])
def test_gradients_equal_the_prototypes(name, losses):
    theirs, arguments = prototype(**CONFIGS[name], **LOSSES[losses])
    ours = convert(arguments, theirs.state_dict()).double()
    theirs = theirs.double()
    found, expected = losses_of_both(theirs, ours, random_ids(2, 31))
    found["loss"].backward()
    expected["loss"].backward()
    grads = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in theirs.named_parameters()}
    for name, weight in theirs.named_parameters():
        if "hierarchical_merges" in name and name.endswith("gamma"):
            grads[name] = 1 / weight.detach()  # ours hold their products, so conversion multiplies by it
    arranged = convert_state_dict(grads, ours.config)  # gradients are arranged as their weights are
    assert set(arranged) == {name for name, _ in ours.named_parameters()}
    assert all(grad.any() for name, grad in arranged.items() if "auxiliary_losses" in name)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, arranged[name], rtol=1e-5, atol=1e-6)


def test_losses_of_right_padded_rows():
    """The next-latent loss of theirs looks at pads as ours does; what their coarse pads reconstruct, ours do not count."""
    theirs, ours = pair(**CONFIGS["strides"])
    ids = random_ids(2, SEQ)
    ids[0, 40:] = 0
    _, (ce, next_latent, _, _) = theirs(ids, return_loss=True)
    inputs, labels = ids[:, :-1], ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)
    out = ours(inputs, attention_mask=(inputs != 0).long(), labels=inputs, shift_labels=labels)
    torch.testing.assert_close(out.ce_loss, ce, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.next_latent_loss, next_latent, rtol=0, atol=1e-5)
