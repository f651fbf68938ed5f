"""MSL source -> the C++ for OpenCL that clang compiles.  Token level, line numbers kept.

1. threadgroup variables        -> references into per-threadgroup storage
2. T(a, b, ..) of vector types  -> metal::__mk<T>(a, b, ..)
3. `thread` after constructors and operators -> dropped (upstream clang keeps temporaries in no
   address space, where a __private member function cannot be called)
4. function constants           -> settable globals
5. explicit kernel instantiations, `kernel` keyword -> dropped
6. bfloat literals (1.0bf)      -> bfloat(1.0f)
7. demands to unroll a loop     -> dropped: with them clang takes four to ten times as long (for
   head_dim 512 in debug mode 26 s instead of 0.4), and they change no result
"""

import re

TOKEN = re.compile(
    r"""
   (?P<ws>[ \t\r\f\v]+|\\\n)
 | (?P<nl>\n)
 | (?P<comment>//[^\n]*|/\*.*?\*/)
 | (?P<str>(?:u8|u|U|L)?"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
 | (?P<num>\.?\d(?:[eEpP][+-]|[\w.])*)
 | (?P<id>[A-Za-z_]\w*)
 | (?P<punct>\[\[|\]\]|::|->|<<=|>>=|<=|>=|==|!=|&&|\|\||\+\+|--|[-+*/%&|^]=|\#\#|.)
""",
    re.X | re.S,
)

SCALARS = [
    "bool",
    "char",
    "uchar",
    "short",
    "ushort",
    "int",
    "uint",
    "long",
    "ulong",
    "half",
    "float",
    "bfloat",
]
VECTORS = {f"{s}{n}" for s in SCALARS for n in (2, 3, 4)}


class Tok:
    __slots__ = ("k", "line", "s")

    def __init__(self, k, s, line):
        self.k, self.s, self.line = k, s, line

    def __repr__(self):
        return f"{self.s!r}"


def tokenize(src):
    out, line = [], 1
    for m in TOKEN.finditer(src):
        k = m.lastgroup
        s = m.group()
        out.append(Tok(k, s, line))
        line += s.count("\n")
    return out


SKIP = ("ws", "nl", "comment")
UNROLL = re.compile(
    r'_Pragma\s*\(\s*"(?:clang loop )?unroll[^"]*"\s*\)'
    r"|^[ \t]*#[ \t]*pragma[ \t]+(?:clang[ \t]+loop[ \t]+)?unroll[^\n]*",
    re.M,
)


def vector_aliases(src):
    names = set(VECTORS)
    vt = r"(?:typename\s+)?(?:metal\s*::\s*)?(?:vec\s*<[^;<>]*(?:<[^<>]*>[^;<>]*)*>|%s)"
    for _ in range(3):
        alt = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
        pat = vt % (r"\b(?:" + alt + r")\b")
        new = {
            m.group(1)
            for m in re.finditer(r"\busing\s+(\w+)\s*=\s*" + pat + r"\s*;", src)
        }
        new |= {
            m.group(1)
            for m in re.finditer(r"\btypedef\s+" + pat + r"\s+(\w+)\s*;", src)
        }
        if new <= names:
            break
        names |= new
    return names


def rewrite(src, issues=None, lenient=False, type_params=()):
    """Returns the rewritten text; appends (line, message) to issues."""
    issues = issues if issues is not None else []
    src = UNROLL.sub("", src)
    vecs = vector_aliases(src)
    # template type parameters: X(..) may build a vector, or convert half <-> bfloat
    tparams = set() if lenient else set(type_params)
    if not lenient:
        for m in re.finditer(r"\btemplate\s*<([^{};()]*?)>\s*(?=[\w\[:])", src):
            tparams |= set(re.findall(r"\b(?:typename|class)\s+(\w+)", m.group(1)))
    t = tokenize(src)
    n = len(t)
    classes = set(
        re.findall(r"\b(?:struct|class)\s+(?:alignas\s*\([^)]*\)\s*)?(\w+)", src)
    )

    def nxt(i):
        i += 1
        while i < n and (t[i].k in SKIP or not t[i].s):
            i += 1
        return i

    def prv(i):
        i -= 1
        while i >= 0 and (t[i].k in SKIP or not t[i].s):
            i -= 1
        return i

    def match(i, o, c):
        d = 0
        while i < n:
            if t[i].s == o:
                d += 1
            elif t[i].s == c:
                d -= 1
                if d == 0:
                    return i
            elif o == "<" and t[i].s == ">>":
                d -= 2
                if d <= 0:
                    return i
            elif o == "<" and t[i].s in (";", "{"):
                return -1
            i += 1
        return -1

    def text(a, b):  # tokens [a, b)
        return "".join(x.s for x in t[a:b])

    def kill(a, b):
        for x in t[a:b]:
            if x.k == "comment":
                x.s = "\n" * x.s.count("\n")
            elif x.s == "\\\n" or x.k == "nl":
                pass
            else:
                x.s = ""

    uid = 0
    i = 0
    bracestack = []  # kind of each open brace: 'fn' or 'other'
    in_define = False
    parens = 0
    while i < n:
        k = t[i]
        if (
            k.k == "punct"
            and k.s == "#"
            and (i == 0 or t[prv(i)].line < k.line or prv(i) < 0)
        ):
            j = nxt(i)
            in_define = j < n and t[j].s == "define"
            if not in_define:  # leave other directives alone
                while i < n and t[i].k != "nl":
                    i += 1
                continue
            i += 1
            continue
        if k.k == "nl":
            in_define = False
            i += 1
            continue
        if k.k == "punct":
            # 4. function constants: drop const-ness, make them globals the host can set
            if (
                k.s == "[["
                and parens == 0
                and nxt(i) < n
                and t[nxt(i)].s == "function_constant"
            ):
                close = i
                while t[close].s != "]]":
                    close += 1
                b = i
                while b > 0 and t[b - 1].k != "nl" and t[b - 1].s not in (";", "}"):
                    b -= 1
                for x in t[b:i]:
                    if x.s in (
                        "constant",
                        "const",
                        "constexpr",
                        "static",
                        "STEEL_CONST",
                        "MLX_MTL_CONST",
                        "MTL_CONST",
                    ):
                        x.s = ""
                t[b].s = "__global " + t[b].s
                kill(i, close + 1)
                i = close + 1
                continue
            if k.s == "(":
                parens += 1
            elif k.s == ")":
                parens -= 1
            if k.s == "{":
                p = prv(i)
                ps = t[p].s if p >= 0 else ""
                # a brace after ')' or a trailing qualifier opens a function (or control) body
                kind = (
                    "fn"
                    if ps in (")", "const", "noexcept", "else", "do")
                    or (bracestack and bracestack[-1] == "fn")
                    else "other"
                )
                bracestack.append(kind)
            elif k.s == "}" and bracestack:
                bracestack.pop()
            i += 1
            continue
        if k.k == "num":
            m = re.fullmatch(r"(\d*\.?\d*(?:[eE][+-]?\d+)?)(bf|BF)", k.s)
            if m:
                k.s = f"bfloat({m.group(1) if '.' in m.group(1) or 'e' in m.group(1).lower() else m.group(1) + '.0'}f)"
            i += 1
            continue
        if k.k != "id":
            i += 1
            continue

        # 5. `template [[host_name..]] [[kernel]] decltype(..) f<..>;`
        if k.s == "template":
            j = nxt(i)
            if j < n and t[j].s == "[[":
                e = j
                while e < n and t[e].s != ";":
                    e += 1
                kill(i, e)
                i = e + 1
                continue
        if k.s == "kernel":
            p = prv(i)
            q = nxt(i)
            if not (p >= 0 and t[p].s in ("[[", ",")) and not (
                q < n and t[q].s in ("]]", ",")
            ):
                k.s = ""
            i += 1
            continue
        # temporaries cannot bind to `const thread T&` upstream
        if lenient and k.s == "thread":
            p, q = prv(i), nxt(i)
            a = t[p].s == "const" or t[q].s == "const"
            e = nxt(q) if t[q].s == "const" else q
            if (
                a
                and t[e].k == "id"
                and t[nxt(e)].s == "&"
                and t[e].s in ("short", "int", "float", "uint")
            ):
                k.s = ""
                i += 1
                continue
        # 3. `thread` after a constructor's parameter list: upstream clang builds
        #    temporaries in no address space, so a __private constructor never matches
        if k.s == "thread":
            p = prv(i)
            if p >= 0 and t[p].s == "const":
                p = prv(p)
            q = nxt(i)
            if (
                p >= 0
                and t[p].s == ")"
                and q < n
                and t[q].s in ("{", ":", ";", "noexcept", "=")
            ):
                d, r = 0, p
                while r >= 0:
                    if t[r].s == ")":
                        d += 1
                    elif t[r].s == "(":
                        d -= 1
                        if d == 0:
                            break
                    r -= 1
                r = prv(r)
                o = r
                while (
                    o >= 0 and r - o < 16 and t[o].s not in (";", "{", "}", "operator")
                ):
                    o -= 1
                is_op = o >= 0 and t[o].s == "operator"
                if t[q].s == ":" or is_op or (r >= 0 and t[r].s in classes):
                    k.s = ""
                    i += 1
                    continue
        if (
            k.s == "constant"
        ):  # (constant implies const: the macro would put a const after a constructor)
            p, q = prv(i), nxt(i)
            if p >= 0 and t[p].s == "const":
                p = prv(p)
            if (
                p >= 0
                and t[p].s == ")"
                and q < n
                and t[q].s in ("{", ":", ";", "noexcept", "=")
            ):
                k.s = "__constant"
            i += 1
            continue
        if k.s in ("half", "bfloat", "float16_t", "bfloat16_t"):
            p, q = prv(i), nxt(i)
            if (
                q < n
                and t[q].s == "("
                and (p < 0 or t[p].s not in ("operator", "typedef", "*", "&"))
                and not (
                    p >= 0
                    and t[p].k == "id"
                    and t[p].s not in ("return", "else", "case")
                )
            ):
                k.s = f"metal::__sc<{k.s}>"
            i += 1
            continue
        if lenient and k.s.startswith("elem_to_loc"):  # elem_to_loc({x, y, z}, ..)
            q = nxt(i)
            if q < n and t[q].s == "<":
                q = nxt(match(q, "<", ">"))
            if q < n and t[q].s == "(" and t[nxt(q)].s == "{":
                o = nxt(q)
                e = match(o, "{", "}")
                t[o].s, t[e].s = "metal::__mk<metal::uint3>(", ")"
            i += 1
            continue
        # 1. threadgroup variables
        if k.s == "threadgroup":
            p = prv(i)
            while p >= 0 and t[p].s in ("const", "static", "volatile"):
                p = prv(p)
            start = p < 0 or t[p].k == "done" or t[p].s in (";", "{", "}", ":")
            if start:
                r = _tgvar(t, i, n, nxt, match, text)
                if r is not None:
                    decls, end = r
                    if not (bracestack and bracestack[-1] == "fn") and not in_define:
                        issues.append(
                            (k.line, "threadgroup variable outside a function")
                        )
                    body = ""
                    for ty, name, dims, init in decls:
                        uid += 1
                        u = f"msim_tg{uid}_{k.line}"
                        if init:
                            issues.append(
                                (
                                    k.line,
                                    f"threadgroup variable '{name}' has an initializer (Metal forbids it)",
                                )
                            )
                        ty2 = re.sub(r"\bthreadgroup\b", "", ty)
                        body += (
                            f"using {u}_t = {ty2.strip()} {dims}; static __global char {u}_k; "
                            f'threadgroup {u}_t& {name} = *(threadgroup {u}_t*)__msim_tg((ulong)&{u}_k, sizeof({u}_t), alignof({u}_t), (ulong)"{name}"); '
                        )
                    nls = "".join(
                        x.s
                        if x.k == "nl"
                        else (
                            "\n" * x.s.count("\n")
                            if x.k == "comment"
                            else (x.s if x.s == "\\\n" else "")
                        )
                        for x in t[i : end + 1]
                    )
                    kill(i, end + 1)
                    for x in t[i : end + 1]:
                        if x.k == "nl" or x.s == "\\\n" or x.k == "comment":
                            x.s = ""
                    t[i].s = body + nls
                    t[i].k = "done"
                    i = end + 1
                    continue
        if k.s in tparams:
            p, q = prv(i), nxt(i)
            ps = t[p].s if p >= 0 else ""
            if (
                q < n
                and t[q].s == "("
                and ps
                not in (
                    "operator",
                    "typename",
                    "class",
                    "::",
                    ".",
                    "->",
                    "template",
                    "using",
                    "&",
                    "*",
                )
                and t[nxt(q)].s not in ("*", "&")
            ):
                k.s = f"metal::__mk<{k.s}>"
            i += 1
            continue
        # 2. vector constructors
        p = prv(i)
        ps = t[p].s if p >= 0 else ""
        if k.s in vecs and ps != "operator" and bracestack and bracestack[-1] == "fn":
            q = nxt(i)
            if q < n and t[q].k == "id":
                r = nxt(q)
                if r < n and t[r].s == "=" and t[nxt(r)].s == "{":
                    o = nxt(r)
                    e = match(o, "{", "}")
                    if (
                        e > 0
                        and t[nxt(e)].s in (";", ",")
                        and not any(x.s == "{" for x in t[o + 1 : e])
                    ):
                        t[o].s = f"metal::__ml<{k.s}>("
                        t[e].s = ")"
                        i = q + 1
                        continue
                if r < n and t[r].s == "(":
                    e = match(r, "(", ")")
                    f = nxt(e) if e > 0 else n
                    if f < n and t[f].s in (";", ","):
                        t[q].s += f" = metal::__mk<{k.s}>"
                        i = q + 1
                        continue
        if k.s in vecs and ps not in (
            "operator",
            "using",
            "struct",
            "class",
            "typename",
            "&",
        ):
            q = nxt(i)
            if q < n and t[q].s == "(":
                if ps == "::":  # metal::float4( -> drop the qualifier
                    pp = prv(p)
                    if pp >= 0 and t[pp].s == "metal":
                        t[p].s = ""
                        t[pp].s = ""
                        t[i].s = f"metal::__mk<metal::{k.s}>"
                    else:
                        i += 1
                        continue
                else:
                    t[i].s = f"metal::__mk<{k.s}>"
                i += 1
                continue
        if k.s == "vec" and ps != "struct":
            q = nxt(i)
            if q < n and t[q].s == "<":
                e = match(q, "<", ">")
                # typedef metal::vec<T, n> name;   using name = vec<T, n>;
                h = i
                if ps == "::":
                    h = prv(prv(i))
                g = prv(h)
                f = nxt(e) if e > 0 else n
                if (
                    e > 0
                    and g >= 0
                    and t[e].s == ">"
                    and f < n
                    and (
                        (t[g].s == "typedef" and t[f].k == "id" and t[nxt(f)].s == ";")
                        or (
                            t[g].s == "="
                            and t[f].s == ";"
                            and t[prv(prv(g))].s == "using"
                        )
                    )
                ):
                    for x in t[h:i]:
                        x.s = ""
                    k.s = "typename metal::__vecx"
                    t[e].s = ">::type"
                    i = q + 1
                    continue
                if e > 0 and t[e].s == ">":
                    f = nxt(e)
                    if (
                        f < n
                        and t[f].s == "("
                        and ps not in ("operator", "using", "typename")
                    ):
                        t[i].s = (
                            "metal::__mk<metal::vec"
                            if ps != "::"
                            else "__mk<metal::vec"
                        )
                        t[e].s = ">>"
                i += 1
                continue
        if k.s == "static_cast":
            q = nxt(i)
            if q < n and t[q].s == "<":
                e = match(q, "<", ">")
                inner = [x for x in t[q + 1 : e] if x.k not in SKIP] if e > 0 else []
                if inner and not any(x.s in ("*", "&", "void") for x in inner):
                    t[i].s = "metal::__sc"
                if (
                    inner
                    and (
                        (len(inner) == 1 and inner[0].s in vecs)
                        or (inner[0].s == "vec")
                        or (
                            len(inner) == 3
                            and inner[0].s == "metal"
                            and inner[2].s in vecs
                        )
                    )
                    and not any(x.s in ("*", "&") for x in inner)
                ):
                    t[i].s = "metal::__mk"
            i += 1
            continue
        i += 1
    return "".join(x.s for x in t)


def _tgvar(t, i, n, nxt, match, text):
    """Parses `threadgroup <type> a[..], b;` from token i; None for pointers, references, casts."""
    j = nxt(i)
    last_id = None
    k = j
    while k < n:
        s = t[k].s
        if t[k].k in SKIP:
            k += 1
            continue
        if s == "<":
            e = match(k, "<", ">")
            if e < 0:
                return None
            k = e + 1
            last_id = None
            continue
        if s in ("*", "&", "(", ")", "{", "}"):
            if s == "(":  # alignas(16) / decltype(..)
                pass
            return None
        if s == "::":
            k += 1
            last_id = None
            continue
        if t[k].k == "id":
            if last_id is not None or (k != j):
                # the last identifier before [ , ; = is the name
                pass
            last_id = k
            k += 1
            continue
        if s in ("[", ",", ";", "="):
            break
        if s in ("[[",):
            break
        return None
    else:
        return None
    if last_id is None or last_id == j:
        return None
    ty = text(j, last_id).replace("\\\n", " ").replace("\n", " ")
    decls = []
    k = last_id
    while True:
        name = t[k].s
        k = nxt(k)
        dims = ""
        while t[k].s == "[":
            e = match(k, "[", "]")
            dims += text(k, e + 1).replace("\\\n", " ").replace("\n", " ")
            k = nxt(e)
        if t[k].s == "[[":
            while t[k].s != "]]":
                k += 1
            k = nxt(k)
        init = False
        if t[k].s == "=":
            init = True
            d = 0
            while not (d == 0 and t[k].s in (",", ";")):
                if t[k].s in "([{":
                    d += 1
                elif t[k].s in ")]}":
                    d -= 1
                k += 1
        decls.append((ty, name, dims, init))
        if t[k].s == ",":
            k = nxt(k)
            if t[k].k != "id":
                return None
            continue
        if t[k].s == ";":
            return decls, k
        return None
