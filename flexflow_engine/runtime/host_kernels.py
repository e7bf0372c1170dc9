"""Attention of one new token a row over paged keys and values, compiled for the host's processor.

Every page is read once, where it lies: first all pages of keys of one row, into scores that stay in the processor's
cache, then all pages of values. Sums are float32. Memory comes as addresses. Tables of int64:

    parts     a line a rectangle of pages: address of its keys, of its values, first_row, stop_row, first_page,
              stop_page, bytes of a page, whether tokens are written in place, whether pages are encoded
    rows      a line a row: its place in the GPU batch, tokens cached before this one
    tails     address of the tail keys, of the tail values, first row with a tail, the row behind the last
    shape     num_heads, num_kv_heads, page_tokens, head_dim
    decoder   addresses of the function that decodes to float32, of its settings, of its products `multiply` and
              `accumulate`, 0 where there are none; any numbers where nothing is encoded
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flexflow_engine.cpu.jit import finite_kernel, kernel, summing_kernel
from flexflow_engine.cpu.numbers import narrow, widen
from flexflow_engine.cpu.pointers import LINE_NBYTES, call_decoder, call_product, offset, pointer, prefetch

_FLOATS = np.empty(0, np.float32)
_AHEAD_NBYTES = 8192
"""How far ahead of plain pages' numbers those are that are asked for."""
_MULTIPLIED_NBYTES = 1024
"""Of encoded heads that are multiplied by one call; as many bytes of what follows are asked for before."""
_LOG2_E, _LN_2_HIGH, _LN_2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)


@kernel
def attend(
    numbers: Any, buffers: Any, parts: Any, tails: Any, rows: Any, shape: Any, decoder: Any, scale: Any, span: Any
) -> None:
    """Attend for the key heads [first, stop) of all rows, counted through the rows.

    numbers: an array of the type of keys, values and query (float32, or the bits of 16). buffers: addresses of the
    query [rows, num_heads, head_dim], whose place the result takes, of scratch, float32, and how many numbers further
    each row's lies (0: all rows use the same, of num_heads * (cached tokens + 2 head_dim) numbers), of a chunk
    [heads, page_tokens, head_dim], float32, and its heads, that are decoded at a time. span: first and stop.
    """
    query, scratch, step, chunk, chunk_heads = buffers
    num_heads, num_kv_heads, page_tokens, head_dim = shape
    width = num_heads * head_dim
    pages = np.empty((_most_pages(rows, page_tokens), 6), np.int64)
    item = span[0]
    while item < span[1]:
        n, first = item // num_kv_heads, item % num_kv_heads
        stop = min(num_kv_heads, first + span[1] - item)
        count = _find_pages(pages, parts, tails, rows[n], shape, numbers.itemsize)
        _attend_row(
            query + n * width * numbers.itemsize,
            (scratch + n * step * 4, chunk, chunk_heads),
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
    """Fill `pages` with a line a page of the row: address of its keys, of its values, tokens, whether encoded, bytes of
    a head (of an encoded page, an even share of all), and how many cache lines of these there are for four tokens.

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
                pages[page, 2], pages[page, 3], pages[page, 4] = page_tokens, parts[p, 8], parts[p, 6] // num_kv_heads
            if first_page < count <= stop_page and parts[p, 7] == 0 and tails[2] <= place < tails[3]:
                tail_bytes = (place - tails[2]) * num_kv_heads * page_tokens * head_dim * item
                pages[count - 1, 0], pages[count - 1, 1] = tails[0] + tail_bytes, tails[1] + tail_bytes
                pages[count - 1, 3], pages[count - 1, 4] = 0, page_tokens * head_dim * item
    pages[count - 1, 2] = context % page_tokens + 1
    span = max(1, page_tokens // 4) * LINE_NBYTES
    for page in range(count):
        pages[page, 5] = (pages[page, 4] + span - 1) // span
    return count


@kernel
def _attend_row(
    vector: Any, room: Any, listed: Any, heads: Any, shape: Any, decoder: Any, scale: Any, numbers: Any
) -> None:
    """The key heads [first, stop) of one row.

    vector: address of its query, and of the result. room: of its scratch, and of the chunk, and the chunk's heads.
    listed: its pages, their number, and that of all tokens in them.
    """
    (pages, count, cached), (num_heads, num_kv_heads, _, head_dim) = listed, shape
    group, width = num_heads // num_kv_heads, num_heads * head_dim
    query = pointer(vector, numbers)
    floats = pointer(room[0], _FLOATS)  # the query, scaled
    sums, scores = offset(floats, width), offset(floats, 2 * width)
    for i in range(heads[0] * group * head_dim, heads[1] * group * head_dim):
        floats[i] = widen(query[i]) * scale
        sums[i] = np.float32(0)
    read = pages, count, heads, shape, decoder, room[1:]
    _walk(read, 0, floats, (scores, cached), numbers)
    for h in range(heads[0] * group, heads[1] * group):
        _softmax(offset(scores, h * cached), cached)
    _walk(read, 1, sums, (scores, cached), numbers)
    for i in range(heads[0] * group * head_dim, heads[1] * group * head_dim):
        query[i] = narrow(sums[i], query)


@kernel
def _walk(read: Any, column: Any, vectors: Any, weights: Any, numbers: Any) -> None:
    """Every page and head of a row, page by page: scores of the keys, or the sums of values.

    column: 0 for keys, 1 for values. vectors: the queries or sums, head_dim a head. weights: pointer to the scores, a
    row of `cached` a head, and `cached`.
    """
    (pages, count, heads, shape, decoder, (chunk, chunk_heads)), (scores, cached) = read, weights
    first, stop = heads
    group, page_tokens, head_dim = shape[0] // shape[1], shape[2], shape[3]
    product = decoder[2 + column] if group == 1 else 0
    for p in range(count):
        page, encoded, nbytes = pages[p, column], pages[p, 3], pages[p, 4]
        following = _next_page(pages, p, count, column)
        sizes, place = (group, head_dim, cached, pages[p, 2]), offset(scores, p * page_tokens)
        if encoded and product and pages[p, 2] == page_tokens:
            _multiply((product, decoder[1]), (page, following, nbytes), heads, (vectors, head_dim), (place, cached))
            continue
        ahead = stop - first if encoded else min(stop - first, (_AHEAD_NBYTES + nbytes - 1) // nbytes)
        decoded = first
        for head in range(first, stop):
            chosen = offset(vectors, head * group * head_dim), offset(place, head * group * cached)
            later = head + ahead
            asked = page + later * nbytes if later < stop else following + (later - stop + first) * nbytes
            if encoded:
                if head == decoded:
                    decoded = min(stop, head + chunk_heads)
                    of_head = page_tokens * head_dim
                    call_decoder(decoder[0], page, decoder[1], head * of_head, (decoded - head) * of_head, chunk)
                    floats = pointer(chunk, _FLOATS)
                _use(column, floats, chosen, sizes, (asked, pages[p, 5]))
                floats = offset(floats, page_tokens * head_dim)
            else:
                _use(column, pointer(page + head * nbytes, numbers), chosen, sizes, (asked, pages[p, 5]))


@kernel
def _multiply(function: Any, memory: Any, heads: Any, vectors: Any, weights: Any) -> None:
    """The key heads [first, stop) of an encoded page, without decoding them.

    function: addresses of a product of the codec's, and of its settings. memory: addresses of the page and of the one
    that follows, and bytes of a head. vectors: as of `_walk`, and numbers of one. weights: of the page's first token,
    and how many numbers further those of the next head are.
    """
    (product, settings), (page, following, nbytes) = function, memory
    (numbers, size), (places, stride), (head, stop) = vectors, weights, heads
    at_once = max(1, _MULTIPLIED_NBYTES // nbytes)
    while head < stop:
        count = min(at_once, stop - head)
        for line in range(0, count * nbytes, LINE_NBYTES):
            prefetch(following + head * nbytes + line)
        out = offset(numbers, head * size), offset(places, head * stride), stride
        call_product(product, page, settings, (head, count), out)
        head += count


@kernel
def _use(column: Any, tokens: Any, chosen: Any, sizes: Any, following: Any) -> None:
    if column:
        _accumulate(tokens, chosen, sizes, following)
    else:
        _score(tokens, chosen, sizes, following)


@kernel
def _next_page(pages: Any, p: Any, count: Any, column: Any) -> Any:
    """Address of the page that is read after page p of the keys or values; of the same one where none follows."""
    if p + 1 < count:
        return pages[p + 1, column]
    return pages[p, column] if column else pages[0, 1]


@kernel
def _ask_for(following: Any, four: Any) -> None:
    """Have a part of what follows fetched while the four tokens of this number are computed with.

    The processor's own prefetcher starts anew at every page, and asking for everything at once holds up the loads of
    what is computed with.
    """
    address, lines = following
    for line in range(four * lines, (four + 1) * lines):
        prefetch(address + LINE_NBYTES * line)


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
