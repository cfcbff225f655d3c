"""What do axes gain? The prototype's experiment again, with its leak, its controls and plain decoders of equal size.

    python training/experiments/multigrid_experiment.py --jobs 2                       # everything, 40 minutes of two cores
    python training/experiments/multigrid_experiment.py --corpus python --seeds 5      # one corpus; finished runs are kept
    python training/experiments/multigrid_experiment.py --quick                        # tiny: works, measures nothing

Every model reads the same blocks of characters in an order that the seed decides, none of them twice, at a constant learning
rate; what is measured is an average of its last weights, so that every point of a curve is one to compare at. Corpora:

- fairy tales: `../shared/data/fairy_tales` next to the repository, split by whole books (the test books of its README are
  held out, its validation book is not used). Prepared as for a notebook on characters: lower case, accents taken off, all but
  letters, digits and `.,;:!?'"()-` made blanks, blanks in a row one blank, a paragraph a line; the middle of each book.
- Python source: files of Python's standard library that are ASCII throughout, as they are, split by file; once more for
  models of twice the width with the light wiring and nine tenths of the loss for the text. Both were chosen by a probe that
  looked at the held-out text of seed 0, which favours these grids.

Axes annotate whole texts, so that a lexer's axis tells what was opened before the 64 characters that the model sees; one grid
has axes that see no more than the model does.

A finished run is kept in `outputs/multigrid_experiment/`, so that an experiment that was cut off goes on with the next.
"""

import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]

from argument_checks import need, whole


need("train", "matplotlib")
need("axes", "nltk", "scipy", "sklearn")

import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import tempfile
import time
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import transformers
from corpora import PackedBlocks, annotate, build_tokenizer, encode
from distill_axis import distill
from experiment_texts import SHARED, TEXTS
from multigrid_report import draw, report_on
from objectives import sum_nats
from provenance import commit, machine
from redaction import Parser

from modeling_heptapod import MultiGridConfig, MultiGridForCausalLM, make_axis


KEPT = ROOT / "outputs" / "multigrid_experiment"
RESULTS = ROOT / "tests" / "benchmarks" / "results"

SETTINGS = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "block_size": 64,
    "batch_size": 8,
    "steps": 1300,
    "learning_rate": 5e-3,  # at `hidden_size`; falls with the width
    "warmup_steps": 50,
    "weight_average": 0.98,
    "evaluations": 7,  # one at the end, each other after 2 ** (-2 / 3) of the next one's tokens
    "held_out_characters": 32_768,
}
QUICK = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "block_size": 32, "batch_size": 2}
QUICK |= {"steps": 24, "evaluations": 7, "held_out_characters": 300}


@dataclass(frozen=True)
class Grid:
    """A model with axes.

    Attributes:
        axes: by name.
        size: names the plain decoder that is as large as the largest grid of that size.
        options: of its config.
        alone: whether annotators see nothing but the block that the model sees.
    """

    axes: tuple[str, ...]
    size: str
    options: dict = field(default_factory=dict)
    alone: bool = False


LEXER = ("token_kind", "bracket", "indentation", "string")
WIDE_LIGHT = {"axis_hidden_size": 32, "cross_feed_forward": False, "main_loss_weight": 0.9}
LEARNED = "learned"
PLAIN = "plain"
GRIDS = {
    "fairy_tales": {
        "affixes": Grid(("affix",), "affixes"),
        "part of speech, whole word": Grid(("part_of_speech_word",), "one axis"),
        "part of speech, previous word": Grid(("part_of_speech",), "one axis"),
        "affixes + whole word": Grid(("affix", "part_of_speech_word"), "two axes"),
        "affixes + previous word": Grid(("affix", "part_of_speech"), "two axes"),
        "random": Grid(("random",), "one axis"),
        "constant": Grid(("constant",), "one axis"),
    },
    "python": {
        "token kind": Grid(("token_kind",), "one axis"),
        "indentation + bracket": Grid(("indentation", "bracket"), "two axes"),
        "all lexer axes": Grid(LEXER, "four axes"),
        "all, light wiring": Grid(LEXER, "light wiring", {"axis_hidden_size": 16, "cross_feed_forward": False}),
        "all lexer axes, of the block alone": Grid(LEXER, "four axes", alone=True),
        "all, factored": Grid(LEXER, "four axes, factored", {"axis_order": "factored"}),
        LEARNED: Grid((LEARNED,), "one axis"),
        "random": Grid(("random",), "one axis"),
    },
    "python_wide": {
        "all, light wiring": Grid(LEXER, "light wiring", WIDE_LIGHT),
        "all, light wiring, of the block alone": Grid(LEXER, "light wiring", WIDE_LIGHT, alone=True),
        "random": Grid(("random",), "one light axis", WIDE_LIGHT),
    },
}
# Where a corpus is read by models of another size.
SETTINGS_OF = {"python_wide": {"hidden_size": 96, "learning_rate": 2.5e-3}}


# Texts


class Axis(NamedTuple):
    name: str
    size: int
    causal: bool


class BlocksAlone(PackedBlocks):
    """Blocks that are annotated as if nothing came before them, so that annotators know no more than a model could."""

    def __init__(self, stream: np.ndarray, block_size: int, axes: list, separator: int):
        super().__init__(stream, block_size)
        self.axes, self.separator = axes, separator

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = super().__getitem__(index)
        ends = [*torch.nonzero(block["input_ids"] == self.separator).flatten().tolist(), len(block["input_ids"])]
        block["axis_ids"] = torch.zeros(len(self.axes), ends[-1], dtype=torch.int64)
        start = 0
        for end in ends:
            text = bytes(block["input_ids"][start:end].tolist()).decode("ascii")
            for row, axis in zip(block["axis_ids"], self.axes):
                row[start:end] = torch.tensor(axis.annotate(text), dtype=torch.int64)
            start = end + 1
        return block


class Corpus:
    """Characters to train on and characters held out, with a column of axis ids for each axis.

    Attributes:
        settings (`dict`): of its models.
        texts (`tuple[list[str], list[str]]`): to train on, held out.
        streams (`tuple[np.ndarray, np.ndarray]`): their tokens; one byte a character.
        axes (`dict[str, Axis]`): what a model must know of annotators, by the names that `Grid.axes` uses.
        columns (`dict[str, tuple[np.ndarray, np.ndarray]]`): what they say of both streams, `[1, number of tokens]`.
    """

    def __init__(self, name: str, settings: dict):
        self.settings = settings
        characters = settings["steps"] * settings["batch_size"] * settings["block_size"]
        self.tokenizer = build_tokenizer("byte", [])
        self.texts = TEXTS[name](characters, settings["held_out_characters"])
        self.streams = tuple(encode(part, self.tokenizer) for part in self.texts)
        self.axes, self.columns = {}, {}
        for axis in {axis for grid in GRIDS[name].values() for axis in grid.axes} - {LEARNED}:
            self.add(axis, axis)

    def add(self, name: str, spec) -> None:
        """Annotate both parts with the axis of this spec."""
        axis = make_axis(spec)
        self.axes[name] = Axis(axis.name, len(axis.vocabulary), axis.causal)
        self.columns[name] = tuple(
            annotate(part, self.tokenizer, [axis], f"Annotating: {name}") for part in self.texts
        )

    def blocks(self, grid: Grid, settings: dict) -> tuple[PackedBlocks, PackedBlocks]:
        """Training blocks and held-out blocks with the axes of this grid."""
        size = settings["block_size"]
        if grid.alone:
            axes = [make_axis(axis) for axis in grid.axes]
            return tuple(BlocksAlone(stream, size, axes, self.tokenizer.eos_token_id) for stream in self.streams)
        parts = []
        for part, stream in enumerate(self.streams):
            columns = [self.columns[axis][part] for axis in grid.axes]
            parts.append(PackedBlocks(stream, size, meta=np.concatenate(columns) if columns else None))
        return tuple(parts)


# Models


def config_of(grid: Grid, corpus: Corpus, settings: dict, **sizes) -> MultiGridConfig:
    sizes = {"hidden_size": settings["hidden_size"], **sizes}
    return MultiGridConfig(
        vocab_size=len(corpus.tokenizer),
        axis_names=[corpus.axes[name].name for name in grid.axes],
        axis_vocab_sizes=[corpus.axes[name].size for name in grid.axes],
        num_hidden_layers=settings["num_hidden_layers"],
        num_attention_heads=settings["num_attention_heads"],
        max_position_embeddings=settings["block_size"],
        initializer_range=sizes["hidden_size"] ** -0.5,
        **sizes,
        **grid.options,
    )


def number_of_parameters(config: MultiGridConfig) -> int:
    with torch.device("meta"):
        return MultiGridForCausalLM(config).num_parameters()


def plain_config(parameters: int, corpus: Corpus, settings: dict) -> MultiGridConfig:
    """The plain decoder of this many parameters: the nearest width, and feed-forwards that make up the rest."""

    def config(width, intermediate):
        return config_of(Grid((), PLAIN), corpus, settings, hidden_size=width, intermediate_size=intermediate)

    heads = settings["num_attention_heads"]
    width = heads
    while number_of_parameters(config(width + heads, 4 * (width + heads))) <= parameters:
        width += heads
    sizes = [number_of_parameters(config(width, 4 * width + more)) for more in (0, 1)]
    return config(width, 4 * width + math.ceil((parameters - sizes[0]) / (sizes[1] - sizes[0])))


def models_of(name: str, corpus: Corpus, settings: dict) -> dict[str, tuple[Grid, MultiGridConfig]]:
    """All models of a corpus by name: the plain decoder of the grids' width, those of the grids' sizes, the grids."""
    grids = {model: grid for model, grid in GRIDS[name].items() if set(grid.axes) <= set(corpus.axes)}
    configs = {model: config_of(grid, corpus, settings) for model, grid in grids.items()}
    plain = Grid((), PLAIN)
    models = {PLAIN: (plain, config_of(plain, corpus, settings))}
    for size in dict.fromkeys(grid.size for grid in grids.values()):
        largest = max(number_of_parameters(configs[model]) for model, grid in grids.items() if grid.size == size)
        models[rival(size)] = plain, plain_config(largest, corpus, settings)
    return models | {model: (grid, configs[model]) for model, grid in grids.items()}


def rival(size: str) -> str:
    return f"plain, size of {size}"


# Training


def averaged(decay: float):
    """How `AveragedModel` updates: an exponential average, over fewer steps at the beginning."""

    @torch.no_grad()
    def update(averages, current, number):
        number = int(number)
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + number) / (10 + number)))

    return update


def learning_rate(config: MultiGridConfig, settings: dict) -> float:
    """Of a model of this width. With the inverse of the width; with that of its square root wide decoders did worse."""
    return settings["learning_rate"] * (settings["hidden_size"] / config.hidden_size)


def train(config: MultiGridConfig, train_blocks, held_out, settings: dict, seed: int) -> tuple[torch.nn.Module, dict]:
    """The averaged model, and its curve with the CPU seconds of one training step (median)."""
    torch.manual_seed(seed)
    model = MultiGridForCausalLM(config).train()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=averaged(settings["weight_average"]))
    peak = learning_rate(config, settings)
    optimizer = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.99), weight_decay=0.1)
    steps, size = settings["steps"], settings["batch_size"]
    order = np.random.default_rng(seed).permutation(len(train_blocks))
    stops = {max(1, round(steps / 2 ** (2 * number / 3))) for number in range(settings["evaluations"])}
    curve, seconds = [], []
    for step in range(1, steps + 1):
        batch = batch_of(train_blocks, order[(step - 1) * size : step * size])
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, step / settings["warmup_steps"])
        began = time.process_time()  # of the only thread: pauses and neighbours do not count
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)
        average.update_parameters(model)
        if step in stops:
            bits = measure(average.module.eval(), held_out, size)
            curve.append({"tokens": step * size * settings["block_size"], **bits})
    return average.module, {"curve": curve, "step_seconds": float(np.median(seconds))}


def batch_of(blocks, indices) -> dict[str, torch.Tensor]:
    rows = [blocks[int(index)] for index in indices]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def measure(model, blocks, size: int) -> dict:
    """Bits per predicted character of held-out text: what the text costs, its main axis, and each axis by name.

    The text costs what its main axis costs, but in the factored order, which predicts characters from axis ids that it
    has to pay for first: there it costs all axes together.
    """
    nats, names = 0.0, model.config.axis_names
    for start in range(0, len(blocks), size):
        batch = batch_of(blocks, range(start, min(start + size, len(blocks))))
        labels = batch["labels"]
        outputs = model(**batch, use_cache=False)
        metas = zip(outputs.axis_logits or (), batch["axis_ids"].unbind(1) if names else ())
        nats += np.array([sum_nats(outputs.logits, labels).sum(), *(sum_nats(*meta).sum() for meta in metas)])
    bits = (nats / math.log(2) / len(blocks) / blocks.stride).tolist()
    text = sum(bits) if model.config.axis_order == "factored" else bits[0]
    return {"bits": text, "main": bits[0], "axes": dict(zip(names, bits[1:]))}


# Runs, each in a process of one thread


@dataclass(frozen=True)
class Task:
    corpus: str
    model: str
    seed: int

    @property
    def path(self) -> Path:
        return Path(f"{self.corpus}-{re.sub('[^a-z]+', '_', self.model)}-{self.seed}.json")

    @property
    def teaches(self) -> bool:
        """Whether the learned axis comes from this run."""
        return self.model == PLAIN and self.seed == 0 and any(LEARNED in g.axes for g in GRIDS[self.corpus].values())


@dataclass
class Work:
    """What all runs share."""

    corpora: dict[str, Corpus]
    folder: Path
    commit: str


def start_worker(work: Work) -> None:
    global WORK
    WORK = work
    torch.set_num_threads(1)


def learned_path(folder: Path, corpus: str) -> Path:
    return folder / f"{corpus}-learned_axis.json"


def run(task: Task) -> dict:
    """The figures of a run, from its side file where it was made before."""
    corpus = WORK.corpora[task.corpus]
    settings = corpus.settings
    grid, config = models_of(task.corpus, corpus, settings)[task.model]
    blocks = corpus.blocks(grid, settings)
    own = {**settings, "learning_rate": learning_rate(config, settings)}
    described = json.dumps([own, asdict(grid), config.to_diff_dict(), task.seed], sort_keys=True).encode()
    arrays = [array for part in blocks for array in (part.stream, part.meta) if array is not None]
    key = hashlib.sha256(b"".join([described, *(array.tobytes() for array in arrays)])).hexdigest()
    path, learned = WORK.folder / task.path, learned_path(WORK.folder, task.corpus)
    if path.is_file() and (learned.is_file() or not task.teaches):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept
    model, figures = train(config, *blocks, settings, task.seed)
    if task.teaches:
        distilled = distill(model, corpus.tokenizer, *corpus.texts, LEARNED, block_size=settings["block_size"])
        found = {"axis": distilled.axis.to_dict(), "agreement": distilled.agreement, "chance": distilled.chance}
        write(learned, found)
    figures |= {
        "corpus": task.corpus,
        "model": task.model,
        "seed": task.seed,
        "rival": rival(grid.size) if grid.axes else None,
        "looks_ahead": not all(corpus.axes[name].causal for name in grid.axes),
        "factored": config.axis_order == "factored",
        "hidden_size": config.hidden_size,
        "parameters": number_of_parameters(config),
        "tokens_per_step": settings["batch_size"] * settings["block_size"],
        "commit": WORK.commit,
        "key": key,
    }
    write(path, figures)
    return figures


def write(path: Path, content: dict) -> None:
    """All of it or nothing, whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def run_all(tasks: list[Task], work: Work, jobs: int) -> list[dict]:
    runs = []
    with multiprocessing.get_context("spawn").Pool(jobs, start_worker, (work,)) as pool:
        for figures in pool.imap(run, tasks):
            runs.append(figures)
            print(
                f"[{len(runs)}/{len(tasks)}] {figures['corpus']}, {figures['model']}, seed {figures['seed']}: "
                f"{figures['curve'][-1]['bits']:.3f} bits per character, {1e3 * figures['step_seconds']:.0f} ms a step",
                flush=True,
            )
    return runs


def experiment(settings: dict[str, dict], seeds: int, jobs: int, folder: Path) -> list[dict]:
    """All runs on the corpora of these settings; those of learned axes last, because the axis comes from a run."""
    corpora = {name: Corpus(name, each) for name, each in settings.items()}
    work = Work(corpora, folder, commit(ROOT))

    def tasks(models):
        # Seeds outermost: what is cut off has whole seeds.
        return [Task(name, model, seed) for seed in range(seeds) for name in corpora for model in models(name)]

    runs = run_all(tasks(lambda name: models_of(name, corpora[name], settings[name])), work, jobs)
    for name, corpus in corpora.items():
        if any(LEARNED in grid.axes for grid in GRIDS[name].values()):
            corpus.add(LEARNED, json.loads(learned_path(folder, name).read_text(encoding="utf-8"))["axis"])
    learned = tasks(lambda name: [model for model, grid in GRIDS[name].items() if LEARNED in grid.axes])
    return runs + run_all(learned, work, jobs)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", choices=[*GRIDS, "all"], default="all", help="which text")
    parser.add_argument("--seeds", type=whole(2), default=3, help="how often each model is trained, at least 2")
    parser.add_argument("--jobs", type=whole(1), default=2, help="processes of one thread each")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, writes nothing")
    args = parser.parse_args()
    if (SHARED / "nltk_data").is_dir():
        os.environ.setdefault("NLTK_DATA", str(SHARED / "nltk_data"))
    names = list(GRIDS) if args.corpus == "all" else [args.corpus]
    if "fairy_tales" in names and not (SHARED / "fairy_tales").is_dir():
        print("fairy tales: left out, ../shared/data/fairy_tales is not there")
        names.remove("fairy_tales")

    settings = {name: {**SETTINGS, **(QUICK if args.quick else SETTINGS_OF.get(name, {}))} for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        kept, results = (Path(scratch), Path(scratch)) if args.quick else (KEPT, RESULTS)
        runs = experiment(settings, args.seeds, args.jobs, kept)
        report = {
            "name": "multigrid_experiment",
            "title": "What axes gain",
            "command": " ".join(["python", "training/experiments/multigrid_experiment.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "commit": commit(ROOT),
            "device": machine(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "quick": args.quick,
            "settings": {
                "threads": 1,
                "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
                **SETTINGS,
                **(QUICK if args.quick else {}),
                "of_corpora": {} if args.quick else SETTINGS_OF,
            },
            **report_on(runs),
        }
        write(results / "multigrid_experiment.json", {**report, "runs": runs})
        for name in names:
            draw(name, runs, report["rows"], results / f"multigrid_experiment_{name}.png")
    print("\n".join(report["notes"]))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
