"""Meta axes of natural text: affixes and words by rule, parts of speech by NLTK's tagger, gold tags of a corpus."""

from collections.abc import Sequence
from typing import NamedTuple

from .meta_axes import Automaton, MetaAxis


# Frequent in English, and long enough to mean something; `-` says where the rest of the word stands.
ENGLISH_AFFIXES = (
    *"anti- be- co- counter- de- dis- en- ex- extra- fore- im- in- inter- ir- mid- mis- non- out- over- post- pre- re-".split(),
    *"semi- sub- super- trans- un- under- up- with-".split(),
    *"-able -al -ance -ant -ary -ate -dom -ed -en -ence -ent -er -ers -es -est -ful -hood -ible -ic -ing -ings -ion".split(),
    *"-ions -ish -ism -ist -ity -ive -ize -less -ling -ly -ment -ments -ness -or -ous -s -ship -some -th -ty -ure".split(),
    *"-ward -wards -y".split(),
    *"a an and are as at but by for from had has have he her him his i if is it its me my no not of on or our she".split(),
    *"so that the their them then there they this to us was we were what when where which who will you your".split(),
)


class AffixAxis(MetaAxis):
    """The longest affix or word of a list in the word so far.

    At each letter the word is known up to this letter: a prefix `"un-"` is seen in a word that begins with it, from its
    last letter on; a suffix `"-ing"` where the word so far ends with it and has more before it; a word `"the"` where
    it is the word so far. The longest entry counts; of equal ones a word before a suffix before a prefix. Words are
    runs of letters, upper case counts as lower case, what is no letter has id 0.

    Args:
        entries: prefixes, suffixes and words; their ids count from 1.

    Raises:
        ValueError: for an entry without letters, with anything else in it, or in upper case, and for repeated ones.
    """

    short_names = {"affix": {}}

    def __init__(self, name: str = "affix", entries: Sequence[str] = ENGLISH_AFFIXES):
        entries = tuple(entries)
        super().__init__(name, ("none", *entries))
        self._words, self._prefixes, self._suffixes = {}, {}, {}
        for meta_id, entry in enumerate(entries, start=1):
            letters = entry.strip("-")
            if (
                not letters.isalpha()
                or letters != letters.lower()
                or entry not in (letters, f"{letters}-", f"-{letters}")
            ):
                raise ValueError(f"`entries` must be like 'un-', '-ing' or 'the' and in lower case, got {entry!r}.")
            kind = self._words if entry == letters else self._prefixes if entry[-1] == "-" else self._suffixes
            kind[letters] = meta_id
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
    """As much of a word as the list can tell apart.

    Attributes:
        head: the word, while it may become a prefix or a word of the list, else `None`.
        prefix: the longest prefix it begins with.
        tail: the longest end of it that may become a suffix.
        is_whole: whether that is all of it.
    """

    head: str | None = ""
    prefix: str = ""
    tail: str = ""
    is_whole: bool = True


__all__ = ["ENGLISH_AFFIXES", "AffixAxis"]
