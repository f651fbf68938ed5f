"""Backends for a check to find right or wrong; its child imports them by name."""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx

from mlx_turboquant.backends.reference import Reference
from mlx_turboquant.kernels.tuning import UNTUNED


class Fake(Reference):
    """The reference, whose attention something happens to."""

    def __init__(self, happens):
        self.happens = happens

    def attend(self, call):
        return self.happens(super().attend(call), call)


def right():
    return Fake(lambda out, call: out)


def one_percent_off():
    return Fake(lambda out, call: out * 1.01)


def wrong_past_4096():
    return Fake(lambda out, call: out * (1.01 if call.keys.shape[2] > 4096 else 1))


def does_not_compile():
    def refuse(out, call):
        raise RuntimeError("Unable to build metal library\nerror: no such identifier")

    return Fake(refuse)


def segfaults():
    return Fake(lambda out, call: os.kill(os.getpid(), signal.SIGSEGV))


def aborts():
    """As MLX does when a command buffer fails."""
    return Fake(lambda out, call: os.abort())


def exits():
    return Fake(lambda out, call: os._exit(0))


def hangs():
    return Fake(lambda out, call: time.sleep(600))


def flickers():
    """The lowest bits differ, the 31st time that the same is asked."""
    turns = itertools.count()

    def flip(out, call):
        if call.q.shape[1] == 16 and call.keys.shape[2] > 4096 and call.mask is None:
            bits = out.view(mx.uint16)
            out = (bits ^ mx.array(int(next(turns) == 30), mx.uint16)).view(out.dtype)
        return out

    return Fake(flip)


class Codes(Reference):
    """The reference, one of whose kernels beside attention is wrong."""

    def __init__(self, method, wrong):
        right = getattr(super(), method)
        setattr(self, method, lambda *args: wrong(right(*args)))

    def attend(self, call):
        return Reference().attend(call)


def wrong_rotation():
    return Codes("encode_query", lambda q: q * 1.01)


def wrong_outputs():
    return Codes("decode_output", lambda out: out[..., ::-1])


def wrong_gains():
    return Codes("channel_gains", lambda gains: gains * 1.01)


def wrong_order():
    def swapped(codes):
        codes.arrays["words"] = codes.arrays["words"][:, :, ::-1]
        return codes

    return Codes("arranged", swapped)


def wrong_codes():
    def scaled(codes):
        codes.arrays["scales"] = codes.arrays["scales"] * 1.01
        return codes

    return Codes("encode", scaled)


def wrong_prefill():
    return Codes("materialize_rot", lambda x: mx.where(mx.arange(x.shape[3]), x, 0))


def wrong_arrays():
    return Codes("dequantize", lambda x: x * mx.array(mx.nan, x.dtype))


class Tunable(Fake):
    """Takes a third of the time with few_tokens 128; attention is right where checked.

    Args:
        happens: As `Fake` takes it, with the tuning as the last argument.
    """

    def __init__(self, happens=lambda out, call, tuning: out, tuning=UNTUNED):
        super().__init__(lambda out, call: happens(out, call, tuning))
        self.made_by, self.tuning = happens, tuning

    def tuned(self, tuning):
        return Tunable(self.made_by, tuning)

    def attend(self, call):
        if call.keys.shape[1] != 1:  # a check's
            return super().attend(call)
        x = mx.ones((128, 128))
        for turn in range(1 if self.tuning.few_tokens == 128 else 3):
            x = (x @ x) * (call.q.sum().astype(mx.float32) * 1e-9 + turn)
        return self.happens(call.q + 0 * x[0, 0].astype(call.q.dtype), call)


def tunable():
    return Tunable()


def tuned_is_wrong():
    """Only what is checked is: what is timed has one KV head."""

    def wrong(out, call, tuning):
        many = call.keys.shape[1] > 1
        return out * (1.01 if many and tuning.few_tokens else 1)

    return Tunable(wrong)


def tuned_crashes():
    def crash(out, call, tuning):
        if tuning.few_tokens:
            os.kill(os.getpid(), signal.SIGSEGV)
        return out

    return Tunable(crash)


def chatty():
    """Prints where the messages go."""
    os.write(1, b'{"event": "end", "status": "wrong", "reason": "not a message"}\n')
    return right()


def simulated():
    """The real kernels, in the simulator."""
    sys.path.insert(0, str(Path(__file__).parent / "kernels"))
    from conftest import Simulator

    from mlx_turboquant.backends.gpu import Gpu

    return Gpu(Simulator())
