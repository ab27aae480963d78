/* Workloads made of user code alone: each stresses one thing a translator does to it. */
#define _GNU_SOURCE
#include "work.h"
#include <emmintrin.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *need(size_t n)
{
    void *p = aligned_alloc(4096, (n + 4095) & ~(size_t)4095);
    if (!p)
        fail("memory");
    memset(p, 0, n);
    return p;
}

/* qsort of a million ints: calls through a function pointer, unpredictable branches. */
enum { SORT_N = 1000000 };
static int *sort_from, *sort_to;
static void sort_prepare(void)
{
    uint64_t s = 1;
    sort_from = need(SORT_N * sizeof(int));
    sort_to = need(SORT_N * sizeof(int));
    for (int i = 0; i < SORT_N; i++)
        sort_from[i] = (int)rng(&s);
}
static int by_int(const void *a, const void *b)
{
    int x = *(const int *)a, y = *(const int *)b;
    return (x > y) - (x < y);
}
static uint64_t sort_body(void)
{
    memcpy(sort_to, sort_from, SORT_N * sizeof(int));
    qsort(sort_to, SORT_N, sizeof(int), by_int);
    uint64_t h = HASH_START;
    for (int i = 0; i < SORT_N; i += 997)
        h = hash_bytes(h, sort_to + i, sizeof(int));
    return h;
}

/* Pointer chase: each load's address comes from the load before. */
struct node { struct node *next; uint64_t pad[7]; };
enum { CHASE_BIG = 12 << 20, CHASE_SMALL = 1 << 20, CHASE_STEPS = 3000000, CHASE_SMALL_STEPS = 10000000 };
static struct node *chase_start;
static void chase_make(size_t bytes)
{
    size_t n = bytes / sizeof(struct node);
    struct node *nodes = need(bytes);
    uint32_t *order = need(n * sizeof *order);
    uint64_t s = 2;
    for (size_t i = 0; i < n; i++)
        order[i] = (uint32_t)i;
    for (size_t i = n - 1; i; i--) {
        size_t j = rng(&s) % (i + 1);
        uint32_t t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
    for (size_t i = 0; i < n; i++) {
        nodes[order[i]].next = &nodes[order[(i + 1) % n]];
        nodes[order[i]].pad[0] = i;
    }
    chase_start = nodes + order[0];
}
static void chase_big(void) { chase_make(CHASE_BIG); }
static void chase_small(void) { chase_make(CHASE_SMALL); }
static uint64_t chase(unsigned steps)
{
    const struct node *p = chase_start;
    while (steps--)
        p = p->next;
    return p->pad[0];
}
static uint64_t chase_body(void) { return chase(CHASE_STEPS); }
static uint64_t chase_small_body(void) { return chase(CHASE_SMALL_STEPS); }

/* Recursive calls. */
static __attribute__((noinline)) unsigned fib(unsigned n)
{
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}
static volatile unsigned fib_n = 32;
static uint64_t fib_body(void) { return fib(fib_n); }

/* Calls through a table of pointers, picked by data. */
typedef uint64_t (*step_fn)(uint64_t);
static __attribute__((noinline)) uint64_t step_a(uint64_t x) { return x * 5 + 1; }
static __attribute__((noinline)) uint64_t step_b(uint64_t x) { return x ^ (x >> 7); }
static __attribute__((noinline)) uint64_t step_c(uint64_t x) { return x + (x << 3); }
static __attribute__((noinline)) uint64_t step_d(uint64_t x) { return ~x; }
static step_fn volatile steps[4] = {step_a, step_b, step_c, step_d};
static uint64_t indirect_body(void)
{
    uint64_t x = 88172645463325252ull;
    for (int i = 0; i < 10000000; i++)
        x = steps[(x >> 11) & 3](x) + (uint64_t)i;
    return x;
}

/* Matrix product, two doubles at a time. */
enum { MAT = 320 };
static double *mat_a, *mat_b, *mat_c;
static void mat_prepare(void)
{
    uint64_t s = 3;
    mat_a = need(MAT * MAT * sizeof(double));
    mat_b = need(MAT * MAT * sizeof(double));
    mat_c = need(MAT * MAT * sizeof(double));
    for (int i = 0; i < MAT * MAT; i++) {
        mat_a[i] = (double)(int32_t)rng(&s) * 0x1p-31;
        mat_b[i] = (double)(int32_t)rng(&s) * 0x1p-31;
    }
}
static uint64_t mat_body(void)
{
    memset(mat_c, 0, MAT * MAT * sizeof(double));
    for (int i = 0; i < MAT; i++)
        for (int k = 0; k < MAT; k++) {
            __m128d a = _mm_set1_pd(mat_a[i * MAT + k]);
            for (int j = 0; j < MAT; j += 4) {
                __m128d c0 = _mm_load_pd(mat_c + i * MAT + j), c1 = _mm_load_pd(mat_c + i * MAT + j + 2);
                c0 = _mm_add_pd(c0, _mm_mul_pd(a, _mm_load_pd(mat_b + k * MAT + j)));
                c1 = _mm_add_pd(c1, _mm_mul_pd(a, _mm_load_pd(mat_b + k * MAT + j + 2)));
                _mm_store_pd(mat_c + i * MAT + j, c0);
                _mm_store_pd(mat_c + i * MAT + j + 2, c1);
            }
        }
    return hash_bytes(HASH_START, mat_c, MAT * MAT * sizeof(double));
}

/* Scalar floating point: five bodies under gravity. */
struct body { double x, y, z, vx, vy, vz, m; };
static uint64_t fp_body(void)
{
    struct body b[5] = {
        {0, 0, 0, 0, 0, 0, 39.5},
        {4.8, -1.2, -0.1, 0.6, 2.8, -0.02, 0.04},
        {8.3, 4.1, -0.4, -1.0, 1.8, 0.008, 0.01},
        {12.9, -15.1, -0.2, 1.1, 0.9, -0.01, 0.002},
        {15.4, -25.9, 0.2, 1.0, 0.6, -0.03, 0.002},
    };
    const double dt = 0.01;
    for (int step = 0; step < 900000; step++) {
        for (int i = 0; i < 5; i++)
            for (int j = i + 1; j < 5; j++) {
                double dx = b[i].x - b[j].x, dy = b[i].y - b[j].y, dz = b[i].z - b[j].z;
                double d2 = dx * dx + dy * dy + dz * dz, f = dt / (d2 * sqrt(d2));
                b[i].vx -= dx * b[j].m * f;
                b[i].vy -= dy * b[j].m * f;
                b[i].vz -= dz * b[j].m * f;
                b[j].vx += dx * b[i].m * f;
                b[j].vy += dy * b[i].m * f;
                b[j].vz += dz * b[i].m * f;
            }
        for (int i = 0; i < 5; i++) {
            b[i].x += dt * b[i].vx;
            b[i].y += dt * b[i].vy;
            b[i].z += dt * b[i].vz;
        }
    }
    return hash_bytes(HASH_START, b, sizeof b);
}

/* x87: long double, 80-bit results. */
static uint64_t x87_body(void)
{
    volatile long double seed = 1.0L;
    long double x = seed, y = 0.5L;
    for (int i = 1; i < 2000000; i++) {
        x = x * 1.0000001L + y / (long double)i;
        y = sqrtl(x) - y * 0.25L;
    }
    uint64_t h = hash_bytes(HASH_START, &x, 10);
    return hash_bytes(h, &y, 10);
}

/* memcpy of 64 MiB, eight times, to and fro. */
enum { COPY = 64 << 20 };
static unsigned char *copy_a, *copy_b;
static void copy_prepare(void)
{
    uint64_t s = 4;
    copy_a = need(COPY);
    copy_b = need(COPY);
    for (size_t i = 0; i < COPY; i += 4096) {
        uint64_t r = rng(&s);
        memcpy(copy_a + i, &r, 8);
    }
}
static uint64_t copy_body(void)
{
    void *(*volatile copy)(void *, const void *, size_t) = memcpy;
    uint64_t h = HASH_START;
    for (int i = 0; i < 4; i++) {
        copy(copy_b, copy_a, COPY);
        copy(copy_a, copy_b, COPY);
    }
    for (size_t i = 0; i < COPY; i += 65536)
        h = hash_bytes(h, copy_b + i, 8);
    return h;
}

/* A byte-code machine: one switch, an indirect jump per operation. It counts primes by trial division. */
enum { OP_SET, OP_ADD, OP_MUL, OP_MOD, OP_LT, OP_JZ, OP_JMP, OP_INC, OP_MOV, OP_END };
static uint64_t vm_body(void)
{
    static const unsigned char code[] = {
        /*  0 */ OP_SET, 0, 2,   /* r0 = candidate */
        /*  3 */ OP_SET, 2, 0,   /* r2 = primes */
        /*  6 */ OP_SET, 1, 2,   /* next: r1 = divisor */
        /*  9 */ OP_MOV, 3, 1,   /* test: r3 = r1 * r1 */
        /* 12 */ OP_MUL, 3, 1,
        /* 15 */ OP_MOV, 4, 0,
        /* 18 */ OP_LT, 4, 3,    /* r4 = r0 < r3 */
        /* 21 */ OP_JZ, 4, 29,
        /* 24 */ OP_INC, 2, 0,   /* prime */
        /* 27 */ OP_JMP, 43,
        /* 29 */ OP_MOV, 5, 0,
        /* 32 */ OP_MOD, 5, 1,
        /* 35 */ OP_JZ, 5, 43,   /* divisible */
        /* 38 */ OP_INC, 1, 0,
        /* 41 */ OP_JMP, 9,
        /* 43 */ OP_INC, 0, 0,   /* following candidate */
        /* 46 */ OP_MOV, 4, 0,
        /* 49 */ OP_LT, 4, 6,
        /* 52 */ OP_JZ, 4, 57,
        /* 55 */ OP_JMP, 6,
        /* 57 */ OP_END,
    };
    volatile uint64_t limit = 70000;
    uint64_t r[8] = {0, 0, 0, 0, 0, 0, limit, 0}, turns = 0;
    for (size_t pc = 0;;) {
        const unsigned char *c = code + pc;
        turns++;
        switch (c[0]) {
        case OP_SET: r[c[1]] = c[2]; pc += 3; break;
        case OP_ADD: r[c[1]] += r[c[2]]; pc += 3; break;
        case OP_MUL: r[c[1]] *= r[c[2]]; pc += 3; break;
        case OP_MOD: r[c[1]] = (uint32_t)r[c[1]] % (uint32_t)r[c[2]]; pc += 3; break;
        case OP_LT: r[c[1]] = r[c[1]] < r[c[2]]; pc += 3; break;
        case OP_JZ: pc = r[c[1]] ? pc + 3 : c[2]; break;
        case OP_JMP: pc = c[1]; break;
        case OP_INC: r[c[1]]++; pc += 3; break;
        case OP_MOV: r[c[1]] = r[c[2]]; pc += 3; break;
        default: return r[2] * 1000000007ull + turns;
        }
    }
}

const struct work compute_works[] = {
    {"qsort", sort_body, 1, sort_prepare, NULL},
    {"chase", chase_body, 1, chase_big, NULL},
    {"chase-l2", chase_small_body, 1, chase_small, NULL},
    {"fib", fib_body, 1, NULL, NULL},
    {"indirect", indirect_body, 1, NULL, NULL},
    {"matmul", mat_body, 1, mat_prepare, NULL},
    {"fp", fp_body, 1, NULL, NULL},
    {"x87", x87_body, 1, NULL, NULL},
    {"memcpy", copy_body, 1, copy_prepare, NULL},
    {"bytecode", vm_body, 1, NULL, NULL},
    {NULL, NULL, 0, NULL, NULL},
};
