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
${MAKE:-make} -s build/tests/cuda_device build/tests/cuda_shape_device >&2 || exit 1
for program in cuda_device cuda_shape_device; do
    build/tests/$program || echo "not ok 0 - $program: exit status $?"
done | awk '/^1\.\./ { next } /^(not )?ok / { sub(/ok [0-9]+/, "ok " ++n) } { print } END { print "1.." n }'
