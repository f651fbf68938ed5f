"""Kernels out of MLX's own Metal headers, any with a normal signature.

Owns reading a kernel's signature and binding buffers to it by name. The headers are
those of the installed wheel.
"""

import ctypes
import re
from pathlib import Path

import numpy as np

from . import build, core
from .rewrite import rewrite

_SHIM = """__global char msim_dyn[8]; __global uint msim_dyn_size[8];
extern "C" __attribute__((visibility("default"))) void msim_entry(__generic ulong* b) {
  const msim_thread* s = __msim_self(); (void)s;
"""


def split_arguments(text):
    """Split at commas that are in no bracket."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "(<[{") - (letter in ")>]}")
        if letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in [*parts, text[start:]] if part.strip()]


def parse_kernel(text, function):
    """Template parameters (kind, name, default) and (type, name, attribute or None)."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    head = r"(?:\]\]\s*void|\bkernel\s+void)\s+"
    match = re.search(head + function + r"\s*\(", text)
    if not match:
        raise build.MetalSimError(f"kernel {function} not found")
    end, depth = match.end(), 1
    while depth:
        depth += (text[end] == "(") - (text[end] == ")")
        end += 1
    parameters = []
    for parameter in split_arguments(text[match.end() : end - 1]):
        attributes = re.findall(r"\[\[(.*?)\]\]", parameter, re.DOTALL)
        plain = re.sub(r"\[\[.*?\]\]", "", parameter, flags=re.DOTALL).strip()
        kind, name = re.match(r"(.*?)(\w+)\s*$", plain, re.DOTALL).groups()
        attribute = attributes[0].strip() if attributes else None
        parameters.append((" ".join(kind.split()), name, attribute))
    return _template_of(text[: match.start()]), parameters


def _template_of(before):
    """The parameters of the template head that ends right before a kernel."""
    head = before[before.rfind("template") + len("template") :].strip()
    if "template" not in before or not head.startswith("<"):
        return []
    end, depth = 1, 1
    while depth:
        depth += (head[end] == "<") - (head[end] == ">")
        end += 1
    end -= 1
    if re.search(r"[;}]", head[end + 1 :]):
        return []
    found = []
    for parameter in split_arguments(head[1:end]):
        declared, _, default = parameter.partition("=")
        *kind, name = declared.split()
        found.append((" ".join(kind), name, default.strip() or None))
    return found


class MLXKernel:
    """One kernel with its template arguments chosen.

    headers are below ``mlx/backend/metal/kernels``; the last one holds the kernel.
    """

    def __init__(self, headers, function, arguments=(), prelude=""):
        root = build.mlx_include_root()
        self.includes = [build.rewritten_includes()]
        folder = Path(root) / "mlx" / "backend" / "metal" / "kernels"
        text = (folder / headers[-1]).read_text()
        template, parameters = parse_kernel(text, function)
        self.function, self.buffers = function, []
        given = [str(argument) for argument in arguments]
        given += [default for _, _, default in template[len(given) :]]
        body = []
        for (kind, name, _), value in zip(template, given, strict=True):
            if kind in ("typename", "class"):
                body.append(f"using {name} = {value};")
            else:
                body.append(f"constexpr {kind} {name} = {value}; (void){name};")
        call = [self._argument(*parameter) for parameter in parameters]
        full = f"{function}<{', '.join(given)}>" if template else function
        below = '#include "mlx/backend/metal/kernels/'
        self.text = '#include "msim.h"\n#define MLX_METAL_JIT 1\n'
        self.text += f'{below}utils.h"\n{rewrite(prelude)}\n'
        self.text += "".join(f'{below}{header}"\n' for header in headers)
        self.text += f"{_SHIM}  {' '.join(body)}\n  {full}({', '.join(call)});\n}}\n"

    def _argument(self, kind, name, attribute):
        base = re.match(r"\w+", attribute).group() if attribute else "buffer"
        if base == "buffer":
            at = f"b[{len(self.buffers)}]"
            self.buffers.append(name)
            return f"*({kind[:-1]}*){at}" if kind.endswith("&") else f"({kind}){at}"
        value = core.ATTR_EXPR[base]
        plain = re.sub(r"\bconst\b", "", kind).strip()
        if "uint3" not in value:
            return f"({plain})({value})"
        if plain in ("uint", "ushort", "short", "int"):
            return f"({plain})({value}).x"
        place = f"({value}).xy" if plain in ("uint2", "ushort2") else value
        return f"metal::__mk<{plain}>({place})"

    def __call__(self, arguments, groups, threads, outputs, constants=()):
        """Run ``groups`` threadgroups of ``threads``.

        arguments: name to a numpy array; outputs are written in place. constants:
        function constants, name to a bool or int.
        """
        debug = core.config.debug
        shared = build.compile_tu(self.text, debug, self.includes, name=self.function)
        library = core.load(shared)[0]
        for name, value in dict(constants).items():
            kind = ctypes.c_bool if isinstance(value, bool) else ctypes.c_int
            kind.in_dll(library, name).value = value
        buffers = [
            core.Buffer(name, arguments.get(name, np.zeros(256, np.uint8)), out, False)
            for name in self.buffers
            for out in [name in outputs]
        ]
        grid = tuple(g * t for g, t in zip(groups, threads, strict=True))
        core.launch(
            shared,
            "msim_entry",
            buffers,
            grid,
            threads,
            debug=debug,
            name=self.function,
        )
