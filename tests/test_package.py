"""The shape of the package: public names, import order."""

import ast
import subprocess
import sys

import mlx.core as mx
from helpers import ROOT, attend

import mlx_turboquant as tq
from mlx_turboquant.codebook import lloyd_max
from mlx_turboquant.rotation import rotation_for

PACKAGE = ROOT / "mlx_turboquant"

#: Imports go one way: a module may import only from rows above its own.
LAYERS = (
    (
        "version",
        "errors",
        "atomic",
        "regular",
        "blas",
        "namesake",
        "tokens",
        "packing",
        "bitstream",
        "gains",
        "pacing",
    ),
    ("codecs.registry", "extras"),
    ("spec_text",),
    ("spec", "rotation", "codebook"),
    ("polynomial",),
    ("codecs", "transform"),
    ("tiles",),
    ("pages",),
    ("packed_codes", "pool_shelf"),
    ("page_table",),
    ("quantizer",),
    ("segments",),
    ("batch_handles",),
    ("kernels",),
    ("proof",),
    ("backends",),
    ("attention", "proof.judge", "proof.facts", "proof.checks"),
    ("proof.variants", "proof.workload"),
    ("proof.child",),
    ("cache",),
    ("entries",),
    ("explanation", "diagnosis", "bug_report", "memory", "conversations"),
    ("integrations",),
    ("evals", "serving"),
    ("cli",),
)


RANK = {name: row for row, names in enumerate(LAYERS) for name in names}


def home_of(module):
    """Which name of `LAYERS` a dotted module belongs to."""
    return module if module in RANK else module.split(".")[0]


def imports(path):
    """Names of `LAYERS` that a file imports when it runs, not for types only."""
    depth = len(path.relative_to(PACKAGE).parts)
    tree = ast.parse(path.read_text())
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in for_types:
            continue
        if node.level == depth:
            names = [node.module] if node.module else [a.name for a in node.names]
            yield from map(home_of, names)
        elif node.module and node.module.startswith("mlx_turboquant."):
            yield home_of(node.module.removeprefix("mlx_turboquant."))


def test_imports_go_one_way():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        home = home_of(module)
        if home.startswith("__"):
            continue
        for name in imports(path):
            if name in RANK and name != home:
                assert RANK[name] < RANK[home], f"{path} imports {name}"
                seen += 1
    assert seen > 40


def test_only_integrations_know_mlx_lms_internals():
    knowing = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if "mlx_lm.models" in path.read_text()
    }
    assert knowing == {"integrations"}


def test_one_file_knows_mlx_vlms_internals():
    """The rest uses what ``import mlx_vlm`` shows, and only where images are."""
    texts = {p.relative_to(PACKAGE): p.read_text() for p in PACKAGE.rglob("*.py")}
    inside = {str(path) for path, text in texts.items() if "mlx_vlm.models" in text}
    assert inside == {"integrations/vision.py"}
    users = {str(path) for path, text in texts.items() if "from mlx_vlm" in text}
    assert users == {"integrations/vision_loop.py"}


def test_files_are_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 330, path


def test_every_file_is_listed():
    """And every row of the import order, where newcomers look for them."""
    page = (ROOT / "docs" / "contributing.md").read_text()
    order, files = page.partition("## Import order")[2].split("## Files")
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "metal").glob("*.*")]:
        name = path.stem if path.parent.name == "research" else path.name
        assert path.name == "__init__.py" or name in files, path
    for names in LAYERS:
        for name in names:
            assert name.removeprefix("proof.") in order, name


def test_public_names():
    assert tq.__all__ == [
        "BatchTurboQuantCache",
        "CacheSpec",
        "CodecInfo",
        "CodecSpec",
        "Conversation",
        "DiskFolder",
        "EvalPlan",
        "PromptStore",
        "Quantizer",
        "RotatingTurboQuantCache",
        "ScoredTurboQuantCache",
        "TokenArrays",
        "TurboQuantCache",
        "apply",
        "attend",
        "codec_for",
        "compiled",
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
        lloyd_max(64, 3),
        rotation_for(64, 0),
        codec.encode(mx.ones((1, 1, 2, 64))),
        tq.BatchTurboQuantCache([cache]),
    ]
    for thing in things:
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 250


def test_explain_on_paper():
    cache = tq.TurboQuantCache("3")
    kv = mx.random.normal((1, 2, 500, 64))
    attend(kv, *cache.update_and_fetch(kv, kv), 0.1)
    lines = str(tq.explain([cache])).splitlines()
    assert "sink+packed+recent" in lines[0]
    assert "k3v3" in lines[1]
    assert "4+448+48" in lines[1]
    assert lines[-1].endswith("k3v3 in 1 of 1 layers")
