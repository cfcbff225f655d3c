"""An axis from a trained model: what its hidden states tell apart, guessed from the last few characters.

    python training/distill_axis.py outputs/leap-tiny --output_dir outputs/leap-axis
    python training/train.py --config_name configs/multigrid-tiny --axes outputs/leap-axis/axis.json ...

The hidden states of one layer are grouped into clusters; a small decision tree learns to name the cluster from the last
characters; the tree is written as `axis.json`, which `make_axis` loads, and as `axis.py`, which needs nothing at all.
How often the tree is right on text that neither was fitted on is printed.
"""

from argument_checks import NUMPY_SEEDS, check_can_write, check_number, need, whole


need("axes", "sklearn")

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from corpora import load_texts
from loading import add_model_arguments, check_family, may_run_code
from redaction import Parser
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from modeling_heptapod import Axis, DecisionTreeAxis
from modeling_heptapod.multigrid.axes import visible_lengths


LONGEST = 1000  # characters that a tree may see


@dataclass
class Distilled:
    """An axis and how well it fits.

    Attributes:
        axis: the tree.
        agreement: how often it names the right cluster on held-out text.
        chance: how often the most frequent cluster of the other text is the right one there.
        tokens, held_out_tokens: how many hidden states these are from.
    """

    axis: DecisionTreeAxis
    agreement: float
    chance: float
    tokens: int
    held_out_tokens: int


def distill(
    model,
    tokenizer,
    texts: list[str],
    held_out_texts: list[str],
    name: str = "learned",
    layer: int = -1,
    clusters: int = 16,
    length: int = 8,
    max_leaves: int = 128,
    max_tokens: int = 200_000,
    block_size: int = 512,
    seed: int = 0,
    axes: Sequence[Axis] = (),
) -> Distilled:
    """Make an axis.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, a fast one.
        texts, held_out_texts: what to fit on, and what to report the agreement on.
        name: of the axis.
        layer: which of `hidden_states`, 0 for the embeddings, -1 for the last.
        clusters: how many groups, so the ids of the axis are 1 to `clusters`; 0 is what stands before a text.
        length: how many of the last characters the tree sees.
        max_leaves: size of the tree.
        max_tokens: how many hidden states to fit on, and a quarter of it to report on.
        block_size: tokens that the model reads at a time.
        seed: chooses blocks of text and where the clusters begin.
        axes: those that the model itself reads, of a MultiGrid.

    Raises:
        ValueError: for a text too short to hold as many tokens as clusters, for numbers that do not fit, and for axes that
            are not the model's.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.tree import DecisionTreeClassifier

    check_number("--num_clusters", clusters, least=2)
    check_number("--context_length", length, least=1, most=LONGEST)
    check_number("--max_leaf_nodes", max_leaves, least=2)
    check_number("--max_tokens", max_tokens, least=4)
    check_number("--block_size", block_size, least=1)
    check_layer(model, layer)
    states, characters = hidden_states(model, tokenizer, texts, layer, length, max_tokens, block_size, seed, axes)
    if len(states) < clusters:
        raise ValueError(f"--num_clusters {clusters} is more than the {len(states)} tokens of the text")
    mean, deviation = states.mean(0), states.std(0) + 1e-6
    grouping = MiniBatchKMeans(clusters, n_init=3, batch_size=4096, random_state=seed).fit((states - mean) / deviation)
    targets = grouping.labels_
    tree = DecisionTreeClassifier(max_leaf_nodes=max_leaves, min_samples_leaf=5, random_state=seed)
    tree.fit(characters, targets)
    axis = DecisionTreeAxis(name, tree_nodes(tree), ["none", *[f"cluster {n}" for n in range(clusters)]])

    states, characters = hidden_states(
        model, tokenizer, held_out_texts, layer, length, max_tokens // 4, block_size, seed, axes
    )
    held_out = grouping.predict((states - mean) / deviation)
    return Distilled(
        axis,
        agreement=float((tree.predict(characters) == held_out).mean()),
        chance=float((np.bincount(targets).argmax() == held_out).mean()),
        tokens=len(targets),
        held_out_tokens=len(held_out),
    )


def check_layer(model, layer: int) -> None:
    """Raise a ValueError that names `--layer` where a model has no such hidden states."""
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if layers is not None:
        check_number("--layer", layer, least=-layers - 1, most=layers)


@torch.no_grad()
def hidden_states(model, tokenizer, texts, layer, length, max_tokens, block_size, seed, axes=()):
    """Hidden states at tokens, and the characters each token ends with.

    Returns:
        float32 `[tokens, width]`, and code points int32 `[tokens, length]`, the last character first, -1 before a text.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer must be a fast one, which gives offsets, got {type(tokenizer).__name__}")
    names, wanted = [axis.name for axis in axes], list(getattr(getattr(model, "config", None), "axis_names", ()))
    if names != wanted:
        raise ValueError(f"the model has the axes {wanted}, which its processor must have as well, got {names}")
    blocks = []
    for text in texts:
        encoded = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        seen = last_characters(text, visible_lengths(encoded["offset_mapping"], len(text)), length)
        ids = [tokenizer.eos_token_id, *encoded["input_ids"]]  # documents begin so in training
        tracks = [[0, *axis.annotate(text, encoded["offset_mapping"])] for axis in axes]
        for start in range(0, len(ids), block_size):
            here = seen[max(0, start - 1) : start + block_size - 1]
            if len(here):
                end = start + block_size
                blocks.append((ids[start:end], [track[start:end] for track in tracks], here))
    states, characters, number = [], [], 0
    order = np.random.default_rng(seed).permutation(len(blocks))
    for choice in tqdm(order, desc="Reading", unit=" blocks", disable=None):
        ids, tracks, seen = blocks[choice]
        meta = {"axis_ids": torch.tensor([tracks], device=model.device)} if tracks else {}
        output = model(torch.tensor([ids], device=model.device), output_hidden_states=True, **meta)
        states.append(output.hidden_states[layer][0, -len(seen) :].float().cpu().numpy())
        characters.append(seen)
        number += len(seen)
        if number >= max_tokens:
            break
    if not states:
        raise ValueError("there is no text to read hidden states on")
    return np.concatenate(states)[:max_tokens], np.concatenate(characters)[:max_tokens]


def last_characters(text: str, lengths: list[int], length: int) -> np.ndarray:
    """Code points before each of several places in a text, int32 `[places, length]`, the nearest first."""
    codes = np.concatenate([np.full(length, -1), [ord(character) for character in text]]).astype(np.int32)
    return codes[np.array(lengths, dtype=np.int64)[:, None] + length - 1 - np.arange(length)]


def tree_nodes(tree) -> list[list[int]]:
    """A fitted `DecisionTreeClassifier` on code points as the nodes of a `DecisionTreeAxis`; class c has id c + 1.

    Branches that end in the same id on both sides are one leaf.
    """
    fitted, nodes = tree.tree_, []

    def leaf_of(number):
        """The id that all leaves below a node share, or None."""
        if fitted.children_left[number] < 0:
            return int(tree.classes_[fitted.value[number][0].argmax()]) + 1
        left, right = leaf_of(fitted.children_left[number]), leaf_of(fitted.children_right[number])
        return left if left == right else None

    def write(number):
        """Write a node and all below it; the place of it."""
        place, axis_id = len(nodes), leaf_of(number)
        nodes.append([axis_id])
        if axis_id is None:
            left = write(fitted.children_left[number])
            right = write(fitted.children_right[number])
            # Codes are whole numbers, so a threshold between two of them is the lower one.
            nodes[place] = [int(fitted.feature[number]) + 1, int(np.floor(fitted.threshold[number])), left, right]
        return place

    write(0)
    return nodes


def main():
    parser = Parser(description="Make an axis from a trained model.")
    add_model_arguments(parser)
    parser.add_argument("--output_dir", default="outputs/axis", help="where axis.json, axis.py and report.json go")
    parser.add_argument("--dataset_name", default="stdlib", help="text to read, as for train.py")
    parser.add_argument("--name", default="learned", help="name of the axis")
    parser.add_argument(
        "--layer", type=whole(), default=-1, help="of the hidden states: 0 the embeddings, -1 the last"
    )
    parser.add_argument("--num_clusters", type=whole(2), default=16, help="groups of hidden states")
    parser.add_argument(
        "--context_length", type=whole(1, LONGEST), default=8, help="last characters that the tree sees"
    )
    parser.add_argument("--max_leaf_nodes", type=whole(2), default=128, help="size of the tree")
    parser.add_argument("--max_tokens", type=whole(4), default=200_000, help="hidden states to fit on")
    parser.add_argument("--seed", type=whole(0, NUMPY_SEEDS), default=0)
    args = parser.parse_args()
    if not args.name.isidentifier():
        parser.error(f"argument --name: must be a Python identifier, got {args.name!r}")

    trust = may_run_code(args.folder, args.trust_remote_code)
    check_family(args.folder, but=("heptapod",))
    tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=trust).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    check_layer(model, args.layer)
    folder = Path(args.output_dir)
    check_can_write("--output_dir", folder)
    axes = ()
    if getattr(model.config, "axis_names", None):
        axes = AutoProcessor.from_pretrained(args.folder, trust_remote_code=trust).axes
    texts = load_texts(args.dataset_name)
    result = distill(
        model,
        tokenizer,
        texts.train,
        texts.validation,
        name=args.name,
        layer=args.layer,
        clusters=args.num_clusters,
        length=args.context_length,
        max_leaves=args.max_leaf_nodes,
        max_tokens=args.max_tokens,
        block_size=min(512, getattr(model.config, "max_position_embeddings", 512)),
        seed=args.seed,
        axes=axes,
    )
    (folder / "axis.json").write_text(json.dumps(result.axis.to_dict()) + "\n", encoding="utf-8")
    (folder / "axis.py").write_text(result.axis.to_python(), encoding="utf-8")
    report = {name: getattr(result, name) for name in ("agreement", "chance", "tokens", "held_out_tokens")}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    leaves = sum(len(node) == 1 for node in result.axis.nodes)
    print(
        f"{folder}/axis.py: {leaves} leaves on the last {result.axis.length} characters. On {result.held_out_tokens} "
        f"held-out tokens it names the cluster in {result.agreement:.1%}, the most frequent one would in "
        f"{result.chance:.1%}."
    )


if __name__ == "__main__":
    main()
