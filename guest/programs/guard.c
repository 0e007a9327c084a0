/* What `vmm run --guard-alloc` must catch. "faults": accesses that must fault, at their instruction;
 * "damage": a byte behind the length of a mapping, which is only told at the end. */
#include "tap.h"

static volatile char *expected;

static void caught(int signo, siginfo_t *info, void *context)
{
	(void)context;
	_exit(signo == SIGSEGV && (char *)info->si_addr == expected ? 42 : 43);
}

static void touch(void *at)
{
	struct sigaction action = {.sa_sigaction = caught, .sa_flags = SA_SIGINFO};
	sigaction(SIGSEGV, &action, NULL);
	expected = at;
	*expected = 1;
}

static void faults(void *at, const char *name) { is(exited_with(in_child(touch, at)), 42, name); }

static char *map(size_t bytes)
{
	char *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return at == MAP_FAILED ? NULL : at;
}

static int all_faults(void)
{
	char *a = map(3 * PAGE), *b = map(3 * PAGE);
	memset(a, 1, 3 * PAGE);
	memset(b, 2, 3 * PAGE);
	faults(a + 3 * PAGE, "an overrun of the first mapping faults");
	faults(a - 1, "an underrun of the first mapping faults");
	faults(b + 3 * PAGE, "an overrun of the second mapping faults");
	faults(b - 1, "an underrun of the second mapping faults");
	munmap(a, 3 * PAGE);
	char *c = map(3 * PAGE);
	ok(c && c != a, "unmapped memory is not given out at once");
	faults(a + PAGE, "unmapped memory faults");
	c = mremap(c, 3 * PAGE, 5 * PAGE, MREMAP_MAYMOVE);
	memset(c, 3, 5 * PAGE);
	faults(c + 5 * PAGE, "an overrun of a remapped mapping faults");
	char *heap = sbrk(100);
	memset(heap, 1, 100);
	char *page = (char *)(((uintptr_t)sbrk(0) + PAGE - 1) & -PAGE);
	faults(page, "an overrun of the heap faults");
	char *more = sbrk(3 * PAGE);
	ok(more == heap + 100 && !memchr(more, 0xa9, 3 * PAGE), "a heap that grows shows zeroes");
	char *large = malloc(1 << 20);
	memset(large, 1, 1 << 20);
	free(large);
	faults(large, "large memory that was freed faults");
	say("1..%d\n", tap_count);
	return tap_failed != 0;
}

int main(int argc, char **argv)
{
	if (argc > 1 && !strcmp(argv[1], "damage")) {
		char *at = map(5000);
		at[5000] = 7;
		char *good = map(5000);
		memset(good, 1, 5000);
		return 0;
	}
	return all_faults();
}
