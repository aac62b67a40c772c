#!/bin/sh
# The CUDA backend on a device, TAP: what tests/cuda.c asks of it on the host, where there is nvcc and a device.
cd "$(dirname "$0")/.." || exit 1
why=
command -v "${NVCC:-nvcc}" > /dev/null || why="there is no nvcc"
[ -n "$why" ] || nvidia-smi -L 2> /dev/null | grep -q '^GPU' || why="there is no CUDA device"
if [ -n "$why" ]; then
    echo "1..1"
    echo "ok 1 - the CUDA backend on a device # SKIP $why"
    exit 0
fi
nvidia-smi -L | sed 's/^/# /'
${MAKE:-make} -s build/tests/cuda_device >&2 && exec build/tests/cuda_device
