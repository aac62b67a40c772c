#!/usr/bin/env bash
# run.sh [SECTION ...]: prints the table of `make bench`, which has built the programs, as markdown; all figures go to
# build/bench/results.csv. Sections: peer floor dspark drafter acceptance frontier text memory compile; default all.
# QUICK=1: a short frontier.
# A run of some sections keeps the figures of the others, if machine, commit and compiler are the same.
# What is compared runs in turn, ROUNDS (5) times, and the ratio's median counts. llama.cpp is looked for in $PEER
# (build/peer) and built there; PYTHON names a python3 with what peer/convert.py needs, else one is set up there.
# DFLASH names spark-tiny with a drafter of train_drafter.py --markov-rank 0.
# Two cores, otherwise idle, take three quarters of an hour, without building llama.cpp.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
peer=${PEER:-build/peer} rounds=${ROUNDS:-5} cc=${CC:-cc} bin=build/bench models=build/models
tiny=tools/spark-tiny/model
csv=$bin/results.csv
export OMP_WAIT_POLICY=active LC_ALL=C
mkdir -p "$bin" "$models"
found=$(mktemp "$bin/found.XXXXXX")
trap 'rm -f "$found"' EXIT

note() { echo "bench: $*" >&2; }
add() { echo "$1" >> "$found"; }                        # question,model,threads,value,low,high,unit,samples
run() { note "$*"; "$bin/$1" "${@:2}" >> "$found" || note "$1 failed"; }
field() { awk -F, -v q="$1" '$1 == q { print $4 }'; }   # a driver's figure
# The median and quartiles of the numbers on standard input, as a result
quartiles() {
    sort -g | awk -v what="$1" -v unit="$2" '{ x[NR] = $1 }
        function q(p,  at, i) { at = 1 + p * (NR - 1); i = int(at); return i < NR ? x[i] + (at - i) * (x[i + 1] - x[i]) : x[i] }
        END { if (NR) printf "%s,%.5g,%.5g,%.5g,%s,%d\n", what, q(.5), q(.25), q(.75), unit, NR }' >> "$found"
}

shapes() {
    [ -f $models/s118/model.safetensors ] || build/tools/synth $models/s118 >&2
    [ -f $models/s30/model.safetensors ] ||
        build/tools/synth $models/s30 hidden_size=256 moe_intermediate_size=128 num_attention_heads=8 head_dim=64 qk_rope_head_dim=32 \
            q_lora_rank=128 o_lora_rank=128 index_n_heads=4 index_head_dim=64 >&2
}
directory() { [ "$1" = spark-tiny ] && echo $tiny || echo "$models/$1"; }

# ---- llama.cpp: why_not says why it could not be measured

why_not=
needs='import torch, safetensors, transformers, numpy, yaml, tqdm'
peer_python() {
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null || { why_not="no python3"; return 1; }
    "$python" -c "$needs" 2>/dev/null && return
    python=$peer/venv/bin/python
    "$python" -c "$needs" 2>/dev/null && return
    note "python packages for the conversion go to $peer/venv"
    { python3 -m venv "$peer/venv" && "$python" -m pip install -q torch safetensors transformers numpy pyyaml tqdm; } \
        >"$bin/peer.log" 2>&1 || { why_not="no python with torch, safetensors and transformers"; return 1; }
}
peer_ready() {
    command -v cmake >/dev/null && command -v ninja >/dev/null || { why_not="cmake or ninja is missing"; return 1; }
    mkdir -p "$peer"
    bench/peer/build.sh "$peer" 2>"$bin/peer.log" >&2 || { why_not="building llama.cpp failed ($bin/peer.log)"; return 1; }
    peer_python || return 1
    for name in s118 s30 spark-tiny; do
        local dir gguf=$models/$name.gguf
        dir=$(directory $name)
        [ "$gguf" -nt "$dir/model.safetensors" ] && continue
        "$python" bench/peer/convert.py "$peer" "$dir" "$gguf.part" >"$bin/peer.log" 2>&1 && mv "$gguf.part" "$gguf" ||
            { why_not="the conversion of $name failed ($bin/peer.log)"; return 1; }
    done
}

# One run of llama-bench: decode and prefill, tokens/s
peer_speed() {
    "$peer/build/bin/llama-bench" -m "$models/$1.gguf" -t "$2" -d 256 -p 512 -n 32 -r 2 -o csv 2>/dev/null | awk -F'","' '
        NR == 1 { n = split($0, name, ","); for (i = 1; i <= n; i++) at[name[i]] = i; next }
        { gsub(/"$/, "") } $at["n_gen"] > 0 { decode = $at["avg_ts"] } $at["n_prompt"] > 0 { prefill = $at["avg_ts"] }
        END { print decode, prefill }'
}

speeds() {      # model, threads
    local name=$1 threads=$2 dir ours d p pd pp
    local lists; lists=$(mktemp -d)
    dir=$(directory "$name")
    note "speed $name, $threads threads, ${why_not:+alone (}${why_not:-in turn with llama.cpp}${why_not:+)}"
    for _ in $(seq "$rounds"); do
        ours=$($bin/speed "$dir" "$threads")
        d=$(field decode <<< "$ours") p=$(field prefill <<< "$ours")
        echo "$d" >> $lists/decode; echo "$p" >> $lists/prefill
        awk -v a="$p" -v b="$d" 'BEGIN { print a / b }' >> $lists/ratio
        [ -n "$why_not" ] && continue
        read -r pd pp <<< "$(peer_speed "$name" "$threads")"
        echo "$pd" >> $lists/peer_decode; echo "$pp" >> $lists/peer_prefill
        awk -v a="$d" -v b="$pd" 'BEGIN { if (b > 0) print a / b }' >> $lists/over_decode
        awk -v a="$p" -v b="$pp" 'BEGIN { if (b > 0) print a / b }' >> $lists/over_prefill
    done
    quartiles "decode,$name,$threads" tokens/s < $lists/decode
    quartiles "prefill,$name,$threads" tokens/s < $lists/prefill
    quartiles "prefill over decode,$name,$threads" x < $lists/ratio
    if [ -z "$why_not" ]; then
        quartiles "llama.cpp decode,$name,$threads" tokens/s < $lists/peer_decode
        quartiles "llama.cpp prefill,$name,$threads" tokens/s < $lists/peer_prefill
        quartiles "decode over llama.cpp,$name,$threads" x < $lists/over_decode
        quartiles "prefill over llama.cpp,$name,$threads" x < $lists/over_prefill
    fi
    rm -r "$lists"
}

section_peer() {
    peer_ready || note "llama.cpp: not measured: $why_not"
    speeds s118 1; speeds s30 1; speeds spark-tiny 1; speeds spark-tiny 2; speeds s118 2; speeds s30 2
}
section_floor() { run floor $models/s118 1; run floor $models/s118 2; run floor $models/s30 1; run floor $tiny 1; }
section_dspark() { run dspark $tiny bench/heldout.jsonl 2; }
section_drafter() { run drafter $tiny bench/heldout.jsonl 1; }
section_acceptance() { run acceptance $tiny "${DFLASH:--}" bench/heldout.jsonl 1; }
section_frontier() { for t in 0 1; do run frontier $tiny bench/heldout.jsonl 2 $t "${QUICK:-0}"; done; }
section_text() { run text $tiny bench/heldout.jsonl 1; }
section_memory() { for dir in $tiny $models/s118 $models/s30; do run memory $dir 1; done; }
section_compile() {     # processor time, which is the wall's on an idle machine
    local TIMEFORMAT='%U %S'
    printf '#define DSPARK_IMPLEMENTATION\n#include "dspark.h"\n' > "$bin/compile.c"
    for compiler in gcc clang; do
        command -v $compiler >/dev/null || continue
        for part in "" " of layer 1"; do
            for _ in 1 2 3; do
                { time $compiler -std=c11 -O2 ${part:+-DDSPARK_NO_MODEL} -I. -c "$bin/compile.c" -o "$bin/compile.o" 2>/dev/null; } 2>&1
            done | awk '{ print $1 + $2 }' | quartiles "compile time$part,$compiler,1" s
        done
    done
    rm -f "$bin"/compile.[co]
}

# ---- the table: what, which results (a regular expression), model, threads, bound

claims() { cat <<'CLAIMS'
plain decode over llama.cpp, 118.7 M shape, one thread|decode over llama.cpp|s118|1|>= 2.0
plain decode over llama.cpp, 30.9 M shape, one thread|decode over llama.cpp|s30|1|>= 2.5
plain decode of the 118.7 M shape, share of the floor, one thread|decode share of floor|s118|1|>= 60
the same, two threads|decode share of floor|s118|2|>= 45
verification of 2 to 6 rows over its floor, 118.7 M shape|verify [2-6] over floor|s118|1|<= 1.3
the same, 30.9 M shape|verify [2-6] over floor|s30|1|<= 1.3
plain decode over llama.cpp, spark-tiny, two threads|decode over llama.cpp|spark-tiny|2|>= 2.0
DSpark over plain, temperature 0, math, two threads|dspark/plain math t0|spark-tiny|2|>= 1.5
DSpark over plain, the worst domain, temperatures 0 and 1|dspark/plain (math\|code\|chat\|story) t[01]|spark-tiny|2|>= 0.98
DSpark over plain, random bytes|dspark/plain random bytes t[01]|spark-tiny|2|>= 0.98
prefill over plain decode, two threads|prefill over decode|.*|2|>= 3.0
the same, one thread|prefill over decode|.*|1|>= 3.0
prefill over llama.cpp, two threads|prefill over llama.cpp|.*|2|>= 1.0
the same, one thread|prefill over llama.cpp|.*|1|>= 1.0
texts equal with and without DSpark, temperatures 0, 0.7 and 1|equal texts|spark-tiny|2|>= 100
resident beyond weights and session|resident over weights and session|.*|1|<= 32
compile time of the header, gcc -O2|compile time|gcc|1|<= 5.0
the same, clang|compile time|clang|1|<= 5.0
compile time of layer 1 alone, gcc and clang -O2|compile time of layer 1|.*|1|<= 0.5
spark-tiny: held-out bits a byte, mean of domains|bits a byte mean|spark-tiny|1|<= 1.9
its drafter: tau, whole block, temperature 0, mean of domains|tau mean|spark-tiny|1|>= 2.5
tau, math|tau math|spark-tiny|1|>= 3.0
tau at depth 512 over tau, mean of domains|tau mean at 512 over tau|spark-tiny|1|>= 1.0
tau at temperature 1, DSpark over the drafter without a Markov head|dspark over dflash (coupled\|rejection)|spark-tiny|1|>= 1.1
throughput, scheduler over plain, 1 to 256 requests at once|scheduler over plain t0 .*|spark-tiny|2|>= 0.98
the same, one request|scheduler over plain t0 1|spark-tiny|2|>= 1.3
the same, 2 to 8, over the passes-only bound|scheduler over bound t0 [248]|spark-tiny|2|>= 0.9
throughput, scheduler over the best fixed length|scheduler over best fixed t0 .*|spark-tiny|2|>= 0.97
learned profile over measured, after 50 steps|learned over measured t0 .*|spark-tiny|2|>= 0.97
temperature 1: scheduler over plain|scheduler over plain t1 .*|spark-tiny|2|>= 0.98
temperature 1: scheduler over the best fixed length|scheduler over best fixed t1 .*|spark-tiny|2|>= 0.97
temperature 1: learned profile over measured|learned over measured t1 .*|spark-tiny|2|>= 0.97
tau at depth 512 over tau, math|tau math at 512 over tau|spark-tiny|1|>= 1.0
CLAIMS
}

# The worst of the results that a claim names, with its quartiles
table() {
    echo; echo "| what | at least | measured | quartiles | |"; echo "| --- | --- | --- | --- | --- |"
    claims | sed 's/\\|/\x01/g' | while IFS='|' read -r what question model threads bound; do
        awk -F, -v what="$what" -v q="^(${question//$'\x01'/|})\$" -v m="^($model)\$" -v t="$threads" -v bound="$bound" -v why="$why_not" '
            BEGIN { split(bound, b, " "); sign = b[1] == "<=" ? 1 : -1 }
            $1 ~ q && $2 ~ m && $3 == t && (!n++ || sign * $4 > sign * worst) { worst = $4; low = $5; high = $6; unit = $7; which = $1; model = $2 }
            END {
                limit = (sign > 0 ? "at most " : "") b[2]
                if (!n) { printf "| %s | %s | not measured%s | | |\n", what, limit, q ~ /llama/ && why != "" ? ": " why : ""; exit }
                unit = unit == "x" || unit == "%" ? (unit == "x" ? "x" : " %") : " " unit
                if (n > 1) what = what " (worst: " (m ~ /\*/ ? model : which) ")"
                printf "| %s | %s%s | %.3g%s | %s | %s |\n", what, limit, unit, worst, unit, low == "" ? "" : sprintf("%.3g to %.3g", low, high),
                    sign * worst <= sign * b[2] ? "yes" : "**no**"
            }' "$found"
    done
    echo
}

for section in "$@"; do
    declare -F "section_$section" > /dev/null && continue
    echo "bench/run.sh: no section $section; bench/README.md lists them" >&2
    exit 2
done

machine=$(awk -F': ' '/model name/ { print $2; exit }' /proc/cpuinfo 2>/dev/null)
machine="${machine:-$(uname -m)}; $(nproc) cores; $(awk '/MemTotal/ { printf "%.0f GB", $2 / 1e6 }' /proc/meminfo)"
commit=${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
flags="$($cc --version | head -1 | tr , ' '); -std=c11 ${CFLAGS:--O2}"
echo "Machine: $machine; load $(cut -d' ' -f1-2 /proc/loadavg) at the start. Commit $commit. $flags"
shapes
for section in ${*:-peer floor dspark drafter acceptance frontier text memory compile}; do "section_$section"; done
mine="${machine//,/ },$commit,$flags,"
[ $# -gt 0 ] && [ -f "$csv" ] &&        # a part: what the parts before it found stays, but for what was measured again
    awk -F, -v OFS=, -v mine="$mine" 'NR == FNR { again[$1 OFS $2 OFS $3]; next }
        index($0, mine) == 1 { $0 = substr($0, length(mine) + 1); if (!($1 OFS $2 OFS $3 in again)) print }' "$found" "$csv" > "$found.old" &&
    cat "$found.old" >> "$found"
rm -f "$found.old"
{ echo "machine,commit,flags,question,model,threads,value,low,high,unit,samples"; awk -v mine="$mine" '{ print mine $0 }' "$found"; } > "$csv"
table
echo "Load $(cut -d' ' -f1-2 /proc/loadavg) at the end. All figures: $csv"
