"""Does writing a page in all directions at once pay: model calls, seconds and quality, against one cell after another?

Holes of several shapes are masked in held-out pages of source text and filled by each sampler of one grid model.
Peers: raster order of the same model, one cell at a time, and a left-to-right model of equal size, trained as long on
the same text, which writes a hole row by row without what follows it. Quality is precision, recall and F1 of the cells
that are not blank, beside the same of holes filled with one token, and bits per byte of the text of the whole page
under a judge, a left-to-right model of another seed. All that is drawn is the most probable token. The three models are
what these commands leave:

    make demo FAMILY=heptapod
    make demo
    make judge
"""

import math
from functools import partial
from pathlib import Path

import harness
import torch
from corpora import build_tokenizer, load_texts
from page_score import baselines, score_pages
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoProcessor

from modeling_heptapod import HeptapodConfig, HeptapodForMaskedLM, HeptapodProcessor, LeapConfig, LeapForCausalLM


OUTPUTS = Path(__file__).resolve().parents[2] / "outputs"
GRID, LEFT_TO_RIGHT, JUDGE = "heptapod-tiny", "leap-tiny", "leap-judge"
REGIONS = ("hole", "middle", "bottom")
START = 256  # the token between texts


def load(name, auto_class):
    if not (OUTPUTS / name / "config.json").is_file():
        raise SystemExit(f"outputs/{name} is missing; see the commands at the top of {Path(__file__).name}.")
    return auto_class.from_pretrained(OUTPUTS / name)


def models(quick):
    """Grid model, its processor, left-to-right model, judge."""
    if not quick:
        processor = load(GRID, AutoProcessor)
        texts = [load(name, AutoModelForCausalLM).eval() for name in (LEFT_TO_RIGHT, JUDGE)]
        return load(GRID, AutoModelForMaskedLM).eval(), processor, *texts
    tokenizer = build_tokenizer("byte", [], for_pages=True)
    special = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    grid = HeptapodForMaskedLM(HeptapodConfig(vocab_size=len(tokenizer), **tiny, **special))
    texts = [LeapForCausalLM(LeapConfig(vocab_size=258, **tiny)) for _ in range(2)]
    return grid.eval(), HeptapodProcessor(tokenizer, 4, 12), *(model.eval() for model in texts)


def held_out_pages(processor, number):
    """Pages of the held-out text that are at least half written, evenly spaced, `[number, height, width]`."""
    texts = load_texts("stdlib", max_validation_bytes=131_072).validation
    pages = torch.cat([torch.from_numpy(processor.paginate(text)) for text in texts])
    pages = pages[(pages != processor.blank_token_id).double().mean((1, 2)) >= 0.5]
    return pages[:: len(pages) // number][:number]


def read(page, processor):
    """The tokens of the text on a page or on the beginning of one."""
    return [token for token in page.flatten().tolist() if token != processor.blank_token_id]


def left_padded(rows):
    length = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def fill_left_to_right(model, masked, processor):
    """Pages with masked cells written row by row; after the end of a line a row stays blank. And the number of calls."""
    pages, calls = masked.clone(), 0
    is_masked = masked == processor.tokenizer.mask_token_id
    for row in range(masked.shape[1]):
        columns = is_masked[0, row].nonzero().flatten().tolist()
        if not columns:
            continue
        first, count = columns[0], len(columns)
        before = [[START, *read(torch.cat((page[:row].flatten(), page[row, :first])), processor)] for page in pages]
        ids, mask = left_padded(before)
        options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        written = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
        calls += count
        ended = (written == processor.newline_token_id).cumsum(1) - (written == processor.newline_token_id).int() > 0
        ended |= written >= START
        left = pages[:, row, :first]
        done = ((left == processor.newline_token_id) | (left == processor.blank_token_id)).any(1, keepdim=True)
        pages[:, row, columns] = torch.where(ended | done, processor.blank_token_id, written)
    return pages, calls


@torch.no_grad()
def judged_bits(judge, pages, processor):
    """Bits per byte of the text of each page, `[pages]`, float64."""
    bits = []
    for page in pages:
        text = read(page, processor)
        ids = torch.tensor([[START, *(min(token, START) for token in text)]])
        nats = torch.nn.functional.cross_entropy(judge(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum")
        bits.append(nats / math.log(2) / max(1, len(text)))
    return torch.stack(bits)


def _discard(fill, masked):
    fill(masked)


def standard_error(values):
    return (values.std() / len(values) ** 0.5).item()


class Hole:
    """Pages with one region open; `judge_filling` measures a way to fill it and adds a row to the report."""

    def __init__(self, region, pages, original, processor, judge, report):
        self.region, self.pages, self.original = region, pages, original
        self.processor, self.judge, self.report = processor, judge, report
        self.masked = processor.mask_cells(pages, region)
        self.is_masked = self.masked != pages
        self.cells = int(self.is_masked[0].sum())
        self.f1, self.bits = {}, {}

    def judge_filling(self, name, fill):
        filled, calls = fill(self.masked)
        given = torch.equal(filled[~self.is_masked], self.pages[~self.is_masked])
        closed = not (filled == self.processor.tokenizer.mask_token_id).any()
        harness.require(given and closed, f"{name} changed given cells or left cells masked")
        score = score_pages(filled, self.pages, self.is_masked, self.processor.blank_token_id)
        bits = judged_bits(self.judge, filled, self.processor) - self.original
        self.f1[name], self.bits[name] = score.f1_of_pages, bits
        self.report.row(
            region=self.region,
            masked_cells=self.cells,
            how=name,
            model_calls=calls,
            precision=score.precision,
            recall=score.recall,
            F1=score.f1,
            standard_error=standard_error(score.f1_of_pages),
            cells_right_with_blanks=score.right_with_blanks,
            judge_bits_above_original=bits.mean().item(),
            standard_error_of_bits=standard_error(bits),
        )

    def judge_baselines(self):
        """What it scores to fill the hole with one token."""
        for name, filled in baselines(self.pages, self.is_masked, self.processor).items():
            self.judge_filling(name, lambda _, filled=filled: (filled, 0))

    def time_fillings(self, ways, rounds):
        """Seconds for the first page alone, all ways in turns. Returns how many rounds were disturbed."""
        seconds, disturbed = harness.in_turns(
            {name: partial(_discard, fill, self.masked[:1]) for name, fill in ways.items()}, rounds
        )
        for name, each in seconds.items():
            self.report.row(
                region=self.region,
                masked_cells=self.cells,
                how=name,
                seconds_a_page=each,
                raster_over_it=seconds["raster"] / each,
            )
        return disturbed

    def compare(self, name, peer, target):
        """How far `name` is ahead of `peer`, page by page, in standard errors."""
        ahead = {
            "F1": self.f1[name] - self.f1[peer],
            "judge's bits": self.bits[peer] - self.bits[name],
        }
        for what, values in ahead.items():
            distance = values.mean().item() / max(standard_error(values), 1e-12)
            self.report.check(
                f"{self.region}: {name} ahead of {peer} in {what}, standard errors", distance, ">=", target
            )


def main():
    report, quick = harness.start("Filling holes in pages: all directions at once against one cell after another")
    grid, processor, left_to_right, judge = models(quick)
    pages, rounds = held_out_pages(processor, 3 if quick else 12), 1 if quick else 3
    original = judged_bits(judge, pages, processor)

    def fill(masked, **options):
        output = grid.generate(masked, return_dict_in_generate=True, seed=0, **options)
        return output.sequences, output.nfe

    for region in REGIONS[:1] if quick else REGIONS:
        hole = Hole(region, pages, original, processor, judge, report)
        some, few = max(1, hole.cells // 16), max(1, hole.cells // 64)
        schedules = {
            "raster": {"sampler": "raster"},
            "confidence, cosine, 1/16": {"sampler": "confidence", "max_denoising_steps": some},
            "confidence, linear, 1/16": {
                "sampler": "confidence",
                "mask_schedule": "linear",
                "max_denoising_steps": some,
            },
            "confidence, cosine, 1/64": {"sampler": "confidence", "max_denoising_steps": few},
            "entropy bound 0.5": {"sampler": "entropy_bound", "entropy_bound": 0.5},
            "random, linear, 1/16": {"sampler": "random", "mask_schedule": "linear", "max_denoising_steps": some},
        }
        ways = {name: partial(fill, **options) for name, options in schedules.items()}
        ways["left to right"] = partial(fill_left_to_right, left_to_right, processor=processor)
        for name, way in ways.items():
            hole.judge_filling(name, way)
        hole.judge_baselines()
        if region == "hole":
            disturbed = hole.time_fillings(ways, rounds)
        hole.compare("confidence, cosine, 1/16", "raster", -2.0)
        if region != "bottom":  # there is no text after that one
            hole.compare("confidence, cosine, 1/16", "left to right", 2.0)

    height, width = pages.shape[1:]
    report.note(f"{len(pages)} held-out pages of {height} x {width} cells in one batch.")
    report.note(
        "Precision, recall and F1 are of cells that are not blank; the standard error after them is that of F1."
    )
    report.note(f"Seconds: one page alone, medians of {rounds} rounds, {disturbed} disturbed by other processes.")
    report.note(f"The judge gives the original pages {original.mean().item():.3f} bits per byte.")
    report.note(
        f"Parameters: grid {grid.num_parameters():,}, left to right {left_to_right.num_parameters():,}, "
        f"judge {judge.num_parameters():,}."
    )
    report.finish()


if __name__ == "__main__":
    main()
