"""Readable text of tokens: characters where their bytes are complete, else bytes such as `\\xf0`."""

from functools import lru_cache

from tokenizers.decoders import ByteLevel


@lru_cache(maxsize=1)
def _bytes_by_sign() -> dict[str, int]:
    """The byte of each character in the vocabulary of a byte-level tokenizer, as in GPT-2."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(others)}


def is_byte_level(tokenizer) -> bool:
    """Returns whether tokens are byte sequences, so that one may hold a part of a character."""
    return tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel)


def readable(tokenizer, ids: list[int]) -> list[tuple[str, int]]:
    """Text token by token; tokens that form characters only together are one piece.

    Args:
        tokenizer: where it is not byte-level, each token is a piece, as the tokenizer decodes it.
        ids: token ids.

    Returns:
        Pieces `(text, number of tokens)`. Bytes that form no character with those around them are written as `\\xf0`.
    """
    if not is_byte_level(tokenizer):
        return [(tokenizer.decode([token], clean_up_tokenization_spaces=False), 1) for token in ids]
    bytes_of, pieces, start = [_bytes_of(tokenizer, token) for token in ids], [], 0
    while start < len(ids):
        end = start + 1
        while (text := _decoded(b"".join(bytes_of[start:end]))) is None and end < len(ids) and end < start + 4:
            end += 1  # no character has more than four bytes
        if text is None:
            text, end = bytes_of[start].decode("utf-8", "backslashreplace"), start + 1
        pieces.append((text, end - start))
        start = end
    return pieces


def one_column_each(text: str) -> str:
    """Text in which an arrow stands for a newline and a dot for another unprintable character, as for a tab."""
    return "".join("\u21b5" if c == "\n" else c if c.isprintable() else "\u00b7" for c in text)


def _bytes_of(tokenizer, token):
    added = tokenizer.added_tokens_decoder
    if token in added:
        return added[token].content.encode()
    table = _bytes_by_sign()
    name = tokenizer.convert_ids_to_tokens(token) or ""  # a model may have more ids than its tokenizer
    return b"".join(bytes([table[sign]]) if sign in table else sign.encode() for sign in name)


def _decoded(data):
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
