"""Keeps the conformance tests out of a plain `pytest` run: they start only when the command line names them."""

from pathlib import Path


HERE = Path(__file__).resolve().parent
UPSTREAM_MARKS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "order")
UPSTREAM_MARKS += ("torch_compile_test", "is_training_test", "is_fsdp_test", "is_tensor_parallel_test")


def pytest_configure(config):
    for mark in UPSTREAM_MARKS:
        config.addinivalue_line("markers", f"{mark}: set by Transformers' own tests")


def pytest_ignore_collect(collection_path, config):
    folder = Path(config.invocation_params.dir)
    named = [(folder / argument.split("::")[0]).resolve() for argument in config.args]
    return None if any(path == HERE or HERE in path.parents for path in named) else True
