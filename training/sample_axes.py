"""Generates a text with a saved MultiGrid and prints its axis ids below each line: `python training/sample_axes.py outputs/multigrid-tiny`.

It writes twice from the same seed: with axis ids that the model predicts, and with those that its annotators give the
text so far. Nothing of the package is imported: the folder brings its own code.
"""

import string
from collections import Counter

import torch
from argument_checks import NUMPY_SEEDS, prompt_text, whole
from loading import add_model_arguments, check_family, may_run_code
from redaction import Parser
from token_text import is_byte_level, readable
from transformers import AutoModelForCausalLM, AutoProcessor, set_seed


def letters_for(vocabulary: tuple[str, ...]) -> list[str]:
    """A character for each entry of an axis: a blank for the first, else one of its own where that is still free."""
    letters = [" "]
    for entry in vocabulary[1:]:
        letters.append(next((letter for letter in (*entry, *string.printable) if letter not in letters), "?"))
    return letters


def characters_of(processor, ids: list[int]) -> list[str]:
    """What each token completes."""
    pending, characters = (), []
    for token in ids:
        new, pending = processor.new_characters(pending, token)
        characters.append(new)
    return characters


def characters_to_show(processor, ids: list[int]) -> list[str]:
    """What each token completes, where the bytes of a byte-level tokenizer that make no character are seen as `\\xf0`."""
    if not is_byte_level(processor.tokenizer):
        return characters_of(processor, ids)
    special, characters = set(processor.tokenizer.all_special_ids), [""] * len(ids)
    places = [place for place, token in enumerate(ids) if token not in special]
    last = -1
    for text, number in readable(processor.tokenizer, [ids[place] for place in places]):
        last += number
        characters[places[last]] = text
    return characters


def annotations_of(processor, characters: list[str]) -> list[list[int]]:
    """What the annotators say of the same tokens, a row for each axis."""
    rows = []
    for axis in processor.axes:
        state, row = axis.start(), []
        for new in characters:
            axis_id, state = axis.step(state, new)
            row.append(axis_id)
        rows.append(row)
    return rows


def lines_with_tracks(processor, characters: list[str], tracks: list[list[int]]) -> str:
    """The text line by line, and below each line what stands beside it on each axis."""
    text = "".join(characters)
    rows = []
    for axis, track in zip(processor.axes, tracks):
        letters = letters_for(axis.vocabulary)
        rows.append((axis.name, "".join(letters[axis_id] * len(new) for new, axis_id in zip(characters, track))))
    margin, start, output = max(len(name) for name, _ in rows) + 2, 0, []
    for line in text.split("\n"):
        here = slice(start, start + len(line))
        output.append(" " * margin + line)
        output += [f"{name:<{margin}}{row[here]}".rstrip() for name, row in rows if line]
        start += len(line) + 1
    return "\n".join(output)


def main():
    parser = Parser(description="Generate a text with a saved MultiGrid, with its axis ids below each line.")
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", type=prompt_text, default="import os\nimport sys\n\n\nclass ", help="the text to continue"
    )
    parser.add_argument("--max_new_tokens", type=whole(1), default=200, help="number of tokens to generate")
    parser.add_argument("--seed", type=whole(0, NUMPY_SEEDS), default=0, help="seed of the sampling")
    args = parser.parse_args()

    trust = may_run_code(args.folder, args.trust_remote_code)
    check_family(args.folder, ("multigrid",))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(args.folder, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=trust).to(device)
    inputs = processor(args.prompt, return_tensors="pt").to(device)
    for axis in processor.axes:
        letters = letters_for(axis.vocabulary)
        print(f"{axis.name}:", ", ".join(f"{letter!r} {entry}" for letter, entry in zip(letters, axis.vocabulary)))
    for source in ("predicted", "annotated"):
        set_seed(args.seed)
        output = model.generate(
            **inputs,
            axis_source=source,
            processor=processor,
            max_new_tokens=args.max_new_tokens,
            return_dict_in_generate=True,
        )
        ids, tracks = output.sequences[0].tolist(), output.axis_sequences[0].tolist()
        rules = annotations_of(processor, characters_of(processor, ids))
        text = lines_with_tracks(processor, characters_to_show(processor, ids), tracks)
        print(f"\n--- with axis ids {source}\n{text}")
        for axis, track, rule in zip(processor.axes, tracks, rules):
            written = range(inputs["input_ids"].shape[1], len(track))
            same = sum(track[place] == rule[place] for place in written) / len(written)
            most = max(Counter(rule[place] for place in written).values()) / len(written)
            print(
                f"{axis.name}: {same:.0%} of the axis ids written are what the annotator says of the text "
                f"(its most frequent one throughout: {most:.0%})"
            )


if __name__ == "__main__":
    main()
