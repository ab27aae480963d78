/*
 * The small file of the `gcc` row: a tokenizer, a hash table, a sort and a little arithmetic, enough to give every pass of
 * the compiler something to do. It is also run, and prints the same on every machine.
 */
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS 1024

struct entry {
    struct entry *next;
    char *word;
    unsigned count, first;
};

static struct entry *table[SLOTS];
static unsigned entries, position;

static unsigned hash(const char *s)
{
    unsigned h = 2166136261u;
    while (*s)
        h = (h ^ (unsigned char)*s++) * 16777619u;
    return h;
}

static char *copy(const char *s)
{
    size_t n = strlen(s) + 1;
    char *p = malloc(n);
    if (!p)
        abort();
    return memcpy(p, s, n);
}

static void count(const char *word)
{
    struct entry **slot = &table[hash(word) % SLOTS], *e;
    for (e = *slot; e; e = e->next)
        if (!strcmp(e->word, word)) {
            e->count++;
            return;
        }
    e = malloc(sizeof *e);
    if (!e)
        abort();
    e->word = copy(word);
    e->count = 1;
    e->first = position++;
    e->next = *slot;
    *slot = e;
    entries++;
}

static int order(const void *a, const void *b)
{
    const struct entry *x = *(struct entry *const *)a, *y = *(struct entry *const *)b;
    if (x->count != y->count)
        return x->count < y->count ? 1 : -1;
    return strcmp(x->word, y->word);
}

static void tokenize(const char *text)
{
    char word[64];
    size_t n = 0;
    for (;; text++) {
        if (isalpha((unsigned char)*text)) {
            if (n + 1 < sizeof word)
                word[n++] = (char)tolower((unsigned char)*text);
        } else {
            if (n) {
                word[n] = 0;
                count(word);
                n = 0;
            }
            if (!*text)
                break;
        }
    }
}

enum kind { NUM, ADD, SUB, MUL, DIV, NEG };

struct node {
    enum kind kind;
    double value;
    struct node *left, *right;
};

static const char *at;

static struct node *make(enum kind kind, double value, struct node *left, struct node *right)
{
    struct node *n = malloc(sizeof *n);
    if (!n)
        abort();
    *n = (struct node){kind, value, left, right};
    return n;
}

static struct node *sum(void);

static struct node *factor(void)
{
    if (*at == '(') {
        at++;
        struct node *n = sum();
        at++;
        return n;
    }
    if (*at == '-') {
        at++;
        return make(NEG, 0, factor(), NULL);
    }
    char *end;
    double v = strtod(at, &end);
    at = end;
    return make(NUM, v, NULL, NULL);
}

static struct node *product(void)
{
    struct node *n = factor();
    while (*at == '*' || *at == '/') {
        enum kind k = *at++ == '*' ? MUL : DIV;
        n = make(k, 0, n, factor());
    }
    return n;
}

static struct node *sum(void)
{
    struct node *n = product();
    while (*at == '+' || *at == '-') {
        enum kind k = *at++ == '+' ? ADD : SUB;
        n = make(k, 0, n, product());
    }
    return n;
}

static double value(const struct node *n)
{
    switch (n->kind) {
    case NUM: return n->value;
    case ADD: return value(n->left) + value(n->right);
    case SUB: return value(n->left) - value(n->right);
    case MUL: return value(n->left) * value(n->right);
    case DIV: return value(n->left) / value(n->right);
    case NEG: return -value(n->left);
    }
    return 0;
}

static void drop(struct node *n)
{
    if (!n)
        return;
    drop(n->left);
    drop(n->right);
    free(n);
}

static void transform(double *re, double *im, int n)
{
    for (int i = 1, j = 0; i < n; i++) {
        int bit = n >> 1;
        for (; j & bit; bit >>= 1)
            j ^= bit;
        j ^= bit;
        if (i < j) {
            double t = re[i];
            re[i] = re[j];
            re[j] = t;
            t = im[i];
            im[i] = im[j];
            im[j] = t;
        }
    }
    for (int len = 2; len <= n; len <<= 1) {
        double angle = 6.283185307179586 / len, wr = cos(angle), wi = sin(angle);
        for (int i = 0; i < n; i += len) {
            double ur = 1, ui = 0;
            for (int k = 0; k < len / 2; k++) {
                int a = i + k, b = a + len / 2;
                double xr = re[b] * ur - im[b] * ui, xi = re[b] * ui + im[b] * ur;
                re[b] = re[a] - xr;
                im[b] = im[a] - xi;
                re[a] += xr;
                im[a] += xi;
                double t = ur * wr - ui * wi;
                ui = ur * wi + ui * wr;
                ur = t;
            }
        }
    }
}

int main(void)
{
    static const char text[] = "The quick brown fox jumps over the lazy dog; the dog sleeps on, the fox runs. A dog, a fox,"
                               " a quick jump: over and over the brown dog dreams of the lazy fox.";
    tokenize(text);
    struct entry **all = malloc(entries * sizeof *all);
    unsigned n = 0;
    if (!all)
        return 1;
    for (int i = 0; i < SLOTS; i++)
        for (struct entry *e = table[i]; e; e = e->next)
            all[n++] = e;
    qsort(all, n, sizeof *all, order);
    for (unsigned i = 0; i < n; i++)
        printf("%-8s %u %u\n", all[i]->word, all[i]->count, all[i]->first);
    free(all);

    static const char *const sums[] = {"1+2*3-4/8", "-(2+3)*(4-6.5)/0.25", "((((7))))-2*-3", "1/3+1/7*2.5e3"};
    for (size_t i = 0; i < sizeof sums / sizeof *sums; i++) {
        at = sums[i];
        struct node *tree = sum();
        printf("%s = %.12g\n", sums[i], value(tree));
        drop(tree);
    }

    double re[256], im[256];
    for (int i = 0; i < 256; i++) {
        re[i] = i % 17 - 8;
        im[i] = 0;
    }
    transform(re, im, 256);
    for (int i = 0; i < 256; i += 37)
        printf("%d %.9f %.9f\n", i, re[i], im[i]);
    return 0;
}
