"""Docstrings in the style of Transformers, as mkdocstrings reads them: from the source.

Where `auto_docstring` stands, a docstring names arguments without the heading `Args:`, and leaves out those that all models have in
common. The heading is added here; the common arguments are those of Transformers' own pages.
"""

import re

import griffe


_ARGUMENT = re.compile(r"^( *[\w*][\w*, ]*) \((.*)\):$", re.MULTILINE)
_REFERENCE = re.compile(r"\[(`[^`\]]+`)\](?!\(|\[)")  # [`Name`], which Transformers' doc-builder makes a link of


class AutoDocstring(griffe.Extension):
    """Gives docstrings their headings, and takes markup off types and names."""

    def on_object(self, *, obj, **_):
        if obj.docstring is None:
            return
        text = obj.docstring.value.strip()
        decorators = [str(decorator.value) for decorator in getattr(obj, "decorators", [])]
        obj.docstring.value = tidy(text, any("auto_docstring" in decorator for decorator in decorators), obj.is_class)


def tidy(text: str, is_completed: bool, is_class: bool) -> str:
    """A docstring with sections; `is_completed` where `auto_docstring` would write the heading."""
    if is_completed and _ARGUMENT.match(text):
        fields, *rest = re.split(r"\n\n(?=Example:)", text, maxsplit=1)
        heading = "Attributes" if is_class else "Args"
        text = "\n\n".join([f"{heading}:\n" + re.sub(r"^(?=.)", "    ", fields, flags=re.MULTILINE), *rest])
    text = _ARGUMENT.sub(lambda match: f"{match[1]} ({re.sub('[`*]', '', match[2])}):", text)
    return _REFERENCE.sub(r"\1", text)
