/* A chain of forks, each process the child of the one before. Every level checks its own memory
 * and pids after its child has ended; the statuses carry the depth back. */
#include "tap.h"

static int level(int depth, int left, pid_t parent, int to_main)
{
	volatile long local[64];
	char *heap = malloc(3 * PAGE);
	for (int i = 0; i < 64; i++)
		local[i] = depth * 1000L + i;
	memset(heap, depth & 0xff, 3 * PAGE);
	if (depth > 0 && getppid() != parent)
		return 255;
	if (left == 0) {
		if (write(to_main, &depth, sizeof depth) != sizeof depth)
			return 254;
		return 0;
	}
	pid_t self = getpid(), child = fork();
	if (child < 0)
		return 253;
	if (child == 0)
		_exit(level(depth + 1, left - 1, self, to_main));
	int below = exited_with(wait_for(child));
	for (int i = 0; i < 64; i++)
		if (local[i] != depth * 1000L + i)
			return 252;
	for (unsigned long i = 0; i < 3 * PAGE; i++)
		if ((unsigned char)heap[i] != (depth & 0xff))
			return 251;
	if (getpid() != self)
		return 250;
	return below < 0 || below >= 245 ? (below < 0 ? 249 : below) : below + 1;
}

int main(int argc, char **argv)
{
	int depth = argc > 1 ? atoi(argv[1]) : 200, leaf = -1, fd[2];
	deadline(120);
	if (pipe(fd))
		return 2;
	is(level(0, depth, 0, fd[1]), depth, "every level saw its own memory, pid and child");
	close(fd[1]);
	is(read(fd[0], &leaf, sizeof leaf), sizeof leaf, "the last one reported");
	is(leaf, depth, "from the depth asked for");
	is(waitpid(-1, NULL, 0), -1, "nobody is left");
	return tap_end();
}
