"""The shape of the package: public names, import order, what a wheel carries."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
from helpers import ROOT

import mlx_turboquant as tq

PACKAGE = ROOT / "mlx_turboquant"

#: Imports go one way: a module may import only from rows above its own.
LAYERS = (
    ("errors", "blas", "version", "tokens", "packing", "bitstream"),
    ("codecs.registry", "rotation", "codebook"),
    ("spec_text", "polynomial"),
    ("spec",),
    ("codecs", "transform"),
    ("segments",),
    ("kernels",),
    ("backends",),
    ("attention",),
    ("cache",),
    ("explanation", "diagnosis", "memory"),
    ("integrations",),
    ("evals",),
    ("cli",),
)


def imports(path):
    """Modules of this package, by a name in `LAYERS`, that a file imports."""
    for name in modules(path):
        yield name if name == "codecs.registry" else name.split(".")[0]


def modules(path):
    """Dotted names below this package that a file imports, not just for types."""
    depth = len(path.relative_to(PACKAGE).parts)
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level == depth:
            yield from [node.module] if node.module else [a.name for a in node.names]
        elif node.module and node.module.startswith("mlx_turboquant."):
            yield node.module.removeprefix("mlx_turboquant.")


def test_imports_go_one_way():
    rank = {name: row for row, names in enumerate(LAYERS) for name in names}
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0].startswith("__"):
            continue
        home = parts[0] if parts != ("codecs", "registry") else "codecs.registry"
        for name in imports(path):
            if name in rank and name != home:
                assert rank[name] < rank[home], f"{path} imports {name}"
                seen += 1
    assert seen > 40


def test_only_integrations_know_mlx_lms_internals():
    knowing = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if "mlx_lm.models" in path.read_text()
    }
    assert knowing == {"integrations"}


def test_files_are_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 330, path


def test_public_names():
    assert tq.__all__ == [
        "BatchTurboQuantCache",
        "CacheSpec",
        "CodecInfo",
        "CodecSpec",
        "EvalPlan",
        "RotatingTurboQuantCache",
        "TokenArrays",
        "TurboQuantCache",
        "apply",
        "attend",
        "codec_for",
        "evaluate",
        "explain",
        "footprint",
        "load",
        "load_prompt_cache",
        "make_prompt_cache",
        "register_codec",
        "save_prompt_cache",
        "uninstall",
        "errors",
    ]
    for name in tq.__all__:
        assert getattr(tq, name).__doc__
        assert name in dir(tq)


def test_importing_is_light():
    code = "import sys, mlx_turboquant; print('mlx.core' in sys.modules)"
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, text=True) == "False\n"


def test_reprs_are_one_line():
    cache = tq.TurboQuantCache("k4v3")
    codec = tq.codec_for(tq.CodecSpec("turboquant", 3), 64, "keys")
    things = [
        cache,
        tq.explain([cache]),
        tq.CacheSpec.parse(3),
        codec.codebook,
        codec.rotation,
        codec.encode(mx.ones((1, 1, 2, 64))),
        tq.BatchTurboQuantCache([cache]),
    ]
    for thing in things:
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 250


def test_explain_on_paper():
    cache = tq.TurboQuantCache("3")
    kv = mx.random.normal((1, 2, 500, 64))
    tq.attend(kv, *cache.update_and_fetch(kv, kv), 0.1)
    lines = str(tq.explain([cache])).splitlines()
    assert "sink+packed+recent" in lines[0]
    assert "k3v3" in lines[1]
    assert "4+384+112" in lines[1]
    assert lines[-1].endswith("k3v3 in 1 of 1 layers")


def test_wheel_carries_everything(tmp_path):
    """Built, installed elsewhere, and used from there."""
    run = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*run, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 1_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert "mlx_turboquant/py.typed" in names
    assert "mlx_turboquant/data/lloyd_max.json" in names
    sources = [p.relative_to(ROOT / "metal") for p in (ROOT / "metal").rglob("*.*")]
    assert len(sources) >= 8
    assert {f"mlx_turboquant/_metal/{s.as_posix()}" for s in sources} <= set(names)
    assert not any(name.startswith(("tests", "examples")) for name in names)
    site = tmp_path / "site"
    subprocess.run([*run, "install", "--no-deps", "--target", site, wheel], check=True)
    code = (
        "import mlx_turboquant as tq; print(tq.__file__); "
        "spec = tq.CodecSpec('research.turboquant-plain', 3); "
        "codec = tq.codec_for(spec, 64, 'keys'); "
        "print(codec.codebook.mse); "
        "from mlx_turboquant.kernels import source; print(source.metal_folder()); "
        "from mlx_turboquant.backends import gpu, gpu_codes; "
        "print(*[len(source.header(k.file, d)) for d in ('metal', 'cuda')"
        " for k in (gpu.ATTEND_BLOCK, gpu.MERGE_ROW,"
        " gpu_codes.ENCODE_TOKENS, gpu_codes.DECODE_TOKENS)])"
    )
    out = subprocess.check_output(
        [sys.executable, "-c", code], text=True, cwd=site, env={"PYTHONPATH": str(site)}
    )
    path, mse, folder, *lengths = out.split()
    assert Path(path).is_relative_to(site)
    assert Path(folder).is_relative_to(site)
    assert len(lengths) == 8
    assert all(int(length) > 3000 for length in lengths)
    assert 0.033 < float(mse) < 0.034
