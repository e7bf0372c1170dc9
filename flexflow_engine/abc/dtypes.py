"""Number formats by name, so that plain data needs no framework to speak of them."""

from typing import Literal, get_args

DType = Literal["float32", "float16", "bfloat16"]

DTYPES: tuple[DType, ...] = get_args(DType)

ITEM_NBYTES: dict[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
