/*
 * `work run [-n MOST] [-p SCRIPT] [-i STDIN] [-o OUTFILE] -- CMD ARGS…`: an external command as a workload. With -p, sh runs the
 * script before each repetition, outside the measured time. The time is from before vfork to after wait; the checksum is over the command's standard output and, with -o, over a file it wrote (read
 * outside the measured time). Standard error goes to the console, which must stay quiet on success.
 */
#define _GNU_SOURCE
#include "work.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static struct { char **argv; const char *in, *out, *prepare; } command = {NULL, "/dev/null", NULL, NULL};

static char out_path[4096];

static uint64_t hash_fd(uint64_t h, int fd)
{
    static unsigned char buffer[65536];
    ssize_t n;
    while ((n = read(fd, buffer, sizeof buffer)) != 0) {
        if (n < 0) {
            if (errno == EINTR)
                continue;
            fail("read");
        }
        /* Eight bytes a step: the hash must not be what is measured. */
        size_t i = 0, len = (size_t)n;
        for (; i + 8 <= len; i += 8) {
            uint64_t w;
            memcpy(&w, buffer + i, 8);
            h = (h ^ w) * 0x9e3779b97f4a7c15ull;
            h ^= h >> 29;
        }
        h = hash_bytes(h, buffer + i, len - i);
    }
    return h;
}

static uint64_t command_body(void)
{
    int status, in = open(command.in, O_RDONLY | O_CLOEXEC);
    int out = open(out_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (in < 0)
        fail("stdin");
    if (out < 0)
        fail("stdout");
    pid_t child = vfork();
    if (child < 0)
        fail("vfork");
    if (!child) {
        dup2(in, 0);
        dup2(out, 1);
        execvp(command.argv[0], command.argv);
        _exit(127);
    }
    if (waitpid(child, &status, 0) != child)
        fail("wait");
    if (!WIFEXITED(status) || WEXITSTATUS(status))
        fail(WIFSIGNALED(status) ? "killed-by-signal" : WEXITSTATUS(status) == 127 ? "not-found" : "exit-status");
    close(in);
    close(out);
    return 0;
}

static void prepare(void)
{
    if (!command.prepare)
        return;
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (!child) {
        /* The result line must stay alone on the standard output. */
        dup2(2, 1);
        execlp("sh", "sh", command.prepare, (char *)NULL);
        _exit(127);
    }
    int status;
    if (waitpid(child, &status, 0) != child || status)
        fail("prepare");
}

/* The outputs of the latest repetition: equal in all of them, and equal between machines. */
static uint64_t outputs(void)
{
    uint64_t h = HASH_START;
    int fd = open(out_path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        fail("output");
    h = hash_fd(h, fd);
    close(fd);
    if (command.out) {
        fd = open(command.out, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            fail("outfile");
        h = hash_fd(h, fd);
        close(fd);
    }
    return h;
}

int run_command(int argc, char **argv)
{
    struct plan plan = {2, 7, 2000000000ull, prepare};
    const char *row = getenv("ROW"), *dir = getenv("TMPDIR");
    int o;
    snprintf(out_path, sizeof out_path, "%s/work.%ld", dir ? dir : "/tmp", (long)getpid());
    while ((o = getopt(argc, argv, "+n:p:i:o:")) != -1) {
        if (o == 'n')
            plan.most = (unsigned)atoi(optarg);
        else if (o == 'p')
            command.prepare = optarg;
        else if (o == 'i')
            command.in = optarg;
        else if (o == 'o')
            command.out = optarg;
        else
            fail("usage");
    }
    command.argv = argv + optind;
    if (!*command.argv)
        fail("usage");
    if (plan.least > plan.most)
        plan.least = plan.most;

    struct work w = {"run", command_body, 1, NULL, outputs};
    int result = measure(row ? row : command.argv[0], plan, &w);
    unlink(out_path);
    return result;
}
