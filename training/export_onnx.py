"""Export the recurrent step of a saved LEAP to ONNX, and generate text with onnxruntime.

    python training/export_onnx.py outputs/leap-tiny --prompt "import os"

The inputs of the graph are a token of each row, its position and the states of all layers; the outputs are logits and the new
states. The time of a step does not depend on the number of tokens before it. `states.npz` holds the states before the first token.
Needs the extra `deploy`. The folder brings its own code.
"""

from argument_checks import check_can_write, need, prompt_text, whole


need("deploy", "onnx", "onnxruntime", "onnxscript")

import logging
import warnings
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from loading import add_model_arguments, check_family, may_run_code
from redaction import Parser
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


# The exporter warns that torchvision is not installed, which this graph does not need.
logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)


class _Step(nn.Module):
    """A model as a function of a token, its position and all states, none of which is modified."""

    def __init__(self, model, cache):
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, token, position, *states):
        places = _places(self.cache)
        for (held, place), state in zip(places, states):
            held[place] = state.clone()
        logits = self.model(token, position_ids=position, past_key_values=self.cache, use_cache=True).logits
        return logits[:, -1], *(held[place] for held, place in places)


def _places(cache):
    """The states of a cache, as dictionaries and keys in a fixed order."""
    held = [states for layer in cache.layers for states in (layer.conv_states, layer.recurrent_states)]
    return [(states, place) for states in held for place, state in states.items() if state is not None]


@torch.no_grad()
def export_step(model, folder: str | Path) -> None:
    """Write `step.onnx` and `states.npz`, the states before the first token, into a folder.

    Inputs of the graph: `token [batch, 1]` and `position [batch, 1]`, int64, and `state_0`, `state_1`, ..., float32; outputs:
    `logits [batch, vocab]` and `next_state_0`, ...

    Args:
        model: a `LeapForCausalLM` on a CPU, in float32.
        folder: the folder, which is created if it does not exist.

    Raises:
        ValueError: for a model of another family.
    """
    if model.config.model_type != "leap":
        raise ValueError(f"`model` must be a LEAP, whose states have a fixed size, got {model.config.model_type!r}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    token = torch.zeros(2, 1, dtype=torch.long)  # two rows: one would be exported as a constant
    # The states after padding are those before the first token.
    cache = model(token, attention_mask=torch.zeros_like(token), use_cache=True).past_key_values
    states = [held[place] for held, place in _places(cache)]
    names = [f"state_{number}" for number in range(len(states))]
    rows = {0: torch.export.Dim("batch")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance", FutureWarning)  # torch's own use of a deprecated class
        warnings.filterwarnings("ignore", "# The axis name: batch", UserWarning)  # all inputs share this axis
        torch.onnx.export(
            _Step(model, cache).eval(),
            (token, token.clone(), *states),  # the same tensor twice would become one input
            folder / "step.onnx",
            input_names=["token", "position", *names],
            output_names=["logits", *(f"next_{name}" for name in names)],
            dynamic_shapes=(rows, rows, tuple(rows for _ in states)),
            dynamo=True,
            verbose=False,
        )
    np.savez(folder / "states.npz", **{name: state[:1].numpy() for name, state in zip(names, states)})


class OnnxStep:
    """An exported step with the states of its rows.

    Args:
        folder: output folder of `export_step`.
        rows: number of texts in a batch.
    """

    def __init__(self, folder: str | Path, rows: int = 1):
        self.session = onnxruntime.InferenceSession(Path(folder) / "step.onnx", providers=["CPUExecutionProvider"])
        self.states = {name: state.repeat(rows, 0) for name, state in np.load(Path(folder) / "states.npz").items()}
        self.position = 0

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Read one token of each row, `[rows]`, and return the logits of the next one, float32 `[rows, vocab]`."""
        token = np.asarray(tokens, dtype=np.int64)[:, None]
        given = {"token": token, "position": np.full_like(token, self.position), **self.states}
        wanted = ["logits", *(f"next_{name}" for name in self.states)]
        logits, *states = self.session.run(wanted, given)
        self.states = dict(zip(self.states, states))
        self.position += 1
        return logits


def write(step: OnnxStep, prompt: np.ndarray, max_new_tokens: int) -> Iterator[np.ndarray]:
    """Greedy continuation of prompts of one length, `[rows, tokens]`: the next token of each row, `[rows]`, one by one.

    Raises:
        ValueError: for prompts without tokens.
    """
    if not prompt.size:
        raise ValueError(f"`prompt` must be [rows, tokens >= 1], got {list(prompt.shape)}.")
    for tokens in prompt.T:
        logits = step(tokens)
    for _ in range(max_new_tokens):
        tokens = logits.argmax(-1)
        yield tokens
        logits = step(tokens)


def main():
    parser = Parser(description="Export the recurrent step of a saved LEAP to ONNX, and generate a text with it.")
    add_model_arguments(parser)
    parser.add_argument(
        "--output_dir",
        help="folder for the graph, by default `onnx` in the model's folder, or here for a name on the Hub",
    )
    parser.add_argument(
        "--prompt", type=prompt_text, default="import os\nimport sys\n\n\nclass ", help="the text to continue"
    )
    parser.add_argument("--max_new_tokens", type=whole(1), default=200, help="number of tokens to generate")
    args = parser.parse_args()

    trust = may_run_code(args.folder, args.trust_remote_code)
    check_family(args.folder, ("leap",))
    # A local folder with the name of a model on the Hub would be loaded in its place.
    output_dir = Path(args.output_dir or (Path(args.folder) / "onnx" if Path(args.folder).is_dir() else "onnx"))
    check_can_write("--output_dir", output_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=trust, dtype=torch.float32)
    export_step(model, output_dir)
    prompt = tokenizer(args.prompt, return_tensors="np")["input_ids"]
    written = (int(tokens[0]) for tokens in write(OnnxStep(output_dir), prompt, args.max_new_tokens))
    written = takewhile(lambda token: token != tokenizer.eos_token_id, written)
    print(args.prompt + tokenizer.decode(list(written)))
    print(f"\nwritten: {output_dir / 'step.onnx'}")


if __name__ == "__main__":
    main()
