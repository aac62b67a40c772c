#!/usr/bin/env bash
# build.sh DIR: llama.cpp for this CPU, from the source in the PyPI package llama-cpp-python (ten minutes on two
# cores). Needs python3 with pip, cmake, ninja and g++. Without AMX: its AMX buffers abort on converted V4 models.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
mkdir -p "$1" && cd "$1"
[ -x rows ] && exit 0
if ! [ -d src ]; then
    python3 -m pip download -q --no-deps --no-binary :all: -d sdist llama-cpp-python==0.3.36
    mkdir -p src.part && tar xzf sdist/llama_cpp_python-*.tar.gz -C src.part --strip-components=1
    mv src.part src
fi
root=$PWD/src/vendor/llama.cpp

# ggml's option for each flag of /proc/cpuinfo that this machine has.
has() { grep -qw "$1" /proc/cpuinfo && echo ON || echo OFF; }
options=()
while read -r option flag; do options+=("-DGGML_$option=$(has "$flag")"); done <<'FLAGS'
SSE42 sse4_2
AVX avx
AVX2 avx2
FMA fma
F16C f16c
BMI2 bmi2
AVX_VNNI avx_vnni
AVX512 avx512bw
AVX512_VBMI avx512_vbmi
AVX512_VNNI avx512_vnni
AVX512_BF16 avx512_bf16
FLAGS
[ "$(uname -m)" = x86_64 ] || options=(-DGGML_NATIVE=ON)

cmake -G Ninja "$root" -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_OPENSSL=OFF -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF "${options[@]}" >cmake.log
ninja -C build llama-bench llama-server >ninja.log
g++ -O2 -std=c++17 -I"$root/include" -I"$root/ggml/include" "$here/rows.cpp" -o rows.part -Lbuild/bin \
    -lllama -lggml -lggml-base -Wl,-rpath,"$PWD/build/bin"
mv rows.part rows
