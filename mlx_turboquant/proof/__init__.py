"""Whether this machine's kernels are right: checked once, in a process of its own."""
