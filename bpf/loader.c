/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation
 *
 * An instance is a directory of pins: each map and each program under its own name, and the sk_lookup link. There is no
 * other state; whoever has the directory can go on. Programs are attached to tc by clsact filters (handle 1, preference
 * CAPTURE_PREF; one path on every kernel, and they die with the namespace) and to sk_lookup by a link. clsact is
 * created once and never deleted: adding or deleting it loses packets.
 *
 * Turned-around packets need, in the namespace, a rule (mark 0x111 -> table 100), a table in which every destination is
 * local on lo, and accept_local on lo, because they carry the pod's own source address. Whether rule and route are
 * there is asked the way the kernel itself asks: a route look-up with the mark.
 *
 * To lenient, in this order: mode NOTING (everything passes, what sends is noted), filters, sk_lookup (from here on new
 * connections are the engine's), a pass of the iterator (everything that is open is noted), and once no half-open
 * connection from before is left, LENIENT. A half-open connection is from before if its first SYN-ACK was sent before
 * sk_lookup had its say for certain (an RCU grace period after it was attached); that moment is kept in the map `pod`,
 * so that a repeated call does not begin anew.
 *
 * To draining: what is not noted is the engine's, and is marked so by the iterator before anything may pass; its
 * packets are turned around for ever, also when the engine dies.
 *
 * The kubelet exemption has a directory of its own beside the pods', `node`: the maps `probe_ports` and `probe_notes`,
 * which every pod's `in_eth` shares, the program of the kubelet's cgroup and its link. It comes with the first pod and
 * goes with the last, so that all pods that are there read the same notes. The program carries the id of the cgroup's
 * directory; another directory (the kubelet was started anew) means another program and link.
 *
 * A door is the program `door` at the host's end of the pod's link (tc ingress there), with the pod's addresses in the
 * node's map `doors`. First the program, then the addresses: from then on the other pods' in_eth wants to see its mark.
 * It goes the other way round. A link that is no veth between these two namespaces, or at whose end somebody else's
 * programs look at the packets (they may have a policy to enforce), gets none.
 *
 * Another layout of the pins (capture_upgrade): the maps that are as before are linked to under the new directory, so
 * whoever has them goes on (of v2 that is all of them, the node's too); programs and the other maps are loaded anew;
 * fates of v1 are carried from the one map to the other; the sk_lookup link gets the new program in one step, and its
 * pin moves. The old tc filters, which the namespace holds, turn round what the engine's sockets in the same
 * `listeners` take, until they are exchanged. A crash in the middle leaves the old pins, which are taken away last, and
 * the same call finishes it. What comes to nothing: counters, and probes of the kubelet that are under way.
 *
 * The iterator needs the kernel's BTF, which takes time and memory to read, so it is loaded when it is first needed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fib_rules.h>
#include <linux/if_link.h>
#include <linux/inet_diag.h>
#include <linux/magic.h>
#include <linux/membarrier.h>
#include <linux/net_namespace.h>
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>
#include "loader.h"
#include "maps.h"
#include "capture.skel.h"
#include "flows.skel.h"
#include "kubelet.skel.h"
#include "survey.skel.h"

#define CAPTURE_PREF 1 /* before everybody's */
#define CAPTURE_HANDLE 1
#define CAPTURE_TABLE 100
#define CAPTURE_RULE_PREF 32764

static const char *const map_names[] = {"listeners", "engine_sk", "fates", "own",      "probes", "asking",
                                        "addresses", "counters",  "pod",   "verdicts", "pending"};
static const char *const program_names[] = {"out_eth", "in_eth", "in_lo", "out_lo", "steer", "door"};
static const char *const survey_names[] = {"note", "claim", "survey", "adopt", "carry"}; /* loaded when needed */
static const char *const node_names[] = {"link", "probe_syn", "probe_ports", "kubelet_counters", "probe_notes"};
#define NODE "node" /* no pod's UID */
#define NODE_PATH (PATH_MAX - 64)
/* What vouched flows need of the node. */
static const char *const vouch_names[] = {"vouched", "slots", "ended", "flows", "doors", "doors_asking"};
/* The maps that are the same in v1, and those that only v2 has. */
static const char *const kept_names[] = {"listeners", "engine_sk", "own", "asking", "addresses", "pod"};
static const char *const kept_of_v2[] = {"fates", "verdicts", "pending", "probes"};
static const char *const kept_of_node[] = {"vouched", "slots", "ended"};
/* The maps that pods take from there. */
static const char *const shared_names[] = {"probe_notes", "vouched", "slots", "ended", "doors", "doors_asking"};

static int fail(char *error, int code, const char *format, ...)
{
        va_list args;
        va_start(args, format);
        int n = vsnprintf(error, CAPTURE_ERROR_LEN, format, args);
        va_end(args);
        if (n >= 0 && n < CAPTURE_ERROR_LEN - 3)
                snprintf(error + n, CAPTURE_ERROR_LEN - (size_t)n, ": %s", strerror(-code));
        return code;
}

static int silent(enum libbpf_print_level level, const char *format, va_list args)
{
        (void)level, (void)format, (void)args;
        return 0;
}

static void path_of(char out[PATH_MAX], const char *pins, const char *name)
{
        snprintf(out, PATH_MAX, "%s/%s", pins, name);
}

/* fd of a pin, or -errno. */
static int open_pin(const char *pins, const char *name)
{
        char path[PATH_MAX];
        path_of(path, pins, name);
        int fd = bpf_obj_get(path);
        return fd < 0 ? -errno : fd;
}

static int make_directories(const char *pins)
{
        char path[PATH_MAX];
        snprintf(path, sizeof(path), "%s", pins);
        for (char *p = path + 1;; p++) {
                if (*p != '/' && *p)
                        continue;
                char was = *p;
                *p = 0;
                if (mkdir(path, 0700) < 0 && errno != EEXIST)
                        return -errno;
                if (!was)
                        return 0;
                *p = was;
        }
}

/* -- network namespaces ------------------------------------------------------------------------------------------- */

static int enter(int netns, int *back)
{
        *back = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
        if (*back < 0)
                return -errno;
        if (setns(netns, CLONE_NEWNET) < 0) {
                int error = -errno;
                close(*back);
                return error;
        }
        return 0;
}

static void leave(int back)
{
        if (setns(back, CLONE_NEWNET) < 0) {
                fprintf(stderr, "capture: cannot return to the own network namespace: %s\n", strerror(errno));
                abort();
        }
        close(back);
}

static int inode_of(int netns, uint64_t *ino)
{
        struct stat st;
        if (fstat(netns, &st) < 0)
                return -errno;
        *ino = st.st_ino;
        return 0;
}

/* -- netlink ------------------------------------------------------------------------------------------------------ */

struct request {
        struct nlmsghdr header;
        union {
                struct fib_rule_hdr rule;
                struct rtmsg route;
                struct ifinfomsg link;
                struct rtgenmsg nsid;
                struct tcmsg filter;
        };
        char attributes[256];
};

static void attribute(struct request *r, unsigned short type, const void *data, size_t length)
{
        struct rtattr *a = (struct rtattr *)((char *)r + NLMSG_ALIGN(r->header.nlmsg_len));
        a->rta_type = type;
        a->rta_len = (unsigned short)RTA_LENGTH(length);
        memcpy(RTA_DATA(a), data, length);
        r->header.nlmsg_len = NLMSG_ALIGN(r->header.nlmsg_len) + RTA_LENGTH(length);
}

#define ANSWER 32768 /* what the kernel gives at most in one piece */

/* Sends, and writes the first piece of the kernel's answer. Its bytes, or -errno, what the kernel says of an error
 * included. */
static ssize_t ask(struct request *r, struct nlmsghdr *answer)
{
        int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
        if (fd < 0)
                return -errno;
        struct timeval limit = {.tv_sec = 5};
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
        ssize_t n = send(fd, r, r->header.nlmsg_len, 0);
        if (n >= 0)
                n = recv(fd, answer, ANSWER, 0);
        if (n < 0)
                n = -errno;
        else if (n < (ssize_t)sizeof(*answer))
                n = -EPROTO;
        else if (answer->nlmsg_type == NLMSG_ERROR && ((struct nlmsgerr *)NLMSG_DATA(answer))->error)
                n = ((struct nlmsgerr *)NLMSG_DATA(answer))->error;
        close(fd);
        return n;
}

/* Sends, returns the kernel's answer: 0, -errno, or for a look-up the type of the route. */
static int talk(struct request *r)
{
        struct nlmsghdr answer[ANSWER / sizeof(struct nlmsghdr)];
        ssize_t n = ask(r, answer);
        if (n < 0)
                return (int)n;
        return answer->nlmsg_type == NLMSG_ERROR ? 0 : ((struct rtmsg *)NLMSG_DATA(answer))->rtm_type;
}

static int change_rule(int family, bool add)
{
        struct request r = {.header = {.nlmsg_len = NLMSG_LENGTH(sizeof(r.rule)),
                                       .nlmsg_type = add ? RTM_NEWRULE : RTM_DELRULE,
                                       .nlmsg_flags = (unsigned short)(NLM_F_REQUEST | NLM_F_ACK |
                                                                       (add ? NLM_F_CREATE | NLM_F_EXCL : 0))},
                            .rule = {.family = (unsigned char)family, .action = FR_ACT_TO_TBL, .table = CAPTURE_TABLE}};
        uint32_t mark = CAPTURE_MARK_TURNED, preference = CAPTURE_RULE_PREF, table = CAPTURE_TABLE;
        attribute(&r, FRA_FWMARK, &mark, 4);
        attribute(&r, FRA_PRIORITY, &preference, 4);
        attribute(&r, FRA_TABLE, &table, 4);
        return talk(&r);
}

static int change_route(int family, bool add)
{
        struct request r = {.header = {.nlmsg_len = NLMSG_LENGTH(sizeof(r.route)),
                                       .nlmsg_type = add ? RTM_NEWROUTE : RTM_DELROUTE,
                                       .nlmsg_flags = (unsigned short)(NLM_F_REQUEST | NLM_F_ACK |
                                                                       (add ? NLM_F_CREATE | NLM_F_EXCL : 0))},
                            .route = {.rtm_family = (unsigned char)family,
                                      .rtm_table = CAPTURE_TABLE,
                                      .rtm_protocol = RTPROT_STATIC,
                                      .rtm_scope = family == AF_INET ? RT_SCOPE_HOST : RT_SCOPE_UNIVERSE,
                                      .rtm_type = RTN_LOCAL}};
        uint32_t lo = 1, table = CAPTURE_TABLE;
        attribute(&r, RTA_OIF, &lo, 4);
        attribute(&r, RTA_TABLE, &table, 4);
        return talk(&r);
}

/* Does a turned-around packet reach the pod itself? 1, 0 or -errno. The destination is an address of documentation (RFC
 * 5737, 3849). */
static int is_turned_home(int family)
{
        struct request r = {
                .header = {.nlmsg_len = NLMSG_LENGTH(sizeof(r.route)),
                           .nlmsg_type = RTM_GETROUTE,
                           .nlmsg_flags = NLM_F_REQUEST},
                .route = {.rtm_family = (unsigned char)family, .rtm_dst_len = family == AF_INET ? 32 : 128}};
        uint8_t destination[16];
        inet_pton(family, family == AF_INET ? "192.0.2.1" : "2001:db8::1", destination);
        uint32_t mark = CAPTURE_MARK_TURNED;
        attribute(&r, RTA_DST, destination, family == AF_INET ? 4 : 16);
        attribute(&r, RTA_MARK, &mark, 4);
        int type = talk(&r);
        if (type == -ENETUNREACH || type == -EHOSTUNREACH)
                return 0;
        return type < 0 ? type : type == RTN_LOCAL;
}

static bool has_ipv6(void)
{
        char value = '1';
        int fd = open("/proc/sys/net/ipv6/conf/lo/disable_ipv6", O_RDONLY | O_CLOEXEC);
        if (fd < 0)
                return false;
        ssize_t n = read(fd, &value, 1);
        close(fd);
        return n == 1 && value == '0';
}

static int accept_local(int value)
{
        char text = (char)('0' + value);
        int fd = open("/proc/sys/net/ipv4/conf/lo/accept_local", (value < 0 ? O_RDONLY : O_WRONLY) | O_CLOEXEC),
            result = 0;
        if (fd < 0)
                return -errno;
        if (value < 0)
                result = read(fd, &text, 1) == 1 ? text - '0' : -EIO;
        else if (write(fd, &text, 1) != 1)
                result = -errno;
        close(fd);
        return result;
}

/* -- attachments; all of these run inside the namespace ----------------------------------------------------------- */

struct filter {
        const char *program;
        enum bpf_tc_attach_point point;
        bool on_lo;
        int missing;
};

static const struct filter filters[] = {
        {"in_lo", BPF_TC_INGRESS, true, CAPTURE_NO_IN_LO},
        {"out_lo", BPF_TC_EGRESS, true, CAPTURE_NO_OUT_LO},
        {"in_eth", BPF_TC_INGRESS, false, CAPTURE_NO_IN_ETH},
        {"out_eth", BPF_TC_EGRESS, false, CAPTURE_NO_OUT_ETH}, /* last: it sends packets to the others */
};

static const struct filter door = {"door", BPF_TC_INGRESS, false, 0}; /* in the host's namespace */

static uint32_t program_id(int fd)
{
        struct bpf_prog_info info = {0};
        uint32_t length = sizeof(info);
        return bpf_obj_get_info_by_fd(fd, &info, &length) == 0 ? info.id : 0;
}

static int filter_attach(const struct filter *f, int program, int ifindex)
{
        LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex, .attach_point = f->point);
        int result = bpf_tc_hook_create(&hook);
        if (result == 0 || result == -EEXIST) {
                LIBBPF_OPTS(bpf_tc_opts, opts, .handle = CAPTURE_HANDLE, .priority = CAPTURE_PREF, .prog_fd = program,
                            .flags = BPF_TC_F_REPLACE);
                result = bpf_tc_attach(&hook, &opts);
        }
        return result;
}

static bool filter_is_there(const struct filter *f, const char *pins, int ifindex)
{
        int fd = open_pin(pins, f->program);
        if (fd < 0)
                return false;
        uint32_t id = program_id(fd);
        close(fd);
        LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex, .attach_point = f->point);
        LIBBPF_OPTS(bpf_tc_opts, opts, .handle = CAPTURE_HANDLE, .priority = CAPTURE_PREF);
        return bpf_tc_query(&hook, &opts) == 0 && opts.prog_id == id;
}

static int filter_detach(const struct filter *f, int ifindex)
{
        LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex, .attach_point = f->point);
        LIBBPF_OPTS(bpf_tc_opts, opts, .handle = CAPTURE_HANDLE, .priority = CAPTURE_PREF);
        int result = bpf_tc_detach(&hook, &opts);
        return result == -ENOENT || result == -EINVAL ? 0 : result; /* not there; no clsact */
}

/* Is the link there, in this namespace, with the pinned program? */
static bool link_is_there(const char *pins, uint64_t ino)
{
        int link = open_pin(pins, "link"), program = open_pin(pins, "steer");
        struct bpf_link_info info = {0};
        uint32_t length = sizeof(info);
        bool found = link >= 0 && program >= 0 && bpf_obj_get_info_by_fd(link, &info, &length) == 0 &&
                     info.netns.netns_ino == ino && info.prog_id == program_id(program);
        if (link >= 0)
                close(link);
        if (program >= 0)
                close(program);
        return found;
}

static int link_attach(const char *pins, int netns, uint64_t ino)
{
        char path[PATH_MAX];
        if (link_is_there(pins, ino))
                return 0;
        int program = open_pin(pins, "steer");
        if (program < 0)
                return program;
        path_of(path, pins, "link");
        int old =
                open_pin(pins, "link"); /* of a namespace that is gone, or with another program: until ours is there */
        int link = bpf_link_create(program, netns, BPF_SK_LOOKUP, NULL), result = 0;
        if (link < 0)
                result = -errno;
        else if ((unlink(path) < 0 && errno != ENOENT) || bpf_obj_pin(link, path) < 0)
                result = -errno;
        if (link >= 0)
                close(link);
        if (old >= 0)
                close(old);
        close(program);
        return result;
}

static int plumb(char *error)
{
        int result = accept_local(1);
        if (result < 0)
                return fail(error, result, "net.ipv4.conf.lo.accept_local=1");
        for (int i = 0; i < 2; i++) {
                int family = i ? AF_INET6 : AF_INET;
                if (i && !has_ipv6())
                        break;
                result = change_route(family, true);
                if (result < 0 && result != -EEXIST)
                        return fail(error, result, "route: local default dev lo table %d", CAPTURE_TABLE);
                result = change_rule(family, true);
                if (result < 0 && result != -EEXIST)
                        return fail(error, result, "rule: fwmark %#x lookup %d", CAPTURE_MARK_TURNED, CAPTURE_TABLE);
        }
        return 0;
}

static int keep_filter(const struct filter *f, const char *pins, int ifindex, char *error)
{
        if (filter_is_there(f, pins, ifindex))
                return 0;
        int program = open_pin(pins, f->program);
        int result = program < 0 ? program : filter_attach(f, program, ifindex);
        if (program >= 0)
                close(program);
        return result < 0 ? fail(error, result, "tc filter %s", f->program) : 0;
}

static int attach_filters(const char *pins, const char *interface, char *error)
{
        int ifindex = (int)if_nametoindex(interface), result = 0;
        if (ifindex == 0)
                return fail(error, -ENODEV, "interface %s in the pod", interface);
        for (size_t i = 0; i < sizeof(filters) / sizeof(*filters) && result == 0; i++)
                result = keep_filter(&filters[i], pins, filters[i].on_lo ? 1 : ifindex, error);
        return result;
}

/* -- maps --------------------------------------------------------------------------------------------------------- */

static int read_pod(const char *pins, struct capture_pod *pod)
{
        uint32_t zero = 0;
        int fd = open_pin(pins, "pod");
        if (fd < 0)
                return fd;
        int result = bpf_map_lookup_elem(fd, &zero, pod) < 0 ? -errno : 0;
        close(fd);
        return result;
}

static int write_pod(const char *pins, const struct capture_pod *pod)
{
        uint32_t zero = 0;
        int fd = open_pin(pins, "pod");
        if (fd < 0)
                return fd;
        int result = bpf_map_update_elem(fd, &zero, pod, BPF_ANY) < 0 ? -errno : 0;
        close(fd);
        return result;
}

static int parse_address(const char *text, size_t length, struct capture_address *out)
{
        char one[INET6_ADDRSTRLEN + 1];
        if (length >= sizeof(one))
                return -EINVAL;
        memcpy(one, text, length);
        one[length] = 0;
        memset(out->ip, 0, 10);
        out->ip[10] = out->ip[11] = 0xff;
        if (inet_pton(AF_INET, one, out->ip + 12) == 1 || inet_pton(AF_INET6, one, out->ip) == 1)
                return 0;
        return -EINVAL;
}

static int set_addresses(int map, const char *addresses, char *error)
{
        struct capture_address wanted[CAPTURE_MAX_ADDRESSES], key, next;
        int n = 0;
        for (const char *p = addresses; *p;) {
                size_t length = strcspn(p, ",");
                if (n == CAPTURE_MAX_ADDRESSES)
                        return fail(error, -E2BIG, "more than %d addresses", CAPTURE_MAX_ADDRESSES);
                if (parse_address(p, length, &wanted[n++]) < 0)
                        return fail(error, -EINVAL, "address %.*s", (int)length, p);
                p += length + (p[length] == ',');
        }
        uint8_t one = 1;
        for (int i = 0; i < n; i++)
                if (bpf_map_update_elem(map, &wanted[i], &one, BPF_ANY) < 0)
                        return fail(error, -errno, "map addresses");
        struct capture_address gone[CAPTURE_MAX_ADDRESSES];
        int ngone = 0;
        for (void *from = NULL; bpf_map_get_next_key(map, from, &next) == 0 && ngone < CAPTURE_MAX_ADDRESSES;
             from = &key) {
                bool keep = false;
                for (int i = 0; i < n; i++)
                        keep |= memcmp(&wanted[i], &next, sizeof(next)) == 0;
                if (!keep)
                        gone[ngone++] = next;
                key = next;
        }
        for (int i = 0; i < ngone; i++)
                bpf_map_delete_elem(map, &gone[i]);
        return 0;
}

/* -- loading ------------------------------------------------------------------------------------------------------ */

static bool all_there(const char *pins, const char *const *names, size_t n)
{
        char path[PATH_MAX];
        for (size_t i = 0; i < n; i++) {
                path_of(path, pins, names[i]);
                if (access(path, F_OK) < 0)
                        return false;
        }
        return true;
}

static bool all_pinned(const char *pins)
{
        return all_there(pins, map_names, sizeof(map_names) / sizeof(*map_names)) &&
               all_there(pins, program_names, sizeof(program_names) / sizeof(*program_names));
}

static void unpin(const char *pins, const char *const *names, size_t n)
{
        char path[PATH_MAX];
        for (size_t i = 0; i < n; i++) {
                path_of(path, pins, names[i]);
                unlink(path);
        }
}

static int pin_programs(struct bpf_object *object, const char *pins)
{
        struct bpf_program *program;
        char path[PATH_MAX];
        bpf_object__for_each_program(program, object)
        {
                path_of(path, pins, bpf_program__name(program));
                unlink(path);
                int result = bpf_program__pin(program, path);
                if (result < 0)
                        return result;
        }
        return 0;
}

/* The directory of the node, which is beside the pods'. */
static void node_of(char out[NODE_PATH], const char *pins)
{
        const char *last = strrchr(pins, '/');
        snprintf(out, NODE_PATH, "%.*s/" NODE, last ? (int)(last - pins) : 0, pins);
}

static int pin_maps(struct bpf_object *object, const char *pins)
{
        struct bpf_map *map;
        char path[PATH_MAX], node[NODE_PATH];
        node_of(node, pins);
        bpf_object__for_each_map(map, object)
        {
                if (bpf_map__is_internal(map)) /* constants, and what may be forgotten */
                        continue;
                const char *name = bpf_map__name(map);
                bool shared = false;
                for (size_t i = 0; i < sizeof(shared_names) / sizeof(*shared_names); i++)
                        shared |= strcmp(name, shared_names[i]) == 0;
                path_of(path, shared ? node : pins, name);
                int result = bpf_map__set_pin_path(map, path); /* load takes the map that is there, or pins a new one */
                if (result < 0)
                        return result;
        }
        return 0;
}

static int compare(const void *a, const void *b)
{
        int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
        return (x > y) - (x < y);
}

static int64_t clock_ns(void)
{
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec * 1000000000ll + t.tv_nsec;
}

/* What it costs to arm a timer, in ns; in a virtual machine that may be a way out of it. The median of many: one that
 * is not the next to be due costs nothing. 0: unknown. */
static int64_t timer_ns(void)
{
        const struct itimerspec soon = {.it_value = {.tv_nsec = 10000}}, never = {0};
        int64_t took[99];
        int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
        if (fd < 0)
                return 0;
        for (size_t i = 0; i < sizeof(took) / sizeof(*took); i++) {
                int64_t begun = clock_ns();
                timerfd_settime(fd, 0, &soon, NULL);
                took[i] = clock_ns() - begun;
                timerfd_settime(fd, 0, &never, NULL);
        }
        close(fd);
        qsort(took, sizeof(took) / sizeof(*took), sizeof(*took), compare);
        return took[sizeof(took) / sizeof(*took) / 2];
}

static uint32_t linger_ns;

/* Once, for all pods of a node have the same timers. */
static void choose_linger(void)
{
        linger_ns = timer_ns() > CAPTURE_LINGER_NS ? CAPTURE_LINGER_NS : 0;
}

static int load(const char *pins, char *error)
{
        static pthread_once_t once = PTHREAD_ONCE_INIT;
        struct capture_bpf *capture = capture_bpf__open();
        int result = capture ? 0 : -errno;
        if (result < 0) {
                fail(error, result, "open the BPF objects");
                return result;
        }
        pthread_once(&once, choose_linger);
        capture->rodata->linger_ns = linger_ns;
        if ((result = pin_maps(capture->obj, pins)) < 0 || (result = capture_bpf__load(capture)) < 0)
                fail(error, result, "load the capture programs (`sidestep check` says what the kernel lacks)");
        else if ((result = pin_programs(capture->obj, pins)) < 0)
                fail(error, result, "pin the programs in %s", pins);
        capture_bpf__destroy(capture);
        return result;
}

/* The iterators, if they are not there yet. They share the maps of the pins. */
static int load_survey(const char *pins)
{
        if (all_there(pins, survey_names, sizeof(survey_names) / sizeof(*survey_names)))
                return 0;
        struct survey_bpf *survey = survey_bpf__open();
        int result = survey ? 0 : -errno;
        if (result < 0)
                return result;
        if ((result = pin_maps(survey->obj, pins)) == 0 && (result = survey_bpf__load(survey)) == 0)
                result = pin_programs(survey->obj, pins);
        survey_bpf__destroy(survey);
        return result;
}

/* Which instance of the programs it is (maps.h, struct capture_door_of), or -errno. */
static int64_t instance_of(const char *pins)
{
        struct bpf_map_info info = {0};
        uint32_t length = sizeof(info);
        int fates = open_pin(pins, "fates");
        if (fates < 0)
                return fates;
        int64_t result = bpf_obj_get_info_by_fd(fates, &info, &length) < 0 ? -errno : (int64_t)info.id;
        close(fates);
        return result;
}

/* Is it a door of this instance? Of 0: what an agent wrote that knew of none. The next pod's namespace may have the
 * number of one that is gone. */
static bool is_of(const struct capture_door_of *one, const struct capture_door_of *pod)
{
        return one->netns_ino == pod->netns_ino && (one->instance == pod->instance || one->instance == 0);
}

/* Takes the addresses of a pod out: all (addresses -1), or those that it does not have any more. pod: of it namespace
 * and instance are known, and is set the interface of its door, where one was found. */
static int forget_addresses(int doors, int addresses, struct capture_door_of *pod)
{
        struct capture_address key, next, gone[CAPTURE_MAX_ADDRESSES];
        struct capture_door_of one;
        uint8_t there;
        int n;
        do {
                n = 0;
                for (void *from = NULL; bpf_map_get_next_key(doors, from, &next) == 0 && n < CAPTURE_MAX_ADDRESSES;
                     from = &key) {
                        if (bpf_map_lookup_elem(doors, &next, &one) == 0 && is_of(&one, pod)) {
                                pod->ifindex = one.ifindex;
                                if (addresses < 0 || bpf_map_lookup_elem(addresses, &next, &there) < 0)
                                        gone[n++] = next;
                        }
                        key = next;
                }
                for (int i = 0; i < n; i++)
                        if (bpf_map_delete_elem(doors, &gone[i]) < 0 && errno != ENOENT)
                                return -errno;
        } while (n == CAPTURE_MAX_ADDRESSES);
        return 0;
}

static int open_doors(const char *pins)
{
        char node[NODE_PATH];
        node_of(node, pins);
        return open_pin(node, "doors");
}

/* Namespace and instance of a pod that was attached. */
static bool read_own(const char *pins, struct capture_door_of *out)
{
        struct capture_pod pod = {0};
        int64_t instance = instance_of(pins);
        if (instance < 0 || read_pod(pins, &pod) < 0 || !pod.netns_ino)
                return false;
        *out = (struct capture_door_of){.netns_ino = (uint32_t)pod.netns_ino, .instance = (uint32_t)instance};
        return true;
}

int capture_prepare(const char *pins, const char *addresses, char *error)
{
        libbpf_set_print(silent);
        char node[NODE_PATH];
        node_of(node, pins);
        int result = make_directories(node);
        if (result == 0)
                result = make_directories(pins);
        if (result < 0)
                return fail(error, result, "directory %s", pins);
        if (!all_pinned(pins)) {
                unpin(pins, survey_names, sizeof(survey_names) / sizeof(*survey_names)); /* of maps that may be gone */
                if ((result = load(pins, error)) < 0)
                        return result;
        }
        int map = open_pin(pins, "addresses");
        if (map < 0)
                return fail(error, map, "map addresses in %s", pins);
        result = set_addresses(map, addresses, error);
        int doors = open_doors(pins);
        struct capture_door_of own;
        if (doors >= 0 && read_own(pins, &own))
                forget_addresses(doors, map, &own);
        if (doors >= 0)
                close(doors);
        close(map);
        return result;
}

int capture_maps(const char *pins, int *listeners, int *engine_sk, char *error)
{
        int first = open_pin(pins, "listeners"), second = open_pin(pins, "engine_sk");
        if (first < 0 || second < 0) {
                int result = first < 0 ? first : second;
                if (first >= 0)
                        close(first);
                if (second >= 0)
                        close(second);
                return fail(error, result, "maps in %s", pins);
        }
        *listeners = first;
        *engine_sk = second;
        return 0;
}

/* What an iterator saw: room for it grows as needed. */
struct survey {
        struct capture_seen *seen;
        size_t n, room;
};

/* -- vouched flows --------------------------------------------------------------------------------------------------
 */

/* The node's iterator, if it is not there yet. */
static int load_flows(const char *node)
{
        if (all_there(node, vouch_names, sizeof(vouch_names) / sizeof(*vouch_names)))
                return 0;
        struct flows_bpf *flows = flows_bpf__open();
        int result = flows ? flows_bpf__load(flows) : -errno;
        if (result == 0)
                result = pin_programs(flows->obj, node);
        flows_bpf__destroy(flows);
        return result;
}

int capture_vouch(const char *pins, int fds[VOUCH_FDS], char *error)
{
        static const char *const names[VOUCH_FDS] = {"verdicts", "fates", "slots", "flows", "ended"};
        char node[NODE_PATH];
        libbpf_set_print(silent);
        node_of(node, pins);
        int result = load_flows(node);
        if (result < 0)
                return fail(error, result, "load the iterator of vouched flows (BTF of the kernel)");
        for (int i = 0; i < VOUCH_FDS; i++) {
                fds[i] = open_pin(i < 2 ? pins : node, names[i]);
                if (fds[i] < 0) {
                        result = fail(error, fds[i], "%s of %s", names[i], pins);
                        while (--i >= 0)
                                close(fds[i]);
                        return result;
                }
        }
        return 0;
}

static uint64_t now_ns(void)
{
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static int by_ends(const void *a, const void *b)
{
        return memcmp(a, b, offsetof(struct capture_seen, kind));
}

/* How many entries of a map of SYNs are older than that moment; takes them out where it is told to, but for those that
 * have a socket (sorted by ends). */
static int old_entries(const char *pins, const char *name, uint64_t before_ns, bool take, const struct survey *sockets)
{
        struct capture_tuple key, next;
        struct capture_probe value;
        int map = open_pin(pins, name), n = 0;
        if (map < 0)
                return map;
        int most = VOUCH_MAX_NOTES + VOUCH_MAX_PENDING; /* who is asked while others change it may answer twice */
        for (bool more = bpf_map_get_next_key(map, NULL, &next) == 0; more && most > 0; most--) {
                struct capture_seen ends = {0};
                key = next;
                more = bpf_map_get_next_key(map, &key, &next) == 0;
                if (bpf_map_lookup_elem(map, &key, &value) < 0 || value.when > before_ns)
                        continue;
                memcpy(&ends, &key, sizeof(key)); /* both begin with addresses and ports */
                n++;
                if (take &&
                    !(sockets && sockets->n && bsearch(&ends, sockets->seen, sockets->n, sizeof(ends), by_ends)))
                        bpf_map_delete_elem(map, &key);
        }
        close(map);
        return n;
}
_Static_assert(offsetof(struct capture_seen, kind) == sizeof(struct capture_tuple),
               "a tuple is how a capture_seen begins");

int capture_sweep_notes(const char *node, char *error)
{
        int n = old_entries(node, "vouched", now_ns() - VOUCH_STALE_NS, true, NULL);
        return n < 0 && n != -ENOENT ? fail(error, n, "map vouched in %s", node) : 0;
}

static int run_survey(const char *pins, const char *program, struct survey *s);

int capture_sweep(const char *pins, int netns, char *error)
{
        struct survey s = {0};
        uint64_t before_ns = now_ns() - KUBELET_NOTE_NS; /* by then it is a socket, unless the listener sends cookies */
        int back, result = old_entries(pins, "pending", before_ns, false, NULL);
        bool crowded = result > VOUCH_MAX_PENDING / 4; /* by connections that were reset at once: they make room */
        libbpf_set_print(silent);
        if (result == -ENOENT || result == 0)
                return 0;
        if (result > 0 && netns >= 0) {
                if ((result = enter(netns, &back)) < 0)
                        return fail(error, result, "enter the network namespace");
                result = run_survey(pins, "adopt", &s);
                leave(back);
                if (s.n)
                        qsort(s.seen, s.n, sizeof(*s.seen), by_ends);
        }
        if (result >= 0)
                result = old_entries(pins, "pending", crowded ? before_ns : now_ns() - VOUCH_PENDING_NS, true, &s);
        free(s.seen);
        return result < 0 ? fail(error, result, "sweep the pending SYNs in %s", pins) : 0;
}

/* -- the survey --------------------------------------------------------------------------------------------------- */

/* Runs an iterator inside the namespace. The caller frees s->seen, also after an error. */
static int run_survey(const char *pins, const char *program, struct survey *s)
{
        int result = load_survey(pins), fd = -1, link = -1, iterator = -1;
        s->n = 0;
        if (result < 0)
                return result;
        fd = open_pin(pins, program);
        if (fd < 0)
                return fd;
        link = bpf_link_create(fd, 0, BPF_TRACE_ITER, NULL);
        if (link < 0) {
                result = -errno;
                goto out;
        }
        iterator = bpf_iter_create(link); /* the namespace is the one of the thread that opens it */
        if (iterator < 0) {
                result = -errno;
                goto out;
        }
        size_t bytes = 0;
        for (;;) {
                if (s->room * sizeof(*s->seen) - bytes < 4096) {
                        size_t room = s->room ? 2 * s->room : 1024;
                        struct capture_seen *more = realloc(s->seen, room * sizeof(*more));
                        if (!more) {
                                result = -ENOMEM;
                                break;
                        }
                        s->seen = more;
                        s->room = room;
                }
                ssize_t n = read(iterator, (char *)s->seen + bytes, s->room * sizeof(*s->seen) - bytes);
                if (n < 0 && (errno == EAGAIN || errno == EINTR))
                        continue;
                if (n <= 0) {
                        result = n < 0 ? -errno : 0;
                        break;
                }
                bytes += (size_t)n;
        }
        s->n = bytes / sizeof(*s->seen);
out:
        if (iterator >= 0)
                close(iterator);
        if (link >= 0)
                close(link);
        close(fd);
        return result;
}

static uint64_t now_us(void)
{
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* From when on every new connection is told by what is attached now: what the kernel began before is done. */
static uint64_t settled_us(void)
{
        /* A GLOBAL membarrier is an RCU grace period; kernels with nohz_full refuse it. */
        if (syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) < 0)
                usleep(100000);
        return now_us();
}

/* Notes all that is open, and looks for WAIT_ROUNDS * 10 ms whether half-open connections from before are left. 0:
 * none, and every connection was noted after that; -EAGAIN. */
#define WAIT_ROUNDS 50

static int note_all(const char *pins, uint64_t since_us, char *error)
{
        struct survey s = {0};
        int result, left = 0;
        for (int round = 0;; round++) {
                if ((result = run_survey(pins, "note", &s)) < 0)
                        break;
                left = 0;
                for (size_t i = 0; i < s.n; i++)
                        left += s.seen[i].kind == KIND_REQUEST && s.seen[i].synack_us <= since_us;
                if (left == 0)
                        break;
                if (round == WAIT_ROUNDS) {
                        result = -EAGAIN;
                        break;
                }
                usleep(10000);
        }
        free(s.seen);
        if (result == -EAGAIN)
                fail(error, result, "%d half-open connections from before", left);
        else if (result < 0)
                fail(error, result, "note the open connections");
        return result;
}

/* How many of a kind there are whose other end is in this namespace too, or is not. Sorts. */
static int count_kind(struct survey *s, int kind, bool inside)
{
        int n = 0;
        if (s->n)
                qsort(s->seen, s->n, sizeof(*s->seen), by_ends);
        for (size_t i = 0; i < s->n; i++) {
                const struct capture_seen *one = &s->seen[i];
                struct capture_seen other = {.local_port = one->remote_port, .remote_port = one->local_port};
                memcpy(other.local, one->remote, 16);
                memcpy(other.remote, one->local, 16);
                n += one->kind == kind && inside == (bsearch(&other, s->seen, s->n, sizeof(other), by_ends) != NULL);
        }
        return n;
}

/* -- doors -------------------------------------------------------------------------------------------------------- */

/* One end of a link. peer_nsid < 0: the other end is in the same namespace, or nobody knows. */
struct end {
        int ifindex, peer, peer_nsid;
        char kind[16];
};

static void read_info(struct rtattr *info, struct end *out)
{
        int left = (int)RTA_PAYLOAD(info);
        for (struct rtattr *a = RTA_DATA(info); RTA_OK(a, left); a = RTA_NEXT(a, left))
                if (a->rta_type == IFLA_INFO_KIND)
                        snprintf(out->kind, sizeof(out->kind), "%.*s", (int)RTA_PAYLOAD(a), (char *)RTA_DATA(a));
}

/* Of the namespace that the thread is in. */
static int read_end(int ifindex, struct end *out)
{
        struct request r = {.header = {.nlmsg_len = NLMSG_LENGTH(sizeof(r.link)),
                                       .nlmsg_type = RTM_GETLINK,
                                       .nlmsg_flags = NLM_F_REQUEST},
                            .link = {.ifi_index = ifindex}};
        struct nlmsghdr answer[ANSWER / sizeof(struct nlmsghdr)];
        ssize_t n = ask(&r, answer);
        if (n < 0)
                return (int)n;
        *out = (struct end){.ifindex = ifindex, .peer_nsid = -1};
        int left = (int)(answer->nlmsg_len - NLMSG_LENGTH(sizeof(struct ifinfomsg)));
        for (struct rtattr *a = IFLA_RTA(NLMSG_DATA(answer)); RTA_OK(a, left); a = RTA_NEXT(a, left)) {
                if (a->rta_type == IFLA_LINK)
                        memcpy(&out->peer, RTA_DATA(a), sizeof(int));
                else if (a->rta_type == IFLA_LINK_NETNSID)
                        memcpy(&out->peer_nsid, RTA_DATA(a), sizeof(int));
                else if (a->rta_type == IFLA_LINKINFO)
                        read_info(a, out);
        }
        return 0;
}

/* How this namespace numbers that one: >= 0, or -errno. */
static int nsid_of(int netns)
{
        struct request r = {.header = {.nlmsg_len = NLMSG_LENGTH(sizeof(r.nsid)),
                                       .nlmsg_type = RTM_GETNSID,
                                       .nlmsg_flags = NLM_F_REQUEST},
                            .nsid = {.rtgen_family = AF_UNSPEC}};
        struct nlmsghdr answer[ANSWER / sizeof(struct nlmsghdr)];
        r.header.nlmsg_len = NLMSG_ALIGN(r.header.nlmsg_len);
        attribute(&r, NETNSA_FD, &netns, sizeof(netns));
        ssize_t n = ask(&r, answer);
        if (n < 0)
                return (int)n;
        size_t header = NLMSG_ALIGN(sizeof(struct rtgenmsg));
        int left = (int)(answer->nlmsg_len - NLMSG_HDRLEN - header), id = -ENOENT;
        for (struct rtattr *a = (struct rtattr *)((char *)NLMSG_DATA(answer) + header); RTA_OK(a, left);
             a = RTA_NEXT(a, left))
                if (a->rta_type == NETNSA_NSID)
                        memcpy(&id, RTA_DATA(a), sizeof(id));
        return id < 0 ? -ENOENT : id;
}

/* Is the filter at our place a door? */
static bool is_door(int ifindex)
{
        LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex, .attach_point = BPF_TC_INGRESS);
        LIBBPF_OPTS(bpf_tc_opts, opts, .handle = CAPTURE_HANDLE, .priority = CAPTURE_PREF);
        struct bpf_prog_info info = {0};
        uint32_t length = sizeof(info);
        int fd = bpf_tc_query(&hook, &opts) == 0 ? bpf_prog_get_fd_by_id(opts.prog_id) : -1;
        bool yes = fd >= 0 && bpf_obj_get_info_by_fd(fd, &info, &length) == 0 && strcmp(info.name, door.program) == 0;
        if (fd >= 0)
                close(fd);
        return yes;
}

/* Does somebody else look at what comes in there? 1, 0 or -errno. */
static int is_looked_at(int ifindex)
{
        struct request r = {.header = {.nlmsg_len = NLMSG_LENGTH(sizeof(r.filter)),
                                       .nlmsg_type = RTM_GETTFILTER,
                                       .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP},
                            .filter = {.tcm_ifindex = ifindex, .tcm_parent = TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)}};
        struct nlmsghdr answer[ANSWER / sizeof(struct nlmsghdr)];
        uint32_t programs = 0;
        /* TCX comes before clsact. libbpf 1.1 has no name for it; a kernel without it says EINVAL. */
        if (bpf_prog_query(ifindex, (enum bpf_attach_type)46 /* BPF_TCX_INGRESS */, 0, NULL, NULL, &programs) == 0 &&
            programs)
                return 1;
        ssize_t n = ask(&r, answer);
        if (n < 0)
                return n == -EINVAL || n == -ENOENT ? 0 : (int)n; /* no qdisc */
        /* More than one piece is more than our one filter. Handle 0 names a preference, not a filter. */
        for (struct nlmsghdr *h = answer; NLMSG_OK(h, (size_t)n); h = NLMSG_NEXT(h, n)) {
                struct tcmsg *found = NLMSG_DATA(h);
                if (h->nlmsg_type != RTM_NEWTFILTER || found->tcm_handle == 0)
                        continue;
                if (TC_H_MAJ(found->tcm_info) >> 16 != CAPTURE_PREF || found->tcm_handle != CAPTURE_HANDLE ||
                    !is_door(ifindex))
                        return 1;
        }
        return 0;
}

/* Where the pod's link ends. -EOPNOTSUPP: nowhere that a door could be; error says why. */
static int find_end(int host, int netns, const char *interface, struct capture_door_of *out, char *error)
{
        struct end inner, outer;
        int back, result, nsid = -1;
        uint64_t ino = 0;
        if ((result = inode_of(netns, &ino)) < 0 || (result = enter(netns, &back)) < 0)
                return fail(error, result, "enter the network namespace");
        result = read_end((int)if_nametoindex(interface), &inner);
        leave(back);
        if (result < 0)
                return fail(error, result, "interface %s in the pod", interface);
        if (strcmp(inner.kind, "veth"))
                return fail(error, -EOPNOTSUPP, "%s is no veth", interface);
        if ((result = enter(host, &back)) < 0)
                return fail(error, result, "enter the host's network namespace");
        result = read_end(inner.peer, &outer);
        nsid = nsid_of(netns);
        leave(back);
        if (result < 0 || nsid < 0 || strcmp(outer.kind, "veth") || outer.peer != inner.ifindex ||
            outer.peer_nsid != nsid)
                return fail(error, -EOPNOTSUPP, "the other end of %s is not on this host", interface);
        out->ifindex = (uint32_t)outer.ifindex;
        out->nsid = (uint32_t)nsid;
        out->netns_ino = (uint32_t)ino;
        return 0;
}

/* What `doors` says of the pod. 1: the same for each of its addresses, 0: it does not, or nothing; -errno. */
static int read_door(int doors, int addresses, struct capture_door_of *out)
{
        struct capture_address key, next;
        struct capture_door_of one;
        int n = 0;
        for (void *from = NULL; bpf_map_get_next_key(addresses, from, &next) == 0; from = &key, n++) {
                if (bpf_map_lookup_elem(doors, &next, &one) < 0)
                        return errno == ENOENT ? 0 : -errno;
                if (n && memcmp(&one, out, sizeof(one)))
                        return 0;
                *out = one;
                key = next;
        }
        return n > 0;
}

/* Is the door there as `doors` says, and nobody else? 1, 0 or -errno. */
static int has_door(const char *pins, int host)
{
        struct capture_door_of is = {0};
        int doors = open_doors(pins), addresses = open_pin(pins, "addresses"), back;
        int64_t instance = instance_of(pins);
        int result = doors < 0 ? doors : addresses < 0 ? addresses : read_door(doors, addresses, &is);
        if (result > 0 && is.instance != instance)
                result = 0;
        if (result > 0 && (result = enter(host, &back)) == 0) {
                result = filter_is_there(&door, pins, (int)is.ifindex) && is_looked_at((int)is.ifindex) == 0;
                leave(back);
        }
        if (doors >= 0)
                close(doors);
        if (addresses >= 0)
                close(addresses);
        return result;
}

/* First the program, then the addresses. -EOPNOTSUPP: there can be none. */
static int open_door(const char *pins, int host, int netns, const char *interface, char *error)
{
        struct capture_door_of to = {0};
        struct capture_address key, next;
        int64_t instance = instance_of(pins);
        int back, result = find_end(host, netns, interface, &to, error);
        if (result < 0)
                return result;
        if (instance < 0)
                return fail(error, (int)instance, "map fates of %s", pins);
        to.instance = (uint32_t)instance;
        if ((result = enter(host, &back)) < 0)
                return fail(error, result, "enter the host's network namespace");
        int looked = is_looked_at((int)to.ifindex);
        if (looked < 0)
                result = fail(error, looked, "filters at the other end of %s", interface);
        else if (looked)
                result = fail(error, -EOPNOTSUPP, "somebody else's programs are at the other end of %s", interface);
        else
                result = keep_filter(&door, pins, (int)to.ifindex, error);
        leave(back);
        if (result < 0)
                return result;
        int doors = open_doors(pins), addresses = open_pin(pins, "addresses");
        result = doors < 0 ? doors : addresses < 0 ? addresses : 0;
        for (void *from = NULL; result == 0 && bpf_map_get_next_key(addresses, from, &next) == 0; from = &key) {
                if (bpf_map_update_elem(doors, &next, &to, BPF_ANY) < 0)
                        result = -errno;
                key = next;
        }
        if (result == 0)
                result = forget_addresses(doors, addresses, &to);
        if (doors >= 0)
                close(doors);
        if (addresses >= 0)
                close(addresses);
        return result < 0 ? fail(error, result, "map doors of %s", pins) : 0;
}

/* First the addresses, then the program, if it is there. host or netns -1: only the addresses, the link is gone. */
static int close_door(const char *pins, int host, int netns, const char *interface, char *error)
{
        struct capture_door_of end = {0};
        int doors = open_doors(pins), back, result;
        if (doors < 0)
                return doors == -ENOENT ? 0 : fail(error, doors, "map doors of %s", pins);
        result = read_own(pins, &end) ? forget_addresses(doors, -1, &end) : 0;
        close(doors);
        if (result < 0)
                return fail(error, result, "map doors of %s", pins);
        char unused[CAPTURE_ERROR_LEN];
        if (host < 0 || netns < 0 || (end.ifindex == 0 && find_end(host, netns, interface, &end, unused) < 0))
                return 0;
        if ((result = enter(host, &back)) < 0)
                return fail(error, result, "enter the host's network namespace");
        result = filter_is_there(&door, pins, (int)end.ifindex) ? filter_detach(&door, (int)end.ifindex) : 0;
        leave(back);
        return result < 0 ? fail(error, result, "take out tc filter door") : 0;
}

int capture_door(const char *pins, int host, int netns, const char *interface, char *error)
{
        char unused[CAPTURE_ERROR_LEN];
        libbpf_set_print(silent);
        if (has_door(pins, host) == 1)
                return 0;
        int result = open_door(pins, host, netns, interface, error);
        if (result == -EOPNOTSUPP) /* no more */
                close_door(pins, host, netns, interface, unused);
        return result < 0 ? result : 1;
}

static int change_mode(const char *pins, int netns, const char *interface, int mode, char *error)
{
        struct capture_pod pod = {0};
        uint64_t ino = 0;
        int result = read_pod(pins, &pod);
        if (result < 0)
                return fail(error, result, "map pod in %s", pins);
        if ((result = inode_of(netns, &ino)) < 0)
                return fail(error, result, "network namespace");
        bool native = pod.mode == MODE_OFF || pod.mode == MODE_DRAINING || pod.mode == MODE_NOTING;
        bool notes = mode == MODE_LENIENT && native;
        if (mode == MODE_DRAINING && !native) {
                struct survey s = {0};
                result = run_survey(pins, "claim", &s);
                free(s.seen);
                if (result < 0)
                        return fail(error, result, "mark the engine's connections");
        }
        if (pod.mode != MODE_NOTING)
                pod.since_us = 0;
        pod.netns_ino = ino;
        pod.mode = notes ? MODE_NOTING : (uint32_t)mode;
        if ((result = write_pod(pins, &pod)) < 0)
                return fail(error, result, "map pod in %s", pins);
        if ((result = plumb(error)) < 0)
                return result;
        if (!notes) { /* nothing may pass between the two: inbound first, a pod that is new has no connections yet */
                if ((result = link_attach(pins, netns, ino)) < 0)
                        return fail(error, result, "sk_lookup");
                return attach_filters(pins, interface, error);
        }
        if ((result = attach_filters(pins, interface, error)) < 0)
                return result;
        if ((result = link_attach(pins, netns, ino)) < 0)
                return fail(error, result, "sk_lookup");
        if (!pod.since_us) {
                pod.since_us = settled_us();
                if ((result = write_pod(pins, &pod)) < 0)
                        return fail(error, result, "map pod in %s", pins);
        }
        if ((result = note_all(pins, pod.since_us, error)) < 0)
                return result;
        pod.mode = MODE_LENIENT;
        result = write_pod(pins, &pod);
        return result < 0 ? fail(error, result, "map pod in %s", pins) : 0;
}

int capture_set_mode(const char *pins, int netns, const char *interface, int mode, char *error)
{
        int back, result;
        libbpf_set_print(silent);
        if (mode != MODE_STRICT && mode != MODE_LENIENT && mode != MODE_DRAINING)
                return fail(error, -EINVAL, "mode %d", mode);
        if ((result = enter(netns, &back)) < 0)
                return fail(error, result, "enter the network namespace");
        result = change_mode(pins, netns, interface, mode, error);
        leave(back);
        return result;
}

int capture_read(const char *pins, uint32_t *mode, uint64_t *netns_ino, char *error)
{
        struct capture_pod pod = {0};
        int result = read_pod(pins, &pod);
        if (result < 0)
                return fail(error, result, "map pod in %s", pins);
        *mode = pod.mode;
        *netns_ino = pod.netns_ino;
        return 0;
}

static int missing(const char *pins, uint64_t ino, const char *interface)
{
        int found = all_pinned(pins) ? 0 : CAPTURE_NO_PINS;
        int ifindex = (int)if_nametoindex(interface);
        for (size_t i = 0; i < sizeof(filters) / sizeof(*filters); i++)
                if (!filter_is_there(&filters[i], pins, filters[i].on_lo ? 1 : ifindex))
                        found |= filters[i].missing;
        if (!link_is_there(pins, ino))
                found |= CAPTURE_NO_STEER;
        if (accept_local(-1) != 1)
                found |= CAPTURE_NO_ACCEPT_LOCAL;
        if (is_turned_home(AF_INET) != 1)
                found |= CAPTURE_NO_ROUTE4;
        if (has_ipv6() && is_turned_home(AF_INET6) != 1)
                found |= CAPTURE_NO_ROUTE6;
        return found;
}

int capture_verify(const char *pins, int netns, const char *interface, char *error)
{
        int back, result;
        uint64_t ino = 0;
        libbpf_set_print(silent);
        if ((result = inode_of(netns, &ino)) < 0 || (result = enter(netns, &back)) < 0)
                return fail(error, result, "enter the network namespace");
        result = missing(pins, ino, interface);
        leave(back);
        return result;
}

int capture_listeners(const char *pins, char *error)
{
        int fd = open_pin(pins, "listeners"), found = 0;
        if (fd < 0)
                return fail(error, fd, "map listeners in %s", pins);
        for (uint32_t slot = 0; slot < SLOT_COUNT; slot++) {
                uint64_t cookie;
                if (bpf_map_lookup_elem(fd, &slot, &cookie) == 0)
                        found |= 1 << slot;
        }
        close(fd);
        return found;
}

static int count_in(const char *pins, int netns, int kind, bool inside, char *error)
{
        struct survey s = {0};
        int back, result;
        libbpf_set_print(silent);
        if ((result = enter(netns, &back)) < 0)
                return fail(error, result, "enter the network namespace");
        result = run_survey(pins, "survey", &s);
        leave(back);
        if (result == 0)
                result = count_kind(&s, kind, inside);
        free(s.seen);
        return result < 0 ? fail(error, result, "look at the sockets of the namespace") : result;
}

int capture_old(const char *pins, int netns, char *error)
{
        return count_in(pins, netns, KIND_OLD, false, error);
}

int capture_held(const char *pins, int netns, char *error)
{
        return count_in(pins, netns, KIND_ENGINE, true, error);
}

static const char *const counter_names[] = {
        [COUNT_TURNED] = "turned",
        [COUNT_ENGINE] = "engine",
        [COUNT_OLD] = "old",
        [COUNT_CONTROL] = "control",
        [COUNT_NATIVE] = "native",
        [COUNT_LOCAL] = "not_tcp",
        [COUNT_DROP_FRAGMENT] = "drop_fragment",
        [COUNT_DROP_EXTENSION] = "drop_extension",
        [COUNT_DROP_VLAN] = "drop_vlan",
        [COUNT_DROP_SHORT] = "drop_short",
        [COUNT_TAGGED] = "tagged",
        [COUNT_TAG_FULL] = "tag_full",
        [COUNT_IN_OUTBOUND] = "to_outbound",
        [COUNT_IN_INBOUND] = "to_inbound",
        [COUNT_IN_HBONE] = "to_hbone",
        [COUNT_IN_OWN] = "to_application",
        [COUNT_IN_SELF] = "self",
        [COUNT_IN_NATIVE] = "in_native",
        [COUNT_IN_NO_LISTENER] = "no_listener",
        [COUNT_IN_PROBE] = "to_application_probe",
        [COUNT_PROBE] = "probe",
        [COUNT_PROBE_FULL] = "probe_full",
        [COUNT_VOUCHED] = "vouched",
        [COUNT_VOUCH_FULL] = "vouch_full",
        [COUNT_VOUCH_CUT] = "vouch_cut",
        [COUNT_IN_VOUCHED] = "to_application_vouched",
        [COUNT_VOUCH_UNTOLD] = "vouched_untold",
        [COUNT_IN_LATE] = "vouched_late",
        [COUNT_OUTSIDE] = "outside_vouched",
        [COUNT_DOOR] = "by_door",
        [COUNT_IN_ASTRAY] = "vouched_astray",
};

const char *capture_counter_name(int counter)
{
        return counter >= 0 && counter < COUNT_MAX ? counter_names[counter] : NULL;
}

/* Sums of a per-CPU array's first n entries. */
static int read_counters(const char *pins, const char *name, uint64_t *out, int n, char *error)
{
        int cpus = libbpf_num_possible_cpus(), fd = open_pin(pins, name), result = 0;
        if (fd < 0)
                return fail(error, fd, "map %s in %s", name, pins);
        uint64_t *values = calloc((size_t)(cpus > 0 ? cpus : 1), sizeof(*values));
        if (!values || cpus <= 0) {
                result = -ENOMEM;
        } else {
                for (uint32_t i = 0; i < (uint32_t)n && result == 0; i++) {
                        out[i] = 0;
                        if (bpf_map_lookup_elem(fd, &i, values) < 0)
                                result = -errno;
                        for (int cpu = 0; cpu < cpus; cpu++)
                                out[i] += values[cpu];
                }
        }
        free(values);
        close(fd);
        return result < 0 ? fail(error, result, "map %s in %s", name, pins) : n;
}

int capture_counters(const char *pins, uint64_t *out, int n, char *error)
{
        return read_counters(pins, "counters", out, n < COUNT_MAX ? n : COUNT_MAX, error);
}

static int unplumb(const char *pins, const char *interface, char *error)
{
        struct capture_pod pod = {0};
        if (read_pod(pins, &pod) == 0) { /* all at once; the rest is tidying up */
                pod.mode = MODE_OFF;
                write_pod(pins, &pod);
        }
        int ifindex = (int)if_nametoindex(interface), worst = 0;
        for (int i = (int)(sizeof(filters) / sizeof(*filters)) - 1; i >= 0; i--) {
                int on = filters[i].on_lo ? 1 : ifindex;
                int result = on ? filter_detach(&filters[i], on) : 0;
                if (result < 0)
                        worst = fail(error, result, "take out tc filter %s", filters[i].program);
        }
        int link = open_pin(pins, "link");
        if (link >= 0) {
                bpf_link_detach(link);
                close(link);
        }
        for (int i = 0; i < 2; i++) {
                change_rule(i ? AF_INET6 : AF_INET, false);
                change_route(i ? AF_INET6 : AF_INET, false);
        }
        accept_local(0);
        return worst;
}

/* -- the kubelet exemption ---------------------------------------------------------------------------------------- */

/* At once: the last reference to a link is dropped some time after its pin. */
static void unlink_link(const char *node)
{
        char path[PATH_MAX];
        int link = open_pin(node, "link");
        if (link >= 0) {
                bpf_link_detach(link);
                close(link);
        }
        path_of(path, node, "link");
        unlink(path);
}

/* Takes the node's directory away where the pod was the last one. */
static void leave_node(const char *pins)
{
        char node[NODE_PATH], parent[NODE_PATH];
        node_of(node, pins);
        snprintf(parent, sizeof(parent), "%.*s", (int)(strlen(node) - sizeof(NODE)), node);
        DIR *directory = opendir(parent);
        if (!directory)
                return;
        bool others = false;
        for (struct dirent *entry; (entry = readdir(directory));)
                others |= strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") && strcmp(entry->d_name, NODE);
        closedir(directory);
        if (!others) {
                unlink_link(node);
                unpin(node, node_names, sizeof(node_names) / sizeof(*node_names));
                unpin(node, vouch_names, sizeof(vouch_names) / sizeof(*vouch_names));
                rmdir(node);
        }
}

/* Is the pinned program attached to the directory of that id? */
static bool watches(const char *node, uint64_t id)
{
        int link = open_pin(node, "link"), program = open_pin(node, "probe_syn");
        struct bpf_link_info info = {0};
        uint32_t length = sizeof(info);
        bool found = link >= 0 && program >= 0 &&
                     all_there(node, node_names, sizeof(node_names) / sizeof(*node_names)) &&
                     bpf_obj_get_info_by_fd(link, &info, &length) == 0 && info.cgroup.cgroup_id == id &&
                     info.prog_id == program_id(program);
        if (link >= 0)
                close(link);
        if (program >= 0)
                close(program);
        return found;
}

static int watch(const char *node, int cgroup, uint64_t id, char *error)
{
        char path[PATH_MAX];
        struct kubelet_bpf *kubelet = kubelet_bpf__open();
        int result = kubelet ? 0 : -errno;
        if (result < 0)
                return fail(error, result, "open the BPF object of the kubelet's cgroup");
        kubelet->rodata->kubelet_cgroup = id;
        int link = -1;
        if ((result = make_directories(node)) < 0) {
                fail(error, result, "directory %s", node);
        } else if ((result = pin_maps(kubelet->obj, node)) < 0 || (result = kubelet_bpf__load(kubelet)) < 0) {
                fail(error, result, "load the program of the kubelet's cgroup");
        } else if ((link = bpf_link_create(bpf_program__fd(kubelet->progs.probe_syn), cgroup, BPF_CGROUP_INET_EGRESS,
                                           NULL)) < 0) {
                result = fail(error, -errno, "attach to the kubelet's cgroup");
        } else if ((result = pin_programs(kubelet->obj, node)) < 0) {
                fail(error, result, "pin in %s", node);
        } else {
                unlink_link(node); /* of another directory, or of another program */
                path_of(path, node, "link");
                if (bpf_obj_pin(link, path) < 0)
                        result = fail(error, -errno, "pin %s", path);
        }
        if (link >= 0)
                close(link);
        kubelet_bpf__destroy(kubelet);
        return result;
}

int kubelet_attach(const char *node, const char *cgroup, char *error)
{
        libbpf_set_print(silent);
        struct statfs fs;
        struct stat st;
        int fd = open(cgroup, O_RDONLY | O_DIRECTORY | O_CLOEXEC), result = 0;
        if (fd < 0)
                return fail(error, -errno, "cgroup %s", cgroup);
        if (fstatfs(fd, &fs) < 0 || fstat(fd, &st) < 0)
                result = fail(error, -errno, "cgroup %s", cgroup);
        else if (fs.f_type != CGROUP2_SUPER_MAGIC)
                result = fail(error, -EINVAL, "%s is no cgroup2 directory", cgroup);
        else if (faccessat(fd, "cgroup.type", F_OK, 0) < 0) /* what every directory has but the root */
                result = fail(error, -EINVAL, "%s is the root of cgroup2, which is everybody's", cgroup);
        else if (!watches(node, st.st_ino))
                result = (result = watch(node, fd, st.st_ino, error)) < 0 ? result : 1;
        close(fd);
        return result;
}

int kubelet_ports(const char *node, const struct kubelet_port *ports, int n, int exact, char *error)
{
        int map = open_pin(node, "probe_ports"), result = 0;
        if (map < 0)
                return fail(error, map, "map probe_ports in %s", node);
        struct kubelet_port key, next;
        /* What is not wanted goes first: the map must not be fuller than it has to. */
        for (bool more = exact && bpf_map_get_next_key(map, NULL, &next) == 0; more;) {
                key = next;
                more = bpf_map_get_next_key(map, &key, &next) == 0;
                bool keep = false;
                for (int i = 0; i < n && !keep; i++)
                        keep = memcmp(&ports[i], &key, sizeof(key)) == 0;
                if (!keep)
                        bpf_map_delete_elem(map, &key);
        }
        uint8_t one = 1;
        for (int i = 0; i < n && result == 0; i++)
                if (bpf_map_update_elem(map, &ports[i], &one, BPF_ANY) < 0)
                        result = fail(error, -errno, "map probe_ports, entry %d of %d", i, n);
        close(map);
        return result;
}

int kubelet_counters(const char *node, uint64_t *out, int n, char *error)
{
        return read_counters(node, "kubelet_counters", out, n < KUBELET_MAX ? n : KUBELET_MAX, error);
}

int kubelet_detach(const char *node, char *error)
{
        (void)error;
        unlink_link(node);
        /* The notes stay where there are pods: they hold this map. */
        unpin(node, node_names, sizeof(node_names) / sizeof(*node_names) - 1);
        leave_node(node);
        return 0;
}

int capture_detach(const char *pins, int host, int netns, const char *interface, char *error)
{
        char path[PATH_MAX];
        int result, back;
        libbpf_set_print(silent);
        if ((result = close_door(pins, host, netns, interface, error)) < 0)
                return result;
        if (netns >= 0) {
                if ((result = enter(netns, &back)) < 0)
                        return fail(error, result, "enter the network namespace");
                result = unplumb(pins, interface, error);
                leave(back);
                if (result < 0)
                        return result;
        }
        path_of(path, pins, "link");
        unlink(path);
        unpin(pins, survey_names, sizeof(survey_names) / sizeof(*survey_names));
        unpin(pins, program_names, sizeof(program_names) / sizeof(*program_names));
        unpin(pins, map_names, sizeof(map_names) / sizeof(*map_names));
        if (rmdir(pins) < 0 && errno != ENOENT)
                return fail(error, -errno, "directory %s", pins);
        leave_node(pins);
        return 0;
}

/* -- the layout before -------------------------------------------------------------------------------------------- */

/* The fates of the sockets that are open. */
static int carry_fates(const char *from, const char *pins)
{
        int fates = open_pin(from, "fates"), program = -1, link = -1, iterator = -1;
        if (fates < 0)
                return fates == -ENOENT ? 0 : fates;
        int result = load_survey(pins);
        if (result == 0 && (program = open_pin(pins, "carry")) < 0)
                result = program;
        union bpf_iter_link_info info = {.map = {.map_fd = (uint32_t)fates}};
        LIBBPF_OPTS(bpf_link_create_opts, opts, .iter_info = &info, .iter_info_len = sizeof(info));
        if (result == 0 && (link = bpf_link_create(program, 0, BPF_TRACE_ITER, &opts)) < 0)
                result = -errno;
        if (result == 0 && (iterator = bpf_iter_create(link)) < 0)
                result = -errno;
        char nothing[64];
        ssize_t n = 0;
        while (result == 0 && ((n = read(iterator, nothing, sizeof(nothing))) > 0 || (n < 0 && errno == EAGAIN)))
                ;
        if (n < 0)
                result = -errno;
        int fds[] = {iterator, link, program, fates};
        for (size_t i = 0; i < sizeof(fds) / sizeof(*fds); i++)
                if (fds[i] >= 0)
                        close(fds[i]);
        return result;
}

/* Our program in the link of before, in one step. */
static int take_link(const char *from, const char *pins)
{
        char path[PATH_MAX];
        int link = open_pin(from, "link"), program = open_pin(pins, "steer"), result = program < 0 ? program : 0;
        if (link >= 0 && result == 0) {
                path_of(path, pins, "link");
                if (bpf_link_update(link, program, NULL) < 0)
                        result = errno == ENOLINK ? 0 : -errno; /* its namespace is gone */
                else if ((unlink(path) < 0 && errno != ENOENT) || bpf_obj_pin(link, path) < 0)
                        result = -errno;
        } else if (link < 0 && link != -ENOENT) {
                result = link;
        }
        if (link >= 0)
                close(link);
        if (program >= 0)
                close(program);
        return result;
}

/* The same maps under the new directory. */
static int keep(const char *from, const char *to, const char *const *names, size_t n)
{
        char old[PATH_MAX], path[PATH_MAX];
        for (size_t i = 0; i < n; i++) {
                path_of(old, from, names[i]);
                path_of(path, to, names[i]);
                if (link(old, path) < 0 && errno != EEXIST && errno != ENOENT)
                        return -errno;
        }
        return 0;
}

int capture_upgrade(const char *from, const char *pins, char *error)
{
        char path[PATH_MAX], node[NODE_PATH], former[NODE_PATH];
        struct capture_pod pod = {0};
        libbpf_set_print(silent);
        if (access(from, F_OK) < 0)
                return errno == ENOENT ? 0 : fail(error, -errno, "directory %s", from);
        node_of(node, pins);
        node_of(former, from);
        path_of(path, former, "slots"); /* v1 has none */
        bool v2 = access(path, F_OK) == 0;
        int result = make_directories(node);
        if (result == 0)
                result = make_directories(pins);
        if (result == 0)
                result = keep(from, pins, kept_names, sizeof(kept_names) / sizeof(*kept_names));
        if (result == 0 && v2)
                result = keep(from, pins, kept_of_v2, sizeof(kept_of_v2) / sizeof(*kept_of_v2));
        if (result == 0 && v2)
                result = keep(former, node, kept_of_node, sizeof(kept_of_node) / sizeof(*kept_of_node));
        if (result < 0)
                return fail(error, result, "pins in %s", pins);
        if (!all_pinned(pins) && (result = load(pins, error)) < 0)
                return result;
        if ((result = read_pod(pins, &pod)) < 0)
                return fail(error, result, "map pod in %s", pins);
        /* A pod that is strict has no connections that go on natively but probes that are under way. */
        if (!v2 && pod.mode != MODE_OFF && (result = carry_fates(from, pins)) < 0 && pod.mode != MODE_STRICT)
                return fail(error, result, "the open connections of %s", from);
        if ((result = take_link(from, pins)) < 0)
                return fail(error, result, "sk_lookup of %s", from);
        path_of(path, from, "link");
        unlink(path);
        unpin(from, survey_names, sizeof(survey_names) / sizeof(*survey_names));
        unpin(from, program_names, sizeof(program_names) / sizeof(*program_names));
        unpin(from, map_names, sizeof(map_names) / sizeof(*map_names));
        if (rmdir(from) < 0 && errno != ENOENT)
                return fail(error, -errno, "directory %s", from);
        leave_node(from);
        return 0;
}

struct trial {
        struct capture_bpf *capture;
        char *error;
        int result;
};

/* For a thread of its own, which takes its namespace and all that is in it along. */
static int new_namespace(char *error)
{
        int result = 0;
        if (unshare(CLONE_NEWNET) < 0)
                return fail(error, -errno, "make a network namespace");
        struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP};
        int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &lo) < 0)
                result = fail(error, -errno, "lo in a new network namespace");
        if (fd >= 0)
                close(fd);
        return result;
}

static void *try_attach(void *arg)
{
        struct trial *t = arg;
        struct bpf_object *object = t->capture->obj;
        t->result = new_namespace(t->error);
        if (t->result == 0)
                t->result = plumb(t->error);
        for (size_t i = 0; i < sizeof(filters) / sizeof(*filters) && t->result == 0; i++) {
                int program = bpf_program__fd(bpf_object__find_program_by_name(object, filters[i].program));
                int result = filter_attach(&filters[i], program, 1);
                if (result < 0)
                        t->result = fail(t->error, result, "tc filter (CONFIG_NET_CLS_BPF, CONFIG_NET_SCH_INGRESS)");
        }
        int netns = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
        int program = bpf_program__fd(bpf_object__find_program_by_name(object, "steer"));
        int link = t->result == 0 ? bpf_link_create(program, netns, BPF_SK_LOOKUP, NULL) : -1;
        if (t->result == 0 && link < 0)
                t->result = fail(t->error, -errno, "attach sk_lookup");
        if (link >= 0)
                close(link);
        if (netns >= 0)
                close(netns);
        return NULL;
}

/* Ends a connection that nobody else knows. */
static void *try_destroy(void *arg)
{
        struct trial *t = arg;
        struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}, from;
        socklen_t size = sizeof(at), from_size = sizeof(from);
        struct {
                struct nlmsghdr header;
                struct inet_diag_req_v2 request;
        } ask = {.header = {.nlmsg_len = sizeof(ask),
                            .nlmsg_type = SOCK_DESTROY,
                            .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK},
                 .request = {.sdiag_family = AF_INET, .sdiag_protocol = IPPROTO_TCP, .idiag_states = ~0u}};
        struct {
                struct nlmsghdr header;
                struct nlmsgerr error;
        } answer = {0};
        struct timeval limit = {.tv_sec = 5};
        if ((t->result = new_namespace(t->error)) < 0)
                return NULL;
        int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        int client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        int diag = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
        if (listener < 0 || client < 0 || diag < 0 || bind(listener, (struct sockaddr *)&at, sizeof(at)) < 0 ||
            listen(listener, 1) < 0 || getsockname(listener, (struct sockaddr *)&at, &size) < 0 ||
            connect(client, (struct sockaddr *)&at, sizeof(at)) < 0 ||
            getsockname(client, (struct sockaddr *)&from, &from_size) < 0) {
                t->result = fail(t->error, -errno, "sockets in a new network namespace");
        } else {
                ask.request.id = (struct inet_diag_sockid){.idiag_sport = from.sin_port,
                                                           .idiag_dport = at.sin_port,
                                                           .idiag_src = {from.sin_addr.s_addr},
                                                           .idiag_dst = {at.sin_addr.s_addr},
                                                           .idiag_cookie = {INET_DIAG_NOCOOKIE, INET_DIAG_NOCOOKIE}};
                setsockopt(diag, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
                if (send(diag, &ask, sizeof(ask), 0) < 0 || recv(diag, &answer, sizeof(answer), 0) < 0)
                        t->result = -errno;
                else if (answer.header.nlmsg_type == NLMSG_ERROR)
                        t->result = answer.error.error;
                if (t->result < 0)
                        fail(t->error, t->result, "end a connection by sock_diag (CONFIG_INET_DIAG_DESTROY)");
        }
        int fds[] = {listener, client, diag};
        for (size_t i = 0; i < sizeof(fds) / sizeof(*fds); i++)
                if (fds[i] >= 0)
                        close(fds[i]);
        return NULL;
}

int capture_native(char *error)
{
        pthread_t thread;
        struct trial t = {.error = error};
        libbpf_set_print(silent);
        struct flows_bpf *flows = flows_bpf__open();
        int result = flows ? flows_bpf__load(flows) : -errno;
        flows_bpf__destroy(flows);
        if (result < 0)
                return fail(error, result, "load the iterator over socket storage (BTF of the kernel)");
        if ((result = -pthread_create(&thread, NULL, try_destroy, &t)) < 0)
                return fail(error, result, "start a thread");
        pthread_join(thread, NULL);
        return t.result;
}

static int probe_attach(char *error)
{
        pthread_t thread;
        struct trial t = {.capture = capture_bpf__open(), .error = error};
        int result = t.capture ? capture_bpf__load(t.capture) : -errno;
        if (result < 0) {
                fail(error, result, "load the capture programs");
        } else if ((result = -pthread_create(&thread, NULL, try_attach, &t)) < 0) {
                fail(error, result, "start a thread");
        } else {
                pthread_join(thread, NULL);
                result = t.result;
        }
        capture_bpf__destroy(t.capture);
        return result;
}

int capture_probe(int i, const char **name, char *error)
{
        static const struct {
                const char *program, *what;
        } probes[] = {
                {"out_eth", "tc egress with socket storage"},
                {"in_eth", "tc ingress on the interface"},
                {"in_lo", "tc ingress"},
                {"out_lo", "tc egress on lo"},
                {"steer", "sk_lookup"},
                {"door", "tc ingress with redirection to a veth's other end"},
                {"note", "tcp iterator and BTF of the kernel"},
                {NULL, "attach in a network namespace: tc, sk_lookup, policy routing"},
        };
        libbpf_set_print(silent);
        if (i < 0 || i >= (int)(sizeof(probes) / sizeof(*probes)))
                return -ERANGE;
        *name = probes[i].what;
        if (!probes[i].program)
                return probe_attach(error);
        struct capture_bpf *capture = capture_bpf__open();
        struct survey_bpf *survey = survey_bpf__open();
        int result = -ENOMEM;
        if (capture && survey) {
                struct bpf_object *objects[] = {capture->obj, survey->obj}, *with = NULL;
                for (int o = 0; o < 2; o++) {
                        struct bpf_program *program;
                        bpf_object__for_each_program(program, objects[o])
                        {
                                bool this = strcmp(bpf_program__name(program), probes[i].program) == 0;
                                bpf_program__set_autoload(program, this);
                                if (this)
                                        with = objects[o];
                        }
                }
                result = with ? bpf_object__load(with) : -ENOENT;
        }
        if (result < 0)
                fail(error, result, "load %s", probes[i].program);
        capture_bpf__destroy(capture);
        survey_bpf__destroy(survey);
        return result;
}
