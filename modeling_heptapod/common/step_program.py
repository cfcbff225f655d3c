"""One token through the layers of a model in one call of C, with which a CPU decodes.

The products of one token are short, so that what Python does between them takes longer than they do. A family describes its layers
as a [`StepProgram`]: operations on rows of float32, one row for each text of a batch. The call reads weights and caches where
they lie, in float32 or bfloat16.
"""

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from .cpu_kernels import FLAGS, address, check_status, load_kernels
from .step_program_source import SOURCE


MOST_ROWS = 8  # of a batch, beyond which products of matrices are faster
_PARALLEL = 2**17  # weights times rows below which a second thread costs more than it saves
_KINDS = "load store linear layer_norm rms_norm mix attend add gate".split()
_ACTIVATION_NAMES = "gelu gelu_pytorch_tanh relu silu".split()
# Classes of activations and their numbers in the source, in which 0 is none.
ACTIVATIONS: dict[type[nn.Module], int] = {type(ACT2FN[name]): i for i, name in enumerate(_ACTIVATION_NAMES, 1)}
_DTYPE, _LAYOUT, _IS_CPU = attrgetter("dtype"), attrgetter("layout"), attrgetter("is_cpu")


class _Operation(ctypes.Structure):
    """`Operation` of the source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in "kind in in_row width out out_row height other other_row".split()),
        ("tensor", ctypes.c_int64 * 4),
        *((name, ctypes.c_int64) for name in "from activation adds steps index heads mask turn".split()),
        ("factor", ctypes.c_double),
        ("epsilon", ctypes.c_double),
    ]


class _Slots(ctypes.Structure):
    """`Slots` of the source."""

    _fields_ = [(name, ctypes.c_int64) for name in "text head slots write base first step ring keys".split()]


class _Call(ctypes.Structure):
    """`StepProgram` of the source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in "batch operations threads bf16 mixing_bytes".split()),
        *((name, ctypes.c_void_p) for name in "operation tensor slots memory mix mixing".split()),
    ]


@cache
def load_steps() -> ctypes.CDLL | None:
    """The compiled source, `None` if it cannot be compiled or loaded."""
    return load_kernels("step_program", "Single tokens are decoded", SOURCE, {"step_program": _Call}, FLAGS)


class Rows(NamedTuple):
    """Rows of float32 in the memory of a program, one for each text of a batch.

    Attributes:
        place (`int`): of the first row.
        width (`int`): channels of a row.
        stride (`int`): from one row to the next.
    """

    place: int
    width: int
    stride: int

    def part(self, start: int, width: int) -> "Rows":
        """`width` channels of each row, from `start` on."""
        return Rows(self.place + start, width, self.stride)


class Slots(NamedTuple):
    """Where one more token is written in a cache, and which slots its attention reads.

    Attributes:
        write (`int`): slot of the token.
        base, first, step, ring, keys (`int`): it reads slots `base + (first + i * step) % ring` for `i < keys`.
    """

    write: int
    base: int
    first: int
    step: int
    ring: int
    keys: int

    def are_in(self, length: int) -> bool:
        """Whether all slots are within `length`."""
        last = self.base + min(self.first + (self.keys - 1) * self.step, self.ring - 1)
        return min(self) >= 0 and min(self.ring, self.keys) > 0 and max(self.write, last) < length


class StepProgram:
    """A program for one token. Methods that are named like an operation append it.

    Args:
        batch (`int`): number of texts.
        weights (`Iterable[tuple[int, ...]]`): shapes of all weights, which operations call tensors 0, 1, ...

    Attributes:
        size (`int`): of the program's memory, in numbers of float32.
    """

    def __init__(self, batch: int, weights: Iterable[tuple[int, ...]] = ()):
        self.batch, self.size, self.products = batch, 0, 0
        self._operations: list[_Operation] = []
        self._weights = list(weights)
        self._names: list[str] = []
        self._shapes: list[tuple[int | None, ...]] = []
        self._dtypes: list[torch.dtype | None] = []
        # By keys and values: the most heads that are read, and the mask.
        self._caches: dict[tuple[int, int], tuple[int, int | None]] = {}

    # --- what operations are about ---------------------------------------------------------------------------------------

    def rows(self, width: int) -> Rows:
        """New rows."""
        rows = Rows(self.size, width, width)
        self.size += self.batch * width
        return rows

    def tensor(self, name: str, *shape: int | None, dtype: torch.dtype | None = None) -> int:
        """Another tensor of a call, in the order of `run`.

        Args:
            name (`str`): for errors.
            shape (`int`, *optional*): sizes. `None` for any.
            dtype (`torch.dtype`, *optional*): defaults to that of the call.
        """
        self._names.append(name)
        self._shapes.append(shape)
        self._dtypes.append(dtype)
        return len(self._weights) + len(self._names) - 1

    def _append(self, kind, tensors=(), reads=None, writes=None, other=None, **options):
        values: dict[str, Any] = {"kind": _KINDS.index(kind), "other": -1, "mask": -1, **options}
        if reads is not None:
            values |= {"in": reads.place, "in_row": reads.stride, "width": reads.width}
        if writes is not None:
            values |= {"out": writes.place, "out_row": writes.stride, "height": writes.width}
        if other is not None:
            values |= {"other": other.place, "other_row": other.stride}
        operation = _Operation(**values)
        given = [-1 if place is None else place for place in tensors]
        operation.tensor[:] = given + [-1] * (4 - len(given))
        self._operations.append(operation)

    # --- operations ------------------------------------------------------------------------------------------------------

    def load(self, tensor: int, rows: Rows) -> None:
        """Read rows from a tensor `[batch, width]`."""
        self._append("load", (tensor,), rows)

    def store(self, tensor: int, rows: Rows) -> None:
        """Write rows into a tensor `[batch, width]`."""
        self._append("store", (tensor,), rows)

    def linear(
        self,
        x: Rows,
        out: Rows,
        weight: int,
        bias: int | None = None,
        activation: int = 0,
        adds: bool = False,
        first: int = 0,
    ) -> None:
        """`out = activation(weight @ x + bias)`, with the rows of the weight from `first` on. `adds` to what is there."""
        options = {"activation": activation, "adds": adds, "from": first}
        self._append("linear", (weight, bias), x, out, **options)
        self.products += x.width * out.width

    def norm(
        self, x: Rows, out: Rows, weight: int, bias: int | None, epsilon: float, kind: str = "layer_norm"
    ) -> None:
        """A norm of kind "layer_norm" or "rms_norm"."""
        self._append(kind, (weight, bias), x, out, epsilon=epsilon)

    def shifted_norm(
        self,
        x: Rows,
        out: Rows,
        weight: int,
        bias: int | None,
        epsilon: float,
        kind: str,
        state: int,
        steps: int,
    ) -> None:
        """A norm after a token shift with a state `[batch, steps, width // 2]`, to which the token is added."""
        self._append(kind, (weight, bias, state), x, out, epsilon=epsilon, steps=steps)

    def mix(self, index: int) -> None:
        """A mixing step of LEAP."""
        self._append("mix", index=index)

    def attend(
        self,
        query: Rows,
        key_value: Rows,
        out: Rows,
        keys: int,
        values: int,
        heads: int,
        scale: float,
        rotary: tuple[int, int] | None = None,
        first_head: int = 0,
        mask: int | None = None,
    ) -> None:
        """Attention to cached keys and values, to which the token is added.

        Args:
            query, out (`Rows`): `heads * head_dim` channels.
            key_value (`Rows`): keys, and values behind them.
            keys, values (`int`): tensors `[batch, cached heads, slots, head_dim]`.
            heads (`int`), scale (`float`): of the attention.
            rotary (`tuple[int, int]`, *optional*): tensors of cosines and signed sines `[1 or 2, head_dim]` in float32: for
                queries, then for keys where they differ.
            first_head (`int`): of the cached heads.
            mask (`int`, *optional*): a tensor `[batch, slots]` of bools, which of them can be read.
        """
        place, turns = (keys, values), (None, None) if rotary is None else rotary
        most, _ = self._caches.get(place, (0, None))
        self._caches[place] = max(most, first_head + heads), mask
        options = {"heads": heads, "factor": scale, "from": first_head, "index": list(self._caches).index(place)}
        if mask is not None:
            options["mask"] = mask
        if rotary is not None and self._shapes[rotary[0] - len(self._weights)][0] == 2:
            options["turn"] = query.width // heads
        self._append("attend", (*place, *turns), query, out, key_value, **options)

    def add(self, x: Rows, out: Rows, factor: float = 1.0, other: Rows | None = None, adds: bool = True) -> None:
        """`out = factor * (x - other)`. `adds` to what is there."""
        self._append("add", (), x, out, other, factor=factor, adds=adds)

    def gate(self, x: Rows, out: Rows, bias: int, epsilon: float) -> None:
        """`out = silu(out / rms(x) + bias)`."""
        self._append("gate", (None, bias), x, out, epsilon=epsilon)

    # --- the call --------------------------------------------------------------------------------------------------------

    def compile(self) -> "StepProgram":
        """This program, to which nothing is appended any more."""
        self.operations = (_Operation * len(self._operations))(*self._operations)
        return self

    def addresses_of_weights(self, weights: Sequence[torch.Tensor], dtype: torch.dtype) -> list[int] | None:
        """What `run` asks for, or `None` for weights of another number, shape, dtype, device or layout.

        Args:
            weights (`Sequence[torch.Tensor]`): in the order of their shapes.
            dtype (`torch.dtype`): of the call.
        """
        return _addresses(weights, self._weights, [dtype] * len(weights))

    def run(
        self,
        tensors: Sequence[torch.Tensor],
        weights: Sequence[int] | None,
        dtype: torch.dtype,
        slots: Iterable[Slots] = (),
        memory: torch.Tensor | None = None,
        mixing: Any = None,
        mix: int | None = None,
    ) -> None:
        """Run the program.

        Args:
            tensors (`Sequence[torch.Tensor]`): in the order in which `tensor` was called.
            weights (`Sequence[int]`): what `addresses_of_weights` returned for weights that are alive.
            dtype (`torch.dtype`): `torch.float32` or `torch.bfloat16`.
            slots (`Iterable[Slots]`): of each cache, in the order of the first attention to it.
            memory (`torch.Tensor` of shape `[size]`, *optional*): of the rows, which mixing steps know.
            mixing (`ctypes.Array`, *optional*), mix (`int`, *optional*): mixing steps, and the address of what runs them.

        Raises:
            ValueError: for tensors of another number, shape, dtype, device or layout, and for slots outside of a cache.
            MemoryError: if there is no memory for a token.
        """
        if weights is None:
            raise ValueError(
                "`weights` must be contiguous, on a CPU, and have the shapes and the dtype of the program."
            )
        for what, given, expected in (("tensors", tensors, self._names), ("weights", weights, self._weights)):
            if len(given) != len(expected):
                raise ValueError(f"A step needs {len(expected)} {what}, got {len(given)}.")
        shapes: list[Any] = [_fitting(x, given) if None in x else x for x, given in zip(self._shapes, tensors)]
        dtypes = [dtype if own is None else own for own in self._dtypes]
        places = _addresses(tensors, shapes, dtypes)
        if places is None:  # checked one by one, which tells what is wrong
            places = [address(*one) for one in zip(self._names, tensors, shapes, dtypes)]
        table = (ctypes.c_void_p * (len(weights) + len(places)))(*weights, *places)
        numbers = self._numbers(tensors, slots)
        memory = torch.empty(self.size, dtype=torch.float32) if memory is None else memory
        threads = torch.get_num_threads() if self.batch * self.products >= _PARALLEL else 1
        call = _Call(
            batch=self.batch,
            operations=len(self.operations),
            threads=threads,
            bf16=dtype == torch.bfloat16,
            mixing_bytes=0 if mixing is None else ctypes.sizeof(mixing._type_),
            operation=ctypes.addressof(self.operations),
            tensor=ctypes.addressof(table),
            slots=ctypes.addressof(numbers),
            memory=memory.data_ptr(),
            mix=mix,
            mixing=None if mixing is None else ctypes.addressof(mixing),
        )
        library = load_steps()
        if library is None:
            raise ValueError("There is no compiled C source for single tokens.")
        check_status(library.step_program(call), "decoding step")

    def _numbers(self, tensors, slots):
        given = list(slots)
        if len(given) != len(self._caches):
            raise ValueError(f"A step needs the slots of {len(self._caches)} caches, got {len(given)}.")
        numbers, first = (_Slots * len(given))(), len(self._weights)
        for i, (read, (places, (most, mask))) in enumerate(zip(given, self._caches.items())):
            shape, shape_of_values = (tensors[place - first].shape for place in places)
            _, heads, length, dim = shape
            masked = length if mask is None else tensors[mask - first].shape[1]
            if shape != shape_of_values or not read.are_in(min(length, masked)) or most > heads:
                raise ValueError(
                    f"Keys {list(shape)} and values {list(shape_of_values)} have no {most} heads or no such slots: {read}."
                )
            numbers[i] = _Slots(heads * length * dim, length * dim, masked, *read)
        return numbers


def lie_as_expected(weights: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> bool:
    """What `StepProgram.addresses_of_weights` asks, in a form that graphs can contain."""
    are_plain = len(weights) == len(shapes) and all(x.dtype == dtype and x.is_cpu for x in weights)
    return are_plain and all(x.shape == shape and x.is_contiguous() for x, shape in zip(weights, shapes))


def _addresses(tensors, shapes, dtypes):
    """Addresses of contiguous tensors on a CPU with these shapes and dtypes, `None` if one is different or has no memory."""
    # Each `map` asks all tensors one question, in a fraction of the time of calls in a loop.
    are_such = (
        list(map(torch.Tensor.size, tensors)) == shapes
        and list(map(_DTYPE, tensors)) == dtypes
        and {torch.strided}.issuperset(map(_LAYOUT, tensors))
        and all(map(_IS_CPU, tensors))
        and all(map(torch.Tensor.is_contiguous, tensors))
        and not any(map(torch.Tensor.is_neg, tensors))
    )
    places = list(map(torch.Tensor.data_ptr, tensors)) if are_such else [0]
    return places if all(places) else None


def _fitting(shape, tensor):
    """An open shape, with the sizes of the tensor where any are expected."""
    if tensor.dim() != len(shape):
        return shape
    return tuple(given if size is None else size for size, given in zip(shape, tensor.shape))


__all__ = ["ACTIVATIONS", "MOST_ROWS", "Rows", "Slots", "StepProgram", "lie_as_expected", "load_steps"]
