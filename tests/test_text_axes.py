"""Affixes, parts of speech and gold tags: what they say, and what they say when something is missing."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_heptapod import AffixAxis, GoldTagAxis, PartOfSpeechAxis, find_lookahead
from modeling_heptapod.multigrid.text_axes import ENGLISH_AFFIXES, TaggedText, read_conllu, read_nltk_tagged


REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"


@pytest.fixture
def nltk_data(monkeypatch):
    pytest.importorskip("nltk", reason="the extra `axes` is not installed")
    if not (SHARED / "nltk_data").is_dir():
        pytest.skip("no NLTK data in ../shared/data/nltk_data next to the repository")
    monkeypatch.setenv("NLTK_DATA", str(SHARED / "nltk_data"))


def said(axis, text):
    return [axis.vocabulary[axis_id] for axis_id in axis.annotate(text)]


# ---- affixes


def longest_affix(word, entries):
    """The rule in plain words: `word` is a word so far."""
    word = "".join(c.lower() if len(c.lower()) == 1 else c for c in word)
    fitting = [entry for entry in entries if entry == word]
    fitting += [entry for entry in entries if entry[0] == "-" and word.endswith(entry[1:]) and len(word) >= len(entry)]
    fitting += [entry for entry in entries if entry[-1] == "-" and word.startswith(entry[:-1])]
    return max(fitting, key=lambda entry: len(entry.strip("-")), default="none")


def words_so_far(text):
    word = ""
    for character in text:
        word = word + character if character.isalpha() else ""
        yield word


def test_affixes_by_hand():
    axis = AffixAxis(entries=["un-", "under-", "-ing", "-ings", "-s", "ring", "sing", "i"])
    assert said(axis, "Unring") == ["none", "un-", "un-", "un-", "un-", "-ing"]
    assert said(axis, "understandings") == ["none", *["un-"] * 3, *["under-"] * 10]
    assert said(axis, "sings i Sing") == [
        *["none", "none", "none", "sing", "-ings"],
        *["none", "i", "none"],
        *["none", "none", "none", "sing"],
    ]
    assert said(axis, "s ss ing ring's") == [
        *["none", "none", "none", "-s", "none"],
        *["i", "none", "none", "none"],  # nothing stands before the suffix
        *["none", "none", "none", "ring", "none", "none"],
    ]


@pytest.mark.parametrize(
    "entries", [ENGLISH_AFFIXES, ("ab-", "aba-", "-ba", "-aba", "-abab", "a", "abab", "-b", "é-")]
)
def test_the_longest_affix_is_found(entries):
    axis = AffixAxis(entries=entries)
    text = Path(__file__).read_text(encoding="utf-8") + "abababa ABABB xabab babab éab İab baba\n" * 2
    texts = [text]
    if SHARED.is_dir():
        texts.append((SHARED / "fairy_tales" / "grimm_taylor.txt").read_text(encoding="utf-8")[20_000:60_000])
    for text in texts:
        assert said(axis, text) == [longest_affix(word, entries) for word in words_so_far(text)]


@pytest.mark.parametrize("entry", ["", "-", "-ing-", "a b", "Un-", "x2", "--ing"])
def test_entries_that_are_no_affixes_are_named(entry):
    with pytest.raises(ValueError, match="`entries` must be like 'un-', '-ing' or 'the'"):
        AffixAxis(entries=["the", entry])
    with pytest.raises(ValueError, match="different entries"):
        AffixAxis(entries=["the", "the"])


# ---- parts of speech


def test_the_tag_of_the_last_finished_word(nltk_data):
    text = "The dogs don't sing. He's 'big'\u2019 _x"
    axis = PartOfSpeechAxis(tagset="penn")
    tags = said(axis, text)
    assert len(tags) == len(text)
    # Each word and what it is taken for; its tag shows from the character that ends it, signs at once.
    assert tags[:4] == ["none"] * 3 + ["DT"]
    assert tags[4:8] == ["DT"] * 4 and tags[8] == "NNS"
    assert tags[text.index("don")] == "NNS" and tags[14] == "RB"  # n't
    assert tags[text.index("sing") + 3] == "RB" and tags[text.index(".")] == "."
    assert tags[text.index("He") + 1] == "." and tags[text.index(" 'big")] == "VBZ"
    assert tags[text.index("big")] != "VBZ"  # the sign before it has been read
    assert tags[text.index("_x") + 1] == tags[text.index("_x")]


def test_finished_words_keep_their_tags(nltk_data):
    """Whatever follows: the tag of a finished word is the one it had when it was finished."""
    axis = PartOfSpeechAxis()
    start = "The old man the boats; time flies like an arrow"
    tags = axis.annotate(start)
    for end in (" quickly", "s. And", "\n\n", "'s", "-like"):
        assert axis.annotate(start + end)[: len(start)] == tags


def test_a_sentence_is_tagged_as_if_none_were_before_it(nltk_data):
    axis = PartOfSpeechAxis(tagset="penn")
    for sentence in ("Found gold ", "Shot dogs bark ", "Work hurts ", "Cut wood burns "):
        first = sentence.index(" ")  # until then the last finished word is one of the sentence before
        for before in ("He said it. ", "The old!", "To be or not to?"):
            assert axis.annotate(before + sentence)[len(before) + first :] == axis.annotate(sentence)[first:]


def test_the_whole_word_has_its_tag(nltk_data):
    axis = PartOfSpeechAxis("leak", alignment="word")
    assert axis.name == "leak" and not axis.causal and axis.why_not_causal
    tags = said(axis, "Dogs don't sing. Sing dogs!")
    assert tags[:5] == ["NOUN"] * 4 + ["none"] and tags[5:10] == ["VERB"] * 2 + ["ADV"] * 3
    assert tags[11:15] == ["VERB"] * 4 and tags[15] == "."
    assert find_lookahead(axis, "Dogs sing") is not None and find_lookahead(axis, "a") is None


def test_tags_agree_with_nltk_on_whole_sentences(nltk_data):
    import nltk

    axis = PartOfSpeechAxis(alignment="word", tagset="penn")
    for sentence in ("The quick brown fox jumps over the lazy dog .", "What did she see ? Nothing much , he said !"):
        tags, place = said(axis, sentence), 0
        whole = sentence.replace("?", "?|").split("|")
        for word, tag in [pair for part in whole for pair in nltk.pos_tag(part.split())]:
            assert set(tags[place : place + len(word)]) == {tag}, word
            place += len(word) + 1


def test_little_is_lost_without_the_words_to_come(nltk_data):
    """On gold tags the causal tagger is right nearly as often as the one that looks ahead."""
    texts = read_conllu(SHARED / "ud_ewt" / "dev.tsv", "xpos")[:60]
    right = {}
    for alignment in ("word", "previous_word"):
        axis = PartOfSpeechAxis(alignment=alignment, tagset="penn")
        found = []
        for text, words in texts:
            tags = said(axis, text + " ")
            # Where a blank follows, the blank shows the tag of the word before it.
            alone = [
                (end, tag) for start, end, tag in words if text[start:end].isalpha() and text[end : end + 1] == " "
            ]
            found += [tags[end if axis.causal else end - 1] == tag for end, tag in alone]
        right[alignment] = sum(found) / len(found)
    assert 0.7 < right["word"] - 0.06 < right["previous_word"] < right["word"]


@pytest.mark.parametrize("tagset, size", [("universal", 13), ("penn", 46)])
def test_vocabularies_hold_all_tags(nltk_data, tagset, size):
    from modeling_heptapod.multigrid.text_axes import PENN_TAGS, _tagger, _universal

    axis = PartOfSpeechAxis(tagset=tagset)
    assert len(axis.vocabulary) == size
    assert set(PENN_TAGS) == _tagger().classes
    assert {_universal(tag) for tag in PENN_TAGS} <= set(PartOfSpeechAxis().vocabulary)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"`alignment` must be one of \('previous_word', 'word'\), got 'next'"):
        PartOfSpeechAxis(alignment="next")
    with pytest.raises(ValueError, match=r"`tagset` must be one of \('universal', 'penn'\), got 'brown'"):
        PartOfSpeechAxis(tagset="brown")


def errors(lines, folder):
    """What each line of code says in a new interpreter without NLTK's data."""
    code = "import sys\n" + "".join(
        f"try:\n    {line}\nexcept Exception as error:\n    print(repr(error))\n" for line in lines
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HOME": str(folder), "NLTK_DATA": str(folder / "nothing")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_missing_data_are_named_and_how_to_get_them(tmp_path):
    pytest.importorskip("nltk", reason="the extra `axes` is not installed")
    lines = [
        "import modeling_heptapod.multigrid.text_axes as axes",
        "axes.PartOfSpeechAxis().annotate('a b')",
        "axes.PartOfSpeechAxis(alignment='word').annotate('a b')",
        "axes.read_nltk_tagged('brown')",
    ]
    said = errors(lines, tmp_path)
    resources = ["averaged_perceptron_tagger_eng"] * 2 + ["brown"]
    assert len(said) == 3
    for error, resource in zip(said, resources):
        assert error.startswith("LookupError(") and f"`python -m nltk.downloader {resource}`" in error
        assert "NLTK_DATA" in error and str(tmp_path / "nothing") in error


@pytest.mark.slow
def test_missing_nltk_is_named(tmp_path):
    """The axis is made without it, so a processor loads; it is needed when the axis is used."""
    lines = [
        "sys.modules['nltk'] = None; import modeling_heptapod.multigrid.text_axes as axes",
        "axis = axes.PartOfSpeechAxis()",
        "axis.annotate('a b')",
    ]
    assert errors(lines, tmp_path) == ["ImportError('this axis needs NLTK: `pip install nltk`.')"]


# ---- gold tags

CONLLU = """\
# newdoc id = one
# sent_id = one-s1
# text = ¡Vámonos al mar!
1	¡	¡	PUNCT	fia	_	2	punct	_	SpaceAfter=No
2-3	Vámonos	_	_	_	_	_	_	_	_
2	Vamos	ir	VERB	v	_	0	root	_	_
3	nos	nosotros	PRON	p	_	2	iobj	_	_
4-5	al	_	_	_	_	_	_	_	_
4	a	a	ADP	s	_	6	case	_	_
5	el	el	DET	d	_	6	det	_	_
6	mar	mar	NOUN	n	_	2	obl	_	Gloss=sea|SpaceAfter=No
6.1	_	_	VERB	v	_	_	_	_	_
7	!	!	PUNCT	fat	_	2	punct	_	_

# sent_id = one-s2
1	Sí	sí	INTJ	i	_	0	root	_	_

# newdoc id = two
# sent_id = two-s1
1	No	no	INTJ	i	_	0	root	_	SpaceAfter=No
"""


def test_conllu_by_hand(tmp_path):
    path = tmp_path / "es.conllu"
    path.write_text(CONLLU, encoding="utf-8")
    one, two = read_conllu(path)
    assert one.text == "¡Vámonos al mar! Sí " and two == TaggedText("No", ((0, 2, "INTJ"),))
    words = {one.text[start:end]: tag for start, end, tag in one.words}
    assert words == {"¡": "PUNCT", "Vámonos": "VERB+PRON", "al": "ADP+DET", "mar": "NOUN", "!": "PUNCT", "Sí": "INTJ"}
    assert [tag for *_, tag in read_conllu(path, "xpos")[0].words] == ["fia", "v+p", "s+d", "n", "fat", "i"]
    with pytest.raises(ValueError, match=r"`tags` must be one of \('upos', 'xpos'\), got 'deprel'"):
        read_conllu(path, "deprel")
    path.write_text("# a\n1\tb\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2 of .*es.conllu has 2 columns"):
        read_conllu(path)


def test_gold_tags_stand_at_their_words(tmp_path):
    path = tmp_path / "es.conllu"
    path.write_text(CONLLU, encoding="utf-8")
    texts = read_conllu(path)
    axis = GoldTagAxis("upos", texts)
    assert axis.vocabulary == ("none", "ADP+DET", "INTJ", "NOUN", "PUNCT", "VERB+PRON")
    expected = ["PUNCT", *["VERB+PRON"] * 7, "none", *["ADP+DET"] * 2, "none", *["NOUN"] * 3, "PUNCT", "none"]
    assert said(axis, texts[0].text) == [*expected, "INTJ", "INTJ", "none"]
    assert axis.annotate("No", [(0, 1), (1, 2)]) == [2, 2]
    with pytest.raises(ValueError, match="'upos' has no gold tags for the text that begins with 'Nos'"):
        axis.annotate("Nos")
    with pytest.raises(ValueError, match="'upos' cannot be continued.*whole sentence"):
        axis.start()
    with pytest.raises(ValueError, match=r"`vocabulary` of axis 'gold' lacks tags of `texts`: \['INTJ'\]"):
        GoldTagAxis(texts=texts[1:], vocabulary=["none", "NOUN"])
    for again in (copy.deepcopy(axis), pickle.loads(pickle.dumps(axis))):
        assert said(again, texts[0].text) == said(axis, texts[0].text)
    assert axis.to_dict() == {"class": "GoldTagAxis", "name": "upos", "vocabulary": list(axis.vocabulary)}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no corpora in ../shared/data next to the repository")
def test_gold_tags_of_a_treebank():
    texts = read_conllu(SHARED / "ud_ewt" / "dev.tsv")
    assert sum(len(words) for _, words in texts) == 25_147 and len(texts) > 100
    assert texts[0].text.startswith("From the AP comes this story :")
    axis = GoldTagAxis(texts=texts)
    assert len(axis.vocabulary) == 18
    for text, words in texts[:20]:
        tags = said(axis, text)
        for start, end, tag in words:
            assert set(tags[start:end]) == {tag} and text[start:end].strip() == text[start:end]


def test_gold_tags_of_an_nltk_corpus(nltk_data):
    (text,) = read_nltk_tagged("brown", fileids=["ca01"], tagset="universal")
    assert text.text.startswith("The Fulton County Grand Jury said Friday an investigation")
    assert text.text.count("\n") == 98 and text.words[:2] == ((0, 3, "DET"), (4, 10, "NOUN"))
    assert said(GoldTagAxis(texts=[text]), text.text)[:5] == ["DET"] * 3 + ["none", "NOUN"]
