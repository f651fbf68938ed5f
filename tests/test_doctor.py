import re

from mlx_turboquant import diagnosis
from mlx_turboquant.backends.reference import Reference


def test_doctor_reports_this_machine(run_cli):
    code, out, err = run_cli("doctor", "--tokens", "600")
    assert code == 0, err
    for name in ("mlx-tq", "mlx-lm", "device", "OpenBLAS", "kernels"):
        assert re.search(rf"^{name} +\S", out, re.M)
    assert re.search(r"^fp16 +[\d.]+ ms  at 600 tokens", out, re.M)


class Fake(Reference):
    """Stands in for kernels: right, wrong, or not compiling."""

    def __init__(self, mode):
        self.mode = mode

    def _try(self, function, *args):
        if self.mode == "broken":
            raise RuntimeError("error: use of undeclared identifier\n")
        return function(*args)

    def attend(self, call):
        out = self._try(super().attend, call)
        return out * 1.1 if self.mode == "wrong" else out

    def encode(self, quantizer, x, first):
        factor = 1.1 if self.mode == "wrong" else 1
        return self._try(super().encode, quantizer, x * factor, first)


def test_right_kernels_pass_and_wrong_ones_fail():
    for mode, passed in (("right", True), ("wrong", False), ("broken", False)):
        checks = list(diagnosis.check_kernels(Fake(mode), tokens=200))
        assert len(checks) == 3 * len(diagnosis.CASES)
        assert all(check.passed is passed for check in checks)
    assert "undeclared" in checks[0].failure
