"""Attention of one new token a row over paged keys and values, compiled for the host's processor.

Every page is read once, where it lies: first all pages of keys of one row, into scores that stay in the processor's
cache, then all pages of values. Sums are float32. Memory comes as addresses. Tables of int64:

    parts     a line a rectangle of pages: address of its keys, of its values, first_row, stop_row, first_page,
              stop_page, bytes of a page, whether tokens are written in place, whether pages are encoded
    rows      a line a row: its place in the GPU batch, tokens cached before this one
    tails     address of the tail keys, of the tail values, first row with a tail, the row behind the last
    shape     num_heads, num_kv_heads, page_tokens, head_dim
    decoder   address of the function that decodes to float32, and of its settings; any numbers where nothing is encoded
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flexflow_engine.cpu.jit import finite_kernel, kernel, summing_kernel
from flexflow_engine.cpu.numbers import narrow, widen
from flexflow_engine.cpu.pointers import call_decoder, offset, pointer, prefetch

_FLOATS = np.empty(0, np.float32)
_LINE_NBYTES = 64
"""Of a cache line. Where lines are longer, some are asked for twice."""
_LOG2_E, _LN_2_HIGH, _LN_2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)


@kernel
def attend(
    numbers: Any, buffers: Any, parts: Any, tails: Any, rows: Any, shape: Any, decoder: Any, scale: Any, span: Any
) -> None:
    """Attend for the key heads [first, stop) of all rows, counted through the rows.

    numbers: an array of the type of keys, values, query and output (float32, or the bits of 16). buffers: addresses of
    the query [rows, num_heads, head_dim], of the output, of scratch [rows, columns], float32, its columns, at least
    num_heads * (cached tokens + 2 head_dim), and of a chunk [page_tokens, head_dim], float32. span: first and stop.
    """
    query, output, scratch, columns, chunk = buffers
    num_heads, num_kv_heads, page_tokens, head_dim = shape
    width = num_heads * head_dim
    pages = np.empty((_most_pages(rows, page_tokens), 4), np.int64)
    item = span[0]
    while item < span[1]:
        n, first = item // num_kv_heads, item % num_kv_heads
        stop = min(num_kv_heads, first + span[1] - item)
        count = _find_pages(pages, parts, tails, rows[n], shape, numbers.itemsize)
        _attend_row(
            (query + n * width * numbers.itemsize, output + n * width * numbers.itemsize),
            (scratch + n * columns * 4, chunk),
            (pages, count, rows[n, 1] + 1),
            (first, stop),
            shape,
            decoder,
            scale,
            numbers,
        )
        item += stop - first


@kernel
def _most_pages(rows: Any, page_tokens: Any) -> Any:
    longest = 0
    for n in range(len(rows)):
        longest = max(longest, rows[n, 1])
    return longest // page_tokens + 1


@kernel
def _find_pages(pages: Any, parts: Any, tails: Any, row: Any, shape: Any, item: Any) -> Any:
    """Fill `pages` with a line a page of the row: address of its keys, of its values, tokens, whether encoded.

    The last page is the tail where its rectangle doesn't take tokens in place. Returns how many there are.
    """
    place, context = row[0], row[1]
    num_kv_heads, page_tokens, head_dim = shape[1], shape[2], shape[3]
    count = context // page_tokens + 1
    for p in range(len(parts)):
        first_row, stop_row, first_page, stop_page = parts[p, 2], parts[p, 3], parts[p, 4], parts[p, 5]
        if first_row <= place < stop_row:
            for page in range(first_page, min(stop_page, count)):
                place_bytes = ((page - first_page) * (stop_row - first_row) + place - first_row) * parts[p, 6]
                pages[page, 0], pages[page, 1] = parts[p, 0] + place_bytes, parts[p, 1] + place_bytes
                pages[page, 2], pages[page, 3] = page_tokens, parts[p, 8]
            if first_page < count <= stop_page and parts[p, 7] == 0 and tails[2] <= place < tails[3]:
                tail_bytes = (place - tails[2]) * num_kv_heads * page_tokens * head_dim * item
                pages[count - 1, 0], pages[count - 1, 1] = tails[0] + tail_bytes, tails[1] + tail_bytes
                pages[count - 1, 3] = 0
    pages[count - 1, 2] = context % page_tokens + 1
    return count


@kernel
def _attend_row(
    vectors: Any, room: Any, listed: Any, heads: Any, shape: Any, decoder: Any, scale: Any, numbers: Any
) -> None:
    """The key heads [first, stop) of one row.

    vectors: addresses of its query and output. room: of its scratch, and of the chunk. listed: its pages, their number,
    and that of all tokens in them.
    """
    (pages, count, cached), (num_heads, num_kv_heads, _, head_dim) = listed, shape
    group, width = num_heads // num_kv_heads, num_heads * head_dim
    query, output = pointer(vectors[0], numbers), pointer(vectors[1], numbers)
    floats = pointer(room[0], _FLOATS)  # the query, scaled
    sums, scores = offset(floats, width), offset(floats, 2 * width)
    for i in range(heads[0] * group * head_dim, heads[1] * group * head_dim):
        floats[i] = widen(query[i]) * scale
        sums[i] = np.float32(0)
    for p in range(count):
        place = offset(scores, p * shape[2])
        for head in range(heads[0], heads[1]):
            chosen = offset(floats, head * group * head_dim), offset(place, head * group * cached)
            sizes = group, head_dim, cached, pages[p, 2]
            if pages[p, 3]:
                decoded = _decoded(pages[p, 0], head, pages[p, 2], shape, decoder, room[1])
                _score(decoded, chosen, sizes, (pages[p, 0], 0))
            else:
                following = _following(pages, count, (p, head, 0), heads, shape, numbers)
                _score(_plain(pages[p, 0], head, shape, numbers), chosen, sizes, following)
    for h in range(heads[0] * group, heads[1] * group):
        _softmax(offset(scores, h * cached), cached)
    for p in range(count):
        place = offset(scores, p * shape[2])
        for head in range(heads[0], heads[1]):
            chosen = offset(sums, head * group * head_dim), offset(place, head * group * cached)
            sizes = group, head_dim, cached, pages[p, 2]
            if pages[p, 3]:
                decoded = _decoded(pages[p, 1], head, pages[p, 2], shape, decoder, room[1])
                _accumulate(decoded, chosen, sizes, (pages[p, 1], 0))
            else:
                following = _following(pages, count, (p, head, 1), heads, shape, numbers)
                _accumulate(_plain(pages[p, 1], head, shape, numbers), chosen, sizes, following)
    for i in range(heads[0] * group * head_dim, heads[1] * group * head_dim):
        output[i] = narrow(sums[i], output)


@kernel
def _following(pages: Any, count: Any, place: Any, heads: Any, shape: Any, numbers: Any) -> Any:
    """What is read after the tokens at `place` (page, head, and 0 for keys or 1 for values): the address of its tokens,
    and the cache lines of four of them, 0 where nothing follows that kernels read in place.
    """
    p, head, column = place
    p, head = (p, head + 1) if head + 1 < heads[1] else (p + 1, heads[0])
    if p == count or pages[p, 3]:
        return pages[place[0], column], 0
    token_nbytes = shape[3] * numbers.itemsize
    return pages[p, column] + head * shape[2] * token_nbytes, 4 * token_nbytes // _LINE_NBYTES


@kernel
def _ask_for(following: Any, four: Any) -> None:
    """Have four tokens of what follows fetched while the four of this number are computed with.

    The processor's own prefetcher starts anew at every page, and asking for all tokens at once holds up the loads of
    those that are computed with.
    """
    address, lines = following
    for line in range(four * lines, (four + 1) * lines):
        prefetch(address + _LINE_NBYTES * line)


@kernel
def _plain(page: Any, head: Any, shape: Any, numbers: Any) -> Any:
    """One head's tokens [page_tokens, head_dim] of the page at an address."""
    return pointer(page + head * shape[2] * shape[3] * numbers.itemsize, numbers)


@kernel
def _decoded(page: Any, head: Any, tokens: Any, shape: Any, decoder: Any, chunk: Any) -> Any:
    """The same of an encoded page, decoded into the chunk."""
    call_decoder(decoder[0], page, decoder[1], head * shape[2] * shape[3], tokens * shape[3], chunk)
    return pointer(chunk, _FLOATS)


@summing_kernel
def _score(keys: Any, chosen: Any, sizes: Any, following: Any) -> None:
    """chosen: the queries [group, head_dim] that share the keys, and where their scores go, a row of `cached` each.

    Four tokens at a time: their sums over head_dim are independent, and the query is loaded once.
    """
    (queries, scores), (group, head_dim, cached, tokens) = chosen, sizes
    for g in range(group):
        query, place = offset(queries, g * head_dim), offset(scores, g * cached)
        for t in range(tokens // 4):
            _ask_for(following, t)
            a, b = offset(keys, 4 * t * head_dim), offset(keys, (4 * t + 1) * head_dim)
            c, d = offset(keys, (4 * t + 2) * head_dim), offset(keys, (4 * t + 3) * head_dim)
            x, y, z, w = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for i in range(head_dim):
                x += query[i] * widen(a[i])
                y += query[i] * widen(b[i])
                z += query[i] * widen(c[i])
                w += query[i] * widen(d[i])
            place[4 * t], place[4 * t + 1], place[4 * t + 2], place[4 * t + 3] = x, y, z, w
        for t in range(tokens // 4 * 4, tokens):
            key, x = offset(keys, t * head_dim), np.float32(0)
            for i in range(head_dim):
                x += query[i] * widen(key[i])
            place[t] = x


@summing_kernel
def _accumulate(values: Any, chosen: Any, sizes: Any, following: Any) -> None:
    """Add the values, times their tokens' weights, to the sums. chosen: sums [group, head_dim], and weights."""
    (sums, weights), (group, head_dim, cached, tokens) = chosen, sizes
    for g in range(group):
        total, weight = offset(sums, g * head_dim), offset(weights, g * cached)
        for t in range(tokens // 4):
            _ask_for(following, t)
            a, b = offset(values, 4 * t * head_dim), offset(values, (4 * t + 1) * head_dim)
            c, d = offset(values, (4 * t + 2) * head_dim), offset(values, (4 * t + 3) * head_dim)
            x, y, z, w = weight[4 * t], weight[4 * t + 1], weight[4 * t + 2], weight[4 * t + 3]
            for i in range(head_dim):
                total[i] += (x * widen(a[i]) + y * widen(b[i])) + (z * widen(c[i]) + w * widen(d[i]))
        for t in range(tokens // 4 * 4, tokens):
            value, x = offset(values, t * head_dim), weight[t]
            for i in range(head_dim):
                total[i] += x * widen(value[i])


@summing_kernel
def _softmax(scores: Any, count: Any) -> None:
    """In place."""
    largest = _largest(scores, count)
    total = np.float32(0)
    for t in range(count):
        scores[t] = _exp(scores[t] - largest)
        total += scores[t]
    inverse = np.float32(1) / total
    for t in range(count):
        scores[t] *= inverse


@finite_kernel
def _largest(scores: Any, count: Any) -> Any:
    largest = scores[0]
    for t in range(count):
        largest = max(largest, scores[t])
    return largest


@summing_kernel
def _exp(x: Any) -> Any:
    """e^x for x at most 0, within two units in the last place: 2^n e^r, |r| <= ln 2 / 2 (Cephes' expf).

    A call of the C library's would not vectorise.
    """
    x = max(x, np.float32(-87.0))
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN_2_HIGH - n * _LN_2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
