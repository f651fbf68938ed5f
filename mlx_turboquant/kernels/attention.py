from typing import NamedTuple

DECODE_SPLIT_KV = MERGE_STATES = None


class AttendArguments(NamedTuple):
    packed: int
    splits: int
    tokens_per_split: int
    kv_heads: int
    rows: int
    steps: int
    sink: int
    recent: int
    causal: int
    mask_columns: int
    page: int
