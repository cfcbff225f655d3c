"""`make free-install`: the wheel in an environment that pip fills as it likes, as a user's `pip install` would.

Only torch is the one of `constraints.txt`. Every causal family then writes with its cache and without, in that environment.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path


def install_and_check():
    """Build the wheel, install it without constraints into an environment of its own, and run `check` there."""
    from run_versions import ROOT, environment, run, torch_requirement

    with tempfile.TemporaryDirectory(prefix="heptapod-free-install-") as work:
        work = Path(work)
        venv.create(work / "venv", with_pip=True)
        python = work / "venv" / "bin" / "python"
        run([python, "-m", "pip", "install", torch_requirement()])
        run([python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", work / "dist", ROOT])
        run([python, "-m", "pip", "install", *(work / "dist").glob("modeling_heptapod-*.whl")])
        run([python, "-m", "pip", "check"])
        command = [python, Path(__file__).resolve(), "check"]
        done = subprocess.run(
            list(map(str, command)), cwd=work, env=environment(work / "home"), capture_output=True, text=True
        )
    print(done.stdout, end="")
    if done.returncode or "ERROR" in done.stdout + done.stderr:
        raise SystemExit(f"{done.stderr}\nThe freely resolved installation does not work.")


def check():
    """Cached against uncached greedy, for every causal family; the grid fills a page."""
    import torch
    import transformers

    import modeling_heptapod as heptapod

    assert Path(heptapod.__file__).is_relative_to(sys.prefix), heptapod.__file__
    torch.manual_seed(0)
    small = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.5,
    }
    axes = {"axis_names": ["a"], "axis_vocab_sizes": [5]}
    models = [
        heptapod.LeapForCausalLM(heptapod.LeapConfig(**small)),
        heptapod.HierarchicalLMForCausalLM(heptapod.HierarchicalLMConfig(compression_factors=[1, 4], **small)),
        *(heptapod.MultiGridForCausalLM(heptapod.MultiGridConfig(core=core, **axes, **small)) for core in CORES),
    ]
    ids = torch.randint(50, (2, 20))
    for model in models:
        more = {"axis_ids": torch.randint(5, (2, 1, 20))} if getattr(model.config, "num_axes", 0) else {}
        how = {"max_new_tokens": 20, "do_sample": False, **more}
        cached, uncached = (model.eval().generate(ids, use_cache=use, **how) for use in (True, False))
        name = f"{type(model).__name__} {getattr(model.config, 'core', '')}".strip()
        assert torch.equal(cached, uncached), f"{name} writes something else with its cache"
        assert len(set(cached[0, 20:].tolist())) > 1, f"{name} repeats one token, which says nothing about its cache"
        print(f"transformers {transformers.__version__}: {name} writes the same with its cache and without")
    grid = heptapod.HeptapodForMaskedLM(heptapod.HeptapodConfig(mask_token_id=49, **small)).eval()
    assert (grid.generate(height=4, width=6) != 49).all()
    print(f"transformers {transformers.__version__}: {type(grid).__name__} fills a page")


CORES = ("transformer", "leap", "lstm")

if __name__ == "__main__":
    check() if sys.argv[1:] == ["check"] else install_and_check()
