"""Built-in codecs."""

from flexflow_engine import hookimpl
from flexflow_engine.abc.codec import Codec
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt8Codec
from flexflow_plugins.codecs.lossless import FAMILY
from flexflow_plugins.codecs.none import NoneCodec


@hookimpl
def flexflow_register_codecs() -> list[type[Codec]]:
    return [NoneCodec, GroupInt4Codec, GroupInt8Codec, *FAMILY]
