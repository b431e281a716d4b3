// Slurm's Epilog on a worker: takes the job's grant away (step.c gave it) and ends what the job left running. If that was
// the user's last job here, everything of the user goes: processes, logins by SSH, and what lies in shared memory and in the
// directories that anyone may write to.
//
// Root only removes the grant and ends root's own processes of sshd. Whatever touches a user's processes and files does so as that user, so that nothing the user
// prepares (a link, a swapped directory, a reused process id) turns it against somebody else.
#define _GNU_SOURCE
#include "grants.h"
#include <ctype.h>
#include <dirent.h>
#include <err.h>
#include <grp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define CLEAN "/usr/local/lib/cfiddle/clean" // removes files and shared memory of the user who runs it
#define NOGROUP 65534
#define FIRST_USER 1000 // below it stand the system's own accounts, whose processes keep the machine going

static const char *job;
static uid_t user;

static unsigned long number(const char *variable) {
    const char *text = getenv(variable);
    char *end = "";
    if (!text || !isdigit(*text) || strtoul(text, &end, 10) >= 0xffffffff || *end) errx(1, "%s is not a number", variable);
    return strtoul(text, NULL, 10);
}

// Run the task in a child that is the user. Returns whether it ended well: a process of the user's may have killed it.
static int as_user(void (*task)(void)) {
    int status;
    pid_t child = fork();
    if (child == 0) {
        if (setgroups(0, NULL) || setresgid(NOGROUP, NOGROUP, NOGROUP) || setresuid(user, user, user)) err(1, "setresuid");
        task();
        _exit(0);
    }
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Everything of this user in this container except the caller, in one sweep that no fork outruns.
static void kill_all(void) { kill(-1, SIGKILL); }

// The processes that have this job in their environment, which is all that marks one that left its session.
static void kill_job(void) {
    static char path[64], mark[64], environment[1 << 18];
    snprintf(mark, sizeof mark, "SLURM_JOB_ID=%s", job);
    DIR *processes = opendir("/proc");
    for (struct dirent *entry; processes && (entry = readdir(processes));) {
        snprintf(path, sizeof path, "/proc/%.20s/environ", entry->d_name);
        int file = atoi(entry->d_name) > 0 && atoi(entry->d_name) != getpid() ? open(path, O_RDONLY) : -1;
        if (file < 0) continue; // no process, or another user's
        ssize_t length = read(file, environment, sizeof environment - 1);
        close(file);
        environment[length > 0 ? length : 0] = 0;
        for (ssize_t at = 0; at < length; at += strlen(environment + at) + 1)
            if (strcmp(environment + at, mark) == 0) kill(atoi(entry->d_name), SIGKILL);
    }
}

static void clean(void) {
    execle(CLEAN, CLEAN, NULL, (char *[]){"PATH=/usr/bin:/bin", NULL});
    err(1, "%s", CLEAN);
}

// Tests of an entry of a directory, for any().
static int is_alive(const char *directory, const char *pid) {
    char path[512], line[256], state = 'Z';
    unsigned owner = 0;
    snprintf(path, sizeof path, "%s/%s/status", directory, pid);
    FILE *status = isdigit(*pid) ? fopen(path, "re") : NULL; // /proc/PID itself is root's where a process is not dumpable
    while (status && fgets(line, sizeof line, status) && sscanf(line, "Uid: %u", &owner) != 1) sscanf(line, "State: %c", &state);
    if (status) fclose(status);
    return owner == user && state != 'Z' && state != 'X';
}

// A login of the user's, which root's sshd names in its title from before it asks for the user's keys until the login's end. Who
// was let in by the grant that has just gone may not have become the user yet, and would otherwise be here without one. Whoever
// gives themselves such a title is not root. Returns whether there is one; it is killed, by a descriptor, for its number may
// soon be another's.
static int end_login(const char *directory, const char *pid) {
    char path[512], title[128], found[128] = "";
    struct stat owner;
    const char *name = getenv("SLURM_JOB_USER");
    if (!name || !isdigit(*pid)) return 0;
    snprintf(title, sizeof title, "sshd-session: %s [priv]", name);
    snprintf(path, sizeof path, "%s/%s/cmdline", directory, pid);
    int process = pidfd_open(atoi(pid), 0), file = open(path, O_RDONLY | O_CLOEXEC);
    int is_one = file >= 0 && fstat(file, &owner) == 0 && owner.st_uid == 0 && read(file, found, sizeof found - 1) > 0 &&
                 strcmp(found, title) == 0;
    if (is_one && process >= 0) pidfd_send_signal(process, SIGKILL, NULL, 0);
    if (file >= 0) close(file);
    if (process >= 0) close(process);
    return is_one;
}

static int is_left(const char *directory, const char *name) {
    char path[512];
    struct stat found;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return strcmp(name, "..") && lstat(path, &found) == 0 && found.st_uid == user;
}

static int is_grant(const char *directory, const char *name) {
    char path[512];
    unsigned holder = 0;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *grant = isdigit(*name) ? fopen(path, "re") : NULL;
    if (grant && fscanf(grant, "%u", &holder) != 1) holder = 0;
    if (grant) fclose(grant);
    return holder == user;
}

static int any(const char *directory, int (*test)(const char *, const char *)) {
    int found = 0;
    DIR *entries = opendir(directory);
    for (struct dirent *entry; !found && entries && (entry = readdir(entries));) found = test(directory, entry->d_name);
    if (entries) closedir(entries);
    return found;
}

static int is_shared_memory_used(void) { // by anybody: more than the heading stands in one of the tables
    char line[512];
    int lines = 0;
    for (const char **table = (const char *[]){"/proc/sysvipc/shm", "/proc/sysvipc/msg", "/proc/sysvipc/sem", NULL}; *table; table++) {
        FILE *entries = fopen(*table, "re");
        for (lines--; entries && fgets(line, sizeof line, entries); lines++) continue;
        if (entries) fclose(entries);
    }
    return lines > 0;
}

static void epilog(void) {
    if (unlink(job) && errno != ENOENT) err(1, "removing the grant");
    if (any(".", is_grant)) {
        as_user(kill_job);
        return;
    }
    for (int tries = 0; any("/proc", end_login) || !as_user(kill_all) || any("/proc", is_alive); tries++, pause_ms(10))
        if (tries == 1000) errx(1, "processes of user %u do not die", user); // the node is drained: it is not fit to measure
    if (is_shared_memory_used() || any("/tmp", is_left) || any("/dev/shm", is_left) || any("/dev/mqueue", is_left))
        if (!as_user(clean)) warnx("files of user %u could not all be removed", user);
}

int main(void) {
    number("SLURM_JOB_ID");
    job = getenv("SLURM_JOB_ID");
    user = number("SLURM_JOB_UID");
    if (user < FIRST_USER) return 0;
    if (chdir(GRANTS)) err(1, GRANTS);
    // Not while a step of the user's starts: it must not be taken for what this job left.
    int lock = lock_user(user);
    if (lock < 0) warn("the lock of user %u", user);
    epilog(); // in any case: the node is drained without the lock, but nothing of the job may stay
    return lock < 0;
}
