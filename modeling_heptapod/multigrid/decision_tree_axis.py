"""A learned axis: a decision tree on the last characters, stored as plain data."""

from collections.abc import Sequence

import numpy as np

from .axes import Axis


class DecisionTreeAxis(Axis):
    """The leaf of a decision tree on the last characters. `training/distill_axis.py` distills such trees from a model.

    Args:
        nodes: the tree, with its root first. An inner node is `[back, code, left, right]`: the next node is `left` if the code
            point of the character `back` places back (1 is the last one) is at most `code`, otherwise `right`. Both come
            later in the list. The code point before the text is -1. A leaf is `[axis_id]`.
        vocabulary: meaning of each id. Id 0 is that of the empty text.

    Raises:
        ValueError: for nodes that are no such tree.
    """

    def __init__(
        self, name: str = "learned", nodes: Sequence[Sequence[int]] = ((0,),), vocabulary: Sequence[str] = ("none",)
    ):
        super().__init__(name, vocabulary)
        self.nodes = tuple(tuple(node) for node in nodes)
        for number, node in enumerate(self.nodes):
            if not self._fits(number, node):
                raise ValueError(
                    f"`nodes` of axis {name!r}: node {number} must be [axis_id] below {len(self.vocabulary)}, or "
                    f"[back, code, left, right] with later nodes of {len(self.nodes)}, got {list(node)}."
                )
        if not self.nodes:
            raise ValueError(f"`nodes` of axis {name!r} must hold at least one node.")
        self.length = max((node[0] for node in self.nodes if len(node) == 4), default=1)

    def start(self):
        return ""

    def step(self, state, characters):
        state = (state + characters)[-self.length :]
        return self._id_of(state), state

    def ids_after(self, text):
        """As the base class, for all positions at once, level by level of the tree."""
        codes = np.full(self.length + len(text), -1, dtype=np.int32)
        codes[self.length :] = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        is_leaf = np.array([len(node) == 1 for node in self.nodes])
        table = np.array([(node * 4)[:4] if len(node) == 1 else node for node in self.nodes], dtype=np.int32)
        at, places = np.zeros(len(text), dtype=np.int32), np.arange(len(text)) + self.length
        going = np.arange(len(text))[~is_leaf[at]]
        while len(going):
            back, code, left, right = table[at[going]].T
            at[going] = np.where(codes[places[going] + 1 - back] <= code, left, right)
            going = going[~is_leaf[at[going]]]
        return [0, *table[at, 0].tolist()]

    def arguments(self):
        return {"nodes": [list(node) for node in self.nodes], "vocabulary": list(self.vocabulary)}

    def to_python(self) -> str:
        """Source of a module without imports: `axis_id(text)` and `annotate(text)`, with the tree as `if` statements."""
        backs = sorted({node[0] for node in self.nodes if len(node) == 4}) or [1]
        names = ", ".join(f"c{back}" for back in backs)
        slices = ", ".join(f"text[-{back}:{1 - back if back > 1 else ''}]" for back in backs)
        return "\n".join(
            [
                f'"""The axis {self.name!r}: an id for each character of a text, from it and those before it."""',
                "",
                f"LENGTH = {self.length}  # as many of the last characters count",
                "VOCABULARY = (",
                *[f"    {entry!r}," for entry in self.vocabulary],
                ")",
                "",
                "",
                "def axis_id(text):",
                '    """The id after a text. `c1` is its last character, `c2` the one before; \'\' comes before all others."""',
                "    if not text:",
                "        return 0",
                f"    {names} = {slices}",
                *self._source(0, 1, self._sizes()),
                "",
                "",
                "def annotate(text):",
                '    """The id of each character."""',
                "    return [axis_id(text[max(0, end - LENGTH) : end]) for end in range(1, len(text) + 1)]",
                "",
            ]
        )

    def _id_of(self, last):
        if not last:
            return 0
        node = self.nodes[0]
        while len(node) == 4:
            back, code, left, right = node
            character = ord(last[-back]) if back <= len(last) else -1
            node = self.nodes[left if character <= code else right]
        return node[0]

    def _sizes(self):
        """Number of lines of the source of each node."""
        sizes = [1] * len(self.nodes)
        for number in reversed(range(len(self.nodes))):
            if len(self.nodes[number]) == 4:
                sizes[number] = 1 + sum(sizes[child] for child in self.nodes[number][2:])
        return sizes

    def _source(self, number, depth, sizes):
        """Lines of a node and all below it. The smaller child is indented, since Python allows 100 levels."""
        lines, blank = [], "    " * depth
        while len(self.nodes[number]) == 4:
            back, code, left, right = self.nodes[number]
            inside, number = (left, right) if sizes[left] <= sizes[right] else (right, left)
            sign, entry = ("<=", "==") if inside == left else (">", "!=")
            condition = f"{sign} {chr(code)!a}" if code >= 0 else f'{entry} ""'
            lines += [f"{blank}if c{back} {condition}:", *self._source(inside, depth + 1, sizes)]
        return [*lines, f"{blank}return {self.nodes[number][0]}"]

    def _fits(self, number, node):
        if not all(type(entry) is int for entry in node):
            return False
        if len(node) == 1:
            return 0 <= node[0] < len(self.vocabulary)
        if len(node) != 4:
            return False
        back, code, left, right = node
        return back >= 1 and -1 <= code < 0x110000 and all(number < child < len(self.nodes) for child in (left, right))


__all__ = ["DecisionTreeAxis"]
