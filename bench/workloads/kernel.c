/* Workloads made of what a kernel does: system calls, faults, switches, processes. */
#define _GNU_SOURCE
#include "work.h"
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CALLS = 20000, PAGES = 4096, TRIPS = 1000, FORKS = 100, EXECS = 30, SIGNALS = 2000, MAPS = 1000 };

static uint64_t getppid_body(void)
{
    long first = syscall(SYS_getppid), same = 0;
    for (int i = 0; i < CALLS; i++)
        same += syscall(SYS_getppid) == first;
    return (uint64_t)same;
}

static uint64_t clock_body(void)
{
    /* Through the vDSO; counts backward steps, of which there must be none. */
    uint64_t last = 0, back = 0;
    for (int i = 0; i < CALLS; i++) {
        uint64_t t = now_ns();
        back += t < last;
        last = t;
    }
    return back;
}

static uint64_t fault_body(void)
{
    size_t size = (size_t)PAGES * 4096;
    volatile unsigned char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t sum = 0;
    if (p == MAP_FAILED)
        fail("mmap");
    madvise((void *)p, size, MADV_NOHUGEPAGE);
    for (size_t i = 0; i < PAGES; i++)
        p[i * 4096 + i % 4096] = (unsigned char)i;
    for (size_t i = 0; i < PAGES; i += 64)
        sum = hash_bytes(sum, (const void *)(p + i * 4096), 256);
    munmap((void *)p, size);
    return sum;
}

static void one_cpu(void)
{
    cpu_set_t all, one;
    CPU_ZERO(&one);
    if (sched_getaffinity(0, sizeof all, &all))
        fail("sched_getaffinity");
    for (int c = 0; c < CPU_SETSIZE; c++)
        if (CPU_ISSET(c, &all)) {
            CPU_SET(c, &one);
            break;
        }
    if (sched_setaffinity(0, sizeof one, &one))
        fail("sched_setaffinity");
}

static uint64_t pipe_body(void)
{
    int there[2], back[2], status;
    uint64_t sum = HASH_START;
    if (pipe(there) || pipe(back))
        fail("pipe");
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (!child) {
        unsigned char c;
        close(there[1]);
        close(back[0]);
        while (read(there[0], &c, 1) == 1) {
            c = (unsigned char)(c * 3 + 1);
            if (write(back[1], &c, 1) != 1)
                _exit(1);
        }
        _exit(0);
    }
    close(there[0]);
    close(back[1]);
    for (int i = 0; i < TRIPS; i++) {
        unsigned char c = (unsigned char)i;
        if (write(there[1], &c, 1) != 1 || read(back[0], &c, 1) != 1)
            fail("pipe-io");
        sum = hash_bytes(sum, &c, 1);
    }
    close(there[1]);
    close(back[0]);
    if (waitpid(child, &status, 0) != child || status)
        fail("pipe-child");
    return sum;
}

static uint64_t fork_body(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < FORKS; i++) {
        int status;
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (!child)
            _exit(i & 127);
        if (waitpid(child, &status, 0) != child || !WIFEXITED(status))
            fail("wait");
        sum = sum * 31 + (uint64_t)WEXITSTATUS(status);
    }
    return sum;
}

/* The dynamic program beside this one; it returns 42. */
static int exec_once(void)
{
    static char path[] = "/opt/bench/bin/nothing";
    static char *const argv[] = {path, NULL}, *const envp[] = {NULL};
    int status;
    pid_t child = vfork();
    if (child < 0)
        fail("vfork");
    if (!child) {
        execve(path, argv, envp);
        _exit(127);
    }
    if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 42)
        fail("exec");
    return WEXITSTATUS(status);
}

static uint64_t exec_body(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < EXECS; i++)
        sum = sum * 31 + (uint64_t)exec_once();
    return sum;
}

static volatile sig_atomic_t caught;
static void on_signal(int n)
{
    caught += n == SIGUSR1;
}

static uint64_t signal_body(void)
{
    struct sigaction a = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &a, NULL);
    caught = 0;
    for (int i = 0; i < SIGNALS; i++)
        raise(SIGUSR1);
    return (uint64_t)caught;
}

static uint64_t mmap_body(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < MAPS; i++) {
        volatile unsigned char *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            fail("mmap");
        sum += p[7];
        p[7] = (unsigned char)i;
        sum += p[7];
        munmap((void *)p, 4096);
    }
    return sum;
}

static uint64_t stat_body(void)
{
    uint64_t found = 0;
    for (int i = 0; i < MAPS; i++) {
        int fd = open("/opt/bench/bin/nothing", O_RDONLY | O_CLOEXEC);
        found += fd >= 0;
        close(fd);
    }
    return found;
}

const struct work kernel_works[] = {
    {"getppid", getppid_body, CALLS, NULL, NULL},
    {"clock", clock_body, CALLS, NULL, NULL},
    {"fault", fault_body, PAGES, NULL, NULL},
    {"pipe", pipe_body, TRIPS, one_cpu, NULL},
    {"fork", fork_body, FORKS, NULL, NULL},
    {"exec", exec_body, EXECS, NULL, NULL},
    {"signal", signal_body, SIGNALS, NULL, NULL},
    {"mmap", mmap_body, MAPS, NULL, NULL},
    {"open", stat_body, MAPS, NULL, NULL},
    {NULL, NULL, 0, NULL, NULL},
};
