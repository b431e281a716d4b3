// A plugin for slurmstepd (slurm-spank-plugins(8)), which asks it as root before a step starts. It does two things.
//
// It grants the job to its user: a file by which the agent knows that this user holds this job on this machine, how many CPUs
// and megabytes the job has, and where there are GPUs how many of each kind: that slurmctld is asked for. A Prolog would do the same for the first step of a job, and took 14 of the 40 ms that
// `srun true` takes: Slurm starts it in another process and then rests for 10 ms, to kill what it may have left. The epilog
// takes the grant away.
//
// And it makes slurmstepd adopt the processes that lose their parent. proctrack/linuxproc goes by who is whose child, so a
// process that forked twice was out of its sight: it outlived its step, which waited for as long as it held its output open.
#define _GNU_SOURCE
#include "grants.h"
#include <slurm/slurm.h>
#include <slurm/spank.h>
#include <spawn.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>

SPANK_PLUGIN(cfiddle_step, 1)

#define NODE_HEALTH "/usr/local/lib/cfiddle/node-health"
#define GPUS "/run/cfiddle-gpus" // is there where there are any (cluster-role)
#define FAILED -1 // the one that keeps a step from starting: ESPANK_ERROR is above 0 and does not

// Write the job's GPUs on this machine as " titan_xp:2,h200:1", or nothing; return -1 if slurmctld does not say.
static int find_gpus(unsigned job, char *gpus, size_t size) {
    job_info_msg_t *found = NULL;
    char host[256];
    *gpus = 0;
    if (access(GPUS, F_OK)) return 0;
    if (gethostname(host, sizeof host) || slurm_load_job(&found, job, SHOW_DETAIL)) return -1;
    slurm_job_info_t *info = &found->job_array[0];
    hostlist_t *nodes = slurm_hostlist_create(info->nodes);
    int place = slurm_hostlist_find(nodes, host);
    char *told = place >= 0 && (unsigned)place < info->gres_detail_cnt ? info->gres_detail_str[place] : NULL;
    // As in "gpu:titan_xp:2(CNT:2),gpu:h200:1(CNT:1)".
    for (char *entry = told; entry && (entry = strstr(entry, "gpu:")); entry++) {
        char kind[64];
        unsigned number;
        size_t length = strlen(gpus);
        if (sscanf(entry, "gpu:%63[a-z0-9_]:%u", kind, &number) == 2)
            snprintf(gpus + length, size - length, "%c%s:%u", length ? ',' : ' ', kind, number);
    }
    slurm_hostlist_destroy(nodes);
    slurm_free_job_info_msg(found);
    return 0;
}

static int write_grant(unsigned job, unsigned user, unsigned cpus, unsigned long memory_mb) {
    char path[64], aside[64], gpus[1024];
    snprintf(path, sizeof path, GRANTS "/%u", job);
    snprintf(aside, sizeof aside, GRANTS "/.%u", job);
    if (access(path, F_OK) == 0) return 0; // an earlier step of the job was here
    if (find_gpus(job, gpus, sizeof gpus)) return -1;
    int file = open(aside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0) return -1;
    int written = dprintf(file, "%u * %u %lu%s\n", user, cpus, memory_mb, gpus);
    if (close(file) == 0 && written > 0 && rename(aside, path) == 0) return 0;
    unlink(aside);
    return -1;
}

// A step that does not start is no fault of its node to Slurm, which would send the whole queue there. The health check, when
// it finds that grants can be written again, takes this back.
static void drain_node(void) {
    pid_t child;
    int status;
    char *const arguments[] = {"timeout", "30", NODE_HEALTH, "jobs cannot be granted to their users", NULL};
    if (posix_spawnp(&child, *arguments, NULL, NULL, arguments, environ) || waitpid(child, &status, 0) != child || status)
        slurm_error("this node could not be drained");
}

int slurm_spank_init(spank_t spank, int count, char **arguments) {
    uint32_t job;
    uid_t user;
    uint16_t cpus;
    uint64_t memory_mb;
    (void)count, (void)arguments;
    if (spank_remote(spank) != 1) return ESPANK_SUCCESS; // srun or sbatch, not slurmstepd
    if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)) return FAILED;
    if (spank_get_item(spank, S_JOB_ID, &job) || spank_get_item(spank, S_JOB_UID, &user)) return FAILED;
    if (spank_get_item(spank, S_JOB_NCPUS, &cpus) || spank_get_item(spank, S_JOB_ALLOC_MEM, &memory_mb)) return FAILED;
    // Not while an epilog of the user's is at work: it would take this job for what an earlier one left.
    int lock = lock_user(user);
    int failed = lock < 0 || write_grant(job, user, cpus, memory_mb);
    if (failed) slurm_error("the grant for job %u of user %u cannot be written: %m", job, user);
    if (lock >= 0) close(lock);
    if (failed) drain_node();
    return failed ? FAILED : ESPANK_SUCCESS;
}
