/*
 * `crypto NAME`: workloads on OpenSSL's library, dynamically linked like every program that uses it.
 *   aes-gcm  AES-256-GCM over 16 KiB blocks, 32 MB in all; the checksum is over the last block and the tags
 *   rsa      makes an RSA key of 3072 bits from a fixed random sequence (so the same primes are tried everywhere),
 *            signs with it and verifies; the checksum is over the modulus and the signature
 */
#define OPENSSL_SUPPRESS_DEPRECATED
#include "work.h"
#include <openssl/bn.h>
#include <openssl/evp.h>
#include <openssl/rand.h>
#include <openssl/rsa.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 16384, BLOCKS = 2000 };
static unsigned char block[BLOCK], sealed[BLOCK + 16];

static void gcm_prepare(void)
{
    uint64_t s = 7;
    for (size_t i = 0; i < BLOCK; i++)
        block[i] = (unsigned char)rng(&s);
}

static uint64_t gcm_body(void)
{
    static const unsigned char key[32] = "a key of thirty-two bytes length";
    unsigned char nonce[12] = "nonce 000000", tag[16];
    uint64_t h = HASH_START;
    int n;
    EVP_CIPHER_CTX *c = EVP_CIPHER_CTX_new();
    if (!c || EVP_EncryptInit_ex(c, EVP_aes_256_gcm(), NULL, key, nonce) != 1)
        fail("cipher");
    for (int i = 0; i < BLOCKS; i++) {
        nonce[6] = (unsigned char)i;
        nonce[7] = (unsigned char)(i >> 8);
        if (EVP_EncryptInit_ex(c, NULL, NULL, NULL, nonce) != 1 || EVP_EncryptUpdate(c, sealed, &n, block, BLOCK) != 1
            || EVP_EncryptFinal_ex(c, sealed + n, &n) != 1 || EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_GCM_GET_TAG, 16, tag) != 1)
            fail("encrypt");
        h = hash_bytes(h, tag, sizeof tag);
    }
    EVP_CIPHER_CTX_free(c);
    return hash_bytes(h, sealed, BLOCK);
}

static uint64_t fixed_state;
static int fixed_bytes(unsigned char *p, int n)
{
    while (n-- > 0)
        *p++ = (unsigned char)(rng(&fixed_state) >> 40);
    return 1;
}
static int fixed_status(void)
{
    return 1;
}

static uint64_t rsa_body(void)
{
    static RAND_METHOD method = {.bytes = fixed_bytes, .pseudorand = fixed_bytes, .status = fixed_status};
    static const unsigned char message[] = "the same work on every machine";
    unsigned char signature[384], modulus[384];
    size_t size = sizeof signature;
    uint64_t h;
    fixed_state = 9;
    RAND_set_rand_method(&method);
    EVP_PKEY *key = EVP_RSA_gen(3072);
    BIGNUM *n = NULL;
    EVP_MD_CTX *m = EVP_MD_CTX_new();
    if (!key || !m || EVP_PKEY_get_bn_param(key, "n", &n) != 1 || BN_bn2binpad(n, modulus, sizeof modulus) < 0)
        fail("key");
    if (EVP_DigestSignInit(m, NULL, EVP_sha256(), NULL, key) != 1
        || EVP_DigestSign(m, signature, &size, message, sizeof message) != 1)
        fail("sign");
    EVP_MD_CTX_reset(m);
    if (EVP_DigestVerifyInit(m, NULL, EVP_sha256(), NULL, key) != 1
        || EVP_DigestVerify(m, signature, size, message, sizeof message) != 1)
        fail("verify");
    h = hash_bytes(hash_bytes(HASH_START, modulus, sizeof modulus), signature, size);
    BN_free(n);
    EVP_MD_CTX_free(m);
    EVP_PKEY_free(key);
    return h;
}

const struct work kernel_works[] = {
    {"aes-gcm", gcm_body, 1, gcm_prepare, NULL},
    {"rsa", rsa_body, 1, NULL, NULL},
    {NULL, NULL, 0, NULL, NULL},
};
const struct work compute_works[] = {{NULL, NULL, 0, NULL, NULL}};

int run_command(int argc, char **argv)
{
    (void)argc, (void)argv;
    fail("usage");
}
int generate(int argc, char **argv)
{
    (void)argc, (void)argv;
    fail("usage");
}
