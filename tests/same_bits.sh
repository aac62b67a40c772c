#!/bin/sh
# The same bits with every compiler and optimization level, on every path of this machine, with 1 and 2 threads, and on
# other systems (under qemu and Wine), TAP: all lines of `hashes kernels` are one hash, all of `hashes model` are one.
cd "$(dirname "$0")/.." || exit 1
dir=build/same_bits.$$
mkdir -p $dir && trap 'rm -rf $dir' EXIT
n=0 bad=0
skip() { n=$((n + 1)); echo "ok $n - $1 # SKIP $2"; }

# a command that runs a program, a compiler and its flags; the lines of a part must all have its first run's hash
same() {
    run=$1
    shift
    "$@" -std=c11 tests/hashes.c -o $dir/hashes -lm > $dir/log 2>&1
    compiled=$?
    for part in kernels model; do
        n=$((n + 1)) claim="$part, $*: every path gives the same hash"
        if [ $compiled -eq 0 ] && $run $dir/hashes $part > $dir/log 2> $dir/errors && [ -s $dir/log ]; then
            [ -e $dir/$part ] || head -n 1 $dir/log | cut -d' ' -f1 > $dir/$part
            grep -qv "^$(cat $dir/$part) " $dir/log || { echo "ok $n - $claim"; continue; }
        fi
        echo "not ok $n - $claim"
        cat $dir/log $dir/errors 2>/dev/null | sed 's/^/# /' | head -n 20
        bad=$((bad + 1))
    done
}

echo 'int main(void) { return 0; }' > $dir/empty.c
for cc in gcc clang; do
    if ! command -v $cc >/dev/null; then
        skip "kernels and model, $cc: every path gives the same hash" "there is no $cc"; continue; fi
    openmp=
    $cc -fopenmp $dir/empty.c -o $dir/empty 2> $dir/log && openmp=-fopenmp
    for flags in -O0 -O2 "-O3 -march=native"; do same "" $cc $flags $openmp; done
done

# Compilers for other systems, and what runs their programs here
export WINEDEBUG=-all
for there in "aarch64-linux-gnu-gcc qemu-aarch64 qemu-aarch64-static" "riscv64-linux-gnu-gcc qemu-riscv64 qemu-riscv64-static" \
    "x86_64-w64-mingw32-gcc wine wine64"; do
    set -- $there
    run=$(command -v $2 || command -v $3)
    claim="kernels and model, $1: every path gives the same hash"
    if ! command -v $1 >/dev/null; then skip "$claim" "there is no $1"
    elif [ -z "$run" ]; then skip "$claim" "there is no $2"
    else same $run $1 -O2 -static; fi
done

echo "1..$n"
[ $bad -eq 0 ]
