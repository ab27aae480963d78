/* A debugger's hardware breakpoints and the alignment check, as a program meets them: what stops, how often, where. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile uint64_t watched[4];
static char text[64] __attribute__((aligned(64)));

__attribute__((noinline)) static void called(int i)
{
	watched[1] += i;
}

static void child(void)
{
	ptrace(PTRACE_TRACEME, 0, 0, 0);
	raise(SIGSTOP);
	for (int i = 0; i < 5; i++) {
		watched[0] = i;
		called(i);
		if (watched[0] == 2)
			watched[2]++;
		/* A system call writes it, too: the kernel's accesses do not count for the program. */
		if (i == 3) {
			int pair[2];
			if (pipe(pair) == 0 && write(pair[1], "abcdefgh", 8) == 8 && read(pair[0], (void *)&watched[3], 8) == 8)
				close(pair[0]), close(pair[1]);
		}
	}
	__asm__ volatile("rep movsb" : : "S"(text), "D"(text + 32), "c"(16) : "memory");
	_exit(7);
}

enum { EXECUTE = 0, WRITES = 1, ALL = 3 };

static void set(pid_t pid, int i, const volatile void *at, int kind, int length)
{
	static long dr7;
	dr7 &= ~(15L << (16 + i * 4) | 3L << (i * 2));
	size_t base = offsetof(struct user, u_debugreg);
	ptrace(PTRACE_POKEUSER, pid, base + 7 * 8, dr7);
	ptrace(PTRACE_POKEUSER, pid, base + i * 8, at);
	dr7 |= (long)(kind | length << 2) << (16 + i * 4) | 1L << (i * 2);
	if (ptrace(PTRACE_POKEUSER, pid, base + 7 * 8, dr7) != 0)
		perror("dr7");
}

static void breakpoints(void)
{
	pid_t pid = fork();
	if (pid == 0)
		child();
	int status;
	waitpid(pid, &status, 0);
	set(pid, 0, &watched[0], WRITES, 2);
	set(pid, 1, called, EXECUTE, 0);
	set(pid, 2, &watched[2], ALL, 2);
	set(pid, 3, text + 36, WRITES, 0);
	for (int stops = 0; stops < 100; stops++) {
		ptrace(PTRACE_CONT, pid, 0, 0);
		waitpid(pid, &status, 0);
		if (WIFEXITED(status)) {
			printf("exit %d after %d stops\n", WEXITSTATUS(status), stops);
			return;
		}
		size_t base = offsetof(struct user, u_debugreg);
		long dr6 = ptrace(PTRACE_PEEKUSER, pid, base + 6 * 8, 0);
		ptrace(PTRACE_POKEUSER, pid, base + 6 * 8, 0);
		struct user_regs_struct regs;
		ptrace(PTRACE_GETREGS, pid, 0, &regs);
		long now[4];
		for (int i = 0; i < 4; i++)
			now[i] = ptrace(PTRACE_PEEKDATA, pid, &watched[i], 0);
		printf("signal %d hits %lx at function %d values %lx %lx %lx %lx\n", WSTOPSIG(status), dr6 & 15,
		       regs.rip == (uintptr_t)called, now[0], now[1], now[2], now[3]);
	}
	kill(pid, SIGKILL);
}

static void steps(void)
{
	pid_t pid = fork();
	if (pid == 0) {
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		__asm__ volatile("int3; mov $10, %%ecx; 1: dec %%ecx; jnz 1b; rep stosb; int3" : : "D"(text), "a"(0) : "ecx", "memory");
		_exit(0);
	}
	int status, count = 0;
	waitpid(pid, &status, 0);
	uint8_t byte;
	do {
		ptrace(PTRACE_SINGLESTEP, pid, 0, 0);
		waitpid(pid, &status, 0);
		struct user_regs_struct regs;
		ptrace(PTRACE_GETREGS, pid, 0, &regs);
		byte = ptrace(PTRACE_PEEKDATA, pid, regs.rip, 0);
		count++;
	} while (byte != 0xcc && count < 1000);
	printf("%d single steps\n", count);
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
}

static sigjmp_buf back;

static void misaligned(int signal, siginfo_t *info, void *context)
{
	(void)context;
	__asm__ volatile("pushfq; andl $~(1 << 18), (%%rsp); popfq" : : : "memory", "cc");
	printf("signal %d code %d\n", signal, info->si_code);
	siglongjmp(back, 1);
}

static void alignment(void)
{
	struct sigaction action = { .sa_sigaction = misaligned, .sa_flags = SA_SIGINFO };
	sigaction(SIGBUS, &action, NULL);
	for (int offset = 0; offset < 4; offset++) {
		if (sigsetjmp(back, 1))
			continue;
		uint32_t value = 0;
		__asm__ volatile("sub $128, %%rsp\n pushfq; orl $1 << 18, (%%rsp); popfq\n mov (%1), %0\n"
				 "pushfq; andl $~(1 << 18), (%%rsp); popfq\n add $128, %%rsp"
				 : "+r"(value) : "r"(text + offset * 2) : "memory", "cc");
		printf("offset %d read\n", offset * 2);
	}
}

int main(void)
{
	setvbuf(stdout, NULL, _IONBF, 0);
	breakpoints();
	steps();
	alignment();
	return 0;
}
