"""What `mkdocs build` does beside its plugins: equations become MathML, pictures of other folders are found, nothing comes from outside.

Equations are written as TeX between dollars, which GitHub renders as well. Here they become MathML when the pages are built, which
browsers draw themselves: no script and no font has to be shipped or fetched.
"""

import html
import os
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parent.parent
# Pictures that programs of the repository write beside their figures; pages link to them where they are.
PICTURES = ("hub_cards/*.png", "tests/benchmarks/results/*.png")
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_LINK = re.compile(r"\]\((?:\.\./)+((?:hub_cards|tests)/[\w/.-]+\.png)\)")
# What a browser would fetch by itself when it opens a page.
_FETCHED = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//[^"]*"'
    r'|<link\b[^>]*\brel="(?:stylesheet|preconnect|preload|icon|shortcut icon)"[^>]*\bhref="(?:https?:)?//[^"]*"'
    r'|<link\b[^>]*\bhref="(?:https?:)?//[^"]*"[^>]*\brel="(?:stylesheet|preconnect|preload|icon|shortcut icon)"'
    r"|@import\s+(?:url\()?[\"']?(?:https?:)?//[^;]*"
    r"|url\([\"']?(?:https?:)?//[^)]*\)"
)


def on_files(files, config):
    """Add pictures that lie outside `docs/`."""
    for pattern in PICTURES:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Point links to these pictures at where the site has them."""

    def replace(match):
        target = f"figures/{posixpath.basename(match[1])}"
        return f"]({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')})"

    return _LINK.sub(replace, markdown)


def on_page_content(content, **_):
    """Write equations as MathML."""
    return _EQUATION.sub(lambda match: mathml(match[2], "block" if match[1] == "div" else "inline"), content)


def mathml(tex: str, display: str) -> str:
    """An equation in TeX, escaped for HTML or not, as a `<math>` element."""
    return convert(html.unescape(tex).strip(), display=display)


def on_post_build(config):
    """Refuse pages that would fetch something from another machine.

    Raises:
        PluginError: naming the first page and what it would fetch.
    """
    for folder, _, names in sorted(os.walk(config.site_dir)):
        for name in sorted(names):
            if name.endswith((".html", ".css")):
                path = Path(folder, name)
                found = fetched(path.read_text(encoding="utf-8"))
                if found:
                    raise PluginError(f"{path} would fetch from another machine: {found[0]}")


def fetched(text: str) -> list[str]:
    """What a page or a style sheet fetches from other machines by itself."""
    return _FETCHED.findall(text)
