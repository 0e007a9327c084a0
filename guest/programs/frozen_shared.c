/* Two processes fill memory that they share (of no file, a file in memory, a memfd), and one of them freezes itself (/dev/vmm).
 * In a clone, and in a guest that vmm restore was given a MODE for, both look whether all of it is there, and do what the settings say:
 *   MODE=read   nothing else; then it sleeps
 *   MODE=write  both store to it, by mappings and by descriptors, cut it and make holes, and look what the other one sees; with a name it
 *               freezes itself again in the middle, so that a clone of the clone goes on from there
 *               WAIT=1 has it rest for a while then; a clone of it has DEEPER=1
 *   MODE=again  both store to all of it; then it sleeps, to be reset
 * usage: frozen_shared PAGES, of each kind */
#include "tap.h"
#include <sys/sendfile.h>

#define KINDS 3
enum { NO_FILE, FILE_IN_MEMORY, SEALED };
/* What the two do, one after the other: each step has an even and an odd half. */
enum step { LOOK, STORE, LOOK_AGAIN, SEE_ZEROES, END };
struct order {
	enum step step;
	unsigned long salt;
};

static unsigned long pages;
static uint64_t *memory[KINDS];
static int files[KINDS] = {-1, -1, -1};
static int orders[2], answers[2];

static uint64_t word(int kind, unsigned long page, unsigned long i, unsigned long salt)
{
	return ((uint64_t)kind << 56) ^ ((uint64_t)salt << 40) ^ (page + 1) * 0x9e3779b97f4a7c15ul ^ i;
}

static uint64_t *at(int kind, unsigned long page) { return memory[kind] + page * PAGE / 8; }

/* The pages whose number has the remainder, or all (2). */
static int mine(unsigned long page, int half) { return half == 2 || page % 2 == (unsigned long)half; }

static void fill(unsigned long salt, int half)
{
	for (int kind = 0; kind < KINDS; kind++)
		for (unsigned long page = 0; page < pages; page++)
			for (unsigned long i = 0; mine(page, half) && i < PAGE / 8; i += 64)
				at(kind, page)[i] = word(kind, page, i, salt);
}

static long wrong(unsigned long salt)
{
	long wrong = 0;
	for (int kind = 0; kind < KINDS; kind++)
		for (unsigned long page = 0; page < pages; page++)
			for (unsigned long i = 0; i < PAGE / 8; i += 64)
				wrong += at(kind, page)[i] != word(kind, page, i, salt);
	return wrong;
}

/* The same by descriptor. */
static long wrong_in_files(unsigned long salt)
{
	static uint64_t page_of[PAGE / 8];
	long wrong = 0;
	for (int kind = FILE_IN_MEMORY; kind < KINDS; kind++)
		for (unsigned long page = 0; page < pages; page++) {
			wrong += pread(files[kind], page_of, PAGE, page * PAGE) != (long)PAGE;
			for (unsigned long i = 0; i < PAGE / 8; i += 64)
				wrong += page_of[i] != word(kind, page, i, salt);
		}
	return wrong;
}

static void die(const char *why)
{
	say("%s: %s\n", why, strerror(errno));
	_exit(1);
}

/* The other process. */
static void follow(void)
{
	struct order order;
	while (read(orders[0], &order, sizeof order) == sizeof order && order.step != END) {
		long answer = 0;
		if (order.step == LOOK || order.step == LOOK_AGAIN)
			answer = wrong(order.salt);
		else if (order.step == STORE)
			fill(order.salt, 1);
		else
			for (unsigned long i = 0; i < PAGE / 8; i++)
				answer += at(FILE_IN_MEMORY, 2)[i] != 0;
		if (write(answers[1], &answer, sizeof answer) != sizeof answer)
			_exit(1);
	}
	_exit(0);
}

static long other(enum step step, unsigned long salt)
{
	struct order order = {step, salt};
	long answer = -1;
	if (write(orders[1], &order, sizeof order) != sizeof order)
		die("an order");
	if (step != END && read(answers[0], &answer, sizeof answer) != sizeof answer)
		die("an answer");
	return answer;
}

static long blocks(int kind)
{
	struct stat st;
	return fstat(files[kind], &st) ? -1 : st.st_blocks / (long)(PAGE / 512);
}

#define EXPECT(what)                                                \
	do {                                                        \
		if (!(what)) {                                      \
			say("%d: %s\n", __LINE__, #what);           \
			_exit(1);                                   \
		}                                                   \
	} while (0)

/* Everything has the salt's pattern, in both. */
static void all_is(unsigned long salt)
{
	EXPECT(wrong(salt) == 0);
	EXPECT(wrong_in_files(salt) == 0);
	EXPECT(other(LOOK, salt) == 0);
}

static void store_all(unsigned long salt)
{
	fill(salt, 0);
	EXPECT(other(STORE, salt) == 0);
}

/* Descriptors, ends, holes and seals. */
static void descriptors(unsigned long salt)
{
	int file = files[FILE_IN_MEMORY], sealed = files[SEALED];
	char text[] = "written";
	EXPECT(pwrite(file, text, sizeof text, 3 * PAGE + 8) == sizeof text);
	EXPECT(memcmp((char *)at(FILE_IN_MEMORY, 3) + 8, text, sizeof text) == 0);
	EXPECT(at(FILE_IN_MEMORY, 3)[0] == word(FILE_IN_MEMORY, 3, 0, salt));
	EXPECT(pwrite(sealed, text, sizeof text, 3 * PAGE + 8) == sizeof text);
	int copy = open("/dev/shm/copy", O_RDWR | O_CREAT, 0600);
	EXPECT(copy >= 0 && lseek(file, 0, SEEK_SET) == 0 && sendfile(copy, file, NULL, 2 * PAGE) == 2 * (long)PAGE);
	uint64_t first = 0;
	EXPECT(pread(copy, &first, 8, PAGE) == 8 && first == word(FILE_IN_MEMORY, 1, 0, salt));
	EXPECT(fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 2 * PAGE, PAGE) == 0);
	EXPECT(blocks(FILE_IN_MEMORY) == (long)pages - 1);
	EXPECT(other(SEE_ZEROES, 0) == 0);
	/* Who looked at the hole has a page there. */
	EXPECT(ftruncate(file, 5 * PAGE + 16) == 0 && blocks(FILE_IN_MEMORY) == 6);
	EXPECT(ftruncate(file, pages * PAGE) == 0 && blocks(FILE_IN_MEMORY) == 6);
	EXPECT(at(FILE_IN_MEMORY, 5)[0] == word(FILE_IN_MEMORY, 5, 0, salt));
	EXPECT(at(FILE_IN_MEMORY, 5)[64] == 0 && at(FILE_IN_MEMORY, 9)[0] == 0);
	EXPECT(madvise(at(NO_FILE, 4), PAGE, MADV_REMOVE) == 0 && at(NO_FILE, 4)[0] == 0);
	EXPECT(fcntl(sealed, F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW));
	EXPECT(ftruncate(sealed, PAGE) == -1 && errno == EPERM);
	EXPECT(fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE) == -1 && errno == EBUSY);
	EXPECT(blocks(SEALED) == (long)pages);
}

static void map(int kind, int fd)
{
	int flags = fd < 0 ? MAP_SHARED | MAP_ANONYMOUS : MAP_SHARED;
	files[kind] = fd;
	if (fd >= 0 && ftruncate(fd, pages * PAGE))
		die("the size");
	memory[kind] = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (memory[kind] == MAP_FAILED)
		die("mmap");
}

/* What it is told, if there is anything new, and which guest that makes it. */
static unsigned long told(int vmm, char said[512])
{
	unsigned long number = 0;
	memset(said, 0, 512);
	if (read(vmm, said, 511) < 0)
		die("/dev/vmm");
	sscanf(said, "clone %lu", &number);
	/* A guest of a snapshot has no number, and is to store all the same. */
	if (strncmp(said, "restored ", 9) == 0 && strstr(said, "MODE="))
		number = 7;
	return number;
}

/* Freezes itself; gives what it is told then. */
static unsigned long freeze(int vmm, char said[512])
{
	if (write(vmm, "freeze\n", 7) != 7)
		die("/dev/vmm");
	return told(vmm, said);
}

int main(int argc, char **argv)
{
	static char said[512];
	pages = argc > 1 ? strtoul(argv[1], NULL, 10) : 1024;
	map(NO_FILE, -1);
	map(FILE_IN_MEMORY, open("/dev/shm/file", O_RDWR | O_CREAT, 0600));
	map(SEALED, memfd_create("sealed", MFD_ALLOW_SEALING));
	if (fcntl(files[SEALED], F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) || pipe(orders) || pipe(answers))
		die("the start");
	fill(0, 2);
	pid_t child = fork();
	if (child == 0) {
		close(orders[1]);
		follow();
	}
	int vmm = open("/dev/vmm", O_RDWR);
	unsigned long salt = freeze(vmm, said);
	if (!salt) {
		char byte;
		say("original\n");
		while (read(0, &byte, 1) > 0) {
		}
		all_is(0);
		/* A snapshot of it may have been taken meanwhile. */
		salt = told(vmm, said);
	}
	if (!salt) {
		other(END, 0);
		say("as it was\n");
		return 0;
	}
	all_is(0);
	if (strstr(said, "MODE=write")) {
		store_all(salt);
		all_is(salt);
		say("written %lu\n", salt);
		int waits = strstr(said, "WAIT=1") != NULL;
		unsigned long number = freeze(vmm, said);
		all_is(salt);
		if (strstr(said, "DEEPER=1"))
			say("deeper %lu of %lu\n", number, salt);
		else if (waits)
			say("rests\n"), sleep(4);
		salt += 100 * number;
		store_all(salt);
		all_is(salt);
		descriptors(salt);
		other(END, 0);
		say("ok\n");
		return 0;
	}
	if (strstr(said, "MODE=again"))
		store_all(salt), all_is(salt), say("changed\n");
	else
		say("read\n");
	sleep(600);
	return 0;
}
