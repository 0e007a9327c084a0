/* What the programs share that make accesses which fail: where a signal found them, and a way back. */
#ifndef TRAPPED_H
#define TRAPPED_H
#include "tap.h"
#include <setjmp.h>

static sigjmp_buf escape;
static volatile int got_signal, got_code;
static void *volatile got_addr;

/* Notes the signal and jumps out of what caused it. */
static void jumping(int sig, siginfo_t *info, void *context)
{
	(void)context;
	got_signal = sig;
	got_code = info->si_code;
	got_addr = info->si_addr;
	siglongjmp(escape, 1);
}

/* From now on accesses that fail are noted. */
__attribute__((unused)) static void catch_failed_accesses(void)
{
	struct sigaction action = {.sa_sigaction = jumping, .sa_flags = SA_SIGINFO | SA_NODEFER};
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
}

/* The signal that an access gives, or 0. */
__attribute__((unused)) static int reading(volatile char *at)
{
	got_signal = 0;
	if (!sigsetjmp(escape, 1))
		(void)*at;
	return got_signal;
}

__attribute__((unused)) static int writing(volatile char *at, char value)
{
	got_signal = 0;
	if (!sigsetjmp(escape, 1))
		*at = value;
	return got_signal;
}
#endif
