"""What our kernels need and Triton's interpreter (3.6.0, `TRITON_INTERPRET=1`) lacks."""

from functools import cache

import torch


@cache
def complete_interpreter() -> None:
    """Adds barriers, bounds of loops that numpy 2.4 takes, and bfloat16: rounded, not cut off, and multiplied as such."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder, patch_tensor, convert = (
        interpreter.InterpreterBuilder,
        interpreter._patch_lang_tensor,
        interpreter._convert_float,
    )
    create_dot = builder.create_dot

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert_float(data, source, target, rounding):
        """As the bits of the result. The interpreter holds bfloat16 as integers."""
        if (source, target) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(data).view(torch.bfloat16).float().numpy()
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, rounding)

    def in_float32(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(convert_float(handle.data, tl.bfloat16, tl.float32, None), tl.float32)

    builder.create_barrier = lambda self: None  # one program runs after the other, as one thread
    builder.create_dot = lambda self, a, b, *rest: create_dot(self, in_float32(a), in_float32(b), *rest)
    interpreter._patch_lang_tensor = patch
    interpreter._convert_float = convert_float
