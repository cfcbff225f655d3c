"""Axes of Python source: kind of token, innermost bracket, indentation, strings and comments.

A lexer reads a character at a time without lookahead, so each id is that of the token *so far*: `fo` is a name, `for` a
keyword, `form` a name again. After `""` a string is closed, and after another quote a longer string is open. In invalid
source the lexer continues: it closes an unfinished string at the end of the line and ignores a closing bracket without an
open one. It follows the grammar of Python 3.12, in which a replacement field of an f-string may contain any expression.
"""

from typing import NamedTuple

from .axes import Automaton, Axis, check_vocabulary_size


KINDS = ("space", "newline", "name", "keyword", "number", "operator", "open", "close", "string", "comment", "other")
BRACKETS = ("none", "(", "[", "{", "field")
STRINGS = ("code", "'", '"', "'''", '"""', "comment")
KEYWORDS = frozenset(
    "False None True and as assert async await break class continue def del elif else except finally for from global "
    "if import in is lambda nonlocal not or pass raise return try while with yield".split()
)
OPERATORS = frozenset("+-*/%@&|^~<>=!.,:;")
OPENING = {")": "(", "]": "[", "}": "{"}
# Limits of Python's own tokenizer.
MAX_BRACKETS, MAX_INDENTS = 200, 100

_PREFIXES = frozenset("r u b f t br rb fr rf tr rt".split())
# A word is stored only while it may become a keyword or the prefix of a string.
_WORD_STARTS = {word[:length] for word in KEYWORDS for length in range(1, len(word) + 1)}
_WORD_STARTS |= {first + second for first in ("", *"rRuUbBfFtT") for second in "rRuUbBfFtT"}
_DIGITS, _HEX = frozenset("0123456789"), frozenset("0123456789abcdefABCDEF_")


class LexerState(NamedTuple):
    """State of the lexer.

    Attributes:
        mode: `line` (only blanks so far), `code`, `joined` (after a backslash), `word`, `number`, `comment`,
            `quote` (one quotation mark), `quotes` (two), `string`, `brace` (one brace in an f-string).
        kind: of the last character, one of `KINDS`.
        word: a word, while it matters; the form of a number; in a string, an escape sequence so far.
        string: of the innermost string `(quotation marks, raw, formatted, in a format specification)`, else `None`.
        ending: number of quotation marks of three read at the end.
        brackets: open brackets, with the string around each replacement field: `(bracket, string)`.
        indents: columns of the open blocks.
        column: of leading blanks.
    """

    mode: str = "line"
    kind: str = "space"
    word: str = ""
    string: tuple | None = None
    ending: int = 0
    brackets: tuple = ()
    indents: tuple = ()
    column: int = 0


def advance(state: LexerState, character: str) -> LexerState:
    """The state after one more character."""
    return _READERS[state.mode](state, character)


def _read_line(state, character):
    if character in " \t\f\r":
        column = state.column
        column = {" ": column + 1, "\t": column // 8 * 8 + 8, "\f": 0, "\r": column}[character]
        return state._replace(kind="space", column=column)
    if character == "\n":
        return _newline(state)
    if character != "#":  # a line with only a comment does not change blocks
        indents, column = state.indents, state.column
        if column > (indents[-1] if indents else 0):
            indents = (*indents, column)[:MAX_INDENTS]
        while indents and indents[-1] > column:
            indents = indents[:-1]
        state = state._replace(indents=indents)
    return _read_code(state._replace(column=0), character)


def _read_code(state, character):
    """Read a character that begins a new token."""
    if character in " \t\f\r":
        return state._replace(mode="code", kind="space", word="")
    if character == "\n":
        return _newline(state)
    if character in _DIGITS:
        form = "." if state.word == "." else "0" if character == "0" else "d"
        return state._replace(mode="number", kind="number", word=form)
    if character.isidentifier():
        return _word(state, character)
    if character in "'\"":
        return state._replace(mode="quote", kind="string", word="", string=(character, False, False, False))
    if character == "#":
        return state._replace(mode="comment", kind="comment", word="")
    if character == "\\":
        return state._replace(mode="joined", kind="space", word="")
    if character in "([{":
        return _open(state, character, None)._replace(mode="code", kind="open", word="")
    if character in ")]}":
        return _close(state, character)
    if character == ":" and state.brackets and state.brackets[-1][0] == "field":
        marks, raw, formatted, _ = state.brackets[-1][1]
        return state._replace(mode="string", kind="operator", word="", string=(marks, raw, formatted, True))
    if character in OPERATORS:
        return state._replace(mode="code", kind="operator", word="." if character == "." else "")
    return state._replace(mode="code", kind="other", word="")


def _read_joined(state, character):
    if character == "\n":
        return state._replace(mode="code", kind="space")
    if character == "\r":
        return state
    return _read_code(state, character)


def _newline(state):
    mode = "code" if state.brackets else "line"
    return state._replace(mode=mode, kind="newline", word="", string=None, ending=0, column=0)


def _word(state, word):
    return state._replace(
        mode="word", kind="keyword" if word in KEYWORDS else "name", word=word if word in _WORD_STARTS else ""
    )


def _read_word(state, character):
    if ("a" + character).isidentifier():
        return _word(state, state.word + character if state.word else "")
    if character in "'\"":
        prefix = state.word.lower() if state.word.lower() in _PREFIXES else ""
        formatted = "f" in prefix or "t" in prefix
        return state._replace(
            mode="quote", kind="string", word="", string=(character, "r" in prefix, formatted, False)
        )
    return _read_code(state._replace(word=""), character)


def _read_number(state, character):
    """Forms: `0` a zero, `d` decimal, `x` hexadecimal, octal or binary, `.` after the point, `e` the letter of an exponent,
    `E` an exponent, `j` the end of an imaginary number."""
    form, after = state.word, None
    if form == "x":
        after = "x" if character in _HEX else None
    elif character in _DIGITS or (character == "_" and form != "e"):
        after = {"0": "d", "d": "d", ".": ".", "e": "E", "E": "E"}.get(form)
    elif form == "e":
        if character in "+-":
            after = "E"
        elif character.isidentifier():  # `1else`: the letter is no exponent
            return _read_word(_word(state, "e"), character)
    elif character in "jJ":
        after = "j" if form in "0d.E" else None
    elif character in "eE":
        after = "e" if form in "0d." else None
    elif character == ".":
        after = "." if form in "0d" else None
    elif character in "xXoObB":
        after = "x" if form == "0" else None
    if after is None:
        return _read_code(state._replace(word=""), character)
    return state._replace(word=after)


def _read_comment(state, character):
    return _newline(state) if character == "\n" else state


def _read_quote(state, character):
    """After the first quotation mark."""
    if character == state.string[0]:
        return state._replace(mode="quotes")
    return _read_string(state._replace(mode="string"), character)


def _read_quotes(state, character):
    """After two quotation marks: an empty string, or the beginning of a string with three."""
    mark, raw, formatted, _ = state.string
    if character == mark:
        return state._replace(mode="string", string=(mark * 3, raw, formatted, False))
    return _read_code(state._replace(string=None), character)


def _read_string(state, character):
    marks, raw, formatted, in_format = state.string
    here = state._replace(kind="string", word="", ending=0)
    if state.word == "\\N" and character == "{":  # \N{DASH} is no replacement field
        return here._replace(word="\\N{")
    if state.word == "\\N{" and character not in ("}", "\n", marks[0]):
        return here._replace(word="\\N{")
    if state.word == "\\" and not (formatted and character in "{}"):
        if character == "\r":  # a continued line with the line end `\r\n`
            return here._replace(word="\\")
        return here._replace(word="\\N" if formatted and not raw and character == "N" else "")
    if character == "\\":
        return here._replace(word="\\")
    if character == marks[0]:
        if state.ending + 1 < len(marks):
            return here._replace(ending=state.ending + 1)
        return _leave_fields_of(here)._replace(mode="code", string=None)
    if character == "\n" and len(marks) == 1:
        return _newline(_leave_fields_of(here))
    if formatted and character == "{" and len(state.brackets) < MAX_BRACKETS:
        return _open(here, "field", state.string)._replace(mode="brace", kind="open", string=None)
    if in_format and character == "}":
        return _close(here, character)
    return here


def _leave_fields_of(state):
    """Close the replacement field where a string ends in a format specification."""
    return state._replace(brackets=state.brackets[:-1]) if state.string[3] else state


def _read_brace(state, character):
    """After a brace in an f-string. Two of them are a character of the string."""
    bracket, string = state.brackets[-1]
    if character == "{" and bracket == "field" and not string[3]:
        return state._replace(mode="string", kind="string", string=string, brackets=state.brackets[:-1])
    return _read_code(state, character)


def _open(state, bracket, string):
    return state._replace(brackets=(*state.brackets, (bracket, string))[:MAX_BRACKETS])


def _close(state, character):
    """Close the nearest matching bracket and all inside it, within the innermost replacement field."""
    closed = state._replace(mode="code", kind="close", word="", string=None)
    for depth in range(len(state.brackets) - 1, -1, -1):
        bracket, string = state.brackets[depth]
        if bracket == "field" and character == "}":
            return closed._replace(mode="string", string=string, brackets=state.brackets[:depth])
        if bracket == OPENING[character]:
            return closed._replace(brackets=state.brackets[:depth])
        if bracket == "field":
            break
    return closed


_READERS = {
    "line": _read_line,
    "code": _read_code,
    "joined": _read_joined,
    "word": _read_word,
    "number": _read_number,
    "comment": _read_comment,
    "quote": _read_quote,
    "quotes": _read_quotes,
    "string": _read_string,
    "brace": _read_brace,
}
_STRING_IDS = {text: number for number, text in enumerate(STRINGS)}


def _describe(state):
    """Ids of the four axes: kind, bracket, number of open blocks, string."""
    if state.mode in ("quote", "string"):
        string = _STRING_IDS[state.string[0]]
    else:
        string = _STRING_IDS["comment" if state.mode == "comment" else "code"]
    bracket = BRACKETS.index(state.brackets[-1][0]) if state.brackets else 0
    return KINDS.index(state.kind), bracket, len(state.indents), string


LEXER = Automaton(LexerState(), advance, _describe)


class _PythonAxis(Axis):
    """Base class of the axes, each of which is one output of the lexer."""

    _place: int

    def start(self):
        return LEXER.start

    def step(self, state, characters):
        output, state = LEXER.step(state, characters)
        return output[self._place], state

    def ids_after(self, text):
        place = self._place
        return [output[place] for output in LEXER.trace(text)]


class PythonTokenKindAxis(_PythonAxis):
    """Kind of the token so far, one of `KINDS`. Soft keywords (`match`, `case`, `type`) are names."""

    registry_names = {"token_kind": {}}
    _place = 0

    def __init__(self, name: str = "token_kind"):
        super().__init__(name, KINDS)


class PythonBracketAxis(_PythonAxis):
    """The innermost open bracket, `field` for a replacement field of an f-string."""

    registry_names = {"bracket": {}}
    _place = 1

    def __init__(self, name: str = "bracket"):
        super().__init__(name, BRACKETS)


class PythonIndentationAxis(_PythonAxis):
    """Number of indented blocks around the line. It changes at the first character of a line that is not blank. Blank lines
    and lines with only a comment do not change it.

    Args:
        max_level: the highest id, for this and deeper levels.
    """

    registry_names = {"indentation": {}}
    _place = 2

    def __init__(self, name: str = "indentation", max_level: int = 15):
        check_vocabulary_size("max_level", max_level)
        super().__init__(name, [str(level) for level in range(max_level + 1)])
        self.max_level = max_level

    def step(self, state, characters):
        level, state = super().step(state, characters)
        return min(level, self.max_level), state

    def ids_after(self, text):
        return [min(level, self.max_level) for level in super().ids_after(text)]

    def arguments(self):
        return {"max_level": self.max_level}


class PythonStringAxis(_PythonAxis):
    """Quotation marks of the string around the text, or `"comment"` or `"code"`."""

    registry_names = {"string": {}}
    _place = 3

    def __init__(self, name: str = "string"):
        super().__init__(name, STRINGS)


__all__ = ["PythonBracketAxis", "PythonIndentationAxis", "PythonStringAxis", "PythonTokenKindAxis"]
