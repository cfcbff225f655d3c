"""A learned axis: fitted on one text, right on another, and the same in JSON, in a file of its own and in scikit-learn."""

import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import modeling_heptapod
from modeling_heptapod import DecisionTreeAxis, MultiGridProcessor, find_lookahead, make_axis
from modeling_heptapod.multigrid.axes import visible_lengths
from tests.tiny_leap import tiny_leap
from tests.tiny_multigrid import tiny_multigrid


pytest.importorskip("sklearn", reason="the extra `axes` is not installed")
import distill_axis
from corpora import build_tokenizer, load_texts
from distill_axis import distill, hidden_states, last_characters, tree_nodes
from sklearn.tree import DecisionTreeClassifier


PACKAGE = Path(modeling_heptapod.__file__).parent
AXES = PACKAGE / "multigrid"
TEXTS = [(AXES / name).read_text(encoding="utf-8") for name in ("axes.py", "python_axes.py")]
HELD_OUT = [
    (AXES / "text_axes.py").read_text(encoding="utf-8")[:12_000],
    "L'été coûte 3 €.\n\U0001f419\U0001f419 ½\n" * 20,
]
TALES = Path(__file__).parents[3] / "shared" / "data" / "fairy_tales" / "jacobs_celtic.txt"
SMALL = {"clusters": 6, "length": 4, "max_leaves": 40, "max_tokens": 6_000, "block_size": 128}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("byte", [])


@pytest.fixture(scope="module")
def model():
    return tiny_leap(vocab_size=258).eval()


@pytest.fixture(scope="module")
def distilled(model, tokenizer):
    return distill(model, tokenizer, TEXTS, HELD_OUT, **SMALL)


class Told:
    """Stands for a model whose hidden states are three numbers: is the last character a letter, a digit, a blank."""

    device = torch.device("cpu")

    def __call__(self, input_ids, output_hidden_states):
        tests = (str.isalpha, str.isdigit, str.isspace)
        rows = [[float(test(chr(token % 256))) for test in tests] for token in input_ids[0].tolist()]
        return SimpleNamespace(hidden_states=(None, torch.tensor([rows])))


def test_a_model_with_axes_reads_them_too(tokenizer):
    """Its hidden states depend on the tracks, which are those of its axes on the whole text."""
    axes = [make_axis("bracket"), make_axis("indentation")]
    sizes = [len(axis.vocabulary) for axis in axes]
    model = tiny_multigrid(vocab_size=258, axis_names=["bracket", "indentation"], axis_vocab_sizes=sizes)
    text = "def f(x):\n    return [g(y) for y in (x, {1: 2})]\n" * 6
    how = {"layer": -1, "length": 4, "max_tokens": 10_000, "block_size": 64, "seed": 0}
    states, _ = hidden_states(model, tokenizer, [text], axes=axes, **how)
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor([tokenizer.eos_token_id, *encoded["input_ids"]])
    tracks = torch.tensor([[0, *axis.annotate(text, encoded["offset_mapping"])] for axis in axes])
    assert len(tracks[0].unique()) > 2 and len(tracks[1].unique()) > 1
    expected = []
    for block, track in zip(ids.split(64), tracks.split(64, dim=1)):
        with torch.no_grad():
            out = model(block[None], axis_ids=track[None], output_hidden_states=True)
        expected.append(out.hidden_states[-1][0])
    expected = torch.cat(expected)[1:].numpy()  # without the token that begins a document
    assert states.shape == expected.shape
    np.testing.assert_allclose(np.sort(states, axis=0), np.sort(expected, axis=0), rtol=1e-5, atol=1e-5)
    result = distill(model, tokenizer, TEXTS, HELD_OUT[:1], axes=axes, **SMALL)
    assert result.tokens == 6_000 and 0 < result.agreement <= 1
    with pytest.raises(ValueError, match=r"model has the axes \['bracket', 'indentation'\], .* got \['bracket'\]"):
        hidden_states(model, tokenizer, [text], axes=axes[:1], **how)


def test_a_saved_multigrid_is_distilled(tokenizer, tmp_path, monkeypatch):
    axis = make_axis("bracket")
    model = tiny_multigrid(vocab_size=258, axis_names=["bracket"], axis_vocab_sizes=[len(axis.vocabulary)])
    model.save_pretrained(tmp_path / "model")
    MultiGridProcessor(tokenizer, [axis]).save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    (tmp_path / "text" / "b.txt").write_text(TEXTS[1], encoding="utf-8")
    options = {
        "--output_dir": tmp_path / "axis",
        "--dataset_name": tmp_path / "text",
        "--num_clusters": 4,
        "--max_tokens": 2000,
    }
    monkeypatch.setattr(sys, "argv", ["distill_axis.py", str(tmp_path / "model"), *map(str, sum(options.items(), ()))])
    distill_axis.main()
    assert make_axis(str(tmp_path / "axis" / "axis.json")).name == "learned"


def test_what_the_last_character_tells_is_found(tokenizer):
    text = "".join(random.Random(0).choices(string.printable, k=20_000))  # each character often enough for the tree
    result = distill(Told(), tokenizer, [text], HELD_OUT[:1], **{**SMALL, "clusters": 4})
    assert result.agreement > 0.999 > 0.8 > result.chance
    ids = dict(zip("aZ09 \n({", result.axis.annotate("aZ09 \n({")))
    assert ids["a"] == ids["Z"] and ids["0"] == ids["9"] and ids[" "] == ids["\n"] and ids["("] == ids["{"]
    assert len({*ids.values()}) > 2 and ids["a"] != ids[" "]


def test_figures_of_another_text_are_by_the_clusters_of_the_first(tokenizer):
    """Digits are the most frequent here and rare there, where almost all is a letter."""
    text, other = "7" * 1600 + "a" * 200 + " " * 200, "a" * 380 + "7" * 20
    result = distill(Told(), tokenizer, [text], [other], **{**SMALL, "clusters": 3, "length": 1, "max_tokens": 8000})
    assert (result.tokens, result.held_out_tokens) == (2000, 400)
    assert result.agreement == 1 and result.chance == pytest.approx(20 / 400)


def test_a_model_is_distilled(distilled):
    assert distilled.tokens == 6_000 and distilled.held_out_tokens == 1_500
    assert distilled.chance + 0.1 < distilled.agreement < 1
    axis = distilled.axis
    assert type(axis) is DecisionTreeAxis and axis.name == "learned" and axis.length <= 4
    assert axis.vocabulary == ("none", *[f"cluster {number}" for number in range(6)])
    leaves = {node[0] for node in axis.nodes if len(node) == 1}
    assert len(leaves) > 2 and 0 not in leaves


def test_agreement_is_counted_on_the_held_out_text(model, tokenizer):
    """With nothing of the text to hold on to, agreement falls to chance."""
    torch.manual_seed(0)
    table = torch.randn(4096, 3)

    class Noise(Told):
        calls = 0

        def __call__(self, input_ids, output_hidden_states):
            Noise.calls += 1
            start = 131 * Noise.calls % 3000
            return SimpleNamespace(hidden_states=(None, table[None, start : start + input_ids.shape[1]]))

    result = distill(Noise(), tokenizer, TEXTS, HELD_OUT[:1], **{**SMALL, "max_leaves": 400})
    assert result.agreement < result.chance + 0.1


@pytest.mark.parametrize("text", ["", "x", *HELD_OUT, "\x00\ud800\U0010ffff"])
def test_the_exported_file_is_the_axis(distilled, tmp_path, text):
    """Run alone, without a site folder; nothing is imported."""
    (tmp_path / "axis.py").write_text(distilled.axis.to_python(), encoding="utf-8")
    (tmp_path / "text.json").write_text(json.dumps(text))
    code = "import json; from axis import annotate; print(json.dumps(annotate(json.load(open('text.json')))))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == distilled.axis.annotate(text)


@pytest.mark.skipif(not TALES.is_file(), reason="no fairy tales in ../shared/data next to the repository")
def test_the_exported_file_is_the_axis_on_a_book(distilled):
    module = {}
    exec(distilled.axis.to_python(), module)
    text = TALES.read_text(encoding="utf-8")
    assert module["annotate"](text) == distilled.axis.annotate(text)


def test_it_is_causal_in_bytes_too(distilled, tokenizer):
    for text in (HELD_OUT[0][:1500], HELD_OUT[1][:300]):
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        assert find_lookahead(distilled.axis, text, offsets, every=7) is None
    processor = MultiGridProcessor(tokenizer, [distilled.axis.to_dict()])
    assert processor(HELD_OUT[1])["axis_ids"][0][0] == distilled.axis.annotate(HELD_OUT[1], offsets_of(tokenizer))


def offsets_of(tokenizer):
    return tokenizer(HELD_OUT[1], return_offsets_mapping=True)["offset_mapping"]


def test_nodes_are_the_fitted_tree(tokenizer):
    """The axis and scikit-learn's own predictions, on text with bytes, and on characters it was not fitted on."""
    text = TEXTS[0][:5000] + HELD_OUT[1]
    characters = last_characters(text, list(range(1, len(text) + 1)), 3)
    targets = np.array([0, 1, 3, 4])[(characters[:, 0] * 7 + characters[:, 2]) % 4]  # a cluster that is never met
    tree = DecisionTreeClassifier(max_leaf_nodes=60, random_state=0).fit(characters, targets)
    axis = DecisionTreeAxis(nodes=tree_nodes(tree), vocabulary=["none", *"abcde"])
    for other in (text, TEXTS[1][:4000]):
        characters = last_characters(other, list(range(1, len(other) + 1)), 3)
        assert axis.annotate(other) == (tree.predict(characters) + 1).tolist()


def test_equal_leaves_are_one():
    characters = np.array([[97], [98], [99], [100]] * 5)
    tree = DecisionTreeClassifier(random_state=0).fit(characters, np.array([0, 1, 1, 1] * 5))
    tree.tree_.value[tree.tree_.children_left < 0] = [[1.0, 0.0]]
    assert tree_nodes(tree) == [[1]]


def test_last_characters_by_hand():
    rows = last_characters("ab€", [0, 1, 3], 3)
    assert rows.tolist() == [[-1] * 3, [97, -1, -1], [0x20AC, 98, 97]]


def test_hidden_states_stand_at_their_characters(model, tokenizer):
    """Blocks of a document; the token before it is read and left out; a byte of a character does not see it."""
    text = "aé€b\U0001f419c"
    states, characters = hidden_states(model, tokenizer, [text], -1, 2, 1000, 64, seed=0)
    ids = tokenizer(text, return_offsets_mapping=True)
    with torch.no_grad():
        whole = model(torch.tensor([[256, *ids["input_ids"]]]), output_hidden_states=True).hidden_states[-1][0, 1:]
    assert np.allclose(states, whole.numpy(), atol=1e-6)
    lengths = visible_lengths(ids["offset_mapping"], len(text))
    assert characters.tolist() == last_characters(text, lengths, 2).tolist()
    for size in (2, 3, 4, 6, 12):
        blocks, seen = hidden_states(model, tokenizer, [text], 0, 2, 1000, size, seed=0)
        assert sorted(seen.tolist()) == sorted(characters.tolist()) and len(blocks) == len(states)
    few, _ = hidden_states(model, tokenizer, [text] * 9, 0, 2, 20, 4, seed=0)
    assert len(few) == 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"clusters": 1}, "--num_clusters must be at least 2, got 1"),
        ({"length": 0}, "--context_length must be at least 1 and at most 1000, got 0"),
        ({"max_leaves": 1}, "--max_leaf_nodes must be at least 2, got 1"),
        ({"texts": ["ab"]}, "--num_clusters 6 is more than the 2 tokens of the text"),
        ({"texts": [""]}, "there is no text to read hidden states on"),
    ],
)
def test_bad_arguments_are_named(model, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        distill(model, tokenizer, **{"texts": TEXTS, "held_out_texts": HELD_OUT, **SMALL, **arguments})


@pytest.mark.slow
def test_from_a_saved_model_to_files(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(TEXTS), encoding="utf-8")
    command = [sys.executable, distill_axis.__file__, tmp_path / "model", "--output_dir", tmp_path / "axis"]
    command += ["--dataset_name", tmp_path / "text.txt", "--name", "habits", "--num_clusters", "5"]
    command += ["--max_tokens", "3000"]
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    axis = make_axis(tmp_path / "axis" / "axis.json")
    assert axis.name == "habits" and len(axis.vocabulary) == 6
    assert (tmp_path / "axis" / "axis.py").read_text(encoding="utf-8") == axis.to_python()
    report = json.loads((tmp_path / "axis" / "report.json").read_text(encoding="utf-8"))
    assert report["tokens"] == 3000 and report["agreement"] > report["chance"]
    leaves = sum(len(node) == 1 for node in axis.nodes)
    tokens = min(3000 // 4, len(load_texts(str(tmp_path / "text.txt")).validation[0].encode()))
    assert report["held_out_tokens"] == tokens
    assert (
        f"{leaves} leaves on the last {axis.length} characters. On {tokens} held-out tokens it predicts the cluster of "
        f"{report['agreement']:.1%}; the most frequent cluster has {report['chance']:.1%}." in done.stdout
    )
