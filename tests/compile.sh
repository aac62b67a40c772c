#!/bin/sh
# The header as each user would compile it, TAP: C11 and C++17, gcc and clang, no warning; in two objects of
# one program; static; declarations alone; layer 1 alone. README's example. The table of contents against the sections.
cd "$(dirname "$0")/.." || exit 1
dir=build/compile.$$
mkdir -p $dir && trap 'rm -rf $dir' EXIT
n=0 bad=0

# claim, then a command: its output is shown when it fails
check() {
    n=$((n + 1)) claim=$1
    shift
    if "$@" > $dir/log 2>&1; then echo "ok $n - $claim"
    else echo "not ok $n - $claim"; sed 's/^/# /' $dir/log | head -n 40; bad=$((bad + 1)); fi
}
skip() { n=$((n + 1)); echo "ok $n - $1 # SKIP $2"; }

cat > $dir/declarations.c <<'END'
#include "dspark.h"
#include "dspark.h"
int declarations(void);
int declarations(void) {
    dspark_session_desc desc;
    desc.seed = 0;
    return (int)desc.seed + (dspark_status_name(DSPARK_OK) != NULL) + (dspark_cpu_backend() != NULL);
}
END
cat > $dir/implementation.c <<'END'
#define DSPARK_IMPLEMENTATION
#include "dspark.h"
#include "dspark.h"
int declarations(void);
int main(void) { return declarations() != 2; }
END
cat > $dir/static.c <<'END'
#define DSPARK_STATIC
#define DSPARK_IMPLEMENTATION
#include "dspark.h"
int main(void) { return dspark_status_name(DSPARK_OK)[0] != 'O'; }
END
cat > $dir/algorithm.c <<'END'
#define DSPARK_NO_MODEL
#define DSPARK_IMPLEMENTATION
#include "dspark.h"
END
mkdir -p $dir/absent/sys        # a platform that has C's headers and no others
for header in fcntl unistd sys/mman sys/stat omp immintrin arm_neon; do echo '#error' > $dir/absent/$header.h; done

# a compiler, and further objects
both_objects() { "$@" $dir/declarations.o $dir/implementation.o -o $dir/both -lm && $dir/both; }
compilers() {   # a language, its standard, its compilers
    language=$1 standard=$2
    shift 2
    for cc in "$@"; do
        name="$cc -std=$standard"
        if ! command -v $cc >/dev/null; then skip "$name: all inclusions compile" "there is no $cc"; continue; fi
        rm -f $dir/*.o $dir/both        # else the compiler before this one would stand in for it
        flags="-x $language -std=$standard -O0 -I. -Wall -Wextra -Wshadow -Wconversion -Werror"
        check "$name: declarations alone, included twice, compile without a warning" \
            $cc $flags -c $dir/declarations.c -o $dir/declarations.o
        check "$name -O2: the implementation compiles without a warning" \
            $cc $flags -O2 -c $dir/implementation.c -o $dir/implementation.o
        check "$name: DSPARK_NO_STDIO compiles without a warning" \
            $cc $flags -DDSPARK_NO_STDIO -fsyntax-only $dir/implementation.c $dir/static.c
        check "$name -O2: DSPARK_NO_MODEL compiles without a warning from C's headers alone" \
            $cc $flags -O2 -I$dir/absent -c $dir/algorithm.c -o $dir/algorithm.o
        check "$name: two objects link to one program" both_objects $cc
        check "$name: DSPARK_STATIC compiles without a warning" \
            $cc $flags -Dmain=other_main -c $dir/static.c -o $dir/static.o
        check "$name: a static copy links beside the public one" \
            both_objects $cc $dir/static.o
    done
}
compilers c c11 gcc clang
compilers c++ c++17 g++ clang++

windows=x86_64-w64-mingw32-gcc
if command -v $windows >/dev/null; then
    check "$windows -O2: the implementation compiles without a warning" \
        $windows -std=c11 -O2 -I. -Wall -Wextra -Wshadow -Wconversion -Werror -c $dir/implementation.c -o $dir/windows.o
else skip "$windows -O2: the implementation compiles without a warning" "there is no $windows"; fi

# README's first example, in a function, with arrays for it.
example() {     # 1: up to the first empty line; 0: what follows
    awk -v head=$1 'on && /^```$/ { exit } /^```c$/ { on = 1; next } on && /^$/ { body = 1 } on && head != body + 0' \
        README.md
}
cat > $dir/example.c <<END
$(example 1)
enum { vocab = 50, position = 7 };
int main(void) {
    static float q[5 * vocab], logits[6 * vocab], p[6 * vocab];
    static double scratch[1024];
    float c[5] = { .95f, .99f, .90f, .98f, .40f };
    int32_t draft[5] = { 0 }, next, token;
    int length, n_accepted, plain = sizeof scratch >= dspark_schedule_scratch_bytes(1, 5), accepted = 0;
    for (uint64_t seed = 0; seed < 200; seed++) {
        for (int i = 0; i < 6 * vocab; i++) logits[i] = 6 * (float)dspark_uniform(seed, 0, 0, 0, (uint32_t)i);
        for (int i = 0; i < 5; i++) dspark_distribution(logits + i * vocab, vocab, 1, 0, 0, 0, q + i * vocab);
        {
$(example 0)
        }
        for (int i = 0; i <= n_accepted; i++) {
            dspark_draw(p + i * vocab, vocab, seed, DSPARK_DRAW_PLAIN, (uint64_t)(position + i), 0, &token);
            plain &= token == (i < n_accepted ? draft[i] : next);
        }
        plain &= length == 4, accepted += n_accepted;
    }
    printf("%d drafts accepted\\n", accepted);
    return !(plain && accepted > 100 && accepted < 800);
}
END
example_runs() { ${CC:-cc} -std=c11 -O1 -I. -Wall -Wextra -Werror $dir/example.c -o $dir/example -lm && $dir/example; }
check "README's cycle verifies four drafts and gives plain decoding's tokens" example_runs

# The manual is the comment in front; its contents name the sections in their order.
sed '/^#ifndef DSPARK__PATH/,$d' dspark.h | sed -n '/CONTENTS/,/^ *A section/p' | grep -v '^ *A section' |
    grep -o '>>[a-z-]*' > $dir/contents
sed '1,/^#ifndef DSPARK__PATH/d' dspark.h | grep -oE '^(// |   )>>[a-z-]+' | grep -o '>>.*' > $dir/sections
check "the manual's contents are the sections, in order" diff $dir/contents $dir/sections

echo "1..$n"
[ $bad -eq 0 ]
