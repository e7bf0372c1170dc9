"""The same format with torch operators, for tensors that are not in host memory.

Decoding gives the very numbers that the compiled kernels give: the product of code and scale is exact in float32, and
one sum is rounded. Encoding covers each group, or fits a line to it from there (see fitting.py); searching is done on
the host.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_plugins.codecs.threads import Format
from flexflow_plugins.codecs.threads import encode as encode_on_host

_NUMBERS_AT_ONCE = 2**22
"""Bounds the temporary float32 numbers, whatever the tensors' size."""
_MAX_HALF = 65504.0
_ROUNDS = 5
"""Of a fit, as many as the kernels take."""
_NEAR = 2.0
"""Weight of a number at its group's mean, against 1 for each standard deviation from it."""


def decode(form: Format, encoded: torch.Tensor, out: torch.Tensor) -> None:
    """encoded uint8 [n, nbytes] into out [n, *shape], any float dtype, both on one device."""
    size = prod(out.shape[1:])
    if out.numel() == 0:
        return
    codes, scales, lows = _sections(form, encoded, size)
    target = out.view(len(out), size) if out.is_contiguous() else out.new_empty(len(out), size)
    for first, stop in _spans(form, len(out), size):
        part = _codes(form, codes, first, stop)  # [n, groups * group_size]
        numbers = F.pad(part, (0, -part.shape[1] % form.group_size)).view(len(out), -1, form.group_size)
        groups = slice(first // form.group_size, -(-stop // form.group_size))
        numbers = (numbers * scales[:, groups, None]).add_(lows[:, groups, None]).flatten(1)[:, : stop - first]
        target[:, first:stop] = numbers.clamp_(-_MAX_HALF, _MAX_HALF) if out.dtype == torch.float16 else numbers
    if not out.is_contiguous():
        out.copy_(target.view(out.shape))


def encode(form: Format, values: torch.Tensor, out: torch.Tensor) -> None:
    """values [n, *shape], any float dtype, into out, uint8 [n, nbytes], both on one device."""
    if form.encoder == "search":
        found = torch.empty(out.shape, dtype=torch.uint8)
        encode_on_host(form, values.cpu(), found)
        out.copy_(found)
        return
    size = prod(values.shape[1:])
    for first, stop in _spans(form, len(values), size):
        _encode_groups(form, values.flatten(1)[:, first:stop], out, (first, stop, size))


def _encode_groups(form: Format, values: torch.Tensor, out: torch.Tensor, place: tuple[int, int, int]) -> None:
    """values [n, stop - first] into their places of `out`; place: first and stop, in numbers, of the size."""
    first, stop, size = place
    levels = float(2**form.bits - 1)
    padding = -values.shape[1] % form.group_size
    numbers = F.pad(values.float()[:, None], (0, padding), mode="replicate").view(len(values), -1, form.group_size)
    finite = numbers.isfinite().all(2)  # [n, groups]
    numbers = torch.where(finite[:, :, None], numbers, 0)
    low = _half_at_most(numbers.amin(2))
    high = torch.minimum(numbers.amax(2), low.float() + levels * _MAX_HALF)
    scale = _half_at_least((high - low.float()).clamp(min=0) / levels)
    if form.encoder == "fit":
        low, scale = _fit(numbers, low, scale, levels)
    codes = _places(numbers, low.float(), scale.float(), levels).flatten(1)[:, : stop - first].to(torch.uint8)
    low = torch.where(finite, low, torch.nan)
    _store(form, out, codes, place)
    scales, groups = (size * form.bits + 7) // 8, -(-size // form.group_size)
    for section, halves in ((scales, scale), (scales + 2 * groups, low)):
        start = section + 2 * (first // form.group_size)
        out[:, start : start + 2 * halves.shape[1]] = halves.contiguous().view(torch.uint8).view(len(out), -1)


def _fit(
    numbers: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, levels: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grids float16 [n, groups] of less error than the covering ones, or those."""
    smallest, largest = numbers.amin(2), numbers.amax(2)
    step = (largest - smallest) / levels
    mean, weights = _weigh(numbers)
    centred = numbers - mean[:, :, None]
    bottom, width = smallest - mean, step
    for _ in range(_ROUNDS):
        bottom, width = _line(centred, weights, bottom, width, levels)
    new_scale = width.clamp(max=_MAX_HALF).half()
    places = _places(numbers, bottom + mean, new_scale.float(), levels)
    rest = (weights * (numbers - places * new_scale.float()[:, :, None])).sum(2) / weights.sum(2)
    new_low = rest.clamp(-_MAX_HALF, _MAX_HALF).half()
    bottom, width = new_low.float(), new_scale.float()
    better = _squared_error(numbers, new_low, new_scale, levels) < _squared_error(numbers, low, scale, levels)
    better &= (bottom - smallest <= step) & (largest - bottom - width * levels <= step)
    better &= (width > 0) & (width <= 2 * step) & (smallest >= -_MAX_HALF) & (largest <= _MAX_HALF)
    better &= step >= 2.0**-24
    return torch.where(better, new_low, low), torch.where(better, new_scale, scale)


def _weigh(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means [n, groups] and the weights [n, groups, group_size]."""
    centred = numbers - numbers.mean(2, keepdim=True)
    deviation = centred.square().mean(2, keepdim=True).sqrt()
    weights = _NEAR + centred.abs() / torch.where(deviation > 0, deviation, 1)
    return (weights * numbers).sum(2) / weights.sum(2), weights


def _line(
    numbers: torch.Tensor, weights: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, levels: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """low and scale [n, groups] of the weighted least-squares line through (code, number); as they were without one."""
    codes, total = _places(numbers, low, scale, levels), weights.sum(2)
    weighted = weights * codes
    centre = weighted.sum(2) / total
    variance = (weighted * codes).sum(2) - centre * weighted.sum(2)
    slope = (weighted * numbers).sum(2) / variance
    found = (variance >= 0.5) & (slope > 0)
    return torch.where(found, -slope * centre, low), torch.where(found, slope, scale)


def _places(numbers: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, levels: float) -> torch.Tensor:
    """The codes float32 [n, groups, group_size] of the places next to the numbers; low and scale float32."""
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return ((numbers - low[:, :, None]) * inverse[:, :, None]).clamp_(0, levels).add_(0.5).floor_()


def _squared_error(numbers: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, levels: float) -> torch.Tensor:
    """[n, groups]; low and scale float16."""
    low, scale = low.float(), scale.float()
    decoded = low[:, :, None] + _places(numbers, low, scale, levels) * scale[:, :, None]
    return (decoded - numbers).square().sum(2)


def _store(form: Format, out: torch.Tensor, codes: torch.Tensor, place: tuple[int, int, int]) -> None:
    if form.bits == 4:
        codes = F.pad(codes, (0, codes.shape[1] % 2))
        codes = codes[:, ::2] | (codes[:, 1::2] << 4)
    start = place[0] * form.bits // 8
    out[:, start : start + codes.shape[1]] = codes


def _sections(form: Format, encoded: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [n, ...], scales and lows float32 [n, groups]."""
    start, groups = (size * form.bits + 7) // 8, -(-size // form.group_size)
    halves = encoded[:, start:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    return encoded[:, :start], halves[:, :groups], halves[:, groups:]


def _codes(form: Format, codes: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """Codes [first, stop) of every tensor as float32 [n, stop - first]."""
    part = codes[:, first * form.bits // 8 : (stop * form.bits + 7) // 8]
    if form.bits == 4:
        part = torch.stack((part & 15, part >> 4), dim=2).flatten(1)[:, : stop - first]
    return part.float()


def _spans(form: Format, count: int, size: int) -> list[tuple[int, int]]:
    """Runs of whole groups, as ranges of a tensor's numbers, each short enough for all tensors at once."""
    step = max(1, _NUMBERS_AT_ONCE // max(1, count * form.group_size)) * form.group_size
    return [(first, min(first + step, size)) for first in range(0, size, step)]


def _half_at_most(numbers: torch.Tensor) -> torch.Tensor:
    """The largest finite float16 that is not above each number, or the smallest one there is."""
    halves = numbers.clamp(-_MAX_HALF, _MAX_HALF).half()
    bits = halves.view(torch.int16)
    below = torch.where(bits == 0, -(2**15) + 1, torch.where(bits > 0, bits - 1, bits + 1)).to(torch.int16)
    above = (halves.float() > numbers) & (numbers >= -_MAX_HALF)
    return torch.where(above, below, bits).view(torch.float16)


def _half_at_least(numbers: torch.Tensor) -> torch.Tensor:
    """The smallest float16 that is not below each number, none of which is negative; at most the largest."""
    halves = numbers.clamp(max=_MAX_HALF).half()
    short = (halves.float() < numbers) & (numbers < _MAX_HALF)
    return (halves.view(torch.int16) + short.to(torch.int16)).view(torch.float16)
