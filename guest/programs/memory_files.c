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

#define MAP_WRITABLE PROT_READ | PROT_WRITE, MAP_SHARED

static void seals(void)
{
	int fd = syscall(SYS_memfd_create, "plain", 0);
	is(fcntl(fd, F_GET_SEALS), F_SEAL_SEAL, "what was not made to be sealed");
	fails(fcntl(fd, F_ADD_SEALS, F_SEAL_GROW), EPERM, "is not");
	close(fd);
	fd = syscall(SYS_memfd_create, "sealed", MFD_ALLOW_SEALING);
	is(fcntl(fd, F_GET_SEALS), 0, "no seals");
	fails(fcntl(fd, F_ADD_SEALS, 1 << 20), EINVAL, "no such seal");
	is(write(fd, "abcdef", 6), 6, "a write before");
	is(fcntl(fd, F_ADD_SEALS, F_SEAL_GROW), 0, "it may not grow");
	fails(pwrite(fd, "x", 1, 6), EPERM, "a write at the end");
	fails(ftruncate(fd, 7), EPERM, "a greater length");
	fails(fallocate(fd, 0, 0, PAGE), EPERM, "an allocation");
	is(ftruncate(fd, 5), 0, "a smaller length");
	is(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), 0, "it may not shrink");
	fails(ftruncate(fd, 4), EPERM, "a smaller length");
	char *m = map(fd, PAGE, MAP_WRITABLE);
	fails(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), EBUSY, "it is mapped to be written");
	munmap(m, PAGE);
	is(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), 0, "it may not be written");
	fails(pwrite(fd, "x", 1, 0), EPERM, "a write");
	fails(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE), EPERM, "a hole");
	fails(map(fd, PAGE, MAP_WRITABLE) == MAP_FAILED ? -1 : 0, EPERM, "a shared mapping to be written");
	m = map(fd, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	m[0] = 'x';
	is(fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL), 0, "no more seals");
	fails(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), EPERM, "not even one it has");
	is(fcntl(fd, F_GET_SEALS), F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE, "its seals");
	char text[8];
	is(pread(fd, text, 8, 0) == 5 && memcmp(text, "abcde", 5) == 0, 1, "what is in it");
	munmap(m, PAGE);
	close(fd);
	int pipes[2];
	is(pipe(pipes), 0, "a pipe");
	fails(fcntl(pipes[1], F_GET_SEALS), EINVAL, "has no seals");
	close(pipes[0]);
	close(pipes[1]);
}

static void removed(void)
{
	char *m = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	char *own = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(m, 1, 4 * PAGE);
	is(madvise(m + PAGE, 2 * PAGE, MADV_REMOVE), 0, "pages of shared memory are removed");
	is(m[0] == 1 && m[PAGE] == 0 && m[3 * PAGE - 1] == 0 && m[3 * PAGE] == 1, 1, "those, and no others");
	fails(madvise(own, PAGE, MADV_REMOVE), EINVAL, "of private memory");
	munmap(m, 4 * PAGE);
	munmap(own, PAGE);
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
	seals();
	removed();
	if (argc > 2)
		large(argv[1], atol(argv[2]));
	return tap_end();
}
