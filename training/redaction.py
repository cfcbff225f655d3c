"""Removal of tokens, keys and passwords from figures, cards, logs and pushed files."""

import os
import re
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path

from argument_checks import escape_unprintable
from transformers import HfArgumentParser


ROOT = Path(__file__).resolve().parents[1]
HIDDEN = "<hidden>"
SECRET_NAME = re.compile(
    r"(^|[_-])(token|key|secret|password)$", re.IGNORECASE
)  # not --tokenizer_name, not --train_tokens
# hf_..., or a JSON web token, whose parts are separated by full stops; a full stop at the end of a sentence is not matched
HUB_TOKEN = re.compile(r"\bhf_(?:(?:oauth|jwt)_[\w-]{8,}(?:\.[\w-]+)*|[A-Za-z0-9]{8,})")
# https://user:password@host, also with one slash, as in paths; not C:/name@host
LOGIN = re.compile(r"(?:(?<=://)|(?<=\w\w:/))[^/\s@]+(?=@)")
QUERY = re.compile(
    r"(?i)(?<=[?&])([\w-]*(?:token|key|secret|password|signature|sig)=)[^&\s\"']+"
)  # https://host/?token=...
LEAST = 6  # minimal length of a value from the environment: shorter ones occur in any text


def redact(text: str) -> str:
    """A text in which tokens of the Hub, logins and keys in addresses, and values of secret environment variables are hidden."""
    for value in _secrets_of_environment():
        text = text.replace(value, HIDDEN)
    return QUERY.sub(rf"\1{HIDDEN}", LOGIN.sub(HIDDEN, HUB_TOKEN.sub(HIDDEN, text)))


def redact_all(value):
    """Apply [`redact`] to all strings in a JSON value."""
    if isinstance(value, dict):
        return {redact_all(name): redact_all(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(part) for part in value]
    return redact(value) if isinstance(value, str) else value


def redact_message(message: str) -> str:
    """Apply [`redact`] to a message of argparse, and hide values of secret options."""
    return redact(" ".join(redact_command(message.split(" "))))


def _secrets_of_environment():
    found = [value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= LEAST]
    return sorted(found, key=len, reverse=True)  # a longer value before its own beginning


def redact_command(words: Iterable[str], secrets: Iterable[str | None] = ()) -> list[str]:
    """The words of a command, in which values of secret options, `secrets` and everything that [`redact`] hides are hidden."""
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
        for secret in secrets:  # also after an abbreviated option, which argparse allows
            if len(secret) >= LEAST:
                word = word.replace(secret, HIDDEN)
            elif word == secret or word.endswith(f"={secret}"):
                word = word.removesuffix(secret) + HIDDEN
        shown.append(redact(word))
    return shown


def shorten_errors() -> None:
    """End this process with the message alone of an error that tells of bad input, with a traceback for others.

    Both contain no secrets. `python -X dev` shows all tracebacks.
    """

    def show(kind, error, trace):
        lines = traceback.format_exception(kind, error, trace)
        if _tells_of_input(error, trace) and not sys.flags.dev_mode:
            lines = traceback.format_exception_only(error)
        sys.stderr.write(redact("".join(lines)))

    sys.excepthook = show


def _tells_of_input(error, trace):
    """Whether a file cannot be used, or a check of this project raised the error."""
    if isinstance(error, OSError):
        return True
    frames = traceback.extract_tb(trace)
    if not frames or not isinstance(error, (ValueError, TypeError, ImportError)):
        return False
    is_own = any(
        Path(frames[-1].filename).is_relative_to(ROOT / folder) for folder in ("training", "modeling_heptapod")
    )
    return is_own and (frames[-1].line or "").startswith("raise ")


class Parser(ArgumentParser):
    """An `ArgumentParser` whose errors, and later tracebacks, contain no secrets."""

    def parse_args(self, *args, **kwargs):
        escape_unprintable()
        shorten_errors()
        return super().parse_args(*args, **kwargs)

    def error(self, message):
        super().error(redact_message(message))


class CommandLine(HfArgumentParser):
    """An `HfArgumentParser` that removes secrets from `sys.argv`, which trackers and figures read."""

    def parse(self) -> tuple:
        """Parse the command line into the data classes.

        Raises:
            ValueError: for unknown options; the message contains their names without values.
        """
        escape_unprintable()
        shorten_errors()
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
        """Like argparse's `error`, without secrets."""
        super().error(redact_message(message))
