"""How fast is it on a GPU: focus mixing against a copy, LEAP against GPT-2, a token, local attention against flex attention?

Prints as it goes and rewrites its JSON file after every row, so that a time-out leaves what was measured. Bandwidth is
counted over the fewest bytes: the input read once, the output written once; backward also reads the input and the
gradient once and writes a gradient. Mixing is timed as a CUDA graph over several sets of inputs, more than the cache
holds. With `--quick` it runs tiny sizes, on a CPU in Triton's interpreter, which measures nothing.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path


QUICK = "--quick" in sys.argv
if QUICK:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
import transformers
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from modeling_heptapod import LeapConfig, LeapForCausalLM
from modeling_heptapod.common import triton_attention
from modeling_heptapod.heptapod import local_attention_triton
from modeling_heptapod.heptapod.local_attention import local_attention, naive_local_attention
from modeling_heptapod.hierarchical_lm import windowed_attention_triton
from modeling_heptapod.hierarchical_lm.windowed_attention import window_reach, windowed_attention
from modeling_heptapod.hierarchical_lm.windowed_attention_operator import kernel_attention
from modeling_heptapod.leap import focus_operator, focus_triton
from modeling_heptapod.leap.focus import FocusSettings, focus_mixing, naive_focus_mixing
from tests.triton_interpreter import complete_interpreter


DEVICE = "cpu" if QUICK else "cuda"
SHAPES = [(1, 40)] if QUICK else [(4, 4096), (1, 65_536)]
HEADS = [(2, 16)] if QUICK else [(8, 32), (16, 64)]
WINDOWS = [None, 4] if QUICK else [None, 4, 16]
DTYPES = [torch.float32] if QUICK else [torch.bfloat16, torch.float32]
TILES = {32: [(32, 1), (32, 2), (32, 4), (64, 2)], 64: [(32, 2), (32, 4), (32, 8), (16, 2)]}
PRECISIONS = ["tf32x3", "ieee"]  # of products of float32
STARTED = time.monotonic()


class Results:
    """Rows by section, on the screen and in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.data = {"device": device_name(), "versions": versions(), "commit": commit(), "quick": QUICK, "rows": []}

    def row(self, section: str, **cells) -> None:
        cells = {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in cells.items()}
        self.data["rows"].append({"section": section, **cells})
        seconds = time.monotonic() - STARTED
        print(f"[{seconds:5.1f}s] {section}: " + "  ".join(f"{k}={v}" for k, v in cells.items()), flush=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def device_name():
    return torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine()


def versions():
    triton = focus_triton.triton
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None if triton is None else triton.__version__,
        "transformers": transformers.__version__,
    }


def commit():
    if os.environ.get("COMMIT"):  # of a copy without its history
        return os.environ["COMMIT"]
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds_each(run, repeat=10, warmup=3):
    """Median seconds of a call that synchronises nothing itself."""
    for _ in range(1 if QUICK else warmup):
        run()
    synchronize()
    times = []
    for _ in range(1 if QUICK else repeat):
        began = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def device_seconds(calls, budget=0.1):
    """Median device seconds of one of `calls`, all of them captured in one graph and replayed."""
    if QUICK:
        return seconds_each(calls[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times, spent = [], 0.0
    for _ in range(3):
        graph.replay()
    while spent < budget or len(times) < 5:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
        spent += times[-1] * len(calls)
    del graph
    return statistics.median(times)


def copy_bandwidth(results):
    """Bytes a second, read and written, of a copy of 2 GiB: by the driver's copy or a kernel, the faster, on a warm device."""
    source = torch.randn(1024 if QUICK else 2**29, device=DEVICE)
    target = torch.empty_like(source)
    rates = {}
    for name, copy in (("copy", lambda: target.copy_(source)), ("kernel", lambda: torch.mul(source, 2, out=target))):
        for _ in range(1 if QUICK else 300):
            copy()
        rates[name] = 2 * source.numel() * 4 / device_seconds([copy])
    results.row("copy", **{f"{name}_TB_per_s": rate / 1e12 for name, rate in rates.items()})
    return max(rates.values())


def settings_for(window, dim):
    """LEAP's defaults."""
    return FocusSettings(scale=10.0 / dim, normalize=True, window=window)


def make_sets(batch, seq, heads, dim, dtype):
    size = batch * seq * heads * dim * dtype.itemsize
    count = 1 if QUICK else max(2, min(8, -(-(2**28) // (5 * size))))
    return [
        (
            torch.randn(batch, seq, 4, heads, dim, device=DEVICE).to(dtype),
            torch.randn(batch, seq, heads, dim, device=DEVICE).to(dtype),
        )
        for _ in range(count)
    ], size


def forward_and_backward(qfkv, grad_out, settings):
    mixing = focus_triton.TritonMixing(qfkv, settings)
    mixing.forward(qfkv, True)
    return mixing.backward(qfkv, grad_out)


def check_mixing(window, heads, dim, dtype, seq=33 if QUICK else 300):
    """The gate: what is timed is right."""
    qfkv = torch.randn(1, seq, 4, heads, dim, device=DEVICE).to(dtype)
    out = focus_triton.TritonMixing(qfkv, settings_for(window, dim)).forward(qfkv, False)[0]
    expected = naive_focus_mixing(qfkv.double(), settings_for(window, dim))
    error = ((out.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
    if not error < (4e-3 if dtype == torch.bfloat16 else 1e-5):
        raise AssertionError(f"window {window}, {dim} channels, {dtype}: relative error {error:.1e}")


def time_mixing(results, rate, section, batch, seq, heads, dim, dtype, window, **cells):
    settings = settings_for(window, dim)
    sets, size = make_sets(batch, seq, heads, dim, dtype)
    forward = device_seconds([lambda x=x: focus_triton.TritonMixing(x, settings).forward(x, False) for x, _ in sets])
    both = device_seconds([lambda x=x, g=g: forward_and_backward(x, g, settings) for x, g in sets])
    results.row(
        section,
        shape=f"{batch}x{seq}x{heads}x{dim}",
        dtype=str(dtype)[6:],
        window=window,
        **cells,
        forward_us=forward * 1e6,
        backward_us=(both - forward) * 1e6,
        forward_of_copy=5 * size / forward / rate,
        backward_of_copy=9 * size / (both - forward) / rate,
    )


def mixing(results, rate):
    for heads, dim in HEADS:
        for dtype in DTYPES:
            for window in WINDOWS:
                check_mixing(window, heads, dim, dtype)
                for batch, seq in SHAPES:
                    time_mixing(results, rate, "mixing", batch, seq, heads, dim, dtype, window)


def mixing_in_torch(results, rate):
    """The same through `focus_mixing`, as models call it: kernels, and the torch form they replace."""
    batch, seq = SHAPES[0]
    heads, dim = HEADS[0]
    kernels = focus_operator.triton_is_supported
    for window in WINDOWS[:2]:
        settings = settings_for(window, dim)
        x = torch.randn(batch, seq, 4, heads, dim, device=DEVICE).to(DTYPES[0]).requires_grad_()
        grad = torch.randn(batch, seq, heads, dim, device=DEVICE).to(DTYPES[0])

        def run(x=x, grad=grad, settings=settings):
            torch.autograd.grad(focus_mixing(x, settings)[0], x, grad)

        times = {}
        for name, is_supported in (("kernels", kernels), ("torch", lambda *_: False)):
            focus_operator.triton_is_supported = is_supported
            times[name] = seconds_each(run)
        focus_operator.triton_is_supported = kernels
        results.row("as called", window=window, kernels_ms=times["kernels"] * 1e3, torch_ms=times["torch"] * 1e3)


def tiles(results, rate):
    """Sizes of chunks, numbers of warps (the same forward and backward) and products: which are best?"""
    original, precision = focus_triton._tile, focus_triton._precision
    runs = [(dim, DTYPES[0], tile, "tf32") for dim, choices in TILES.items() for tile in choices]
    runs += [(dim, torch.float32, TILES[dim][1], name) for dim in TILES for name in PRECISIONS]
    try:
        for dim, dtype, tile, product in runs:
            use_tile(tile, product)
            for window in (None, 16):
                cells = {"chunk": tile[0], "warps": tile[1], "product": product}
                try:
                    check_mixing(window, 2, dim, dtype, seq=70)
                    shape = 1, 65_536, 512 // dim, dim, dtype, window
                    time_mixing(results, rate, "tiles", *shape, **cells)
                except Exception as error:
                    results.row("tiles", dim=dim, window=window, **cells, error=str(error)[:200])
    finally:
        focus_triton._tile, focus_triton._precision = original, precision


def use_tile(tile, product):
    chunk, warps = tile
    focus_triton._tile = lambda *_: (chunk, warps, warps)
    focus_triton._precision = lambda dtype: product


def leap_base(**options):
    """Sizes of configs/leap-base."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    if not QUICK:
        shape = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 32_000}
    return LeapForCausalLM(LeapConfig(**shape, **options)).to(DEVICE)


def gpt2(positions):
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50}
    if not QUICK:
        shape = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 32_000}
    config = GPT2Config(
        **shape,
        n_positions=positions,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config).to(DEVICE)


class Trainee:
    """A model with its optimizer; calling it takes one step in bf16 autocast."""

    def __init__(self, model, ids, compiled=False):
        self.model, self.ids = model.train(), ids
        self.run = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=DEVICE == "cuda")

    def __call__(self):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = self.run(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def training(results, rate, compiled=False):
    lengths = [32] if QUICK else ([4096] if compiled else [1024, 4096, 16_384, 65_536])
    for length in lengths:
        tokens = 64 if QUICK else max(32_768, length)
        ids = torch.randint(0, 50, (tokens // length, length), device=DEVICE)
        times, peaks = {}, {}
        for name, make in (("LEAP", leap_base), ("GPT2", partial(gpt2, length))):
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            trainee = Trainee(make(), ids, compiled)
            times[name] = seconds_each(trainee, repeat=4, warmup=2)
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
            del trainee
        results.row(
            "training step, compiled" if compiled else "training step",
            length=length,
            tokens=tokens,
            LEAP_ms=times["LEAP"] * 1e3,
            GPT2_ms=times["GPT2"] * 1e3,
            GPT2_over_LEAP=times["GPT2"] / times["LEAP"],
            LEAP_GiB=peaks["LEAP"],
            GPT2_GiB=peaks["GPT2"],
        )


@torch.inference_mode()
def decoding(results, rate):
    dtype = torch.float32 if QUICK else torch.bfloat16
    lengths = [16] if QUICK else [1024, 8192, 32_768, 131_072]
    steps = 2 if QUICK else 30
    leap, peer = leap_base().to(dtype).eval(), gpt2(lengths[-1] + 4 * steps).to(dtype).eval()
    token = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    for length in lengths:
        times = {}
        ids = torch.randint(0, 50, (1, length), device=DEVICE)
        cache = None
        for piece in ids.split(16_384, 1):
            cache = leap(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        shape = (1, peer.config.n_head, length, peer.config.n_embd // peer.config.n_head)
        peer_cache = DynamicCache(config=peer.config)
        for layer in range(peer.config.n_layer):
            peer_cache.update(
                torch.randn(shape, device=DEVICE, dtype=dtype), torch.randn(shape, device=DEVICE, dtype=dtype), layer
            )
        for name, model, past in (("LEAP", leap, cache), ("GPT2", peer, peer_cache)):

            def run(model=model, past=past):
                for _ in range(steps):
                    model(token, past_key_values=past, use_cache=True)

            times[name] = seconds_each(run, repeat=2, warmup=1) / steps
        results.row(
            "decoding",
            context=length,
            LEAP_ms=times["LEAP"] * 1e3,
            GPT2_ms=times["GPT2"] * 1e3,
            GPT2_over_LEAP=times["GPT2"] / times["LEAP"],
        )


RADIUS = 3  # of local attention


def check_local_attention(head_dim, dtype):
    """The gate: what is timed is right."""
    q, k, v = (torch.randn(1, 2, 9, 20, head_dim, device=DEVICE, dtype=dtype) for _ in range(3))
    out, _ = local_attention_triton.forward(q, k, v, RADIUS, 1, head_dim**-0.5, None)
    expected = naive_local_attention(*(x.double() for x in (q, k, v)), RADIUS)
    error = ((out.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
    if not error < (5e-3 if dtype == torch.bfloat16 else 1e-5):
        raise AssertionError(f"local attention, {head_dim} channels, {dtype}: relative error {error:.1e}")


def local_attention_kernels(q, k, v, grad):
    """Forward, and forward and backward, by the kernels alone; the cells are stored as in models."""
    q, k, v, grad = (x.detach().permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4) for x in (q, k, v, grad))
    arguments = RADIUS, 1, q.shape[-1] ** -0.5, None

    def forward():
        return local_attention_triton.forward(q, k, v, *arguments)

    return forward, lambda: local_attention_triton.backward(grad, q, k, v, forward()[1], *arguments)


def with_autograd(function, tensors, grad):
    """Forward, and forward and backward, of a function in torch."""
    return partial(function, *tensors), lambda: torch.autograd.grad(function(*tensors), tensors, grad)


def grid(results, rate):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    dtype = torch.float32 if QUICK else torch.bfloat16
    for side, batch in [(8, 1)] if QUICK else [(64, 4), (256, 1)]:
        inputs = [
            torch.randn(batch, 8, side, side, 32, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)
        ]
        grad = torch.randn_like(inputs[0])
        flat = [x.detach().flatten(2, 3).requires_grad_() for x in inputs]

        def near(b, h, i, j, side=side):
            return ((i // side - j // side).abs() <= RADIUS) & ((i % side - j % side).abs() <= RADIUS)

        runs = {"ours": with_autograd(lambda q, k, v: local_attention(q, k, v, RADIUS), inputs, grad)}
        if local_attention_triton.takes(inputs[0], RADIUS):
            check_local_attention(32, dtype)
            runs["kernels"] = local_attention_kernels(*inputs, grad)
        if not QUICK:
            mask = create_block_mask(near, None, None, side * side, side * side, device=DEVICE)
            flex = partial(torch.compile(flex_attention), block_mask=mask)
            runs["flex"] = with_autograd(flex, flat, grad.flatten(2, 3))
        if side <= 64:
            place = torch.arange(side * side, device=DEVICE)
            dense = near(0, 0, place[:, None], place[None, :])
            sdpa = partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=dense)
            runs["masked_sdpa"] = with_autograd(sdpa, flat, grad.flatten(2, 3))
        cells = {}
        for name, (forward, both) in runs.items():
            cells[f"{name}_forward_ms"] = seconds_each(forward) * 1e3
            cells[f"{name}_ms"] = seconds_each(both) * 1e3
        results.row("local attention", grid=f"{batch}x8x{side}x{side}x32", radius=RADIUS, **cells)


def windows(results, rate):
    """Causal attention to windows of 64 steps: the kernels, and torch's attention over chunks, all keys, or by flex attention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    dtype, window, head_dim = torch.float32 if QUICK else torch.bfloat16, 4 if QUICK else 64, 16 if QUICK else 64
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def attend(query, key, value, mask, is_causal):
        return sdpa(query, key, value, attn_mask=mask, is_causal=is_causal).transpose(1, 2)

    for length, batch in [(20, 1)] if QUICK else [(4096, 8), (65536, 1)]:
        shape = batch, length, 8, head_dim
        inputs = [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)]
        grad = torch.randn_like(inputs[0])
        heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs]
        runs = {
            "chunks": with_autograd(lambda *qkv: windowed_attention(attend, *qkv, window), inputs, grad),
            "all_keys": with_autograd(partial(sdpa, is_causal=True), heads_first, grad.transpose(1, 2)),
        }
        if windowed_attention_triton.takes(inputs[0], window):
            reach = window_reach(torch.arange(length, device=DEVICE)[None], window)
            arguments = reach, window, 1, head_dim**-0.5
            expected = windowed_attention(attend, *(x.detach()[:1, :300].double() for x in inputs), window)
            out, _ = windowed_attention_triton.forward(*inputs, *arguments)
            error = (out[:1, :300].double() - expected).norm() / expected.norm()
            if not error < (5e-3 if dtype == torch.bfloat16 else 1e-5):
                raise AssertionError(f"windowed attention: relative error {error:.1e}")
            runs["kernels"] = with_autograd(lambda *qkv, a=arguments: kernel_attention(*qkv, *a), inputs, grad)
        if not QUICK:
            mask = create_block_mask(
                lambda b, h, i, j: (i >= j) & (i - j < window), None, None, length, length, device=DEVICE
            )
            flex = partial(torch.compile(flex_attention), block_mask=mask)
            runs["flex"] = with_autograd(flex, heads_first, grad.transpose(1, 2))
        cells = {}
        for name, (forward, both) in runs.items():
            cells[f"{name}_forward_ms"] = seconds_each(forward) * 1e3
            cells[f"{name}_ms"] = seconds_each(both) * 1e3
        results.row("windowed attention", shape="x".join(map(str, shape)), window=window, **cells)


def compile_ahead():
    """Compile the kernels of all sizes in parallel processes, into Triton's cache on disk."""
    jobs = [(dim, str(dtype)[6:], None, None) for _, dim in HEADS for dtype in DTYPES]
    jobs += [(dim, "bfloat16", tile, "tf32") for dim, choices in TILES.items() for tile in choices]
    jobs += [(dim, "float32", TILES[dim][1], name) for dim in TILES for name in PRECISIONS]
    command = [sys.executable, __file__, "--compile"]
    running = []
    for job in jobs:
        running.append(subprocess.Popen([*command, json.dumps(job)]))
        while sum(process.poll() is None for process in running) >= max(2, (os.cpu_count() or 2) - 2):
            time.sleep(0.1)
    for process in running:
        process.wait()


def compile_one(dim, dtype, tile, product):
    if tile is not None:
        use_tile(tile, product)
    for window in (None, 16):
        x = torch.randn(1, 64, 4, 16, dim, device=DEVICE, dtype=getattr(torch, dtype))
        settings = settings_for(window, dim)
        focus_triton.TritonMixing(x, settings).forward(x, False)
        forward_and_backward(x, x[:, :, 0].contiguous(), settings)
    synchronize()


SECTIONS = {
    "mixing": mixing,
    "as called": mixing_in_torch,
    "decoding": decoding,
    "training": training,
    "tiles": tiles,
    "grid": grid,
    "windows": windows,
    "compiled": lambda results, rate: training(results, rate, compiled=True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU: shows that the script works")
    parser.add_argument("--output", type=Path, default=ROOT / "tests/benchmarks/results/gpu_focus.json")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=125, help="no section starts after this many seconds")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_one(*json.loads(arguments.compile))
        return
    torch.manual_seed(0)
    if QUICK and focus_triton.triton is not None:
        complete_interpreter()
        focus_triton._DEVICES = triton_attention.DEVICES = ("cpu",)
    results = Results(arguments.output)
    print(json.dumps({name: results.data[name] for name in ("device", "versions", "commit")}), flush=True)
    rate = copy_bandwidth(results)
    if not QUICK and {"mixing", "tiles"} & set(arguments.sections):
        compile_ahead()
        print(f"[{time.monotonic() - STARTED:5.1f}s] compiled ahead", flush=True)
    for name in arguments.sections:
        if name == "tiles" and QUICK:
            continue
        if time.monotonic() - STARTED > arguments.seconds:
            print(f"skipped for want of time: {name}", flush=True)
            continue
        try:
            SECTIONS[name](results, rate)
        except Exception:  # one failure leaves the other sections
            results.row(name, error=traceback.format_exc()[-1500:])
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    results.row("end", seconds=time.monotonic() - STARTED)
    print(json.dumps(results.data), flush=True)


if __name__ == "__main__":
    main()
