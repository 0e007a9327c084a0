/* Many forks, several alive at a time. Parent and child each write a megabyte at the same time:
 * neither may ever see the other's writes, and a shared mapping must stay shared. */
#include "tap.h"

enum { SIZE = 1 << 20, ALIVE = 8 };
static unsigned char *memory;

static void fill(uint64_t tag)
{
	for (unsigned long at = 0; at < SIZE; at += PAGE) {
		uint64_t *page = (uint64_t *)(memory + at);
		page[0] = tag ^ at;
		page[PAGE / 8 - 1] = ~tag ^ at;
		page[1 + (tag + at / PAGE) % (PAGE / 8 - 2)] = tag;
	}
}

static int holds(uint64_t tag)
{
	for (unsigned long at = 0; at < SIZE; at += PAGE) {
		uint64_t *page = (uint64_t *)(memory + at);
		if (page[0] != (tag ^ at) || page[PAGE / 8 - 1] != (~tag ^ at))
			return 0;
	}
	return 1;
}

static int child(uint64_t parents, uint64_t own, volatile uint32_t *shared)
{
	if (!holds(parents))
		return 1;
	fill(own);
	if (!holds(own))
		return 2;
	for (int i = 0; i < 3; i++) {
		syscall(SYS_sched_yield);
		if (!holds(own))
			return 3;
	}
	if (shared)
		__atomic_add_fetch(shared, 1, __ATOMIC_SEQ_CST);
	return 0;
}

int main(int argc, char **argv)
{
	int forks = argc > 1 ? atoi(argv[1]) : 500, bad_child = 0, bad_parent = 0, failed = 0, made = 0, reaped = 0;
	deadline(300);
	memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	volatile uint32_t *shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 2;
	if (shared == MAP_FAILED && errno == ENODEV)
		shared = NULL;
	for (int i = 0; i < forks; i++) {
		uint64_t mine = 0x1000000ULL * i + 17;
		fill(mine);
		pid_t pid = fork();
		if (pid == 0)
			_exit(child(mine, ~mine * 3, shared));
		if (pid < 0) {
			failed++;
			continue;
		}
		made++;
		bad_parent += !holds(mine);
		fill(mine + 5);
		bad_parent += !holds(mine + 5);
		for (; made - reaped >= ALIVE || (i == forks - 1 && reaped < made); reaped++) {
			int status;
			if (waitpid(-1, &status, 0) < 0)
				break;
			bad_child += exited_with(status) != 0;
		}
		bad_parent += !holds(mine + 5);
	}
	is(failed, 0, "every fork worked");
	is(reaped, forks, "every child was reaped");
	is(bad_child, 0, "no child saw a parent's or a sibling's write");
	is(bad_parent, 0, "the parent never saw a child's write");
	if (shared)
		is(*shared, forks, "what is shared stayed shared");
	else
		skip("what is shared stayed shared", "no shared writable mappings");
	return tap_end();
}
