/* Locks that processes share: futexes of shared memory and of mapped files, at whatever address, and the
 * mutexes, conditions, barriers, locks and semaphores that are built from them; owners that die. The arguments are
 * a folder to work in and how often to count. */
#include "tap.h"
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>

static char path[PATH_MAX];
static long rounds;

static long futex(_Atomic uint32_t *word, int op, uint32_t value, const struct timespec *timeout,
		  _Atomic uint32_t *second, uint32_t third)
{
	return syscall(SYS_futex, word, op, value, timeout, second, third);
}

static void *shared(size_t pages)
{
	return mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

static void *map_file(int fd)
{
	return mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
}

static int new_file(void)
{
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	return fd >= 0 && ftruncate(fd, PAGE) == 0 ? fd : -1;
}

/* Wakes until somebody was woken, or for about two seconds: the waiter may not wait yet. */
static long wake_somebody(_Atomic uint32_t *word, int op)
{
	long woken = 0;
	for (int n = 0; n < 400 && woken == 0; n++) {
		woken = futex(word, op, 1, NULL, NULL, 0);
		if (woken == 0)
			sleep_ms(5);
	}
	return woken;
}

static const struct timespec LONG = {20, 0}, SHORT = {0, 100000000};

/* Waits in a child; its exit status says how that ended. */
static pid_t waiter(_Atomic uint32_t *word, int op, const struct timespec *timeout)
{
	pid_t pid = fork();
	if (pid == 0)
		_exit(futex(word, op, 0, timeout, NULL, 0) == 0 ? 0 : errno);
	return pid;
}

static void by_mapping(void)
{
	_Atomic uint32_t *here = shared(1);
	pid_t pid = waiter(here, FUTEX_WAIT, &LONG);
	is(wake_somebody(here, FUTEX_WAKE), 1, "a child waits for a word of shared memory, the parent wakes it");
	is(exited_with(wait_for(pid)), 0, "it was woken");

	int fd = new_file();
	_Atomic uint32_t *one = map_file(fd), *other = map_file(fd);
	pid = waiter(one, FUTEX_WAIT, &LONG);
	is(wake_somebody(other, FUTEX_WAKE), 1, "a word of a mapped file is the same at another address");
	is(exited_with(wait_for(pid)), 0, "it was woken");
	munmap(one, PAGE);
	munmap(other, PAGE);
	close(fd);

	fd = memfd_create("locks", 0);
	is(ftruncate(fd, PAGE), 0, "a memfd");
	one = map_file(fd);
	pid = waiter(one, FUTEX_WAIT, &LONG);
	munmap(one, PAGE);
	other = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	is(wake_somebody(other, FUTEX_WAKE), 1, "so is a word of a memfd that was mapped anew");
	is(exited_with(wait_for(pid)), 0, "it was woken");
	close(fd);

	pid = waiter(here, FUTEX_WAIT, &LONG);
	char *moved = mremap((void *)here, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (char *)shared(4) + 2 * PAGE);
	is(wake_somebody((void *)moved, FUTEX_WAKE), 1, "a mapping that was moved still has its waiters");
	is(exited_with(wait_for(pid)), 0, "it was woken");
}

/* What must not meet. */
static void apart(void)
{
	_Atomic uint32_t *word = shared(1);
	pid_t pid = waiter(word, FUTEX_WAIT_PRIVATE, &SHORT);
	sleep_ms(30);
	is(futex(word, FUTEX_WAKE, 1, NULL, NULL, 0), 0, "who waits privately is not woken from outside");
	is(exited_with(wait_for(pid)), ETIMEDOUT, "it was not");
	static _Atomic uint32_t own;
	pid = waiter(&own, FUTEX_WAIT, &SHORT);
	sleep_ms(30);
	is(futex(&own, FUTEX_WAKE, 1, NULL, NULL, 0), 0, "the words of parent and child after a fork are two");
	is(exited_with(wait_for(pid)), ETIMEDOUT, "they are");
	pid = waiter(word, FUTEX_WAIT, &SHORT);
	sleep_ms(30);
	is(futex(word + 1, FUTEX_WAKE, 1, NULL, NULL, 0), 0, "so are neighbours in shared memory");
	is(exited_with(wait_for(pid)), ETIMEDOUT, "they are");
}

static void refused(void)
{
	_Atomic uint32_t *word = shared(1);
	munmap(word, PAGE);
	fails(futex(word, FUTEX_WAKE, 1, NULL, NULL, 0), EFAULT, "a shared word that is not mapped");
	is(futex(word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0), 0, "a private one need not be");
	word = mmap(NULL, PAGE, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	fails(futex(word, FUTEX_WAKE, 1, NULL, NULL, 0), EFAULT, "a shared word without access");
	int fd = new_file();
	word = map_file(fd);
	is(ftruncate(fd, 0), 0, "a file is truncated");
	fails(futex(word, FUTEX_WAKE, 1, NULL, NULL, 0), EFAULT, "a word beyond the end");
	munmap(word, PAGE);
	close(fd);
}

static void requeued(void)
{
	_Atomic uint32_t *words = shared(1);
	pid_t pids[3];
	for (int n = 0; n < 3; n++)
		pids[n] = waiter(words, FUTEX_WAIT, &LONG);
	long moved = 0;
	for (int n = 0; n < 400 && moved < 3; n++, sleep_ms(5))
		moved += futex(words, FUTEX_CMP_REQUEUE, 0, (void *)9L, words + 8, 0);
	is(moved, 3, "waiters of three processes are moved to another word");
	is(futex(words, FUTEX_WAKE, 9, NULL, NULL, 0), 0, "none is left");
	words[8] = 5;
	/* Sets the second word to 7; wakes one of the first, and as many of the second since it was 5. */
	long woken = futex(words, FUTEX_WAKE_OP, 9, (void *)9L, words + 8,
			   FUTEX_OP(FUTEX_OP_SET, 7, FUTEX_OP_CMP_EQ, 5));
	is(woken, 3, "FUTEX_WAKE_OP finds them there");
	is(words[8], 7, "and changed the word");
	int wrong = 0;
	for (int n = 0; n < 3; n++)
		wrong += exited_with(wait_for(pids[n])) != 0;
	is(wrong, 0, "all were woken");
}

struct locks {
	pthread_mutex_t mutex;
	pthread_cond_t turn;
	pthread_barrier_t barrier;
	pthread_rwlock_t readers;
	sem_t empty, full;
	long count, whose, sum, torn, pair[2];
	_Atomic long serial;
};

#define PROCESSES 4

static struct locks *new_locks(int robust)
{
	struct locks *l = shared(1);
	pthread_mutexattr_t mutex;
	pthread_condattr_t turn;
	pthread_barrierattr_t barrier;
	pthread_rwlockattr_t readers;
	pthread_mutexattr_init(&mutex);
	pthread_mutexattr_setpshared(&mutex, PTHREAD_PROCESS_SHARED);
	if (robust)
		pthread_mutexattr_setrobust(&mutex, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&l->mutex, &mutex);
	pthread_condattr_init(&turn);
	pthread_condattr_setpshared(&turn, PTHREAD_PROCESS_SHARED);
	pthread_cond_init(&l->turn, &turn);
	pthread_barrierattr_init(&barrier);
	pthread_barrierattr_setpshared(&barrier, PTHREAD_PROCESS_SHARED);
	pthread_barrier_init(&l->barrier, &barrier, PROCESSES);
	pthread_rwlockattr_init(&readers);
	pthread_rwlockattr_setpshared(&readers, PTHREAD_PROCESS_SHARED);
	pthread_rwlock_init(&l->readers, &readers);
	sem_init(&l->empty, 1, 1);
	sem_init(&l->full, 1, 0);
	return l;
}

static void count(struct locks *l, long me)
{
	(void)me;
	for (long n = 0; n < rounds; n++) {
		pthread_mutex_lock(&l->mutex);
		l->count++;
		pthread_mutex_unlock(&l->mutex);
	}
}

static void take_turns(struct locks *l, long me)
{
	for (long n = 0; n < rounds / 10; n++) {
		pthread_mutex_lock(&l->mutex);
		while (l->whose != me)
			pthread_cond_wait(&l->turn, &l->mutex);
		l->whose = (me + 1) % PROCESSES;
		l->count++;
		pthread_cond_broadcast(&l->turn);
		pthread_mutex_unlock(&l->mutex);
	}
}

static void meet(struct locks *l, long me)
{
	(void)me;
	for (long n = 0; n < rounds / 10; n++) {
		l->serial++;
		pthread_barrier_wait(&l->barrier);
		if (l->serial % PROCESSES)
			l->torn++;
		pthread_barrier_wait(&l->barrier);
	}
}

static void read_and_write(struct locks *l, long me)
{
	for (long n = 0; n < rounds; n++) {
		if (n % 8 == me) {
			pthread_rwlock_wrlock(&l->readers);
			l->pair[0]++;
			l->pair[1]++;
		} else {
			pthread_rwlock_rdlock(&l->readers);
			l->torn += l->pair[0] != l->pair[1];
		}
		pthread_rwlock_unlock(&l->readers);
	}
}

/* Even ones hand numbers to odd ones. */
static void hand_over(struct locks *l, long me)
{
	for (long n = 0; n < rounds / 10; n++) {
		sem_t *first = me % 2 ? &l->full : &l->empty, *then = me % 2 ? &l->empty : &l->full;
		while (sem_wait(first))
			;
		if (me % 2)
			l->sum += l->count;
		else
			l->count = n;
		sem_post(then);
	}
}

static struct locks *together(void (*body)(struct locks *, long), int robust)
{
	struct locks *l = new_locks(robust);
	pid_t pids[PROCESSES];
	int wrong = 0;
	for (long n = 0; n < PROCESSES; n++) {
		pids[n] = fork();
		if (pids[n] == 0) {
			body(l, n);
			_exit(0);
		}
	}
	for (int n = 0; n < PROCESSES; n++)
		wrong += exited_with(wait_for(pids[n])) != 0;
	is(wrong, 0, "all processes ended well");
	return l;
}

static void built(void)
{
	is(together(count, 0)->count, PROCESSES * rounds, "a mutex of several processes");
	is(together(count, 1)->count, PROCESSES * rounds, "a robust one");
	is(together(take_turns, 0)->count, PROCESSES * (rounds / 10), "a condition of several processes");
	is(together(meet, 0)->torn, 0, "a barrier");
	is(together(read_and_write, 0)->torn, 0, "a lock for readers and writers");
	long n = rounds / 10;
	is(together(hand_over, 0)->sum, PROCESSES / 2 * (n * (n - 1) / 2), "semaphores");
}

static void named(void)
{
	char name[40];
	snprintf(name, sizeof name, "/vmm-test-%d", (int)getpid());
	sem_t *here = sem_open(name, O_CREAT | O_EXCL, 0600, 0);
	if (!ok(here != SEM_FAILED, "a semaphore with a name"))
		return;
	pid_t pid = fork();
	if (pid == 0) {
		sem_t *there = sem_open(name, 0);
		_exit(there == SEM_FAILED || sem_wait(there));
	}
	sleep_ms(20);
	sem_post(here);
	is(exited_with(wait_for(pid)), 0, "who opened it by its name is woken");
	sem_close(here);
	is(sem_unlink(name), 0, "and it goes");
}

/* An owner that dies, by exit, by a signal or by execve, and somebody who waits for it. */
static void owner_dies(int how, const char *name)
{
	struct locks *l = new_locks(1);
	pid_t owner = fork();
	if (owner == 0) {
		pthread_mutex_lock(&l->mutex);
		l->serial = 1;
		sleep_ms(50);
		if (how == 0)
			_exit(0);
		if (how == 1)
			for (;;)
				pause();
		execl("/proc/self/exe", "shared_locks", NULL);
		_exit(9);
	}
	while (!l->serial)
		sleep_ms(1);
	pid_t heir = fork();
	if (heir == 0) {
		int got = pthread_mutex_lock(&l->mutex);
		pthread_mutex_consistent(&l->mutex);
		pthread_mutex_unlock(&l->mutex);
		_exit(got == EOWNERDEAD ? 0 : got == 0 ? 98 : got);
	}
	sleep_ms(30);
	if (how == 1)
		kill(owner, SIGKILL);
	wait_for(owner);
	is(exited_with(wait_for(heir)), 0, name);
	is(pthread_mutex_lock(&l->mutex), 0, "the mutex is as good as before");
	is(pthread_mutex_unlock(&l->mutex), 0, "and can be given back");
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 0;
	deadline(100);
	snprintf(path, sizeof path, "%s/vmm-test-locks", argv[1]);
	rounds = atol(argv[2]);
	by_mapping();
	apart();
	refused();
	requeued();
	built();
	named();
	owner_dies(0, "the owner of a robust mutex exits: another process gets it, and is told");
	owner_dies(1, "it is killed");
	owner_dies(2, "it runs another program");
	unlink(path);
	return tap_end();
}
