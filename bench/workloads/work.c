/*
 * `work`: the measured programs of the bench, in one static binary that runs unchanged on the host (in a chroot) and
 * in a guest.
 *
 *   work NAME             run a built-in workload and print its result line
 *   work run [...] -- CMD  the same for an external command (see run.c)
 *   work generate DIR      write the input files, the same on every machine
 *   work now               the monotonic clock in ns (inside a guest: time since its kernel took its clock up)
 */
#define _GNU_SOURCE
#include "work.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

uint64_t hash_bytes(uint64_t h, const void *p, size_t n)
{
    const unsigned char *b = p;
    while (n--) {
        h ^= *b++;
        h *= 0x100000001b3ull;
    }
    return h;
}

uint64_t rng(uint64_t *s)
{
    uint64_t x = *s;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *s = x;
    return x * 0x2545f4914f6cdd1dull;
}

_Noreturn void fail(const char *what)
{
    const char *row = getenv("ROW");
    printf("row=%s error=%s\n", row ? row : "?", what);
    fflush(stdout);
    exit(1);
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static int report(const char *name, uint64_t *t, unsigned n, uint64_t ops, uint64_t sum)
{
    uint64_t first = t[0];
    qsort(t, n, sizeof *t, by_value);
    /* Times of one operation in ns with two decimals, so that cheap operations keep their digits. */
    printf("row=%s ns=%.2f med=%.2f first=%.2f reps=%u sum=%016llx\n", name, (double)t[0] / (double)ops,
           (double)t[n / 2] / (double)ops, (double)first / (double)ops, n, (unsigned long long)sum);
    return fflush(stdout) ? 1 : 0;
}

int measure(const char *name, struct plan plan, const struct work *w)
{
    uint64_t t[MOST_REPS], sum = 0, spent = 0;
    unsigned n = 0;
    if (plan.most > MOST_REPS)
        plan.most = MOST_REPS;
    while (n < plan.most && (n < plan.least || spent < plan.budget_ns)) {
        if (plan.before)
            plan.before();
        uint64_t start = now_ns(), s = w->body();
        t[n] = now_ns() - start;
        if (w->check)
            s = w->check();
        if (n && s != sum)
            fail("checksum-differs-between-repetitions");
        sum = s;
        spent += t[n++];
    }
    return report(name, t, n, w->ops, sum);
}

int main(int argc, char **argv)
{
    static const struct work *const tables[] = {kernel_works, compute_works};
    if (argc < 2) {
        fprintf(stderr, "usage: work NAME | run … | generate DIR | now\n");
        return 2;
    }
    if (!strcmp(argv[1], "now")) {
        printf("%llu\n", (unsigned long long)now_ns());
        return 0;
    }
    if (!strcmp(argv[1], "run"))
        return run_command(argc - 1, argv + 1);
    if (!strcmp(argv[1], "generate"))
        return generate(argc - 1, argv + 1);
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        for (const struct work *w = tables[i]; w->name; w++)
            if (!strcmp(argv[1], w->name)) {
                struct plan plan = {3, 15, 1500000000ull, NULL};
                const char *row = getenv("ROW");
                if (w->prepare)
                    w->prepare();
                return measure(row ? row : w->name, plan, w);
            }
    fail("no-such-workload");
}
