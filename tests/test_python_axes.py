"""The lexer's axes against Python's own tokenizer, by hand where that one has no say, and on source that is wrong."""

import io
import keyword
import random
import re
import sysconfig
import tokenize
from pathlib import Path

import pytest

from modeling_heptapod import (
    PythonBracketAxis,
    PythonIndentationAxis,
    PythonStringAxis,
    PythonTokenKindAxis,
    find_lookahead,
)
from modeling_heptapod.multigrid.python_axes import BRACKETS, KEYWORDS, KINDS, STRINGS


STDLIB = Path(sysconfig.get_path("stdlib"))
FAST = ["tokenize.py", "argparse.py", "_pydecimal.py", "json/decoder.py", "inspect.py", "dataclasses.py", "this.py"]
KIND, BRACKET, LEVEL, STRING = (
    PythonTokenKindAxis(),
    PythonBracketAxis(),
    PythonIndentationAxis(max_level=100),
    PythonStringAxis(),
)
LETTERS = dict(zip(KINDS, "_nwk0o()s#?"))  # one for each kind, in the order of KINDS


def kinds(text):
    return "".join(LETTERS[KINDS[axis_id]] for axis_id in KIND.annotate(text))


def brackets(text):
    return "".join(".([{f"[axis_id] for axis_id in BRACKET.annotate(text))


# ---- against tokenize


def check(source):
    """Compare all that `tokenize` says of a source with the axes; how many tokens that were."""
    kind, bracket, level, string = (axis.annotate(source) for axis in (KIND, BRACKET, LEVEL, STRING))
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    blocks, open_brackets, covered, formatted, compared = 0, [], set(), 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source, newline="").readline):
        name = tokenize.tok_name[token.type]
        start, end = (
            starts[row - 1] + column if row <= len(starts) else len(source) for row, column in (token.start, token.end)
        )
        covered.update(range(start, end))
        formatted += name.endswith("STRING_START")
        formatted -= name.endswith("STRING_END")
        blocks += name == "INDENT"
        blocks -= name == "DEDENT"
        if start == end or name in ("INDENT", "ERRORTOKEN") or formatted or name.endswith("STRING_END"):
            continue
        where = (name, token.string, token.start)
        if name == "OP":
            expected = "open" if token.string in "([{" else "close" if token.string in ")]}" else "operator"
            if expected == "open":
                open_brackets.append(token.string)
            elif expected == "close":
                open_brackets.pop()
        elif name == "NAME":
            expected = "keyword" if keyword.iskeyword(token.string) else "name"
        else:
            expected = {"NL": "newline"}.get(name, name.lower())
        compared += 1
        assert KINDS[kind[end - 1]] == expected, where
        assert BRACKETS[bracket[end - 1]] == (open_brackets[-1] if open_brackets else "none"), where
        if name not in ("NL", "COMMENT"):
            assert level[end - 1] == blocks, where
        if name == "COMMENT":
            assert {STRINGS[axis_id] for axis_id in string[start:end]} == {"comment"}, where
        elif name == "STRING":
            prefix = re.match("[a-zA-Z]*", token.string).group()
            marks = next(m for m in ("'''", '"""', "'", '"') if token.string.startswith(m, len(prefix)))
            assert STRINGS[string[end - 1]] == "code", where
            if "f" not in prefix.lower() and len(token.string) > len(prefix) + 6:
                inside = slice(start + len(prefix) + len(marks) - 1, end - 1)
                assert {STRINGS[axis_id] for axis_id in string[inside]} == {marks}, where
                assert {KINDS[axis_id] for axis_id in kind[start + len(prefix) : end]} == {"string"}, where
        else:
            assert {STRINGS[axis_id] for axis_id in string[start:end]} == {"code"}, where
    for place in set(range(len(source))) - covered:
        assert KINDS[kind[place]] in ("space", "newline"), (place, source[place])
    return compared


def standard_library():
    for path in sorted(STDLIB.rglob("*.py")):
        if not {"site-packages", "test", "tests", "lib2to3"} & set(path.relative_to(STDLIB).parts):
            yield path


@pytest.mark.parametrize("name", FAST)
def test_axes_agree_with_tokenize(name):
    assert check((STDLIB / name).read_text(encoding="utf-8")) > 50


@pytest.mark.slow
def test_axes_agree_with_tokenize_on_the_standard_library():
    compared = 0
    for path in standard_library():
        try:
            source = path.read_bytes().decode("utf-8")
            compared += check(source)
        except (UnicodeDecodeError, tokenize.TokenError, IndentationError):
            continue
        except AssertionError as error:
            raise AssertionError(path) from error
    assert compared > 500_000


def test_keywords_are_those_of_the_language():
    assert KEYWORDS == frozenset(keyword.kwlist)


# ---- by hand


@pytest.mark.parametrize(
    "source, expected",
    [
        ("for forma in x:\n", "wwk_wwkww_wk_won"),  # a token so far: `f`, `fo`, `for`; `for`, `form`, `forma`
        ("x=.5+1.e-3j-0xFf_for y", "woo0o000000o000000wk_w"),
        ("1if x else 1else y", "0wk_w_wwwk_00wwk_w"),
        ("1e5.real 1_0.0_1J 1..a", "000owwww_00000000_00ow"),
        ("a.b...c->d:=e!=f", "wowooowoowoowoow"),
        ("x = rb'a' + R\"b\" u'' ur''", "w_o_wwsss_o_wsss_wss_wwss"),
        ("'a\\'b' 'c", "ssssss_ss"),
        ('\'\'x """a"b""c\\"""" y', "ssw_ssssssssssssss_w"),
        ("'a\nb'''c\nd''' e", "ssnwsssssssss_w"),
        ("'a\\\nb' c", "ssssss_w"),
        ("x \\\n+ y # c\n", "w___o_w_###n"),
        ("@d\n?$`x", "own???w"),
        ("é ñandú 変数", "w_wwwww_ww"),
        ("½", "?"),
    ],
)
def test_kinds_by_hand(source, expected):
    assert kinds(source) == expected


@pytest.mark.parametrize(
    "source, expected_kinds, expected_brackets",
    [
        ("f'{x}' y", "ws(w)s_w", "..ff...."),
        ("f'{{x}}'", "ws(sssss", "..f....."),
        ("f'{x!r:>{w}}z'", "ws(wowos(w))ss", "..fffffffff..."),
        ("f'{d['a'][1:2]}'", "ws(w(sss)(0o0))s", "..ff[[[[f[[[[f.."),
        ("f'{ {1: 2}[1] }'", "ws(_(0o_0)(0)_)s", "..ff{{{{{f[[ff.."),
        ("f'\\N{DASH} {x}'", "wssssssssss(w)s", "...........ff.."),
        ("rf'\\N{x}'", "wwsss(w)s", ".....ff.."),
        ("f'\\{x}'", "wss(w)s", "...ff.."),
        ("f'''{\nx}\n'''", "wsss(nw)ssss", "....fff....."),
        ("t'{x}'", "ws(w)s", "..ff.."),
        ("'{x}'", "sssss", "....."),
    ],
)
def test_f_strings_by_hand(source, expected_kinds, expected_brackets):
    assert kinds(source) == expected_kinds
    assert brackets(source) == expected_brackets


def test_strings_by_hand():
    source = 'a\'b\' "" """c""" # d\nf\'{x}\' rb\'\'\'y'
    expected = [
        *["code", "'", "'", "code", "code", '"', "code", "code", '"', "code", '"""', '"""', '"""', '"""', "code"],
        *["code", "comment", "comment", "comment", "code", "code", "'", "code", "code", "'", "code", "code"],
        *["code", "code", "'", "code", "'''", "'''"],
    ]
    assert [STRINGS[axis_id] for axis_id in STRING.annotate(source)] == expected


def test_indentation_by_hand():
    source = "if a:\n\tb(\n  c)\n\n  # d\n\tif e:\n\t    f\n        g\nh\n"
    lines = source.splitlines(keepends=True)
    levels, start = [], 0
    for line in lines:
        levels.append(LEVEL.annotate(source)[start : start + len(line)])
        start += len(line)
    assert levels == [
        [0] * 6,
        [0] + [1] * 3,  # the first character that is not blank decides
        [1] * 5,  # brackets are open
        [1],
        [1] * 6,  # a comment of its own changes nothing
        [1] * 7,
        [1] * 5 + [2] * 2,
        [2] * 8 + [1] * 2,  # a tab goes to column 8
        [0] * 2,
    ]
    assert max(PythonIndentationAxis(max_level=1).annotate(source)) == 1
    with pytest.raises(ValueError, match="`max_level` must be an integer of at least 1 and at most 1000000, got 0"):
        PythonIndentationAxis(max_level=0)


# ---- source that is wrong


@pytest.mark.parametrize(
    "source, expected_kinds, expected_brackets",
    [
        ("(a]b)", "(w)w)", "((((."),  # closes nothing
        ("([a)b", "((w)w", "([[.."),  # closes what is inside as well
        ("f'{(x}y", "ws((w)s", "..f((.."),
        ("f'{x)}y", "ws(w))s", "..fff.."),
        ("(f'{x)}' y)", "(ws(w))s_w)", "(((fff((((."),  # nor anything around the string
        ("f'{x:\n' y", "ws(wonsss", "..fff...."),
        ("f'{x:' y", "ws(wos_w", "..fff..."),
        (")]}", ")))", "..."),
        ("'a\nb", "ssnw", "...."),
    ],
)
def test_wrong_source_by_hand(source, expected_kinds, expected_brackets):
    assert kinds(source) == expected_kinds
    assert brackets(source) == expected_brackets


def test_nothing_raises_and_nothing_looks_ahead():
    draw = random.Random(0)
    pool = [
        *"fFrRbBuU'\"{}[]():\\\n\t #N1.e_x\u00e9!$\r\f;@",
        "'''",
        '"""',
        "f'{",
        "{{",
        "\\N{",
        "def ",
        "    ",
        "0x",
        "\n  ",
    ]
    for _ in range(300):
        text = "".join(draw.choices(pool, k=draw.randint(1, 120)))
        for axis in (KIND, BRACKET, LEVEL, STRING):
            ids = axis.annotate(text)
            assert len(ids) == len(text) and 0 <= min(ids) and max(ids) < len(axis.vocabulary)
            assert find_lookahead(axis, text, every=9) is None


@pytest.mark.parametrize("deep", ["(" * 500, "f'{" * 500, "f'{x:" * 300, "{" * 201 + "f'{{x}' }"])
def test_depth_has_an_end(deep):
    for axis in (KIND, BRACKET, LEVEL, STRING):
        assert len(axis.annotate(deep + "x}'")) == len(deep) + 3
    assert kinds("(" * 200 + "f'{x}'") == "(" * 200 + "wsssss"  # a field that cannot be opened is text
    blocks = "".join(" " * column + "if x:\n" for column in range(150))
    assert max(LEVEL.annotate(blocks)) == 100
