#!/bin/sh
# The CUDA backend on a device, TAP: cuda.c and cuda_shape.c, built for it, if there are nvcc and a device.
cd "$(dirname "$0")/.." || exit 1
why=
command -v "${NVCC:-nvcc}" > /dev/null || why="there is no nvcc"
[ -n "$why" ] || nvidia-smi -L 2> /dev/null | grep -q '^GPU' || why="there is no CUDA device"
if [ -n "$why" ]; then
    echo "1..1"
    echo "ok 1 - the CUDA backend passes its tests on a device # SKIP $why"
    exit 0
fi
nvidia-smi -L | sed 's/^/# /'
if ! ${MAKE:-make} -s build/tests/cuda_device build/tests/cuda_shape_device >&2; then
    echo "not ok 1 - the CUDA backend's tests can be built for a device"
    echo "1..1"
    exit 1
fi
# One count over both. A program that ends before its plan, or whose status is not that of its lines, has failed
# where no line of its own says so.
for program in cuda_device cuda_shape_device; do
    build/tests/$program
    echo "ended $program $?"
done | awk '
    /^1\.\./ { planned = 1; next }
    /^ended / {
        if (!planned || ($3 > 0) != (failed > 0)) {
            print "not ok " ++n " - " $2 " runs to its end: exit status " $3
            failed++
        }
        bad += failed
        planned = failed = 0
        next
    }
    /^not ok / { failed++ }
    /^(not )?ok / { sub(/ok [0-9]+/, "ok " ++n) }
    { print }
    END { print "1.." n; exit bad > 0 }'
