"""Generate text with a saved model: `python training/sample.py outputs/leap-tiny --prompt "import os"`.

The package is not imported, since the folder brings its own code.
"""

import torch
from argument_checks import NUMPY_SEEDS, prompt_text, whole
from loading import add_model_arguments, check_family, may_run_code
from redaction import Parser
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed


def main():
    parser = Parser(description="Generate a text with a saved model.")
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", type=prompt_text, default="import os\nimport sys\n\n\nclass ", help="the text to continue"
    )
    parser.add_argument("--max_new_tokens", type=whole(1), default=400, help="number of tokens to generate")
    parser.add_argument("--seed", type=whole(0, NUMPY_SEEDS), default=0, help="seed of the sampling")
    args = parser.parse_args()

    trust = may_run_code(args.folder, args.trust_remote_code)
    check_family(args.folder, but=("heptapod", "multigrid"))
    set_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=trust).to(device)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)
    model.generate(**inputs, max_new_tokens=args.max_new_tokens, streamer=TextStreamer(tokenizer))


if __name__ == "__main__":
    main()
