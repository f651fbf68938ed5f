#!/usr/bin/env bash
# What the tests want of the system, installed where that is ours to do (Linux with apt,
# as root): clang >= 17, which the Metal simulator and the checks of Metal texts need (in CI
# 19, whose counts are the budgets), and OpenBLAS, with which MLX's CPU backend is many
# times faster. Elsewhere the suite says what it skipped.
set -u
if [ "$(uname -s)" != Linux ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	exit 0
fi
updated=
install() {
	[ -n "$updated" ] || { apt-get update -qq && updated=yes; } >/dev/null 2>&1
	apt-get install -y -qq "$@" >/dev/null 2>&1
}
ldconfig -p | grep -q libopenblas.so.0 || install libopenblas0-pthread ||
	echo "OpenBLAS could not be installed: the tests pass without it, but take longer"
command -v clang-19 >/dev/null && exit 0
[ -z "${CI:-}" ] && command -v clang-17 clang-18 clang-20 >/dev/null && exit 0
for version in 19 18 17; do
	install clang-$version llvm-$version && exit 0
done
echo "clang >= 17 could not be installed"
