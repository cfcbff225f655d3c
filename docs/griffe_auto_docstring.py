"""Docstrings that transformers' `auto_docstring` completes, as mkdocstrings reads them: from the source.

Where the decorator stands, a docstring names arguments without the heading `Args:`, and leaves out those that all models have in
common. The heading is added here; the common arguments are those of Transformers' own pages.
"""

import re

import griffe


_ARGUMENT = re.compile(r"\w[\w, ]* \(.*\):\n")
_REFERENCE = re.compile(r"\[(`[^`\]]+`)\](?!\(|\[)")  # [`Name`], which Transformers' doc-builder makes a link of


class AutoDocstring(griffe.Extension):
    """Gives docstrings their heading, and takes the brackets off names."""

    def on_object(self, *, obj, **_):
        docstring = obj.docstring
        if docstring is None:
            return
        value = docstring.value.strip()
        decorators = [str(decorator.value) for decorator in getattr(obj, "decorators", [])]
        if any("auto_docstring" in decorator for decorator in decorators) and _ARGUMENT.match(value):
            fields, *rest = re.split(r"\n\n(?=Example:)", value, maxsplit=1)
            heading = "Attributes" if obj.is_class else "Args"
            value = "\n\n".join(["{}:\n{}".format(heading, re.sub(r"(?m)^(?=.)", "    ", fields)), *rest])
        docstring.value = _REFERENCE.sub(r"\1", value)
