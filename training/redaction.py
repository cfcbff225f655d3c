"""Tokens, keys and passwords stay out of figures, cards, logs and pushed files."""

import os
import re
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Iterable

from argument_checks import escape_unprintable
from transformers import HfArgumentParser


HIDDEN = "<hidden>"
SECRET_NAME = re.compile(
    r"(^|[_-])(token|key|secret|password)$", re.IGNORECASE
)  # not --tokenizer_name, not --train_tokens
# hf_..., or a JSON web token, whose parts stand between full stops; that of a sentence is none of it
HUB_TOKEN = re.compile(r"\bhf_(?:(?:oauth|jwt)_[\w-]{8,}(?:\.[\w-]+)*|[A-Za-z0-9]{8,})")
# https://user:password@host, also where it was taken for a path, which has no two slashes; C:/name@host is one
LOGIN = re.compile(r"(?:(?<=://)|(?<=\w\w:/))[^/\s@]+(?=@)")
QUERY = re.compile(
    r"(?i)(?<=[?&])([\w-]*(?:token|key|secret|password|signature|sig)=)[^&\s\"']+"
)  # https://host/?token=...
LEAST = 6  # characters that a value from the environment has at least: shorter ones occur in any text


def redact(text: str) -> str:
    """A text without the tokens of the Hub in it, logins and keys in addresses, and what secret environment variables hold."""
    for value in _secrets_of_environment():
        text = text.replace(value, HIDDEN)
    return QUERY.sub(rf"\1{HIDDEN}", LOGIN.sub(HIDDEN, HUB_TOKEN.sub(HIDDEN, text)))


def redact_all(value):
    """The same for all texts in what JSON can hold, of which numbers and quotes stay as they are."""
    if isinstance(value, dict):
        return {redact_all(name): redact_all(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(part) for part in value]
    return redact(value) if isinstance(value, str) else value


def redact_message(message: str) -> str:
    """The same for what argparse says, without the values of secret options in it."""
    return redact(" ".join(redact_command(message.split(" "))))


def _secrets_of_environment():
    found = [value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= LEAST]
    return sorted(found, key=len, reverse=True)  # of two that begin alike the longer one first


def redact_command(words: Iterable[str], secrets: Iterable[str | None] = ()) -> list[str]:
    """The words of a command without the values of its secret options, without `secrets`, and each redacted."""
    shown, is_value, secrets = [], False, [secret for secret in secrets if secret]
    for word in words:
        name, equals, _ = word.partition("=")
        is_option = name.startswith("-")
        is_secret = is_option and SECRET_NAME.search(name.lstrip("-")) is not None
        if is_value and not is_option:
            word = HIDDEN
        elif is_secret and equals:
            word = f"{name}={HIDDEN}"
        is_value = is_secret and not equals
        for secret in secrets:  # also after an option that was cut short, as argparse allows
            if len(secret) >= LEAST:
                word = word.replace(secret, HIDDEN)
            elif word == secret or word.endswith(f"={secret}"):
                word = word.removesuffix(secret) + HIDDEN
        shown.append(redact(word))
    return shown


def redact_errors() -> None:
    """From now on the traceback of what ends this process is redacted."""

    def show(kind, error, trace):
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = show


class Parser(ArgumentParser):
    """An `ArgumentParser` of which no error shows a secret, nor what ends the process after it."""

    def parse_args(self, *args, **kwargs):
        escape_unprintable()
        redact_errors()
        return super().parse_args(*args, **kwargs)

    def error(self, message):
        super().error(redact_message(message))


class CommandLine(HfArgumentParser):
    """An `HfArgumentParser` after which nobody finds a secret in `sys.argv`, where trackers and our figures read the command."""

    def parse(self) -> tuple:
        """The data classes.

        Raises:
            ValueError: naming options that there are not, without their values.
        """
        escape_unprintable()
        redact_errors()
        *parsed, unknown = self.parse_args_into_dataclasses(return_remaining_strings=True)
        values = [value for each in parsed for name, value in vars(each).items() if SECRET_NAME.search(name)]
        sys.argv[1:] = redact_command(sys.argv[1:], [value for value in values if isinstance(value, str)])
        if unknown:
            names = [word.partition("=")[0] for word in unknown if word.startswith("--")]
            raise ValueError(
                f"there is no option {', '.join(names) or 'for one of the values'}; --help lists them all"
            )
        return tuple(parsed)

    def error(self, message):
        """Like argparse's, without secrets."""
        super().error(redact_message(message))
