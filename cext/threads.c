/* threads.c - the thread team: the same task on several threads, and memory for each of them.
 *
 * A convolution of this size takes 20 to 500 microseconds, and waking a sleeping thread takes 5 to
 * 50. So the members of the team stay: after a task they look for the next one for a while
 * (SPIN_ROUNDS, about 100 microseconds: a network calls its next layer sooner), then they sleep.
 *
 * A task is offered by setting `places`; a member that takes one joins. The caller runs the task
 * too, and when it comes to the end it withdraws the places nobody took and waits for the members
 * that did. So a member that wakes too late costs nothing, and the caller never depends on one. The
 * task itself hands out its work in small units (conv.c), which is why it does not matter how many
 * members come.
 *
 * Several threads of the program may call at once: the first one gets the team, the others do their
 * work alone. After fork() a child has no members, and begins a team of its own.
 */
#define _POSIX_C_SOURCE 200809L /* sigset_t, under -std=c11 */

#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

#include "impl.h"

#if defined(_WIN32)

void rq_team_run(int threads, rq_task *task, void *context)
{
    (void)threads;
    task(context, 0);
}

void *rq_scratch(int64_t bytes)
{
    static _Thread_local struct { void *place; int64_t size; } own;
    if (own.size < bytes) {
        _aligned_free(own.place);
        own.place = _aligned_malloc((size_t)bytes, 64);
        own.size = own.place ? bytes : 0;
    }
    return own.place;
}

#else

#include <pthread.h>
#include <sched.h>
#include <signal.h>

enum { MOST_MEMBERS = 255, SPIN_ROUNDS = 4000 };

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t offered;
    int members;              /* touched by the caller that has the team */
    atomic_int asleep;        /* members that wait for the condition */
    atomic_flag taken;        /* by the one caller that may use the team */
    atomic_int places;        /* of the task, not taken yet */
    atomic_int finished;      /* members that are done with the task */
    rq_task *task;
    void *context;
} team = {.mutex = PTHREAD_MUTEX_INITIALIZER, .offered = PTHREAD_COND_INITIALIZER, .taken = ATOMIC_FLAG_INIT};

static void breathe(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int take_place(void)
{
    int free_places = atomic_load(&team.places);
    while (free_places > 0)
        if (atomic_compare_exchange_weak(&team.places, &free_places, free_places - 1))
            return 1;
    return 0;
}

static void *member(void *number)
{
    const int who = (int)(intptr_t)number;
    for (;;) {
        int joined = 0;
        for (int round = 0; !joined && round < SPIN_ROUNDS; round++) {
            joined = take_place();
            if (!joined)
                breathe();
        }
        if (!joined) {
            pthread_mutex_lock(&team.mutex);
            atomic_fetch_add(&team.asleep, 1);
            /* the caller sets `places`, then reads `asleep`; here it is the other way round: one of
             * the two sees the other */
            while (!(joined = take_place()))
                pthread_cond_wait(&team.offered, &team.mutex);
            atomic_fetch_sub(&team.asleep, 1);
            pthread_mutex_unlock(&team.mutex);
        }
        team.task(team.context, who);
        atomic_fetch_add(&team.finished, 1);
    }
    return NULL;
}

/* A child of fork() has one thread. Whatever state the lock was in, nobody holds it now. */
static void begin_anew(void)
{
    pthread_mutex_init(&team.mutex, NULL);
    pthread_cond_init(&team.offered, NULL);
    team.members = 0;
    atomic_store(&team.asleep, 0);
    atomic_store(&team.places, 0);
    atomic_store(&team.finished, 0);
    atomic_flag_clear(&team.taken);
}

static pthread_key_t scratch_key;

static void once(void)
{
    pthread_key_create(&scratch_key, free);
    pthread_atfork(NULL, NULL, begin_anew);
}

static void prepare(void)
{
    static pthread_once_t done = PTHREAD_ONCE_INIT;
    pthread_once(&done, once);
}

/* Let the team grow to `wanted` members, or to as many as the system allows. */
static void grow(int wanted)
{
    sigset_t all, before;
    sigfillset(&all); /* signals are for the threads of the program, not for ours */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (team.members < wanted) {
        pthread_t id;
        if (pthread_create(&id, NULL, member, (void *)(intptr_t)(team.members + 1)))
            break;
        pthread_detach(id);
        team.members++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void rq_team_run(int threads, rq_task *task, void *context)
{
    prepare();
    if (threads > MOST_MEMBERS + 1)
        threads = MOST_MEMBERS + 1;
    if (threads < 2 || atomic_flag_test_and_set(&team.taken)) {
        task(context, 0);
        return;
    }
    if (team.members < threads - 1)
        grow(threads - 1);
    const int offered = team.members < threads - 1 ? team.members : threads - 1;
    team.task = task;
    team.context = context;
    atomic_store(&team.finished, 0);
    atomic_store(&team.places, offered);
    if (atomic_load(&team.asleep) > 0) {
        pthread_mutex_lock(&team.mutex); /* so that none is between its last look and its sleep */
        pthread_cond_broadcast(&team.offered);
        pthread_mutex_unlock(&team.mutex);
    }

    task(context, 0);

    const int joined = offered - atomic_exchange(&team.places, 0);
    for (int round = 0; atomic_load(&team.finished) < joined; round++) {
        if (round < SPIN_ROUNDS)
            breathe();
        else
            sched_yield(); /* the member was interrupted: let it run, if it waits for this very core */
    }
    atomic_flag_clear(&team.taken);
}

void *rq_scratch(int64_t bytes)
{
    struct scratch { int64_t size; char pad[56]; } *own;
    prepare();
    own = pthread_getspecific(scratch_key);
    if (!own || own->size < bytes) {
        free(own);
        own = aligned_alloc(64, ((size_t)bytes + sizeof *own + 63) / 64 * 64);
        if (own)
            own->size = bytes;
        pthread_setspecific(scratch_key, own);
    }
    return own ? own + 1 : NULL;
}

#endif
