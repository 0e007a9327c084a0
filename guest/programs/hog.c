/* Memory is used up, by a child that sleeps. Its parent, which has little, wants a few MiB more: the child is ended, not
 * the parent, and the parent goes on. For a machine with little memory and overcommitment. */
#include "tap.h"

#define MIB (1UL << 20)
#define SMALL (256 * 1024) /* KiB that the machine has at most */

/* KiB, by a line of /proc/meminfo. */
static long meminfo(const char *name)
{
	char text[4096];
	int fd = open("/proc/meminfo", O_RDONLY);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	close(fd);
	text[n < 0 ? 0 : n] = 0;
	char *line = strstr(text, name);
	return line ? atol(line + strlen(name)) : -1;
}

static void store(char *to, unsigned long from, unsigned long bytes)
{
	for (unsigned long at = from; at < from + bytes; at += PAGE)
		to[at] = (char)(at / PAGE | 1);
}

/* Takes all but 2 MiB, and sleeps. */
static void hog(int ready)
{
	char *all = mmap(NULL, SMALL * 1024UL, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	for (unsigned long at = 0; meminfo("MemFree:") > 2048; at += MIB / 4)
		store(all, at, MIB / 4);
	if (write(ready, "", 1) != 1)
		_exit(1);
	for (;;)
		pause();
}

int main(void)
{
	deadline(60);
	if (!ok(meminfo("MemTotal:") <= SMALL, "there is little memory"))
		return 1;
	int ends[2];
	char byte;
	is(pipe(ends), 0, "a pipe");
	pid_t child = fork();
	if (child == 0)
		hog(ends[1]);
	close(ends[1]);
	is(read(ends[0], &byte, 1), 1, "the child has taken all");
	char *own = mmap(NULL, 8 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ok(own != MAP_FAILED, "the parent may have some");
	store(own, 0, 8 * MIB);
	ok(own[0] == 1 && own[7 * MIB] == (char)(7 * MIB / PAGE | 1), "and has it");
	int status = wait_for(child);
	ok(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "the child was ended");
	return tap_end();
}
