"""Seconds that one processor computes for, from a model's shape and the processor's measured rates.

Symbols: n new tokens, h hidden size, a = num_heads * head_dim, c = 2 * num_kv_heads * head_dim numbers of keys and
values a token. The counts of operations are those of FlexGen (arXiv 2303.06865, appendix A.3), for any width of the
feed-forward part and of the keys, and with the causal half of the prompt's scores only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import ITEM_NBYTES, DType
from flexflow_engine.abc.hardware import PLAIN, CodecRates, Curve, Processor, ProductRates, measured_key
from flexflow_engine.abc.model import ModelConfig
from flexflow_engine.abc.step import RowStep
from flexflow_engine.errors import HardwareError
from flexflow_engine.products.widening import widened_times

T = TypeVar("T")


class Arithmetic:
    """Of one processor, for one model in one dtype and one codec of its cache. Every method returns seconds."""

    def __init__(
        self,
        processor: Processor,
        config: ModelConfig,
        dtype: DType,
        kv_codec: Codec,
        products: ProductRates | None = None,
    ) -> None:
        """products: of plain numbers, where these are not multiplied as encoded ones are. Raises HardwareError where
        the profile has no rate for the dtype.
        """
        self._processor, self._config, self._dtype, self._kv_codec = processor, config, dtype, kv_codec
        self._item_nbytes = ITEM_NBYTES[dtype]
        drawn = ProductRates(matmul_flops_per_s=_matmul_curve(processor, dtype), product_s=processor.product_s)
        self._drawn, self._plain = drawn, products or drawn

    @property
    def task_s(self) -> float:
        """What any task takes beside its arithmetic."""
        return self._processor.task_s

    @property
    def layer_s(self) -> float:
        """What a decoder layer takes beside that."""
        return self._processor.layer_s

    def matmul(self, weights: int, tokens: int, products: int = 1) -> float:
        """So many products, with `weights` numbers in all: products * product_s + 2 * weights * n / rate(n)."""
        return products * self._plain.product_s + 2.0 * weights * tokens / self._plain.matmul_flops_per_s.at(tokens)

    def encoded_matmul(self, weights: int, tokens: int, products: int, codec: Codec) -> float:
        """The same with weights that are decoded while they are multiplied; by the codec's own rate(n), or if there is
        none, decoded again for every WIDENED_TOKENS of n, and multiplied.
        """
        if codec.keeps_bytes:
            return self.matmul(weights, tokens, products)
        curve = self._codec_rates(codec).product_flops_per_s
        if curve is None:
            plain_s = 2.0 * weights * tokens / self._drawn.matmul_flops_per_s.at(tokens)
            product_s = plain_s + widened_times(tokens) * self.decoded(weights, codec)
        else:
            product_s = 2.0 * weights * tokens / curve.at(tokens)
        return products * self._drawn.product_s + product_s

    def memory(self, numbers: float) -> float:
        """Numbers in the model's dtype that kernels between matmuls read or write: numbers * item / memory rate."""
        return numbers * self._item_nbytes / self._processor.memory_bytes_per_s

    def vectors(self, out_features: int, tokens: int) -> float:
        """Norms, biases, residuals and activation functions of a layer: every matmul's result is read and written once
        more, and the hidden state six times: n * (2 * out_features + 6 * h) numbers.
        """
        return self.memory(tokens * (2 * out_features + 6 * self._config.hidden_size))

    def prompt_attention(self, rows: Sequence[RowStep]) -> float:
        """Prompts over themselves: sum of 2 * n * (n + 1) * a / rate(n), and their keys and values put away."""
        curve = self._processor.prefill_attention_flops_per_s
        lengths = Counter(row.new_tokens for row in rows)
        scores = sum(count * 2.0 * n * (n + 1) * self._query_width / curve.at(n) for n, count in lengths.items())
        return scores + self.kept(sum(row.new_tokens for row in rows))

    def kept(self, tokens: int) -> float:
        """Keys and values of new tokens copied into pages, or encoded into them: n * c numbers."""
        numbers = tokens * self._kv_width
        if self._kv_codec.keeps_bytes:
            return self.memory(2 * numbers)
        return numbers / self._codec_rates(self._kv_codec).encode_values_per_s

    def token_attention(self, rows: Sequence[RowStep]) -> float:
        """One new token a row over its cached ones: sum of context * c * bytes a number / rate(context).

        Pages of a codec that attention doesn't read as they are: c * context / decode rate, then as plain numbers.
        """
        contexts = Counter(row.context + 1 for row in rows)  # most rows of a batch are equally long
        return sum(count * self._one_token(context) for context, count in contexts.items())

    def decoded(self, values: int, codec: Codec) -> float:
        """Numbers decoded: values / decode rate."""
        return 0.0 if codec.keeps_bytes else values / self._codec_rates(codec).decode_values_per_s

    def _one_token(self, context: int) -> float:
        numbers = context * self._kv_width
        rates = self._processor.decode_attention_bytes_per_s
        in_place = _of_codec(rates, self._kv_codec)
        if in_place is not None:
            return numbers * self._kv_number_nbytes(context) / in_place.at(context)
        plain = numbers * self._item_nbytes / rates[PLAIN].at(context)
        return plain + self.decoded(numbers, self._kv_codec)

    def _kv_number_nbytes(self, context: int) -> float:
        """Bytes of one number of the cache as it lies there."""
        shape = (self._config.num_kv_heads, context, self._config.head_dim)
        return 2 * self._kv_codec.encoded_nbytes(shape, self._dtype) / (context * self._kv_width)

    def _codec_rates(self, codec: Codec) -> CodecRates:
        rates = _of_codec(self._processor.codecs, codec)
        if rates is None:
            raise HardwareError(
                f"there are no rates of the codec {codec.name}",
                where="hardware profile",
                fix=f"let `profile` measure them, or give codecs.{codec.name} of the processor in the file",
            )
        return rates

    @property
    def _query_width(self) -> int:
        return self._config.num_heads * self._config.head_dim

    @property
    def _kv_width(self) -> int:
        return 2 * self._config.num_kv_heads * self._config.head_dim


def _of_codec(rates: Mapping[str, T], codec: Codec) -> T | None:
    """Those that were measured of a codec with these settings, else those of its name."""
    return rates.get(measured_key(codec), rates.get(codec.name))


def _matmul_curve(processor: Processor, dtype: DType) -> Curve:
    curve = processor.matmul_flops_per_s.get(dtype)
    if curve is None:
        known = ", ".join(processor.matmul_flops_per_s)
        raise HardwareError(
            f"there is no matmul rate for {dtype}",
            where="hardware profile",
            fix=f"known: {known}; let `profile` measure it, or give matmul_flops_per_s.{dtype} in the file",
        )
    return curve
