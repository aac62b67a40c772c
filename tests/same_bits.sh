#!/bin/sh
# The same bits with every compiler and optimization level, on every path of this machine, with 1 and 2 threads,
# and on aarch64 (under qemu), TAP: all lines of `hashes kernels` are one hash, all lines of `hashes model` are one hash.
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
        if [ $compiled -eq 0 ] && $run $dir/hashes $part > $dir/log 2>&1 && [ -s $dir/log ]; then
            [ -e $dir/$part ] || head -n 1 $dir/log | cut -d' ' -f1 > $dir/$part
            grep -qv "^$(cat $dir/$part) " $dir/log || { echo "ok $n - $claim"; continue; }
        fi
        echo "not ok $n - $claim"
        sed 's/^/# /' $dir/log | head -n 20
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

arm=aarch64-linux-gnu-gcc
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static)
if ! command -v $arm >/dev/null; then skip "kernels and model, $arm: every path gives the same hash" "there is no $arm"
elif [ -z "$qemu" ]; then skip "kernels and model, $arm: every path gives the same hash" "there is no qemu-aarch64"
else same $qemu $arm -O2 -static; fi

echo "1..$n"
[ $bad -eq 0 ]
