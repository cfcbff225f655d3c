"""How long does a training step of the hierarchical LM take, against the prototype with the same weights and losses?

The configurations of the prototype's README at a quarter or half of their widths: a step is forward with all losses that
are on by default (cross-entropy, reconstruction, next latent), backward and AdamW.
"""

import time

import harness
import torch


THREE = {"num_tokens": 5_000, "dim": 128, "depth": 6, "heads": 2, "dim_head": 64, "seq_len": 2_048}
THREE |= {"hierarchies": (1, 2, 8), "window_sizes": (32, 64, None)}
CONFIGURATIONS = {
    "three hierarchies": THREE,
    "two rollouts of the next latent": {**THREE, "num_rollouts": 2},
    "one hierarchy": {**THREE, "depth": 8, "hierarchies": 1, "window_sizes": None},
    "four of different widths, a quarter": {
        "num_tokens": 256,
        "dim": (32, 64, 128, 256),
        "depth": 8,
        "seq_len": 1_024,
        "ff_mult": (2, 2, 4, 4),
        "dim_head": (4, 8, 16, 16),
        "heads": (2, 4, 8, 8),
        "hierarchies": (1, 2, 4, 16),
        "hierarchical_stride": (1, 1, 1, 8),
        "window_sizes": (16, 32, 64, None),
    },
    "four of different widths, half": {
        "num_tokens": 256,
        "dim": (64, 128, 256, 512),
        "depth": 8,
        "seq_len": 1_024,
        "ff_mult": (2, 2, 4, 4),
        "dim_head": (8, 16, 32, 32),
        "heads": (2, 4, 8, 8),
        "hierarchies": (1, 2, 4, 16),
        "hierarchical_stride": (1, 1, 1, 8),
        "window_sizes": (16, 32, 64, None),
    },
}
QUICK = {
    "three hierarchies": {**THREE, "num_tokens": 64, "dim": 16, "dim_head": 8, "depth": 2, "seq_len": 64},
    "one hierarchy": {"num_tokens": 64, "dim": 16, "dim_head": 8, "heads": 2, "depth": 2, "seq_len": 64},
}
TOKENS = 2_048
TARGET = 1.3


def loss_of_prototype(model, ids):
    return model(ids, return_loss=True)[0]


def loss_of_ours(model, ids):
    """The prototype takes the last token as a label only; so ours is told its labels."""
    inputs = ids[:, :-1]
    return model(inputs, labels=inputs, shift_labels=ids[:, 1:].contiguous(), use_cache=False).loss


class Trainee:
    """A model with its optimizer; calling it takes one step and returns its seconds."""

    def __init__(self, model, loss, ids):
        self.model, self.loss, self.ids = model.train(), loss, ids
        self.optimizer = torch.optim.AdamW(model.parameters())

    def __call__(self):
        began = time.perf_counter()
        self.loss(self.model, self.ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def check_equal(peer, model, ids):
    """Ours with the prototype's weights has its loss and gradients."""
    losses = [loss_of_prototype(peer, ids), loss_of_ours(model, ids)]
    for loss in losses:
        loss.backward()
    harness.require(abs(losses[0] - losses[1]) < 1e-4, f"losses are {losses[0].item()} and {losses[1].item()}")
    gradients = [peer.layers[0][0].ff.net[1].weight.grad, model.model.layers[0].blocks[0].mlp.up_proj.weight.grad]
    error = harness.relative_rms(*reversed(gradients))
    harness.require(error < 1e-3, f"gradients of the first feed-forward differ by {error:.1e}")


def main():
    report, quick = harness.start("Training step of the hierarchical LM against the prototype")
    rounds, disturbed = 2 if quick else 7, 0
    for name, arguments in (QUICK if quick else CONFIGURATIONS).items():
        length = arguments["seq_len"]
        peer, ours = harness.hierarchical_pair(**arguments)
        # The prototype leaves token 0 out of its losses; rows have one token more than is read.
        ids = torch.randint(1, arguments["num_tokens"], (max(1, (64 if quick else TOKENS) // length), length + 1))
        check_equal(peer, ours, ids[:, : length // 2])
        contestants = {
            "ours": Trainee(ours, loss_of_ours, ids),
            "prototype": Trainee(peer, loss_of_prototype, ids),
        }
        seconds, noisy = harness.in_turns(contestants, rounds)
        disturbed += noisy
        ratio = seconds["prototype"] / seconds["ours"]
        report.row(
            configuration=name,
            million_parameters=ours.num_parameters() / 1e6,
            length=length,
            tokens=ids.shape[0] * length,
            ours_ms=seconds["ours"] * 1e3,
            prototype_ms=seconds["prototype"] * 1e3,
            prototype_over_ours=ratio,
        )
        report.check(f"prototype over ours, {name}", ratio, ">=", TARGET)
    report.note(
        "float32, AdamW, eager, same weights and losses in both. Widths are a quarter of the README's where nothing else is said, "
        "as is the vocabulary of 20,000."
    )
    report.note(f"Medians of {rounds} rounds; disturbed by other processes: {disturbed}.")
    report.finish()


if __name__ == "__main__":
    main()
