"""Static checks: what Apple's compiler (or the GPU) refuses and upstream clang accepts.

The type system proper (address spaces, const, vector conversions, no double, no
exceptions, ...) is checked by compiling as C++ for OpenCL.  Here: the rest, on
clang's AST and on the tokens."""

import functools
import re
import subprocess

from . import build
from .rewrite import tokenize

# tokens no Metal source may contain -> why
FORBIDDEN = {
    "double": "Metal has no double",
    "goto": "MSL has no goto",
    "try": "MSL has no exceptions",
    "catch": "MSL has no exceptions",
    "throw": "MSL has no exceptions",
    "virtual": "MSL has no virtual functions",
    "dynamic_cast": "MSL has no RTTI",
    "typeid": "MSL has no RTTI",
    "new": "MSL has no new",
    "delete": None,
    "thread_local": "MSL has no thread_local",
    "asm": "no inline assembly",
    "std": "MSL has no C++ standard library (std::)",
    "printf": "no printf",
    "register": "MSL has no register",
    "__shared__": "CUDA word",
    "__global__": "CUDA word",
    "__device__": "CUDA word",
    "__syncthreads": "CUDA word",
    "__local": "OpenCL word",
    "__global": "OpenCL word",
    "__private": "OpenCL word",
    "__generic": "OpenCL word",
    "__constant": "OpenCL word",
    "get_global_id": "OpenCL word",
    "barrier": "OpenCL word",
    "size_of": None,
    "wchar_t": "no wchar_t",
    "char16_t": "no char16_t",
    "co_await": "no coroutines",
    "co_yield": "no coroutines",
    "co_return": "no coroutines",
    "requires": "MSL is C++17 at most (no concepts)",
    "concept": "MSL is C++17 at most (no concepts)",
    "consteval": "MSL is C++17 at most",
    "constinit": "MSL is C++17 at most",
}
METAL_HEADERS = {
    "metal_stdlib",
    "metal_math",
    "metal_simdgroup",
    "metal_simdgroup_matrix",
    "metal_atomic",
    "metal_common",
    "metal_compute",
    "metal_integer",
    "metal_logging",
    "metal_type_traits",
    "metal_geometric",
    "metal_matrix",
    "metal_pack",
    "metal_quadgroup",
    "metal_relational",
    "metal_limits",
    "metal_array",
    "metal_types",
    "metal_numeric",
    "metal_texture",
    "metal_tensor",
    "simd/simd.h",
}
WORDS_64 = {
    "atomic_fetch_add_explicit",
    "atomic_fetch_sub_explicit",
    "atomic_fetch_or_explicit",
    "atomic_fetch_and_explicit",
    "atomic_exchange_explicit",
    "atomic_compare_exchange_weak_explicit",
}


@functools.cache
def lint_tokens(text, label):
    """Errors and warnings of a header or a source; one header serves many kernels."""
    err, warn = [], []
    toks = [t for t in tokenize(text) if t.k not in ("ws", "nl")]
    for i, t in enumerate(toks):
        if t.k == "comment":
            continue
        if t.k == "id":
            why = FORBIDDEN.get(t.s)
            if why:
                err.append(f"{label}:{t.line}: '{t.s}': {why}")
            if (
                t.s == "long"
                and i + 1 < len(toks)
                and toks[i + 1].s in ("long", "double")
            ):
                err.append(
                    f"{label}:{t.line}: 'long {toks[i + 1].s}' does not exist in MSL"
                )
            if t.s.startswith("__msim") or t.s.startswith("msim_"):
                err.append(f"{label}:{t.line}: '{t.s}' is the simulator's")
        elif t.k == "num":
            if re.fullmatch(r"\d*\.?\d+(?:[eE][+-]?\d+)?[lL]", t.s) and "." in t.s:
                err.append(f"{label}:{t.line}: long double literal {t.s}")
            if re.search(r"(?i)ll", t.s) and not t.s.lower().startswith("0x"):
                err.append(f"{label}:{t.line}: long long literal {t.s}")
        elif t.s == "#" and i + 1 < len(toks) and toks[i + 1].s == "include":
            line = text.split("\n")[t.line - 1]
            m = re.search(r'#\s*include\s*[<"]([^>"]+)[>"]', line)
            if m and m.group(1) not in METAL_HEADERS:
                err.append(
                    f"{label}:{t.line}: #include {m.group(1)}: a run-time compiled kernel can include Metal's own headers only"
                )
    if "/*" in text and "\\\n//" in text:
        warn.append(f"{label}: line continuation before a comment")
    try:
        text.encode("ascii")
    except UnicodeEncodeError as e:
        line = text[: e.start].count("\n") + 1
        warn.append(
            f"{label}:{line}: non-ASCII character {text[e.start]!r}: MLX hands the source to Metal as an ASCII string"
        )
    return err, warn


LOC = re.compile(
    r"(?:((?:<built-in>|[\w./@+-]*[\w@+-]\.(?:source|header|signature|entry|h|cl|inc|metal)|[\w./+-]*metal_\w+)):(\d+):(\d+))|\bline:(\d+):(\d+)|\bcol:(\d+)"
)
NODE = re.compile(r"^([ |`-]*)(\w+)(?: 0x([0-9a-f]+))?(.*)$")


class Node:
    __slots__ = (
        "addr",
        "col",
        "depth",
        "file",
        "kids",
        "kind",
        "line",
        "parent",
        "text",
    )

    def __repr__(self):
        return f"{self.kind}@{self.line}:{self.col} {self.text[:60]}"


def parse_ast(out):
    nodes, stack = [], []
    f, line, c = "", 0, 0
    for raw in out.split("\n"):
        m = NODE.match(raw)
        if not m:
            continue
        n = Node()
        n.depth = len(m.group(1)) // 2
        n.kind, n.addr, rest = m.group(2), m.group(3), m.group(4)
        n.text = rest
        # the range in <...> first, then the name's place
        first = True
        rm = re.match(
            r"(?: prev 0x\w+)?(?: parent 0x\w+)? <(.*?)>( (?:line:\d+:\d+|col:\d+|[\w./-]+:\d+:\d+))?",
            rest,
        )
        n.file, n.line, n.col = f, line, c
        if rm:
            for x in LOC.finditer(rm.group(0)):
                if x.group(1):
                    f, line, c = x.group(1), int(x.group(2)), int(x.group(3))
                elif x.group(4):
                    line, c = int(x.group(4)), int(x.group(5))
                else:
                    c = int(x.group(6))
                if first:
                    n.file, n.line, n.col = f, line, c
                    first = False
            n.text = rest[rm.end() :]
        while stack and stack[-1].depth >= n.depth:
            stack.pop()
        n.parent = stack[-1] if stack else None
        n.kids = []
        if n.parent:
            n.parent.kids.append(n)
        stack.append(n)
        nodes.append(n)
    return nodes


def types_in(text):
    return re.findall(r"'((?:[^'\\]|\\.)*)'", text)


def is_vec(ty):
    return (
        "ext_vector_type" in ty
        or (
            re.search(
                r"\b(?:bool|char|uchar|short|ushort|int|uint|long|ulong|half|float|bfloat)[234]\b(?!\s*[*&x])",
                ty,
            )
            and "*" not in ty
        )
        or (bool(re.search(r"\bvec<", ty)) and "*" not in ty)
    )


def ast_checks(nodes, label, kernel_prefix="custom_kernel_"):
    err, warn = [], []
    own = (f"{label}.source", f"{label}.header")

    def where(n):
        return f"{n.file}:{n.line}:{n.col}"

    calls, names, _decl_of = {}, {}, {}
    func_stack = []
    for n in nodes:
        while func_stack and func_stack[-1].depth >= n.depth:
            func_stack.pop()
        if n.kind in (
            "FunctionDecl",
            "CXXMethodDecl",
            "CXXConstructorDecl",
            "CXXConversionDecl",
        ):
            func_stack.append(n)
            if n.addr:
                nm = re.findall(
                    r"\b(?:used|referenced|invalid|constexpr)?\s*([\w~]+(?:\s*[-+*/%<>=!&|^~()\[\]]+)?) '",
                    n.text,
                )
                names[n.addr] = nm[-1] if nm else "?"
        fn = func_stack[-1] if func_stack else None
        if fn is not None and fn.addr:
            m = re.search(r"\b(?:Function|CXXMethod) 0x([0-9a-f]+) '", n.text)
            if m and n.kind == "DeclRefExpr":
                calls.setdefault(fn.addr, set()).add(m.group(1))
            if n.kind == "MemberExpr":
                m = re.search(r"(?:->|\.)\S* 0x([0-9a-f]+)$", n.text)
                if m:
                    calls.setdefault(fn.addr, set()).add(m.group(1))
        if n.file not in own:
            continue
        tys = types_in(n.text)
        ty = tys[0] if tys else ""
        # 1. pointers and references need an address space
        if (
            n.kind in ("ParmVarDecl", "VarDecl", "FieldDecl")
            and " implicit" not in n.text
            and re.search(r"__generic [^,()]*[*&]", ty)
        ):
            par = n.parent
            lam = False
            p = n
            while p is not None:
                if (
                    p.kind == "CXXRecordDecl" and "(lambda" in p.text
                ) or p.kind == "LambdaExpr":
                    lam = True
                p = p.parent
            imp = (
                par is not None
                and " implicit" in par.text
                and par.kind.startswith("CXX")
            )
            if (
                not imp
                and not (lam and n.kind == "FieldDecl")
                and "__range" not in n.text
                and "__begin" not in n.text
                and "__end" not in n.text
            ):
                nm = re.search(r"(\w+) '", n.text)
                err.append(
                    f"{where(n)}: '{nm.group(1) if nm else ''}': pointer or reference type must have an explicit address space qualifier (device, constant, threadgroup or thread)"
                )
        if (
            n.kind in ("FunctionDecl", "CXXMethodDecl")
            and " implicit" not in n.text
            and ty
        ):
            ret = ty.split("(")[0]
            if re.search(r"__generic .*[*&]", ret):
                err.append(
                    f"{where(n)}: return type '{build.clean(ret).strip()}' needs an address space qualifier"
                )
        if n.kind in (
            "CStyleCastExpr",
            "CXXStaticCastExpr",
            "CXXReinterpretCastExpr",
            "CXXFunctionalCastExpr",
        ) and re.search(r"__generic [^,()]*\*", ty):
            err.append(f"{where(n)}: cast to a pointer without address space qualifier")
        # 2. only integers convert implicitly to bfloat
        if (
            n.kind == "ImplicitCastExpr"
            and "<FloatingCast>" in n.text
            and "part_of_explicit_cast" not in n.text
            and re.search(r"__bf16'", n.text.split("<FloatingCast>")[0])
            and "ext_vector" not in ty
        ):
            src = (
                types_in(n.kids[0].text)[0]
                if n.kids and types_in(n.kids[0].text)
                else "?"
            )
            # compound assignments (bfloat x += float) convert too
            err.append(
                f"{where(n)}: no implicit conversion from '{build.clean(src).strip()}' to 'bfloat' in Metal: write bfloat16_t(...) or static_cast<T>(...)"
            )
        if n.kind == "CompoundAssignOperator" and "ComputeResultTy=" in n.text:
            m = re.search(r"ComputeResultTy='([^']*)'", n.text)
            if (
                m
                and m.group(1) == "float"
                and re.search(r"__bf16'|bfloat", n.text.split("ComputeLHSTy")[0])
            ):
                err.append(
                    f"{where(n)}: bfloat compound assignment computes in float and converts back implicitly: Metal refuses it"
                )
        # 3. vector casts that reinterpret the bits upstream but convert in Metal
        if (
            n.kind in ("CXXFunctionalCastExpr", "CStyleCastExpr", "CXXStaticCastExpr")
            and "<BitCast>" in n.text
            and is_vec(ty)
        ):
            err.append(
                f"{where(n)}: vector conversion the simulator would take as a bit cast: write it with a vector type's own name, T4(x), or use as_type"
            )
        # 4. integer masks from vector comparisons
        if (
            n.kind == "BinaryOperator"
            and re.search(r"'(<|>|<=|>=|==|!=)'$", n.text.strip())
            and is_vec(ty)
        ):
            p = n.parent
            while p is not None and p.kind in (
                "ParenExpr",
                "ImplicitCastExpr",
                "ExprWithCleanups",
                "MaterializeTemporaryExpr",
            ):
                p = p.parent
            ok = p is not None and (
                p.kind
                in (
                    "CallExpr",
                    "CXXConstructExpr",
                    "UnaryOperator",
                    "CXXOperatorCallExpr",
                    "CXXTemporaryObjectExpr",
                    "CXXFunctionalCastExpr",
                    "UnresolvedLookupExpr",
                )
                or (
                    p.kind == "BinaryOperator"
                    and re.search(r"'(&&|\|\|)'$", p.text.strip())
                )
            )
            if p is not None and p.kind == "CallExpr":
                callee = " ".join(k.text for k in p.kids[:1]) + " ".join(
                    kk.text for k in p.kids[:1] for kk in k.kids
                )
                ok = (
                    bool(re.search(r"\b(any|all|select)\b", callee)) or "bool" in callee
                )
            if not ok:
                err.append(
                    f"{where(n)}: vector comparison used as a value: bool vector in Metal, integer mask here; use any(), all(), select() or compare components"
                )
        # 5. globals
        if (
            n.kind == "VarDecl"
            and n.depth <= 2
            and fn is None
            and ty
            and "__constant" not in ty
            and "msim_" not in n.text
            and " static" not in n.text.split("'")[0]
            and (
                n.depth == 1
                or (
                    n.parent is not None
                    and n.parent.kind in ("NamespaceDecl", "LinkageSpecDecl")
                )
            )
        ):
            err.append(
                f"{where(n)}: program scope variable must be in the constant address space"
            )
        if (
            n.kind == "VarDecl"
            and fn is not None
            and re.search(r"\bstatic\b", n.text.split("'")[-1])
            and "__constant" not in ty
            and "msim_" not in n.text
        ):
            err.append(f"{where(n)}: static variable in a function")
        if n.kind == "GotoStmt":
            err.append(f"{where(n)}: goto")
        # 6. threadgroup variables belong to kernels
        if (
            n.kind == "TypeAliasDecl"
            and "msim_tg" in n.text
            and fn is not None
            and kernel_prefix not in fn.text
        ):
            err.append(
                f"{where(n)}: threadgroup variable in a function that is no kernel"
            )
        if n.kind == "VarDecl" and re.search(r"\(\*", ty):
            warn.append(f"{where(n)}: function pointer")
        # 7. sizes of thread-private arrays
        m = re.search(r"\[(\d+)\]'?$", ty)
        if (
            n.kind == "VarDecl"
            and fn is not None
            and m
            and "__private" in ty
            and int(m.group(1)) >= 256
        ):
            warn.append(
                f"{where(n)}: thread array of {m.group(1)} elements will spill on the GPU"
            )
    # 8. recursion
    state = {}

    def visit(a, path):
        state[a] = 1
        for b in calls.get(a, ()):
            if b not in names:
                continue
            if state.get(b) == 1:
                warn.append("recursion: " + " -> ".join(names[x] for x in [*path, b]))
            elif b not in state:
                visit(b, [*path, b])
        state[a] = 2

    for a in list(names):
        if a not in state:
            visit(a, [a])
    return err, warn


WARN = [
    "-Wall",
    "-Wextra",
    "-Wuninitialized",
    "-Wsometimes-uninitialized",
    "-Wconditional-uninitialized",
    "-Wno-unused-parameter",
    "-Wno-unused-variable",
    "-Wno-unused-function",
    "-Wno-unused-local-typedef",
    "-Wno-unused-but-set-variable",
    "-Wno-unused-but-set-parameter",
    "-Wno-sign-compare",
    "-Wno-missing-braces",
]
FATAL = (
    "-Wuninitialized",
    "-Wreturn-type",
    "-Warray-bounds",
    "-Wdivision-by-zero",
    "-Wshift-count",
    "-Wvla",
)


def check(tu, header, source, label, flags, nbuffers=0, name="kernel"):
    """Raises CompileError; returns warnings."""
    cc, _ = build.clang()
    err, warn = [], []
    for text, part in ((header, f"{label}.header"), (source, f"{label}.source")):
        e, w = lint_tokens(text, part)
        err += e
        warn += w
    if nbuffers > 31:
        err.append(f"{name}: {nbuffers} buffer arguments; Metal allows 31")
    r = subprocess.run(
        [
            cc,
            *flags,
            *WARN,
            "-fsyntax-only",
            "-Xclang",
            "-ast-dump",
            "-fno-color-diagnostics",
            "-x",
            "clcpp",
            "-",
        ],
        input=tu,
        capture_output=True,
        text=True,
    )
    if r.returncode:
        msgs = list(build.clean(r.stderr).split("\n"))
        raise build.CompileError(
            f"{name} does not compile:\n"
            + ("\n".join(err) + "\n" if err else "")
            + "\n".join(msgs)
        )
    for line in r.stderr.split("\n"):
        m = re.match(
            r"^([\w./-]+\.(?:source|header)):(\d+):(\d+): warning: (.*?) \[(-W[^\],]+)",
            line,
        )
        if m:
            msg = f"{m.group(1)}:{m.group(2)}:{m.group(3)}: {build.clean(m.group(4))} [{m.group(5)}]"
            (err if m.group(5).startswith(FATAL) else warn).append(msg)
    e, w = ast_checks(parse_ast(r.stdout), label)
    err += e
    warn += w
    err = list(dict.fromkeys(err))
    warn = list(dict.fromkeys(warn))
    if err:
        raise build.CompileError(
            f"{name}: Metal would refuse this source:\n  " + "\n  ".join(err)
        )
    return warn
