"""Launch shapes of group_norm_act: how one call is cut into programs, and the cost model that decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .launch import Device, ceil_div, next_power_of_two

# ---- limits ---------------------------------------------------------------------------------------

VECTOR = 16
"""Bytes that a thread loads at a time."""

KEPT_VECTORS = 16
"""Vectors of all tensors that a thread keeps between their two uses: 64 of its 128 registers."""

KEPT_VECTORS_UNPACKED = 12
"""The same for programs of the most warps, backward, of 16-bit numbers: with more, ptxas spills some."""

MOST_WARPS = 16
"""Per program: with 128 registers a thread, these fill a multiprocessor."""

ROW_BYTES = (128, 64, 32, 16)
"""Bytes of a pixel that a program works on, where it keeps all pixels. (Or one group, if that is wider.)"""

WIDEST_ROW = 2048
"""Channels of a pixel that a program works on, at most, where pixels are shared out."""

WIDEST_TILE = 1024
"""Channels of a group in one chunk, at most. Wider groups are cut into parts."""

SPLIT_WARPS = 8
SPLIT_VECTORS = 8
"""Warps, and vectors of all tensors per thread, of a tile that moves over a range of the pixels."""

PROGRAMS_WANTED = 32
"""Programs for each multiprocessor, where pixels are shared out."""

MOST_PARTIALS = 256
"""Partial results per image and group, at most: every program of the second launch reads all of them."""

NEARLY = 1.03
"""How much more time a shape may be predicted to take, if it has wider rows."""

WARPS_AT_ONCE = (16, 11)
"""Warps of a multiprocessor, forward and backward, of programs that keep what they have read.

Forward they take 128 registers, backward up to 172 if they may; programs of 16 warps never more than 128.
"""

# ---- the cost model -------------------------------------------------------------------------------

LAUNCH_SECONDS = 2e-6
"""From the end of one kernel to the first load of the next."""

STEP_SECONDS = 0.7e-6
"""From a program's loads to what depends on them."""

MEMORY_RATE, CACHE_RATE, PROCESSOR_RATE = 22.7e9, 41e9, 64e9
"""Bytes per second and multiprocessor: of the device's memory, of its L2 cache, and into one multiprocessor."""

LANE_RATE = 218e9
"""Instructions of single threads per second and multiprocessor: 128 lanes at 1.7 GHz."""

CONTENTION = 0.25
"""Of what could go on beside something slower, the part that adds to the time nonetheless."""

WHOLE_INSTRUCTIONS = {2: (22, 35), 4: (18, 20)}
SPLIT_INSTRUCTIONS = ((12, 16), (18, 20))
"""Per element, forward and backward, as built for sm_90: of the one launch, by bytes per element, since 16-bit
numbers are unpacked several times; and of the two."""

# The memory's rate is that of a copy measured on an H100 (3.0 TB/s by 132 multiprocessors). The others are
# round numbers, with which the model comes within a third of what earlier shapes took there, and of
# torch.compile's code. Other cards differ, but only ratios decide.

SECTOR = 32
"""Bytes that the L2 cache moves at least."""


class Work(NamedTuple):
    """What one launch does, for :func:`predicted_seconds`.

    Attributes:
        memory: Bytes from and to the device's memory.
        cache: Bytes between the L2 cache and the multiprocessors, in whole sectors.
        programs: Of the launch.
        at_once: Of these, how many one multiprocessor works on at a time.
        steps: How often a program waits for loads.
        instructions: Of all threads of a program together.
    """

    memory: float
    cache: float
    programs: int
    at_once: int
    steps: int
    instructions: float


def predicted_seconds(launches: list[Work], device: Device) -> float:
    """Predict how long launches take: a model to choose by, not a measurement.

    Programs come in rounds, each as long as one program alone takes to load, compute and store one after the
    other, or as the multiprocessor takes to move or to compute for all that it works on. Beside that, the
    memory or the cache is at work.
    """
    total = 0.0
    for work in launches:
        busy = min(work.at_once, ceil_div(work.programs, device.multiprocessors))
        rounds = ceil_div(work.programs, busy * device.multiprocessors)
        moving = work.cache / work.programs / PROCESSOR_RATE
        computing = work.instructions / LANE_RATE
        alone = work.steps * STEP_SECONDS + moving + computing
        processors = rounds * max(alone, busy * max(moving, computing))
        memory = work.memory / MEMORY_RATE / device.multiprocessors
        cache = work.cache / CACHE_RATE / device.multiprocessors
        longer, shorter = sorted((processors, max(memory, cache)), reverse=True)
        total += LAUNCH_SECONDS + longer + CONTENTION * shorter
    return total


def in_sectors(row_bytes: int) -> float:
    """Return how much more the cache moves than a row's bytes, since it moves whole sectors."""
    return ceil_div(row_bytes, SECTOR) * SECTOR / row_bytes


# ---- shapes ---------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """One call: see :func:`choose_tiling`."""

    batch: int
    pixels: int
    channels: int
    groups: int
    itemsize: int
    is_channels_last: bool
    tensors: int
    kept_vectors: int

    @property
    def per_group(self) -> int:
        """Channels of a group."""
        return self.channels // self.groups

    @property
    def padded(self) -> int:
        """Channels of a group in one chunk."""
        return min(next_power_of_two(self.per_group), WIDEST_TILE)

    @property
    def nbytes(self) -> int:
        """Bytes of one tensor."""
        return self.batch * self.pixels * self.channels * self.itemsize


class Tiling(NamedTuple):
    """How one call is cut into programs.

    Attributes:
        is_whole: One launch, each program keeping all pixels of its channels; else two launches.
        programs: Of each launch.
        chunks, block_pixels, block_groups, padded, parts: The tile, see ``group_norm_act_tiles``. A chunk
            has at least as many elements as the program has threads, so that each is loaded by one thread
            alone: results may take the place of what they are computed from.
        splits, pixels_per_split: How an image's pixels are shared out, if not whole.
        warps: Per program.
        is_wide: Offsets within an image need 64 bits.
    """

    is_whole: bool
    programs: int
    chunks: int
    block_pixels: int
    block_groups: int
    padded: int
    parts: int
    splits: int
    pixels_per_split: int
    warps: int
    is_wide: bool


def choose_tiling(
    batch: int,
    pixels: int,
    channels: int,
    groups: int,
    itemsize: int,
    is_channels_last: bool,
    tensors: int,
    device: Device,
    kept_vectors: int | None = None,
) -> Tiling:
    """Choose the launch shapes. Equal arguments give equal shapes: nothing is tried out at run time.

    There are two forms. Of their shapes the one with the widest rows is taken that is predicted to take the
    least time, or nearly so.

    - Whole: a program keeps all pixels of some channels in registers, so that one launch reads and writes
      everything once. It takes few warps if these can keep it all; more if there are few programs.
    - Split: two launches, whose programs read whole rows of channels of a range of pixels. The second one
      begins with what the first has read last, which the L2 cache still has.

    Args:
        batch: Images, at least 1.
        pixels: Height times width.
        channels: Divisible by ``groups``.
        groups: In which the channels are normalized.
        itemsize: Bytes per element.
        is_channels_last: Else contiguous NCHW.
        tensors: How many tensors are read for two purposes: 1 forward, 2 backward.
        device: The GPU to fill with programs.
        kept_vectors: By default ``KEPT_VECTORS``; fewer where the activation needs registers itself.
    """
    kept = KEPT_VECTORS if kept_vectors is None else kept_vectors
    problem = Problem(batch, pixels, channels, groups, itemsize, is_channels_last, tensors, kept)
    shapes = [*_whole_tilings(problem, device), _split_tiling(problem, device)]
    times = [predicted_seconds(works_of(problem, shape, device), device) for shape in shapes]
    return next(s for s, time in zip(shapes, times, strict=True) if time <= NEARLY * min(times))


def _whole_tilings(p: Problem, device: Device) -> Iterator[Tiling]:
    """Yield the shapes with all pixels in registers, those with the widest rows first."""
    if p.padded < p.per_group:
        return
    most = next_power_of_two(p.groups)
    counts = (min(max(row // p.itemsize // p.padded, 1), most) for row in ROW_BYTES)
    for block_groups in dict.fromkeys(counts):
        programs = p.batch * ceil_div(p.groups, block_groups)
        block_channels = block_groups * p.padded
        warps = 1
        while not _fits(p, block_channels, warps):
            warps *= 2
            if warps > MOST_WARPS:
                break
        else:
            while warps < MOST_WARPS // 2 and programs * warps < 4 * device.multiprocessors:
                if _chunks(p, block_channels, warps) <= 2:
                    break
                warps *= 2
            chunks = _chunks(p, block_channels, warps)
            block_pixels = _block_pixels(p, block_channels, warps)
            wide = is_wide(p.pixels, p.channels, chunks * block_pixels, block_channels)
            yield Tiling(
                True, programs, chunks, block_pixels, block_groups, p.padded, 1, 1, p.pixels, warps, wide
            )  # fmt: skip


def _fits(p: Problem, block_channels: int, warps: int) -> bool:
    # In NCHW images rows of pixels may begin anywhere; then each number of 16 bits takes a register.
    kept = p.kept_vectors if p.is_channels_last else p.kept_vectors // 2
    if warps == MOST_WARPS and p.tensors == 2 and p.itemsize == 2:
        kept = min(kept, KEPT_VECTORS_UNPACKED)
    pixels = _chunks(p, block_channels, warps) * _block_pixels(p, block_channels, warps)
    return pixels * block_channels * p.itemsize * p.tensors <= kept * 32 * warps * VECTOR


def _chunks(p: Problem, block_channels: int, warps: int) -> int:
    return ceil_div(p.pixels, _block_pixels(p, block_channels, warps))


def _block_pixels(p: Problem, block_channels: int, warps: int) -> int:
    """Return how many pixels give each thread one vector. In NCHW images, a row of them has 64 bytes."""
    least = 1 if p.is_channels_last else min(64 // p.itemsize, next_power_of_two(p.pixels))
    return max(32 * warps * VECTOR // p.itemsize // block_channels, least)


def _split_tiling(p: Problem, device: Device) -> Tiling:
    parts = ceil_div(p.per_group, p.padded)
    block_groups = 1
    if p.is_channels_last and parts == 1:
        block_groups = min(next_power_of_two(p.groups), max(WIDEST_ROW // p.padded, 1))
    block_channels = block_groups * p.padded
    block_pixels = _block_pixels(p, block_channels, SPLIT_WARPS)
    vectors = max(SPLIT_VECTORS // p.tensors, 1)
    elements = vectors * 32 * SPLIT_WARPS * VECTOR // p.itemsize
    tile_pixels = max(elements // block_channels, 1)
    chunks = max(min(tile_pixels, p.pixels) // block_pixels, 1)
    items = p.batch * ceil_div(p.groups, block_groups) * parts
    splits = min(
        ceil_div(PROGRAMS_WANTED * device.multiprocessors, items),
        max(MOST_PARTIALS // parts, 1),
        ceil_div(p.pixels, chunks * block_pixels),
    )
    pixels_per_split = ceil_div(ceil_div(p.pixels, splits), block_pixels) * block_pixels
    splits = ceil_div(p.pixels, pixels_per_split)
    wide = is_wide(p.pixels, p.channels, chunks * block_pixels, block_channels)
    return Tiling(
        False, items * splits, chunks, block_pixels, block_groups, p.padded, parts, splits,
        pixels_per_split, SPLIT_WARPS, wide,
    )  # fmt: skip


def works_of(p: Problem, shape: Tiling, device: Device) -> list[Work]:
    """Return what the launches of a shape do, without residual and statistics, as far as they are equal."""
    row = min(shape.block_groups * p.per_group, p.channels) * p.itemsize
    excess = in_sectors(row) if p.is_channels_last else 1.0
    reads, writes = p.tensors * p.nbytes, p.nbytes
    chunk = shape.block_pixels * shape.block_groups * shape.padded
    if shape.is_whole:
        moved, elements = reads + writes, shape.chunks * chunk
        at_once = max(WARPS_AT_ONCE[p.tensors - 1] // shape.warps, 1)
        per_element = WHOLE_INSTRUCTIONS[2 if p.itemsize == 2 else 4][p.tensors - 1]
        return [
            Work(moved, moved * excess, shape.programs, at_once, 2, per_element * elements),
        ]
    steps = ceil_div(shape.pixels_per_split, shape.chunks * shape.block_pixels)
    elements = steps * shape.chunks * chunk
    at_once = MOST_WARPS // shape.warps
    first, second = SPLIT_INSTRUCTIONS[p.tensors - 1]
    kept = min(reads, device.l2_bytes // 2)  # in the cache, from the first launch to the second
    return [
        Work(reads, reads * excess, shape.programs, at_once, 1 + steps, first * elements),
        Work(
            reads + writes - kept,
            (reads + writes) * excess,
            shape.programs,
            2 * at_once,  # with half the registers
            1 + steps,
            second * elements,
        ),
    ]


def is_wide(pixels: int, channels: int, tile_pixels: int, block_channels: int) -> bool:
    """Whether an offset within an image, masked ones included, may need more than 32 bits.

    (The offset of the image itself always has 64.)
    """
    return (pixels + tile_pixels) * (channels + block_channels) >= 2**31
