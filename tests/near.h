/* How far a is from b, as a share of b. */
#ifndef NEAR_H
#define NEAR_H
#include <math.h>
#include <stddef.h>

static double relative_l2(const float *a, const float *b, size_t n) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)b[i] * (double)b[i];
    }
    return sqrt(difference / (norm > 0 ? norm : 1));
}
#endif
