"""What torch.compile's code for GroupNorm and ReLU does, in the terms of our cost model.

Read off the kernels that Inductor (torch 2.13) writes for an H100, channels_last, which can be had without one:

- forward, one kernel: a program per image and group, of 16 warps, goes over its elements twice, 2048 at a time;
- or, where there are few such programs and these long, four: partial statistics, two that merge them, and a
  pointwise one;
- backward: sums of each channel over the pixels of an image, from the result, its gradient and x; two or more
  that merge them; and a pointwise one over the same three. In R50x1, five to seven kernels.

Where it is in doubt, the code is favoured: all but the kernel in one piece is taken to read whole sectors, all
the cache is taken to be at its service, and copies into another layout are left out.
"""

from __future__ import annotations

from bitfast.kernels.group_norm_act_tiling import Problem, Work, in_sectors
from bitfast.kernels.launch import Device, ceil_div

FEW_PROGRAMS, LONG = 2, 8192
"""Programs for each multiprocessor, and elements of each, from which on the work is cut into pieces."""

AT_ONCE, ELEMENTS_PER_STEP = 4, 2048
"""Of the kernel in one piece: programs of a multiprocessor (a thread has 32 registers); of each step of its
two loops."""

INSTRUCTIONS = {2: 52, 4: 46}
"""Of the kernel in one piece, per element, by its bytes, as built for sm_90, with the divisions by which it
finds an element's channel. (Where a group's channels are no power of two there are up to 12 more.)"""

POINTWISE_ELEMENTS, POINTWISE_AT_ONCE, POINTWISE_INSTRUCTIONS = 1024, 16, 15


def inductor_works(p: Problem, device: Device) -> list[Work]:
    """Return what the kernels do: forward for one tensor that is read, else backward."""
    if p.tensors == 2:
        merges = [_merge(p), _merge(p)]
        return [_reduction(p, reads=3), *merges, _pointwise(p, reads=3)]
    if p.batch * p.groups < FEW_PROGRAMS * device.multiprocessors and _elements(p) > LONG:
        return [_reduction(p, reads=1), _merge(p), _merge(p), _pointwise(p, reads=1)]
    return [_in_one(p, device)]


def _elements(p: Problem) -> int:
    """Return how many elements an image's group has."""
    return p.per_group * p.pixels


def _in_one(p: Problem, device: Device) -> Work:
    programs = p.batch * p.groups
    at_work = min(programs, AT_ONCE * device.multiprocessors)
    fits = at_work * p.nbytes / programs <= device.l2_bytes  # for the second reading
    excess = in_sectors(p.per_group * p.itemsize)
    steps = 2 * ceil_div(_elements(p), ELEMENTS_PER_STEP)
    memory = p.nbytes * (2 if fits else 3)
    cache = 3 * p.nbytes * excess
    instructions = INSTRUCTIONS[p.itemsize] * _elements(p)
    return Work(memory, cache, programs, AT_ONCE, steps, instructions)


def _reduction(p: Problem, reads: int) -> Work:
    programs = max(p.batch * p.channels * p.pixels // ELEMENTS_PER_STEP, 1)
    instructions = POINTWISE_INSTRUCTIONS * ELEMENTS_PER_STEP
    return Work(reads * p.nbytes, reads * p.nbytes, programs, 8, 1, instructions)


def _merge(p: Problem) -> Work:
    numbers = p.batch * p.channels
    return Work(8 * numbers, 8 * numbers, ceil_div(numbers, 256), 8, 1, 256)


def _pointwise(p: Problem, reads: int) -> Work:
    """A kernel that reads and writes everything once; some may still be in the cache, which is not counted."""
    moved = (reads + 1) * p.nbytes
    programs = max(p.batch * p.channels * p.pixels // POINTWISE_ELEMENTS, 1)
    instructions = POINTWISE_INSTRUCTIONS * POINTWISE_ELEMENTS
    return Work(moved, moved, programs, POINTWISE_AT_ONCE, 1, instructions)
