"""Axes of a text: one id per token.

An axis reads text from left to right. It is *causal* when the id of a token does not depend on later text. A causal axis can
annotate text while a model generates it, and a gain from it is real. An axis with lookahead leaks text that the model has yet
to predict. [`find_lookahead`] finds lookahead on a given text.

    class Vowels(Axis):
        def __init__(self, name="vowels"):
            super().__init__(name, ("no", "yes"))

        def start(self):
            return 0

        def step(self, state, characters):
            for character in characters:
                state = int(character in "aeiou")
            return state, state

Id 0 is that of the empty text. Special tokens and pads have id 0, too.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from inspect import Parameter, signature
from typing import Any, ClassVar

import numpy as np


LARGEST_VOCABULARY = 1_000_000
AXIS_CLASSES: dict[str, type["Axis"]] = {}  # every subclass of Axis that has been imported, by name


class Axis:
    """Base class of axes: an id per token, from the text and the ends of its tokens.

    A subclass defines `start` and `step`, and `arguments` if its `__init__` takes more than `name`. Where stepping is too slow
    for a corpus it may define `ids_after` as well, with the same ids. A subclass that is not causal defines `ids_after` only.
    [`check_axis`] checks these rules on a text.

    Args:
        name: name in configs, losses and logs; a Python identifier.
        vocabulary: meaning of each id.

    Attributes:
        causal (`bool`): whether an id depends on past text only.
        why_not_causal (`str`): the reason where it does not.
        registry_names (`dict`): names of the class for `make_axis`, with arguments for its `__init__`. They are not inherited.

    Raises:
        ValueError: for a name that is no identifier, for the name "main", which is that of the text, and for a vocabulary
            that is empty or has repeated entries.
    """

    causal: bool = True
    why_not_causal = "its ids depend on later text."
    _code: ClassVar[str]  # of a file from `load_axis_class`
    registry_names: ClassVar[dict[str, dict[str, Any]]] = {}
    _not_saved: ClassVar[tuple[str, ...]] = ()  # arguments of `__init__` that are too large to be saved

    def __init__(self, name: str, vocabulary: Sequence[str]):
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"`name` of an axis must be a Python identifier, got {name!r}.")
        if name == "main":
            raise ValueError("`name` of an axis must not be 'main', the name of the text itself in logs.")
        self.name, self.vocabulary = name, tuple(vocabulary)
        if not self.vocabulary or len(set(self.vocabulary)) < len(self.vocabulary):
            raise ValueError(f"`vocabulary` of axis {name!r} must hold different entries, got {self.vocabulary}.")

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            AXIS_CLASSES[cls.__name__] = cls

    def __repr__(self):
        return f"{type(self).__name__}(name={self.name!r}, {len(self.vocabulary)} ids, causal={self.causal})"

    def start(self) -> Hashable:
        """The state before any text. States are never changed in place, so beams may share them.

        Raises:
            ValueError: from an axis that is not causal.
        """
        self._refuse_if_not_causal()
        raise NotImplementedError(f"{type(self).__name__} must define `start`.")

    def step(self, state, characters: str) -> tuple[int, Hashable]:
        """Read one more token.

        Args:
            state: from `start` or the last step.
            characters: characters that the token completes, none for a token that is a part of a character.

        Returns:
            The id of the token and the state after it, in this order. The id is a function of this state. So a step over several
            characters gives what steps over each of them give, and a step over none gives the last id again.

        Raises:
            ValueError: from an axis that is not causal.
        """
        self._refuse_if_not_causal()
        raise NotImplementedError(f"{type(self).__name__} must define `step`.")

    def ids_after(self, text: str) -> list[int]:
        """The id after each number of characters, 0 to `len(text)`, by `step`."""
        axis_id, state = self.step(self.start(), "")
        ids = [axis_id]
        for character in text:
            axis_id, state = self.step(state, character)
            ids.append(axis_id)
        return ids

    def annotate(self, text: str, offsets=None) -> list[int]:
        """An id for each token of a text.

        Args:
            text: the text.
            offsets: `(start, end)` of each token, a list or `[tokens, 2]`, as fast tokenizers return them. Of several tokens
                that share a character only the last one reads it. The last token completes its characters, so annotate
                before truncation. Without offsets each character is a token.

        Raises:
            TypeError: unless `text` is a string.
            ValueError: for offsets outside of the text or in wrong order, and where the code of the axis returns ids outside
                of its vocabulary.
        """
        if not isinstance(text, str):
            raise TypeError(f"`text` must be a string, got {type(text).__name__}.")
        ids = self.ids_after(text)
        self._check_ids(ids, len(text) + 1)
        if offsets is None:
            return ids[1:]
        return [ids[length] for length in visible_lengths(offsets, len(text))]

    def _check_ids(self, ids: Sequence[int], number: int) -> None:
        """Raise a `ValueError` unless `ids` of this axis are `number` ids of its vocabulary."""
        array = np.asarray(ids)
        size = len(self.vocabulary)
        if array.shape != (number,) or array.dtype.kind not in "iub" or array.min() < 0 or array.max() >= size:
            wrong = [x for x in ids if not isinstance(x, (int, np.integer)) or not 0 <= x < size]
            said = f"{wrong[0]!r}" if wrong else f"{len(ids)} of them"
            raise ValueError(
                f"axis {self.name!r} ({type(self).__name__}) must give {number} ids in [0, {size}), got {said}."
            )

    def arguments(self) -> dict:
        """Arguments of `__init__` besides `name` that make this axis again, as values for JSON."""
        return {}

    def to_dict(self) -> dict:
        """This axis as values for JSON, which `make_axis` reads.

        Raises:
            ValueError: where `arguments` lacks an argument of `__init__`, which would have its default after loading.
        """
        arguments = {"name": self.name, **self.arguments()}
        lost = [
            name
            for name, parameter in signature(type(self)).parameters.items()
            if parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
            and name not in arguments
            and name not in self._not_saved
        ]
        if lost:
            raise ValueError(f"`arguments` of {type(self).__name__} must return {lost} of its `__init__`, too.")
        return {"class": type(self).__name__, **arguments}

    def __reduce__(self):
        # Copies and pickles are made from the arguments, without cached transitions.
        return partial(type(self), name=self.name, **self.arguments()), ()

    def _refuse_if_not_causal(self):
        if not self.causal:
            raise ValueError(f"axis {self.name!r} cannot be continued while text is written: {self.why_not_causal}")


class ConstantAxis(Axis):
    """A constant id: a control with the cost of an axis and without information.

    Args:
        size: entries of its vocabulary. Only the first is used.
    """

    registry_names = {"constant": {}}

    def __init__(self, name: str = "constant", size: int = 1):
        super().__init__(name, _numbers("size", size))

    def start(self):
        return ()

    def step(self, state, characters):
        return 0, state

    def ids_after(self, text):
        return [0] * (len(text) + 1)

    def arguments(self):
        return {"size": len(self.vocabulary)}


class RandomAxis(Axis):
    """A random id: a control without information.

    The id is a hash of the seed and the whole text so far. It is the same for the same text, and says nothing about later
    text or the position, as a random sequence that restarts with each text would.

    Args:
        size: number of ids.
        seed: seed of the hash.
    """

    registry_names = {"random": {}}

    def __init__(self, name: str = "random", size: int = 16, seed: int = 0):
        super().__init__(name, _numbers("size", size))
        if type(seed) is not int:
            raise ValueError(f"`seed` must be an integer, got {seed!r}.")
        self.seed = seed

    def start(self):
        return None

    def step(self, state, characters):
        for character in characters:
            state = _mix(_mix(self.seed) if state is None else state, ord(character))
        return 0 if state is None else (state >> 33) % len(self.vocabulary), state

    def arguments(self):
        return {"size": len(self.vocabulary), "seed": self.seed}


def check_vocabulary_size(name: str, size: int) -> None:
    """Raise a `ValueError` about the argument `name` unless a vocabulary can have this size."""
    if type(size) is not int or not 1 <= size <= LARGEST_VOCABULARY:
        raise ValueError(f"`{name}` must be an integer of at least 1 and at most {LARGEST_VOCABULARY}, got {size!r}.")


def _mix(state, number=0):
    # The multiplier of Knuth's MMIX generator; the upper half of the product depends on every bit that went in.
    return (state + number + 1) * 6364136223846793005 & 0xFFFFFFFFFFFFFFFF


def _numbers(name, size):
    check_vocabulary_size(name, size)
    return [str(number) for number in range(size)]


def visible_lengths(offsets, length: int) -> list[int]:
    """Number of complete characters of a text after each token.

    Args:
        offsets: `(start, end)` of each token, with `start == end` for a token without text.
        length: number of characters of the text.

    Raises:
        ValueError: for offsets outside of the text or in wrong order.
    """
    start, end = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    has_text = start != end
    # A character is complete when the next token with text begins after it.
    following = np.append(np.where(has_text, start, length), length)[::-1]
    following = np.minimum.accumulate(following)[::-1][1:]
    wrong = has_text & ((start < 0) | (start > end) | (end > length) | (start > following))
    if wrong.any():
        number = int(wrong.argmax())
        raise ValueError(
            f"`offsets` must lie in the text of {length} characters and not run backwards, token {number} has "
            f"({start[number]}, {end[number]})."
        )
    # After a token without text as many are complete as before it.
    return np.maximum.accumulate(np.where(has_text, np.minimum(end, following), 0)).tolist()


def find_lookahead(axis: Axis, text: str, offsets=None, every: int = 1) -> int | None:
    """Find a token whose id depends on later text.

    Annotates the text and its prefixes. Time grows with the square of the length.

    Args:
        axis: the axis.
        text: the text.
        offsets: of its tokens, as for `annotate`. Without offsets each character is a token.
        every: tries every `every`-th prefix only.

    Returns:
        The smallest tried number of tokens whose annotation changes when the text continues. `None` where the axis is causal
        on this text.
    """
    whole = axis.annotate(text, offsets)
    pairs = [(n, n + 1) for n in range(len(text))] if offsets is None else offsets
    lengths = visible_lengths(pairs, len(text))
    for number in range(every, len(whole) + 1, every):
        length = lengths[number - 1]
        before = [(min(start, length), min(end, length)) for start, end in pairs[:number]]
        if axis.annotate(text[:length], before) != whole[:number]:
            return number
    return None


def check_axis(axis: Axis, text: str) -> None:
    """Check on a text what training and generation rely on.

    Time grows with the square of the length, so a few hundred characters of the kind that the axis is for are enough.

    Args:
        axis: the axis. If it is not causal, only its ids are checked.
        text: the text.

    Raises:
        TypeError: for a state that is not hashable, and for a `step` that does not return an id and a state.
        ValueError: for ids outside of the vocabulary; for an axis that looks ahead and does not say so; where the id before the
            text is not 0; where `step` and `ids_after` disagree, a step over no character changes the id, or a step changes
            its state in place; and where `arguments` lacks an argument of `__init__`.
    """
    said = f"axis {axis.name!r} ({type(axis).__name__})"
    axis.to_dict()
    ids = [0, *axis.annotate(text)]
    if not axis.causal:
        return
    number = find_lookahead(axis, text)
    if number is not None:
        raise ValueError(
            f"{said} looks ahead: the id of character {number} of {text[:60]!r} changes with what follows. Set `causal = False` "
            "if it should."
        )
    state = axis.start()
    for place in range(len(ids)):
        for characters in ("", text[place : place + 3], ""):  # a second time, after another step from the same state
            axis_id, _ = _step(axis, state, characters)
            expected = ids[min(place + len(characters), len(text))]
            if axis_id != expected:
                raise ValueError(
                    f"{said} has id {expected} after {text[:place]!r} + {characters!r}, and {axis_id!r} where `step` reads "
                    f"{characters!r} at once: the id must be a function of the state and 0 before any text, and no step may "
                    "change its state in place."
                )
        _, state = _step(axis, state, text[place : place + 1])


def _step(axis, state, characters):
    """A step whose result is checked."""
    said, stepped = f"axis {axis.name!r} ({type(axis).__name__})", axis.step(state, characters)
    if not isinstance(stepped, tuple) or len(stepped) != 2:
        raise TypeError(f"{said}: `step` must return an id and the next state, got {stepped!r}.")
    try:
        hash(stepped[1])
    except TypeError as error:
        raise TypeError(f"{said}: states must be hashable, got {stepped[1]!r}: {error}.") from error
    return stepped


class Automaton:
    """A function `(state, character) -> state` that caches its transitions, so that axes annotate a corpus fast.

    Args:
        start: the first state. States are hashable.
        advance: `(state, character) -> state`.
        output: `state -> output`.
        limit: number of cached transitions, after which the cache is emptied.
    """

    def __init__(self, start: Hashable, advance: Callable, output: Callable, limit: int = 200_000):
        self.start, self.advance, self.output, self.limit = start, advance, output, limit
        self._nodes: dict[Hashable, _Node] = {}
        self._remembered = 0

    def trace(self, text: str) -> list:
        """The output after each number of characters, 0 to `len(text)`."""
        node = self._node(self.start)
        outputs = [node.output]
        for character in text:
            node = node[character]
            outputs.append(node.output)
        return outputs

    def step(self, state, characters: str) -> tuple:
        """The output and the state after more characters."""
        node = self._node(state)
        for character in characters:
            node = node[character]
        return node.output, node.state

    def _node(self, state):
        if state not in self._nodes:
            self._nodes[state] = _Node(self, state)
        return self._nodes[state]

    def _after(self, state, character):
        self._remembered += 1
        if self._remembered > self.limit:
            self._nodes, self._remembered = {}, 0
        return self._node(self.advance(state, character))


class _Node(dict):
    """The next node for each character read so far."""

    __slots__ = ("automaton", "output", "state")

    def __init__(self, automaton, state):
        super().__init__()
        self.automaton, self.state, self.output = automaton, state, automaton.output(state)

    def __repr__(self):  # that of a dict would print the whole graph
        return f"_Node({self.state!r})"

    def __missing__(self, character):
        self[character] = node = self.automaton._after(self.state, character)
        return node


__all__ = [
    "AXIS_CLASSES",
    "Automaton",
    "Axis",
    "ConstantAxis",
    "RandomAxis",
    "check_axis",
    "check_vocabulary_size",
    "find_lookahead",
    "visible_lengths",
]
