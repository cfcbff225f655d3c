"""Small training runs of every family, for tests: in this process, and as a script in several.

    torchrun --standalone --nproc_per_node 2 tests/training/tiny_runs.py losses.json ddp fsdp

writes the losses of each family's run in each way, and what its model was wrapped in.
"""

import argparse
import ast
import json
import sys
from contextlib import contextmanager
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]

import torch
from corpora import DataArguments, Texts
from objectives import objective_for
from sharding import ShardingTrainer
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, TrainingArguments, set_seed

from modeling_heptapod.heptapod import modeling_heptapod


CONFIGS = {
    "leap": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "window_sizes": [None, 4]},
    "hierarchical_lm": {
        "compression_factors": [1, 4],
        "strides": [1, 2],
        "hidden_sizes": [16, 24],
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
        "window_sizes": [8, None],
        "prophet_loss_weight": 0.25,
        "next_latent_loss_weight": 0.3,
    },
    "heptapod": {
        "grid_size": [4, 16],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_types": ["local", "global"],
        "self_conditioning": False,
    },
    "multigrid": {
        "axis_names": ["replaced"],
        "axis_vocab_sizes": [2],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
}
FAMILIES = tuple(CONFIGS)
FSDP = str(ROOT / "training" / "fsdp2.json")


def texts() -> Texts:
    """Real text, a few documents of a few thousand characters."""
    sources = [Path(module.__file__).read_text(encoding="utf-8")[:4000] for module in (argparse, ast, json)]
    return Texts(sources, [Path(argparse.__file__).read_text(encoding="utf-8")[-600:]])


def config_of(family: str, **changes):
    """The configuration of a tiny model, its vocabulary that of bytes."""
    return AutoConfig.for_model(family, **{"vocab_size": 258, **CONFIGS[family], **changes})


def trainer(family: str, folder, callbacks=(), packing: str = "continuous", **options) -> ShardingTrainer:
    """A trainer that is ready to be called: 4 steps of 8 examples, each logged, all seeds fixed."""
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.05,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        **options,
    }
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        include_for_metrics=["loss"],
        **options,
    )
    set_seed(0)
    data_args = DataArguments(block_size=32, axes=["token_kind", "bracket"], packing=packing, cache_dir="none")
    objective = objective_for(config_of(family))(texts(), data_args, config_of(family))
    model = objective.auto_class.from_config(config_of(family, **objective.config_options))
    args.label_names = objective.label_names
    found = ShardingTrainer(
        model,
        args,
        train_dataset=objective.train_dataset,
        eval_dataset=objective.eval_dataset,
        processing_class=objective.processing_class,
        callbacks=list(callbacks),
        **objective.trainer_options(),
    )
    found.objective = objective
    return found


def losses(trainer: ShardingTrainer) -> dict[int, list[float]]:
    """Loss and norm of the gradient of each step."""
    return {
        entry["step"]: [entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "loss" in entry
    }


@contextmanager
def masks_of_pages():
    """Masks that a page's content decides, where the grid draws others for each process, batch and step.

    The same pages then cost the same wherever and in whatever company they are trained on.
    """

    def draw(labels, generator=None, rank=0, num_ranks=1):
        masked, ratios = [], []
        for page in labels:
            own = torch.Generator().manual_seed(int(page.clamp_min(0).sum()))
            ratio = 1 - torch.rand((), generator=own)
            masked.append((torch.rand(page.shape, generator=own) < ratio) & (page != -100))
            ratios.append(ratio)
        return torch.stack(masked), torch.stack(ratios)

    original, modeling_heptapod.sample_mask = modeling_heptapod.sample_mask, draw
    try:
        yield
    finally:
        modeling_heptapod.sample_mask = original


def main():
    path, *ways = sys.argv[1:]
    torch.set_num_threads(1)
    found = {}
    for way in ways:
        options = {"fsdp": True, "fsdp_config": FSDP} if way == "fsdp" else {}
        for family in FAMILIES:
            with masks_of_pages():
                run = trainer(family, Path(path).parent / "out", per_device_train_batch_size=4, **options)
                run.train()
            wrapper = type(run.model_wrapped)
            found[f"{way} {family}"] = {
                "losses": losses(run),
                "wrapper": [kind.__name__ for kind in wrapper.__mro__],
                "sharded": [type(part).__name__ for part in run.model.modules() if isinstance(part, FSDPModule)],
            }
    if run.is_world_process_zero():
        Path(path).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
