/* Pages of random bytes, run as code. Each runs in a child, which must end, by a signal or an
 * exit, and must not have touched anything of the parent's.
 *   random_code [SEED [PAGES [spicy]]]
 * `spicy` strews instructions that concern a hypervisor among the bytes; it is not meant for
 * running as root on a machine that matters. */
#include "tap.h"

enum { ALIVE = 6 };
static const struct { unsigned char length, bytes[7]; } spices[] = {
	{2, {0x0f, 0x05}}, {2, {0x0f, 0x34}}, {2, {0xcd, 0x80}}, {1, {0xf4}}, {2, {0xe6, 0x10}}, {2, {0xe7, 0x10}},
	{2, {0xe7, 0x11}}, {2, {0xe7, 0x12}}, {1, {0xee}}, {1, {0xef}}, {1, {0xec}}, {2, {0xe4, 0x10}}, {1, {0xcc}}, {1, {0xf1}},
	{2, {0xcd, 0x0e}}, {2, {0xcd, 0x02}}, {2, {0x48, 0xcf}}, {1, {0xcf}}, {1, {0xcb}}, {2, {0x0f, 0x07}}, {3, {0x48, 0x0f, 0x07}},
	{3, {0x0f, 0x01, 0xd9}}, {3, {0x0f, 0x01, 0xc1}}, {3, {0x0f, 0x01, 0xf8}}, {2, {0x0f, 0x30}}, {2, {0x0f, 0x32}},
	{3, {0x0f, 0x22, 0xd8}}, {3, {0x0f, 0x20, 0xd8}}, {3, {0x0f, 0x23, 0xf8}}, {2, {0x0f, 0xa2}}, {3, {0x0f, 0x01, 0xd0}},
	{3, {0x0f, 0x01, 0xd1}}, {2, {0x0f, 0x31}}, {3, {0x0f, 0x01, 0xf9}}, {4, {0xf3, 0x0f, 0xc7, 0xf8}}, {1, {0x9d}}, {2, {0x8e, 0xd0}},
	{2, {0x8e, 0xe0}}, {4, {0xf3, 0x0f, 0xae, 0xd0}}, {5, {0xf3, 0x48, 0x0f, 0xae, 0xd8}}, {3, {0x0f, 0xae, 0x28}}, {2, {0x0f, 0x0b}},
	{2, {0xf3, 0xa4}}, {2, {0xf3, 0xab}}, {2, {0x0f, 0x06}}, {2, {0x0f, 0x09}}, {3, {0x0f, 0x01, 0x38}},
};
enum { SPICES = sizeof spices / sizeof *spices };

static void fill(unsigned char *page, uint64_t *state, int spicy)
{
	for (unsigned i = 0; i < PAGE; i += 8) {
		uint64_t r = random_next(state);
		memcpy(page + i, &r, 8);
	}
	/* A few at the front, where execution starts, and more over the page. */
	for (int i = 0; spicy && i < 60; i++) {
		uint64_t r = random_next(state);
		unsigned at = i < 4 ? r % 24 : r % (PAGE - 8), k = (r >> 32) % SPICES;
		memcpy(page + at, spices[k].bytes, spices[k].length);
	}
}

static void run(unsigned char *page, uint64_t value)
{
	struct itimerval limit = {{0, 20000}, {0, 20000}};
	signal(SIGALRM, SIG_DFL);
	close(0);
	close(1);
	close(2);
	setitimer(ITIMER_REAL, &limit, NULL);
	/* rax is no system call's number, so that `syscall` alone does nothing here. */
	__asm__ volatile(
		"mov %0,%%r15\n mov %1,%%rdi\n"
		"mov $0xdead0000,%%eax\n mov %%r15,%%rbx\n mov %%r15,%%rcx\n mov %%r15,%%rdx\n mov %%r15,%%rsi\n mov %%r15,%%rbp\n"
		"mov %%r15,%%r8\n mov %%r15,%%r9\n mov %%r15,%%r10\n mov %%r15,%%r11\n mov %%r15,%%r12\n mov %%r15,%%r13\n"
		"jmp *%%rdi" ::"r"(value), "r"(page) : "memory", "rdi", "r15");
	__builtin_unreachable();
}

int main(int argc, char **argv)
{
	uint64_t state = seed_from(argc > 1 ? argv[1] : NULL);
	int pages = argc > 2 ? atoi(argv[2]) : 10000, spicy = argc > 3 && !strcmp(argv[3], "spicy");
	int ended = 0, started = 0, alive = 0, by[65] = {0}, exited = 0, stuck = 0;
	struct { pid_t pid; long long since; } running[ALIVE] = {{0, 0}};
	unsigned char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned char *canary = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (page == MAP_FAILED || canary == MAP_FAILED)
		return 2;
	memset(canary, 0x5a, 4 * PAGE);
	deadline(1200);
	sigset_t unblocked = block_news();
	while (ended < pages) {
		while (started < pages && alive < ALIVE) {
			uint64_t value = random_next(&state);
			int slot = 0;
			while (running[slot].pid)
				slot++;
			fill(page, &state, spicy);
			switch (started % 4) { /* different things to point at */
			case 0: value = 0; break;
			case 1: value = (uint64_t)canary + (value & 0x3ff8); break;
			case 2: value = 0x7f8000000000 + (value & 0x1ffff8); break;
			}
			pid_t pid = fork();
			if (pid == 0) {
				sigprocmask(SIG_SETMASK, &unblocked, NULL);
				setpgid(0, 0);
				run(page, value);
			}
			if (pid < 0) {
				say("Bail out! fork: errno %d\n", errno);
				return 2;
			}
			running[slot].pid = pid;
			running[slot].since = now_ns();
			started++;
			alive++;
		}
		int status;
		pid_t pid = waitpid(-1, &status, WNOHANG | WUNTRACED);
		if (pid <= 0) {
			wait_for_news(500);
			for (int i = 0; i < ALIVE; i++)
				if (running[i].pid && now_ns() - running[i].since > 5000000000LL) {
					stuck++;
					kill(-running[i].pid, SIGKILL);
					kill(running[i].pid, SIGKILL);
					running[i].since = now_ns();
				}
			continue;
		}
		int slot = 0;
		while (slot < ALIVE && running[slot].pid != pid)
			slot++;
		if (slot == ALIVE)
			continue; /* a child's child */
		if (WIFSTOPPED(status)) {
			kill(pid, SIGKILL);
			continue;
		}
		kill(-pid, SIGKILL);
		running[slot].pid = 0;
		alive--;
		ended++;
		if (WIFSIGNALED(status))
			by[WTERMSIG(status) & 63]++;
		else
			exited++;
	}
	int intact = 1;
	for (unsigned i = 0; i < 4 * PAGE; i++)
		intact &= canary[i] == 0x5a;
	is(ended, pages, "every page ended");
	is(stuck, 0, "none had to be killed");
	is(intact, 1, "the parent's memory is as it was");
	dprintf(2, "exited %d", exited);
	for (int i = 1; i < 64; i++)
		if (by[i])
			dprintf(2, ", signal %d: %d", i, by[i]);
	dprintf(2, "\n");
	return tap_end();
}
