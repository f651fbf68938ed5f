from typing import NamedTuple

ENCODE_SCALAR = ENCODE_TRELLIS = DECODE_CODES = None


class EncodeArguments(NamedTuple):
    tokens: int
    kv_heads: int
    batch: int
    first: int
    page: int


class DecodeArguments(NamedTuple):
    tokens: int
    kv_heads: int
    batch: int
