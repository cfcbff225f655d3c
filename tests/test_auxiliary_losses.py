"""Losses of the hierarchies against `tests/reference/hierarchical_lm.py`, and what they may not see or keep."""

import pytest
import torch
from torch import nn

import modeling_heptapod.hierarchical_lm.linear_cross_entropy as linear_cross_entropy_file
from modeling_heptapod.hierarchical_lm.auxiliary_losses import (
    AuxiliaryLosses,
    ChunkSummarizer,
    RandomProjectionQuantizer,
    ZeroInitLinear,
)
from modeling_heptapod.hierarchical_lm.configuration_hierarchical_lm import HierarchicalLMConfig
from modeling_heptapod.hierarchical_lm.linear_cross_entropy import linear_cross_entropy, naive_linear_cross_entropy
from tests.reference.hierarchical_lm import LossDescription, next_latent_loss, quantized_prophet_loss, token_loss
from tests.tiny_hierarchical_lm import random_ids, tiny_hierarchical_lm


VOCAB = 11
TOKEN_LOSSES = ("reconstruction", "prophet")
ALL = {
    "reconstruction_loss_weight": 0.1,
    "prophet_loss_weight": 0.1,
    "quantized_prophet_loss_weight": 0.1,
    "next_latent_loss_weight": 0.25,
}
# Ways in which hierarchies lie to each other; every loss runs over these.
SHAPES = {
    "one width": {"compression_factors": [1, 2, 4], "hidden_sizes": 8},
    "widths": {"compression_factors": [4, 1, 2], "hidden_sizes": [12, 4, 8]},
    "strides": {"compression_factors": [1, 2, 8], "strides": [1, 2, 4], "hidden_sizes": [8, 6, 12]},
    "coarse only": {"compression_factors": [4], "strides": [1], "hidden_sizes": 8},
}
# Lengths of the sequences of a batch: alone, in padded rows, packed into one row.
LENGTHS = {"whole": [13, 13], "padded": [13, 5, 1], "packed": [9, 13, 2], "packed and padded": [9, 13, 2]}


def config_of(shape, **overrides):
    values = {
        "vocab_size": VOCAB,
        "num_hidden_layers": 1,
        "prophet_codebook_size": 7,
        "prophet_codebook_dim": 5,
        "prophet_num_codebooks": 3,
        "dynamics_hidden_size": 10,
        "next_latent_dynamic_decay": 1.0,
    }
    return HierarchicalLMConfig(**{**values, **SHAPES[shape], **ALL, **overrides})


def losses_of(config):
    """Losses in float64; what starts at zero is random, so that it cannot be forgotten."""
    losses = AuxiliaryLosses(config).double()
    with torch.no_grad():
        for name, parameter in losses.named_parameters():
            if "dynamics" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return losses


def ceil_to(number, multiple):
    return -(-number // multiple) * multiple


class Batch:
    """Random sequences, laid out as the model does: where each is in its row, and what the losses are called with."""

    def __init__(self, config, layout):
        lengths, largest = LENGTHS[layout], max(config.compression_factors)
        packed = layout.startswith("packed")
        starts, row = [], 0
        for length in lengths:
            starts.append(row)
            row += ceil_to(length, largest) if packed else 0
        rows = 1 if packed else len(lengths)
        seq = row + (largest if layout == "packed and padded" else 0) if packed else max(lengths)
        self.places = [(0 if packed else n, starts[n], length) for n, length in enumerate(lengths)]
        self.strides = config.strides
        self.ids = torch.randint(VOCAB, (rows, seq))
        self.embeddings = torch.randn(rows, seq, config.hidden_size, dtype=torch.double, requires_grad=True)
        self.streams = [
            torch.randn(rows, -(-seq // s), width, dtype=torch.double, requires_grad=True)
            for s, width in zip(config.strides, config.hidden_sizes)
        ]
        self.mask = self.segments = None
        if layout != "whole":
            self.mask = torch.zeros(rows, seq, dtype=torch.bool)
            for row, start, length in self.places:
                self.mask[row, start : start + length] = True
        if packed:
            self.segments = torch.full((rows, seq), -1)
            for number, (row, start, length) in enumerate(self.places):
                self.segments[row, start : start + length] = number

    def inputs(self):
        return self.streams, self.embeddings, self.ids, self.mask, self.segments

    def sequences(self):
        """Ids, embeddings and streams of each sequence on its own."""
        ids = [self.ids[row, start : start + length].tolist() for row, start, length in self.places]
        embeddings = [self.embeddings[row, start : start + length] for row, start, length in self.places]
        streams = [
            [stream[row, start // s : start // s + -(-length // s)] for stream, s in zip(self.streams, self.strides)]
            for row, start, length in self.places
        ]
        return ids, embeddings, streams


def oracle(config, losses, batch):
    """The losses by name, and gradients of their sum."""
    description = LossDescription(
        factors=config.compression_factors,
        strides=config.strides,
        vocabulary=VOCAB,
        loss_type=config.next_latent_loss_type,
        rollouts=config.next_latent_rollouts,
        rollout_weights=config.next_latent_rollout_weights,
        dynamic=config.next_latent_dynamic_weights,
        dynamic_decay=config.next_latent_dynamic_decay,
        detach_summaries=config.detach_summaries,
        dynamics_layers=config.dynamics_num_layers,
    )
    weights = dict(losses.named_parameters()) | dict(losses.named_buffers())
    ids, embeddings, streams = batch.sequences()
    expected = {name: token_loss(name, weights, ids, streams, description) for name in TOKEN_LOSSES}
    expected["quantized_prophet"] = quantized_prophet_loss(weights, embeddings, streams, description)
    expected["next_latent"] = sum(
        weight * next_latent_loss(weights, embeddings, streams, h, description)
        for h, weight in enumerate(config.next_latent_loss_weight)
        if weight
    )
    return expected


def gradients(losses, batch, values):
    leaves = {**dict(losses.named_parameters()), "embeddings": batch.embeddings}
    leaves |= {f"stream {h}": stream for h, stream in enumerate(batch.streams)}
    grads = torch.autograd.grad(sum(values.values()), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zip(leaves.items(), grads)
    }


def check(config, layout="whole"):
    losses, batch = losses_of(config), Batch(config, layout)
    values, expected = losses(*batch.inputs()), oracle(config, losses, batch)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradients(losses, batch, values), gradients(losses, batch, expected))
    return values


# --- against the oracle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_equal_the_oracle(shape, layout):
    values = check(config_of(shape), layout)
    assert min(values.values()) > 0.1


@pytest.mark.parametrize("kind", ["mse", "cosine", "mse_and_cosine", "smooth_l1"])
@pytest.mark.parametrize("layout", LENGTHS)
def test_rollouts(kind, layout):
    options = {"next_latent_loss_type": kind, "next_latent_loss_weight": [0.5, 0, 2]}
    config = config_of(
        "strides", next_latent_rollouts=2, next_latent_rollout_weights=[3, 1], next_latent_dynamic_decay=0.7, **options
    )
    check(config, layout)


@pytest.mark.parametrize(
    "options",
    [
        {"next_latent_dynamic_weights": False, "next_latent_rollouts": 3},
        {"next_latent_rollouts": 3},
        {"detach_summaries": False},
        {"dynamics_num_layers": 1, "dynamics_hidden_size": None},
    ],
    ids=str,
)
def test_options(options):
    check(config_of("widths", **options))


def test_inner_layers_of_the_dynamics_are_as_wide_as_said():
    config = config_of("widths", next_latent_loss_weight=1.0, dynamics_num_layers=3, dynamics_hidden_size=11)
    inner = [m for name, m in AuxiliaryLosses(config).named_modules() if name.endswith(("layers.0", "layers.1"))]
    assert len(inner) == 2 * len(config.compression_factors) and all(layer.out_features == 11 for layer in inner)


def test_only_what_is_switched_on_is_computed_and_built():
    off = dict.fromkeys(ALL, 0.0)
    assert not AuxiliaryLosses.wanted(config_of("widths", **off))
    for field, weight in ALL.items():
        config = config_of("widths", **off | {field: weight})
        assert AuxiliaryLosses.wanted(config)
        losses, name = losses_of(config), field.removesuffix("_loss_weight")
        assert [child for child, _ in losses.named_children()] == [name]
        assert list(losses(*Batch(config, "whole").inputs())) == [name]
        assert list(getattr(losses, name)) == (["4", "1", "2"] if name == "next_latent" else ["4", "2"])
    config = config_of("widths", **off | {"next_latent_loss_weight": [0, 0, 1]})
    assert list(losses_of(config).next_latent) == ["2"]


def test_scale_multiplies_each_loss():
    config = config_of("strides")
    losses, batch = losses_of(config), Batch(config, "padded")
    values = losses(*batch.inputs())
    scaled = losses(*batch.inputs(), scale=torch.tensor(0.25))
    torch.testing.assert_close(scaled, {name: value / 4 for name, value in values.items()})


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sequence_of_one_token(shape):
    config = config_of(shape)
    losses = losses_of(config)
    streams = [torch.randn(1, 1, width, dtype=torch.double) for width in config.hidden_sizes]
    embeddings = torch.randn(1, 1, config.hidden_size, dtype=torch.double)
    values = losses(streams, embeddings, torch.tensor([[3]]))
    assert all(values[name] == 0 for name in values if name != "reconstruction")
    assert values["reconstruction"] > 0


# --- what may not leave a trace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "packed", "packed and padded"])
def test_pads_leave_no_trace(layout):
    config = config_of("strides", detach_summaries=False)
    losses, batch = losses_of(config), Batch(config, layout)
    values = losses(*batch.inputs())
    sum(values.values()).backward()
    assert not batch.embeddings.grad[~batch.mask].any()
    for stream, s in zip(batch.streams, config.strides):
        assert not stream.grad[~batch.mask[:, ::s]].any()
    with torch.no_grad():
        batch.embeddings[~batch.mask] = 100
        batch.ids[~batch.mask] = 0
        for stream, s in zip(batch.streams, config.strides):
            stream[~batch.mask[:, ::s]] = 100
    torch.testing.assert_close(losses(*batch.inputs()), values, rtol=0, atol=1e-12)


def test_the_quantizer_is_frozen_and_saved():
    config = config_of("strides", quantized_prophet_loss_weight=1.0)
    losses, batch = AuxiliaryLosses(config), Batch(config, "whole")
    assert not any("quantizer" in name for name, _ in losses.named_parameters())
    assert "quantized_prophet.8.quantizer.codebooks" in losses.state_dict()
    assert "quantized_prophet.8.quantizer.projection" in losses.state_dict()
    quantizer = losses.quantized_prophet["2"].quantizer
    codes = quantizer(batch.embeddings.float(), 2, 1)
    assert not codes.requires_grad and codes.shape == (2, 12, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(batch.embeddings.float(), 2, 1), codes)
    assert torch.equal(quantizer(5 * batch.embeddings.float() + 3, 2, 1), codes)  # what a normalised input means
    many = quantizer(torch.randn(1, 2001, config.hidden_size), 2, 1)
    assert all(many[0, :, book].unique().numel() == 7 for book in range(3))  # no code is idle


def test_codes_do_not_depend_on_the_precision_of_training():
    config = config_of("strides", quantized_prophet_loss_weight=1.0)
    quantizer = AuxiliaryLosses(config).quantized_prophet["2"].quantizer
    vectors = torch.randn(1, 2001, config.hidden_size)
    codes = quantizer(vectors, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(vectors, 2, 1), codes)


def test_no_gradient_from_targets():
    config = config_of("one width", next_latent_loss_weight=1.0)
    losses, batch = AuxiliaryLosses(config).double(), Batch(config, "whole")
    loss = losses.next_latent_losses(batch.streams, batch.embeddings)[0]
    loss.backward()
    assert batch.streams[0].grad[:, 0].any() and not batch.streams[0].grad[:, -1].any()
    assert batch.embeddings.grad is None


def test_dynamics_start_as_no_change():
    config = config_of("widths", dynamics_num_layers=2)
    dynamics = AuxiliaryLosses(config).next_latent["4"].dynamics
    latent, summary = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    assert torch.equal(dynamics(latent, summary), latent)


def test_a_summarizer_of_ones_own():
    class LastToken(nn.Module):
        def __init__(self, config, h):
            super().__init__()
            self.stride = config.strides[h]
            self.proj = nn.Linear(config.hidden_size, config.hidden_sizes[h])

        def forward(self, token_embeddings, owners=None):
            return self.proj(token_embeddings[:, :: self.stride])

    class Losses(AuxiliaryLosses):
        def make_summarizer(self, h):
            return LastToken(self.config, h) if h == 2 else super().make_summarizer(h)

    config = config_of("strides")
    torch.manual_seed(0)
    losses, batch = Losses(config).double(), Batch(config, "padded")
    assert isinstance(losses.next_latent["1"].summarizer, ChunkSummarizer)
    assert isinstance(losses.next_latent["8"].summarizer, LastToken)
    assert losses(*batch.inputs())["next_latent"].isfinite()

    class Wrong(AuxiliaryLosses):
        def make_summarizer(self, h):
            return LastToken(self.config, 0)

    with pytest.raises(ValueError, match=r"summarizer must return \[3, 7, 6\], as its stream is, got \[3, 13, 8\]"):
        Wrong(config).double()(*batch.inputs())


# --- what is kept and in which precision -------------------------------------------------------------------------------


def random_problem(states=37, width=8, num_targets=4, dtype=torch.double):
    hidden = torch.randn(states, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(num_targets * VOCAB, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCAB, (states, num_targets))
    targets[torch.rand(states, num_targets) < 0.3] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("piece", [1 << 22, 5 * 4 * VOCAB, 2 * 37 * VOCAB, 1])
def test_pieces_give_the_whole(monkeypatch, piece):
    monkeypatch.setattr(linear_cross_entropy_file, "_PIECE", piece)
    hidden, weight, targets = random_problem()
    expected = naive_linear_cross_entropy(hidden, weight, targets)
    loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    grads, expected_grads = (torch.autograd.grad(3 * x, (hidden, weight)) for x in (loss, expected))
    torch.testing.assert_close(grads, expected_grads)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), expected)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, targets), weight)
    torch.testing.assert_close(grad, expected_grads[1] / 3)


def test_no_targets_no_loss():
    hidden, weight, targets = random_problem()
    loss = linear_cross_entropy(hidden, weight, targets.fill_(-100))
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (hidden, weight)))
    loss = linear_cross_entropy(hidden[:0], weight, targets[:0])
    assert loss == 0 and not torch.autograd.grad(loss, weight)[0].any()


def test_logits_are_not_kept():
    hidden, weight, targets = random_problem(states=50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda _: None):
        linear_cross_entropy(hidden, weight, targets)
    assert sum(kept) == hidden.numel() + weight.numel() < targets.numel() * VOCAB


def test_half_precision():
    hidden, weight, targets = random_problem(states=200, dtype=torch.float)
    expected = linear_cross_entropy(hidden, weight, targets)
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float and all(grad.dtype == torch.float for grad in grads)
    assert not torch.equal(loss, expected)  # logits are in half precision
    halves = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    low = linear_cross_entropy(*halves, targets)
    low_grads = torch.autograd.grad(low, halves)
    assert low.dtype == torch.float and all(grad.dtype == torch.bfloat16 for grad in low_grads)
    for value, found in ((loss, grads), (low, low_grads)):
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)
        for grad, exact in zip(found, expected_grads):
            assert (grad.float() - exact).norm() < 1e-2 * exact.norm()


def test_losses_in_bfloat16_are_float32():
    config = config_of("strides")
    losses, batch = AuxiliaryLosses(config).bfloat16(), Batch(config, "padded")
    streams = [stream.detach().bfloat16() for stream in batch.streams]
    values = losses(streams, batch.embeddings.detach().bfloat16(), *batch.inputs()[2:])
    assert all(value.dtype == torch.float and value.isfinite() for value in values.values())


# --- in the model ------------------------------------------------------------------------------------------------------


NAMES = ("ce_loss", "reconstruction_loss", "prophet_loss", "quantized_prophet_loss", "next_latent_loss")
MODELS = {
    "dense": {"compression_factors": [1, 2, 4], "hidden_sizes": [8, 12, 16], "next_latent_rollouts": 2},
    "strided": {"compression_factors": [2, 1, 8], "strides": [2, 1, 4], "hidden_sizes": 8, "merge_into": "all"},
}


def tiny_model(name, **overrides):
    """A model with all losses; what starts at zero is random."""
    small = {"prophet_codebook_size": 7, "prophet_codebook_dim": 5, "prophet_num_codebooks": 3}
    model = tiny_hierarchical_lm(
        **{**MODELS[name], "vocab_size": VOCAB, "window_sizes": 4, **ALL, **small, **overrides}
    )
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, ZeroInitLinear):
                layer.weight.normal_(std=0.3)
    return model.double()


def all_losses(model, ids, **kwargs):
    out = model(ids, labels=kwargs.pop("labels", ids), **kwargs)
    weights = [1, *list(ALL.values())[:3], 1]
    total = sum(weight * getattr(out, name) for weight, name in zip(weights, NAMES))
    torch.testing.assert_close(out.loss, total)
    return {name: getattr(out, name) for name in NAMES}


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_the_model_equal_the_oracle(name):
    model = tiny_model(name)
    ids, config = random_ids(2, 19, VOCAB), model.config
    with torch.no_grad():
        found = all_losses(model, ids)
        batch = Batch(config, "whole")
        batch.places = [(0, 0, 19), (1, 0, 19)]
        batch.ids, batch.embeddings = ids, model.model.embed_tokens(ids)
        batch.streams = model(ids, output_hierarchy_hidden_states=True).hierarchy_hidden_states
        expected = oracle(config, model.auxiliary_losses, batch)
    assert sorted(f"{name}_loss" for name in expected) == sorted(NAMES[1:])
    for name, value in expected.items():
        torch.testing.assert_close(found[f"{name}_loss"], value)


@pytest.mark.parametrize("name", MODELS)
def test_padded_and_packed_rows_have_the_same_losses(name):
    model = tiny_model(name)
    sequences = [random_ids(1, length, VOCAB, seed=length) for length in (19, 4, 11)]
    expected = None
    for side in ("right", "left", "packed"):
        if side == "packed":
            ids = torch.cat(sequences, dim=1)
            positions = torch.cat([torch.arange(x.shape[1]) for x in sequences])[None]
            labels = ids.clone().masked_fill(positions == 0, -100)  # none across a border
            values = all_losses(model, ids, position_ids=positions, labels=labels)
        else:
            ids, mask = torch.full((3, 19), 7), torch.zeros(3, 19, dtype=torch.long)
            for row, sequence in enumerate(sequences):
                at = slice(0, sequence.shape[1]) if side == "right" else slice(19 - sequence.shape[1], 19)
                ids[row, at], mask[row, at] = sequence[0], 1
            first = (mask.cumsum(-1) == 1) & mask.bool()
            labels = ids.masked_fill(mask == 0, -100).masked_fill(first, -100)
            values = all_losses(model, ids, attention_mask=mask, labels=labels)
        expected = values if expected is None else expected
        torch.testing.assert_close(values, expected)


def test_accumulated_gradients():
    model, ids = tiny_model("strided"), random_ids(4, 19, VOCAB)
    whole = model(ids, labels=ids, num_items_in_batch=4 * 18)
    parts = [model(part, labels=part, num_items_in_batch=4 * 18) for part in (ids[:1], ids[1:])]
    for name in ("loss", *NAMES):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
        torch.testing.assert_close(getattr(whole, name), getattr(model(ids, labels=ids), name))


def test_the_start_of_training_and_what_is_saved(tmp_path):
    model = tiny_hierarchical_lm(**{**MODELS["strided"], **ALL, "window_sizes": 4})
    fresh = type(model)(model.config)
    for part in fresh.auxiliary_losses.modules():
        if isinstance(part, ZeroInitLinear):
            assert not part.weight.any() and not part.bias.any()
    model.save_pretrained(tmp_path / "with")
    again, notes = type(model).from_pretrained(tmp_path / "with", output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    plain = tiny_hierarchical_lm(**{**MODELS["strided"], "window_sizes": 4})
    plain.save_pretrained(tmp_path / "without")
    begun = type(model).from_pretrained(tmp_path / "without", **ALL)
    for part in begun.auxiliary_losses.modules():
        if isinstance(part, ZeroInitLinear):
            assert not part.weight.any() and not part.bias.any()
        if isinstance(part, RandomProjectionQuantizer):
            torch.testing.assert_close(part.codebooks.norm(dim=-1), torch.ones(part.codebooks.shape[:2]))
            assert part.projection.std() > 0.5 and part.projection.mean(-1).abs().max() < 1e-5


# --- errors ------------------------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit():
    hidden, weight, targets = random_problem()
    with pytest.raises(ValueError, match=r"`hidden` must be \[n, width\] and `targets` \[n, k\], got \[36, 8\]"):
        linear_cross_entropy(hidden[1:], weight, targets)
    with pytest.raises(ValueError, match=r"`weight` must be \[4 \* vocab, 8\], got \[43, 8\]"):
        linear_cross_entropy(hidden, weight[1:], targets)


def test_streams_and_ids_that_do_not_fit():
    config = config_of("strides")
    losses, batch = losses_of(config), Batch(config, "whole")
    with pytest.raises(ValueError, match=r"`streams` must be \[\[2, 13, 8\], \[2, 7, 6\], \[2, 4, 12\]\], got \[\[2"):
        losses(batch.streams[:2], *batch.inputs()[1:])
    with pytest.raises(ValueError, match="`reconstruction_loss_weight` needs `input_ids`"):
        losses(batch.streams, batch.embeddings, None)
