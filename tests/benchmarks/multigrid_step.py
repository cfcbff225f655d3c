"""How long does a training step take with no, one, two and four meta axes, against a plain decoder and against loops?

4 layers of width 256 with 4 heads over bytes, forward, backward and AdamW. Without axes the peer is `GPT2LMHeadModel`. A axes
in the prototype's wiring are 1 + 3 A blocks a layer where a plain decoder has one, so that many times its step is their share.
The light wiring (meta streams of a quarter of the width, readings without a feed-forward) stands beside it. With two axes the
peer is the same wiring in loops of modules (`tests/reference/multigrid_loops.py`), as a lecture writes it and with fused
attention; beside them stands the time of nothing but the matrix products and attention that two axes need, which no
arrangement of them can go below. All take turns in one process.
"""

import time

import harness
import torch

from modeling_heptapod import MultiGridConfig, MultiGridForCausalLM
from tests.reference.gpt2 import from_gpt2
from tests.reference.multigrid_loops import FusedAttention, LectureAttention, MultiGridInLoops


AXIS_VOCABULARIES = [64, 16, 32, 8]
LENGTHS = (256, 1_024)
TOKENS = 2_048
WARMUP = 4  # fresh memory makes the first steps of the largest model half as slow again
LIGHT = {"cross_feed_forward": False}
TARGET_PLAIN, TARGET_SHARE, TARGET_LOOPS = 1.05, 1.15, 1.5


def make_ours(shape, length, axes, **options):
    config = MultiGridConfig(
        **shape,
        axis_names=[f"axis_{a}" for a in range(axes)],
        axis_vocab_sizes=AXIS_VOCABULARIES[:axes],
        max_position_embeddings=length,
        tie_word_embeddings=True,
        **options,
    )
    return MultiGridForCausalLM(config)


def make_loops(attention, shape, length, axes):
    model = MultiGridInLoops(
        attention,
        [shape["vocab_size"], *AXIS_VOCABULARIES[:axes]],
        shape["hidden_size"],
        shape["num_attention_heads"],
        shape["num_hidden_layers"],
        length,
    )
    model.heads[0].weight = model.embeddings[0].weight  # tied, as in the others
    return model


def loss_of(model, grid):
    """Loss of any of the models on `grid [batch, 1 + axes, length]`, of which it reads as many axes as it has."""
    if isinstance(model, MultiGridInLoops):
        return model(grid[:, : len(model.heads)])
    ids = grid[:, 0]
    tracks = (
        {} if not isinstance(model, MultiGridForCausalLM) else {"axis_ids": grid[:, 1 : 1 + model.config.num_axes]}
    )
    return model(input_ids=ids, labels=ids, use_cache=False, **tracks).loss


class Trainee:
    """A model with its optimizer; calling it takes one step and returns its seconds."""

    def __init__(self, model, grid):
        self.model, self.grid = model.train(), grid
        self.optimizer = torch.optim.AdamW(model.parameters())

    def __call__(self):
        began = time.perf_counter()
        loss_of(self.model, self.grid).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def require_equal(name, peer, ours, grid, weights_of_both):
    """Loss and some gradients of a peer and of ours with the same weights."""
    losses = [loss_of(model, grid) for model in (peer, ours)]
    for loss in losses:
        loss.backward()
    harness.require(
        abs(losses[0] - losses[1]) < 1e-4, f"losses of {name}: {losses[0].item()}, ours {losses[1].item()}"
    )
    for theirs, mine in weights_of_both:
        error = harness.relative_rms(mine.grad, theirs.grad)
        harness.require(error < 1e-3, f"gradients of {name} differ by {error:.1e}")


def check_plain(shape, length, grid):
    peer, ours = harness.gpt2(length, **shape), make_ours(shape, length, 0)
    ours.load_state_dict(from_gpt2(peer.state_dict()))
    watched = [(peer.transformer.wte.weight, ours.model.embed_tokens.weight)]
    watched += [(peer.transformer.h[-1].ln_2.weight, ours.model.layers[-1].self_block.post_attention_layernorm.weight)]
    require_equal("GPT-2", peer, ours, grid, watched)


@torch.no_grad()
def give_weights(ours, peer):
    """Let loops have our weights."""

    def give(module, target):
        for name, parameter in module.named_parameters(recurse=False):
            getattr(target, name).copy_(parameter)

    def give_block(block, target):
        mixer = block.mixer
        if hasattr(mixer, "qkv_proj"):
            projections = zip(mixer.qkv_proj.weight.chunk(3), mixer.qkv_proj.bias.chunk(3))
        else:
            give(block.key_value_layernorm, target.source_norm)
            projections = [(mixer.q_proj.weight, mixer.q_proj.bias)]
            projections += list(zip(mixer.kv_proj.weight.chunk(2), mixer.kv_proj.bias.chunk(2)))
        target.attention.load(*projections, (mixer.o_proj.weight, mixer.o_proj.bias))
        give(block.input_layernorm, target.norm)
        give(block.post_attention_layernorm, target.feed_forward_norm)
        give(block.mlp.up_proj, target.feed_forward.up)
        give(block.mlp.down_proj, target.feed_forward.down)

    base = ours.model
    pairs = [
        *zip((base.embed_tokens, *base.axis_embed_tokens), peer.embeddings),
        (base.embed_positions, peer.positions),
    ]
    pairs += [*zip((base.norm, *base.axis_norms), peer.norms), *zip((ours.lm_head, *ours.axis_lm_heads), peer.heads)]
    for pair in pairs:
        give(*pair)
    for layer, target in zip(base.layers, peer.layers):
        blocks = [(layer.self_block, *layer.axis_self_blocks), layer.main_cross_blocks, layer.axis_cross_blocks]
        for group, targets in zip(blocks, (target.blocks, target.main_reads, target.axis_reads)):
            for block, each in zip(group, targets):
                give_block(block, each)


def check_loops(attention, shape, length, grid):
    peer, ours = make_loops(attention, shape, length, 2), make_ours(shape, length, 2, initializer_range=0.1)
    give_weights(ours, peer)
    mine, theirs = ours.model.layers[0], peer.layers[0]
    watched = [(peer.embeddings[1].weight, ours.model.axis_embed_tokens[0].weight)]
    watched += [(theirs.main_reads[1].source_norm.weight, mine.main_cross_blocks[1].key_value_layernorm.weight)]
    watched += [(theirs.axis_reads[0].feed_forward.up.weight, mine.axis_cross_blocks[0].mlp.up_proj.weight)]
    require_equal(attention.__name__, peer, ours, grid, watched)


class ArithmeticAlone:
    """The matrix products and the fused attention of a step with `axes` axes, forward and backward, on tensors at hand.

    Blocks of all streams cost the same: 12 width^2 products a token, each twice more in the backward pass. Embeddings, heads,
    norms, activations, residuals and the optimizer are left out. Calling it returns its seconds.
    """

    def __init__(self, shape, length, axes):
        width, tokens = shape["hidden_size"], max(1, TOKENS // length) * length
        self.blocks = shape["num_hidden_layers"] * (1 + 3 * axes)
        sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        self.products = [(torch.randn(tokens, n), torch.randn(m, n), torch.randn(tokens, m)) for n, m in sizes]
        heads = (tokens // length, shape["num_attention_heads"], length, width // shape["num_attention_heads"])
        self.query, self.key, self.value = (torch.randn(heads, requires_grad=True) for _ in range(3))
        self.gradient = torch.randn(heads)

    def __call__(self):
        began = time.perf_counter()
        for _ in range(self.blocks):
            for x, weight, gradient in self.products:
                x @ weight.T, gradient @ weight, gradient.T @ x
            out = torch.nn.functional.scaled_dot_product_attention(self.query, self.key, self.value, is_causal=True)
            torch.autograd.grad(out, (self.query, self.key, self.value), self.gradient)
        return time.perf_counter() - began


def million_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def main():
    report, quick = harness.start("Training step of MultiGrid against a plain decoder and against loops of modules")
    shape = {**harness.SHAPE, "hidden_size": 32, "num_hidden_layers": 2} if quick else harness.SHAPE
    rounds, disturbed = 2 if quick else 7, 0
    for length in (64,) if quick else LENGTHS:
        batch = max(1, (128 if quick else TOKENS) // length)
        sizes = [shape["vocab_size"], *AXIS_VOCABULARIES]
        grid = torch.stack([torch.randint(0, size, (batch, length)) for size in sizes], dim=1)
        check_plain(shape, length, grid[:2])
        for attention in (LectureAttention, FusedAttention):
            check_loops(attention, shape, length, grid[:2])

        light = {**LIGHT, "axis_hidden_size": shape["hidden_size"] // 4}
        models = {"GPT2LMHeadModel": harness.gpt2(length, **shape)}
        for axes in (0, 1, 2, 4):
            models["no axes" if axes == 0 else f"{axes} axes"] = make_ours(shape, length, axes)
        for axes in (1, 2, 4):
            models[f"{axes} axes, light"] = make_ours(shape, length, axes, **light)
        models["2 axes in loops, as in the lecture"] = make_loops(LectureAttention, shape, length, 2)
        models["2 axes in loops, fused attention"] = make_loops(FusedAttention, shape, length, 2)
        parameters = {name: million_parameters(model) for name, model in models.items()}
        contestants = {name: Trainee(model, grid) for name, model in models.items()}
        contestants["2 axes, products and attention alone"] = ArithmeticAlone(shape, length, 2)
        seconds, noisy = harness.in_turns(contestants, rounds, warmup=1 if quick else WARMUP)
        disturbed += noisy

        plain = seconds["no axes"]
        for name, value in seconds.items():
            axes = int(name[0]) if name[0].isdigit() else 0
            has_share = axes and "light" not in name and name in parameters
            report.row(
                length=length,
                model=name,
                million_parameters=parameters.get(name),
                milliseconds=value * 1e3,
                over_no_axes=value / plain,
                over_its_share=value / plain / (1 + 3 * axes) if has_share else None,
            )
        ratio = plain / seconds["GPT2LMHeadModel"]
        report.check(f"no axes over GPT2LMHeadModel, {length} tokens", ratio, "<=", TARGET_PLAIN)
        for axes in (1, 2, 4):
            share = seconds[f"{axes} axes"] / plain / (1 + 3 * axes)
            report.check(f"{axes} axes over {1 + 3 * axes} times no axes, {length} tokens", share, "<=", TARGET_SHARE)
        for kind in ("as in the lecture", "fused attention"):
            ratio = seconds[f"2 axes in loops, {kind}"] / seconds["2 axes"]
            report.check(f"loops, {kind}, over ours with 2 axes, {length} tokens", ratio, ">=", TARGET_LOOPS)
    report.note(
        f"float32, AdamW, eager, no dropout, {TOKENS:,} tokens a step. Embeddings of the main axis are tied in all. Share: "
        "1 + 3 A times the step without axes. Light: meta streams of a quarter of the width, readings without a feed-forward."
    )
    report.note(f"Medians of {rounds} rounds; disturbed by other processes: {disturbed}.")
    report.finish()


if __name__ == "__main__":
    main()
