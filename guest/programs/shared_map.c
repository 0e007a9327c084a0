/* Shared mappings as a program sees them: of a file and of memory, between processes and with
 * read and write; truncation, protection, moves, advice, what private mappings keep to themselves,
 * and what reaches the file. The argument is a folder to work in, on a disk or in memory. */
#include "trapped.h"

static char path[PATH_MAX];

static int waited(pid_t child)
{
	int status = -1;
	waitpid(child, &status, 0);
	return status;
}

/* A new file of `pages` pages, each filled with its number from 'a' on. */
static int file_of(int pages)
{
	char page[PAGE];
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	for (int n = 0; n < pages; n++) {
		memset(page, 'a' + n, PAGE);
		if (write(fd, page, PAGE) != (ssize_t)PAGE)
			ok(0, "write");
	}
	return fd;
}

static char *map(int fd, int pages, int prot, int flags)
{
	return mmap(NULL, pages * PAGE, prot, flags, fd, 0);
}

static int byte_of(int fd, off_t at)
{
	unsigned char byte = 0;
	return pread(fd, &byte, 1, at) == 1 ? byte : -1;
}

static void anonymous(void)
{
	volatile int *shared = (void *)map(-1, 4, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS);
	if (!ok(shared != MAP_FAILED, "anonymous shared memory"))
		return;
	is(shared[0], 0, "it begins as zeroes");
	shared[1] = 11;
	pid_t child = fork();
	if (child == 0) {
		if (shared[1] != 11)
			_exit(1);
		shared[2] = 22;
		shared[3 * PAGE / sizeof *shared] = 33;
		pid_t grandchild = fork();
		if (grandchild == 0) {
			shared[4] = shared[2] + 1;
			_exit(0);
		}
		_exit(waited(grandchild));
	}
	is(waited(child), 0, "a child sees what its parent stored");
	is(shared[2], 22, "the parent sees what its child stored");
	is(shared[3 * PAGE / sizeof *shared], 33, "and on a page nobody had touched");
	is(shared[4], 23, "and what a grandchild stored");
	for (int n = 0; n < 4; n++)
		if (fork() == 0) {
			for (int i = 0; i < 2000; i++)
				__atomic_fetch_add(&shared[8], 1, __ATOMIC_SEQ_CST);
			_exit(0);
		}
	while (wait(NULL) > 0)
		;
	is(shared[8], 8000, "four processes count together");
	is(munmap((void *)shared, 4 * PAGE), 0, "unmapped");
}

static void descriptors(void)
{
	int fd = file_of(8);
	char *shared = map(fd, 8, PROT_READ | PROT_WRITE, MAP_SHARED);
	char *other = map(fd, 8, PROT_READ | PROT_WRITE, MAP_SHARED);
	char *private = map(fd, 8, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	char *readonly = map(fd, 8, PROT_READ, MAP_SHARED);
	is(shared[2 * PAGE], 'c', "the file's bytes");
	shared[2 * PAGE] = 'X';
	is(other[2 * PAGE], 'X', "another mapping shows a store");
	is(readonly[2 * PAGE], 'X', "so does one that only reads");
	is(byte_of(fd, 2 * PAGE), 'X', "so does read");
	is(pwrite(fd, "YZ", 2, 3 * PAGE - 1), 2, "a write across a page's edge");
	is(shared[3 * PAGE - 1], 'Y', "a mapping shows what was written");
	is(other[3 * PAGE], 'Z', "on both pages");
	private[5 * PAGE] = 'P';
	is(shared[5 * PAGE], 'f', "a private store stays private");
	is(byte_of(fd, 5 * PAGE), 'f', "and does not reach the file");
	shared[5 * PAGE] = 'S';
	is(private[5 * PAGE], 'P', "a private copy stays as it is");
	char buffer[3 * PAGE];
	shared[6 * PAGE + 7] = 'T';
	is(pread(fd, buffer, sizeof buffer, 5 * PAGE + 100), 3 * PAGE - 100, "a long read");
	is(buffer[PAGE - 100 + 7], 'T', "has what was stored in its middle");
	int second = open(path, O_RDONLY);
	is(byte_of(second, 6 * PAGE + 7), 'T', "another descriptor reads it too");
	is(lseek(fd, 0, SEEK_END), 8 * PAGE, "the end has not moved");
	is(write(fd, "more", 4), 4, "an append");
	char *tail = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 8 * PAGE);
	is(tail[3], 'e', "a mapping of what is new");
	is(tail[4], 0, "is zero behind it");
	is(pwrite(fd, "!", 1, 8 * PAGE + 4), 1, "a write that makes the file longer");
	is(tail[4], '!', "shows in the page that was mapped");
	is(close(fd), 0, "closed");
	shared[PAGE] = 'Q';
	is(byte_of(second, PAGE), 'Q', "a mapping outlives its descriptor");
	is(msync(shared, 8 * PAGE, MS_SYNC), 0, "msync");
	fails(msync(shared, PAGE, MS_SYNC | MS_ASYNC), EINVAL, "msync both ways");
	is(msync(shared, PAGE, MS_ASYNC), 0, "msync, some time");
	is(msync(shared, PAGE, MS_SYNC | MS_INVALIDATE), 0, "msync that invalidates");
	is(shared[PAGE], 'Q', "loses nothing");
	munmap(shared, 8 * PAGE);
	munmap(other, 8 * PAGE);
	munmap(private, 8 * PAGE);
	munmap(readonly, 8 * PAGE);
	munmap(tail, PAGE);
	is(byte_of(second, PAGE), 'Q', "the file has it when nobody maps it");
	is(byte_of(second, 2 * PAGE), 'X', "all of it");
	close(second);
}

static void truncation(void)
{
	int fd = file_of(6);
	char *shared = map(fd, 8, PROT_READ | PROT_WRITE, MAP_SHARED);
	char *private = map(fd, 6, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	is(reading(shared + 6 * PAGE), SIGBUS, "a page beyond the end");
	is(got_code, BUS_ADRERR, "its code");
	ok(got_addr == shared + 6 * PAGE, "its address");
	for (int n = 0; n < 6; n++)
		shared[n * PAGE] = private[n * PAGE] = 'T';
	is(ftruncate(fd, 2 * PAGE + 100), 0, "ftruncate");
	is(shared[PAGE], 'T', "what is left is left");
	is(shared[2 * PAGE + 99], 'c', "up to the end");
	is(shared[2 * PAGE + 100], 0, "and zero behind it");
	is(reading(shared + 3 * PAGE), SIGBUS, "a page that was cut off");
	is(got_code, BUS_ADRERR, "its code");
	is(writing(shared + 5 * PAGE + 9, 'x'), SIGBUS, "a store to another");
	ok(got_addr == shared + 5 * PAGE + 9, "its address");
	is(reading(private + 4 * PAGE), SIGBUS, "a private copy of one");
	is(private[2 * PAGE], 'T', "a private copy of what is left");
	char byte;
	fails(read(fd, (lseek(fd, 0, SEEK_SET), shared + 4 * PAGE), 1), EFAULT, "a buffer beyond the end");
	is(ftruncate(fd, 6 * PAGE), 0, "longer again");
	is(shared[4 * PAGE], 0, "what was cut off is zero");
	shared[4 * PAGE] = 'N';
	is(pread(fd, &byte, 1, 4 * PAGE), 1, "it can be read");
	is(byte, 'N', "and is what was stored since");
	pid_t child = fork();
	if (child == 0)
		_exit(ftruncate(fd, 0) ? 1 : 0);
	is(waited(child), 0, "a child truncates");
	is(reading(shared), SIGBUS, "and the parent's mapping is empty");
	munmap(shared, 8 * PAGE);
	munmap(private, 6 * PAGE);
	close(fd);
}

static void protections(void)
{
	int fd = file_of(4);
	close(fd);
	fd = open(path, O_RDONLY);
	ok(map(fd, 4, PROT_READ | PROT_WRITE, MAP_SHARED) == MAP_FAILED && errno == EACCES,
	   "a writable shared mapping of what is open for reading");
	char *shared = map(fd, 4, PROT_READ, MAP_SHARED);
	is(writing(shared, 'x'), SIGSEGV, "a store to a mapping that only reads");
	fails(mprotect(shared, PAGE, PROT_READ | PROT_WRITE), EACCES, "which cannot be made writable");
	char *private = map(fd, 4, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	is(writing(private, 'x'), 0, "a private one is writable all the same");
	munmap(shared, 4 * PAGE);
	munmap(private, 4 * PAGE);
	close(fd);
	fd = open(path, O_WRONLY);
	ok(map(fd, 4, PROT_WRITE, MAP_SHARED) == MAP_FAILED && errno == EACCES, "of what is open for writing only");
	close(fd);
	fd = open(path, O_RDWR);
	shared = map(fd, 4, PROT_READ | PROT_WRITE, MAP_SHARED);
	shared[0] = '1';
	is(mprotect(shared, 4 * PAGE, PROT_READ), 0, "mprotect to read");
	is(writing(shared, 'x'), SIGSEGV, "no store then");
	is(mprotect(shared, 4 * PAGE, PROT_READ | PROT_WRITE), 0, "and back");
	is(writing(shared, '2'), 0, "a store again");
	is(byte_of(fd, 0), '2', "which the file has");
	is(mprotect(shared, PAGE, PROT_NONE), 0, "mprotect to nothing");
	is(reading(shared), SIGSEGV, "no load then");
	is(byte_of(fd, 0), '2', "the file still has it");
	munmap(shared, 4 * PAGE);
	close(fd);
}

static void moves(void)
{
	int fd = file_of(6);
	char *shared = map(fd, 2, PROT_READ | PROT_WRITE, MAP_SHARED);
	shared[PAGE] = 'M';
	char *moved = mremap(shared, 2 * PAGE, 6 * PAGE, MREMAP_MAYMOVE);
	ok(moved != MAP_FAILED, "mremap makes it longer");
	is(moved[PAGE], 'M', "with what was there");
	is(moved[5 * PAGE], 'f', "and more of the file");
	char *twice = mremap(moved, 0, 6 * PAGE, MREMAP_MAYMOVE);
	ok(twice != MAP_FAILED, "mremap of nothing maps it twice");
	twice[3 * PAGE] = '2';
	is(moved[3 * PAGE], '2', "the same pages");
	is(madvise(moved, 6 * PAGE, MADV_DONTNEED), 0, "MADV_DONTNEED");
	is(moved[3 * PAGE], '2', "takes nothing from a shared mapping");
	is(moved[PAGE], 'M', "nor from a page only it had");
	is(byte_of(fd, PAGE), 'M', "nor from the file");
	fails(madvise(moved, PAGE, MADV_FREE), EINVAL, "MADV_FREE");
	char *private = map(fd, 6, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	private[PAGE] = 'p';
	is(madvise(private, 6 * PAGE, MADV_DONTNEED), 0, "MADV_DONTNEED of a private one");
	is(private[PAGE], 'M', "brings the file's bytes back");
	unsigned char there[6];
	is(mincore(moved, 6 * PAGE, there), 0, "mincore");
	is(munmap(moved + PAGE, PAGE), 0, "a hole in the middle");
	is(moved[2 * PAGE], 'c', "leaves the rest");
	char *half = mmap(NULL, 2 * PAGE, PROT_READ, MAP_SHARED, fd, 4 * PAGE);
	twice[5 * PAGE] = 'H';
	is(half[PAGE], 'H', "a mapping of the end shows the same page");
	munmap(moved, 6 * PAGE);
	munmap(twice, 6 * PAGE);
	munmap(private, 6 * PAGE);
	munmap(half, 2 * PAGE);
	close(fd);
}

/* Private copies of some pages, then a fork: parent and child each go on with their own. */
static void forks(void)
{
	int fd = file_of(4);
	char *private = map(fd, 4, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	char *shared = map(fd, 4, PROT_READ | PROT_WRITE, MAP_SHARED);
	private[0] = 'p';
	pid_t child = fork();
	if (child == 0) {
		int good = private[0] == 'p' && private[3 * PAGE] == 'd';
		private[0] = private[3 * PAGE] = 'c';
		shared[2 * PAGE] = 'C';
		good &= private[0] == 'c' && private[3 * PAGE] == 'c';
		_exit(good ? 0 : 1);
	}
	is(waited(child), 0, "a child has its parent's copies, and its own");
	is(private[0], 'p', "which the parent does not see");
	is(private[3 * PAGE], 'd', "nor on a page nobody had copied");
	is(shared[3 * PAGE], 'd', "nor the file");
	is(shared[2 * PAGE], 'C', "but what it stored to the file");
	munmap(private, 4 * PAGE);
	munmap(shared, 4 * PAGE);
	close(fd);
}

static void memory_files(void)
{
	int fd = memfd_create("shared", MFD_CLOEXEC);
	if (!ok(fd >= 0, "memfd_create"))
		return;
	is(ftruncate(fd, 3 * PAGE), 0, "ftruncate");
	char *shared = map(fd, 3, PROT_READ | PROT_WRITE, MAP_SHARED);
	is(shared[PAGE], 0, "it begins as zeroes");
	strcpy(shared + PAGE, "memory");
	char text[8] = "";
	is(pread(fd, text, 7, PAGE), 7, "a read of it");
	ok(!strcmp(text, "memory"), "has what was stored");
	is(pwrite(fd, "M", 1, PAGE), 1, "a write to it");
	is(shared[PAGE], 'M', "shows in the mapping");
	munmap(shared, 3 * PAGE);
	is(byte_of(fd, PAGE), 'M', "it stays when nobody maps it");
	is(byte_of(fd, PAGE + 1), 'e', "all of it");
	shared = map(fd, 3, PROT_READ | PROT_WRITE, MAP_SHARED);
	is(shared[PAGE + 1], 'e', "and is there for the next mapping");
	is(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PAGE, PAGE), 0, "a hole");
	is(shared[PAGE + 1], 0, "shows in the mapping");
	is(ftruncate(fd, PAGE), 0, "shorter");
	is(reading(shared + PAGE), SIGBUS, "a page beyond the end");
	munmap(shared, 3 * PAGE);
	close(fd);
}

/* What is left here is looked at from outside. */
static void leave(void)
{
	int fd = file_of(3);
	char *shared = map(fd, 3, PROT_READ | PROT_WRITE, MAP_SHARED);
	strcpy(shared + PAGE, "stored through a mapping");
	is(msync(shared, 3 * PAGE, MS_SYNC), 0, "msync");
	strcpy(shared + 2 * PAGE, "and never synchronised");
	is(rename(path, "left"), 0, "left");
}

int main(int argc, char **argv)
{
	deadline(60);
	catch_failed_accesses();
	if (argc < 2 || chdir(argv[1])) {
		ok(0, "a folder to work in");
		return tap_end();
	}
	snprintf(path, sizeof path, "vmm-test-shared-%d", (int)getpid());
	anonymous();
	descriptors();
	truncation();
	protections();
	moves();
	forks();
	memory_files();
	leave();
	return tap_end();
}
