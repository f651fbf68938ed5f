"""Metal texts as C++14 with distinct address spaces; slips that clang refuses."""

import re

import pytest
from metaltext.compilers import require_clang
from metaltext.portable import errors_of, portable_text, refusals
from metaltext.specialisations import specialisations
from metaltext.texts import entry_text


@pytest.fixture(autouse=True, scope="module")
def _clang():
    require_clang()


@pytest.fixture(scope="module")
def made():
    return specialisations()


def test_every_specialisation_is_cpp14_in_four_address_spaces(made):
    found = refusals(made)
    assert not found, "\n\n".join(f"{f.kernel}:\n{f.messages}" for f in found)


#: Kernel, what its text says, what a slip would make of it, and what clang says then.
SLIPS = {
    "a threadgroup's pointer where a device's is declared": (
        "decode_split_kv",
        "threadgroup float* logits_of_means",
        "device float* logits_of_means",
        "no matching function",
    ),
    "a cast that forgets the address space": (
        "decode_split_kv",
        "(threadgroup uint*)round_words",
        "(uint*)round_words",
        "changes address space",
    ),
    "constants where device memory is read": (
        "encode_scalar",
        "const device float* table [[",
        "const constant float* table [[",
        "no matching function|changes address space",
    ),
    "an input that is written to": (
        "merge_states",
        "device float* partial_out, int split",
        "threadgroup float* partial_out, int split",
        "no matching function",
    ),
    "an array of a kernel's in device memory": (
        "rotate",
        "thread float* of_token = y",
        "device float* of_token = y",
        "address space|cannot initialize",
    ),
    "C++17": ("rotate", "if (!ROTATE)", "if constexpr (!ROTATE)", "C\\+\\+17"),
    "a double": ("merge_states", "1.0f / denominator", "1.0 / denominator", "double"),
    "a name that nobody has": (
        "page_means",
        "simd_shuffle",
        "simd_shuffled",
        "simd_sh",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_does_not_compile(slip, made):
    name, right, wrong, message = SLIPS[slip]
    header, entry = entry_text(next(one for one in made if one.kernel.name == name))
    assert not errors_of(portable_text(header, [entry]))
    assert right in header + entry
    changed = [text.replace(right, wrong, 1) for text in (header, entry)]
    found = errors_of(portable_text(changed[0], changed[1:]))
    assert re.search(f"error: .*({message})", found), found


def test_a_refusal_names_its_kernel_and_line(made, monkeypatch):
    one = next(one for one in made if one.kernel.name == "merge_states")
    header = one.kernel.header("metal").replace("simd_max(top)", "simd_most(top)")
    monkeypatch.setattr(type(one.kernel), "header", lambda self, dialect: header)
    (found,) = refusals([one])
    assert found.kernel == "merge_states"
    line = header.splitlines().index("top = simd_most(top);") + 1
    assert f"tq.header:{line}:7: error: use of undeclared" in found.messages
