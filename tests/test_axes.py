"""Every axis that says it is causal is; what looks ahead is found; tokens of a part of a character see none of it."""

import copy
import json
import os
import pickle
import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import build_tokenizer

from modeling_heptapod import (
    Axis,
    ConstantAxis,
    DecisionTreeAxis,
    GoldTagAxis,
    MultiGridProcessor,
    PartOfSpeechAxis,
    RandomAxis,
    check_axis,
    find_lookahead,
    make_axis,
)
from modeling_heptapod.multigrid.axes import Automaton, visible_lengths
from modeling_heptapod.multigrid.axis_registry import BUILTIN_AXES
from tests.tiny_multigrid import tiny_multigrid


REPOSITORY = Path(__file__).parent.parent
NLTK_DATA = REPOSITORY.parent / "shared" / "data" / "nltk_data"
TALES = REPOSITORY.parent / "shared" / "data" / "fairy_tales"
TREE = {
    "class": "DecisionTreeAxis",
    "name": "learned",
    "nodes": [[1, 96, 1, 4], [3, -1, 2, 3], [1], [2], [2, 0x2000, 5, 6], [3], [0]],
    "vocabulary": ["none", "a", "b", "c"],
}
ON_DATA = (PartOfSpeechAxis, GoldTagAxis)
BY_RULE = [*(name for axis in BUILTIN_AXES if axis not in ON_DATA for name in axis.registry_names), TREE]
ENGLISH = """\
There was once an undone king's daughter, who'd been told: "Don't go into the wood!" She was (it is said) unhappy,
and her brother's 'friends' weren't helpful. -- Nevertheless, Mr. Fox's beautiful, well-kept house stood there...
"""
NON_ASCII = "L'œuf d\u2019été coûte 3 €;\n\te\u0301 ﬁn \U0001f419\U0001f419 naïve — «ΣΊΣΥΦΟΣ» 漢字かな \u2028 x = f'{é}' # ½²\n"


def corpora():
    """Real text of each kind, or what stands in for it."""
    tale = (TALES / "grimm_taylor.txt").read_text(encoding="utf-8")[50_000:51_500] if TALES.is_dir() else ENGLISH
    source = Path(__file__).read_text(encoding="utf-8")
    return {
        "english": tale,
        "python": source[source.index("def corpora") :][:1_500],  # whatever stands above it
        "others": NON_ASCII * 4,
    }


@pytest.fixture(scope="module")
def axes():
    return [make_axis(spec) for spec in BY_RULE]


@pytest.fixture(scope="module")
def part_of_speech():
    """Both alignments, the causal one first."""
    pytest.importorskip("nltk", reason="the extra `axes` is not installed")
    if not NLTK_DATA.is_dir():
        pytest.skip("no NLTK data in ../shared/data/nltk_data next to the repository")
    before = os.environ.get("NLTK_DATA")
    os.environ["NLTK_DATA"] = str(NLTK_DATA)
    yield make_axis("part_of_speech"), make_axis("part_of_speech_word")
    if before is None:
        del os.environ["NLTK_DATA"]
    else:
        os.environ["NLTK_DATA"] = before


def offsets_of(text, kind):
    """`kind` byte: several tokens share a character; bpe: tokens of several characters, and of parts of two."""
    tokenizer = build_tokenizer(kind, [text + "é€" * 40], vocab_size=300)
    return tokenizer(text, return_offsets_mapping=True)["offset_mapping"]


def test_every_axis_is_tested(axes):
    assert {*map(type, axes), *ON_DATA} == set(BUILTIN_AXES) and len(axes) > 7


# ---- causality


@pytest.mark.parametrize("kind", [None, "byte", "bpe"])
@pytest.mark.parametrize("corpus", ["english", "python", "others"])
def test_axes_that_say_so_are_causal(axes, corpus, kind):
    text = corpora()[corpus]
    offsets = kind and offsets_of(text, kind)
    for axis in axes:
        assert axis.causal and find_lookahead(axis, text, offsets, every=7) is None, axis
        ids = axis.annotate(text, offsets)
        assert len(ids) == (len(text) if kind is None else len(offsets))
        assert set(ids) <= set(range(len(axis.vocabulary)))
        one_id = axis.name in ("constant", "indentation") or (axis.name, corpus) == ("string", "english")
        assert one_id or len(set(ids)) > 1, axis


@pytest.mark.parametrize("kind", [None, "byte", "bpe"])
@pytest.mark.parametrize("corpus", ["english", "python", "others"])
def test_the_tag_of_the_previous_word_is_causal(part_of_speech, corpus, kind):
    text = corpora()[corpus]
    offsets = kind and offsets_of(text, kind)
    assert part_of_speech[0].causal and find_lookahead(part_of_speech[0], text, offsets, every=11) is None


@pytest.mark.parametrize("kind", [None, "byte", "bpe"])
def test_the_tag_of_a_whole_word_looks_ahead(part_of_speech, kind):
    for text in (corpora()["english"], ENGLISH):
        assert not part_of_speech[1].causal
        assert find_lookahead(part_of_speech[1], text, kind and offsets_of(text, kind)) is not None


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_steps_give_what_annotate_gives(axes, kind):
    """As when a model writes: token by token, several axes, a second beam from the same state."""
    for corpus, text in corpora().items():
        offsets = offsets_of(text, kind)
        lengths = [0, *visible_lengths(offsets, len(text))]
        pieces = [text[start:end] for start, end in pairwise(lengths)]
        assert "".join(pieces) == text and ("" in pieces or corpus != "others")
        for axis in axes:
            ids, state = [], axis.start()
            for piece in pieces:
                axis.step(state, "another beam's (text) \"")
                axis_id, state = axis.step(state, piece)
                ids.append(axis_id)
            assert ids == axis.annotate(text, offsets), axis
            assert hash(state) == hash(copy.deepcopy(state))


def test_steps_of_the_tagger_give_what_annotate_gives(part_of_speech):
    axis, text = part_of_speech[0], ENGLISH
    offsets = offsets_of(text, "bpe")
    lengths = [0, *visible_lengths(offsets, len(text))]
    ids, state = [], axis.start()
    for start, end in pairwise(lengths):
        axis_id, state = axis.step(state, text[start:end])
        ids.append(axis_id)
    assert ids == axis.annotate(text, offsets)


def test_before_the_first_character_the_id_is_0(axes):
    for axis in axes:
        assert axis.step(axis.start(), "")[0] == 0 == axis.annotate("abc", [(0, 0), (0, 3)])[0]
        assert axis.annotate("") == [] and axis.ids_after("") == [0]


class Ahead(Axis):
    """Whether the character so many places ahead is an `x`."""

    def __init__(self, name="ahead", places=1):
        super().__init__(name, ("no", "yes"))
        self.places = places

    def ids_after(self, text):
        return [0] + [int(text[n + self.places : n + self.places + 1] == "x") for n in range(len(text))]


def test_lookahead_is_found_where_it_begins():
    assert find_lookahead(Ahead(places=1), "aaax") == 3
    assert find_lookahead(Ahead(places=3), "aaax") == 1
    assert find_lookahead(Ahead(places=0), "aaax") is None
    assert find_lookahead(Ahead(places=1), "aaxaxaxaaaa") == 2
    assert find_lookahead(Ahead(places=1), "aaxaxaxaaaa", every=4) == 4
    assert find_lookahead(Ahead(places=1), "aaxaxaxaaaa", every=5) is None  # 5 and 10 are not before an x
    assert find_lookahead(Ahead(places=1), "abcx", offsets=[(0, 2), (2, 4)]) is None
    assert (
        find_lookahead(Ahead(places=1), "abcx", offsets=[(0, 2), (2, 3)]) == 2
    )  # the last token, not the last character
    assert find_lookahead(Ahead(places=1), "abcxab", offsets=[(0, 3), (3, 4), (4, 6)]) == 1


def test_bytes_that_see_their_character_too_early_are_found():
    class Whole(ConstantAxis):
        """Reads the end of an offset as what has been seen."""

        def annotate(self, text, offsets=None):
            return [ord(text[end - 1]) if end else 0 for _, end in offsets]

    offsets = offsets_of("aé€b", "byte")
    assert find_lookahead(Whole(), "aé€b", offsets) == 2
    assert find_lookahead(Whole(), "abcd", offsets_of("abcd", "byte")) is None


# ---- the rules of an axis


def test_axes_of_the_package_pass_the_check(axes, part_of_speech):
    for text in corpora().values():
        for axis in (*axes, *part_of_speech):
            check_axis(axis, text[:200])
            check_axis(axis, "")


class Rule(Axis):
    """Whether the last character is a vowel, with one rule broken."""

    def __init__(self, name="rule", broken=None):
        super().__init__(name, ("no", "yes"))
        self.broken = broken

    def arguments(self):
        return {} if self.broken == "arguments" else {"broken": self.broken}

    def start(self):
        return [] if self.broken in ("a list", "in place") else (int(self.broken == "start"),)

    def step(self, state, characters):
        if self.broken in ("a list", "in place"):
            state = state if self.broken == "in place" else list(state)
            state.extend(characters)
            return len(state) % 2, _Hashable(state) if self.broken == "in place" else state
        for character in characters:
            state = (int(character in "aeiou"),)
        axis_id = 0 if self.broken == "no characters" and not characters else state[0]
        return {"order": (state, axis_id), "id only": axis_id}.get(self.broken, (axis_id, state))

    def ids_after(self, text):
        if self.broken == "lookahead":
            return [int(text[n : n + 1] in ("a", "e")) for n in range(len(text) + 1)]
        if self.broken == "ids_after":
            return [0] * (len(text) + 1)
        if self.broken in ("order", "id only"):
            return Rule().ids_after(text)
        return super().ids_after(text)


class _Hashable(list):
    __hash__ = object.__hash__


@pytest.mark.parametrize(
    "broken, error, message",
    [
        ("lookahead", ValueError, r"looks ahead: the id of character 2 of 'the sea'.*`causal = False`"),
        ("start", ValueError, "has id 0 after '' .* 0 before any text"),
        ("no characters", ValueError, r"has id 1 after 'the' \+ '', and 0 where"),
        ("ids_after", ValueError, r"has id 0 after '' \+ 'the', and 1 where"),
        ("in place", ValueError, "no step may change its state in place"),
        ("a list", TypeError, r"states must be hashable, got \[\]: unhashable type"),
        ("order", ValueError, r"has id 0 after '' \+ '', and \(0,\) where"),
        ("id only", TypeError, "`step` must return an id and the next state, got 0"),
        ("arguments", ValueError, r"`arguments` of Rule must return \['broken'\] of its `__init__`"),
    ],
)
def test_broken_rules_are_named(broken, error, message):
    check_axis(Rule(), "the sea")
    with pytest.raises(error, match=message):
        check_axis(Rule(broken=broken), "the sea")


def test_an_axis_that_says_that_it_looks_ahead_passes_the_check():
    axis = Rule(broken="lookahead")
    axis.causal = False
    check_axis(axis, "the sea")


# ---- tokens and characters


@pytest.mark.parametrize(
    "offsets, length, expected",
    [
        ([(0, 1), (1, 3), (3, 4)], 4, [1, 3, 4]),
        ([(0, 1), (0, 1), (1, 2), (1, 2), (1, 2)], 2, [0, 1, 1, 1, 2]),  # bytes of é and €
        ([(0, 2), (1, 3), (2, 4)], 4, [1, 2, 4]),  # parts of two characters
        ([(0, 0), (0, 2), (0, 0), (2, 3), (0, 0)], 3, [0, 2, 2, 3, 3]),  # special tokens
        ([(1, 3), (4, 6)], 7, [3, 6]),  # blanks that no token covers
        ([(0, 3), (0, 3)], 9, [0, 3]),
        ([], 3, []),
    ],
)
def test_characters_complete_after_each_token(offsets, length, expected):
    assert visible_lengths(offsets, length) == expected
    assert visible_lengths(torch.tensor(offsets, dtype=torch.long).view(-1, 2), length) == expected


@pytest.mark.parametrize("offsets", [[(0, 5)], [(2, 1)], [(-1, 2)], [(2, 4), (0, 1)]])
def test_offsets_outside_the_text_are_named(offsets):
    with pytest.raises(ValueError, match=r"`offsets` must lie in the text of 4 characters .*token \d has \("):
        RandomAxis().annotate("abcd", offsets)


# ---- controls


def test_the_random_axis_says_nothing():
    text = corpora()["english"] * 3
    axis = RandomAxis(size=4, seed=3)
    ids = axis.annotate(text)
    assert ids == RandomAxis(size=4, seed=3).annotate(text)
    assert sum(a == b for a, b in zip(ids, RandomAxis(size=4, seed=4).annotate(text))) < 0.35 * len(text)
    counts = torch.bincount(torch.tensor(ids))
    assert ((counts - len(text) / 4).abs() < 5 * (len(text) * 3 / 16) ** 0.5).all()
    # Neither the character nor its place tells the id.
    for other in (ids[: len(text) // 3], axis.annotate("#" + text)[1:]):
        agreement = sum(a == b for a, b in zip(ids[len(ids) - len(other) :], other)) / len(other)
        assert agreement < 0.35
    assert len({RandomAxis(size=1000).annotate(start + "the same text")[-1] for start in "abcdefgh"}) > 4
    assert len({RandomAxis(size=1000).annotate(c)[0] for c in "abcdefgh"}) > 4


def test_the_constant_axis_says_nothing():
    assert set(ConstantAxis(size=3).annotate(ENGLISH)) == {0} and len(ConstantAxis(size=3).vocabulary) == 3


# ---- speed


def test_axes_by_rule_keep_up_with_a_corpus(axes):
    """Half a million characters a second of processor time; they reach several times that."""
    text = Path(random.__file__).read_text(encoding="utf-8") * 5
    for axis in axes:
        start = time.process_time()
        axis.annotate(text)
        assert len(text) / (time.process_time() - start) > 500_000, axis


def test_an_automaton_that_forgets_gives_the_same():
    computed = []

    def advance(state, character):
        computed.append(character)
        return (state * 31 + ord(character)) % 1009

    text = ENGLISH * 5
    unlimited = Automaton(0, advance, lambda state: state % 7)
    expected = unlimited.trace(text)
    transitions = len(computed)
    assert unlimited.trace(text) == expected and len(computed) == transitions < len(text)
    assert len(repr(unlimited._nodes)) < 30 * len(unlimited._nodes)  # and not of all that can be reached
    forgetful = Automaton(0, advance, lambda state: state % 7, limit=50)
    assert forgetful.trace(text) == expected and len(forgetful._nodes) <= 51
    state = 0
    for character, output in zip(text, expected[1:]):
        found, state = forgetful.step(state, character)
        assert found == output


# ---- a learned axis


def test_a_tree_by_hand():
    axis = make_axis(TREE)
    assert isinstance(axis, DecisionTreeAxis) and axis.length == 3
    # capitals and signs: 1 while fewer than three characters are there, 2 later; else 3, or 0 behind a character > U+2000
    assert axis.annotate("A.B.a€bAb") == [1, 1, 2, 2, 3, 3, 0, 2, 3]
    assert Axis.ids_after(axis, NON_ASCII) == axis.ids_after(NON_ASCII)
    module = {}
    exec(axis.to_python(), module)
    for text in (NON_ASCII, ENGLISH, "", "x", "\ud800"):
        assert module["annotate"](text) == axis.annotate(text)
    assert module["VOCABULARY"] == axis.vocabulary and module["LENGTH"] == 3 and module["axis_id"]("") == 0
    assert "import" not in axis.to_python()
    assert DecisionTreeAxis().annotate("ab") == [0, 0]


@pytest.mark.parametrize("side", ["left", "right", "zigzag"])
def test_a_deep_tree_is_python_too(side):
    """Python takes 100 levels of indentation, and stops at 1000 calls."""
    depth, nodes, code = 1500, [], 3000
    for level in range(depth):
        leaf, inner = 2 * level + 1, 2 * level + 2
        left = side == "left" or (side == "zigzag" and level % 2)
        # What is left over is below `code` where the chain goes left, else above the numbers of the level.
        nodes += [[1, code - level if left else level, *((inner, leaf) if left else (leaf, inner))], [level % 3]]
    nodes.append([3])
    axis = DecisionTreeAxis(nodes=nodes, vocabulary=("a", "b", "c", "d"))
    module = {}
    exec(axis.to_python(), module)
    text = "".join(map(chr, range(4000)))
    found = axis.annotate(text)
    assert module["annotate"](text) == found and set(found) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "nodes, number",
    [
        ([[3]], 0),
        ([[-1]], 0),
        ([[1, 97, 1]], 0),
        ([[0, 97, 1, 2], [0], [1]], 0),
        ([[1, 97, 1, 3], [0], [1]], 0),
        ([[1, 97, 1, 2], [0], [1, 97, 2, 1]], 2),
        ([[1, 97.5, 1, 2], [0], [1]], 0),
    ],
)
def test_nodes_that_make_no_tree_are_named(nodes, number):
    with pytest.raises(ValueError, match=f"`nodes` of axis 'learned': node {number} must be"):
        DecisionTreeAxis(nodes=nodes, vocabulary=("a", "b"))
    with pytest.raises(ValueError, match="at least one node"):
        DecisionTreeAxis(nodes=[])


# ---- names and files


def test_axes_from_names_specs_and_files(axes, tmp_path):
    for axis in [*axes, make_axis("part_of_speech_word"), RandomAxis("noise", size=5, seed=7)]:
        spec = json.loads(json.dumps(axis.to_dict()))
        path = tmp_path / "axis.json"
        path.write_text(json.dumps(spec))
        for again in (make_axis(spec), make_axis(path), make_axis(str(path))):
            assert type(again) is type(axis) and again.to_dict() == axis.to_dict()
            assert (again.name, again.vocabulary, again.causal) == (axis.name, axis.vocabulary, axis.causal)
            if axis.causal:
                assert again.annotate(NON_ASCII) == axis.annotate(NON_ASCII)
        assert make_axis(axis) is axis


def test_a_subclass_does_not_take_a_name():
    class Quiet(ConstantAxis):
        pass

    class Other(ConstantAxis):
        registry_names = {"constant": {}}

    assert type(make_axis("constant")) is ConstantAxis
    assert type(make_axis({"class": "Quiet"})) is Quiet


def test_copies_leave_behind_what_was_remembered(axes):
    for axis in axes:
        expected = axis.annotate(ENGLISH)
        pickled = pickle.dumps(axis)
        assert len(pickled) < 4_000
        for again in (copy.deepcopy(axis), pickle.loads(pickled)):
            assert type(again) is type(axis) and again.annotate(ENGLISH) == expected


@pytest.mark.parametrize(
    "spec, error, message",
    [
        ("syntax", ValueError, "axis 'syntax' is neither a .json file nor one of .*'affix'.*'token_kind'"),
        ({"class": "NoAxis", "name": "mine"}, ValueError, "'mine' is of class 'NoAxis'.*AffixAxis.*import the module"),
        ({"name": "mine"}, TypeError, "a dict with a 'class'"),
        (3, TypeError, "an axis is made from .* got 3"),
        (
            {"class": "RandomAxis", "size": 0},
            ValueError,
            "`size` must be an integer of at least 1 and at most 1000000, got 0",
        ),
        ({"class": "RandomAxis", "seed": 0.5}, ValueError, "`seed` must be an integer, got 0.5"),
        ({"class": "ConstantAxis", "name": "a b"}, ValueError, "must be a Python identifier, got 'a b'"),
        ({"class": "ConstantAxis", "name": "mine", "later": 1}, ValueError, "axis 'mine'.*ConstantAxis.*'later'"),
        ({"class": "DecisionTreeAxis", "name": "mine", "nodes": 5}, ValueError, "axis 'mine'.*DecisionTreeAxis"),
        ({"class": ["ConstantAxis"]}, TypeError, "a dict with a 'class'"),
    ],
)
def test_bad_specs_are_named(spec, error, message):
    with pytest.raises(error, match=message):
        make_axis(spec)


def test_a_file_holds_a_spec_itself(tmp_path):
    path = tmp_path / "axis.json"
    for content in ([1, 2], "bracket", str(path)):
        path.write_text(json.dumps(content))
        with pytest.raises(TypeError, match="a dict with a 'class'"):
            make_axis(path)


def test_bad_axes_and_texts_are_named():
    for vocabulary in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="`vocabulary` of axis 'mine' must hold different entries"):
            Axis("mine", vocabulary)
    with pytest.raises(TypeError, match="`text` must be a string, got bytes"):
        RandomAxis().annotate(b"abc")
    for method in (lambda axis: axis.start(), lambda axis: axis.step((), "a")):
        with pytest.raises(NotImplementedError, match="Axis must define"):
            method(Axis("mine", ["a"]))
        with pytest.raises(ValueError, match="'part_of_speech_word' cannot be continued.*letters to come"):
            method(make_axis("part_of_speech_word"))


# ---- what an axis may not do


@pytest.mark.parametrize("name", ["main", "a b", "../x", "", "1a", None, 3])
def test_names_that_no_log_and_no_file_can_have(name):
    with pytest.raises(ValueError, match="`name` of an axis must"):
        ConstantAxis(name=name)
    with pytest.raises(ValueError, match="`name` of an axis must"):
        make_axis({"class": "ConstantAxis", "name": name})


@pytest.mark.parametrize(
    "axis_class, argument", [("ConstantAxis", "size"), ("RandomAxis", "size"), ("PythonIndentationAxis", "max_level")]
)
@pytest.mark.parametrize("size", [10**12, 1_000_001, 0, -1, 2.0, True, "3", None])
def test_sizes_that_make_no_vocabulary(axis_class, argument, size):
    """Before a list of that length is made."""
    with pytest.raises(ValueError, match=f"`{argument}` must be an integer of at least 1 and at most 1000000, got"):
        make_axis({"class": axis_class, "name": "x", argument: size})


class Careless(Axis):
    """Gives the ids that it is told to, whatever its vocabulary is."""

    def __init__(self, name="careless", ids=(0,)):
        super().__init__(name, ("no", "yes"))
        self.ids = ids

    def start(self):
        return 0

    def step(self, state, characters):
        return self.ids[state % len(self.ids)], state + len(characters)


class Hasty(Careless):
    """Gives too few."""

    def ids_after(self, text):
        return [0] * len(text)


@pytest.mark.parametrize(
    "axis, said",
    [
        (Careless(ids=(0, 1, 2)), "2"),
        (Careless(ids=(0, -1)), "-1"),
        (Careless(ids=(0, 1.0)), r"1\.0"),
        (Careless(ids=(0, "yes")), "'yes'"),
        (Careless(ids=(None,)), "None"),
        (Hasty(), "3 of them"),
    ],
)
def test_ids_outside_of_the_vocabulary_are_named(axis, said):
    with pytest.raises(
        ValueError, match=rf"axis 'careless' \((Careless|Hasty)\) must give 4 ids in \[0, 2\), got {said}\."
    ):
        axis.annotate("abc")
    assert Careless(ids=(0, 1, np.int64(1))).annotate("abc") == [0, 1, 1]
    if isinstance(axis, Hasty):
        return
    processor = MultiGridProcessor(build_tokenizer("byte", []), [axis])
    with pytest.raises(ValueError, match="axis 'careless'"):
        processor("abc")
    model = tiny_multigrid(vocab_size=258, axis_names=["careless"], axis_vocab_sizes=[2])
    inputs = {"input_ids": torch.tensor([[97, 98]]), "axis_ids": torch.zeros(1, 1, 2, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"axis 'careless' must give ids in \[0, 2\)"):
        model.generate(**inputs, max_new_tokens=4, axis_source="annotated", processor=processor)
