/* Integer, floating-point and x87 results in hexadecimal, of operations whose results are exactly defined. */
#include <fenv.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static uint64_t state = 77;
static uint64_t rnd(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}
static uint64_t h = 14695981039346656037ull;
static void mix(const void *p, size_t n)
{
    const unsigned char *b = p;
    while (n--)
        h = (h ^ *b++) * 1099511628211ull;
}
#define SHOW(label) printf("%-10s %016llx\n", label, (unsigned long long)h)

static sigjmp_buf jump;
static volatile int code;
static void trap(int n, siginfo_t *i, void *u)
{
    (void)u;
    code = i->si_code;
    siglongjmp(jump, n);
}

int main(void)
{
    for (int i = 0; i < 200000; i++) {
        uint64_t a = rnd(), b = rnd() | 1;
        unsigned n = (unsigned)(b >> 58);
        uint64_t r[] = {a * b, a / (b >> (a & 63) | 1), a % (b >> (a & 31) | 1), (uint64_t)((int64_t)a >> n), a << n,
                        (a << n) | (a >> (-n & 63)), (uint64_t)((unsigned __int128)a * b >> 64),
                        (uint64_t)((__int128)(int64_t)a * (int64_t)b >> 64), (uint64_t)__builtin_popcountll(a),
                        (uint64_t)__builtin_clzll(b), (uint64_t)__builtin_ctzll(b), __builtin_bswap64(a),
                        (uint64_t)((int32_t)a / (int32_t)(b >> 40 | 1)), (uint64_t)((int16_t)a * (int16_t)b)};
        mix(r, sizeof r);
    }
    SHOW("integer");
    for (int i = 0; i < 100000; i++) {
        uint64_t x = rnd(), y = rnd();
        double a, b;
        float c, d;
        memcpy(&a, &x, 8);
        memcpy(&b, &y, 8);
        memcpy(&c, &x, 4);
        memcpy(&d, &y, 4);
        double r[] = {a + b, a - b, a * b, a / b, sqrt(fabs(a)), floor(a), trunc(b), fmin(a, b), (double)c, fma(a, b, a)};
        float s[] = {c + d, c * d, c / d, sqrtf(fabsf(c)), (float)a, rintf(d)};
        for (size_t k = 0; k < sizeof r / sizeof *r; k++)
            if (r[k] == r[k]) /* the payload of a NaN depends on operand order, which is the compiler's choice */
                mix(&r[k], 8);
        for (size_t k = 0; k < sizeof s / sizeof *s; k++)
            if (s[k] == s[k])
                mix(&s[k], 4);
        int flags = (a < b) | (a > b) << 1 | (a == b) << 2 | !!isnan(a) << 3 | !!isinf(a) << 4;
        mix(&flags, sizeof flags);
        if (fabs(a) < 1e18) {
            int64_t q = (int64_t)a;
            mix(&q, 8);
        }
    }
    SHOW("float");
    static const int modes[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    for (int m = 0; m < 4; m++) {
        fesetround(modes[m]);
        feclearexcept(FE_ALL_EXCEPT);
        volatile double third = 1, x = 3;
        volatile long double l = 1, y = 7;
        third = third / x;
        l = sqrtl(l / y);
        printf("round %d %a %La %lld %d\n", m, third, l, llrint(third * 1e17), fetestexcept(FE_ALL_EXCEPT));
    }
    fesetround(FE_TONEAREST);
    for (int i = 1; i < 50000; i++) {
        volatile long double a = (long double)(int64_t)rnd(), b = (long double)(int64_t)rnd();
        long double r[] = {a + b, a * b, a / (b + 1), sqrtl(fabsl(a)), fmodl(a, b), roundl(a / 3), ldexpl(b, i % 300)};
        for (size_t k = 0; k < sizeof r / sizeof *r; k++)
            mix(&r[k], 10);
    }
    SHOW("x87");

    struct sigaction sa = {.sa_sigaction = trap, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGFPE, &sa, NULL);
    sigaction(SIGSEGV, &sa, NULL);
    sigaction(SIGILL, &sa, NULL);
    sigaction(SIGTRAP, &sa, NULL);
    volatile int zero = 0, one = 1, min = INT_MIN, minus = -1;
    int n;
    if (!(n = sigsetjmp(jump, 1)))
        one = one / zero;
    printf("divide by zero: signal %d code %d\n", n, code);
    if (!(n = sigsetjmp(jump, 1)))
        one = min / minus;
    printf("divide overflow: signal %d code %d\n", n, code);
    if (!(n = sigsetjmp(jump, 1)))
        *(volatile int *)8 = 1;
    printf("null pointer: signal %d code %d\n", n, code);
    if (!(n = sigsetjmp(jump, 1)))
        *(volatile int *)(0x8000000000000000ull + 64) = 1;
    printf("not canonical: signal %d code %d\n", n, code);
    if (!(n = sigsetjmp(jump, 1)))
        __asm__ volatile("ud2");
    printf("undefined: signal %d code %d\n", n, code);
    if (!(n = sigsetjmp(jump, 1)))
        __asm__ volatile("int3");
    printf("breakpoint: signal %d code %d\n", n, code);
    if (!(n = sigsetjmp(jump, 1)))
        __asm__ volatile("hlt");
    printf("privileged: signal %d code %d\n", n, code);
    return 0;
}
