"""What every benchmark shares: settings, contestants run in turns, models of equal shape, the JSON line at the end.

Import it before torch: it sets environment variables that torch reads once.
"""

import os


# Whether torch asks for huge pages when it allocates a lot. Fresh memory is slow to touch without them, which those feel
# who allocate most; off is torch's own default, and so what everybody gets who has not set it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import operator
import statistics
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training"))  # whose scripts import each other by name
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from convert_hierarchical import convert
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_heptapod import LeapConfig, LeapForCausalLM
from tests.benchmarks.tables import format_cell


THREADS = 2
BUSY = 0.05  # share of the machine that others may use during a round that counts
SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 256}
PROTOTYPE_OPTIONS = {
    "weight_function": "exp",
    "rescale": 10.0,
    "position_embedding_type": "absolute",
    "sink_weight": 1e-5,
}
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, "==": operator.eq}


class Report:
    """Collects the rows of a benchmark and its checks against targets; `finish` prints both and the JSON line.

    Args:
        title (`str`): the question that the benchmark answers.
        quick (`bool`): sizes are tiny, so that targets say nothing.
    """

    def __init__(self, title: str, quick: bool):
        self.title, self.quick = title, quick
        self.rows, self.checks, self.notes = [], [], []

    def row(self, **cells) -> None:
        """Add one row of the table and print it; column names are the keys, underscores for blanks."""
        row = {name.replace("_", " "): _short(value) for name, value in cells.items()}
        self.rows.append(row)
        print("  ".join(f"{name}: {format_cell(value)}" for name, value in row.items()), flush=True)

    def check(self, what: str, value: float, comparison: str, target: float) -> None:
        """Compare a measured value with its target; a missed target is reported, never an error."""
        met = bool(_COMPARE[comparison](value, target))
        self.checks.append({"what": what, "measured": _short(value), "target": f"{comparison} {target}", "met": met})

    def note(self, text: str) -> None:
        """Add a sentence that belongs below the table."""
        self.notes.append(text)

    def finish(self) -> None:
        """Print checks, notes and, last, everything as one line of JSON."""
        for check in self.checks:
            verdict = "met" if check["met"] else "MISSED"
            print(f"{verdict}: {check['what']}: {format_cell(check['measured'])} (target {check['target']})")
        for note in self.notes:
            print(f"note: {note}")
        result = {"title": self.title, "quick": self.quick, "settings": settings()}
        print(json.dumps({**result, "rows": self.rows, "checks": self.checks, "notes": self.notes}), flush=True)


def start(title: str) -> tuple[Report, bool]:
    """Parse `--quick`, fix threads and seeds. Returns the report and whether sizes are to be tiny."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that the script works, measures nothing"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    print(f"{title} ({settings()})", flush=True)
    return Report(title, quick), quick


def settings() -> dict:
    """What was set explicitly and changes timings."""
    return {"threads": torch.get_num_threads(), "THP_MEM_ALLOC_ENABLE": os.environ["THP_MEM_ALLOC_ENABLE"]}


def require(holds: bool, message: str) -> None:
    """The gate: exit without a report where the thing to be measured does not compute what it should."""
    if not holds:
        raise SystemExit(f"The correctness check failed, nothing is reported: {message}")


def _short(value):
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _machine_seconds() -> float | None:
    """CPU seconds of the whole machine spent on anything, stolen ones included; `None` where Linux does not say."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for a disk


def in_turns(contestants: dict, rounds: int, warmup: int = 1) -> tuple[dict[str, float], int]:
    """Call all contestants in turns, forwards and backwards, and take medians over rounds.

    Rounds during which other processes used more than 5% of the machine are discarded and repeated, at most as often
    again as there are rounds; where even that does not give enough, the least disturbed ones count.

    Args:
        contestants (`dict[str, Callable]`): what to time. One that returns a number has timed itself, in seconds.
        rounds (`int`): rounds that count.
        warmup (`int`): rounds before them.

    Returns:
        Median seconds of each contestant, and how many of the rounds that count were disturbed.
    """
    kept = []
    for number in range(warmup + 2 * rounds):
        busy, own, began = _machine_seconds(), time.process_time(), time.perf_counter()
        order = list(contestants) if number % 2 else list(reversed(contestants))
        times = {name: _timed(contestants[name]) for name in order}
        wall = time.perf_counter() - began
        others = 0.0 if busy is None else _machine_seconds() - busy - (time.process_time() - own)
        if number >= warmup:
            # A tick of the machine's clock is 10 ms, too coarse to judge shorter rounds by.
            kept.append((max(0.0, others - 0.02) / wall / os.cpu_count(), times))
            if sum(share <= BUSY for share, _ in kept) == rounds:
                break
    kept = sorted(kept, key=lambda item: item[0])[:rounds]
    medians = {name: statistics.median(times[name] for _, times in kept) for name in contestants}
    return medians, sum(share > BUSY for share, _ in kept)


def _timed(run) -> float:
    began = time.perf_counter()
    own = run()
    return own if isinstance(own, float) else time.perf_counter() - began


def relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of the expected values, in float64."""
    expected = expected.double()
    return ((got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def leap(**options) -> LeapForCausalLM:
    """Our model in the shape of all benchmarks, 4 layers of width 256 over bytes."""
    return LeapForCausalLM(LeapConfig(**{**SHAPE, **options}))


def gpt2(positions: int, **shape) -> GPT2LMHeadModel:
    """GPT-2 of the same or another shape, with torch's scaled dot product attention and without dropout."""
    shape = {**SHAPE, **shape}
    config = GPT2Config(
        vocab_size=shape["vocab_size"],
        n_positions=positions,
        n_embd=shape["hidden_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config)


def prototype_module():
    """The module of pip's `leap-transformer`."""
    try:
        import leap.LEAP
    except ImportError as error:
        raise SystemExit("The peer is missing: pip install leap-transformer==1.0.1 (extra `parity`).") from error
    return leap.LEAP


def prototype(positions: int):
    """The prototype in the same shape, without dropout."""
    module = prototype_module()
    config = module.LeapConfig(
        hidden_size=SHAPE["hidden_size"],
        vocab_size=SHAPE["vocab_size"],
        n_head=SHAPE["num_attention_heads"],
        n_layer=SHAPE["num_hidden_layers"],
        n_positions=positions,
        hidden_dropout_prob=0.0,
    )
    return module.LeapForCausalLM(config)


def hierarchical_pair(**arguments):
    """A model of pip's `simple-hierarchical-transformer` with random weights, norms and biases too, and ours of the same."""
    try:
        from simple_hierarchical_transformer import HierarchicalTransformer
    except ImportError as error:
        raise SystemExit(
            "The peer is missing: pip install simple-hierarchical-transformer==0.4.0 (extra `parity`)."
        ) from error
    peer = HierarchicalTransformer(**arguments).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "norm" in name or "gamma" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return peer, convert(arguments, peer.state_dict())


_RENAMED = {
    "word_embedding": "model.embed_tokens",
    "proj_logits": "lm_head",
    "last_norm": "model.norm",
    "leap_model.position_embeddings": "model.embed_positions",
    "leap_model.decoders": "model.layers",
    "attn_norm": "input_layernorm",
    "projections": "mixer.qfkv_proj",
    "boom_norm": "post_attention_layernorm",
    "unboom": "mlp.down_proj",
    "boom": "mlp.up_proj",
}


def copy_prototype(peer, model: LeapForCausalLM) -> None:
    """Give our model the prototype's weights."""
    weights = {}
    for name, value in peer.state_dict().items():
        for old, new in _RENAMED.items():
            if name.startswith(f"{old}.") or f".{old}." in name:
                name = name.replace(old, new, 1)
        weights[name] = value
    model.load_state_dict(weights)
