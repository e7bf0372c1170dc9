"""The same formats for tensors that are not in host memory: with torch operators, and where Triton works with a kernel.

Decoding gives the very numbers that the compiled kernels give: the product of code and scale is exact in float32, and
one sum is rounded. Searching is done on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from types import ModuleType

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.abc.codec import DeviceDecoder
from flexflow_engine.gpu.trying import working
from flexflow_plugins.codecs import on_device_parts
from flexflow_plugins.codecs.part_format import MAX_HALF, part_size
from flexflow_plugins.codecs.threads import Format
from flexflow_plugins.codecs.threads import encode as encode_on_host

_DECODED_AT_ONCE = 2**25
_ENCODED_AT_ONCE = 2**22
"""Numbers; bound what is held beside the tensors, whatever their size: with groups of 64 three bytes for each that is
decoded and 28 for each that is encoded, by Triton none, but for settings that are not aligned; with small
groups up to 13 and 72.
"""


def decode(form: Format, encoded: torch.Tensor, out: torch.Tensor) -> None:
    """encoded uint8 [n, nbytes] into out [n, *shape], any float dtype, both on one device."""
    if out.numel() == 0:
        return
    if out.is_contiguous():
        _decode_rows(form, encoded, out.view(out.shape[0], -1))
    else:
        target = torch.empty_like(out, memory_format=torch.contiguous_format)
        _decode_rows(form, encoded, target.flatten(1))
        out.copy_(target)


def decoding(form: Format, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None] | None:
    """One kernel for all of them; None where there is none, or for tensors that it can't take."""
    kernels = _kernels(pairs[0][1].device) if pairs else None
    rows = [(encoded, out.view(out.shape[0], -1)) for encoded, out in pairs if out.is_contiguous() and out.numel()]
    if not kernels or len(rows) < len(pairs):
        return None
    words = form.encoder != "minmax"
    found: Callable[[], None] | None = kernels.decoding(rows, group_size=form.group_size, bits=form.bits, words=words)
    return found


def encode(form: Format, values: torch.Tensor, out: torch.Tensor) -> None:
    """values [n, *shape], any float dtype, into out, uint8 [n, nbytes], both on one device."""
    if form.encoder == "search":
        found = torch.empty(out.shape, dtype=torch.uint8)
        encode_on_host(form, values.cpu(), found)
        out.copy_(found)
        return
    numbers, kernels = values.flatten(1), _kernels(out.device)
    if kernels and form.encoder == "fit" and kernels.fits(numbers, out, form.group_size):
        kernels.fit(numbers, out)
        return
    for first, stop in _spans(form, len(values), numbers.shape[1], _ENCODED_AT_ONCE):
        _encode_groups(form, numbers[:, first:stop], out, (first, stop, numbers.shape[1]))


def decoder(form: Format, shape: tuple[int, ...]) -> DeviceDecoder | None:
    """For kernels of a GPU; None where settings are not aligned."""
    from flexflow_plugins.codecs import triton_kernels  # noqa: PLC0415  # Triton takes long to import

    size, words = prod(shape), form.encoder != "minmax"
    start, groups = (size * form.bits + 7) // 8, -(-size // form.group_size)
    if any(nbytes % (4 if words else 2) for nbytes in (start, start + 4 * groups)):
        return None
    part = part_size(form.group_size) if words else form.group_size
    in_eights = all(numbers % 8 == 0 for numbers in (shape[-1], form.group_size, part))
    function = triton_kernels.eight_numbers if in_eights else triton_kernels.any_eight_numbers
    return DeviceDecoder(function, (form.bits, form.group_size, int(words), size, part))


def notices(device_type: str) -> tuple[str, ...]:
    """What makes codecs slow there; a line each."""
    try:
        if device_type != "cuda" or _kernels(torch.device(device_type)):
            return ()
    except torch.OutOfMemoryError:
        return ("the GPU has no memory left to try Triton's kernels in",)
    return ("many operators encode and decode on the GPU instead of one kernel: Triton is missing or does not work",)


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    """Compiled kernels; None where there is no Triton, or it can't compile. Asked once: it may take seconds."""

    def compiled() -> ModuleType:
        from flexflow_plugins.codecs import triton_kernels  # noqa: PLC0415  # Triton takes long to import

        numbers, encoded = (
            torch.zeros(1, 64, device=device),
            torch.zeros(1, 36, dtype=torch.uint8, device=device),
        )
        for _ in range(2):  # the second call of a compiled kernel is another one
            triton_kernels.fit(numbers, encoded)
            triton_kernels.decode(encoded, numbers, start=32, group_size=64, bits=4, words=True)
        return triton_kernels

    return working(device, compiled, without="codecs run slower on the GPU")


def _decode_rows(form: Format, encoded: torch.Tensor, out: torch.Tensor) -> None:
    """Into out [n, numbers], contiguous."""
    size, words = out.shape[1], form.encoder != "minmax"
    start = (size * form.bits + 7) // 8
    kernels = _kernels(out.device)
    if kernels and kernels.decodes(encoded, start, words=words):
        kernels.decode(encoded, out, start=start, group_size=form.group_size, bits=form.bits, words=words)
        return
    codes, settings = encoded[:, :start], _settings(form, encoded[:, start:])
    for first, stop in _spans(form, len(out), size, _DECODED_AT_ONCE):
        _decode_groups(form, codes[:, first * form.bits // 8 :], settings, out[:, first:stop], first)
    if out.dtype == torch.float16:
        out.clamp_(-MAX_HALF, MAX_HALF)


def _decode_groups(form: Format, codes: torch.Tensor, settings: torch.Tensor, out: torch.Tensor, first: int) -> None:
    """Whole groups from number `first` on, up to a tensor's end, into out [n, numbers]. codes: from that number on."""
    numbers = out.shape[1]
    groups = slice(first // form.group_size, -(-(first + numbers) // form.group_size))
    scale, low = _grids(form, settings, groups)  # [n, groups, grids, 1]
    places = _codes(form, codes[:, : (numbers * form.bits + 7) // 8], numbers)
    places = places.view(*scale.shape[:3], form.group_size // scale.shape[2])
    if numbers % form.group_size:
        out[:] = torch.addcmul(low, places, scale).flatten(1)[:, :numbers]
    else:
        torch.addcmul(low, places, scale, out=out.view(places.shape))


def _encode_groups(form: Format, values: torch.Tensor, out: torch.Tensor, place: tuple[int, int, int]) -> None:
    """values [n, stop - first] into their places of `out`; place: first and stop, in numbers, of the size."""
    first, stop, size = place
    levels, padding = float(2**form.bits - 1), -values.shape[1] % form.group_size
    numbers = values.float()
    if padding:
        numbers = F.pad(numbers[:, None], (0, padding), mode="replicate")
    numbers = numbers.view(len(values), -1, form.group_size)
    finite = numbers.isfinite().all(2)  # [n, groups]
    numbers = torch.where(finite[:, :, None], numbers, 0)
    start, at, groups = (size * form.bits + 7) // 8, first // form.group_size, -(-size // form.group_size)
    if form.encoder == "minmax":
        low, halves = _cover(numbers, levels)
        _put(out, start + 2 * at, halves)
        _put(out, start + 2 * (groups + at), torch.where(finite, low, torch.nan))
        scale, low = halves.float()[:, :, None, None], low.float()[:, :, None, None]
    else:
        words = on_device_parts.find(numbers)
        _put(out, start + 4 * at, on_device_parts.damaged(words, finite))
        scale, low = on_device_parts.grids(words, form.group_size)
    codes = (
        _places(numbers.view(*scale.shape[:3], -1), low, scale, levels).flatten(1)[:, : stop - first].to(torch.uint8)
    )
    _store(form, out, codes, first)


def _cover(numbers: torch.Tensor, levels: float) -> tuple[torch.Tensor, torch.Tensor]:
    """low and scale, float16 [n, groups], of the grids from the smallest to the largest number of each group."""
    low = _half_at_most(numbers.amin(2))
    high = torch.minimum(numbers.amax(2), low.float() + levels * MAX_HALF)
    return low, _half_at_least((high - low.float()).clamp(min=0) / levels)


def _places(numbers: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, levels: float) -> torch.Tensor:
    """The codes, float32, of the places next to numbers [n, groups, grids, numbers of each]."""
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return ((numbers - low) * inverse).clamp_(0, levels).add_(0.5).floor_()


def _put(out: torch.Tensor, start: int, settings: torch.Tensor) -> None:
    """Bytes of `settings` [n, groups], from byte `start` of each tensor."""
    raw = settings.contiguous().view(torch.uint8).view(len(out), -1)
    out[:, start : start + raw.shape[1]] = raw


def _store(form: Format, out: torch.Tensor, codes: torch.Tensor, first: int) -> None:
    if form.bits == 4:
        codes = F.pad(codes, (0, codes.shape[1] % 2))
        codes = codes[:, ::2] | (codes[:, 1::2] << 4)
    start = first * form.bits // 8
    out[:, start : start + codes.shape[1]] = codes


def _settings(form: Format, after_codes: torch.Tensor) -> torch.Tensor:
    """All bytes behind the codes as words int32 [n, groups], or as scales and then lows, float16 [n, 2 * groups].

    A copy where they are not aligned.
    """
    dtype = torch.float16 if form.encoder == "minmax" else torch.int32
    if any(
        place % dtype.itemsize
        for place in (after_codes.stride(0), after_codes.storage_offset(), after_codes.data_ptr())
    ):
        after_codes = after_codes.clone(memory_format=torch.contiguous_format)
    return after_codes.view(dtype)


def _grids(form: Format, settings: torch.Tensor, groups: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and low of groups, float32 [n, groups, grids, 1]: a group's numbers are as many runs of one grid each.

    settings: of all groups, as `_settings` gives them.
    """
    if form.encoder != "minmax":
        return on_device_parts.grids(settings[:, groups], form.group_size)
    scales, lows = settings.chunk(2, dim=1)
    return scales[:, groups, None, None].float(), lows[:, groups, None, None].float()


def _codes(form: Format, part: torch.Tensor, count: int) -> torch.Tensor:
    """`count` codes of every tensor from their bytes, uint8 [n, numbers]: of whole groups, filled up with anything."""
    numbers = count + -count % form.group_size
    if form.bits == 8:
        return F.pad(part, (0, numbers - part.shape[1]))
    pairs = part.new_empty(len(part), numbers // 2, 2)
    torch.bitwise_and(part, 15, out=pairs[:, : part.shape[1], 0])
    torch.bitwise_right_shift(part, 4, out=pairs[:, : part.shape[1], 1])
    return pairs.flatten(1)


def _spans(form: Format, count: int, size: int, at_once: int) -> list[tuple[int, int]]:
    """Runs of whole groups, as ranges of a tensor's numbers, with no more than `at_once` of all tensors if possible."""
    step = max(1, at_once // max(1, count * form.group_size)) * form.group_size
    return [(first, min(first + step, size)) for first in range(0, size, step)]


def _half_at_most(numbers: torch.Tensor) -> torch.Tensor:
    """The largest finite float16 that is not above each number, or the smallest one there is."""
    halves = numbers.clamp(-MAX_HALF, MAX_HALF).half()
    bits = halves.view(torch.int16)
    below = torch.where(bits == 0, -(2**15) + 1, torch.where(bits > 0, bits - 1, bits + 1)).to(torch.int16)
    above = (halves.float() > numbers) & (numbers >= -MAX_HALF)
    return torch.where(above, below, bits).view(torch.float16)


def _half_at_least(numbers: torch.Tensor) -> torch.Tensor:
    """The smallest float16 that is not below each number, none of which is negative; at most the largest."""
    halves = numbers.clamp(max=MAX_HALF).half()
    short = (halves.float() < numbers) & (numbers < MAX_HALF)
    return (halves.view(torch.int16) + short.to(torch.int16)).view(torch.float16)
