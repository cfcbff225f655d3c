"""`heptapod-serve`: over HTTP, the causal families write what `generate` writes."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.utils import is_serve_available

from modeling_heptapod import serve
from tests.saved_models import save_tiny


FAMILIES = {"leap": {}, "hierarchical_lm": {}, "multigrid": {"axes": []}, "multigrid-axes": {}}
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
PROMPT, CHAT = "def area(", [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]


def save(name, folder):
    save_tiny(name.split("-")[0], folder / name, **FAMILIES[name])
    processor = AutoProcessor.from_pretrained(folder / name)
    processor.chat_template = TEMPLATE
    processor.save_pretrained(folder / name)


def test_the_command_is_that_of_transformers(monkeypatch):
    asked = []
    monkeypatch.setattr(serve.command_line, "main", lambda: asked.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["heptapod-serve", "some/folder", "--port", "8001"])
    for name in ("HierarchicalLMForCausalLM", "LeapForCausalLM", "MultiGridForCausalLM"):
        monkeypatch.setattr(sys.modules["transformers"], name, None, raising=False)
    serve.main()
    transformers = sys.modules["transformers"]
    assert asked == [["serve", "some/folder", "--port", "8001"]]
    assert issubclass(transformers.LeapForCausalLM, serve.LeapForCausalLM)
    assert issubclass(transformers.HierarchicalLMForCausalLM, serve.HierarchicalLMForCausalLM)
    assert issubclass(transformers.MultiGridForCausalLM, serve.MultiGridForCausalLM)


def test_completions_with_axes_are_annotated(tmp_path):
    """The server gives a prompt's `input_ids` alone."""
    save("multigrid-axes", tmp_path)
    folder = tmp_path / "multigrid-axes"
    model, processor = serve.ServedMultiGridForCausalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(PROMPT, return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 6}
    expected = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, **options)
    assert torch.equal(model.generate(inputs["input_ids"], **options), expected)
    assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Where a server listens, and the folder of its models."""
    if not is_serve_available():
        pytest.skip("the extra `serve` is not installed")
    folder = tmp_path_factory.mktemp("served")
    for name in FAMILIES:
        save(name, folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "modeling_heptapod.serve", "--device", "cpu"]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    with (
        open(folder / "log", "w", encoding="utf-8") as log,
        subprocess.Popen([*command, *address], env=env, stdout=log, stderr=log) as process,
    ):
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text(encoding="utf-8")
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", folder
        process.terminate()


def ask(server, path, **body):
    """The answer, or the pieces of a stream."""
    url, folder = server
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        raise AssertionError((folder / "log").read_text(encoding="utf-8")) from error
    if not body.get("stream"):
        return json.loads(text)
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def expected_text(folder, inputs):
    tokenizer = AutoProcessor.from_pretrained(folder)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    written = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_served_is_what_generate_writes(name, server):
    folder = server[1] / name
    processor = AutoProcessor.from_pretrained(folder)
    expected = expected_text(folder, processor(PROMPT, return_tensors="pt"))
    body = {"model": str(folder), "max_tokens": 8, "temperature": 0}
    assert ask(server, "/v1/completions", prompt=PROMPT, **body)["choices"][0]["text"] == expected
    pieces = ask(server, "/v1/completions", prompt=PROMPT, stream=True, **body)
    streamed = "".join(choice["text"] for piece in pieces for choice in piece["choices"])
    assert streamed.rstrip("\ufffd") == expected.rstrip("\ufffd")  # a stream keeps bytes back that end no character

    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = expected_text(folder, processor.apply_chat_template(CHAT, **template))
    answer = ask(server, "/v1/chat/completions", messages=CHAT, **body)
    assert answer["choices"][0]["message"]["content"] == expected
