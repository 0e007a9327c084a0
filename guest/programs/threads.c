/* Threads: birth and death in numbers, locks, storage of their own, signals, cancellation, and what fork, execve and
 * exit mean in a process that has several. */
#include "tap.h"
#include <dirent.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/resource.h>

static pid_t tid_of_caller(void) { return (pid_t)syscall(SYS_gettid); }

static long futex(_Atomic uint32_t *word, int op, uint32_t value, const struct timespec *timeout,
		  _Atomic uint32_t *second, uint32_t third)
{
	return syscall(SYS_futex, word, op, value, timeout, second, third);
}

static int start(pthread_t *thread, void *(*body)(void *), void *argument)
{
	pthread_attr_t attributes;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 64 * 1024);
	int error = pthread_create(thread, &attributes, body, argument);
	pthread_attr_destroy(&attributes);
	return error;
}

static void nap(long ms)
{
	struct timespec t = {ms / 1000, ms % 1000 * 1000000};
	nanosleep(&t, NULL);
}

/* Many, a few at a time and at once. */

static void *double_it(void *argument) { return (void *)((long)argument * 2); }

static void many(int count)
{
	int wrong = 0;
	for (int round = 0; round < count / 50; round++) {
		pthread_t threads[50];
		for (long n = 0; n < 50; n++)
			wrong += start(&threads[n], double_it, (void *)n) != 0;
		for (long n = 0; n < 50; n++) {
			void *result;
			wrong += pthread_join(threads[n], &result) != 0 || (long)result != 2 * n;
		}
	}
	is(wrong, 0, "threads are created and joined by the hundred");
}

static pthread_barrier_t all_here;

static void *meet(void *argument)
{
	pthread_barrier_wait(&all_here);
	return argument;
}

static int tasks(void)
{
	DIR *directory = opendir("/proc/self/task");
	int count = 0;
	if (!directory)
		return -1;
	for (struct dirent *entry; (entry = readdir(directory));)
		count += entry->d_name[0] != '.';
	closedir(directory);
	return count;
}

static void at_once(int count)
{
	pthread_t threads[200];
	int wrong = 0;
	pthread_barrier_init(&all_here, NULL, count + 1);
	for (int n = 0; n < count; n++)
		wrong += start(&threads[n], meet, NULL) != 0;
	is(tasks(), count + 1, "/proc/self/task lists every thread");
	pthread_barrier_wait(&all_here);
	for (int n = 0; n < count; n++)
		wrong += pthread_join(threads[n], NULL) != 0;
	is(wrong, 0, "a barrier lets all go at once");
	pthread_barrier_destroy(&all_here);
}

/* Locks. */

#define WORKERS 4
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static pthread_rwlock_t rwlock = PTHREAD_RWLOCK_INITIALIZER;
static long counter, pair[2], torn;
static atomic_long atomic_counter;
static int rounds;

static void *count_up(void *argument)
{
	for (int n = 0; n < rounds; n++) {
		pthread_mutex_lock(&mutex);
		counter++;
		pthread_mutex_unlock(&mutex);
		atomic_fetch_add(&atomic_counter, 1);
	}
	return argument;
}

static void *read_or_write(void *argument)
{
	for (int n = 0; n < rounds; n++)
		if ((n + (long)argument) % 4 == 0) {
			pthread_rwlock_wrlock(&rwlock);
			pair[0]++;
			pair[1]++;
			pthread_rwlock_unlock(&rwlock);
		} else {
			pthread_rwlock_rdlock(&rwlock);
			if (pair[0] != pair[1])
				torn++;
			pthread_rwlock_unlock(&rwlock);
		}
	return NULL;
}

static void run(void *(*body)(void *))
{
	pthread_t threads[WORKERS];
	for (long n = 0; n < WORKERS; n++)
		start(&threads[n], body, (void *)n);
	for (int n = 0; n < WORKERS; n++)
		pthread_join(threads[n], NULL);
}

static long turn;

static void *take_turns(void *argument)
{
	for (int n = 0; n < rounds / 10; n++) {
		pthread_mutex_lock(&mutex);
		while (turn % WORKERS != (long)argument)
			pthread_cond_wait(&changed, &mutex);
		turn++;
		pthread_cond_broadcast(&changed);
		pthread_mutex_unlock(&mutex);
	}
	return NULL;
}

static void locks(void)
{
	run(count_up);
	is(counter, (long)WORKERS * rounds, "a mutex keeps a counter exact");
	is(atomic_counter, (long)WORKERS * rounds, "so do locked instructions");
	run(read_or_write);
	is(torn, 0, "readers see no half of a write");
	is(pair[0], (long)WORKERS * rounds / 4, "writers exclude each other");
	run(take_turns);
	is(turn, (long)WORKERS * (rounds / 10), "a condition variable passes the turn");
	struct timespec at;
	clock_gettime(CLOCK_REALTIME, &at);
	at.tv_nsec += 20000000;
	if (at.tv_nsec >= 1000000000)
		at.tv_sec++, at.tv_nsec -= 1000000000;
	pthread_mutex_lock(&mutex);
	is(pthread_cond_timedwait(&changed, &mutex, &at), ETIMEDOUT, "a wait with a time limit ends");
	pthread_mutex_unlock(&mutex);
}

static void *die_with_lock(void *argument)
{
	pthread_mutex_lock(argument);
	return NULL;
}

static void robust(void)
{
	pthread_mutex_t lock;
	pthread_mutexattr_t attributes;
	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&lock, &attributes);
	pthread_t thread;
	start(&thread, die_with_lock, &lock);
	pthread_join(thread, NULL);
	is(pthread_mutex_lock(&lock), EOWNERDEAD, "a robust lock tells that its owner died");
	is(pthread_mutex_consistent(&lock), 0, "and can be made good");
	is(pthread_mutex_unlock(&lock), 0, "and given back");
	is(pthread_mutex_lock(&lock), 0, "and taken again");
}

/* futex(2) itself. */

static _Atomic uint32_t word, other;
static atomic_int awake;

static void *wait_for_word(void *argument)
{
	long result = futex(&word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
	atomic_fetch_add(&awake, result == 0);
	return argument;
}

static void *wait_for_bit(void *argument)
{
	long result = futex(&word, FUTEX_WAIT_BITSET_PRIVATE, 0, NULL, NULL, (uint32_t)(long)argument);
	atomic_fetch_add(&awake, result == 0);
	return NULL;
}

static void wait_until_waiting(int count)
{
	/* Requeueing to the same word counts the waiters and moves them behind each other. */
	for (int tries = 0; tries < 2000; tries++) {
		if (futex(&word, FUTEX_REQUEUE_PRIVATE, 0, (void *)1000, &word, 0) == count)
			return;
		nap(1);
	}
}

static void futexes(void)
{
	pthread_t threads[4];
	fails(futex(&word, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0), EAGAIN, "a changed word is not waited for");
	struct timespec soon = {0, 1000000};
	fails(futex(&word, FUTEX_WAIT_PRIVATE, 0, &soon, NULL, 0), ETIMEDOUT, "a wait ends after its time");
	fails(futex((void *)((char *)&word + 1), FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0), EINVAL, "a word is aligned");
	fails(futex(NULL, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0), EFAULT, "a word is memory");
	for (int n = 0; n < 4; n++)
		start(&threads[n], wait_for_word, NULL);
	wait_until_waiting(4);
	is(futex(&word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0), 1, "one is woken");
	is(futex(&word, FUTEX_CMP_REQUEUE_PRIVATE, 1, (void *)1, &other, 0), 2, "one is woken and one moved");
	is(futex(&other, FUTEX_WAKE_PRIVATE, 9, NULL, NULL, 0), 1, "who was moved waits for the other word");
	fails(futex(&word, FUTEX_CMP_REQUEUE_PRIVATE, 1, (void *)1, &other, 7), EAGAIN, "a changed word moves nobody");
	other = 5;
	is(futex(&word, FUTEX_WAKE_OP_PRIVATE, 1, (void *)1, &other,
		 FUTEX_OP(FUTEX_OP_ADD, 2, FUTEX_OP_CMP_EQ, 5)), 1, "an operation on one word wakes for another");
	is(other, 7, "and changes it");
	for (int n = 0; n < 4; n++)
		pthread_join(threads[n], NULL);
	is(awake, 4, "every waiter was woken");
	start(&threads[0], wait_for_bit, (void *)1);
	start(&threads[1], wait_for_bit, (void *)2);
	wait_until_waiting(2);
	is(futex(&word, FUTEX_WAKE_BITSET_PRIVATE, 9, NULL, NULL, 2), 1, "a set of bits chooses whom to wake");
	is(futex(&word, FUTEX_WAKE_PRIVATE, 9, NULL, NULL, 0), 1, "no set means everybody");
	pthread_join(threads[0], NULL);
	pthread_join(threads[1], NULL);
	fails(futex(&word, FUTEX_WAKE_BITSET_PRIVATE, 1, NULL, NULL, 0), EINVAL, "an empty set is refused");
}

/* What belongs to one thread. */

static __thread long own = 7;
static pthread_key_t key;
static atomic_int destroyed;

static void destroy(void *value) { atomic_fetch_add(&destroyed, value != NULL); }

static void *use_own(void *argument)
{
	int good = own == 7;
	own = (long)argument;
	pthread_setspecific(key, argument);
	double x = (double)(long)argument;
	for (int n = 0; n < 200; n++) {
		sched_yield();
		x = x * 1.0 + 0.0;
		good &= own == (long)argument && x == (double)(long)argument;
	}
	return (void *)(long)good;
}

static void *name_me(void *argument)
{
	char name[16] = "", path[64], line[32] = "";
	pthread_setname_np(pthread_self(), "worker");
	pthread_getname_np(pthread_self(), name, sizeof name);
	snprintf(path, sizeof path, "/proc/self/task/%d/comm", tid_of_caller());
	int fd = open(path, O_RDONLY);
	if (fd >= 0 && read(fd, line, sizeof line - 1) < 0)
		line[0] = 0;
	close(fd);
	*(int *)argument = !strcmp(name, "worker") && !strcmp(line, "worker\n");
	return NULL;
}

static void *burn(void *argument)
{
	struct timespec t;
	struct rusage usage;
	do
		clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	while (t.tv_sec == 0 && t.tv_nsec < 30000000);
	getrusage(RUSAGE_THREAD, &usage);
	*(long *)argument = usage.ru_utime.tv_usec + usage.ru_stime.tv_usec;
	return NULL;
}

static void thread_own(void)
{
	pthread_t threads[WORKERS];
	long good = 0;
	pthread_key_create(&key, destroy);
	for (long n = 0; n < WORKERS; n++)
		start(&threads[n], use_own, (void *)(n + 100));
	for (int n = 0; n < WORKERS; n++) {
		void *result;
		pthread_join(threads[n], &result);
		good += (long)result;
	}
	is(good, WORKERS, "threads have variables and registers of their own");
	is(own, 7, "those of the first thread are untouched");
	is(destroyed, WORKERS, "destructors run at each thread's end");
	int named = 0;
	char before[16], after[16];
	pthread_getname_np(pthread_self(), before, sizeof before);
	start(&threads[0], name_me, &named);
	pthread_join(threads[0], NULL);
	pthread_getname_np(pthread_self(), after, sizeof after);
	ok(named && !strcmp(before, after), "a thread has a name of its own");
	long used = 0;
	struct timespec mine, all;
	start(&threads[0], burn, &used);
	pthread_join(threads[0], NULL);
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &mine);
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &all);
	ok(used >= 20000, "a thread's usage is counted");
	ok((all.tv_sec - mine.tv_sec) * 1000000000L + all.tv_nsec - mine.tv_nsec >= 30000000L,
	   "the process's time has that of all threads, ended ones too");
}

/* Signals. */

static _Atomic pid_t taken_by;
static atomic_int taken;

static void take(int signal)
{
	(void)signal;
	taken_by = tid_of_caller();
	atomic_fetch_add(&taken, 1);
}

static void *wait_for_taken(void *argument)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	pthread_sigmask(argument ? SIG_UNBLOCK : SIG_BLOCK, &set, NULL);
	atomic_fetch_add(&awake, 1);
	while (!taken)
		nap(1);
	return (void *)(long)tid_of_caller();
}

static void *wait_in_sigwait(void *argument)
{
	int signal = 0;
	(void)argument;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	sigwait(&set, &signal);
	return (void *)(long)signal;
}

static void signals(void)
{
	pthread_t threads[2];
	void *tids[2], *got;
	sigset_t set, old;
	struct sigaction action = {.sa_handler = take};
	sigaction(SIGUSR1, &action, NULL);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &set, &old);
	awake = 0;
	start(&threads[0], wait_for_taken, NULL);
	start(&threads[1], wait_for_taken, (void *)1);
	while (awake < 2)
		nap(1);
	kill(getpid(), SIGUSR1);
	for (int n = 0; n < 2; n++)
		pthread_join(threads[n], &tids[n]);
	is(taken_by, (long)tids[1], "a signal for the process goes to the thread that does not block it");
	taken = 0;
	awake = 0;
	start(&threads[0], wait_for_taken, (void *)1);
	start(&threads[1], wait_for_taken, (void *)1);
	while (awake < 2)
		nap(1);
	pthread_kill(threads[1], SIGUSR1);
	for (int n = 0; n < 2; n++)
		pthread_join(threads[n], &tids[n]);
	is(taken_by, (long)tids[1], "a signal for one thread goes to that one");
	is(taken, 1, "and only there");
	start(&threads[0], wait_in_sigwait, NULL);
	nap(5);
	kill(getpid(), SIGUSR2);
	pthread_join(threads[0], &got);
	is((long)got, SIGUSR2, "sigwait takes a signal all threads block");
	taken = 0;
	pthread_kill(pthread_self(), SIGUSR1);
	sigpending(&set);
	ok(sigismember(&set, SIGUSR1) && !taken, "a blocked signal stays pending");
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	is(taken, 1, "and comes when it is not blocked any more");
	fails(syscall(SYS_tgkill, getpid(), 32000 + 700, 0), ESRCH, "there is no such thread");
}

static void *sleep_for_ever(void *argument)
{
	for (;;)
		pause();
	return argument;
}

static void *spin_for_ever(void *argument)
{
	pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL);
	for (volatile long n = 0;; n++)
		;
	return argument;
}

static void cleaned(void *argument) { ++*(int *)argument; }

static void unlock(void *lock) { pthread_mutex_unlock(lock); }

static void *wait_with_cleanup(void *argument)
{
	pthread_cleanup_push(cleaned, argument);
	pthread_mutex_lock(&mutex);
	pthread_cleanup_push(unlock, &mutex);
	for (;;)
		pthread_cond_wait(&changed, &mutex);
	pthread_cleanup_pop(1);
	pthread_cleanup_pop(1);
	return NULL;
}

static void cancel(void)
{
	pthread_t thread;
	void *result;
	int count = 0;
	void *(*bodies[])(void *) = {sleep_for_ever, spin_for_ever, wait_with_cleanup};
	const char *names[] = {"in a call", "while it computes", "in a condition variable"};
	for (int n = 0; n < 3; n++) {
		start(&thread, bodies[n], &count);
		nap(5);
		pthread_cancel(thread);
		pthread_join(thread, &result);
		ok(result == PTHREAD_CANCELED, "a thread is cancelled %s", names[n]);
	}
	is(count, 1, "and cleans up");
	is(pthread_mutex_trylock(&mutex), 0, "and gives its locks back");
	pthread_mutex_unlock(&mutex);
}

/* The process as a whole, in a child each. */

static int status_of(void (*body)(void))
{
	int status = -1;
	pid_t pid = fork();
	if (pid == 0) {
		alarm(60);
		body();
		_exit(98);
	}
	waitpid(pid, &status, 0);
	return status;
}

static void *exit_with_3(void *argument)
{
	nap(10);
	if (argument)
		exit(3);
	syscall(SYS_exit, 5);
	return NULL;
}

static void leader_leaves_then_exit(void)
{
	pthread_t thread;
	start(&thread, exit_with_3, (void *)1);
	pthread_exit(NULL);
}

static void leader_leaves_first(void)
{
	pthread_t thread;
	start(&thread, exit_with_3, NULL);
	syscall(SYS_exit, 4);
}

static void *exit_group_now(void *argument)
{
	_exit(6);
	return argument;
}

static void thread_ends_process(void)
{
	pthread_t threads[4];
	for (int n = 0; n < 3; n++)
		start(&threads[n], n % 2 ? sleep_for_ever : spin_for_ever, NULL);
	start(&threads[3], exit_group_now, NULL);
	sleep_for_ever(NULL);
}

static void *segfault(void *argument)
{
	*(volatile int *)8 = 1;
	return argument;
}

static void thread_faults(void)
{
	struct rlimit none = {0, 0};
	pthread_t thread;
	setrlimit(RLIMIT_CORE, &none);
	start(&thread, segfault, NULL);
	sleep_for_ever(NULL);
}

static char *self;

static void *exec_self(void *argument)
{
	char leader[16];
	snprintf(leader, sizeof leader, "%d", getpid());
	execl(self, self, "--execed", leader, NULL);
	return argument;
}

static void exec_from_thread(void)
{
	pthread_t threads[4];
	for (int n = 0; n < 3; n++)
		start(&threads[n], n % 2 ? sleep_for_ever : spin_for_ever, NULL);
	start(&threads[3], exec_self, NULL);
	sleep_for_ever(NULL);
}

static void exec_after_leader(void)
{
	pthread_t thread;
	start(&thread, exec_self, NULL);
	syscall(SYS_exit, 0);
}

static void *exec_nothing(void *argument)
{
	*(int *)argument = execl("/nonexistent/vmm-test", "x", NULL) == -1 && errno == ENOENT;
	return NULL;
}

static void *fork_and_look(void *argument)
{
	(void)argument;
	int status = -1;
	pid_t pid = fork();
	if (pid == 0)
		_exit(getpid() == tid_of_caller() && tasks() == 1 && getppid() != getpid() ? 11 : 12);
	waitpid(pid, &status, 0);
	return (void *)(long)(WIFEXITED(status) ? WEXITSTATUS(status) : -1);
}

static void whole_process(void)
{
	pthread_t thread;
	void *result;
	int failed = 0;
	is(status_of(leader_leaves_then_exit), 3 << 8, "the leader ends first, another thread ends the process");
	is(status_of(leader_leaves_first), 5 << 8, "the last thread's status is the process's when each just ends");
	is(status_of(thread_ends_process), 6 << 8, "exit_group of one thread ends all");
	is(status_of(thread_faults) & 0x7f, SIGSEGV, "a fault of one thread ends all");
	is(status_of(exec_from_thread), 21 << 8, "execve of one thread ends the others and takes the leader's id");
	is(status_of(exec_after_leader), 21 << 8, "so does that of the last after the leader");
	start(&thread, exec_nothing, &failed);
	pthread_join(thread, NULL);
	ok(failed, "execve that fails ends nobody");
	start(&thread, fork_and_look, NULL);
	pthread_join(thread, &result);
	is((long)result, 11, "fork in a thread copies that thread only");
}

static atomic_long progress;

static void *make_progress(void *argument)
{
	for (;;)
		atomic_fetch_add(&progress, 1);
	return argument;
}

/* A stop stops every thread; the parent looks through a pipe. */
static void stop_and_go(void)
{
	int report[2], status = 0;
	if (pipe(report))
		return;
	pid_t pid = fork();
	if (pid == 0) {
		pthread_t threads[2];
		alarm(60);
		for (int n = 0; n < 2; n++)
			start(&threads[n], make_progress, NULL);
		for (;;) {
			long now = progress;
			if (write(report[1], &now, sizeof now) < 0)
				_exit(1);
			nap(1);
		}
	}
	long value, last = 0;
	for (int n = 0; n < 3; n++)
		if (read(report[0], &value, sizeof value) != sizeof value)
			break;
	kill(pid, SIGSTOP);
	waitpid(pid, &status, WUNTRACED);
	is(WIFSTOPPED(status) ? WSTOPSIG(status) : -1, SIGSTOP, "a process with threads stops");
	nap(30);
	fcntl(report[0], F_SETFL, O_NONBLOCK);
	while (read(report[0], &value, sizeof value) == sizeof value)
		last = value;
	nap(30);
	ok(read(report[0], &value, sizeof value) == -1, "and says nothing more");
	fcntl(report[0], F_SETFL, 0);
	kill(pid, SIGCONT);
	ok(read(report[0], &value, sizeof value) == sizeof value && value >= last, "until it is continued");
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
	is(WIFSIGNALED(status) ? WTERMSIG(status) : -1, SIGKILL, "a kill ends all its threads");
	close(report[0]);
	close(report[1]);
}

static int say_21(const char *leader)
{
	return getpid() == atoi(leader) && tid_of_caller() == getpid() && tasks() == 1 ? 21 : 22;
}

static void *on_the_way(void *argument)
{
	if (!fork())
		_exit(0);
	wait(NULL);
	return argument;
}

int main(int argc, char **argv)
{
	if (argc > 2 && !strcmp(argv[1], "--execed"))
		return say_21(argv[2]);
	int count = argc > 1 ? atoi(argv[1]) : 1000;
	self = argv[0];
	rounds = count * 4;
	many(count);
	at_once(count < 200 ? count : 200);
	locks();
	robust();
	futexes();
	thread_own();
	signals();
	cancel();
	whole_process();
	stop_and_go();
	run(on_the_way);
	ok(waitpid(-1, NULL, 0) == -1 && errno == ECHILD, "children of threads are the process's");
	return tap_end();
}
