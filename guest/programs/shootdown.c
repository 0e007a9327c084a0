/* One thread uses a page all the time while another takes rights or the page away. Once the call has returned, no other
 * thread may get away with what it took: neither a right nor old content. */
#include "tap.h"
#include <pthread.h>
#include <stdatomic.h>

#define USERS 3

static char *page, *second;
static atomic_long tick[USERS], faults;
static atomic_int quit;

struct user {
	int index;
	volatile unsigned long *word;
	unsigned long (*use)(volatile unsigned long *, unsigned long);
};

static unsigned long write_it(volatile unsigned long *word, unsigned long n)
{
	*word = n;
	return n;
}

static unsigned long read_it(volatile unsigned long *word, unsigned long n)
{
	(void)n;
	return *word;
}

static _Atomic unsigned long seen[USERS];

static void *use(void *argument)
{
	struct user *user = argument;
	for (unsigned long n = 1; !quit; n++) {
		seen[user->index] = user->use(user->word, n);
		atomic_fetch_add(&tick[user->index], 1);
	}
	return NULL;
}

/* A write that is refused is tried again until it is allowed. */
static void on_fault_wait(int signal)
{
	(void)signal;
	atomic_fetch_add(&faults, 1);
	/* Not at once: the thread that took the page away must get its turn on one processor, too. */
	usleep(50);
}

static pthread_t threads[USERS];
static struct user users[USERS];

static void start(unsigned long (*how)(volatile unsigned long *, unsigned long))
{
	quit = 0;
	for (int n = 0; n < USERS; n++) {
		users[n] = (struct user){n, (volatile unsigned long *)page + n * 8, how};
		tick[n] = 0;
		pthread_create(&threads[n], NULL, use, &users[n]);
	}
	for (int n = 0; n < USERS; n++)
		while (!tick[n])
			usleep(100);
}

static void stop(void)
{
	quit = 1;
	for (int n = 0; n < USERS; n++)
		pthread_join(threads[n], NULL);
}

/* Long enough for every thread to use what it should not have. */
static void let_them(int rounds)
{
	for (volatile int n = 0; n < rounds; n++)
		;
}

/* How many threads read something below `least` or above `most` now. What a thread read before it has finished
 * a round does not count, and one that does not get its turn is not waited for. */
static int saw_outside(unsigned long least, unsigned long most)
{
	int count = 0;
	long before[USERS];
	for (int i = 0; i < USERS; i++)
		before[i] = tick[i];
	for (int i = 0; i < USERS; i++) {
		for (int spins = 0; tick[i] < before[i] + 2 && spins < 200; spins++)
			usleep(20);
		count += tick[i] >= before[i] + 2 && (seen[i] < least || seen[i] > most);
	}
	return count;
}

static unsigned long sum(void)
{
	unsigned long total = 0;
	for (int n = 0; n < USERS; n++)
		total += ((volatile unsigned long *)page)[n * 8];
	return total;
}

/* Without the right to write, nothing changes any more. */
static void protect(int rounds)
{
	int late = 0;
	start(write_it);
	for (int n = 0; n < rounds; n++) {
		mprotect(page, PAGE, PROT_READ);
		unsigned long before = sum();
		let_them(2000);
		late += sum() != before;
		mprotect(page, PAGE, PROT_READ | PROT_WRITE);
		let_them(2000);
	}
	/* The rounds may all have fallen between the turns of the others: here they get theirs. */
	mprotect(page, PAGE, PROT_READ);
	for (int n = 0; n < 20000 && !faults; n++)
		usleep(100);
	mprotect(page, PAGE, PROT_READ | PROT_WRITE);
	stop();
	is(late, 0, "mprotect: no write arrives after the right to write is gone");
}

/* What is mapped instead is what is read; what is written goes there. */
static void replace(int rounds)
{
	int late = 0;
	for (unsigned long n = 0; n < PAGE / 8; n++)
		((unsigned long *)page)[n] = 0;
	start(read_it);
	for (unsigned long n = 1; n <= (unsigned long)rounds; n++) {
		/* A new page with new content takes the place of the old one. */
		for (unsigned long i = 0; i < USERS; i++)
			((unsigned long *)second)[i * 8] = n;
		if (mremap(second, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, page) != page)
			late = -1000;
		late += saw_outside(n, ULONG_MAX);
		second = mmap(second, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	}
	stop();
	is(late, 0, "mremap: what has taken the page's place is what is read");
}

/* Pages that were unmapped come back as zeroes for somebody else: nobody writes into them any more. */
static void unmap(int rounds)
{
	int late = 0;
	start(write_it);
	for (int n = 0; n < rounds; n++) {
		munmap(page, PAGE);
		/* The frame is likely to be used again for this. */
		unsigned long *fresh = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		for (unsigned long i = 0; i < 4; i++)
			fresh[i * PAGE / 8 + PAGE / 16] = 1;
		let_them(2000);
		for (unsigned long i = 0; i < 4 * PAGE / 8; i++)
			late += fresh[i] != (i % (PAGE / 8) == PAGE / 16);
		munmap(fresh, 4 * PAGE);
		mmap(page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		let_them(2000);
	}
	stop();
	is(late, 0, "munmap: no write arrives in a page of somebody else");
}

static void discard(int rounds)
{
	int late = 0;
	start(read_it);
	for (int n = 0; n < rounds; n++) {
		for (int i = 0; i < USERS; i++)
			((volatile unsigned long *)page)[i * 8] = 77;
		madvise(page, PAGE, MADV_DONTNEED);
		late += saw_outside(0, 0);
	}
	stop();
	is(late, 0, "madvise: dropped content is gone for every thread");
}

/* The child's copy is of one moment. */
static void copy(int rounds)
{
	int moved = 0, stuck = 0;
	start(write_it);
	for (int n = 0; n < rounds; n++) {
		pid_t pid = fork();
		if (pid == 0) {
			unsigned long before = sum();
			let_them(20000);
			_exit(sum() != before);
		}
		int status = wait_for(pid);
		moved += exited_with(status) != 0;
		long before = tick[0];
		for (int spins = 0; tick[0] == before && spins < 20000; spins++)
			usleep(100);
		stuck += tick[0] == before;
	}
	stop();
	is(moved, 0, "fork: the parent's threads write nothing into the child's copy");
	is(stuck, 0, "and go on writing into their own");
}

/* A system call that writes into a page shared since a fork: every thread sees what it wrote. */
static void call_breaks_copy(int rounds)
{
	int stale = 0, ends[2];
	if (pipe(ends))
		return;
	start(read_it);
	for (unsigned long n = 1; n <= (unsigned long)rounds; n++) {
		unsigned long fill[USERS * 8];
		for (int i = 0; i < USERS * 8; i++)
			fill[i] = n;
		pid_t pid = fork();
		if (pid == 0) {
			pause();
			_exit(0);
		}
		if (write(ends[1], fill, sizeof fill) != sizeof fill || read(ends[0], page, sizeof fill) != sizeof fill)
			stale = -1000;
		stale += saw_outside(n, n);
		kill(pid, SIGKILL);
		wait_for(pid);
	}
	stop();
	is(stale, 0, "read(2) into a page shared with a child is seen by every thread");
	close(ends[0]);
	close(ends[1]);
}

int main(int argc, char **argv)
{
	int rounds = argc > 1 ? atoi(argv[1]) : 200;
	struct sigaction action = {.sa_handler = on_fault_wait};
	sigaction(SIGSEGV, &action, NULL);
	deadline(300);
	char *both = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	page = both;
	second = both + 2 * PAGE;
	protect(rounds);
	unmap(rounds);
	replace(rounds);
	discard(rounds);
	copy(rounds / 4);
	call_breaks_copy(rounds / 4);
	ok(faults > 0, "threads were refused, waited and went on");
	return tap_end();
}
