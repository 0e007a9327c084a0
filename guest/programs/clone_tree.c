/* A guest of several processes with several threads, all of which write every byte of their memory: the clones of it, and the
 * clones of these, each with a pattern of its own, find what the one they come from had at the freeze, and then nothing but
 * their own. Which clone it is, `vmm fork --env ID=N` says; ID 0 is the original. With DEEPER=1 a clone is frozen again.
 *
 * clone_tree PAGES [REST]: so many pages for each thread in each kind of memory, and so many milliseconds of rest between two looks at
 * all of it that nobody has asked for. Whoever was frozen goes on writing until its input ends, with as much rest. */
#include "tap.h"
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <stdatomic.h>

#define PROCESSES 3
#define THREADS 2
#define WORKERS (PROCESSES * THREADS)
#define MOST 64
/* What a clone does before it ends. */
#define ROUNDS 3

/* What all are to do. A number that changes says that there is something new. */
enum what { WRITE, CHECK, END };
struct order {
	atomic_int number, done;
	atomic_long wrong, words;
	int what, id, round;
};
static struct order *order;

/* Of each process: its data segment, with a part for each thread. */
static uint64_t segment[THREADS][MOST * PAGE / 8];
static unsigned long pages;
static long rest;

struct worker {
	int index;
	/* Anonymous, shared by all processes, a file in memory, the heap, the data segment. */
	uint64_t *part[5];
};

/* For at most so many milliseconds, if it says any; and until somebody wakes all. */
static void wait_while(atomic_int *what, int is, long ms)
{
	struct timespec most = {ms / 1000, ms % 1000 * 1000000};
	syscall(SYS_futex, what, FUTEX_WAIT, is, ms ? &most : NULL, NULL, 0);
}

static void wake(atomic_int *what) { syscall(SYS_futex, what, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); }

static uint64_t word(int id, int round, int index, int part, unsigned long i)
{
	return ((uint64_t)id << 40 | (uint64_t)round << 32 | (uint64_t)index << 24 | (uint64_t)part << 20 | i) * 0x9e3779b97f4a7c15;
}

static void write_all(const struct worker *me, uint64_t *stack, int id, int round)
{
	for (int p = 0; p < 5; p++)
		for (unsigned long i = 0; i < pages * PAGE / 8; i++)
			me->part[p][i] = word(id, round, me->index, p, i);
	for (unsigned long i = 0; i < PAGE; i++)
		stack[i] = word(id, round, me->index, 5, i);
}

static long check_all(const struct worker *me, const uint64_t *stack, int id, int round)
{
	long wrong = 0;
	for (int p = 0; p < 5; p++)
		for (unsigned long i = 0; i < pages * PAGE / 8; i++)
			wrong += me->part[p][i] != word(id, round, me->index, p, i);
	for (unsigned long i = 0; i < PAGE; i++)
		wrong += stack[i] != word(id, round, me->index, 5, i);
	atomic_fetch_add(&order->words, 5 * pages * PAGE / 8 + PAGE);
	return wrong;
}

/* Between two orders, it looks whether its memory is what it wrote last: so it runs when it is frozen. */
static void *work(void *argument)
{
	struct worker *me = argument;
	uint64_t stack[PAGE];
	int seen = 0, id = 0, round = 0, written = 0;
	for (;;) {
		int number = atomic_load(&order->number);
		if (number == seen) {
			if (written)
				atomic_fetch_add(&order->wrong, check_all(me, stack, id, round));
			if (rest)
				wait_while(&order->number, seen, rest);
			continue;
		}
		seen = number;
		int what = order->what;
		if (what == WRITE) {
			id = order->id, round = order->round, written = 1;
			write_all(me, stack, id, round);
		} else if (what == CHECK) {
			atomic_fetch_add(&order->wrong, check_all(me, stack, order->id, order->round));
		}
		if (atomic_fetch_add(&order->done, 1) + 1 == WORKERS)
			wake(&order->done);
		if (what == END)
			return NULL;
	}
}

static void all(enum what what, int id, int round)
{
	int done;
	order->what = what, order->id = id, order->round = round;
	atomic_store(&order->done, 0);
	atomic_fetch_add(&order->number, 1);
	if (rest)
		wake(&order->number);
	while ((done = atomic_load(&order->done)) != WORKERS)
		wait_while(&order->done, done, 0);
}

static void *map(int flags, int fd, int index)
{
	void *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags, fd, index * pages * PAGE);
	if (at == MAP_FAILED)
		_exit(77);
	return at;
}

static void process(int number, int fd, uint64_t *shared)
{
	static struct worker workers[THREADS];
	static pthread_t threads[THREADS];
	for (int t = 0; t < THREADS; t++) {
		struct worker *w = &workers[t];
		w->index = number * THREADS + t;
		w->part[0] = map(MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		w->part[1] = shared + w->index * pages * PAGE / 8;
		w->part[2] = map(MAP_SHARED, fd, w->index);
		w->part[3] = malloc(pages * PAGE);
		w->part[4] = segment[t];
		if (!w->part[3] || pthread_create(&threads[t], NULL, work, w))
			_exit(78);
	}
	if (number == 0)
		return;
	for (int t = 0; t < THREADS; t++)
		pthread_join(threads[t], NULL);
	_exit(0);
}

/* Asks to be frozen, and returns when that is done. */
static void freeze(void)
{
	int fd = open("/dev/vmm", O_WRONLY);
	if (fd < 0 || write(fd, "freeze\n", 7) != 7)
		_exit(79);
	close(fd);
}

/* Which clone this is; 0: none. */
static int who(int *deeper)
{
	char text[1000] = "";
	int fd = open("/dev/vmm", O_RDONLY);
	if (fd < 0 || read(fd, text, sizeof text - 1) <= 0)
		_exit(81);
	close(fd);
	const char *at = strstr(text, "\nID=");
	*deeper = strstr(text, "\nDEEPER=1") != NULL;
	return at ? atoi(at + 4) : 0;
}

static int input_ended(void)
{
	struct pollfd input = {0, POLLIN, 0};
	return poll(&input, 1, 0) != 0;
}

static int wrong_since(void) { return atomic_exchange(&order->wrong, 0) != 0; }

int main(int argc, char **argv)
{
	pages = argc > 1 ? strtoul(argv[1], NULL, 0) : 16;
	rest = argc > 2 ? strtol(argv[2], NULL, 0) : 0;
	if (pages == 0 || pages > MOST)
		return 2;
	order = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	uint64_t *shared = mmap(NULL, WORKERS * pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int fd = memfd_create("shared", 0);
	if (order == MAP_FAILED || shared == MAP_FAILED || fd < 0 || ftruncate(fd, WORKERS * pages * PAGE))
		return 3;
	pid_t first = getpid();
	for (int p = 1; p < PROCESSES; p++)
		if (fork() == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (getppid() != first)
				_exit(80);
			process(p, fd, shared);
		}
	process(0, fd, shared);

	int me = 0, round = 0, id, deeper = 1;
	all(WRITE, me, round);
	while (deeper) {
		freeze();
		/* The frozen one goes on, so that others would see it. It may be frozen anywhere: then there is one more here. */
		while ((id = who(&deeper)) == me && !input_ended()) {
			round = round % 200 + 1;
			all(WRITE, me, round);
			all(CHECK, me, round);
			if (rest)
				sleep_ms(rest);
		}
		if (id == me)
			break;
		all(CHECK, me, round);
		ok(!wrong_since(), "clone %d has what %d had in round %d", id, me, round);
		me = id;
		for (round = 1; round <= ROUNDS; round++) {
			all(WRITE, me, round);
			all(CHECK, me, round);
		}
		round--;
		ok(!wrong_since(), "clone %d has its own bytes and no others", me);
	}
	all(END, 0, 0);
	for (int p = 1; p < PROCESSES; p++)
		ok(exited_with(wait_for(-1)) == 0, "a process of %d ends", me);
	ok(!wrong_since(), "%d has seen nothing else until its end", me);
	dprintf(2, "%ld words compared\n", atomic_load(&order->words));
	return tap_end();
}
