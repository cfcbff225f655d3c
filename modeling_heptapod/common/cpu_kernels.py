"""C kernels: compiled on first use, called with tensors whose shape, dtype, device and memory were checked."""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.utils import logging

from .cpu_math_source import SOURCE as MATH_SOURCE
from .native_library import compile_library, find_compiler, load_library


logger = logging.get_logger(__name__)

FLAGS = "-O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros -ffp-contract=fast -shared -fPIC -pthread".split()
_NO_MEMORY = 1  # what a call returns
_missing: set[str] = set()  # names of kernels that could not be compiled


def load_kernels(
    name: str, what: str, source: str, functions: Mapping[str, type], flags: list[str]
) -> ctypes.CDLL | None:
    """Compile and load C source.

    Args:
        name (`str`): beginning of the library's file name.
        what (`str`): what runs in torch if there is no library, with its verb, for the warning.
        source (`str`): C source, which may include `cpu_math_source.c`.
        functions (`Mapping[str, type]`): functions of the source, and the structure that a pointer to is their argument.
        flags (`list[str]`): flags for the compiler.

    Returns:
        `ctypes.CDLL`: the library, or `None` after a warning if it cannot be compiled or loaded. Also `None` with the
        environment variable `HEPTAPOD_NATIVE=0`. A failed compilation is not tried again.
    """
    if name in _missing or os.environ.get("HEPTAPOD_NATIVE", "1") == "0":
        return None
    try:
        library = load_library(compile_kernels(find_compiler(), name, source, flags))
    except (OSError, RuntimeError) as error:
        _missing.add(name)
        reason = str(error) or type(error).__name__
        logger.warning(f"{what} in torch, which is slower, because its C source was not compiled: {reason}.")
        return None
    for function, structure in functions.items():
        getattr(library, function).argtypes = [ctypes.POINTER(structure)]
    return library


def compile_kernels(compiler: str, name: str, source: str, flags: list[str]) -> Path:
    """Path of the library of `load_kernels`, which is compiled if it is not cached."""
    return compile_library(compiler, name, include(source, "cpu_math_source.c", MATH_SOURCE), flags)


def include(source: str, name: str, included: str) -> str:
    """C source, with that of `common/name` where it includes it."""
    return source.replace(f'#include "../common/{name}"\n', included)


def check_status(status: int, what: str) -> None:
    """Raise a `MemoryError` or `ValueError` for what a kernel of `what` returned, unless it is 0."""
    if status == _NO_MEMORY:
        raise MemoryError(f"There is no memory for one block of {what}.")
    if status:
        raise ValueError(f"The C source lacks the options or the sizes of this {what}.")


def address(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, dense: bool = True) -> int:
    """Address of a tensor's memory, after a check of shape, dtype and layout: contiguous unless `dense` is false.

    Raises:
        ValueError: for a tensor of another shape, dtype, device or layout, and for one without memory.
    """
    fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device.type == "cpu" and not tensor.is_neg()
    if not fits or tensor.layout != torch.strided or (dense and not tensor.is_contiguous()):
        raise ValueError(
            f"`{name}` must be a {'contiguous ' * dense}{dtype} of shape {list(shape)} on a CPU, got {tensor.dtype} of shape "
            f"{list(tensor.shape)} on {tensor.device}."
        )
    place = tensor.data_ptr()
    if place == 0 and tensor.numel():
        raise ValueError(f"`{name}` has no memory.")
    return place


__all__ = ["FLAGS", "address", "check_status", "compile_kernels", "include", "load_kernels"]
