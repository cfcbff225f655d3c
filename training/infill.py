"""Infill a page with a saved grid model, and draw the canvas after each denoising step.

    python training/infill.py outputs/heptapod-tiny --mask_region hole

The page is held-out source text, or taken from `--text_file`. The folder brings its own code; `infilling.gif` and
`infilling.png` are written into it.
"""

from argument_checks import NUMPY_SEEDS, check_can_write, need, whole


need("plots", "matplotlib", "PIL")

from pathlib import Path

import torch
from corpora import load_texts
from denoising_animation import cell_text, draw_page
from loading import add_model_arguments, check_family, may_run_code
from page_score import baselines, score_pages
from redaction import Parser
from transformers import AutoModelForMaskedLM, AutoProcessor


def choose_page(processor, text_file: str | None, number: int) -> torch.Tensor:
    """A page of text, `[1, height, width]`; from the held-out source text, a page that is at least half full."""
    if text_file is not None:
        texts = [_read(text_file)]
    else:
        texts = load_texts("stdlib", max_validation_bytes=131_072).validation
    pages = torch.cat([torch.from_numpy(processor.paginate(text)) for text in texts])
    if text_file is None:
        pages = pages[(pages != processor.blank_token_id).float().mean((1, 2)) >= 0.5]
    if not 0 <= number < len(pages):
        raise ValueError(f"--page {number}: there are {len(pages)} pages")
    return pages[number : number + 1]


def _read(text_file):
    try:
        text = Path(text_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text_file {text_file} must be a UTF-8 text file: {error}") from error
    if not text:
        raise ValueError(f"--text_file {text_file} is empty")
    return text


def rows_of(page: torch.Tensor, processor) -> str:
    """Text of a page `[height, width]`, one line a row. `decode` would join a row whose newline is masked with the next."""
    mask_token_id = processor.tokenizer.mask_token_id
    rows = [
        "".join("\u2591" if token == mask_token_id else cell_text(token, processor) or " " for token in row).rstrip()
        for row in page.tolist()
    ]
    return "\n".join(rows).rstrip("\n")


def main():
    parser = Parser(description="Fill a region of a page with a saved grid.")
    add_model_arguments(parser)
    parser.add_argument(
        "--text_file",
        help="a UTF-8 text file to take the page from; by default held-out source of the standard library",
    )
    parser.add_argument("--page", type=whole(0), default=0, help="index of the page")
    regions = ("top", "middle", "bottom", "hole", "frame", "all")
    parser.add_argument("--mask_region", default="hole", choices=regions, help="region to mask")
    parser.add_argument("--max_denoising_steps", type=whole(1), default=16, help="number of denoising steps")
    parser.add_argument(
        "--output_dir",
        help="folder for the pictures; by default that of the model, or the current one for a name on the Hub",
    )
    parser.add_argument("--do_sample", action="store_true", help="sample tokens instead of taking the most probable")
    parser.add_argument("--seed", type=whole(0, NUMPY_SEEDS), default=0, help="seed of the sampling")
    args = parser.parse_args()

    trust = may_run_code(args.folder, args.trust_remote_code)
    check_family(args.folder, ("heptapod",))
    # A local folder with the name of a model on the Hub would be loaded in its place.
    folder = Path(args.output_dir or (args.folder if Path(args.folder).is_dir() else "."))
    check_can_write("--output_dir", folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(args.folder, trust_remote_code=trust)
    model = AutoModelForMaskedLM.from_pretrained(args.folder, trust_remote_code=trust).to(device)
    page = choose_page(processor, args.text_file, args.page)
    masked = processor.mask_cells(page, args.mask_region)
    output = model.generate(
        masked.to(device),
        max_denoising_steps=args.max_denoising_steps,
        seed=args.seed,
        return_dict_in_generate=True,
        output_history=True,
        **({"do_sample": True} if args.do_sample else {}),  # otherwise from the folder's generation config
    )
    is_masked = masked != page
    written = output.sequences.cpu()
    print(f"--- the page, {int(is_masked.sum())} cells masked\n{rows_of(masked[0], processor)}")
    print(f"\n--- generated in {output.nfe} forward passes\n{rows_of(written[0], processor)}")
    print("\n--- masked cells as in the original: those that are not blank, then all of them, blanks included")
    print(f"{'':<12}{'precision':>10}{'recall':>8}{'F1':>6}{'with blanks':>13}")
    for name, filled in {"the model": written, **baselines(page, is_masked, processor)}.items():
        score = score_pages(filled, page, is_masked, processor.blank_token_id)
        shares = f"{score.precision:>10.2f}{score.recall:>8.2f}{score.f1:>6.2f}{score.right_with_blanks:>13.2f}"
        print(f"{name:<12}{shares}")
    draw_page(output.history[:, 0], processor, folder / "infilling.gif", folder / "infilling.png")
    print(f"\nwritten: {folder / 'infilling.gif'}, {folder / 'infilling.png'}")


if __name__ == "__main__":
    main()
