/* How far numbers are from those they should be. A NaN is farther than any number. */
#ifndef NEAR_H
#define NEAR_H
#include <math.h>
#include <stddef.h>

#define NEAR static __attribute__((unused))

/* Of two errors the larger: not fmax, which drops a NaN. */
NEAR double worse(double a, double b) { return a != a || b <= a ? a : b; }

/* How far a is from b, as a share of b. */
NEAR double relative_l2(const float *a, const float *b, size_t n) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)b[i] * (double)b[i];
    }
    return sqrt(difference / (norm > 0 ? norm : 1));
}
#endif
