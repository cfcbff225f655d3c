"""From the runs of `multigrid_experiment.py` to a table, sentences and charts. Each number is a mean over seeds with the
half-width of its 95% interval (t distribution); a gain is the difference of two runs of the same seed, in bits per character.

A run is a dict: `corpus`, `model`, `seed`, `rival` (the plain decoder as large as it, `None` for plain decoders themselves),
`looks_ahead`, `factored`, `parameters`, `step_seconds`, `tokens_per_step` and `curve`, a list of `tokens`, `bits` (what the
text costs a character), `main` and `axes`.
"""

import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter


PLAIN = "plain"
CORPUS_NAMES = {
    "fairy_tales": "Fairy tales",
    "python": "Python source",
    "python_wide": "Python source, twice the width",
}
CONTROLS = ("random", "constant")
ALONE = ", of the block alone"  # ends the name of a grid whose annotators see no more text than the model
REMARKS = {
    "random": " (a control)",
    "constant": " (a control)",
    "all, factored": " (the sum of all axes' code lengths, an upper bound of what the text costs: axes are predicted apart)",
    "learned": " (distilled from the plain decoder of seed 0 for all seeds; its training is not counted)",
}
LEAKING, CAUSAL = "part of speech, whole word", "part of speech, previous word"


def interval(values) -> tuple[float, float]:
    """Mean and half-width of the 95% interval, `nan` for a single value."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def bits_at(run: dict, tokens: float) -> float:
    """The held-out bits after so many tokens, between two points of the curve on a straight line over log tokens.

    Raises:
        ValueError: before the curve's first point or after its last.
    """
    x = [point["tokens"] for point in run["curve"]]
    if not x[0] <= tokens <= x[-1] * (1 + 1e-9):
        raise ValueError(f"`tokens` must lie between {x[0]} and {x[-1]}, got {tokens}")
    return float(np.interp(math.log(tokens), np.log(x), [point["bits"] for point in run["curve"]]))


def tokens_until(run: dict, bits: float) -> float:
    """After how many tokens the held-out text costs no more than `bits`; infinity if it never does."""
    curve = run["curve"]
    if curve[0]["bits"] <= bits:
        return float(curve[0]["tokens"])
    for before, after in pairwise(curve):
        if after["bits"] <= bits:
            share = (before["bits"] - bits) / (before["bits"] - after["bits"])
            return math.exp((1 - share) * math.log(before["tokens"]) + share * math.log(after["tokens"]))
    return math.inf


def final(run: dict) -> float:
    return run["curve"][-1]["bits"]


def tokens_per_second(run: dict) -> float:
    return run["tokens_per_step"] / run["step_seconds"]


def gain_at_equal_seconds(run: dict, other: dict) -> float | None:
    """Of a run over another after equal seconds of training: as many as both have, which one of them ends with.

    `None` where the slower one has not come to the first point of its curve by then.
    """
    seconds = min(each["curve"][-1]["tokens"] / tokens_per_second(each) for each in (run, other))
    tokens = [seconds * tokens_per_second(each) for each in (run, other)]
    if any(count < each["curve"][0]["tokens"] for count, each in zip(tokens, (run, other))):
        return None
    return bits_at(other, tokens[1]) - bits_at(run, tokens[0])


def compare(runs: list[dict], others: list[dict]) -> dict:
    """A model against another, run by run of the same seed."""
    pairs = [(run, next(each for each in others if each["seed"] == run["seed"])) for run in runs]
    at_equal_seconds = [gain_at_equal_seconds(run, other) for run, other in pairs]
    shares = [tokens_until(run, final(other)) / other["curve"][-1]["tokens"] for run, other in pairs]
    return {
        "gain": interval([final(other) - final(run) for run, other in pairs]),
        "gain_at_equal_seconds": None if None in at_equal_seconds else interval(at_equal_seconds),
        "share_of_tokens": interval(shares) if all(map(math.isfinite, shares)) else None,
    }


def report_on(runs: list[dict]) -> dict:
    """`rows` of the table, `comparisons`, `checks` and the verdict as `notes`."""
    by_corpus = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: run["seed"]):
        by_corpus[run["corpus"]][run["model"]].append(run)
    rows, comparisons, checks, notes = [], [], [], []
    for corpus, models in by_corpus.items():
        against = {
            (model, other): compare(models[model], models[other])
            for model in models
            for other in others_of(model, models)
        }
        comparisons += [
            {"corpus": corpus, "model": model, "against": other, **result}
            for (model, other), result in against.items()
        ]
        rows += [row_of(corpus, model, models, against) for model in models]
        notes += verdict(corpus, models, against)
        if corpus.startswith("python"):
            best = causal_grids(models, against)[0]
            gain, half = against[best, best_plain(best, models)]["gain"]
            checks.append(
                {
                    "what": f"{CORPUS_NAMES[corpus]}, {best}: gain over the best plain decoder of no more parameters, lower end of its "
                    "interval",
                    "measured": round(gain - half, 4),
                    "target": "> 0.0",
                    "met": bool(gain - half > 0),
                }
            )
    return {"rows": rows, "comparisons": comparisons, "checks": checks, "notes": notes}


def others_of(model: str, models: dict) -> list[str]:
    """What a model is compared with: the plain decoders of its width and of its size, the best one that is no larger, and a
    random axis of its size."""
    size = models[model][0]["rival"]
    same_size = [name for name in ("random",) if name in models and size and models[name][0]["rival"] == size]
    return [
        name
        for name in dict.fromkeys([PLAIN, size, best_plain(model, models), *same_size])
        if name not in (None, model)
    ]


def best_plain(model: str, models: dict) -> str | None:
    """The best plain decoder of no more parameters than the one of the model's size: a larger one need not be better."""
    rival = models[model][0]["rival"]
    if rival is None:
        return None
    limit = models[rival][0]["parameters"]
    plain = [name for name, runs in models.items() if runs[0]["rival"] is None and runs[0]["parameters"] <= limit]
    return min(plain, key=lambda name: interval([final(run) for run in models[name]])[0])


def row_of(corpus: str, model: str, models: dict, against: dict) -> dict:
    runs = models[model]
    bits, half = interval([final(run) for run in runs])
    row = {
        "corpus": corpus.replace("_", " "),
        "model": model,
        "looks ahead": runs[0]["looks_ahead"],
        "parameters": runs[0]["parameters"],
        "step ms": 1e3 * float(np.median([run["step_seconds"] for run in runs])),
        "bits per character": bits,
        "bits +-": half,
    }
    result = against.get((model, runs[0]["rival"]))
    if result is not None:
        row["gain over equal parameters"], row["gain +-"] = result["gain"]
        row["gain at equal time"], row["equal time +-"] = result["gain_at_equal_seconds"] or (None, None)
        row["share of its text needed"] = result["share_of_tokens"] and result["share_of_tokens"][0]
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


def causal_grids(models: dict, against: dict) -> list[str]:
    """Models with axes that do not look ahead, controls left out; first those that gain most over the best plain decoder
    that is no larger."""
    grids = [
        model
        for model, runs in models.items()
        if runs[0]["rival"] and not runs[0]["looks_ahead"] and model not in CONTROLS
    ]
    return sorted(grids, key=lambda model: -against[model, best_plain(model, models)]["gain"][0])


def says(gain: tuple[float, float] | None) -> str:
    """A gain in words: one whose interval holds 0 is none."""
    if gain is None:
        return "cannot be compared, since the slower run was not measured so early"
    mean, half = gain
    if not abs(mean) > half:
        return f"neither gains nor loses ({mean:+.3f} +- {half:.3f})"
    return f"{'gains' if mean > 0 else 'loses'} {abs(mean):.3f} +- {half:.3f}"


def remark(model: str) -> str:
    return " (annotators see no more text than the model)" if model.endswith(ALONE) else REMARKS.get(model, "")


def verdict(corpus: str, models: dict, against: dict) -> list[str]:
    """Sentences on the runs of one corpus, from the numbers alone."""
    grids = causal_grids(models, against)
    sentences = [
        about_runs(models),
        *about_leakage(models, against),
        *about_each_grid(models, against),
        *about_best_grid(grids[0], models, against),
        *about_earlier_text(models),
        conclusion(grids, models, against),
    ]
    return [CORPUS_NAMES[corpus] + sentence for sentence in sentences]


def about_runs(models: dict) -> str:
    tokens, seeds = models[PLAIN][0]["curve"][-1]["tokens"], len(models[PLAIN])
    bits = interval([final(run) for run in models[PLAIN]])
    return (
        f": {tokens:,} characters read once, {seeds} seeds; the plain decoder of the grids' width needs "
        f"{bits[0]:.3f} +- {bits[1]:.3f} bits per character. Gains are in bits per character over plain decoders of equal "
        "parameters after equal text, unless said otherwise; intervals cover seeds, not the choice of text. The learning "
        "rate depends on a model's width alone and was not tuned for each model."
    )


def about_leakage(models: dict, against: dict) -> list[str]:
    if LEAKING not in models or CAUSAL not in models:
        return []
    leaked = interval([final(b) - final(a) for a, b in zip(models[LEAKING], models[CAUSAL])])
    return [
        ", leakage: with the prototype's alignment (the tag of the whole word, which looks ahead) part of speech "
        f"{says(gain_of(LEAKING, models, against))}, with the tag of the previous word it "
        f"{says(gain_of(CAUSAL, models, against))}. The {leaked[0]:.3f} +- {leaked[1]:.3f} bits per character between the "
        "two are leakage: what looking ahead gives away."
    ]


def about_each_grid(models: dict, against: dict) -> list[str]:
    sentences = []
    for model, runs in models.items():
        if runs[0]["rival"] and not runs[0]["looks_ahead"] and model != CAUSAL:
            sentence = f": {model}{remark(model)} {says(gain_of(model, models, against))}."
            if (model, "random") in against:
                sentence += f" Against a random axis instead, what it says {says(against[model, 'random']['gain'])}."
            sentences.append(sentence)
    return sentences


def about_best_grid(best: str, models: dict, against: dict) -> list[str]:
    """Sources of its gain, equal step time and sample efficiency."""
    opponent = strongest_plain(best, models)
    strongest, same_width = against[best, best_plain(best, models)], against[best, PLAIN]
    share = strongest["share_of_tokens"]
    return [
        f", where it comes from: over the plain decoder of equal width, {best} {says(same_width['gain'])}, a "
        f"single random axis, which is the machinery of one axis without content, {says(against['random', PLAIN]['gain'])}, "
        f"and the plain decoder of the size of {best}, which spends the parameters on width, {says(against[models[best][0]['rival'], PLAIN]['gain'])}.",
        f", equal step time: after as many seconds of training the best causal grid ({best}) "
        f"{says(strongest['gain_at_equal_seconds'])} against {opponent}, and "
        f"{says(same_width['gain_at_equal_seconds'])} against that of equal width. Seconds are CPU time of "
        "training steps; annotating, which is done before, is not counted.",
        f", sample efficiency: the best causal grid ({best}) "
        + (
            f"needs {share[0]:.0%} +- {share[1]:.0%} of the text to cost what {opponent} ends with."
            if share
            else f"does not reach in every seed what {opponent} ends with."
        ),
    ]


def about_earlier_text(models: dict) -> list[str]:
    sentences = []
    for alone in (model for model in models if model.endswith(ALONE)):
        complete = alone.removesuffix(ALONE)
        memory = interval([final(b) - final(a) for a, b in zip(models[complete], models[alone])])
        sentences.append(
            ", what stands before the block: models see one block, annotators the text before it as well. Against "
            f"annotators that see the block alone, this {says(memory)} ({complete})."
        )
    return sentences


def conclusion(grids: list[str], models: dict, against: dict) -> str:
    """Whether the best of the causal grids gains more than its interval and more than each control."""

    def gain(model):
        return against[model, best_plain(model, models)]["gain"]

    best, opponent = grids[0], strongest_plain(grids[0], models)
    mean, half = gain(best)
    control = max((gain(model)[0] for model in CONTROLS if model in models), default=0.0)
    if mean > half and mean > control:
        found = f"a real gain at equal text over {opponent}"
    else:
        why = "its interval does not lie above 0" if mean <= half else "a control gains as much"
        found = f"no gain at equal text over {opponent}, since {why}"
    return (
        f", verdict: {best} {says(gain(best))}: {found} (the best of {len(grids)} causal grids"
        f"{'' if best.endswith(ALONE) else ', whose annotators have read what stands before each block'}; intervals are not "
        "widened for the choice)."
    )


def gain_of(model: str, models: dict, against: dict) -> tuple[float, float]:
    """The gain over the plain decoder of equal parameters."""
    return against[model, models[model][0]["rival"]]["gain"]


def strongest_plain(model: str, models: dict) -> str:
    return f"the best plain decoder of no more parameters ({best_plain(model, models)})"


def draw(corpus: str, runs: list[dict], rows: list[dict], path: Path) -> None:
    """Loss against tokens, loss against seconds, and gains with their intervals; what looks ahead is dashed or hollow."""
    models = defaultdict(list)
    for run in runs:
        if run["corpus"] == corpus:
            models[run["model"]].append(run)
    figure, (by_tokens, by_seconds, gains) = plt.subplots(1, 3, figsize=(17, 7), layout="constrained")
    colors = dict(zip(models, plt.get_cmap("tab20").colors))
    for model, of_model in models.items():
        tokens = [point["tokens"] for point in of_model[0]["curve"]]
        bits = np.mean([[point["bits"] for point in run["curve"]] for run in of_model], axis=0)
        speed = np.median([tokens_per_second(run) for run in of_model])
        style = {"color": colors[model], "linestyle": "--" if of_model[0]["looks_ahead"] else "-", "label": model}
        style["linewidth"] = 2.5 if model.startswith(PLAIN) else 1.2
        by_tokens.plot(tokens, bits, **style)
        by_seconds.plot(np.array(tokens) / speed, bits, **style)
    by_tokens.set(xscale="log", xlabel="characters read", ylabel="bits per character, held out")
    by_seconds.set(xscale="log", xlabel="seconds of training on one core")
    for axes in (by_tokens, by_seconds):
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1 else f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    handles, labels = by_tokens.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=5)  # inside it would cover curves
    rows = [row for row in rows if row["corpus"] == corpus.replace("_", " ") and "gain +-" in row]
    for place, row in enumerate(reversed(rows)):
        for key, error, shift, label in (
            ("gain over equal parameters", "gain +-", 0.13, "equal text"),
            ("gain at equal time", "equal time +-", -0.13, "equal seconds"),
        ):
            gains.errorbar(
                row[key],
                place + shift,
                xerr=row[error],
                fmt="o" if shift > 0 else "s",
                color=colors[row["model"]],
                fillstyle="none" if row["looks ahead"] else "full",
                capsize=3,
                label=label if place == 0 else None,
            )
    gains.set_yticks(range(len(rows)), [r["model"] + (" (looks ahead)" * r["looks ahead"]) for r in reversed(rows)])
    gains.axvline(0, color="gray", linewidth=1)
    gains.set(xlabel="gain over the plain decoder of equal parameters,\nbits per character, 95% interval")
    gains.legend(fontsize=8)
    look_ahead = any(of_model[0]["looks_ahead"] for of_model in models.values())
    figure.suptitle(CORPUS_NAMES[corpus] + look_ahead * ": dashed and hollow is what looks ahead")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
