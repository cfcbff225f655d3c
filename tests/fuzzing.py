"""Random calls of compiled code: spoiled tensors, and the command line of the fuzzers."""

import argparse

import torch

from modeling_heptapod.common.cpu_kernels import FLAGS


SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def resized(rng, tensor):
    """The tensor with one dimension longer or shorter, or gone."""
    place, how = rng.randrange(tensor.dim()), rng.randrange(3)
    if how == 0:
        return torch.cat((tensor, tensor.narrow(place, 0, 1)), dim=place) if tensor.shape[place] else tensor[None]
    if how == 1 and tensor.shape[place] > 1:
        return tensor.narrow(place, 0, tensor.shape[place] - 1)
    return tensor.unsqueeze(place)


def spoiled(rng, tensor):
    """The tensor in another shape, dtype, or place, or no tensor at all; for one that has to be of floats."""
    how = rng.randrange(5)
    if how == 0:
        return tensor.long()
    if how == 1:
        return tensor.to("meta")
    if how == 2:
        return tensor.tolist()
    return resized(rng, tensor)


def refused(call, what):
    try:
        result = call()
    except (TypeError, ValueError) as error:
        assert what in str(error), f"{what} is not named in {error!r}"
    else:
        assert result is None, f"a wrong {what} was taken"  # left to torch, and nothing written


def check_error(got, expected, parallel, seed):
    """Compare with `expected` in float64: within 1e-3 of it in float32, and in bf16 nearly as close as the `parallel` pass."""

    def error(x):
        return float((x - expected).square().mean().sqrt() / expected.square().mean().sqrt())

    close = 1e-3 if got.dtype == torch.float32 else 0.1 + 2 * error(parallel)
    assert error(got) < close, f"seed {seed}: off by {error(got):.2g}"


def run(valid_call, invalid_call, valid, invalid, seed):
    """Make that many calls of both kinds; raises at the first finding, with its seed."""
    for place in range(valid):
        valid_call(seed + place)
    for place in range(invalid):
        invalid_call(seed + place)


def main(description, library, fuzz):
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--valid", type=int, default=2000)
    parser.add_argument("--invalid", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitize", action="store_true", help="with gcc's sanitizers, whose runtime is preloaded")
    arguments = parser.parse_args()
    if arguments.sanitize:
        FLAGS[:] = [flag for flag in FLAGS if flag != "-O3"] + SANITIZERS
    torch.set_num_threads(1)
    assert library() is not None, "there is no compiled code"
    fuzz(arguments.valid, arguments.invalid, arguments.seed)
    print(f"{arguments.valid} valid and {arguments.invalid} invalid calls: no finding")
