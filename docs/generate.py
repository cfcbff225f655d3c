"""Generated parts of README.md and docs/: `python docs/generate.py` writes them, `--check` fails where one is out of date.

A part stands between `<!-- KIND:NAME -->` and `<!-- /KIND -->`:

- `config:CLASS`: a table of every field of a configuration class, from its docstring,
- `models:all`: the models whose cards are in `hub_cards/`,
- `figures:all`: one line a family from `tests/benchmarks/results/`,
- `bench:NAME`: a benchmark's tables, by `tests/benchmarks/tables.py`.
"""

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from pathlib import Path

import yaml


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

import modeling_heptapod  # noqa: E402
from tests.benchmarks import tables  # noqa: E402


MARKERS = re.compile(r"(<!-- (config|models|figures):(\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
FAMILIES = ("leap", "hierarchical_lm", "heptapod", "multigrid")
# Fields that most models of Transformers have; `auto_docstring` describes them, so the classes here do not.
COMMON = {
    "vocab_size": "Number of tokens.",
    "hidden_size": "Width of the embeddings and of every layer.",
    "intermediate_size": "Width of the feed-forward, four times `hidden_size` when not given.",
    "num_hidden_layers": "Number of layers.",
    "num_attention_heads": "Number of heads.",
    "hidden_act": "Activation of the feed-forward, a name in `transformers.activations.ACT2FN`.",
    "rope_parameters": "Rotary positions: `rope_theta`, `rope_type` and what the type needs.",
    "max_position_embeddings": "Longest text. Learned positions end there; the others go beyond it.",
    "layer_norm_eps": "Epsilon of the layer norms.",
    "rms_norm_eps": "Epsilon of the RMS norms.",
    "initializer_range": "Standard deviation of initial weights.",
    "use_cache": "Whether `forward` returns a cache.",
    "tie_word_embeddings": "Whether the output layer uses the weights of the embeddings.",
    "pad_token_id": "Id of the padding token.",
    "bos_token_id": "Id of the token that begins a text.",
    "eos_token_id": "Id of the token, or the list of tokens, that ends a text.",
}
# Where one of them means something else.
PECULIAR = {"HierarchicalLMConfig": {"num_attention_heads": "Number of heads, of each hierarchy."}}


def documented_fields(config_class: type) -> dict[str, str]:
    """What the docstring in the source says of each field, by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_class)))
    docstring = ast.get_docstring(tree.body[0]).split("\nExample:")[0]
    parts = re.split(r"^(\w+) \(.*\):\n", docstring, flags=re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in zip(parts[1::2], parts[2::2])}


def config_table(class_name: str) -> str:
    """A Markdown table of all fields of a configuration class.

    Raises:
        KeyError: for a field that neither the docstring nor `COMMON` describes.
    """
    config_class = getattr(modeling_heptapod, class_name)
    documented = {**COMMON, **PECULIAR.get(class_name, {}), **documented_fields(config_class)}
    lines = ["| field | default | meaning |", "| --- | --- | --- |"]
    for field in own_fields(config_class):
        default = f'"{field.default}"' if isinstance(field.default, str) else field.default
        meaning = documented[field.name].replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{default}` | {meaning} |")
    return "\n".join(lines)


def own_fields(config_class: type) -> list[dataclasses.Field]:
    """The fields that a class adds to those of every configuration."""
    return [field for field in dataclasses.fields(config_class) if field.name in inspect.get_annotations(config_class)]


def model_table(is_linked: bool = True) -> str:
    """The models that have a card, with their bits per byte; the site of the docs has no cards to link to."""
    lines = ["| model | parameters | bits per byte | measured as |", "| --- | --- | --- | --- |"]
    cards = [path for path in (ROOT / "hub_cards").glob("*.md") if path.stem != "template"]
    for path in sorted(cards, key=lambda path: (FAMILIES.index(path.stem.rsplit("-", 1)[0]), path.stem)):
        _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
        metric = yaml.safe_load(front)["model-index"][0]["results"][0]["metrics"][-1]
        name = f"[`{path.stem}`](hub_cards/{path.name})" if is_linked else f"`{path.stem}`"
        parameters = re.search(r"([\d,]+) parameters", body)[1]
        lines.append(
            f"| {name} | {parameters} | {metric['value']:.3f} | {metric['name'].removeprefix('bits per byte, ')} |"
        )
    return "\n".join(lines)


def figure_lines(prefix: str = "docs/") -> str:
    """One line a family, with the command that measured it and a link to its table, from the newest results."""
    results = {name: newest for name, (newest, *_) in tables.read_results().items()}

    def row(name, **where):
        (found,) = [r for r in results[name]["rows"] if all(r.get(key) == value for key, value in where.items())]
        return found

    step, state = row("training_step", how="eager, float32", length=16384), row("decode_state", context=100000)
    token, full = (
        row("hierarchical_decode", model=m, context=c)
        for m, c in (("windows 32, 64, none", 1024), ("windows 32, 64, 64", 8192))
    )
    attention = row("grid_attention", grid="64 x 64", radius=3, passes="forward + backward", **{"ours peak MB": None})
    hole, left = (
        next(
            r
            for r in results["bench_grid_generation"]["rows"]
            if r["region"] == "hole" and r["how"] == how and r.get("model calls")
        )
        for how in ("confidence, cosine, 1/16", "left to right")
    )
    empty = row("page_baselines", pages="of the benchmark", region="hole", how="all blanks")
    gain = row("multigrid_experiment", corpus="python wide", model="all, light wiring")
    benchmarks, experiments = f"{prefix}benchmarks.md", f"{prefix}experiments.md"
    lines = [
        f"**LEAP**: a training step at length 16,384 is {step['GPT2 over ours']:.1f} times as fast as GPT-2's. After "
        f"100,000 tokens the state of generation has {state['state bytes']:,} bytes ([table]({benchmarks}#a-training-step), `{results['training_step']['command']}`).",
        f"**Hierarchical LM**: generating a token takes {token['ours ms']:.1f} ms after 1,024 tokens, {token['prototype over ours']:.0f} times as "
        f"fast as its prototype, and {full['ours ms']:.1f} ms after 8,192 with a window in every stream. A GPT-2 with a quarter of the parameters takes {token['GPT2 ms']:.1f} ms after 1,024 "
        f"([table]({benchmarks}#hierarchical-lm-one-more-token), `{results['hierarchical_decode']['command']}`).",
        f"**Heptapod grid**: local attention on 64 x 64 cells is {attention['masked SDPA over ours']:.1f} times as fast as masked SDPA. "
        f"When it fills the centre of held-out pages in {hole['model calls']} forward passes, {hole['cells right with blanks']:.2f} of the cells, blanks "
        f"included, are as in the original. A left-to-right model of equal size reaches {left['cells right with blanks']:.2f} in "
        f"{left['model calls']}, and a blank centre {empty['cells right with blanks']:.2f} ([table]({experiments}#filling-holes), "
        f"`{results['bench_grid_generation']['command']}`).",
        f"**MultiGrid**: four lexer axes gain {gain['gain over equal parameters']:.3f} +- {gain['gain +-']:.3f} bits per character over a "
        f"decoder-only transformer of equal size on the same text, and lose {-gain['gain at equal time']:.3f} +- {gain['equal time +-']:.3f} in the same training time "
        f"([table]({experiments}#what-axes-gain), `{results['multigrid_experiment']['command']}`).",
    ]
    options = {"width": 130, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, initial_indent="- ", subsequent_indent="  ", **options) for line in lines)


def generate(path: Path, text: str) -> str:
    """`text` of the page at `path` with its generated parts as they should be."""
    in_docs = path.is_relative_to(ROOT / "docs")
    makers = {
        "config": config_table,
        "models": lambda _: model_table(not in_docs),
        "figures": lambda _: figure_lines("" if in_docs else "docs/"),
    }
    text = MARKERS.sub(lambda match: f"{match[1]}{makers[match[2]](match[3])}\n{match[4]}", text)
    return tables.fill(text, tables.read_results())


def pages() -> list[Path]:
    """README.md and the pages in docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    arguments = parser.parse_args()
    stale = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        generated = generate(path, text)
        if generated != text:
            stale.append(str(path.relative_to(ROOT)))
            if not arguments.check:
                path.write_text(generated, encoding="utf-8")
    if arguments.check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run `python docs/generate.py`.")


if __name__ == "__main__":
    main()
