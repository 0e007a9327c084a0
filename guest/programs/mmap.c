/* Memory as a program sees it: protections, holes, moves, advice, large reservations, files
 * mapped privately, and arguments that make no sense. */
#include "trapped.h"


static char *anon(unsigned long size, int prot)
{
	return mmap(NULL, size, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void protections(void)
{
	char *m = anon(8 * PAGE, PROT_READ | PROT_WRITE);
	memset(m, 7, 8 * PAGE);
	is(mprotect(m + 2 * PAGE, PAGE, PROT_READ), 0, "mprotect in the middle");
	is(writing(m + 2 * PAGE, 1), SIGSEGV, "makes it read-only");
	ok(got_addr == m + 2 * PAGE && got_code == SEGV_ACCERR, "with the address and SEGV_ACCERR");
	is(reading(m + 2 * PAGE), 0, "still readable");
	is(writing(m + 3 * PAGE - PAGE - 1, 8), 0, "and its neighbour writable");
	is(mprotect(m + 2 * PAGE, PAGE, PROT_NONE), 0, "PROT_NONE");
	is(reading(m + 2 * PAGE), SIGSEGV, "is not readable");
	is(mprotect(m, 8 * PAGE, PROT_READ | PROT_WRITE), 0, "back again over all");
	is(m[2 * PAGE + 5], 7, "with the content kept");
	is(writing(m + 2 * PAGE, 9), 0, "and writable");
	fails(mprotect(m + 1, PAGE, PROT_READ), EINVAL, "mprotect of an odd address");
	munmap(m + 4 * PAGE, PAGE);
	fails(mprotect(m, 8 * PAGE, PROT_READ), ENOMEM, "mprotect over a hole");
	is(reading(m + 4 * PAGE), SIGSEGV, "the hole is one");
	is(got_code, SEGV_MAPERR, "of SEGV_MAPERR");
	is(m[5 * PAGE], 7, "what follows it is there");
	is(munmap(m, 8 * PAGE), 0, "munmap over a hole works");
	is(reading(m), SIGSEGV, "and all is gone");
	char code[] = {(char)0xb8, 42, 0, 0, 0, (char)0xc3};
	char *x = anon(PAGE, PROT_READ | PROT_WRITE);
	memcpy(x, code, sizeof code);
	is(mprotect(x, PAGE, PROT_READ | PROT_EXEC), 0, "code made executable");
	is(((int (*)(void))x)(), 42, "runs");
	mprotect(x, PAGE, PROT_READ | PROT_WRITE);
	x[1] = 43;
	mprotect(x, PAGE, PROT_READ | PROT_EXEC);
	is(((int (*)(void))x)(), 43, "and runs changed after it was changed");
	munmap(x, PAGE);
}

static void protected_after_fork(void)
{
	char *m = anon(4 * PAGE, PROT_READ | PROT_WRITE);
	memset(m, 1, 4 * PAGE);
	pid_t pid = fork();
	if (pid == 0) {
		int bad = mprotect(m, 2 * PAGE, PROT_READ);
		bad += writing(m, 2) != SIGSEGV;
		bad += m[0] != 1;
		bad += mprotect(m, 2 * PAGE, PROT_READ | PROT_WRITE);
		bad += writing(m, 2) != 0;
		bad += munmap(m + 3 * PAGE, PAGE);
		_exit(bad);
	}
	is(exited_with(wait_for(pid)), 0, "a child changes its own protections");
	ok(m[0] == 1 && m[3 * PAGE] == 1 && writing(m + 3 * PAGE, 5) == 0, "not the parent's");
	munmap(m, 4 * PAGE);
}

static void placement(void)
{
	char *m = anon(16 * PAGE, PROT_READ | PROT_WRITE);
	m[5 * PAGE] = 1;
	ok(mmap(m + 4 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == m + 4 * PAGE, "MAP_FIXED");
	is(m[5 * PAGE], 0, "replaces what was there");
	void *there = mmap(m + 4 * PAGE, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	fails(there == MAP_FAILED ? -1 : 0, EEXIST, "MAP_FIXED_NOREPLACE does not");
	munmap(m + 8 * PAGE, 4 * PAGE);
	ok(mmap(m + 8 * PAGE, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == m + 8 * PAGE, "a hint that is free is taken");
	munmap(m, 16 * PAGE);
	char *brk0 = sbrk(0);
	ok(sbrk(10 * PAGE) == brk0 && writing(brk0 + 9 * PAGE, 1) == 0, "the heap grows");
	sbrk(-10 * (long)PAGE);
	ok(sbrk(0) == brk0, "and shrinks");
	sbrk(10 * PAGE);
	is(brk0[9 * PAGE], 0, "and is zero when it grows again");
}

static void moving(void)
{
	char *m = anon(4 * PAGE, PROT_READ | PROT_WRITE);
	for (int i = 0; i < 4; i++)
		m[i * PAGE] = 10 + i;
	char *bigger = mremap(m, 4 * PAGE, 64 * PAGE, MREMAP_MAYMOVE);
	ok(bigger != MAP_FAILED, "mremap to more");
	ok(bigger[0] == 10 && bigger[3 * PAGE] == 13 && bigger[4 * PAGE] == 0 && writing(bigger + 63 * PAGE, 1) == 0, "keeps the old and adds zeros");
	ok(mremap(bigger, 64 * PAGE, 2 * PAGE, 0) == bigger, "mremap to less stays");
	is(reading(bigger + 2 * PAGE), SIGSEGV, "and cuts the rest off");
	char *target = anon(8 * PAGE, PROT_NONE);
	ok(mremap(bigger, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target + PAGE) == target + PAGE, "MREMAP_FIXED moves");
	ok(target[PAGE] == 10 && target[2 * PAGE] == 11, "with the content");
	is(reading(bigger), SIGSEGV, "leaving nothing");
	is(reading(target), SIGSEGV, "and the neighbours as they were");
	void *no = mremap(target + PAGE, 2 * PAGE, 100 * PAGE, 0);
	fails(no == MAP_FAILED ? -1 : 0, ENOMEM, "no room and not allowed to move");
	munmap(target, 8 * PAGE);
	fails(mremap(target, PAGE, 2 * PAGE, MREMAP_MAYMOVE) == MAP_FAILED ? -1 : 0, EFAULT, "mremap of nothing");
}

static void advice(void)
{
	char *m = anon(8 * PAGE, PROT_READ | PROT_WRITE);
	memset(m, 3, 8 * PAGE);
	is(madvise(m + PAGE, 2 * PAGE, MADV_DONTNEED), 0, "MADV_DONTNEED");
	ok(m[0] == 3 && m[PAGE] == 0 && m[2 * PAGE] == 0 && m[3 * PAGE] == 3, "gives zeros, there only");
	is(writing(m + PAGE, 4), 0, "writable as before");
	pid_t pid = fork();
	if (pid == 0) {
		madvise(m, 8 * PAGE, MADV_DONTNEED);
		_exit(m[0] + m[4 * PAGE]);
	}
	is(exited_with(wait_for(pid)), 0, "in a child too");
	ok(m[0] == 3 && m[4 * PAGE] == 3, "without a change in the parent");
	fails(madvise(m + 1, PAGE, MADV_DONTNEED), EINVAL, "at an odd address");
	fails(madvise(m, PAGE, 12345), EINVAL, "unknown advice");
	munmap(m, 8 * PAGE);
	fails(madvise(m, PAGE, MADV_DONTNEED), ENOMEM, "over a hole");
}

static void reservations(void)
{
	unsigned long size = 64UL << 30;
	char *m = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ok(m != MAP_FAILED, "64 GiB with PROT_NONE");
	is(mprotect(m + (40UL << 30), 2 * PAGE, PROT_READ | PROT_WRITE), 0, "of which two pages become usable");
	is(writing(m + (40UL << 30) + PAGE, 6), 0, "and are used");
	is(reading(m + (41UL << 30)), SIGSEGV, "not the rest");
	is(munmap(m, size), 0, "and all given back");
	m = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	ok(m != MAP_FAILED, "64 GiB with MAP_NORESERVE");
	int bad = 0;
	for (unsigned long i = 0; i < 64; i++)
		bad += writing(m + (i << 30) + 123, (char)i) != 0;
	for (unsigned long i = 0; i < 64; i++)
		bad += m[(i << 30) + 123] != (char)i;
	is(bad, 0, "a page in each gigabyte");
	pid_t pid = fork();
	if (pid == 0) {
		m[123] = 99;
		_exit(m[(63UL << 30) + 123]);
	}
	is(exited_with(wait_for(pid)), 63, "forked with it");
	is(m[123], 0, "and kept apart");
	is(munmap(m, size), 0, "given back");
	m = mmap(NULL, 1UL << 46, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ok(m == MAP_FAILED ? errno == ENOMEM : munmap(m, 1UL << 46) == 0, "64 TiB is refused with ENOMEM, or works");
}

static void files(const char *dir)
{
	char name[PATH_MAX], text[64];
	snprintf(name, sizeof name, "%s/mmap-test", dir);
	int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (!ok(fd >= 0, "a file to map"))
		return;
	unlink(name);
	char content[2 * PAGE];
	for (unsigned i = 0; i < sizeof content; i++)
		content[i] = 'a' + i / 100 % 26;
	is(write(fd, content, PAGE + 100), PAGE + 100, "of a page and a bit");
	char *m = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	ok(m != MAP_FAILED && !memcmp(m, content, PAGE + 100), "MAP_PRIVATE shows the file");
	ok(m[PAGE + 100] == 0 && m[2 * PAGE - 1] == 0, "and zeros to the page's end");
	is(reading(m + 2 * PAGE), SIGBUS, "beyond the end: SIGBUS");
	ok(got_code == BUS_ADRERR && got_addr == m + 2 * PAGE, "with BUS_ADRERR and the address");
	is(writing(m + 3 * PAGE, 1), SIGBUS, "writing there too");
	m[0] = 'Z';
	is(pread(fd, text, 1, 0), 1, "the file is read");
	is(text[0], content[0], "and has nothing of what is written privately");
	is(pwrite(fd, "QQ", 2, PAGE), 2, "the file changes");
	is(m[0], 'Z', "what was written stays");
	pid_t pid = fork();
	if (pid == 0) {
		int bad = m[0] != 'Z';
		m[1] = 'Y';
		_exit(bad);
	}
	is(exited_with(wait_for(pid)), 0, "a child sees it");
	is(m[1], content[1], "and writes for itself");
	munmap(m, 4 * PAGE);
	m = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, PAGE);
	ok(m != MAP_FAILED && m[0] == 'Q', "a mapping from an offset");
	munmap(m, PAGE);
	m = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
	close(fd);
	is(m[200], content[200], "a mapping outlives its descriptor");
	munmap(m, PAGE);
}

static void absurd(void)
{
#define REFUSED(want, name, ...) do { void *p = mmap(__VA_ARGS__); fails(p == MAP_FAILED ? -1 : 0, want, name); } while (0)
	REFUSED(EINVAL, "mmap of nothing", NULL, 0, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	REFUSED(EINVAL, "mmap neither shared nor private", NULL, PAGE, PROT_READ, MAP_ANONYMOUS, -1, 0);
	REFUSED(EBADF, "mmap of a file that is not open", NULL, PAGE, PROT_READ, MAP_PRIVATE, 999, 0);
	REFUSED(EINVAL, "mmap at an odd offset", NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 17);
	REFUSED(EINVAL, "MAP_FIXED at an odd address", (void *)0x10001, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	REFUSED(ENOMEM, "mmap of everything", NULL, ~0UL - 2 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	REFUSED(ENOMEM, "mmap that wraps round", NULL, ~0UL, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	REFUSED(ENOMEM, "MAP_FIXED in the kernel's half", (void *)0xffff800000000000, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	REFUSED(ENOMEM, "MAP_FIXED across the end", (void *)0x7ffffffff000, 2 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	fails(munmap((void *)1, PAGE), EINVAL, "munmap of an odd address");
	fails(munmap((void *)PAGE, 0), EINVAL, "munmap of nothing");
	fails(munmap((void *)0xffff800000000000, PAGE), EINVAL, "munmap in the kernel's half");
	fails(munmap((void *)PAGE, ~0UL - PAGE), EINVAL, "munmap that wraps round");
	is(munmap((void *)0x10000, PAGE), 0, "munmap where nothing is");
	fails(mprotect((void *)0x10000, PAGE, PROT_READ), ENOMEM, "mprotect where nothing is");
	fails(mprotect((void *)0x10000, PAGE, 0x100), EINVAL, "an unknown protection");
	fails(mremap((void *)1, PAGE, PAGE, 0) == MAP_FAILED ? -1 : 0, EINVAL, "mremap of an odd address");
	fails(write(1, (void *)0x10000, 10), EFAULT, "write from nowhere");
	fails(write(1, (void *)0xffff800000000000, 10), EFAULT, "write from the kernel's half");
	fails(read(0, (void *)0x8000000000000000, 0x7fffffff), EFAULT, "read to a non-canonical address");
}

int main(int argc, char **argv)
{
	deadline(60);
	catch_failed_accesses();
	protections();
	protected_after_fork();
	placement();
	moving();
	advice();
	reservations();
	files(argc > 1 ? argv[1] : "/tmp");
	absurd();
	return tap_end();
}
