/* One process may have 16 MiB of private memory, and so may its children: what asks for more is told ENOMEM there and
 * then, by every call that can ask. */
#include "tap.h"

#define MIB (1UL << 20)
#define RW (PROT_READ | PROT_WRITE)

static char *map(unsigned long mib, int prot, int flags)
{
	return mmap(NULL, mib * MIB, prot, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

/* A child's view of it: it inherited 12 MiB. */
static int child(char *inherited)
{
	if (map(8, RW, 0) != MAP_FAILED || errno != ENOMEM)
		return 1;
	memset(inherited, 2, 12 * MIB);
	if (munmap(inherited, 12 * MIB))
		return 2;
	char *own = map(12, RW, 0);
	if (own == MAP_FAILED)
		return 3;
	memset(own, 3, 12 * MIB);
	return 0;
}

static void child_body(void *inherited) { _exit(child(inherited)); }

int main(void)
{
	fails((long)map(17, RW, 0), ENOMEM, "more at once");
	char *first = map(12, RW, 0);
	if (!ok(first != MAP_FAILED, "most of it"))
		return 1;
	memset(first, 1, 12 * MIB);
	fails((long)map(8, RW, 0), ENOMEM, "more in all");

	char *none = map(64, PROT_NONE, 0);
	ok(none != MAP_FAILED, "what cannot be used is free");
	fails(mprotect(none, 8 * MIB, RW), ENOMEM, "made usable, it is not");
	is(mprotect(none, MIB, RW), 0, "a little of it");
	is(munmap(none, 64 * MIB), 0, "unmapped");

	ok(map(64, RW, MAP_NORESERVE) != MAP_FAILED, "what is not reserved is not counted");
	char *shared = mmap(NULL, 32 * MIB, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ok(shared != MAP_FAILED, "nor is what is shared");

	fails((long)mremap(first, 12 * MIB, 20 * MIB, MREMAP_MAYMOVE), ENOMEM, "enlarged");
	char *brk = sbrk(0);
	fails((long)sbrk(8 * MIB), ENOMEM, "a larger heap");
	ok(sbrk(0) == brk, "the heap is as it was");

	is(in_child(child_body, first), 0, "a child has as much, and no more");
	is(in_child(child_body, first), 0, "so has the next");
	ok(first[0] == 1 && first[12 * MIB - 1] == 1, "the parent's memory is its own");
	is(munmap(first, 12 * MIB), 0, "given back");
	ok(map(12, RW, 0) != MAP_FAILED, "and had again");
	return tap_end();
}
