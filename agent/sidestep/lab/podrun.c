/* SPDX-License-Identifier: Apache-2.0 */
/*
 * podrun: runs one container of the lab, or one more command inside a running one.
 *
 * Theory of operation. `podrun run` is what a container runtime's shim and `runc` are together: it stays outside as the
 * parent, and its child becomes process 1 of a new pid namespace inside the pod's network namespace, with mounts, host
 * name and IPC of its own. The image is the host: the container's root is an overlay whose lower layer is the host's
 * root file system and whose upper layer is a small tmpfs, so programs of the host run unchanged and nothing they write
 * reaches the host. Other mounts of the host are bound read-only, except those that would let a container see the
 * machine or the lab: /proc, /sys, /dev, /run and /tmp are new, bpffs, cgroups and namespaces' files are not there.
 * Volumes come as `--bind`: their sources are opened before the root changes (open_tree) and attached after it
 * (move_mount), so that a symbolic link in the container's path can never lead to the host's files.
 *
 * Privileges are containerd's: the bounding set is cut to `--caps`, groups and ids are set, and exec does the rest:
 * root has exactly the bounding set, everybody else nothing.
 *
 * The parent forwards signals, writes the child's pid to `--pid-file` ("PID STARTTIME") and its end to `--exit-file`
 * ("STATUS TIME_S"), so that whoever watches need not be its parent, and survives a restart of the watcher. If it is
 * killed, the kernel kills the child (PR_SET_PDEATHSIG), and with process 1 the whole container.
 *
 * `podrun enter PID STARTTIME` joins the namespaces of process PID and runs a command there with the same privileges.
 *
 *     podrun run   --root DIR --netns FILE [--hostname H] [--bind SOURCE TARGET ro|rw]... [COMMON] -- COMMAND...
 *     podrun enter PID STARTTIME [COMMON] -- COMMAND...
 *     COMMON: [--cgroup DIR] [--uid N] [--gid N] [--caps HEX] [--workdir DIR] [--pid-file F] [--exit-file F]
 *
 * Exit status: the command's, 128 + signal; 125: podrun itself failed, 126: the command cannot be run, 127: there is
 * no such command.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <inttypes.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_BINDS 64
#define FAILED 125
#define CANNOT_RUN 126
#define NOT_FOUND 127
#define LAST_CAPABILITY 63
#define OPEN_FILES 1048576

struct bind {
        const char *source;
        const char *target;
        bool read_only;
        int tree;
};

struct options {
        const char *root;
        const char *netns;
        const char *hostname;
        const char *cgroup;
        const char *workdir;
        const char *pid_file;
        const char *exit_file;
        pid_t enter;
        unsigned long long enter_start;
        uid_t uid;
        gid_t gid;
        uint64_t capabilities;
        struct bind binds[MAX_BINDS];
        size_t bind_count;
        char **command;
};

static void complain(const char *format, ...)
{
        va_list arguments;

        fprintf(stderr, "podrun: ");
        va_start(arguments, format);
        vfprintf(stderr, format, arguments);
        va_end(arguments);
        fprintf(stderr, "\n");
}

/* ---- files ---------------------------------------------------------------------------------------------------- */

static int write_file(const char *path, const char *text)
{
        int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        int rc = 0;

        if (fd < 0)
                return -errno;
        if (write(fd, text, strlen(text)) != (ssize_t)strlen(text))
                rc = errno ? -errno : -EIO;
        close(fd);
        return rc;
}

/* Writes beside the file and renames, so that a reader never sees half of it. */
static int publish(const char *path, const char *text)
{
        char fresh[PATH_MAX];
        int rc;

        if (snprintf(fresh, sizeof(fresh), "%s.new", path) >= (int)sizeof(fresh))
                return -ENAMETOOLONG;
        rc = write_file(fresh, text);
        if (!rc && rename(fresh, path))
                rc = -errno;
        return rc;
}

/* Field 22 of /proc/PID/stat: tells a process from a later one with the same pid. 0: there is no such process. */
static unsigned long long start_time(pid_t pid)
{
        unsigned long long started = 0;
        char path[64], text[1024];
        char *at;
        ssize_t n;
        int fd;

        snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
                return 0;
        n = read(fd, text, sizeof(text) - 1);
        close(fd);
        if (n <= 0)
                return 0;
        text[n] = 0;
        at = strrchr(text, ')');
        for (int field = 2; at && field < 22; field++) {
                at = strchr(at, ' ');
                if (at)
                        at++;
        }
        if (at)
                started = strtoull(at, NULL, 10);
        return started;
}

/* Makes every directory of `path`; the last part too unless `parents_only`. */
static int make_directories(const char *path, bool parents_only)
{
        char part[PATH_MAX];
        size_t length = strlen(path);

        if (length >= sizeof(part))
                return -ENAMETOOLONG;
        memcpy(part, path, length + 1);
        for (size_t i = 1; i <= length; i++) {
                if (part[i] != '/' && part[i] != 0)
                        continue;
                if (part[i] == 0 && parents_only)
                        break;
                part[i] = 0;
                if (mkdir(part, 0755) && errno != EEXIST)
                        return -errno;
                part[i] = i < length ? '/' : 0;
        }
        return 0;
}

/* ---- mounts --------------------------------------------------------------------------------------------------- */

static int mount_at(const char *root, const char *path, const char *source, const char *type, unsigned long flags,
                    const char *data)
{
        char target[PATH_MAX];

        if (snprintf(target, sizeof(target), "%s%s", root, path) >= (int)sizeof(target))
                return -ENAMETOOLONG;
        if (mount(source, target, type, flags, data)) {
                int rc = -errno;

                complain("mount %s: %s", target, strerror(-rc));
                return rc;
        }
        return 0;
}

static bool is_under(const char *path, const char *directory)
{
        size_t length = strlen(directory);

        return !strncmp(path, directory, length) && (path[length] == '/' || path[length] == 0);
}

/* Mounts of the host that a container must not see, or gets anew. */
static bool is_hidden(const char *path, const char *type)
{
        static const char *const paths[] = {"/proc", "/sys", "/dev", "/run", "/var/run", "/tmp"};
        static const char *const types[] = {"nsfs",    "bpf",    "cgroup",   "cgroup2",    "proc",      "tracefs",
                                            "debugfs", "autofs", "sysfs",    "securityfs", "pstore",    "efivarfs",
                                            "mqueue",  "devpts", "devtmpfs", "ramfs",      "hugetlbfs", "fusectl"};

        for (size_t i = 0; i < sizeof(paths) / sizeof(*paths); i++)
                if (is_under(path, paths[i]))
                        return true;
        for (size_t i = 0; i < sizeof(types) / sizeof(*types); i++)
                if (!strcmp(type, types[i]))
                        return true;
        return false;
}

/* Resolves the octal escapes of mountinfo, in place. */
static void unescape(char *text)
{
        char *out = text;

        while (*text) {
                if (text[0] == '\\' && text[1] >= '0' && text[1] <= '3' && text[2] && text[3]) {
                        *out++ = (char)((text[1] - '0') * 64 + (text[2] - '0') * 8 + (text[3] - '0'));
                        text += 4;
                } else {
                        *out++ = *text++;
                }
        }
        *out = 0;
}

/* The host's other file systems (a disk of their own for /usr or /home), read-only. */
static int bind_host_mounts(const char *root)
{
        FILE *info = fopen("/proc/self/mountinfo", "re");
        char line[4 * PATH_MAX];

        if (!info)
                return -errno;
        while (fgets(line, sizeof(line), info)) {
                char path[PATH_MAX], type[64], target[PATH_MAX];
                char *separator = strstr(line, " - ");

                if (!separator || sscanf(line, "%*s %*s %*s %*s %4095s", path) != 1 ||
                    sscanf(separator + 3, "%63s", type) != 1)
                        continue;
                unescape(path);
                if (!strcmp(path, "/") || is_hidden(path, type) || is_under(path, root))
                        continue;
                if (snprintf(target, sizeof(target), "%s%s", root, path) >= (int)sizeof(target))
                        continue;
                /* A mount point below a hidden or a covered one cannot be reached: no loss for the container. */
                if (mount(path, target, NULL, MS_BIND, NULL) ||
                    mount(NULL, target, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL))
                        complain("the host's %s is not in the container: %s", path, strerror(errno));
        }
        fclose(info);
        return 0;
}

static int make_devices(const char *root)
{
        static const char *const devices[] = {"null", "zero", "full", "random", "urandom", "tty"};
        static const char *const links[][2] = {{"/proc/self/fd", "fd"},
                                               {"/proc/self/fd/0", "stdin"},
                                               {"/proc/self/fd/1", "stdout"},
                                               {"/proc/self/fd/2", "stderr"},
                                               {"pts/ptmx", "ptmx"}};
        char source[64], target[PATH_MAX];
        int fd, rc;

        rc = mount_at(root, "/dev", "tmpfs", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k");
        if (rc)
                return rc;
        for (size_t i = 0; i < sizeof(devices) / sizeof(*devices); i++) {
                snprintf(source, sizeof(source), "/dev/%s", devices[i]);
                snprintf(target, sizeof(target), "%.3900s/dev/%s", root, devices[i]);
                fd = open(target, O_CREAT | O_WRONLY | O_CLOEXEC, 0666);
                if (fd < 0)
                        return -errno;
                close(fd);
                if (mount(source, target, NULL, MS_BIND, NULL))
                        return -errno;
        }
        for (size_t i = 0; i < sizeof(links) / sizeof(*links); i++) {
                snprintf(target, sizeof(target), "%.3900s/dev/%s", root, links[i][1]);
                if (symlink(links[i][0], target))
                        return -errno;
        }
        snprintf(target, sizeof(target), "%.3900s/dev/pts", root);
        if (mkdir(target, 0755))
                return -errno;
        snprintf(target, sizeof(target), "%.3900s/dev/shm", root);
        if (mkdir(target, 01777))
                return -errno;
        rc = mount_at(root, "/dev/pts", "devpts", "devpts", MS_NOSUID | MS_NOEXEC,
                      "newinstance,ptmxmode=0666,mode=0620");
        if (!rc)
                rc = mount_at(root, "/dev/shm", "shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777,size=64m");
        return rc;
}

static int make_proc(const char *root)
{
        static const char *const read_only[] = {"/proc/sys", "/proc/bus", "/proc/fs", "/proc/irq",
                                                "/proc/sysrq-trigger"};
        static const char *const masked[] = {"/proc/kcore", "/proc/keys", "/proc/timer_list"};
        char target[PATH_MAX];
        int rc;

        rc = mount_at(root, "/proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
        if (rc)
                return rc;
        for (size_t i = 0; i < sizeof(read_only) / sizeof(*read_only); i++) {
                snprintf(target, sizeof(target), "%.3900s%s", root, read_only[i]);
                if (access(target, F_OK))
                        continue;
                if (mount(target, target, NULL, MS_BIND, NULL) ||
                    mount(NULL, target, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC,
                          NULL))
                        return -errno;
        }
        for (size_t i = 0; i < sizeof(masked) / sizeof(*masked); i++) {
                snprintf(target, sizeof(target), "%.3900s%s", root, masked[i]);
                if (!access(target, F_OK) && mount("/dev/null", target, NULL, MS_BIND, NULL))
                        return -errno;
        }
        return 0;
}

/* Attaches a volume inside the new root. */
static int attach(const struct bind *bind)
{
        struct stat source, target;
        int fd, rc;

        if (fstat(bind->tree, &source))
                return -errno;
        rc = make_directories(bind->target, !S_ISDIR(source.st_mode));
        if (rc)
                return rc;
        if (!S_ISDIR(source.st_mode)) {
                if (!lstat(bind->target, &target) && S_ISLNK(target.st_mode) && unlink(bind->target))
                        return -errno;
                fd = open(bind->target, O_CREAT | O_RDONLY | O_CLOEXEC | O_NOFOLLOW, 0644);
                if (fd < 0)
                        return -errno;
                close(fd);
        }
        if (move_mount(bind->tree, "", AT_FDCWD, bind->target, MOVE_MOUNT_F_EMPTY_PATH))
                return -errno;
        if (bind->read_only && mount(NULL, bind->target, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL))
                return -errno;
        return 0;
}

/* The container's file systems; afterwards they are the root. */
static int build_root(struct options *options)
{
        char layers[PATH_MAX], root[PATH_MAX], data[3 * PATH_MAX];
        int rc;

        if (mount(NULL, "/", NULL, MS_PRIVATE | MS_REC, NULL))
                return -errno;
        for (size_t i = 0; i < options->bind_count; i++) {
                struct bind *bind = &options->binds[i];

                bind->tree = open_tree(AT_FDCWD, bind->source, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
                if (bind->tree < 0) {
                        complain("volume %s: %s", bind->source, strerror(errno));
                        return -errno;
                }
        }
        rc = mount_at(options->root, "", "layers", "tmpfs", MS_NOSUID | MS_NODEV, "mode=700,size=256m");
        if (rc)
                return rc;
        snprintf(layers, sizeof(layers), "%.3900s", options->root);
        snprintf(data, sizeof(data), "%s/upper", layers);
        if (mkdir(data, 0755))
                return -errno;
        snprintf(data, sizeof(data), "%s/work", layers);
        if (mkdir(data, 0755))
                return -errno;
        snprintf(root, sizeof(root), "%.3900s/root", layers);
        if (mkdir(root, 0755))
                return -errno;
        snprintf(data, sizeof(data), "lowerdir=/,upperdir=%s/upper,workdir=%s/work", layers, layers);
        rc = mount_at(root, "", "overlay", "overlay", 0, data);
        if (!rc)
                rc = bind_host_mounts(root);
        if (!rc)
                rc = make_proc(root);
        if (!rc)
                rc = mount_at(root, "/sys", "sysfs", "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
        if (!rc)
                rc = make_devices(root);
        if (!rc)
                rc = mount_at(root, "/run", "tmpfs", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=64m");
        if (!rc)
                rc = mount_at(root, "/tmp", "tmpfs", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=256m");
        if (rc)
                return rc;
        if (chdir(root) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
                return -errno;
        for (size_t i = 0; i < options->bind_count; i++) {
                rc = attach(&options->binds[i]);
                if (rc) {
                        complain("volume at %s: %s", options->binds[i].target, strerror(-rc));
                        return rc;
                }
        }
        return 0;
}

/* ---- the command ---------------------------------------------------------------------------------------------- */

static int drop_privileges(const struct options *options)
{
        const struct rlimit files = {.rlim_cur = OPEN_FILES, .rlim_max = OPEN_FILES};

        if (setrlimit(RLIMIT_NOFILE, &files) && errno != EPERM)
                return -errno;
        for (int capability = 0; capability <= LAST_CAPABILITY; capability++) {
                int has = prctl(PR_CAPBSET_READ, capability, 0, 0, 0);

                if (has < 0)
                        break; /* beyond the kernel's last one */
                if (has && !(options->capabilities >> capability & 1) && prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))
                        return -errno;
        }
        if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
                return -errno;
        if (setgroups(1, &options->gid) || setresgid(options->gid, options->gid, options->gid) ||
            setresuid(options->uid, options->uid, options->uid))
                return -errno;
        return 0;
}

/* Runs in the child; does not return. */
static void become(struct options *options, int alive)
{
        struct pollfd parent = {.fd = alive, .events = POLLIN};
        sigset_t none;
        int rc = 0;

        if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) || poll(&parent, 1, 0) < 0 || parent.revents)
                _exit(FAILED);
        if (options->root) {
                setsid();
                if (unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC))
                        rc = -errno;
                if (!rc && options->hostname && sethostname(options->hostname, strlen(options->hostname)))
                        rc = -errno;
                if (!rc)
                        rc = build_root(options);
        }
        umask(022);
        if (!rc && options->workdir) {
                if (options->root)
                        rc = make_directories(options->workdir, false);
                if (!rc && chdir(options->workdir))
                        rc = -errno;
                if (rc)
                        complain("workingDir %s: %s", options->workdir, strerror(-rc));
        }
        if (!rc)
                rc = drop_privileges(options);
        if (rc) {
                complain("the container cannot be set up: %s", strerror(-rc));
                _exit(FAILED);
        }
        /* setresuid clears PDEATHSIG; the parent may have died since. */
        if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) || poll(&parent, 1, 0) < 0 || parent.revents)
                _exit(FAILED);
        for (int number = 1; number < NSIG; number++)
                if (number != SIGKILL && number != SIGSTOP)
                        signal(number, SIG_DFL);
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        syscall(SYS_close_range, 3U, ~0U, 0U);
        execvp(options->command[0], options->command);
        complain("%s: %s", options->command[0], strerror(errno));
        _exit(errno == ENOENT || errno == ENOTDIR ? NOT_FOUND : CANNOT_RUN);
}

/* Forwards signals to the child until it ends. Returns its exit status as a shell would. */
static int watch(pid_t child, const sigset_t *signals)
{
        for (;;) {
                siginfo_t info;
                int number = sigwaitinfo(signals, &info);
                int status;

                if (number == SIGCHLD) {
                        if (waitpid(child, &status, WNOHANG) == child && (WIFEXITED(status) || WIFSIGNALED(status)))
                                return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
                } else if (number > 0 && info.si_code != SI_KERNEL) {
                        kill(child, number); /* what the terminal sends reaches the child by itself */
                }
        }
}

static int join_namespaces(pid_t pid, unsigned long long started)
{
        static const char *const names[] = {"net", "uts", "ipc", "pid", "mnt"};
        int fds[sizeof(names) / sizeof(*names)];
        char path[64];

        for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
                snprintf(path, sizeof(path), "/proc/%d/ns/%s", (int)pid, names[i]);
                fds[i] = open(path, O_RDONLY | O_CLOEXEC);
                if (fds[i] < 0)
                        return -ESRCH;
        }
        if (start_time(pid) != started)
                return -ESRCH;
        for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
                if (setns(fds[i], 0))
                        return -errno;
        return 0;
}

static int join_netns(const char *path)
{
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        int rc = 0;

        if (fd < 0)
                return -errno;
        if (setns(fd, CLONE_NEWNET))
                rc = -errno;
        close(fd);
        return rc;
}

static int join_cgroup(const char *directory)
{
        char path[PATH_MAX];

        if (snprintf(path, sizeof(path), "%s/cgroup.procs", directory) >= (int)sizeof(path))
                return -ENAMETOOLONG;
        return write_file(path, "0");
}

static int run(struct options *options)
{
        static const int forwarded[] = {SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH, SIGCONT, SIGCHLD};
        const char *step = "cgroup";
        sigset_t signals;
        char text[64];
        int alive[2], status, rc = 0;
        pid_t child;

        sigemptyset(&signals);
        for (size_t i = 0; i < sizeof(forwarded) / sizeof(*forwarded); i++)
                sigaddset(&signals, forwarded[i]);
        signal(SIGCHLD, SIG_DFL);
        sigprocmask(SIG_BLOCK, &signals, NULL);
        if (options->cgroup)
                rc = join_cgroup(options->cgroup);
        if (!rc && options->enter) {
                step = "the container is not running";
                rc = join_namespaces(options->enter, options->enter_start);
        }
        if (!rc && options->netns) {
                step = "network namespace";
                rc = join_netns(options->netns);
        }
        if (!rc && options->root) {
                step = "pid namespace";
                if (unshare(CLONE_NEWPID))
                        rc = -errno;
        }
        if (rc) {
                complain("%s: %s", step, strerror(-rc));
                return FAILED;
        }
        if (pipe2(alive, O_CLOEXEC))
                return FAILED;
        child = fork();
        if (child < 0) {
                complain("fork: %s", strerror(errno));
                return FAILED;
        }
        if (!child) {
                close(alive[1]);
                become(options, alive[0]);
        }
        close(alive[0]);
        if (options->pid_file) {
                snprintf(text, sizeof(text), "%d %llu\n", (int)child, start_time(child));
                rc = publish(options->pid_file, text);
                if (rc)
                        complain("%s: %s", options->pid_file, strerror(-rc));
        }
        status = watch(child, &signals);
        if (options->exit_file) {
                snprintf(text, sizeof(text), "%d %lld\n", status, (long long)time(NULL));
                rc = publish(options->exit_file, text);
                if (rc)
                        complain("%s: %s", options->exit_file, strerror(-rc));
        }
        return status;
}

/* Reads argv. 0, -EINVAL (said why). */
static int parse(int argc, char **argv, struct options *options)
{
        int at = 2;

        if (argc > 4 && !strcmp(argv[1], "enter")) {
                options->enter = (pid_t)strtol(argv[2], NULL, 10);
                options->enter_start = strtoull(argv[3], NULL, 10);
                at = 4;
        } else if (argc < 2 || strcmp(argv[1], "run")) {
                complain("usage: podrun run|enter ... -- COMMAND...");
                return -EINVAL;
        }
        for (; at < argc && strcmp(argv[at], "--"); at += 2) {
                const char *name = argv[at];
                const char *value = at + 1 < argc ? argv[at + 1] : "";

                if (!strcmp(name, "--root"))
                        options->root = value;
                else if (!strcmp(name, "--netns"))
                        options->netns = value;
                else if (!strcmp(name, "--hostname"))
                        options->hostname = value;
                else if (!strcmp(name, "--cgroup"))
                        options->cgroup = value;
                else if (!strcmp(name, "--workdir"))
                        options->workdir = value;
                else if (!strcmp(name, "--pid-file"))
                        options->pid_file = value;
                else if (!strcmp(name, "--exit-file"))
                        options->exit_file = value;
                else if (!strcmp(name, "--uid"))
                        options->uid = (uid_t)strtoul(value, NULL, 10);
                else if (!strcmp(name, "--gid"))
                        options->gid = (gid_t)strtoul(value, NULL, 10);
                else if (!strcmp(name, "--caps"))
                        options->capabilities = strtoull(value, NULL, 16);
                else if (!strcmp(name, "--bind") && at + 3 < argc && options->bind_count < MAX_BINDS) {
                        options->binds[options->bind_count++] =
                                (struct bind){value, argv[at + 2], !strcmp(argv[at + 3], "ro"), -1};
                        at += 2;
                } else {
                        complain("cannot use %s", name);
                        return -EINVAL;
                }
        }
        options->command = argv + at + 1;
        if (at + 1 >= argc || !!options->root == !!options->enter || (options->root && !options->netns)) {
                complain("needs --root and --netns (run) or a process (enter), and -- COMMAND");
                return -EINVAL;
        }
        return 0;
}

int main(int argc, char **argv)
{
        struct options options = {0};

        if (parse(argc, argv, &options))
                return FAILED;
        return run(&options);
}
