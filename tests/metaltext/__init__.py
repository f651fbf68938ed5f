"""The Metal texts of our kernels, as compilers see them without a GPU.

    specialisations.py  which ones our caches launch, noted rather than listed
    texts.py            their whole text, as MLX hands it to Metal
    apple.py            Apple's compiler over them, by language version
    portable.py         clang over them, as C++14 with distinct address spaces
    portable.h          what of Metal they use, for that
    counts.py           operations and registers of attention, from LLVM
    control_flow.py     loops of its code, for that
    budgets.py          the table that they must not exceed
    compilers.py        whether this machine has the clang for it

It says what compilers accept and make of a text. What a kernel computes is tested in
``tests/kernels``.
"""
