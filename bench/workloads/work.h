/* Shared by the files of the `work` program: one workload per function, one result line per run. */
#ifndef WORK_H
#define WORK_H
#include <stddef.h>
#include <stdint.h>

/* One repetition: does the fixed work and returns a checksum that is the same on every correct machine. */
typedef uint64_t (*body_fn)(void);

struct work {
    const char *name;
    body_fn body;
    uint64_t ops;      /* the printed time is that of one repetition divided by this */
    void (*prepare)(void);   /* once, untimed; may be NULL */
    uint64_t (*check)(void); /* after each repetition, untimed: the checksum, instead of the body's; may be NULL */
};

uint64_t now_ns(void);                                    /* CLOCK_MONOTONIC */
uint64_t hash_bytes(uint64_t h, const void *p, size_t n); /* FNV-1a, 64 bit; start with HASH_START */
#define HASH_START 0xcbf29ce484222325ull
uint64_t rng(uint64_t *state); /* xorshift64*; the state must not be 0 */
_Noreturn void fail(const char *what);

/* Repetitions: at least `least`, then until `most` or the time budget is used up; `before` each, untimed, unless NULL. */
struct plan { unsigned least, most; uint64_t budget_ns; void (*before)(void); };
enum { MOST_REPS = 64 };
/* Runs a workload by a plan and prints `row=NAME ns=MIN med=MEDIAN first=FIRST reps=N sum=HEX`. */
int measure(const char *name, struct plan plan, const struct work *w);

extern const struct work kernel_works[], compute_works[];
int run_command(int argc, char **argv); /* run.c */
int generate(int argc, char **argv);    /* generate.c */
#endif
