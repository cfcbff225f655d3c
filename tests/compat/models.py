"""The models that are written under one version of Transformers and read under each other, and what they are given.

Run as a program it writes folders, with what the models say, or reads them where the package is not installed:

    python tests/compat/models.py write FOLDER
    python tests/compat/models.py read FOLDER RESULTS
"""

import sys
from pathlib import Path

import torch
import transformers


GREEDY = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": False}
AUTO = {
    "LeapModel": "AutoModel",
    "LeapForCausalLM": "AutoModelForCausalLM",
    "LeapForMaskedLM": "AutoModelForMaskedLM",
    "LeapForSequenceClassification": "AutoModelForSequenceClassification",
    "HierarchicalLMModel": "AutoModel",
    "HierarchicalLMForCausalLM": "AutoModelForCausalLM",
    "HeptapodModel": "AutoModel",
    "HeptapodForMaskedLM": "AutoModelForMaskedLM",
    "MultiGridModel": "AutoModel",
    "MultiGridForCausalLM": "AutoModelForCausalLM",
}
# Head and options of its tiny model: every head, and for those that write every kind of cache layer.
MODELS = {
    "leap-base": ("LeapModel", {}),
    "leap-masked": ("LeapForMaskedLM", {}),
    "leap-classification": ("LeapForSequenceClassification", {"pad_token_id": 0}),
    "leap": ("LeapForCausalLM", {"tie_word_embeddings": True}),
    "leap-learned": ("LeapForCausalLM", {"position_embedding_type": "absolute", "num_attention_heads": 2}),
    "leap-additive": ("LeapForCausalLM", {"mixer": "additive", "position_embedding_type": "alibi"}),
    "hierarchical_lm-base": ("HierarchicalLMModel", {}),
    "hierarchical_lm": (
        "HierarchicalLMForCausalLM",
        {
            "compression_factors": [1, 2, 8],
            "strides": [1, 1, 4],
            "window_sizes": [5, None, 3],
            "hidden_sizes": [16, 24, 32],
        },
    ),
    "hierarchical_lm-losses": (
        "HierarchicalLMForCausalLM",
        {
            "compression_factors": [1, 4],
            "strides": [1, 4],
            "window_sizes": [0, 4],
            "reconstruction_loss_weight": 0.1,
            "prophet_loss_weight": 0.1,
            "next_latent_loss_weight": 0.1,
        },
    ),
    "heptapod-base": ("HeptapodModel", {}),
    "heptapod": ("HeptapodForMaskedLM", {"self_conditioning": True, "num_global_heads": 1}),
    "multigrid-base": ("MultiGridModel", {"axes": 2}),
    "multigrid": ("MultiGridForCausalLM", {}),
    "multigrid-axes": ("MultiGridForCausalLM", {"axes": 2}),
    "multigrid-factored": ("MultiGridForCausalLM", {"axes": 2, "axis_order": "factored"}),
    "multigrid-leap": ("MultiGridForCausalLM", {"axes": 2, "core": "leap", "window_sizes": [None, 3]}),
    "multigrid-lstm": ("MultiGridForCausalLM", {"axes": 2, "core": "lstm"}),
}
CAUSAL = [name for name, (head, _) in MODELS.items() if head.endswith("ForCausalLM")]


def make(name, **options):
    """A tiny model in evaluation mode; the package is needed for it."""
    from tests.tiny_heptapod import tiny_heptapod
    from tests.tiny_hierarchical_lm import tiny_hierarchical_lm
    from tests.tiny_leap import tiny_leap
    from tests.tiny_multigrid import TWO_AXES, tiny_multigrid

    head, own = MODELS[name]
    options = {**own, **options}
    if options.pop("axes", 0):
        options |= TWO_AXES
    build = {"leap": tiny_leap, "hierarchical_lm": tiny_hierarchical_lm, "heptapod": tiny_heptapod}
    return build.get(name.split("-")[0], tiny_multigrid)(head, **options)


def inputs_of(model, batch=2, length=12):
    """Inputs of a model of any family: no pads, no masks."""
    random = torch.Generator().manual_seed(7)
    config = model.config
    if config.model_type == "heptapod":
        return {"input_ids": torch.randint(18, (batch, 3, length // 3), generator=random)}
    inputs = {"input_ids": torch.randint(1, config.vocab_size, (batch, length), generator=random)}
    if getattr(config, "num_axes", 0):
        sizes = config.axis_vocab_sizes
        tracks = [torch.randint(size, (batch, length), generator=random) for size in sizes]
        inputs["axis_ids"] = torch.stack(tracks, dim=1)
    return inputs


def labels_of(model, inputs):
    """What it learns from them, `None` for a base model."""
    if hasattr(model, "score"):
        return torch.arange(len(inputs["input_ids"])) % 2
    return inputs["input_ids"] if hasattr(model, "lm_head") else None


def written_page(model):
    """A page of which the middle was open."""
    page = inputs_of(model)["input_ids"]
    page[:, 1:, 1:3] = model.config.mask_token_id
    return model.generate(page, max_denoising_steps=3)


@torch.no_grad()
def what_it_says(model):
    """Tensors by name, the same wherever the model is loaded: outputs, loss, and what is written with a cache and without."""
    inputs = inputs_of(model)
    said = {"output": model(**inputs)[0]}
    labels = labels_of(model, inputs)
    if labels is not None:
        said["loss"] = model(**inputs, labels=labels).loss
    if model.config.model_type == "heptapod" and hasattr(model, "lm_head"):
        said["page"] = written_page(model)
    elif hasattr(model, "lm_head") and hasattr(model, "generate"):
        for use_cache in (True, False):
            said[f"tokens, use_cache={use_cache}"] = model.generate(**inputs, **GREEDY, use_cache=use_cache)
    return said


def load(folder, name):
    """The model of a folder with the code that lies in it, in evaluation mode."""
    auto = getattr(transformers, AUTO[MODELS[name][0]])
    model = auto.from_pretrained(folder / name, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model


def write(folder):
    """Save every model, and beside them what they say."""
    said = {}
    for name in MODELS:
        model = make(name)
        model.save_pretrained(folder / name)
        said[name] = what_it_says(model)
    torch.save(said, folder / "said.pt")


class _Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_heptapod":
            raise ImportError(f"{name} is blocked in this test")


def read(folders, results):
    """What the models of all versions say that lie in `folders`, or why they do not, into the file `results`."""
    sys.meta_path.insert(0, _Blocked())
    said = {}
    for folder in sorted(folders.iterdir()):
        for name in MODELS:
            try:
                said[folder.name, name] = what_it_says(load(folder, name))
            except Exception as error:  # reported by the test of this folder, the others go on
                said[folder.name, name] = f"{type(error).__name__}: {error}"
    torch.save(said, results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"write": write, "read": read}[sys.argv[1]](*map(Path, sys.argv[2:]))
