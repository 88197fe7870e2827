/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sidestep-cni: the chained CNI plugin. It decides nothing; the agent of the node does.
 *
 * Theory of operation. A container runtime runs this program with CNI_* variables in the environment and the network's
 * configuration on stdin (CNI specification 0.3.1 to 1.0.0). ADD, DEL and CHECK are forwarded to the agent as they are:
 * environment, stdin and the open network namespace go through the Unix socket that the configuration names, and what
 * the agent answers goes to stdout (docs/interfaces.md, "CNI socket"). Passing the namespace as a descriptor spares the
 * agent the runtime's mount namespace, and pins the namespace for as long as the call lasts.
 *
 * Failing closed is the point: while no agent answers, ADD and CHECK fail with error 11 (try again later), the runtime
 * tears the sandbox down and repeats, and no pod starts outside the mesh unseen. Two exceptions. ADD of a pod in a
 * namespace listed in `exclude_namespaces` (default kube-system) passes without the agent, or the node could never
 * start what the agent itself needs. DEL without an agent succeeds, because it must be repeatable and what the agent
 * keeps about a dead pod it sweeps by itself.
 *
 * The configuration is hostile until proven otherwise: one pass checks that stdin is one JSON object of at most
 * MAX_STDIN bytes and MAX_DEPTH levels, and notes where the few values are that matter here. Nothing is copied out of
 * it but short strings; prevResult is a span of stdin. The plugin allocates stdin and the answer, and nothing else.
 */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX_STDIN (1024 * 1024)
#define MAX_ENVIRONMENT (64 * 1024)
#define MAX_ANSWER (4 * 1024 * 1024)
#define MAX_DEPTH 64
#define MAX_NAMESPACE 254
#define DEFAULT_TIMEOUT_S 30
#define MAX_TIMEOUT_S 600
#define DEL_TIMEOUT_S 5
#define DEFAULT_EXCLUDED "kube-system"
#define PROTOCOL_VERSION 1
#define NEWEST_VERSION "1.0.0"

/* Codes of CNI error objects, CNI specification, "Error". */
enum cni_code {
        CNI_INCOMPATIBLE_VERSION = 1,
        CNI_BAD_ENVIRONMENT = 4,
        CNI_IO = 5,
        CNI_DECODE = 6,
        CNI_BAD_CONFIG = 7,
        CNI_TRY_AGAIN = 11,
};

/* A part of stdin. */
struct span {
        const char *at;
        size_t length;
};

/* What the plugin itself needs of the configuration. Spans of strings are without quotes, escapes not resolved. */
struct config {
        struct span version;
        struct span socket;
        struct span previous;
        struct span excluded; /* the whole array */
        bool has_excluded;
        long timeout_s;
};

/* ---- JSON: one strict pass (RFC 8259) ------------------------------------------------------------------------- */

struct cursor {
        const char *at;
        const char *end;
};

static void skip_space(struct cursor *c)
{
        while (c->at < c->end && (*c->at == ' ' || *c->at == '\t' || *c->at == '\n' || *c->at == '\r'))
                c->at++;
}

static bool take(struct cursor *c, char wanted)
{
        skip_space(c);
        if (c->at == c->end || *c->at != wanted)
                return false;
        c->at++;
        return true;
}

static bool is_hex(char c)
{
        return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

static bool is_digit(const struct cursor *c)
{
        return c->at < c->end && *c->at >= '0' && *c->at <= '9';
}

/* A string; `found` is what stands between the quotes. */
static int scan_string(struct cursor *c, struct span *found)
{
        const char *start;

        if (!take(c, '"'))
                return -EINVAL;
        start = c->at;
        while (c->at < c->end && *c->at != '"') {
                if ((unsigned char)*c->at < 0x20)
                        return -EINVAL;
                if (*c->at == '\\') {
                        if (++c->at == c->end || !*c->at || !strchr("\"\\/bfnrtu", *c->at))
                                return -EINVAL;
                        if (*c->at == 'u') {
                                for (int i = 0; i < 4; i++)
                                        if (++c->at >= c->end || !is_hex(*c->at))
                                                return -EINVAL;
                        }
                }
                c->at++;
        }
        if (c->at == c->end)
                return -EINVAL;
        *found = (struct span){start, (size_t)(c->at - start)};
        c->at++;
        return 0;
}

static int scan_number(struct cursor *c)
{
        if (c->at < c->end && *c->at == '-')
                c->at++;
        if (!is_digit(c))
                return -EINVAL;
        if (*c->at == '0')
                c->at++;
        else
                while (is_digit(c))
                        c->at++;
        if (c->at < c->end && *c->at == '.') {
                c->at++;
                if (!is_digit(c))
                        return -EINVAL;
                while (is_digit(c))
                        c->at++;
        }
        if (c->at < c->end && (*c->at == 'e' || *c->at == 'E')) {
                c->at++;
                if (c->at < c->end && (*c->at == '+' || *c->at == '-'))
                        c->at++;
                if (!is_digit(c))
                        return -EINVAL;
                while (is_digit(c))
                        c->at++;
        }
        return 0;
}

static int scan_word(struct cursor *c, const char *word)
{
        size_t length = strlen(word);

        if ((size_t)(c->end - c->at) < length || memcmp(c->at, word, length))
                return -EINVAL;
        c->at += length;
        return 0;
}

static int scan_value(struct cursor *c, int depth);

static int scan_array(struct cursor *c, int depth)
{
        int rc;

        if (!take(c, '['))
                return -EINVAL;
        if (take(c, ']'))
                return 0;
        do {
                rc = scan_value(c, depth + 1);
                if (rc)
                        return rc;
        } while (take(c, ','));
        return take(c, ']') ? 0 : -EINVAL;
}

static int scan_object(struct cursor *c, int depth)
{
        struct span key;
        int rc;

        if (!take(c, '{'))
                return -EINVAL;
        if (take(c, '}'))
                return 0;
        do {
                rc = scan_string(c, &key);
                if (rc)
                        return rc;
                if (!take(c, ':'))
                        return -EINVAL;
                rc = scan_value(c, depth + 1);
                if (rc)
                        return rc;
        } while (take(c, ','));
        return take(c, '}') ? 0 : -EINVAL;
}

static int scan_value(struct cursor *c, int depth)
{
        struct span ignored;

        if (depth > MAX_DEPTH)
                return -E2BIG;
        skip_space(c);
        if (c->at == c->end)
                return -EINVAL;
        switch (*c->at) {
        case '{':
                return scan_object(c, depth);
        case '[':
                return scan_array(c, depth);
        case '"':
                return scan_string(c, &ignored);
        case 't':
                return scan_word(c, "true");
        case 'f':
                return scan_word(c, "false");
        case 'n':
                return scan_word(c, "null");
        default:
                return scan_number(c);
        }
}

static bool span_is(struct span span, const char *text)
{
        return span.length == strlen(text) && !memcmp(span.at, text, span.length);
}

/* The text of a string span into `out`. -EINVAL where it holds an escape or does not fit: nothing here needs one. */
static int span_text(struct span span, char *out, size_t size)
{
        if (!span.at || span.length >= size || memchr(span.at, '\\', span.length) || memchr(span.at, 0, span.length))
                return -EINVAL;
        memcpy(out, span.at, span.length);
        out[span.length] = 0;
        return 0;
}

/*
 * Reads the configuration. 0, -EINVAL: not one JSON object, -E2BIG: nested too deep, -EBADMSG: a key of ours has the
 * wrong type. Of a key that stands twice the last one counts, as in the agent's parser.
 */
static int parse_config(const char *text, size_t length, struct config *config)
{
        struct cursor c = {text, text + length};
        struct span key, ignored;
        int rc;

        *config = (struct config){.timeout_s = DEFAULT_TIMEOUT_S};
        if (!take(&c, '{'))
                return -EINVAL;
        if (!take(&c, '}')) {
                do {
                        const char *value;
                        char first;

                        rc = scan_string(&c, &key);
                        if (rc)
                                return rc;
                        if (!take(&c, ':'))
                                return -EINVAL;
                        skip_space(&c);
                        value = c.at;
                        first = c.at < c.end ? *c.at : 0;
                        rc = scan_value(&c, 1);
                        if (rc)
                                return rc;
                        ignored = (struct span){value, (size_t)(c.at - value)};
                        if (span_is(key, "cniVersion") || span_is(key, "socket")) {
                                struct span *text_of = span_is(key, "socket") ? &config->socket : &config->version;

                                if (first != '"')
                                        return -EBADMSG;
                                *text_of = (struct span){ignored.at + 1, ignored.length - 2};
                        } else if (span_is(key, "prevResult")) {
                                config->previous = first == '{' ? ignored : (struct span){NULL, 0};
                        } else if (span_is(key, "exclude_namespaces")) {
                                if (first != '[')
                                        return -EBADMSG;
                                config->excluded = ignored;
                                config->has_excluded = true;
                        } else if (span_is(key, "timeout_s")) {
                                char number[16];

                                if (span_text(ignored, number, sizeof(number)) ||
                                    strspn(number, "0123456789") != strlen(number))
                                        return -EBADMSG;
                                config->timeout_s = strtol(number, NULL, 10);
                                if (config->timeout_s < 1 || config->timeout_s > MAX_TIMEOUT_S)
                                        return -EBADMSG;
                        }
                } while (take(&c, ','));
                if (!take(&c, '}'))
                        return -EINVAL;
        }
        skip_space(&c);
        return c.at == c.end ? 0 : -EINVAL;
}

/* Is the pod's namespace one that passes without an agent? */
static bool is_excluded(const struct config *config, const char *namespace)
{
        struct cursor c = {config->excluded.at, config->excluded.at + config->excluded.length};
        struct span item;

        if (!*namespace)
                return false;
        if (!config->has_excluded)
                return !strcmp(namespace, DEFAULT_EXCLUDED);
        if (!take(&c, '['))
                return false;
        while (!scan_string(&c, &item)) {
                if (span_is(item, namespace))
                        return true;
                if (!take(&c, ','))
                        break;
        }
        return false;
}

/* The value of K8S_POD_NAMESPACE in CNI_ARGS ("K=V;K=V"); empty where it is not there or too long. */
static void pod_namespace(const char *args, char *out, size_t size)
{
        static const char key[] = "K8S_POD_NAMESPACE=";

        *out = 0;
        while (args && *args) {
                size_t length = strcspn(args, ";");

                if (length >= sizeof(key) - 1 && !strncmp(args, key, sizeof(key) - 1)) {
                        struct span value = {args + sizeof(key) - 1, length - (sizeof(key) - 1)};

                        if (span_text(value, out, size))
                                *out = 0;
                }
                args += length;
                if (*args)
                        args++;
        }
}

#ifdef SIDESTEP_FUZZ

/* What a stranger can reach: the configuration, and CNI_ARGS (the part after the first NUL byte). */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
        const char *separator = size ? memchr(data, 0, size) : NULL;
        size_t length = separator ? (size_t)(separator - (const char *)data) : size;
        char namespace[MAX_NAMESPACE] = "kube-system";
        char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
        struct config config;

        if (separator) {
                char *args = strndup(separator + 1, size - length - 1);

                if (!args)
                        return 0;
                pod_namespace(args, namespace, sizeof(namespace));
                free(args);
        }
        if (parse_config((const char *)data, length, &config))
                return 0;
        is_excluded(&config, namespace);
        span_text(config.socket, path, sizeof(path));
        return 0;
}

#else

static const char *const supported_versions[] = {"0.3.1", "0.4.0", "1.0.0"};

extern char **environ;

/* ---- answers -------------------------------------------------------------------------------------------------- */

static void print_json_string(const char *text)
{
        putchar('"');
        for (; *text; text++) {
                unsigned char c = (unsigned char)*text;

                if (c == '"' || c == '\\')
                        printf("\\%c", c);
                else if (c < 0x20 || c >= 0x7f)
                        printf("\\u%04x", c);
                else
                        putchar(c);
        }
        putchar('"');
}

/* A CNI error object on stdout. Returns the exit status. `version`: the configuration's, where it is one of ours. */
static int fail(struct span version, enum cni_code code, const char *message, const char *details)
{
        const char *known = NEWEST_VERSION;

        for (size_t i = 0; version.at && i < sizeof(supported_versions) / sizeof(*supported_versions); i++)
                if (span_is(version, supported_versions[i]))
                        known = supported_versions[i];
        printf("{\"cniVersion\":\"%s\",\"code\":%d,\"msg\":", known, code);
        print_json_string(message);
        if (details && *details) {
                printf(",\"details\":");
                print_json_string(details);
        }
        printf("}\n");
        fflush(stdout);
        fprintf(stderr, "sidestep-cni: %s%s%s\n", message, details && *details ? ": " : "", details ? details : "");
        return 1;
}

static int print_versions(void)
{
        printf("{\"cniVersion\":\"" NEWEST_VERSION "\",\"supportedVersions\":[");
        for (size_t i = 0; i < sizeof(supported_versions) / sizeof(*supported_versions); i++)
                printf("%s\"%s\"", i ? "," : "", supported_versions[i]);
        printf("]}\n");
        return fflush(stdout) ? 1 : 0;
}

/* ---- the call ------------------------------------------------------------------------------------------------- */

static int64_t now_ms(void)
{
        struct timespec now;

        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Waits until `fd` is ready or the deadline is over. 0, -ETIMEDOUT, -errno. */
static int wait_for(int fd, short events, int64_t deadline_ms)
{
        struct pollfd ready = {.fd = fd, .events = events};

        for (;;) {
                int64_t left = deadline_ms - now_ms();
                int n;

                if (left <= 0)
                        return -ETIMEDOUT;
                n = poll(&ready, 1, (int)left);
                if (n > 0)
                        return 0;
                if (n < 0 && errno != EINTR)
                        return -errno;
        }
}

/* stdin up to its end. The caller frees `*text`. -EFBIG: more than MAX_STDIN. */
static int read_stdin(char **text, size_t *length)
{
        char *buffer = malloc(MAX_STDIN + 1);
        size_t have = 0;

        if (!buffer)
                return -ENOMEM;
        for (;;) {
                ssize_t n = read(STDIN_FILENO, buffer + have, MAX_STDIN + 1 - have);

                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0 || have + (size_t)n > MAX_STDIN) {
                        int rc = n < 0 ? -errno : -EFBIG;

                        free(buffer);
                        return rc;
                }
                if (!n)
                        break;
                have += (size_t)n;
        }
        *text = buffer;
        *length = have;
        return 0;
}

/* Every CNI_* variable as "K=V\0". -E2BIG: more than MAX_ENVIRONMENT. */
static int gather_environment(char *block, size_t *length)
{
        *length = 0;
        for (char **variable = environ; *variable; variable++) {
                size_t size = strlen(*variable) + 1;

                if (strncmp(*variable, "CNI_", 4))
                        continue;
                if (*length + size > MAX_ENVIRONMENT)
                        return -E2BIG;
                memcpy(block + *length, *variable, size);
                *length += size;
        }
        return 0;
}

static int connect_agent(struct span path, int64_t deadline_ms, int *out)
{
        struct sockaddr_un address = {.sun_family = AF_UNIX};
        int fd, rc;

        if (span_text(path, address.sun_path, sizeof(address.sun_path)))
                return -ENAMETOOLONG;
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0)
                return -errno;
        while (connect(fd, (struct sockaddr *)&address, sizeof(address))) {
                rc = -errno;
                /* A full backlog answers EAGAIN to Unix sockets and cannot be polled for: ask again a little later. */
                if (rc != -EAGAIN || now_ms() >= deadline_ms)
                        goto fail;
                nanosleep(&(struct timespec){.tv_nsec = 10 * 1000 * 1000}, NULL);
        }
        *out = fd;
        return 0;
fail:
        close(fd);
        return rc;
}

/* Sends all; `netns_fd`, if not negative, rides on the first byte. */
static int send_all(int fd, const void *data, size_t length, int netns_fd, int64_t deadline_ms)
{
        const char *at = data;

        while (length) {
                union {
                        struct cmsghdr align;
                        char space[CMSG_SPACE(sizeof(int))];
                } control = {0};
                struct iovec part = {.iov_base = (void *)at, .iov_len = length};
                struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
                ssize_t n;

                if (netns_fd >= 0) {
                        struct cmsghdr *header;

                        message.msg_control = control.space;
                        message.msg_controllen = sizeof(control.space);
                        header = CMSG_FIRSTHDR(&message);
                        header->cmsg_level = SOL_SOCKET;
                        header->cmsg_type = SCM_RIGHTS;
                        header->cmsg_len = CMSG_LEN(sizeof(int));
                        memcpy(CMSG_DATA(header), &netns_fd, sizeof(int));
                }
                n = sendmsg(fd, &message, MSG_NOSIGNAL);
                if (n < 0 && errno == EAGAIN) {
                        int rc = wait_for(fd, POLLOUT, deadline_ms);

                        if (rc)
                                return rc;
                        continue;
                }
                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0)
                        return -errno;
                netns_fd = -1;
                at += n;
                length -= (size_t)n;
        }
        return 0;
}

static int receive_all(int fd, void *data, size_t length, int64_t deadline_ms)
{
        char *at = data;

        while (length) {
                ssize_t n = recv(fd, at, length, 0);

                if (n < 0 && errno == EAGAIN) {
                        int rc = wait_for(fd, POLLIN, deadline_ms);

                        if (rc)
                                return rc;
                        continue;
                }
                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0)
                        return -errno;
                if (!n)
                        return -ECONNRESET;
                at += n;
                length -= (size_t)n;
        }
        return 0;
}

struct header {
        char magic[4];
        uint32_t version;
        uint32_t first;
        uint32_t second;
};

/* Asks the agent. On success `*answer` (freed by the caller) goes to stdout and `*status` is the exit status. */
static int ask(const struct config *config, const char *text, size_t length, int64_t deadline_ms, char **answer,
               size_t *answer_length, int *status)
{
        static char environment[MAX_ENVIRONMENT];
        const char *netns = getenv("CNI_NETNS");
        struct header header = {.magic = {'S', 'C', 'N', 'I'}, .version = PROTOCOL_VERSION};
        size_t environment_length;
        int fd = -1, netns_fd = -1, rc;

        *answer = NULL;
        rc = gather_environment(environment, &environment_length);
        if (rc)
                return rc;
        rc = connect_agent(config->socket, deadline_ms, &fd);
        if (rc)
                return rc;
        if (netns && *netns)
                netns_fd = open(netns, O_RDONLY | O_CLOEXEC);
        header.first = (uint32_t)environment_length;
        header.second = (uint32_t)length;
        rc = send_all(fd, &header, sizeof(header), netns_fd, deadline_ms);
        if (!rc)
                rc = send_all(fd, environment, environment_length, -1, deadline_ms);
        if (!rc)
                rc = send_all(fd, text, length, -1, deadline_ms);
        if (!rc)
                rc = receive_all(fd, &header, sizeof(header), deadline_ms);
        if (rc)
                goto out;
        if (memcmp(header.magic, "SCNI", 4) || header.version != PROTOCOL_VERSION || header.second > MAX_ANSWER) {
                rc = -EPROTO;
                goto out;
        }
        *answer = malloc(header.second + 1);
        if (!*answer) {
                rc = -ENOMEM;
                goto out;
        }
        rc = receive_all(fd, *answer, header.second, deadline_ms);
        *answer_length = header.second;
        *status = header.first ? 1 : 0;
out:
        if (rc) {
                free(*answer);
                *answer = NULL;
        }
        if (netns_fd >= 0)
                close(netns_fd);
        close(fd);
        return rc;
}

static int print_all(const char *text, size_t length)
{
        return fwrite(text, 1, length, stdout) == length && !fflush(stdout) ? 0 : 1;
}

static int forward(const char *command, const struct config *config, const char *text, size_t length)
{
        bool is_del = !strcmp(command, "DEL");
        long seconds = is_del && config->timeout_s > DEL_TIMEOUT_S ? DEL_TIMEOUT_S : config->timeout_s;
        char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
        char namespace[MAX_NAMESPACE];
        size_t answer_length = 0;
        char *answer = NULL;
        int status = 1, rc;

        pod_namespace(getenv("CNI_ARGS"), namespace, sizeof(namespace));
        if (!is_del && is_excluded(config, namespace)) {
                if (strcmp(command, "ADD"))
                        return 0;
                if (!config->previous.at)
                        return fail(config->version, CNI_BAD_CONFIG,
                                    "no prevResult: sidestep-cni comes after the plugin that makes the interface", "");
                return print_all(config->previous.at, config->previous.length);
        }
        if (span_text(config->socket, path, sizeof(path)) || path[0] != '/')
                return fail(config->version, CNI_BAD_CONFIG, "`socket` must be the absolute path of the agent's socket",
                            "");
        rc = ask(config, text, length, now_ms() + seconds * 1000, &answer, &answer_length, &status);
        if (rc && is_del) {
                fprintf(stderr, "sidestep-cni: DEL without the agent at %s: %s\n", path, strerror(-rc));
                return 0;
        }
        if (rc == -E2BIG)
                return fail(config->version, CNI_BAD_ENVIRONMENT, "the CNI_* variables are too long", "");
        if (rc) {
                char details[sizeof(path) + 128];

                snprintf(details, sizeof(details), "%s: %s", path, strerror(-rc));
                return fail(config->version, CNI_TRY_AGAIN, "the sidestep agent of this node does not answer", details);
        }
        if (print_all(answer, answer_length))
                status = 1;
        free(answer);
        return status;
}

/* 0 where the configuration's version has the command; otherwise prints the error and returns the exit status. */
static int refuse_version(const struct config *config, bool is_check, bool is_later)
{
        bool known = false;

        for (size_t i = 0; config->version.at && i < sizeof(supported_versions) / sizeof(*supported_versions); i++)
                known |= span_is(config->version, supported_versions[i]);
        if (!known)
                return fail(config->version, CNI_INCOMPATIBLE_VERSION, "cniVersion must be 0.3.1, 0.4.0 or 1.0.0", "");
        if (is_check && span_is(config->version, "0.3.1"))
                return fail(config->version, CNI_INCOMPATIBLE_VERSION, "CHECK needs cniVersion 0.4.0 or newer", "");
        if (is_later)
                return fail(config->version, CNI_INCOMPATIBLE_VERSION, "GC and STATUS need cniVersion 1.1.0", "");
        return 0;
}

int main(void)
{
        static const struct span no_version;
        const char *command = getenv("CNI_COMMAND");
        const char *const needed[] = {"CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"};
        bool is_del, is_check, is_later;
        struct config config;
        size_t length = 0;
        char *text = NULL;
        int status = 1, rc;

        if (!command || !*command)
                return fail(no_version, CNI_BAD_ENVIRONMENT, "CNI_COMMAND is not set",
                            "a container runtime runs this program");
        if (!strcmp(command, "VERSION"))
                return print_versions();
        is_del = !strcmp(command, "DEL");
        is_check = !strcmp(command, "CHECK");
        is_later = !strcmp(command, "GC") || !strcmp(command, "STATUS");
        if (!is_del && !is_check && !is_later && strcmp(command, "ADD"))
                return fail(no_version, CNI_BAD_ENVIRONMENT, "CNI_COMMAND is not known", command);
        rc = read_stdin(&text, &length);
        if (rc)
                return fail(no_version, CNI_IO, "cannot read the network configuration", strerror(-rc));
        rc = parse_config(text, length, &config);
        if (rc == -EBADMSG) {
                status = fail(no_version, CNI_BAD_CONFIG, "a key of the network configuration has a wrong value",
                              "cniVersion and socket are strings, exclude_namespaces is a list, timeout_s is 1 to 600");
                goto out;
        }
        if (rc) {
                status = fail(no_version, CNI_DECODE, "the network configuration is not a JSON object",
                              rc == -E2BIG ? "nested too deep" : "");
                goto out;
        }
        status = refuse_version(&config, is_check, is_later);
        if (status)
                goto out;
        for (size_t i = 0; i < sizeof(needed) / sizeof(*needed); i++) {
                const char *value = getenv(needed[i]);

                if ((!value || !*value) && !(is_del && i == 2)) {
                        status = fail(config.version, CNI_BAD_ENVIRONMENT, "missing in the environment", needed[i]);
                        goto out;
                }
        }
        status = forward(command, &config, text, length);
out:
        free(text);
        return status;
}

#endif
