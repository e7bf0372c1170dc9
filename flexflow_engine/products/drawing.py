"""What threads that call a kernel with the same products draw, until nothing is left.

`drawn`: int64, all zeros when the first of them begins: tiles of tokens and parts of matrices that have been taken, and
for each tile whether it is made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexflow_engine.cpu.jit import kernel
from flexflow_engine.cpu.pointers import has_flag, set_flag, take_next
from flexflow_engine.products.product_table import ROWS


@kernel
def next_to_make(drawn: NDArray[np.int64], made: int, count: int) -> Any:
    """Which of `count` tiles of tokens this thread makes next, when it has made that one, -1 for none; `count` when all
    are made, and it may multiply. One that another thread has taken and not made yet is made once more, the same:
    nobody waits for who is kept from working.
    """
    if made >= 0:
        set_flag(drawn, 2 + made)
    tile = take_next(drawn, 0)
    if tile < count:
        return tile
    for left in range(count):
        if not has_flag(drawn, 2 + left):
            return left
    return count


@kernel
def next_part(drawn: NDArray[np.int64], table: NDArray[np.int64], rows: int) -> Any:
    """Which part of the matrices, of so many rows each, this thread multiplies next: line of the table, and first row;
    as many lines as there are when none is left.
    """
    part = take_next(drawn, 1)
    for product in range(len(table)):
        parts = (table[product, ROWS] + rows - 1) // rows
        if part < parts:
            return product, part * rows
        part -= parts
    return len(table), 0
