"""Kernels as text: entries, headers and structs are what Python says of them."""

import itertools
import re
from typing import NamedTuple

import mlx.core as mx
import pytest

from mlx_turboquant.kernels import attention, codes, probe, source
from mlx_turboquant.kernels.arguments import pack, pack_steps, struct_text
from mlx_turboquant.kernels.kernel import Kernel, Launch, MlxLauncher

KERNELS = {
    kernel.name: kernel
    for module in (attention, codes, probe)
    for kernel in vars(module).values()
    if isinstance(kernel, Kernel)
}
ARGUMENTS = {kernel.arguments.__name__: kernel.arguments for kernel in KERNELS.values()}


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_struct_loader_and_array_have_the_fields_in_one_order(name):
    cls = ARGUMENTS[name]
    text = struct_text(cls)
    body = re.search(rf"struct {name} \{{\n(.*?)\}};", text, re.DOTALL)[1]
    assert re.findall(r"int (\w+);", body) == list(cls._fields)
    read = dict(re.findall(r"args\.(\w+) = arguments\[(\d+)\];", text))
    assert list(read) == list(cls._fields)
    values = {field: 100 + i for i, field in enumerate(reversed(cls._fields))}
    array = pack(cls(**values))
    assert array.dtype == mx.int32
    assert array.size >= 8
    assert {field: array[int(at)].item() for field, at in read.items()} == values


def test_equal_arguments_share_one_array():
    class Two(NamedTuple):
        rows: int
        columns: int

    assert pack(Two(1, 2)) is pack(Two(1, 2))
    assert pack(Two(1, 2)) is not pack(Two(2, 1))


def test_an_entry_names_each_input_and_output(kernel):
    body = kernel.body("metal")
    for name in (*kernel.inputs, *kernel.outputs):
        assert re.search(rf"\b{name}\b", body), name
    strided = set(re.findall(r"\b(\w+)_strides\b", body))
    assert strided <= set(kernel.inputs)


def test_a_header_has_no_entry_and_asks_for_no_strides(kernel):
    """MLX would not pass them: it looks for their names in the body."""
    header = kernel.header("metal")
    assert "TQ_ENTRY" not in header
    assert "#include" not in header
    assert "_strides" not in header
    for text in (header, kernel.body("metal")):
        assert text.count("{") == text.count("}")
        assert "//" not in text


def test_cuda_text_has_no_words_of_metal(kernel):
    text = kernel.header("cuda") + kernel.body("cuda")
    metal = re.compile(r"\b(device|constant|threadgroup|thread) \w|simdgroup_matrix")
    assert not metal.search(text)
    assert ("threadgroup " in kernel.body("metal")) == ("__shared__" in text)


#: What a source defines: functions, structs, constants.
DEFINITION = re.compile(r"(?:TQ_FUNC \w+|struct|constexpr \w+) (\w+)[\s({<=\[;]")


@pytest.mark.parametrize("dialect", ["metal", "cuda"])
def test_a_header_holds_no_file_that_its_kernel_does_not_use(kernel, dialect):
    folder = source.metal_folder()
    paths = [*folder.glob("*.h"), *folder.glob(f"compat/{dialect}/*.h")]
    header = kernel.header(dialect)
    included = {}
    for path in paths:
        text = re.sub(r"//.*", "", path.read_text())
        names = DEFINITION.findall(text)
        if names and all(name in header for name in names):
            included[path] = text
    own = (folder / kernel.file).read_text()
    for path, text in included.items():
        others = own + "".join(included[p] for p in included if p != path)
        used = set(re.findall(r"\w+", others)) & set(DEFINITION.findall(text))
        assert used, path


def test_every_file_belongs_to_a_kernel():
    folder = source.metal_folder()
    texts = [kernel.header("metal") for kernel in KERNELS.values()]
    for path in [*folder.glob("*.h"), *folder.glob("compat/metal/*.h")]:
        names = DEFINITION.findall(re.sub(r"//.*", "", path.read_text()))
        assert any(all(name in text for name in names) for text in texts), path
    entries = {
        (path.name, name)
        for path in folder.glob("*.metal")
        for name in re.findall(r"^TQ_ENTRY\((\w+)\)", path.read_text(), re.MULTILINE)
    }
    assert entries == {(kernel.file, kernel.name) for kernel in KERNELS.values()}


@pytest.mark.parametrize("multiply_adds", [False, True])
@pytest.mark.parametrize("kinds", list(itertools.product(range(4), repeat=2)))
def test_a_split_kernel_has_its_formats_and_products_only(kinds, multiply_adds):
    kernel = attention.split_kv_kernel(*kinds, multiply_adds)
    assert kernel is attention.split_kv_kernel(*kinds, multiply_adds)
    header = kernel.header("metal")
    made = re.findall(r"struct QueryRows<(\w+),", header)
    assert made == ["true" if multiply_adds else "false"]
    names = ("POLYNOMIAL", "PAIRS", "TRELLIS", "ANGLES")
    defined = set(re.findall(r"struct Format<(\w+),", header))
    assert {names[kind] for kind in kinds} <= defined
    assert ("LevelPolynomial" in header) == (0 in kinds)
    assert ("PairCodes" in header) == bool({1, 2, 3} & set(kinds))
    assert len(header) < len(attention.DECODE_SPLIT_KV.header("metal"))


def test_a_kernel_is_built_once_and_equal_to_itself_only(kernel, monkeypatch):
    built, launched = [], []

    def metal_kernel(**options):
        built.append(options)
        return lambda **call: launched.append(call) or ["outputs"]

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    launcher = MlxLauncher("metal")
    shape, template = (32, 1, 1), [("T", mx.float16)]
    launch = Launch(kernel, template, shape, shape, [(4,)], [mx.float16])
    inputs = [mx.zeros(8)]
    assert [launcher(launch, inputs) for _ in range(3)] == [["outputs"]] * 3
    assert len(built) == 1
    assert built[0]["input_names"] == list(kernel.inputs)
    assert built[0]["source"] == kernel.body("metal")
    assert launched[2]["inputs"] is inputs
    assert launched[2]["template"] is template
    twin = Kernel(
        kernel.name, kernel.file, kernel.inputs, kernel.outputs, kernel.arguments
    )
    assert twin != kernel
    launcher(launch._replace(kernel=twin), inputs)
    assert len(built) == 2


def test_rows_of_arguments_are_each_packed():
    class Two(NamedTuple):
        rows: int
        columns: int

    rows, growth = [Two(1, 2), Two(3, 4)], Two(0, 5)
    for step, array in enumerate(pack_steps(rows, growth, 3, 4), 3):
        want = pack(Two(1, 2 + 5 * step), Two(3, 4 + 5 * step))
        assert mx.array_equal(array, want).item()
