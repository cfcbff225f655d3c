"""Axes of natural language: affixes and words by rule, parts of speech by NLTK's tagger, gold tags of a corpus."""

import os
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from .axes import Automaton, Axis


# Frequent affixes and words of English. `-` stands for the rest of the word.
ENGLISH_AFFIXES = (
    *"anti- be- co- counter- de- dis- en- ex- extra- fore- im- in- inter- ir- mid- mis- non- out- over- post- pre- re-".split(),
    *"semi- sub- super- trans- un- under- up- with-".split(),
    *"-able -al -ance -ant -ary -ate -dom -ed -en -ence -ent -er -ers -es -est -ful -hood -ible -ic -ing -ings -ion".split(),
    *"-ions -ish -ism -ist -ity -ive -ize -less -ling -ly -ment -ments -ness -or -ous -s -ship -some -th -ty -ure".split(),
    *"-ward -wards -y".split(),
    *"a an and are as at but by for from had has have he her him his i if is it its me my no not of on or our she".split(),
    *"so that the their them then there they this to us was we were what when where which who will you your".split(),
)


class AffixAxis(Axis):
    """The longest affix or word of a list in the word so far.

    The id of a letter depends on the word up to this letter. A prefix `"un-"` matches from its last letter on in words that
    begin with it, a suffix `"-ing"` where the word so far ends with it and is longer, a word `"the"` where it is the word
    so far. The longest match counts; with equal lengths a word before a suffix before a prefix. Words are runs of letters,
    in lower case. Other characters have id 0.

    Args:
        entries: prefixes, suffixes and words, with ids from 1.

    Raises:
        ValueError: for entries that are not in lower case, have no letters or other characters, and for repeated ones.
    """

    registry_names = {"affix": {}}

    def __init__(self, name: str = "affix", entries: Sequence[str] = ENGLISH_AFFIXES):
        entries = tuple(entries)
        super().__init__(name, ("none", *entries))
        self._words: dict[str, int] = {}
        self._prefixes: dict[str, int] = {}
        self._suffixes: dict[str, int] = {}
        for axis_id, entry in enumerate(entries, start=1):
            letters = entry.strip("-")
            is_entry = entry in (letters, f"{letters}-", f"-{letters}")
            if not (is_entry and letters.isalpha() and letters == letters.lower()):
                raise ValueError(f"`entries` must be like 'un-', '-ing' or 'the' and in lower case, got {entry!r}.")
            kind = self._words if entry == letters else self._prefixes if entry[-1] == "-" else self._suffixes
            kind[letters] = axis_id
        self._heads = {entry[:n] for entry in (*self._words, *self._prefixes) for n in range(len(entry) + 1)}
        self._tails = {entry[:n] for entry in self._suffixes for n in range(len(entry) + 1)} | {""}
        self._automaton = Automaton(_WordSoFar(), self._advance, self._longest)

    def start(self):
        return self._automaton.start

    def step(self, state, characters):
        return self._automaton.step(state, characters)

    def ids_after(self, text):
        return self._automaton.trace(text)

    def arguments(self):
        return {"entries": list(self.vocabulary[1:])}

    def _advance(self, state, character):
        if not character.isalpha():
            return _WordSoFar()
        lower = character.lower()
        character = lower if len(lower) == 1 else character
        head = None if state.head is None else state.head + character
        prefix = head if head in self._prefixes else state.prefix
        tail, is_whole = state.tail + character, state.is_whole
        while tail not in self._tails:
            tail, is_whole = tail[1:], False
        return _WordSoFar(head if head in self._heads else None, prefix, tail, is_whole)

    def _longest(self, state):
        ends = (state.tail[n:] for n in range(int(state.is_whole), len(state.tail)))
        suffix = next((end for end in ends if end in self._suffixes), "")
        found = [(self._words, state.head or ""), (self._suffixes, suffix), (self._prefixes, state.prefix)]
        ids = [(len(letters), kind[letters]) for kind, letters in found if letters in kind]
        return max(ids, key=lambda pair: pair[0])[1] if ids else 0


class _WordSoFar(NamedTuple):
    """The word so far, as far as it matters for the list.

    Attributes:
        head: the word, while it may become a prefix or a word of the list, else `None`.
        prefix: the longest prefix it begins with.
        tail: its longest end that may become a suffix.
        is_whole: whether `tail` is the whole word.
    """

    head: str | None = ""
    prefix: str = ""
    tail: str = ""
    is_whole: bool = True


PENN_TAGS = tuple(
    "# $ '' ( ) , . : CC CD DT EX FW IN JJ JJR JJS LS MD NN NNP NNPS NNS PDT POS PRP PRP$ RB RBR RBS RP SYM TO UH VB VBD "
    "VBG VBN VBP VBZ WDT WP WP$ WRB ``".split()
)
UNIVERSAL_TAGS = tuple(". ADJ ADP ADV CONJ DET NOUN NUM PRON PRT VERB X".split())
TAGSETS = {"universal": UNIVERSAL_TAGS, "penn": PENN_TAGS}
ALIGNMENTS = ("previous_word", "word")
TAG_COLUMNS = {"upos": 3, "xpos": 4}  # of CoNLL-U

_APOSTROPHES = "'\u2019"
_CONTRACTION = re.compile(r"(.+)(n't|'(?:s|re|ve|ll|d|m))", re.IGNORECASE)
_SENTENCE_ENDS = frozenset(".!?")


class PartOfSpeechAxis(Axis):
    """Parts of speech of English, by NLTK's averaged perceptron.

    With `alignment="previous_word"` a token has the tag of the last word that is complete at its end. The tagger runs once, at
    the end of a word, without its features of later words. So the axis is causal, and the tagger less accurate. With
    `alignment="word"`, as in the prototype, each letter has the tag of its word, which the tagger finds from the whole
    sentence, and blanks have id 0. These ids leak later text, so a gain from them is not real.

    Words are runs of letters and digits with apostrophes inside. Contractions are two words (`do`, `n't`), every other
    character is one. A sentence ends with `.`, `!` or `?`.

    Args:
        alignment: `"previous_word"` or `"word"`.
        tagset: `"universal"` for 12 tags or `"penn"` for the 45 tags of the tagger.

    Raises:
        ValueError: for an unknown alignment or tag set.
        ImportError, LookupError: when used without NLTK or its data.
    """

    registry_names = {
        "part_of_speech": {},
        "part_of_speech_word": {"name": "part_of_speech_word", "alignment": "word"},
    }
    why_not_causal = (
        "with alignment='word' a letter has the tag of the whole word, which depends on letters to come; use "
        "alignment='previous_word'."
    )

    def __init__(self, name: str = "part_of_speech", alignment: str = "previous_word", tagset: str = "universal"):
        if alignment not in ALIGNMENTS:
            raise ValueError(f"`alignment` must be one of {ALIGNMENTS}, got {alignment!r}.")
        if tagset not in tuple(TAGSETS):
            raise ValueError(f"`tagset` must be one of {tuple(TAGSETS)}, got {tagset!r}.")
        super().__init__(name, ("none", *TAGSETS[tagset]))
        self.alignment, self.tagset, self.causal = alignment, tagset, alignment == "previous_word"

    def start(self):
        self._refuse_if_not_causal()
        return _Reading()

    def step(self, state, characters):
        self._refuse_if_not_causal()
        for character in characters:
            state = self._read(state, character)
        return state.axis_id, state

    def ids_after(self, text):
        return super().ids_after(text) if self.causal else self._ids_of_words(text)

    def arguments(self):
        return {"alignment": self.alignment, "tagset": self.tagset}

    def _read(self, state, character):
        if state.word:
            if character.isalnum() or (character in _APOSTROPHES and state.word[-1] not in _APOSTROPHES):
                return state._replace(word=state.word + character)
            for word in _pieces(state.word):
                state = self._finish(state, word)
        if character.isalnum():
            return state._replace(word=character)
        return state._replace(word="") if character.isspace() else self._finish(state, character)

    def _finish(self, state, word):
        tag = _tag_from_the_left(word, state.words, state.tags)
        axis_id = self._id(tag)
        if word in _SENTENCE_ENDS:
            return _Reading(axis_id=axis_id)
        normal = _tagger().normalize(word)
        return _Reading("", (state.words[1], normal), (state.tags[1], tag), axis_id)

    def _ids_of_words(self, text):
        ids, sentence = [0] * (len(text) + 1), []
        words = list(_split(text))
        for number, (_, end, word) in enumerate(words):
            sentence.append(words[number])
            if word in _SENTENCE_ENDS or end == words[-1][1]:
                tagged = _tagger().tag([word for _, _, word in sentence])
                for (start, end, _), (_, tag) in zip(sentence, tagged):
                    ids[start + 1 : end + 1] = [self._id(tag)] * (end - start)
                sentence = []
        return ids

    def _id(self, tag):
        return self.vocabulary.index(_universal(tag) if self.tagset == "universal" else tag)


class _Reading(NamedTuple):
    """State of the part-of-speech axis.

    Attributes:
        word: the word so far.
        words: the two words before it, the nearer one last, normalised by the tagger.
        tags: their tags.
        axis_id: the id of the last complete word.
    """

    word: str = ""
    words: tuple = ("-START-", "-START2-")
    tags: tuple = ("-START2-", "-START-")
    axis_id: int = 0


def _pieces(word):
    """Words of the tagger: `don't` is `do n't`, `dogs'` is `dogs '`."""
    word = word.replace("\u2019", "'")
    if word[-1] == "'":
        return [*_pieces(word[:-1]), "'"]
    match = _CONTRACTION.fullmatch(word)
    return list(match.groups()) if match else [word]


def _split(text):
    """The words of a text as `(start, end, word)`."""
    for match in re.finditer(rf"[^\W_]+(?:[{_APOSTROPHES}][^\W_]+)*|[^\w\s]|_", text):
        start = match.start()
        for word in _pieces(match.group()) if match.group()[0].isalnum() else [match.group()]:
            yield start, start + len(word), word
            start += len(word)


@lru_cache(maxsize=2**18)
def _tag_from_the_left(word, words, tags):
    """The tag of a word, without features of later words."""
    tagger = _tagger()
    if word in tagger.tagdict:
        return tagger.tagdict[word]
    context = [*words, tagger.normalize(word), "", ""]
    features = tagger._get_features(0, word, context, tags[1], tags[0])
    return tagger.model.predict({name: value for name, value in features.items() if not name.startswith("i+")})[0]


@cache
def _tagger():
    return _from_nltk("averaged_perceptron_tagger_eng", lambda nltk: nltk.tag.perceptron.PerceptronTagger())


@cache
def _universal(tag):
    return _from_nltk("universal_tagset", lambda nltk: nltk.tag.map_tag("en-ptb", "universal", tag))


def _from_nltk(data, load):
    """Result of `load(nltk)`. Raises errors with instructions where NLTK or its data are missing."""
    try:
        import nltk
        import nltk.corpus  # noqa: F401 (`load` reads both)
        import nltk.tag  # noqa: F401
    except ImportError as error:
        raise ImportError("this axis needs NLTK: `pip install nltk`.") from error
    # NLTK reads the variable only when it is imported.
    folders = [folder for folder in os.environ.get("NLTK_DATA", "").split(os.pathsep) if folder]
    nltk.data.path[:0] = [folder for folder in folders if folder not in nltk.data.path]
    try:
        return load(nltk)
    except LookupError as error:
        raise LookupError(
            f"NLTK's data {data!r} are not on this machine: get them with `python -m nltk.downloader {data}`, or set the "
            f"environment variable NLTK_DATA to a folder that holds them; looked in {nltk.data.path}."
        ) from error


class TaggedText(NamedTuple):
    """A text with tagged words.

    Attributes:
        text: the text.
        words: `(start, end, tag)` of each tagged word, in order.
    """

    text: str
    words: tuple


class GoldTagAxis(Axis):
    """Gold tags of the words of a corpus. Each character has the tag of its word.

    Args:
        texts: the corpus, from [`read_conllu`] or [`read_nltk_tagged`]. It is not saved with a processor.
        vocabulary: `"none"`, then all tags. Defaults to the tags of `texts`.

    Raises:
        ValueError: for a tag that is not in the vocabulary, and when used, for a text that is not in the corpus.
    """

    causal = False
    _not_saved = ("texts",)
    why_not_causal = "gold tags exist for texts of a corpus only, and were given with the whole sentence in view."

    def __init__(self, name: str = "gold", texts: Sequence[TaggedText] = (), vocabulary: Sequence[str] | None = None):
        tags = sorted({tag for _, words in texts for _, _, tag in words})
        super().__init__(name, ("none", *tags) if vocabulary is None else vocabulary)
        missing = [tag for tag in tags if tag not in self.vocabulary]
        if missing:
            raise ValueError(f"`vocabulary` of axis {name!r} lacks tags of `texts`: {missing}.")
        self._words = dict(texts)

    def ids_after(self, text):
        if text not in self._words:
            raise ValueError(f"axis {self.name!r} has no gold tags for the text that begins with {text[:40]!r}.")
        ids = [0] * (len(text) + 1)
        for start, end, tag in self._words[text]:
            ids[start + 1 : end + 1] = [self.vocabulary.index(tag)] * (end - start)
        return ids

    def arguments(self):
        return {"vocabulary": list(self.vocabulary)}

    def __reduce__(self):
        texts = [TaggedText(text, words) for text, words in self._words.items()]
        return type(self), (self.name, texts, self.vocabulary)


def read_conllu(path: str | Path, tags: str = "upos") -> list[TaggedText]:
    """Read the documents of a CoNLL-U file, one text each.

    A word of several syntactic words has their tags, joined by `+`. Files of four columns (form, UPOS, XPOS, and 1 before a
    blank) are read as well. Their documents begin where the document in `# sent_id = document-number` changes.

    Args:
        path: the file.
        tags: `"upos"` or `"xpos"`.

    Raises:
        ValueError: for other `tags`, and for a line without ten or four columns.
    """
    if tags not in tuple(TAG_COLUMNS):
        raise ValueError(f"`tags` must be one of {tuple(TAG_COLUMNS)}, got {tags!r}.")
    documents, document, name, joined = [], _Document(), None, {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        cells = line.split("\t")
        if line.startswith("#") and len(cells) != 4:
            key, _, value = line[1:].partition("=")
            new_name = value.strip().rpartition("-")[0] if key.strip() == "sent_id" else name
            if key.strip().startswith("newdoc") or (new_name != name and name is not None):
                documents.append(document)
                document = _Document()
            name = new_name
        elif len(cells) == 4:
            document.add(cells[0], cells[TAG_COLUMNS[tags] - 2], cells[3] == "1")
        elif len(cells) == 10:
            index, form, tag = cells[0], cells[1], cells[TAG_COLUMNS[tags]]
            if "-" in index:
                joined = {
                    "form": form,
                    "last": int(index.split("-")[1]),
                    "tags": [],
                    "blank": _blank_follows(cells[9]),
                }
            elif joined and "." not in index:
                joined["tags"].append(tag)
                if int(index) == joined["last"]:
                    document.add(joined["form"], "+".join(joined["tags"]), joined["blank"])
                    joined = {}
            elif "." not in index:
                document.add(form, tag, _blank_follows(cells[9]))
        elif line.strip():
            raise ValueError(f"line {number} of {path} has {len(cells)} columns; CoNLL-U has ten.")
    return [each.finish() for each in (*documents, document) if each.words]


def read_nltk_tagged(corpus: str, fileids=None, tagset: str | None = None) -> list[TaggedText]:
    """Read the files of a tagged corpus of NLTK, one text each, with blanks between words and a sentence in each line.

    Args:
        corpus: name of the corpus, like `"brown"`.
        fileids: files to read. Defaults to all.
        tagset: a tag set like `"universal"`. Defaults to that of the corpus.

    Raises:
        ImportError, LookupError: without NLTK or the corpus.
    """

    def load(nltk):
        reader = getattr(nltk.corpus, corpus)
        return [list(reader.tagged_sents(fileid, tagset=tagset)) for fileid in fileids or reader.fileids()]

    texts = []
    for sentences in _from_nltk(corpus, load):
        document = _Document()
        for sentence in sentences:
            for word, tag in sentence:
                document.add(word, tag, True)
            document.end_line()
        texts.append(document.finish())
    return texts


def _blank_follows(misc):
    return "SpaceAfter=No" not in misc.split("|")


class _Document:
    """A text that is joined from words."""

    def __init__(self):
        self.parts, self.words, self.length = [], [], 0

    def add(self, form, tag, blank):
        if tag:
            self.words.append((self.length, self.length + len(form), tag))
        self._write(form + " " * blank)

    def end_line(self):
        self._write("\n")

    def finish(self):
        return TaggedText("".join(self.parts), tuple(self.words))

    def _write(self, text):
        self.parts.append(text)
        self.length += len(text)


__all__ = [
    "ENGLISH_AFFIXES",
    "PENN_TAGS",
    "UNIVERSAL_TAGS",
    "AffixAxis",
    "GoldTagAxis",
    "PartOfSpeechAxis",
    "TaggedText",
    "read_conllu",
    "read_nltk_tagged",
]
