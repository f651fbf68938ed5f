"""Requests that are wrong, or right at their limits: mlx-lm's server dies of some.

`benchmarks/bench_faults.py` asks both servers, `test_serving_fields.py` ours.
"""

#: Values that are refused, by field, and what the answer says of each.
REFUSED = {
    "top_k": [
        (16384, "16384 tokens"),
        (2**31 - 1, "16384 tokens"),
        (-1, "greater"),
        ("5", "integer"),
    ],
    "stop": [
        (5, "valid string"),
        ([5], "valid string"),
        ("", "at least 1"),
        ([["a"]], "string"),
    ],
    "prompt": [
        (["a", "b"], "at most 1 item"),
        ([], "at least 1 item"),
        ([99999], "16384 tokens"),
        ([1, -1], "greater"),
        ({"a": 1}, "valid string"),
        (None, "valid string"),
    ],
    "logit_bias": [
        ({"99999": 1}, "token 99999"),
        ({"-1": 1}, "token -1"),
        ({"a": 1}, "whole numbers"),
        ({"1": 1e300}, "less than or equal to 100"),
        ([1], "an object"),
    ],
    "repetition_context_size": [
        (1 << 62, "1048576"),
        (-1, "greater"),
        (1.5, "integer"),
    ],
    "presence_context_size": [(1 << 62, "1048576")],
    "frequency_context_size": [(1 << 62, "1048576")],
    "xtc_threshold": [(0.9, "0.5")],
    "xtc_probability": [(1.5, "less than or equal to 1"), (True, "valid number")],
    "temperature": [(-1, "greater"), ("1", "valid number"), (True, "valid number")],
    "top_p": [(2, "less than or equal to 1")],
    "min_p": [(-0.1, "greater")],
    "max_tokens": [
        ("many", "integer"),
        (0, "greater"),
        (1 << 70, "less than"),
        (1.0, "integer"),
    ],
    "max_completion_tokens": [(0, "greater")],
    "seed": [("a", "integer"), (1 << 70, "less than"), (0.5, "integer")],
    "top_logprobs": [(5000, "20"), (-2, "-1")],
    "logprobs": [("yes", "boolean"), (21, "20")],
    "num_draft_tokens": [(0, "greater"), (1 << 40, "64")],
    "repetition_penalty": [(-1, "greater"), (1e9, "100")],
    "presence_penalty": [(1e300, "100")],
    "stream": [("yes", "boolean")],
    "stream_options": [(5, "object"), ({"include_usage": 5}, "boolean")],
    "n": [(2, "less than or equal to 1")],
    "best_of": [(2, "less than or equal to 1")],
    "echo": [(True, "False")],
    "suffix": [("x", "at most 0")],
}
#: Fields that are served.
ACCEPTED = [
    {"top_k": 16383},
    {"xtc_probability": 1.0},
    {"xtc_probability": 1, "xtc_threshold": 0},
    {"temperature": 1e-300},
    {"temperature": 1e300},
    {"top_p": 0},
    {"min_p": 1},
    {"min_p": 1e-300},
    {"prompt": ["a"]},
    {"prompt": [5, 6, 7]},
    {"seed": -1},
    {"seed": 2**64 - 1},
    {"repetition_penalty": 1e-300, "repetition_context_size": 0},
    {"repetition_penalty": 100, "repetition_context_size": 1 << 20},
    {"logit_bias": {"0": -100, "16383": 100}},
    {"logprobs": 20},
    {"top_logprobs": -1, "logprobs": False},
    {"temperature": None, "stop": None, "seed": None, "logit_bias": None},
    {"user": "me", "store": False, "unknown": [1, 2]},
]
