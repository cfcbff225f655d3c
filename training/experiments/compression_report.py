"""What does compression cost and save: bits per byte and step time at equal parameters and equal tokens of real text?

The report that the prototype's to-do list owes. Each model reads the same blocks of 512 bytes in the same order; the finest
hierarchy has a window of 64, coarser ones see everything, and one decoder with full attention is what they are measured
against. Text: `../shared/data/enwik8_head.xml` next to the repository, else the source of Python's standard library.

A finished model's figures are kept in `outputs/compression_report/`, so that a run that was cut off goes on with the next.
"""

import hashlib
import json
import math
import sys
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import harness
import matplotlib
import numpy as np
import torch
from corpora import PackedBlocks, build_tokenizer, encode, load_texts
from provenance import commit as current_commit
from training_step import Trainee

from modeling_heptapod import HierarchicalLMConfig, HierarchicalLMForCausalLM


matplotlib.use("Agg")
import matplotlib.pyplot as plt


CORPUS = ROOT.parent / "shared" / "data" / "enwik8_head.xml"
KEPT = ROOT / "outputs" / "compression_report"
PLOT = BENCHMARKS / "results" / "compression_report.png"
VOCABULARY = 258
WINDOW = 64
FULL = "full attention"
# Hierarchies and their strides.
MODELS = {
    FULL: ([1], [1]),
    "1": ([1], [1]),
    "1, 2": ([1, 2], [1, 1]),
    "1, 2 (stride 2)": ([1, 2], [1, 2]),
    "1, 2, 4": ([1, 2, 4], [1, 1, 1]),
    "1, 4, 16 (stride 16)": ([1, 4, 16], [1, 1, 16]),
}
SETTINGS = {
    "parameters": 850_000,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "block_size": 512,
    "batch_size": 4,
    "steps": 900,
    "learning_rate": 3e-3,
    "held_out_bytes": 131_072,
    "seed": 0,
}
QUICK = {"parameters": 60_000, "num_hidden_layers": 2, "block_size": 64, "steps": 6, "held_out_bytes": 2_000}


def config_with(name, width, mlp_ratio, settings):
    factors, strides = MODELS[name]
    return HierarchicalLMConfig(
        vocab_size=VOCABULARY,
        compression_factors=factors,
        strides=strides,
        window_sizes=[None if factor > 1 or name == FULL else WINDOW for factor in factors],
        hidden_sizes=width,
        mlp_ratio=mlp_ratio,
        num_hidden_layers=settings["num_hidden_layers"],
        num_attention_heads=settings["num_attention_heads"],
        head_dim=width // settings["num_attention_heads"],
        max_position_embeddings=settings["block_size"],
        initializer_range=width**-0.5,
    )


def number_of_parameters(config):
    with torch.device("meta"):
        return HierarchicalLMForCausalLM(config).num_parameters()


def equal_config(name, settings):
    """The width at which feed-forwards four times as wide come closest to the wanted size, and what makes up the rest."""
    wanted = settings["parameters"]
    two_per_head = 2 * settings["num_attention_heads"]

    def distance(width):
        return abs(number_of_parameters(config_with(name, width, 4, settings)) - wanted)

    width = min(range(two_per_head, 33 * two_per_head, two_per_head), key=distance)
    sizes = [number_of_parameters(config_with(name, width, mult, settings)) for mult in (4, 5)]
    mlp_ratio = 4 + (wanted - sizes[0]) / (sizes[1] - sizes[0])
    return config_with(name, width, round(mlp_ratio * width) / width, settings)


def load_blocks(settings):
    """Name of the corpus, training blocks and held-out blocks."""
    dataset = str(CORPUS) if CORPUS.is_file() else "stdlib"
    texts = load_texts(dataset, max_validation_bytes=settings["held_out_bytes"])
    tokenizer = build_tokenizer("byte", [])
    train, held_out = (encode(part, tokenizer) for part in (texts.train, texts.validation))
    blocks = [PackedBlocks(stream, settings["block_size"]) for stream in (train, held_out)]
    return Path(dataset).name, *blocks


def train(config, blocks, settings):
    """A model after `steps` steps on blocks drawn in an order that the seed decides."""
    torch.manual_seed(settings["seed"])
    model = HierarchicalLMForCausalLM(config).train()
    order = np.random.default_rng(settings["seed"]).permutation(len(blocks))
    optimizer = torch.optim.AdamW(model.parameters(), settings["learning_rate"], betas=(0.9, 0.99), weight_decay=0.1)
    steps, size = settings["steps"], settings["batch_size"]
    warmup = max(1, steps // 20)

    def rate(step):
        return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(steps):
        ids = torch.stack(
            [blocks[i]["input_ids"] for i in np.take(order, range(step * size, (step + 1) * size), mode="wrap")]
        )
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def bits_of_blocks(model, blocks, batch_size):
    """Bits per byte of each block, `[blocks]`; its first byte belongs to the block before it."""
    bits = []
    for start in range(0, len(blocks), batch_size):
        ids = torch.stack([blocks[i]["input_ids"] for i in range(start, min(start + batch_size, len(blocks)))])
        logits = model(ids, use_cache=False).logits[:, :-1]
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2).double(), ids[:, 1:], reduction="none")
        bits.append(nats.mean(1) / math.log(2))
    return torch.cat(bits)


def bits_of(name, config, train_blocks, held_out, settings, quick):
    """Bits per byte of each held-out block, from the side file where this model was trained before, and at which commit."""
    described = json.dumps([settings, config.to_diff_dict()], sort_keys=True).encode()
    key = hashlib.sha256(described + train_blocks.stream.tobytes() + held_out.stream.tobytes()).hexdigest()
    path = KEPT / f"{name.replace(', ', '-').replace(' ', '_')}.json"
    if not quick and path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            print(f"{name}: trained before at {kept['commit']}, {path.relative_to(ROOT)}", flush=True)
            return torch.tensor(kept["bits"], dtype=torch.float64), kept["commit"]
    began, commit = time.perf_counter(), current_commit(ROOT)
    model = train(config, train_blocks, settings)
    bits = bits_of_blocks(model, held_out, settings["batch_size"])
    print(f"{name}: {bits.mean():.3f} bits per byte after {time.perf_counter() - began:.0f} s", flush=True)
    if not quick:
        KEPT.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"key": key, "commit": commit, "bits": bits.tolist()}))
    return bits, commit


def standard_error(values):
    return (values.std() / len(values) ** 0.5).item()


def plot(rows, path):
    """Bits per byte over step time, with twice the standard error of the difference from full attention."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row in rows:
        errors = 2 * (row["standard_error_of_difference"] or 0.0)
        points = axes.errorbar(row["step_ms"], row["bits_per_byte"], errors, fmt="o", capsize=3)
        axes.annotate(
            row["hierarchies"],
            (row["step_ms"], row["bits_per_byte"]),
            xytext=(6, 4),
            textcoords="offset points",
            color=points[0].get_color(),
        )
    axes.set(xlabel="milliseconds per training step", ylabel="bits per byte, held out")
    axes.margins(x=0.2, y=0.2)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def sentence(name, row):
    """What `name` costs beside full attention, in words."""
    difference, error = row["above_full_attention"], row["standard_error_of_difference"]
    return (
        f"Hierarchies {name}, of which the finest sees {WINDOW} bytes, cost {difference:+.3f} +- {error:.3f} bits per byte "
        f"against full attention of equal size after equal text, at {row['step_time_over_full']:.2f} times the time of its step."
    )


def main():
    report, quick = harness.start("What compression costs: bits per byte and step time at equal parameters")
    settings = {**SETTINGS, **(QUICK if quick else {})}
    corpus, train_blocks, held_out = load_blocks(settings)
    configs = {name: equal_config(name, settings) for name in MODELS}
    sizes = {name: number_of_parameters(config) for name, config in configs.items()}
    unequal = max(sizes.values()) / min(sizes.values())
    harness.require(quick or unequal < 1.01, f"the numbers of parameters are not equal: {sizes}")

    trained = {
        name: bits_of(name, config, train_blocks, held_out, settings, quick) for name, config in configs.items()
    }
    bits = {name: each for name, (each, _) in trained.items()}
    harness.require(all(len(each) == len(held_out) for each in bits.values()), "blocks are missing")
    batch = torch.stack([train_blocks[i]["input_ids"] for i in range(settings["batch_size"])])
    trainees = {name: Trainee(HierarchicalLMForCausalLM(config), batch) for name, config in configs.items()}
    seconds, disturbed = harness.in_turns(trainees, 2 if quick else 15, warmup=2)

    rows = {}
    for name, config in configs.items():
        above = bits[name] - bits[FULL]
        rows[name] = {
            "hierarchies": name,
            "width": config.hidden_size,
            "parameters": sizes[name],
            "bits_per_byte": bits[name].mean().item(),
            "standard_error": standard_error(bits[name]),
            "above_full_attention": above.mean().item() if name != FULL else None,
            "standard_error_of_difference": standard_error(above) if name != FULL else None,
            "step_ms": seconds[name] * 1e3,
            "step_time_over_full": seconds[name] / seconds[FULL],
        }
        report.row(**rows[name])
    report.check("largest over smallest number of parameters", unequal, "<=", 1.01)
    report.check(
        "bits per byte of hierarchies 1, 2 above full attention", rows["1, 2"]["above_full_attention"], "<=", 0.05
    )
    report.note(sentence("1, 2", rows["1, 2"]))
    report.note(sentence("1, 2 (stride 2)", rows["1, 2 (stride 2)"]))
    report.note(
        f"{corpus}: {settings['steps']:,} steps of {settings['batch_size']} x {settings['block_size']} bytes, the same for "
        f"all, AdamW, one seed; {len(held_out)} held-out blocks. Standard errors are over blocks, those of differences over "
        f"differences of the same block. Coarse hierarchies see everything. Steps: float32, medians of rounds in turns, "
        f"{disturbed} disturbed. Trained at {', '.join(sorted({commit for _, commit in trained.values()}))}."
    )
    if not quick:
        plot(list(rows.values()), PLOT)
    report.finish()


if __name__ == "__main__":
    main()
