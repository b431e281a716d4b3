// What step.c and epilog.c share: where the grants lie, and a lock for each user.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

#define GRANTS "/run/cfiddle-grants"
#define LOCKS "/run/cfiddle-locks" // apart from the grants: who reads those finds nothing else
#define LOCK_S 20                  // an epilog waits 10 s for processes that do not die, and then removes files

static void pause_ms(long ms) { nanosleep(&(struct timespec){.tv_nsec = ms * 1000000}, NULL); }

static time_t uptime_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec;
}

// Return the descriptor that holds the user's lock, or -1 with errno: EWOULDBLOCK if somebody else had it all the time.
static int lock_user(unsigned user) {
    char path[64];
    snprintf(path, sizeof path, LOCKS "/%u", user);
    time_t deadline_s = uptime_s() + LOCK_S;
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    for (; file >= 0 && flock(file, LOCK_EX | LOCK_NB); pause_ms(1)) {
        if (errno == EWOULDBLOCK && uptime_s() < deadline_s) continue;
        int error = errno;
        close(file);
        errno = error;
        return -1;
    }
    return file;
}
