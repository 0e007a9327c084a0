/* Files in memory: memfd_create, and those of a tmpfs that is the first argument. What a descriptor and a mapping show
 * is the same; holes, sizes and limits are as on Linux. With a second argument, so many MiB are written to files
 * there, more than the machine's memory has, and must come back. */
#include "tap.h"
#include <linux/falloc.h>
#include <sys/statvfs.h>

static char *map(int fd, size_t length, int prot, int flags)
{
	return mmap(NULL, length, prot, flags, fd, 0);
}

static void touch(void *at) { (*(volatile char *)at)++; }

static long blocks(int fd)
{
	struct stat st;
	return fstat(fd, &st) == 0 ? st.st_blocks / 8 : -1;
}

static void one_file(int fd, const char *what)
{
	char buf[3 * PAGE], *shared, *private;
	memset(buf, 7, sizeof buf);
	is(pwrite(fd, buf, 5000, 0), 5000, what);
	shared = map(fd, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
	private = map(fd, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	if (!ok(shared != MAP_FAILED && private != MAP_FAILED, "map"))
		return;
	is(shared[4999], 7, "the mapping shows what was written");
	is(shared[5000], 0, "zeroes after the end");
	is(died_of(in_child(touch, shared + 2 * PAGE)), SIGBUS, "a page after the end");
	shared[1] = 8;
	is(pread(fd, buf, 3, 0) == 3 && buf[0] == 7 && buf[1] == 8, 1, "read sees a store");
	is(pwrite(fd, "\x9", 1, 2) == 1 && shared[2] == 9 && private[2] == 9, 1, "mappings see a write");
	private[3] = 5;
	is(shared[3], 7, "a private store is private");
	in_child(touch, shared + 4);
	is(pread(fd, buf, 1, 4) == 1 && buf[0] == 8, 1, "read sees a child's store");
	is(ftruncate(fd, 6 * PAGE), 0, "grow");
	shared[5 * PAGE] = 4;
	is(pread(fd, buf, 1, 5 * PAGE) == 1 && buf[0] == 4, 1, "a store to a hole is in the file");
	is(blocks(fd), 3, "holes take no blocks");
	memset(shared, 3, 6 * PAGE);
	is(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PAGE + 10, 3 * PAGE), 0, "a hole");
	is(shared[PAGE + 9] == 3 && shared[PAGE + 10] == 0 && shared[4 * PAGE + 9] == 0 && shared[4 * PAGE + 10] == 3, 1,
	   "the mapping shows the hole");
	is(private[3], 5, "a private copy stays");
	is(ftruncate(fd, 2 * PAGE), 0, "truncate");
	is(died_of(in_child(touch, shared + 3 * PAGE)), SIGBUS, "a page that is gone");
	is(ftruncate(fd, 6 * PAGE) == 0 && shared[3 * PAGE] == 0, 1, "it comes back empty");
	is(fallocate(fd, 0, 0, 7 * PAGE) == 0 && lseek(fd, 0, SEEK_END) == 7 * PAGE, 1, "allocate");
	is(blocks(fd), 7, "what is allocated takes blocks");
	fails(ftruncate(fd, -1), EINVAL, "a negative length");
	munmap(shared, 8 * PAGE);
	munmap(private, 8 * PAGE);
	close(fd);
}

/* A file without a name and without a descriptor lives as long as its mapping. */
static void mapped_only(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
	is(ftruncate(fd, 2 * PAGE), 0, "a file");
	char *m = map(fd, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
	m[PAGE] = 1;
	unlink(path);
	close(fd);
	in_child(touch, m + PAGE);
	is(m[PAGE], 2, "a file that is only mapped");
	munmap(m, 2 * PAGE);
}

static char big[1 << 16];

static void fill(long chunk)
{
	uint64_t state = chunk + 1, *words = (uint64_t *)big;
	for (size_t n = 0; n < sizeof big / 8; n++)
		words[n] = random_next(&state);
}

static int holds(const char *bytes, long chunk)
{
	uint64_t state = chunk + 1, *words = (uint64_t *)bytes;
	for (size_t n = 0; n < sizeof big / 8; n++)
		if (words[n] != random_next(&state))
			return 0;
	return 1;
}

static void large(const char *folder, long mib)
{
	char path[2][PATH_MAX];
	static char back[sizeof big];
	long chunks = mib * 16, bad = 0, short_writes = 0;
	struct statvfs before, full, after;
	int fd[2];
	statvfs(folder, &before);
	for (int n = 0; n < 2; n++) {
		snprintf(path[n], PATH_MAX, "%s/large%d", folder, n);
		fd[n] = open(path[n], O_RDWR | O_CREAT | O_EXCL, 0600);
	}
	for (long chunk = 0; chunk < chunks; chunk++) {
		fill(chunk);
		short_writes += write(fd[chunk % 2], big, sizeof big) != sizeof big;
	}
	is(short_writes, 0, "more is written than memory holds");
	statvfs(folder, &full);
	ok((long)(before.f_bfree - full.f_bfree) >= mib * 256, "the file system has fewer free blocks");
	for (long chunk = 0; chunk < chunks; chunk++)
		bad += pread(fd[chunk % 2], back, sizeof back, chunk / 2 * sizeof big) != sizeof back || !holds(back, chunk);
	is(bad, 0, "all of it comes back");
	char *m = map(fd[0], mib << 19, PROT_READ, MAP_SHARED);
	for (long chunk = 0; chunk < chunks; chunk += 2)
		bad += !holds(m + chunk / 2 * sizeof big, chunk);
	is(bad, 0, "a mapping shows it");
	munmap(m, mib << 19);
	long more = 0;
	ssize_t n;
	lseek(fd[0], 0, SEEK_END);
	while ((n = write(fd[0], big, sizeof big)) > 0 && more < 1L << 40)
		more += n;
	fails(n, ENOSPC, "a full file system");
	for (int n = 0; n < 2; n++) {
		close(fd[n]);
		unlink(path[n]);
	}
	/* Frees what was unlinked before it looks. */
	snprintf(path[0], PATH_MAX, "%s/small", folder);
	int small = open(path[0], O_RDWR | O_CREAT, 0600);
	is(write(small, big, 100), 100, "room again");
	unlink(path[0]);
	statvfs(folder, &after);
	ok(before.f_bfree - after.f_bfree < 16, "the blocks are free again");
}

int main(int argc, char **argv)
{
	char path[PATH_MAX];
	deadline(300);
	if (argc < 2)
		return 2;
	one_file(syscall(SYS_memfd_create, "file", 0), "memfd_create");
	snprintf(path, sizeof path, "%s/file", argv[1]);
	one_file(open(path, O_RDWR | O_CREAT | O_TRUNC, 0600), "tmpfs");
	unlink(path);
	mapped_only(path);
	if (argc > 2)
		large(argv[1], atol(argv[2]));
	return tap_end();
}
