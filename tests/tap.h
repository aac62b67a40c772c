/* Test Anything Protocol in a few lines: ok(condition, "claim"), skip("reason", "claim"), and
   `return tap_done();` at the end of main. A failure reads as the claim that does not hold. */
#ifndef TAP_H
#define TAP_H
#include <stdarg.h>
#include <stdio.h>

static int tap_count, tap_failures;

#ifdef __GNUC__
__attribute__((format(printf, 4, 5), unused))
#endif
static int tap_report(int passed, const char *file, int line, const char *claim, ...) {
    va_list args;
    va_start(args, claim);
    printf("%sok %d - ", passed ? "" : "not ", ++tap_count);
    vprintf(claim, args);
    printf("\n");
    va_end(args);
    if (!passed) {
        tap_failures++;
        printf("# at %s:%d\n", file, line);
    }
    fflush(stdout);
    return passed;
}

#define ok(condition, ...) tap_report(!!(condition), __FILE__, __LINE__, __VA_ARGS__)
#define skip(reason, claim) (printf("ok %d - %s # SKIP %s\n", ++tap_count, claim, reason), fflush(stdout))

static int tap_done(void) {
    printf("1..%d\n", tap_count);
    return tap_failures != 0;
}
#endif
