# make help lists the targets. Everything that is built lies in build/, but for ./dspark itself.
CFLAGS ?= -O2
WARN = -Wall -Wextra -Wshadow -Wconversion -Wno-enum-float-conversion
STD = -std=c11

# OpenMP if the compiler has it: without, the same text on one thread.
OPENMP := $(shell mkdir -p build && d=$$(mktemp -d build/openmp.XXXXXX) && \
  printf '\043include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n' > $$d/a.c && \
  $(CC) -fopenmp $$d/a.c -o $$d/a 2>/dev/null && echo -fopenmp; rm -rf $$d)

CHECKS = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1
# A program of tests/ that includes tap.h is a test; the others are tools of its scripts.
TESTS := $(patsubst tests/%.c,%,$(shell grep -l '"tap.h"' tests/*.c))
SHELL_TESTS := $(wildcard tests/*.sh)
FUZZERS := $(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/*.c))
BENCHES := $(filter-out cuda,$(patsubst bench/%.c,%,$(wildcard bench/*.c)))     # cuda needs nvcc: make bench-cuda
HEADERS := dspark.h $(wildcard tests/*.h)
export CC
JOBS := $(shell nproc 2>/dev/null || echo 2)
MAKEFLAGS += -j$(JOBS)

dspark: main.c dspark.h     ## build ./dspark (the default)
	$(CC) $(STD) $(CFLAGS) $(OPENMP) $(WARN) main.c -o $@ -lm $(LDFLAGS)

# Contraction would let a sum depend on the kernel's other sizes, and a text on its batch.
NVCC ?= nvcc
CUDA_ARCHS ?= 80 90a 100 120
NVFLAGS = -std=c++17 -O3 -fmad=false $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) -Xcompiler -Wall,-Wextra
build/dspark_cuda.o: dspark_cuda.cu dspark.h
	@mkdir -p $(@D)
	$(NVCC) $(NVFLAGS) -Werror all-warnings -c dspark_cuda.cu -o $@

cuda: build/dspark_cuda.o main.c dspark.h       ## build ./dspark with the CUDA backend: --backend cuda; needs nvcc
	$(CC) $(STD) $(CFLAGS) $(OPENMP) $(WARN) -DDSPARK_CUDA -c main.c -o build/main_cuda.o
	$(NVCC) build/main_cuda.o build/dspark_cuda.o -o dspark $(OPENMP:%=-Xcompiler %) -lcublasLt -lm $(LDFLAGS)

run: dspark     ## build, and let the small model solve a problem; colours show who made each token
	./dspark --chat --show --stats -t .6 -n 120 -p "John buys 10 packs of magic cards. Each pack has 20 cards and 1/4 of \
	those cards are uncommon. How many uncommon cards did he get?"

# Tests print TAP, programs and scripts alike. prove runs them, or these few lines.
RUN_TESTS = if command -v prove >/dev/null; then OMP_WAIT_POLICY=passive prove -j$(JOBS) --exec '' $(2) $(1); else passed=0 failed=0; \
  for t in $(1) $(2); do echo "== $$t"; $$t > build/tap 2>&1; status=$$?; cat build/tap; \
    bad=$$(grep -c '^not ok' build/tap); passed=$$((passed + $$(grep -c '^ok' build/tap))); \
    if [ $$status -ne 0 ] && [ $$bad -eq 0 ]; then echo "not ok - $$t: exit status $$status"; bad=1; fi; \
    failed=$$((failed + bad)); done; echo "$$passed passed, $$failed failed"; [ $$failed -eq 0 ]; fi

test: dspark $(TESTS:%=build/tests/%)       ## all tests
	@$(call RUN_TESTS,$(TESTS:%=build/tests/%),$(SHELL_TESTS))

# The CUDA backend without CUDA: its kernels as threads on the host (tests/cuda_host.h). Where there is a device, on it too.
HOST_CUDA = -std=c++17 -O2 -g1 -ffp-contract=off -DDSPARK_CUDA_HOST -I. -Itests $(WARN) -Werror -Wno-unknown-pragmas
build/tests/cuda_host.o: dspark_cuda.cu tests/cuda_host.h dspark.h
	@mkdir -p $(@D)
	$(CXX) $(HOST_CUDA) -x c++ -c dspark_cuda.cu -o $@

CUDA_TESTS = cuda cuda_shape
build/tests/cuda_shape build/asan/cuda_shape: tools/synth.h

$(CUDA_TESTS:%=build/tests/%): build/tests/%: tests/%.c build/tests/cuda_host.o $(HEADERS)
	$(CC) $(STD) -O1 -g1 $(WARN) -Werror -DDSPARK_CUDA_HOST -I. -Itests -c $< -o $@.o
	$(CXX) $@.o build/tests/cuda_host.o -o $@ -lm

$(CUDA_TESTS:%=build/tests/%_device): build/tests/%_device: tests/%.c build/dspark_cuda.o $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(STD) -O1 -g1 $(WARN) -Werror -I. -Itests -c $< -o $@.o
	$(NVCC) $@.o build/dspark_cuda.o -o $@ -lcublasLt -lm

build/tests/%: tests/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(STD) -O1 -g1 $(OPENMP) $(WARN) -Werror -I. -Itests $< -o $@ -lm

build/asan/cuda_host.o: dspark_cuda.cu tests/cuda_host.h dspark.h
	@mkdir -p $(@D)
	$(CXX) $(HOST_CUDA) $(CHECKS) -x c++ -c dspark_cuda.cu -o $@

$(CUDA_TESTS:%=build/asan/%): build/asan/%: tests/%.c build/asan/cuda_host.o $(HEADERS)
	$(CC) $(STD) -O1 $(CHECKS) -DDSPARK_CUDA_HOST -I. -Itests -c $< -o $@.o
	$(CXX) $(CHECKS) $@.o build/asan/cuda_host.o -o $@ -lm

build/tests/calibrate build/asan/calibrate: tools/calibrate.c bench/bench.h

asan: build/asan/dspark $(TESTS:%=build/asan/%)     ## the same under AddressSanitizer and UBSan
	@export DSPARK=build/asan/dspark; $(call RUN_TESTS,$(TESTS:%=build/asan/%),tests/driver.sh)

build/asan/dspark: main.c dspark.h
	@mkdir -p $(@D)
	$(CC) $(STD) -O1 $(OPENMP) $(CHECKS) main.c -o $@ -lm

build/asan/%: tests/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(STD) -O1 $(OPENMP) $(CHECKS) -I. -Itests $< -o $@ -lm

soak: build/soak      ## 10,000 requests, up to 256 at once: is each text the one it has alone? some minutes
	build/soak

build/soak: tests/soak.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(STD) -O2 $(OPENMP) $(WARN) -Werror -I. -Itests $< -o $@ -lm

fuzz: $(FUZZERS:%=fuzz-%)       ## every target of tests/fuzz for FUZZ_SECONDS (60); needs clang
FUZZ_SECONDS ?= 60

# Seeds: tests/fuzz/NAME/. Found: build/fuzz/NAME/, crashes NAME-*.
fuzz-%: build/fuzz/%.exe
	@mkdir -p build/fuzz/$*
	$< -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=build/fuzz/$*- build/fuzz/$* $(wildcard tests/fuzz/$*)

build/fuzz/%.exe: tests/fuzz/%.c $(HEADERS)
	@mkdir -p $(@D)
	clang $(STD) -O1 -fsanitize=fuzzer $(CHECKS) -I. -Itests $< -o $@ -lm

bench: $(BENCHES:%=build/bench/%) build/tools/synth     ## speed, memory, quality against what is promised: a table, and a CSV
	@bench/run.sh

bench-%: build/bench/%
	$<

build/bench/%: bench/%.c $(HEADERS) $(wildcard bench/*.h)
	@mkdir -p $(@D)
	$(CC) $(STD) $(CFLAGS) $(OPENMP) $(WARN) -I. $< -o $@ -lm

# CORPUS: lines of JSON as bench/README.md says. What comes out is in build/calibrate.
calibrate: build/tools/calibrate    ## fit and judge the small model's confidences on CORPUS=corpus.jsonl.xz
	@test -f "$(CORPUS)" || { echo "make calibrate CORPUS=corpus.jsonl.xz: expected a file, found '$(CORPUS)'" >&2; exit 2; }
	@mkdir -p build/calibrate
	python3 bench/heldout.py $(CORPUS) train 3000 > build/calibrate/fit.jsonl
	python3 bench/heldout.py $(CORPUS) heldout 3000 > build/calibrate/heldout.jsonl
	$< tools/spark-tiny/model build/calibrate/fit.jsonl build/calibrate/heldout.jsonl build/calibrate

build/tools/%: tools/%.c bench/bench.h $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(STD) $(CFLAGS) $(OPENMP) $(WARN) -I. $< -o $@ -lm

build/tools/synth: tools/synth.c tools/synth.h
	@mkdir -p $(@D)
	$(CC) $(STD) $(CFLAGS) $(WARN) $< -o $@ -lm

build/bench/dspark_cuda.o: dspark_cuda.cu dspark.h
	@mkdir -p $(@D)
	$(NVCC) $(NVFLAGS) -DDSPARK_CUDA_TIMED -c dspark_cuda.cu -o $@

build/bench/cuda: bench/cuda.c bench/bench.h tools/synth.h build/bench/dspark_cuda.o $(HEADERS)
	$(CC) $(STD) $(CFLAGS) $(WARN) -I. -c bench/cuda.c -o $@.o
	$(NVCC) $@.o build/bench/dspark_cuda.o -o $@ -lcublasLt -lm

SANITIZER ?= compute-sanitizer
sanitize-cuda:      ## the CUDA backend under compute-sanitizer, memcheck and racecheck, on the small model; needs a device
	@if ! command -v $(SANITIZER) >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then \
	  echo "skipped: there is no $(SANITIZER), or no CUDA device"; exit 0; fi; \
	$(MAKE) cuda && for t in memcheck racecheck; do \
	  for how in --compare "--verify rejection -t .8 --top-k 40 --top-p .9 --min-p .01 --schedule block"; do \
	    head -c 400 README.md | $(SANITIZER) --tool $$t --error-exitcode 1 ./dspark --backend cuda $$how -n 24 -p - || exit 1; done; done

clean:      ## remove what was built
	rm -rf build dspark

help:       ## this list
	@sed -n 's/^\([a-z-]*\):.*## */  make \1	/p' Makefile

.PHONY: run cuda sanitize-cuda test asan soak fuzz bench calibrate clean help
.PRECIOUS: build/fuzz/%.exe build/bench/%
