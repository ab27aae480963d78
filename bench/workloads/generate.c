/*
 * `work generate DIR`: the input files, from a fixed pseudo-random sequence, the same on every machine.
 *   text.txt  8 MB of words and numbers in lines, compressible like prose
 *   bulk.bin  48 MB that does not compress
 *   log.txt   60,000 lines of a made-up server log
 */
#define _GNU_SOURCE
#include "work.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static FILE *make(const char *dir, const char *name)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "we");
    if (!f)
        fail(path);
    return f;
}

static void words(FILE *f, size_t size)
{
    enum { WORDS = 6000 };
    static char word[WORDS][12];
    static const char letters[] = "eeeeeetttaaaaooooiinnssshhrrrddlluuccmmffwyygpbvkxjqz";
    uint64_t s = 5;
    for (int i = 0; i < WORDS; i++) {
        int len = 2 + (int)(rng(&s) % 9);
        for (int k = 0; k < len; k++)
            word[i][k] = letters[rng(&s) % (sizeof letters - 1)];
    }
    uint64_t last = 0;
    for (size_t written = 0, column = 0; written < size;) {
        /* The square of a uniform number: few words are frequent, most are rare. */
        uint64_t u = rng(&s) % 65536, w = u * u / 65536 * WORDS / 65536;
        /* Phrases: half of the words follow from the one before. */
        if (rng(&s) & 1)
            w = (last * 7 + 5) % WORDS;
        last = w;
        int n = fprintf(f, "%s%s", word[w], column > 70 ? "\n" : rng(&s) % 12 ? " " : ", ");
        if (n < 0)
            fail("write");
        column = column > 70 ? 0 : column + (size_t)n;
        written += (size_t)n;
    }
}

int generate(int argc, char **argv)
{
    if (argc != 2)
        fail("usage");
    uint64_t s = 6;
    FILE *f = make(argv[1], "text.txt");
    words(f, 8000000);
    if (fclose(f))
        fail("write");

    f = make(argv[1], "bulk.bin");
    for (int i = 0; i < 48000000 / 8; i++) {
        uint64_t r = rng(&s);
        if (fwrite(&r, 8, 1, f) != 1)
            fail("write");
    }
    if (fclose(f))
        fail("write");

    f = make(argv[1], "log.txt");
    static const char *const verbs[] = {"GET", "GET", "GET", "POST", "HEAD", "PUT"};
    for (int i = 0; i < 60000; i++) {
        uint64_t r = rng(&s);
        fprintf(f, "10.%u.%u.%u - - [%02u/Nov/2026:%02u:%02u:%02u] \"%s /p/%u.html\" %u %u\n", (unsigned)(r & 3),
                (unsigned)(r >> 8 & 255), (unsigned)(r >> 16 & 63), (unsigned)(1 + i / 2500), (unsigned)(i / 100 % 24),
                (unsigned)(r >> 24 & 63) % 60, (unsigned)(r >> 32 & 63) % 60, verbs[(r >> 40) % 6],
                (unsigned)(r >> 20) % 900, (r >> 44) % 11 ? 200u : 404u, (unsigned)(r >> 47));
    }
    return fclose(f) ? 1 : 0;
}
