"""An axis from a trained model: clusters of its hidden states, predicted from the last few characters.

    python training/distill_axis.py outputs/leap-tiny --output_dir outputs/leap-axis
    python training/train.py --config_name configs/multigrid-tiny --axes outputs/leap-axis/axis.json ...

The hidden states of one layer are clustered, and a small decision tree learns to predict the cluster from the last characters.
The tree is written as `axis.json`, which `make_axis` loads, and as `axis.py`, which has no dependencies. Its accuracy on
held-out text is printed.
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
from sklearn.cluster import MiniBatchKMeans
from sklearn.tree import DecisionTreeClassifier
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from modeling_heptapod import Axis, DecisionTreeAxis
from modeling_heptapod.multigrid.axes import visible_lengths


LONGEST = 1000  # characters that a tree may read


@dataclass
class Distilled:
    """An axis and its accuracy.

    Attributes:
        axis: the tree.
        agreement: share of held-out tokens whose cluster it predicts.
        chance: share of held-out tokens in the cluster that is the most frequent one in the other text.
        tokens, held_out_tokens: numbers of hidden states.
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
    """Fit an axis.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, a fast one.
        texts, held_out_texts: texts to fit on, and texts to measure the agreement on.
        name: name of the axis.
        layer: index of the `hidden_states`, 0 for the embeddings, -1 for the last.
        clusters: number of clusters; the ids of the axis are 1 to `clusters`, and 0 before a text.
        length: number of the last characters that the tree reads.
        max_leaves: size of the tree.
        max_tokens: number of hidden states to fit on; a quarter of it is held out.
        block_size: length of the model's input in tokens.
        seed: seed of the order of blocks and of the clusters.
        axes: axes of the model's own input, for a MultiGrid.

    Raises:
        ValueError: for a text of fewer tokens than clusters, for numbers out of range, and for axes that are not the
            model's.
    """

    def read(texts, limit):
        return hidden_states(model, tokenizer, texts, layer, length, limit, block_size, seed, axes)

    _check_sizes(clusters, length, max_leaves, max_tokens, block_size)
    check_layer(model, layer)
    states, characters = read(texts, max_tokens)
    if len(states) < clusters:
        raise ValueError(f"--num_clusters {clusters} is more than the {len(states)} tokens of the text")
    mean, deviation = states.mean(0), states.std(0) + 1e-6
    grouping = MiniBatchKMeans(clusters, n_init=3, batch_size=4096, random_state=seed).fit((states - mean) / deviation)
    targets = grouping.labels_
    tree = DecisionTreeClassifier(max_leaf_nodes=max_leaves, min_samples_leaf=5, random_state=seed)
    tree.fit(characters, targets)
    axis = DecisionTreeAxis(name, tree_nodes(tree), ["none", *[f"cluster {n}" for n in range(clusters)]])

    states, characters = read(held_out_texts, max_tokens // 4)
    held_out = grouping.predict((states - mean) / deviation)
    return Distilled(
        axis,
        agreement=float((tree.predict(characters) == held_out).mean()),
        chance=float((np.bincount(targets).argmax() == held_out).mean()),
        tokens=len(targets),
        held_out_tokens=len(held_out),
    )


def _check_sizes(clusters, length, max_leaves, max_tokens, block_size):
    check_number("--num_clusters", clusters, least=2)
    check_number("--context_length", length, least=1, most=LONGEST)
    check_number("--max_leaf_nodes", max_leaves, least=2)
    check_number("--max_tokens", max_tokens, least=4)
    check_number("--block_size", block_size, least=1)


def check_layer(model, layer: int) -> None:
    """Raise a ValueError that names `--layer` where a model has no such hidden states."""
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if layers is not None:
        check_number("--layer", layer, least=-layers - 1, most=layers)


@torch.no_grad()
def hidden_states(model, tokenizer, texts, layer, length, max_tokens, block_size, seed, axes=()):
    """Hidden states of tokens, and the characters up to the end of each token.

    Returns:
        float32 `[tokens, width]`, and code points int32 `[tokens, length]`, the last character first, -1 before the text.
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
    """Code points before each of several positions in a text, int32 `[positions, length]`, the nearest first."""
    codes = np.concatenate([np.full(length, -1), [ord(character) for character in text]]).astype(np.int32)
    return codes[np.array(lengths, dtype=np.int64)[:, None] + length - 1 - np.arange(length)]


def tree_nodes(tree) -> list[list[int]]:
    """A fitted `DecisionTreeClassifier` on code points as the nodes of a `DecisionTreeAxis`; class c has id c + 1.

    Branches that end in the same id on both sides are one leaf.
    """
    fitted, nodes = tree.tree_, []

    def leaf_of(number):
        """The common id of all leaves below a node, or None."""
        if fitted.children_left[number] < 0:
            return int(tree.classes_[fitted.value[number][0].argmax()]) + 1
        left, right = leaf_of(fitted.children_left[number]), leaf_of(fitted.children_right[number])
        return left if left == right else None

    def write(number):
        """Append a node and all below it, and return its index."""
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
    parser = Parser(description="Fit an axis to the hidden states of a trained model.")
    add_model_arguments(parser)
    parser.add_argument("--output_dir", default="outputs/axis", help="folder for axis.json, axis.py and report.json")
    parser.add_argument("--dataset_name", default="stdlib", help="text to read, as for train.py")
    parser.add_argument("--name", default="learned", help="name of the axis")
    parser.add_argument(
        "--layer", type=whole(), default=-1, help="index of the hidden states: 0 the embeddings, -1 the last"
    )
    parser.add_argument("--num_clusters", type=whole(2), default=16, help="number of clusters of the hidden states")
    parser.add_argument(
        "--context_length", type=whole(1, LONGEST), default=8, help="number of the last characters that the tree reads"
    )
    parser.add_argument("--max_leaf_nodes", type=whole(2), default=128, help="number of leaves of the tree")
    parser.add_argument("--max_tokens", type=whole(4), default=200_000, help="number of hidden states to fit on")
    parser.add_argument("--seed", type=whole(0, NUMPY_SEEDS), default=0, help="seed of the fit")
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
        f"held-out tokens it predicts the cluster of {result.agreement:.1%}; the most frequent cluster has "
        f"{result.chance:.1%}."
    )


if __name__ == "__main__":
    main()
