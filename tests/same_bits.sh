#!/bin/sh
# The same bits with every compiler and optimization level, on every path of this machine, with 1 and 2 threads,
# and on aarch64 (under qemu), TAP: all lines of kernels_hash are one hash, all lines of model_hash are one hash.
cd "$(dirname "$0")/.." || exit 1
dir=build/same_bits.$$
mkdir -p $dir && trap 'rm -rf $dir' EXIT
n=0 bad=0
skip() { n=$((n + 1)); echo "ok $n - $1 # SKIP $2"; }

# a program of tests/, a command that runs it, a compiler and its flags; its lines must all have the first run's hash
same() {
    program=$1 run=$2
    shift 2
    n=$((n + 1)) claim="$program, $*: every path gives the one hash"
    if "$@" -std=c11 tests/$program.c -o $dir/$program -lm > $dir/log 2>&1 && $run $dir/$program > $dir/log 2>&1 &&
        [ -s $dir/log ]; then
        [ -e $dir/$program.first ] || head -n 1 $dir/log | cut -d' ' -f1 > $dir/$program.first
        grep -qv "^$(cat $dir/$program.first) " $dir/log || { echo "ok $n - $claim"; return; }
    fi
    echo "not ok $n - $claim"
    sed 's/^/# /' $dir/log | head -n 20
    bad=$((bad + 1))
}

echo 'int main(void) { return 0; }' > $dir/empty.c
for cc in gcc clang; do
    openmp=
    $cc -fopenmp $dir/empty.c -o $dir/empty 2> $dir/log && openmp=-fopenmp
    for flags in -O0 -O2 "-O3 -march=native"; do
        for program in kernels_hash model_hash; do
            if command -v $cc >/dev/null; then same $program "" $cc $flags $openmp
            else skip "$program, $cc $flags" "there is no $cc"; fi
        done
    done
done

arm=aarch64-linux-gnu-gcc
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static)
for program in kernels_hash model_hash; do
    if ! command -v $arm >/dev/null; then skip "$program, $arm" "there is no $arm"
    elif [ -z "$qemu" ]; then skip "$program, $arm" "there is no qemu-aarch64"
    else same $program $qemu $arm -O2 -static; fi
done

echo "1..$n"
[ $bad -eq 0 ]
