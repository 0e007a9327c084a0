/* `sparse touch|read`: uses one page of each 2 MiB of 128 GiB, so that page tables are what runs out. With `read` it is the
 * kernel that stores there. A VMM that is short of tables ends it. */
#include "tap.h"

#define RANGE (1UL << 37)
#define APART (2UL << 20)

int main(int argc, char **argv)
{
	int zeroes = open("/dev/zero", O_RDONLY), calls = argc > 1 && !strcmp(argv[1], "read");
	char *start = mmap(NULL, RANGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (start == MAP_FAILED || zeroes < 0)
		return 2;
	for (char *at = start; at < start + RANGE; at += APART) {
		if (!calls)
			*at = 1;
		else if (read(zeroes, at, 1) != 1) /* told before it is ended; not for the first pages */
			return at < start + 100 * APART ? 3 : kill(getpid(), SIGKILL);
	}
	return 0;
}
