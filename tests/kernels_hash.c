/* One hash of all CPU kernels' outputs on fixed inputs, a line a path that this machine has:
   kernels_hash [-v: a line a case too]. Every line must be the same with every path, compiler and
   optimization level. */
#define DSPARK_STATIC
#define DSPARK_IMPLEMENTATION
#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#include "../dspark.h"
#include "kernels_cases.h"

int main(int argc, char **argv) {
    static kernel_case cases[MAX_KERNEL_CASES];
    for (int path = DSPARK_PATH_PLAIN; path < DSPARK_PATHS; path++) {
        const dspark__kernels *k = dspark__kernels_choose(path);
        uint64_t hash = HASH_START;
        int n = k ? kernel_cases(k, cases) : 0;
        for (int i = 0; i < n; i++) {
            for (int b = 0; b < 64; b += 8) hash = (hash ^ (cases[i].hash >> b & 255)) * 0x100000001b3u;
            if (argc > 1 && !strcmp(argv[1], "-v")) printf("%016llx %s\n", (unsigned long long)cases[i].hash, cases[i].name);
        }
        if (n) printf("%016llx %s\n", (unsigned long long)hash, k->name);
    }
    return 0;
}
