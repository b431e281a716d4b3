// Names of users on a worker, for nsswitch.conf(5): a worker has no accounts, but it has everyone's home, and in /home, where
// root alone makes entries, the name and the owner of a directory are the name and the uid of a user.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <nss.h>
#include <pwd.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define HOMES "/home"
#define FIRST_USER 1000

static enum nss_status entry(const char *name, const struct stat *home, struct passwd *found, char *buffer, size_t size,
                             int *error) {
    int length = snprintf(buffer, size, "%s%cx%c" HOMES "/%s%c/bin/bash", name, 0, 0, name, 0);
    if (length < 0 || (size_t)length >= size) {
        *error = ERANGE; // the caller tries again with more room
        return NSS_STATUS_TRYAGAIN;
    }
    found->pw_name = found->pw_gecos = buffer;
    found->pw_passwd = found->pw_name + strlen(found->pw_name) + 1;
    found->pw_dir = found->pw_passwd + strlen(found->pw_passwd) + 1;
    found->pw_shell = found->pw_dir + strlen(found->pw_dir) + 1;
    found->pw_uid = home->st_uid;
    found->pw_gid = home->st_gid;
    return NSS_STATUS_SUCCESS;
}

static int is_home(int homes, const char *name, struct stat *home) {
    return *name != '.' && !strchr(name, '/') && fstatat(homes, name, home, AT_SYMLINK_NOFOLLOW) == 0 &&
           S_ISDIR(home->st_mode) && home->st_uid >= FIRST_USER;
}

enum nss_status _nss_homes_getpwnam_r(const char *name, struct passwd *found, char *buffer, size_t size, int *error) {
    struct stat home;
    enum nss_status status = NSS_STATUS_NOTFOUND;
    DIR *homes = opendir(HOMES);
    if (homes && is_home(dirfd(homes), name, &home)) status = entry(name, &home, found, buffer, size, error);
    if (homes) closedir(homes);
    return status;
}

enum nss_status _nss_homes_getpwuid_r(uid_t user, struct passwd *found, char *buffer, size_t size, int *error) {
    struct stat home;
    enum nss_status status = NSS_STATUS_NOTFOUND;
    DIR *homes = user >= FIRST_USER ? opendir(HOMES) : NULL;
    for (struct dirent *one; status == NSS_STATUS_NOTFOUND && homes && (one = readdir(homes));)
        if (is_home(dirfd(homes), one->d_name, &home) && home.st_uid == user)
            status = entry(one->d_name, &home, found, buffer, size, error);
    if (homes) closedir(homes);
    return status;
}
