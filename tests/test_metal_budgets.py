"""What attention costs on a GPU, counted from LLVM, against the committed table."""

import re
from collections import Counter
from pathlib import Path

import pytest
from metaltext import budgets
from metaltext.compilers import require_clang
from metaltext.control_flow import blocks_of, loops_of
from metaltext.counts import class_of, count, llvm_of
from metaltext.specialisations import specialisations
from metaltext.texts import entry_text

TABLE = budgets.table()
#: A change that is worth what it costs writes the table anew.
ADVICE = "If it is worth that: PYTHONPATH=tests python -m metaltext.budgets"


@pytest.fixture(autouse=True, scope="module")
def _clang():
    require_clang(budgets.CLANG)


@pytest.fixture(scope="module")
def attention():
    return budgets.attention()


def test_the_table_has_every_specialisation_of_attention(attention):
    assert sorted(TABLE) == sorted(attention)
    assert sum(map(budgets.is_everyday, TABLE)) == 12


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if budgets.is_everyday(n) else pytest.mark.slow)
        for n in TABLE
    ],
)
def test_attention_stays_within_its_budget(name, attention):
    row = budgets.row_of(count(attention[name]))
    over = budgets.exceeded(row, TABLE[name])
    assert not over, f"{name}: {', '.join(over)}. {ADVICE}"


def test_attention_of_128_fits_the_registers_of_apples_gpus():
    """Others saw a kernel that spilled take 3.4 times as long (mlx#3837)."""
    usual = {n: r for n, r in TABLE.items() if " 128x128 " in n and n[:6] == "scalar"}
    assert len(usual) > 20
    assert {name for name, row in usual.items() if row["spilled"]} == set()
    assert TABLE["scalar3.2/scalar3.2 128x128 4 rows"]["registers"] <= 128


def test_products_are_counted_as_the_model_has_them():
    """What benchmarks/model_apple.py counts by hand of 256 elements a lane."""
    matrices = TABLE["scalar3.2/scalar3.2 128x128 matrices of 8 rows"]
    rows = TABLE["scalar3.2/scalar3.2 128x128 4 rows"]
    # A product of 8 x 8 x 8 takes 2 elements of each of 32 lanes, for 8 rows.
    assert matrices["matrix products"] == 256 / 2
    # Centre, square and multiply, add: of 128 couples.
    assert matrices["half pairs"] == rows["half pairs"] == 3 * 128
    assert 4 * 256 <= rows["floats"] < 4.6 * 256
    assert matrices["an element"] == round(matrices["operations"] / 256, 2)


def test_the_page_shows_the_table():
    page = (Path(__file__).parents[1] / "docs/metal.md").read_text()
    shown = re.findall(
        r"^\| (\w+\.\d/.*?) \| ([\d.]+) \| (\d+) \| (\d+) \|$", page, re.M
    )
    assert len(shown) > 10
    for name, *numbers in shown:
        row = TABLE[name]
        wanted = [row[key] for key in ("an element", "registers", "spilled")]
        assert [float(number) for number in numbers] == wanted, name


ROW = {"registers": 100, "spilled": 0, "operations": 1000, "an element": 4.0}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"operations": 1010, "registers": 103}, []),
        ({"operations": 1011}, ["operations: 1011, was 1000"]),
        ({"registers": 104}, ["registers: 104, was 100"]),
        ({"spilled": 16}, ["spilled: 16, was 0"]),
        ({"integer divisions": 1}, ["integer divisions: 1, was 0"]),
        ({"operations": 10, "registers": 10}, []),
    ],
)
def test_what_exceeds_a_budget_is_said_with_both_numbers(changed, said):
    assert budgets.exceeded(ROW | changed, ROW) == said


CODE = """
define protected amdgpu_kernel void @f(ptr addrspace(1) %p) #0 {
  br label %7

7:                                  ; preds = %21, %0
  %8 = load i32, ptr addrspace(1) %p, align 4
  br label %12

12:                                 ; preds = %12, %7
  %13 = shl i32 %8, 3
  br i1 %c, label %12, label %21

21:                                 ; preds = %12
  br i1 %d, label %7, label %22

22:                                 ; preds = %21
  ret void
}
"""


def test_loops_are_found_with_those_inside_them():
    function = blocks_of(CODE)
    assert list(function)[1:] == ["7", "12", "21", "22"]
    assert sorted(map(sorted, loops_of(function))) == [["12"], ["12", "21", "7"]]
    assert function["12"].lines[0] == "%13 = shl i32 %8, 3"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("%1 = fmul <2 x half> %2, %3", "half pairs"),
        ("%1 = tail call <2 x half> @llvm.fma.v2f16(<2 x half> %2", "half pairs"),
        ("%1 = tail call float @llvm.fma.f32(float %2, float %3", "floats"),
        ("%1 = shl i32 %2, 3", "shifts"),
        ("%1 = lshr i32 %2, %3", "shifts by variables"),
        ("%1 = tail call i32 @llvm.fshr.i32(i32 %2, i32 %3, i32 5)", "shifts"),
        ("%1 = tail call i32 @llvm.fshr.i32(i32 %2, i32 %3, i32 %4)",
         "shifts by variables"),
        ("%1 = add nsw i64 %2, %3", "64-bit integers"),
        ("%1 = udiv i32 %2, %3", "integer divisions"),
        ("%1 = fdiv contract float %2, %3", "float divisions"),
        ("store i32 %1, ptr addrspace(3) %2, align 4", "threadgroup memory"),
        ("store <4 x float> %1, ptr addrspace(5) %2, align 4", "thread memory"),
        ('%1 = tail call i32 asm sideeffect "; SHUFFLE $0 $1", "=v,v"(i32 %2)',
         "shuffles"),
        ("%1 = fpext half %2 to float", None),
        ("br label %7", None),
    ],
)  # fmt: skip
def test_instructions_are_told_apart(line, kind):
    assert class_of(line) == kind


def kernels():
    """A specialisation of every kernel, but for variants of attention."""
    return {one.kernel.name: one for one in reversed(specialisations())}


@pytest.mark.parametrize("name", kernels())
def test_no_kernel_divides_integers_of_64_bits(name):
    """Apple's GPUs have no such instruction, and long ways around it."""
    code = llvm_of(*entry_text(kernels()[name]))
    divisions = re.findall(r" = ([us](?:div|rem)) (i\d+) ", code)
    assert Counter(bits for _, bits in divisions)["i64"] == 0
    assert len(code) > 2000
