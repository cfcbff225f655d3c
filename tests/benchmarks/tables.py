"""Render benchmark results as Markdown, between `<!-- bench:NAME -->` and `<!-- /bench -->`.

`python tests/benchmarks/tables.py` prints all; `python docs/generate.py` fills in the markers of README.md and docs/.
"""

import argparse
import json
import math
import re
from pathlib import Path


RESULTS = Path(__file__).resolve().parent / "results"
MARKERS = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
NEXT = "\n\nOn another kind of processor:\n\n"


def format_cell(value) -> str:
    """Numbers with three significant digits, the rest as it is."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value == 0 or not math.isfinite(value):
            return f"{value:g}"
        if not 1e-3 <= abs(value) < 1e5:
            return f"{value:.2e}"
        return f"{value:#.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def table(rows: list[dict]) -> str:
    """A Markdown table with a column for every name that occurs, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[format_cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render(result: dict) -> str:
    """Rows, targets, and where and how they were measured."""
    device, settings = result["device"], result["settings"]
    where = [device["gpu"]] if device["gpu"] else []
    where.append(
        f"{device['cpu']} ({', '.join(device['units'])}), {settings['threads']} threads of {device['cores']} cores"
    )
    where += [f"{name} {version}" for name, version in result["versions"].items()]
    where += [f"THP_MEM_ALLOC_ENABLE={settings['THP_MEM_ALLOC_ENABLE']}"]
    source = f"`{result['command']}` at `{result['commit']}`, {result['date'][:10]}; {'; '.join(where)}."
    targets = [
        {"target": f"{check['what']} {check['target']}", "measured": check["measured"], "met": check["met"]}
        for check in result["checks"]
    ]
    notes = result["notes"]
    notes = " ".join(notes) if len(notes) < 6 else "\n".join(f"- {note}" for note in notes)
    return "\n\n".join((table(result["rows"]), table(targets), notes, source))


def fill(text: str, results: dict[str, list[dict]]) -> str:
    """`text` with what stands between its markers replaced by the results of each kind of processor.

    Raises:
        KeyError: for a marker whose benchmark has no result.
    """

    def replace(match):
        opening, name, closing = match.groups()
        if name not in results:
            raise KeyError(f"no results for {name!r}; there are {sorted(results)}")
        return f"{opening}{NEXT.join(map(render, results[name]))}\n{closing}"

    return MARKERS.sub(replace, text)


def read_results() -> dict[str, list[dict]]:
    """Results that `run_all.py` wrote, by name: one for each kind of processor, the newest first."""
    results: dict[str, list[dict]] = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        results.setdefault(path.stem, []).append(json.loads(path.read_text(encoding="utf-8")))
    return {name: sorted(each, key=lambda result: result["date"], reverse=True) for name, each in results.items()}


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for name, results in read_results().items():
        print(f"## {results[0]['title']} ({name})\n\n{NEXT.join(map(render, results))}\n")


if __name__ == "__main__":
    main()
