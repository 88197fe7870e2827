/* SPDX-License-Identifier: Apache-2.0 */
/*
 * supervise COMMAND...: keeps one engine running. Pid 1 of the engine's container, so it also reaps what it never
 * started.
 *
 * Theory of operation. One loop over a signalfd and the "ready" pipe. The command inherits the pipe's write end, its
 * number in SIDESTEP_READY_FD, and writes one byte when it has first answered HELLO. A command that dies after that is
 * started again at once: pods are closed until it is back. One that dies before is started again after a pause, 0.1 s
 * at first, doubled up to 5 s: it would die again. It is over when the command ends with status 0 (it was told so over
 * its channel) or 2 (wrong usage), when it cannot be executed, and after SIGTERM or SIGINT, which are passed on as
 * SIGTERM; a command that is still there STOP_S later is killed. The command gets SIGTERM when the supervisor dies,
 * else it would hold the socket against its successor. All waits are in poll(), with a deadline where one applies;
 * nothing is allocated.
 */
#define _GNU_SOURCE /* pipe2 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAUSE_FIRST_MS 100
#define PAUSE_LAST_MS 5000
#define STOP_S 75 /* more than the longest drain of an engine, 60 s */

struct supervised {
        char **command;
        pid_t pid;        /* 0: not running */
        int ready;        /* read end, -1: nothing more to learn */
        bool answered;    /* it answered HELLO */
        bool told;        /* we were told to stop */
        uint64_t kill_at; /* ms, when told */
        unsigned pause_ms;
};

/* A line on stderr, unless its reader stalls: the engine matters more. */
static void say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *fmt, ...)
{
        struct pollfd out = {.fd = 2, .events = POLLOUT};
        char line[512];
        va_list ap;
        va_start(ap, fmt);
        int n = vsnprintf(line, sizeof(line), fmt, ap);
        va_end(ap);
        if (n > 0 && poll(&out, 1, 0) == 1 &&
            write(2, line, (size_t)n < sizeof(line) ? (size_t)n : sizeof(line) - 1) < 0)
                return; /* nobody is left to be told */
}

static uint64_t now_ms(void)
{
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static int start(struct supervised *s, const sigset_t *unblocked)
{
        int fds[2];
        char number[16];
        pid_t parent = getpid();
        if (pipe2(fds, O_CLOEXEC | O_NONBLOCK) < 0)
                return -errno;
        s->pid = fork();
        if (s->pid < 0) {
                int r = -errno;
                s->pid = 0;
                close(fds[0]);
                close(fds[1]);
                return r;
        }
        if (s->pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGTERM);
                if (getppid() != parent)
                        _exit(1);
                fcntl(fds[1], F_SETFD, 0);
                snprintf(number, sizeof(number), "%d", fds[1]);
                setenv("SIDESTEP_READY_FD", number, 1);
                sigprocmask(SIG_SETMASK, unblocked, NULL);
                execvp(s->command[0], s->command);
                say("supervise: cannot run %s: %s\n", s->command[0], strerror(errno));
                _exit(127);
        }
        close(fds[1]);
        s->ready = fds[0];
        s->answered = false;
        return 0;
}

static void read_ready(struct supervised *s)
{
        char byte;
        ssize_t n;
        if (s->ready < 0)
                return;
        n = read(s->ready, &byte, 1);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return;
        if (n == 1) {
                s->answered = true;
                s->pause_ms = PAUSE_FIRST_MS;
        }
        close(s->ready);
        s->ready = -1;
}

/* Reaps whatever ended. Returns the status if the command was among it, else -1. */
static int reap(struct supervised *s)
{
        int status, found = -1;
        for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
                if (pid == s->pid) {
                        found = status;
                        read_ready(s);
                        if (s->ready >= 0)
                                close(s->ready);
                        s->ready = -1;
                        s->pid = 0;
                }
        }
        return found;
}

static int exit_code(int status)
{
        return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void stop(struct supervised *s)
{
        s->told = true;
        s->kill_at = now_ms() + STOP_S * 1000;
        if (s->pid)
                kill(s->pid, SIGTERM);
}

/* Waits for a signal, the ready pipe, or until at (ms; 0: for ever). */
static void wait_for(struct supervised *s, int signals, uint64_t at)
{
        struct pollfd fds[2] = {{.fd = signals, .events = POLLIN}, {.fd = s->ready, .events = POLLIN}};
        struct signalfd_siginfo info;
        uint64_t now = now_ms();
        int left = !at ? -1 : at <= now ? 0 : at - now > 60000 ? 60000 : (int)(at - now);
        if (poll(fds, 2, left) <= 0)
                return;
        if (fds[1].revents)
                read_ready(s);
        while (read(signals, &info, sizeof(info)) == sizeof(info))
                if ((info.ssi_signo == SIGTERM || info.ssi_signo == SIGINT) && !s->told)
                        stop(s);
}

static int supervise(struct supervised *s, int signals, const sigset_t *unblocked)
{
        uint64_t start_at = now_ms();
        for (;;) {
                uint64_t now = now_ms();
                int r = 0, status;
                if (!s->pid && s->told)
                        return 0; /* told while it paused */
                if (!s->pid && now >= start_at)
                        r = start(s, unblocked);
                if (r) {
                        say("supervise: cannot start: %s\n", strerror(-r));
                        start_at = now + PAUSE_LAST_MS;
                }
                if (s->told && now >= s->kill_at)
                        kill(s->pid, SIGKILL);
                wait_for(s, signals, s->told ? s->kill_at : s->pid ? 0 : start_at);
                status = reap(s);
                if (status < 0)
                        continue;
                int code = exit_code(status);
                if (s->told)
                        return WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM ? 0 : code;
                if (code == 0 || code == 2 || code == 127)
                        return code;
                start_at = now_ms() + (s->answered ? 0 : s->pause_ms);
                say("supervise: %s ended with %s %d %s; starting it again%s\n", s->command[0],
                    WIFEXITED(status) ? "status" : "signal", WIFEXITED(status) ? code : WTERMSIG(status),
                    s->answered ? "after it had answered" : "before it had answered",
                    s->answered ? "" : " after a pause");
                if (!s->answered)
                        s->pause_ms = s->pause_ms * 2 < PAUSE_LAST_MS ? s->pause_ms * 2 : PAUSE_LAST_MS;
        }
}

int main(int argc, char **argv)
{
        struct supervised s = {.command = argv + 1, .ready = -1, .pause_ms = PAUSE_FIRST_MS};
        sigset_t caught, unblocked;
        if (argc < 2) {
                say("usage: supervise COMMAND...\n");
                return 2;
        }
        sigemptyset(&caught);
        sigaddset(&caught, SIGTERM);
        sigaddset(&caught, SIGINT);
        sigaddset(&caught, SIGCHLD);
        sigprocmask(SIG_BLOCK, &caught, &unblocked);
        int signals = signalfd(-1, &caught, SFD_CLOEXEC | SFD_NONBLOCK);
        if (signals < 0) {
                say("supervise: signalfd: %s\n", strerror(errno));
                return 1;
        }
        return supervise(&s, signals, &unblocked);
}
