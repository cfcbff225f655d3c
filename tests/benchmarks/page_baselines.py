"""What do holes filled with one token score, on the pages of bench_grid_generation.py and on that of the README's picture?

Models have to beat this. It needs a processor only, no model.
"""

import harness
from bench_grid_generation import REGIONS, held_out_pages
from corpora import build_tokenizer
from infill import choose_page
from page_score import baselines, score_pages

from modeling_heptapod import HeptapodProcessor


def main():
    report, quick = harness.start("Filling holes in pages with one token")
    processor = HeptapodProcessor(build_tokenizer("byte", [], for_pages=True), *((4, 12) if quick else (16, 64)))
    of_benchmark, of_readme = held_out_pages(processor, 3 if quick else 12), choose_page(processor, None, 30)
    sets = [("of the benchmark", of_benchmark, region) for region in REGIONS]
    for name, pages, region in (*sets, ("30 of fill_page.py", of_readme, "hole")):
        is_masked = processor.mask_cells(pages, region) != pages
        for how, filled in baselines(pages, is_masked, processor).items():
            score = score_pages(filled, pages, is_masked, processor.blank_token_id)
            report.row(
                pages=name,
                region=region,
                masked_cells=int(is_masked[0].sum()),
                how=how,
                precision=score.precision,
                recall=score.recall,
                F1=score.f1,
                cells_right_with_blanks=score.right_with_blanks,
            )
            if how == "all blanks":
                report.check(f"pages {name}, {region}: F1 of all blanks", score.f1, "==", 0)
    report.note("Precision, recall and F1 are of cells that are not blank; the letter is the most frequent one there.")
    report.finish()


if __name__ == "__main__":
    main()
