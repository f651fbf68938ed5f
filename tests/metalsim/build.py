"""Compilers, caches, the runtime library."""

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import threading

from . import rewrite as _rw

HERE = os.path.dirname(os.path.abspath(__file__))
_lock = threading.RLock()


def _text(path):
    with open(path) as file:
        return file.read()


def _write(path, text):
    # Another process' clang may be reading the same source: it keeps the file it has.
    tmp = f"{path}.{os.getpid()}"
    with open(tmp, "w") as file:
        file.write(text)
    os.replace(tmp, path)


class MetalSimError(RuntimeError):
    pass


class CompileError(MetalSimError):
    """The source would not compile as Metal (or uses something the simulator lacks)."""


class LaunchError(MetalSimError):
    """Barrier divergence, out-of-bounds access, data race, ... while the kernel ran."""


class Config:
    """Knobs, set by tests; ``config`` is the one instance."""

    debug = False  # shadow memory: bounds, races, uninitialised reads
    check = True  # static checks on each new kernel
    sched = "forward"  # forward | reverse | random
    seed = 1
    os_threads = os.cpu_count() or 1
    fp_contract = "on"  # on | off | fast
    ftz = False  # flush float denormals
    fuzz_ulp = 0  # error added to fast:: functions
    stack_size = 256 * 1024
    max_tgmem = 32768
    max_threads = 1024
    march = "x86-64-v3"
    cache = os.path.join(os.path.expanduser("~"), ".cache", "metalsim")
    allow_exit_barrier = False
    allow_partial = True  # collectives among the threads still alive
    allow_inactive = False  # shuffles may read lanes that ended (undefined in Metal)
    races = True
    uninit = True  # debug: reading what nobody wrote is an error


config = Config()


def find_clang():
    """(path, major version) of the clang to compile with.

    Raises:
        MetalSimError: if there is none from 17 on.
    """
    versions = [19, 20, 18, 17, *range(30, 20, -1)]
    for name in [*(f"clang-{version}" for version in versions), "clang"]:
        path = shutil.which(name)
        if not path:
            continue
        out = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"version (\d+)", out)
        if match and int(match[1]) >= 17:
            return path, int(match[1])
    raise MetalSimError(
        "metalsim needs clang 17 or newer (C++ for OpenCL and __bf16 arithmetic); "
        "on Debian and Ubuntu: apt-get install clang-19"
    )


clang = functools.cache(find_clang)


def _sha(*parts):
    h = hashlib.sha256()
    for p in parts:
        h.update(p.encode() if isinstance(p, str) else p)
        h.update(b"\0")
    return h.hexdigest()[:24]


def _run(cmd, what):
    r = subprocess.run(cmd, capture_output=True, text=True)
    if r.returncode:
        raise CompileError(f"{what} failed:\n{r.stderr}")
    return r.stderr


@functools.cache
def shim_hash():
    """Of all that a compiled kernel depends on besides its own text."""
    parts = []
    for sub in ("include", "runtime"):
        for f in sorted(os.listdir(os.path.join(HERE, sub))):
            parts.append(_text(os.path.join(HERE, sub, f)))
    parts.append(_text(os.path.join(HERE, "rewrite.py")))
    parts.append(str(clang()))
    return _sha(*parts)


_rt = None


def runtime():
    """The fiber runtime, loaded with global symbols so that kernels bind to it."""
    global _rt
    with _lock:
        if _rt is None:
            src = [
                os.path.join(HERE, "runtime", f)
                for f in ("msim_rt.cpp", "msim_math.cpp")
            ]
            key = _sha(
                *[_text(s) for s in src],
                _text(os.path.join(HERE, "runtime", "msim_abi.h")),
            )
            so = os.path.join(config.cache, f"librt-{key}.so")
            if not os.path.exists(so):
                os.makedirs(config.cache, exist_ok=True)
                cxx = shutil.which("clang++-19") or shutil.which("g++") or clang()[0]
                tmp = f"{so}.{os.getpid()}"
                extra = ["-lstdc++"] if "clang" in cxx and "++" not in cxx else []
                _run(
                    [
                        cxx,
                        "-O2",
                        "-g",
                        "-std=c++17",
                        "-fPIC",
                        "-shared",
                        "-pthread",
                        "-ftls-model=initial-exec",
                        "-fno-plt",
                        "-o",
                        tmp,
                        *src,
                        "-lm",
                        *extra,
                    ],
                    "building the runtime",
                )
                os.replace(tmp, so)
            _rt = ctypes.CDLL(so, mode=ctypes.RTLD_GLOBAL)
            _rt.path = so
        return _rt


def mlx_include_root():
    """The include folder of the installed mlx, which has its Metal kernels' headers."""
    for base in importlib.util.find_spec("mlx").submodule_search_locations:
        root = os.path.join(base, "include")
        if os.path.exists(os.path.join(root, "mlx/backend/metal/kernels/utils.h")):
            return root
    raise MetalSimError("the installed mlx has no Metal headers in its include folder")


@functools.cache
def rewritten_includes():
    """MLX's kernel headers after the source rewriter, in the cache."""
    root = mlx_include_root()
    base = os.path.join(root, "mlx", "backend", "metal", "kernels")
    files = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(base)
        for name in names
        if name.endswith((".h", ".metal"))
    )
    parts = [_text(os.path.join(HERE, "rewrite.py"))]
    for path in files:
        parts += [path, _text(path)]
    target = os.path.join(config.cache, "mlx-" + _sha(*parts))
    if not os.path.exists(target):
        tmp = f"{target}.{os.getpid()}"
        for path in files:
            copy = os.path.join(tmp, os.path.relpath(path, root))
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            _write(copy, _rw.rewrite(_text(path), lenient=True))
        try:
            os.rename(tmp, target)
        except OSError:
            shutil.rmtree(tmp, ignore_errors=True)
    return target


EXTS = "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space,+__opencl_c_program_scope_global_variables,+__cl_clang_function_pointers"


def base_flags():
    return [
        "-x",
        "clcpp",
        "-cl-std=clc++2021",
        "-cl-no-stdinc",
        f"-march={config.march}",
        "-fPIC",
        "-cl-single-precision-constant",
        "-Xclang",
        "-fbfloat16-excess-precision=none",
        "-Xclang",
        "-ffloat16-excess-precision=none",
        "-fno-strict-aliasing",
        "-fno-math-errno",
        "-Xclang",
        EXTS,
        "-Wno-unknown-attributes",
        "-Wno-static-float-init",
        "-Wno-unknown-pragmas",
        "-Wno-unused-command-line-argument",
        "-Wno-pass-failed",
        "-Wno-duplicate-decl-specifier",
        "-Wno-address-of-temporary",
        "-I",
        os.path.join(HERE, "include"),
    ]


def mode_flags(debug):
    f = [f"-ffp-contract={config.fp_contract}"]
    if config.fuzz_ulp:
        f.append(f"-DMSIM_FUZZ={config.fuzz_ulp}")
    if debug:
        f += [
            "-O1",
            "-gline-tables-only",  # for the place of a fault
            "-fsanitize=thread,array-bounds,integer-divide-by-zero,alignment",
            "-fsanitize-trap=array-bounds,integer-divide-by-zero,alignment",
            *(
                ["-fno-sanitize-merge"]
                if clang()[1] >= 20
                else ["-mllvm", "-ubsan-unique-traps"]
            ),
            "-mllvm",
            "-tsan-instrument-func-entry-exit=0",
            "-mllvm",
            "-tsan-instrument-read-before-write=1",
            "-ftrivial-auto-var-init=pattern",
        ]
    else:
        f += ["-O1"]  # compiles in two thirds of the time that -O2 takes
    return f


PRELUDE = '#include "msim.h"\n#define MLX_METAL_JIT 1\n#include "mlx/backend/metal/kernels/utils.h"\n'


def prelude_pch(debug=False):
    """metal_stdlib and MLX's utils.h, parsed once."""
    cc, _ = clang()
    inc = rewritten_includes()
    flags = base_flags() + mode_flags(debug) + ["-I", inc]
    key = _sha(PRELUDE, " ".join(flags), shim_hash())
    pch = os.path.join(config.cache, f"prelude-{key}.pch")
    with _lock:
        if not os.path.exists(pch):
            os.makedirs(config.cache, exist_ok=True)
            src = os.path.join(config.cache, f"prelude-{key}.h")
            _write(src, PRELUDE)
            tmp = f"{pch}.{os.getpid()}"
            _run(
                [
                    cc,
                    *flags,
                    "-fsyntax-only",
                    "-Xclang",
                    "-emit-pch",
                    "-Xclang",
                    "-fno-pch-timestamp",  # the key is of contents, clones differ
                    "-Xclang",
                    "-o",
                    "-Xclang",
                    tmp,
                    src,
                ],
                "precompiling the prelude",
            )
            os.replace(tmp, pch)
    return pch, [*flags, "-include-pch", pch]


def compile_tu(text, debug=False, includes=(), pch=False, name="kernel"):
    """TU text (already C++ for OpenCL) -> path of a shared object."""
    cc, _ = clang()
    runtime()
    flags = prelude_pch(debug)[1] if pch else base_flags() + mode_flags(debug)
    for i in includes:
        flags += ["-I", i]
    key = _sha(text, " ".join(flags), shim_hash())
    so = os.path.join(config.cache, f"k-{key}.so")
    with _lock:
        if not os.path.exists(so):
            os.makedirs(config.cache, exist_ok=True)
            src = os.path.join(config.cache, f"k-{key}.cl")
            _write(src, text)
            tmp = f"{so}.{os.getpid()}"
            r = subprocess.run(
                [cc, *flags, "-shared", "-nostdlib", "-o", tmp, src],
                capture_output=True,
                text=True,
            )
            if r.returncode:
                raise CompileError(f"{name} does not compile:\n{clean(r.stderr)}")
            os.replace(tmp, so)
    return so


def clean(err):
    """Compiler messages in Metal's words."""
    for a, b in (
        ("__global ", "device "),
        ("__local ", "threadgroup "),
        ("__private ", "thread "),
        ("__constant ", "constant "),
        ("'__global'", "'device'"),
        ("'__local'", "'threadgroup'"),
        ("'__private'", "'thread'"),
        ("'__constant'", "'constant'"),
        ("__bf16", "bfloat"),
        ("metal::__mk<", "<"),
    ):
        err = err.replace(a, b)
    return err
