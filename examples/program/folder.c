/* A folder of results that take their names all at once, so that it holds the old results or the new ones at any moment,
 * whatever is killed when:
 *   1. the new files move to DIR/.pathkernel/new, and hard links to the old ones to DIR/.pathkernel/old;
 *   2. every NAME becomes a symbolic link to .pathkernel/current/NAME, where current -> old;
 *   3. one rename makes current -> new: from here on the new results are there;
 *   4. the new files take the places of the links, and the folder goes.
 * What a kill leaves of it, the next job brings to its end (settle). Where a file system has no links, or no room
 * for them, the files are renamed one after the other. */
#include "program.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define WORK ".pathkernel"

/* openat; the descriptor is above those of standard input, output and error, which may be closed. */
static int open_above(int folder, const char *path, int flags)
{
    const int file = openat(folder, path, flags | O_CLOEXEC);
    if (file < 0 || file > STDERR_FILENO)
        return file;
    const int higher = fcntl(file, F_DUPFD_CLOEXEC, STDERR_FILENO + 1), reason = errno;
    (void)close(file);
    errno = reason;
    return higher;
}

static int folder_exists(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

/* The folder and those above it. */
int folder_open(program_folder *folder, const char *out, const char *option)
{
    char *path = (char *)malloc(strlen(out) + 1);
    if (!path)
        return refuse("%s: no memory", option);
    strcpy(path, out);
    for (char *at = path + 1; *path && *at; at++)
        if (*at == '/' && at[-1] != '/') {
            *at = 0;
            (void)mkdir(path, 0777);
            *at = '/';
        }
    folder->is_new = mkdir(path, 0777) == 0;
    int reason = errno;
    free(path);
    if (!folder->is_new && !(reason == EEXIST && folder_exists(out)))
        return refuse("%s: %s: the folder cannot be made: %s", option, out,
                      reason == EEXIST ? "there is a file of that name" : strerror(reason));
    if (access(out, W_OK | X_OK) != 0)
        return refuse("%s: %s: the folder cannot be written: %s", option, out, strerror(errno));
    const int descriptor = open_above(AT_FDCWD, out, O_RDONLY | O_DIRECTORY);
    if (descriptor < 0)
        return refuse("%s: %s: the folder cannot be opened: %s", option, out, strerror(errno));
    folder->path = out;
    folder->descriptor = descriptor + 1;
    /* Where the file system has no locks, go without. */
    if (flock(descriptor, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        return refuse("%s: %s is being written by another program", option, out);
    return PROGRAM_GO_ON;
}

char *folder_path(const program_folder *folder, const char *name, const char *suffix)
{
    const size_t length = strlen(folder->path) + strlen(name) + strlen(suffix) + 2;
    char *path = (char *)malloc(length);
    if (path)
        snprintf(path, length, "%s/%s%s", folder->path, name, suffix);
    return path;
}

/* ---- results take their names -------------------------------------------------------------------------- */

static const char *work_path(const char *part, const char *name, char path[96])
{
    snprintf(path, 96, WORK "/%s%s%s", part, *name ? "/" : "", name);
    return path;
}

static const char *const work_parts[] = {"new", "old", "links"};

/* Removes DIR/.pathkernel and the files in it; nothing else. */
static void remove_work(int folder)
{
    static const char *const links[] = {"current", "next"};
    char path[96];
    for (int i = 0; i < 2; i++)
        (void)unlinkat(folder, work_path(links[i], "", path), 0);
    for (int i = 0; i < 3; i++) {
        const int part =
            open_above(folder, work_path(work_parts[i], "", path), O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
        DIR *entries = part < 0 ? NULL : fdopendir(part);
        for (struct dirent *entry; entries && (entry = readdir(entries)) != NULL;)
            if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
                (void)unlinkat(part, entry->d_name, 0);
        if (entries)
            (void)closedir(entries);
        else if (part >= 0)
            (void)close(part);
        (void)unlinkat(folder, path, AT_REMOVEDIR);
    }
    (void)unlinkat(folder, WORK, AT_REMOVEDIR);
}

/* Files in the places of all links to DIR/.pathkernel/current; then that folder goes. Where a link has to stay, so has
 * what it leads to: the next job tries again. */
static void settle(int folder)
{
    static const char begin[] = WORK "/current/";
    struct stat about;
    if (fstatat(folder, WORK, &about, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISDIR(about.st_mode))
        return;
    int stays = 0;
    for (int changed = 1; changed;) {
        changed = stays = 0;
        const int again = open_above(folder, ".", O_RDONLY | O_DIRECTORY);
        DIR *entries = again < 0 ? NULL : fdopendir(again);
        for (struct dirent *entry; entries && (entry = readdir(entries)) != NULL;) {
            char target[96];
            const ssize_t length = readlinkat(folder, entry->d_name, target, sizeof target - 1);
            if (length < (ssize_t)sizeof begin || strncmp(target, begin, sizeof begin - 1) != 0)
                continue;
            target[length] = 0;
            /* To nothing: of a result that was not there before. */
            const int gone = renameat(folder, target, folder, entry->d_name) == 0 ||
                             (errno == ENOENT && unlinkat(folder, entry->d_name, 0) == 0);
            changed |= gone;
            stays |= !gone;
        }
        stays |= !entries;
        if (entries)
            (void)closedir(entries);
        else if (again >= 0)
            (void)close(again);
    }
    if (!stays)
        remove_work(folder);
}

/* Makes DIR/.pathkernel now, while there is room. */
int folder_prepare(program_folder *job)
{
    const int folder = job->descriptor - 1;
    char path[96];
    settle(folder);
    int made = mkdirat(folder, WORK, 0777) == 0;
    for (int i = 0; made && i < 3; i++)
        made = mkdirat(folder, work_path(work_parts[i], "", path), 0777) == 0;
    if (!made)
        snprintf(job->problem, sizeof job->problem, "%.400s/" WORK ": cannot be made: %s", job->path,
                 strerror(errno));
    return made;
}

/* Steps 1 and 2 up to where names change; 0 where there can be no links. */
static int prepare_links(program_folder *job)
{
    const int folder = job->descriptor - 1;
    char path[96], target[96];
    struct stat about;
    int good = symlinkat("old", folder, work_path("current", "", path)) == 0 &&
               symlinkat("new", folder, work_path("next", "", path)) == 0;
    for (size_t i = 0; good && i < job->count; i++) {
        const char *name = job->files[i].name;
        good = symlinkat(work_path("current", name, target), folder, work_path("links", name, path)) == 0;
        if (good && fstatat(folder, name, &about, AT_SYMLINK_NOFOLLOW) == 0)
            good = linkat(folder, name, folder, work_path("old", name, path), 0) == 0;
    }
    return good;
}

/* 1 where the new results replace older ones: then they are synchronized to the disk before the names change. */
static int reach_disk(program_folder *job)
{
    const int folder = job->descriptor - 1;
    struct stat about;
    char path[96];
    int replaces = 0, good = 1;
    for (size_t i = 0; i < job->count; i++)
        replaces |= fstatat(folder, job->files[i].name, &about, AT_SYMLINK_NOFOLLOW) == 0;
    for (size_t i = 0; good && replaces && i < job->count; i++) {
        const int file =
            open_above(folder, work_path("new", job->files[i].name, path), O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
        good = file >= 0 && fsync(file) == 0;
        if (file >= 0)
            (void)close(file);
    }
    return good;
}

/* Gives the complete .part files their names. 0 with errno, and *name of the file that could not be replaced. */
static int take_names(program_folder *job, const char **name)
{
    const int folder = job->descriptor - 1;
    struct stat about;
    char path[96];
    for (size_t i = 0; i < job->count; i++) {
        *name = job->files[i].name;
        errno = EISDIR;
        if (fstatat(folder, *name, &about, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(about.st_mode))
            return 0;
    }
    for (size_t i = 0; i < job->count; i++) {
        char partial[96];
        *name = job->files[i].name;
        snprintf(partial, sizeof partial, "%s.part", *name);
        if (renameat(folder, partial, folder, work_path("new", *name, path)) != 0)
            return 0;
        job->files[i].made = 0;
    }
    if (!reach_disk(job))
        return 0;
    const int linked = prepare_links(job);
    for (size_t i = 0; linked && i < job->count; i++) {
        *name = job->files[i].name;
        if (renameat(folder, work_path("links", *name, path), folder, *name) != 0)
            return 0;
    }
    if (linked && renameat(folder, WORK "/next", folder, WORK "/current") != 0)
        return 0;
    for (size_t i = 0; i < job->count; i++) {
        *name = job->files[i].name;
        if (renameat(folder, work_path("new", *name, path), folder, *name) != 0)
            return 0;
    }
    return 1;
}

int folder_publish(program_folder *folder)
{
    const char *name = "";
    if (take_names(folder, &name))
        return 1;
    snprintf(folder->problem, sizeof folder->problem, "%.400s/%s: cannot be replaced: %s", folder->path, name,
             strerror(errno));
    return 0;
}

void folder_close(program_folder *folder, int keep)
{
    if (!folder->descriptor)
        return;
    for (size_t i = 0; i < folder->count; i++) {
        char partial[96];
        snprintf(partial, sizeof partial, "%s.part", folder->files[i].name);
        if (folder->files[i].made)
            (void)unlinkat(folder->descriptor - 1, partial, 0);
        folder->files[i].made = 0;
    }
    settle(folder->descriptor - 1);
    if (!keep && folder->is_new)
        (void)rmdir(folder->path);
    (void)close(folder->descriptor - 1);
    folder->descriptor = 0;
}

int folder_write(program_folder *folder, pk_context *context, const char *name, int rank, const size_t *shape,
                 const double *data)
{
    char *path = folder_path(folder, name, ".part");
    if (!path)
        return refuse("%s/%s: out of memory", folder->path, name);
    const size_t index = folder->count++;
    snprintf(folder->files[index].name, sizeof folder->files[index].name, "%s", name);
    folder->files[index].made = 1;
    const pk_status status = pk_array_write(context, path, PK_FLOAT64, rank, shape, data);
    free(path);
    return status ? refuse("--out: %s", pk_message(context)) : PROGRAM_GO_ON;
}

void print_folder(const program_folder *folder, const pk_context *context, double begin)
{
    const int threads = pk_threads(context);
    char took[32];
    printf("time         %s, %d thread%s\n", duration(program_seconds() - begin, took), threads,
           threads == 1 ? "" : "s");
    printf("results      %s:", folder->path);
    for (size_t i = 0; i < folder->count; i++)
        printf(" %.*s", (int)strcspn(folder->files[i].name, "."), folder->files[i].name);
    printf("\n");
}
