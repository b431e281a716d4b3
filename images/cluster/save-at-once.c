// slurmctld keeps what changed in memory for up to five seconds before it saves it (SAVE_MAX_WAIT in Slurm's
// src/slurmctld/state_save.c, fixed when it is compiled). A slurmctld that is killed within them forgets jobs that it had
// accepted and gives their numbers to others. Its saving thread, which is called sstate, asks difftime(3) whether five
// seconds are over; preloaded, this says that they are. Changes that come while it saves still go into one save.
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

double difftime(time_t end, time_t start) {
    char thread[16] = "";
    prctl(PR_GET_NAME, thread);
    return (double)end - (double)start + (strcmp(thread, "sstate") == 0 ? 5 : 0);
}
