/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation
 *
 * The functions of tunnel.h, called by one control thread. Pods and identities are made here and given to the workers
 * by mail; the engine keeps a list of its own for dumps. What a command promises is true when it returns: every worker
 * has carried it out. State of the mesh goes through mesh.c: applied here, adopted by the workers at the top of their
 * loops, waited for with mesh_sync.
 */
#include <errno.h>
#include <fcntl.h>
#include <openssl/crypto.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "block.h"
#include "conn.h"
#include "denial.h"
#include "gcm.h"
#include "hbone.h"
#include "intern.h"
#include "pod.h"
#include "rbac.h"
#include "state.h"
#include "vouch.h"

#define MAX_WORKERS 8
#define DEFAULT_WORKERS 4
#define BATCH_MAX (1u << 30)

static unsigned usable_cpus(void)
{
        cpu_set_t set;
        return sched_getaffinity(0, sizeof(set), &set) == 0 ? (unsigned)CPU_COUNT(&set) : 1;
}

int tunnel_new(struct tunnel **out, const struct tunnel_config *cfg)
{
        struct tunnel *t = calloc(1, sizeof(*t));
        struct rlimit files;
        int result = -ENOMEM;
        if (!t)
                return result;
        signal(SIGPIPE, SIG_IGN);
        blocks_for_openssl();
        t->config = *cfg;
        if (!t->config.pod_budget)
                t->config.pod_budget = 64ull << 20;
        if (!t->config.engine_budget)
                t->config.engine_budget = 256ull << 20;
        t->nworkers = cfg->workers ? cfg->workers : usable_cpus();
        if (t->nworkers > (cfg->workers ? MAX_WORKERS : DEFAULT_WORKERS))
                t->nworkers = cfg->workers ? MAX_WORKERS : DEFAULT_WORKERS;
        t->started_s = (uint64_t)time(NULL);
        link_init(&t->pods);
        link_init(&t->identities);
        getrlimit(RLIMIT_NOFILE, &files);
        atomic_init(&t->fd_limit, files.rlim_cur / 10 * 9);
        atomic_init(&t->fds, 64);
        t->denials = denials_new(t->nworkers + 1);
        if ((result = netns_remember()) < 0 || (result = mesh_new(&t->mesh, t->nworkers)) < 0 ||
            (result = event_new(&t->event, t->nworkers + 1, cfg->log_fd)) < 0) /* the last: what no worker counts */
                goto fail;
        event_log(t->event, NULL, "info", "AES-GCM of TLS records: %s", gcm_name());
        if (!(t->vouch = vouch_new(t))) {
                result = -ENOMEM;
                goto fail;
        }
        for (unsigned i = 0; i < t->nworkers; i++)
                if ((result = loop_start(&t->workers[i], t, i)) < 0) {
                        /* workers that run hold t: there is no way back from here but out */
                        if (i > 0)
                                abort();
                        goto fail;
                }
        *out = t;
        return 0;
fail:
        vouch_free(t->vouch);
        if (t->event)
                event_free(t->event);
        if (t->mesh)
                mesh_free(t->mesh);
        denials_free(t->denials);
        free(t);
        return result;
}

static void wake_reader(void *arg, unsigned reader)
{
        struct tunnel *t = arg;
        loop_wake(&t->workers[reader]);
}

/* Waits until every worker decides by the newest state, and nothing native is against it. */
static int in_force(struct tunnel *t)
{
        int result = mesh_sync(t->mesh, wake_reader, t);
        vouch_review(t->vouch); /* after the workers: what they allowed by an older state is among it */
        return result;
}

int tunnel_settings(struct tunnel *t, const struct tunnel_settings *s)
{
        atomic_store(&t->same_node_mtls, s->same_node_mtls);
        vouch_enable(t->vouch, s->same_node_native && !s->same_node_mtls);
        int result = mesh_settings(t->mesh, s);
        return result < 0 ? result : in_force(t);
}

/* -- identities --------------------------------------------------------------------------------------------------- */

struct identity *worker_identity(struct worker *w, const char *uri)
{
        struct link *shelf = &w->identities[loop_hash(uri)];
        for (struct link *l = shelf->next; l != shelf; l = l->next) {
                struct held_identity *h = container(l, struct held_identity, link);
                if (strcmp(h->identity->uri, uri) == 0)
                        return h->identity;
        }
        return NULL;
}

static void shelve(struct link *shelf, struct identity *i)
{
        struct held_identity *h = calloc(1, sizeof(*h));
        if (!h)
                abort(); /* a worker without the certificate that the others have would answer differently */
        link_init(&h->link);
        h->identity = identity_ref(i);
        link_add(shelf, &h->link);
}

static void unshelve(struct link *shelf, const char *uri)
{
        for (struct link *l = shelf->next, *next; l != shelf; l = next) {
                struct held_identity *h = container(l, struct held_identity, link);
                next = l->next;
                if (strcmp(h->identity->uri, uri) != 0)
                        continue;
                link_remove(l);
                identity_unref(h->identity);
                free(h);
        }
}

/* Tunnels of this identity with another certificate than now. */
static void recertify(struct worker *w, const char *uri, const struct identity *now)
{
        for (int i = 0; i < LOOP_HASH; i++)
                for (struct link *s = w->seats[i].next; s != &w->seats[i]; s = s->next) {
                        struct seat *seat = container(s, struct seat, link);
                        if (strcmp(seat->pod->identity, uri) != 0)
                                continue;
                        for (struct link *l = seat->tuns.next, *next; l != &seat->tuns; l = next) {
                                struct tun *t = container(l, struct tun, seat);
                                next = l->next;
                                if (t->identity && t->identity != now)
                                        tun_recertified(t, now);
                        }
                }
}

static void mail_identity(struct worker *w, void *arg)
{
        struct identity *i = arg;
        struct link *shelf = &w->identities[loop_hash(i->uri)];
        unshelve(shelf, i->uri);
        shelve(shelf, i);
        recertify(w, i->uri, i);
        w->look_again = true;
        loop_wake(w);
}

static void mail_identity_gone(struct worker *w, void *arg)
{
        const char *uri = arg;
        unshelve(&w->identities[loop_hash(uri)], uri);
        recertify(w, uri, NULL);
        w->look_again = true;
        loop_wake(w);
}

int tunnel_identity_set(struct tunnel *t, const char *identity, const char *key_pem, const char *chain_pem,
                        const char *roots_pem, int64_t *not_after)
{
        struct identity *i;
        int result = identity_new(&i, identity, key_pem, chain_pem, roots_pem);
        if (result < 0)
                return result;
        *not_after = i->not_after_s;
        result = loop_all(t, mail_identity, i);
        if (result == 0) {
                unshelve(&t->identities, identity);
                shelve(&t->identities, i);
                identity_unref(i);
        }
        return result;
}

int tunnel_identity_del(struct tunnel *t, const char *identity)
{
        char *uri = strdup(identity);
        if (!uri)
                return -ENOMEM;
        int result = loop_all(t, mail_identity_gone, uri);
        vouch_identity_gone(t->vouch, uri);
        unshelve(&t->identities, identity);
        if (result == 0)
                free(uri);
        return result;
}

/* -- pods --------------------------------------------------------------------------------------------------------- */

struct seat *seat_of_workload(struct worker *w, const char *workload)
{
        struct link *shelf = &w->seats[loop_hash(workload)];
        for (struct link *l = shelf->next; l != shelf; l = l->next) {
                struct seat *s = container(l, struct seat, link);
                if (strcmp(s->pod->workload, workload) == 0)
                        return s;
        }
        return NULL;
}

static struct pod *pod_find(struct tunnel *t, const char *uid)
{
        for (struct link *l = t->pods.next; l != &t->pods; l = l->next) {
                struct pod *p = container(l, struct pod, link);
                if (strcmp(p->uid, uid) == 0)
                        return p;
        }
        return NULL;
}

static int parse_addresses(struct pod *p, const char *text)
{
        char one[64];
        uint8_t ip[16];
        for (const char *at = text; *at;) {
                size_t n = strcspn(at, ",");
                if (n >= sizeof(one) || p->naddresses == sizeof(p->addresses) / sizeof(*p->addresses))
                        return -EINVAL;
                memcpy(one, at, n);
                one[n] = 0;
                bool four = inet_pton(AF_INET, one, ip) == 1;
                if (!four && inet_pton(AF_INET6, one, ip) != 1)
                        return -EINVAL;
                addr_from_bytes(&p->addresses[p->naddresses++], ip, four ? 4 : 16);
                at += n + (at[n] == ',');
        }
        return 0;
}

static int dup_fd(int fd, int *out)
{
        *out = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 3);
        return fd >= 0 && *out < 0 ? -errno : 0;
}

static int pod_new(struct pod **out, const struct tunnel_pod *d, int netns, int listeners, int engine_sk)
{
        struct pod *p = calloc(1, sizeof(*p));
        struct stat own, theirs;
        if (!p)
                return -ENOMEM;
        atomic_init(&p->refs, 1);
        link_init(&p->link);
        p->netns = p->engine_sk = p->listeners_map = -1;
        for (int r = 0; r < ROLES; r++)
                for (int i = 0; i < MAX_WORKERS; i++)
                        p->fds[r][i] = -1;
        p->uid = strdup(d->uid);
        p->namespace_ = strdup(d->namespace_);
        p->name = strdup(d->name);
        p->service_account = strdup(d->service_account);
        p->workload = strdup(d->workload);
        p->identity = strdup(d->identity);
        p->tuples = calloc(POD_TUPLES, sizeof(*p->tuples));
        p->tuple_seed = hash_seed();
        p->netns_cookie = d->netns_cookie;
        p->netns_ino = d->netns_ino;
        int result = -ENOMEM;
        if (!p->uid || !p->namespace_ || !p->name || !p->service_account || !p->workload || !p->identity || !p->tuples)
                goto fail;
        if ((result = parse_addresses(p, d->addresses)) < 0 || (result = dup_fd(netns, &p->netns)) < 0 ||
            (result = dup_fd(listeners, &p->listeners_map)) < 0 || (result = dup_fd(engine_sk, &p->engine_sk)) < 0)
                goto fail;
        result = -EINVAL;
        if (fstat(netns, &theirs) < 0 || stat("/proc/self/ns/net", &own) < 0 || own.st_ino == theirs.st_ino)
                goto fail;
        *out = p;
        return 0;
fail:
        pod_unref(p);
        return result;
}

static void mail_pod(struct worker *w, void *arg)
{
        struct pod *p = arg;
        struct seat *s = calloc(1, sizeof(*s));
        if (!s)
                abort();
        link_init(&s->link);
        link_init(&s->flows);
        link_init(&s->tuns);
        link_init(&s->judged);
        link_init(&s->stale);
        s->pod = pod_ref(p);
        conn_seat(w, s);
        link_add(&w->seats[loop_hash(p->workload)], &s->link);
        for (int role = 0; role < ROLES; role++) {
                struct listener *l = calloc(1, sizeof(*l));
                if (!l)
                        abort();
                l->io = (struct io){.type = IO_LISTENER, .fd = p->fds[role][w->index]};
                link_init(&l->dead);
                l->role = (enum role)role;
                l->seat = s;
                s->listeners[role] = l;
                if (loop_watch(w, &l->io) < 0)
                        abort(); /* a listener that nobody watches would hang connections */
        }
        w->look_again = true;
        loop_wake(w);
}

static void mail_pod_gone(struct worker *w, void *arg)
{
        const struct pod *p = arg;
        struct seat *s = NULL;
        for (struct link *l = w->seats[loop_hash(p->workload)].next; l != &w->seats[loop_hash(p->workload)];
             l = l->next)
                if (container(l, struct seat, link)->pod == p)
                        s = container(l, struct seat, link);
        if (!s)
                return;
        conn_abort_seat(w, s);
        /* flows of other pods towards this one */
        for (int i = 0; i < LOOP_HASH; i++)
                for (struct link *x = w->seats[i].next; x != &w->seats[i]; x = x->next) {
                        struct seat *other = container(x, struct seat, link);
                        for (struct link *l = other->flows.next, *next; l != &other->flows; l = next) {
                                struct flow *f = container(l, struct flow, seat);
                                next = l->next;
                                if (f->target == p)
                                        flow_reset(f, FLAG_CONNECT, "the pod left the mesh");
                        }
                }
        while (!link_alone(&s->judged)) /* by now all of them were the pod's, and are gone */
                flow_reset(container(s->judged.next, struct flow, judged), FLAG_CONNECT, "the pod left the mesh");
        link_remove(&s->stale);
        for (int role = 0; role < ROLES; role++) {
                close(s->listeners[role]->io.fd);
                s->listeners[role]->io.fd = -1;
                /* events of this turn may still name it: it is freed with the next dead of this worker */
                link_add(&w->dead_listeners, &s->listeners[role]->dead);
        }
        link_remove(&s->link);
        pod_unref(s->pod);
        free(s);
}

static int pod_remove(struct tunnel *t, struct pod *p)
{
        int result = loop_all(t, mail_pod_gone, p);
        vouch_pod_gone(t->vouch, p);
        vouch_idle(t->vouch);
        link_remove(&p->link);
        if (result == 0)
                pod_unref(p);
        return result;
}

int tunnel_pod_add(struct tunnel *t, const struct tunnel_pod *d, int netns, int listeners, int engine_sk,
                   const int *vouch, struct tunnel_ports *ports)
{
        struct pod *p = pod_find(t, d->uid);
        char why[128] = "";
        int result;
        if (p && p->netns_cookie == d->netns_cookie && strcmp(p->identity, d->identity) == 0) {
                /* the maps may be new ones: agents load programs anew when pins were lost */
                atomic_store(&p->mode, TUNNEL_SERVING);
                if ((result = pod_revive(p, listeners, engine_sk, t->nworkers)) < 0 ||
                    (vouch && (result = vouch_pod(t->vouch, p, vouch)) < 0))
                        return result;
                *ports = p->ports;
                return 0;
        }
        if (p)
                vouch_pod_cut(t->vouch, p);
        if (p && (result = pod_remove(t, p)) < 0)
                return result;
        if ((result = pod_new(&p, d, netns, listeners, engine_sk)) < 0)
                return result;
        if ((result = pod_open(p, t->nworkers, why, sizeof(why))) < 0) {
                event_log(t->event, NULL, "error", "pod=\"%s/%s\" error=\"%s\"", d->namespace_, d->name, why);
                pod_unref(p);
                return result;
        }
        if ((result = loop_all(t, mail_pod, p)) < 0)
                return result; /* a stuck worker: p stays with those that have it */
        link_add(&t->pods, &p->link);
        if ((result = pod_serve(p)) < 0 || (vouch && (result = vouch_pod(t->vouch, p, vouch)) < 0)) {
                pod_remove(t, p);
                return result;
        }
        *ports = p->ports;
        return 0;
}

int tunnel_pod_mode(struct tunnel *t, const char *uid, int mode)
{
        struct pod *p = pod_find(t, uid);
        if (!p)
                return -ENOENT;
        if (mode != TUNNEL_SERVING && mode != TUNNEL_DRAINING)
                return -EINVAL;
        atomic_store(&p->mode, mode);
        if (mode == TUNNEL_DRAINING) {
                vouch_pod_draining(t->vouch, p);
                struct timespec now;
                clock_gettime(CLOCK_MONOTONIC, &now);
                atomic_store(&p->last_ms, (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000);
        }
        return 0;
}

int tunnel_pod_del(struct tunnel *t, const char *uid)
{
        struct pod *p = pod_find(t, uid);
        return p ? pod_remove(t, p) : 0;
}

int tunnel_pod_stats(struct tunnel *t, const char *uid, struct tunnel_pod_stats *out)
{
        struct pod *p = pod_find(t, uid);
        struct timespec now;
        if (!p)
                return -ENOENT;
        clock_gettime(CLOCK_MONOTONIC, &now);
        uint64_t now_ms = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000,
                 last = atomic_load(&p->last_ms);
        *out = (struct tunnel_pod_stats){.connections = atomic_load(&p->connections),
                                         .quiet_ms = now_ms > last ? now_ms - last : 0,
                                         .held = atomic_load(&p->held)};
        return 0;
}

/* -- state -------------------------------------------------------------------------------------------------------- */

/* A batch, or (told) a response. */
static int apply(struct tunnel *t, int memfd, struct tunnel_delta *told, char *report, size_t report_len)
{
        const int needed = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW;
        struct stat st;
        int seals = fcntl(memfd, F_GET_SEALS), result;
        if (report_len)
                report[0] = 0;
        if (seals < 0 || (seals & needed) != needed || fstat(memfd, &st) < 0)
                return -EPERM;
        if (st.st_size <= 0 || st.st_size > BATCH_MAX)
                return -EBADMSG;
        void *batch = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, memfd, 0);
        if (batch == MAP_FAILED)
                return -errno;
        if (told)
                result = mesh_apply_delta(t->mesh, batch, (size_t)st.st_size, told, report, report_len);
        else
                result = mesh_apply(t->mesh, batch, (size_t)st.st_size, report, report_len);
        munmap(batch, (size_t)st.st_size);
        return result < 0 ? result : in_force(t);
}

int tunnel_apply(struct tunnel *t, int memfd, char *report, size_t report_len)
{
        return apply(t, memfd, NULL, report, report_len);
}

int tunnel_apply_delta(struct tunnel *t, int memfd, struct tunnel_delta *told, char *report, size_t report_len)
{
        return apply(t, memfd, told, report, report_len);
}

static void mail_whole(struct worker *w, void *arg)
{
        (void)arg;
        w->look_again = true;
        loop_wake(w);
}

int tunnel_whole(struct tunnel *t)
{
        if (atomic_exchange(&t->whole, true))
                return 0;
        int result = loop_all(t, mail_whole, NULL);
        vouch_review(t->vouch);
        return result;
}

void tunnel_counts(struct tunnel *t, struct tunnel_counts *out)
{
        struct mesh_counts counts;
        mesh_counts(t->mesh, &counts);
        *out = (struct tunnel_counts){counts.workloads, counts.services, counts.policies};
}

static void mail_count(struct worker *w, void *arg)
{
        (void)arg;
        for (int i = 0; i < LOOP_HASH; i++)
                for (struct link *s = w->seats[i].next; s != &w->seats[i]; s = s->next) {
                        struct seat *seat = container(s, struct seat, link);
                        for (struct link *l = seat->flows.next; l != &seat->flows; l = l->next)
                                flow_count(container(l, struct flow, seat));
                }
}

int tunnel_metrics(struct tunnel *t, int fd)
{
        int result = loop_all(t, mail_count, NULL);
        vouch_count(t->vouch);
        if (result == 0)
                result = event_metrics(t->event, fd);
        return result < 0 ? result : denials_metrics(t->denials, fd);
}

const char *tunnel_openssl_version(void)
{
        return OpenSSL_version(OPENSSL_VERSION);
}

const char *tunnel_aes_gcm(void)
{
        return gcm_name();
}

/* -- dumps -------------------------------------------------------------------------------------------------------- */

struct dump {
        FILE *out;
        pthread_mutex_t lock;
        bool tunnels, any;
};

static void json_text(FILE *out, const char *key, const char *text)
{
        fprintf(out, "\"%s\":\"", key);
        for (; text && *text; text++) {
                if (*text == '"' || *text == '\\')
                        fprintf(out, "\\%c", *text);
                else if ((unsigned char)*text < 32)
                        fprintf(out, "\\u%04x", *text);
                else
                        fputc(*text, out);
        }
        fputc('"', out);
}

static void comma(struct dump *d)
{
        fputs(d->any ? ",\n" : "\n", d->out);
        d->any = true;
}

static void dump_flow(struct dump *d, const struct flow *f)
{
        static const char *const states[] = {[FLOW_NEW] = "held",        [FLOW_HELD] = "held",
                                             [FLOW_UNKNOWN] = "held",    [FLOW_CONNECTING] = "connecting",
                                             [FLOW_WAITING] = "waiting", [FLOW_ASKED] = "asked",
                                             [FLOW_RELAY] = "open",      [FLOW_DEAD] = "ended"};
        char text[ENDPOINT_STRLEN];
        bool out = f->way == WAY_OUTBOUND;
        comma(d);
        fputc('{', d->out);
        fprintf(d->out, "\"pod\":\"%s/%s\",", f->pod->namespace_, f->pod->name);
        json_text(d->out, "direction", out ? "outbound" : "inbound");
        fputc(',', d->out);
        json_text(d->out, "state", states[f->state]);
        fputc(',', d->out);
        json_text(d->out, "src", endpoint_format(&f->src, text));
        fputc(',', d->out);
        json_text(d->out, "dst", endpoint_format(&f->dst, text));
        fputc(',', d->out);
        json_text(d->out, "hop", f->hop.port ? endpoint_format(&f->hop, text) : "");
        fputc(',', d->out);
        json_text(d->out, "protocol", f->by_hbone ? "HBONE" : f->local ? "local" : "TCP");
        fputc(',', d->out);
        json_text(d->out, "identity_peer", f->peer);
        fputc(',', d->out);
        json_text(d->out, "service", f->service_host);
        fprintf(d->out, ",\"tls\":%s,\"bytes_sent\":%llu,\"bytes_recv\":%llu,\"age_ms\":%llu}",
                f->by_hbone ? "true" : "false", (unsigned long long)(out ? f->sent : f->received),
                (unsigned long long)(out ? f->received : f->sent), (unsigned long long)(f->w->now_ms - f->opened_ms));
}

static void dump_vouched(void *arg, const struct vouch_seen *f)
{
        struct dump *d = arg;
        char text[ENDPOINT_STRLEN];
        comma(d);
        fprintf(d->out, "{\"pod\":\"%s/%s\",\"direction\":\"%s\",\"state\":\"open\",", f->namespace_, f->pod,
                f->inbound ? "inbound" : "outbound");
        json_text(d->out, "src", endpoint_format(&f->src, text));
        fputc(',', d->out);
        json_text(d->out, "dst", endpoint_format(&f->dst, text));
        fputs(",\"hop\":\"\",\"protocol\":\"native\",", d->out);
        json_text(d->out, "identity_peer", f->identity_peer);
        fprintf(d->out, ",\"service\":\"\",\"tls\":false,\"bytes_sent\":%llu,\"bytes_recv\":%llu,\"age_ms\":%llu}",
                (unsigned long long)f->sent, (unsigned long long)f->received, (unsigned long long)f->age_ms);
}

static void dump_tun(struct dump *d, const struct tun *t)
{
        static const char *const states[] = {[TUN_HELD] = "held",
                                             [TUN_CONNECTING] = "connecting",
                                             [TUN_HANDSHAKE] = "handshake",
                                             [TUN_OPEN] = "open",
                                             [TUN_DEAD] = "ended"};
        char text[ENDPOINT_STRLEN];
        comma(d);
        fprintf(d->out, "{\"pod\":\"%s/%s\",", t->pod->namespace_, t->pod->name);
        json_text(d->out, "direction", t->server ? "inbound" : "outbound");
        fputc(',', d->out);
        json_text(d->out, "state", states[t->state]);
        fputc(',', d->out);
        json_text(d->out, "remote", endpoint_format(&t->remote, text));
        fputc(',', d->out);
        json_text(d->out, "local", endpoint_format(&t->local, text));
        fputc(',', d->out);
        json_text(d->out, "identity_peer", t->peer);
        fprintf(d->out, ",\"streams\":%u,\"waiting\":%u,\"retired\":%s,\"worker\":%u,\"age_ms\":%llu}", t->nstreams,
                t->nwaiting, t->no_new ? "true" : "false", t->w->index,
                (unsigned long long)(t->w->now_ms - t->opened_ms));
}

static void mail_dump(struct worker *w, void *arg)
{
        struct dump *d = arg;
        pthread_mutex_lock(&d->lock);
        for (int i = 0; i < LOOP_HASH; i++)
                for (struct link *s = w->seats[i].next; s != &w->seats[i]; s = s->next) {
                        struct seat *seat = container(s, struct seat, link);
                        struct link *head = d->tunnels ? &seat->tuns : &seat->flows;
                        for (struct link *l = head->next; l != head; l = l->next) {
                                if (d->tunnels)
                                        dump_tun(d, container(l, struct tun, seat));
                                else
                                        dump_flow(d, container(l, struct flow, seat));
                        }
                }
        pthread_mutex_unlock(&d->lock);
}

static void dump_pods(struct tunnel *t, struct dump *d)
{
        for (struct link *l = t->pods.next; l != &t->pods; l = l->next) {
                struct pod *p = container(l, struct pod, link);
                struct tunnel_pod_stats stats;
                tunnel_pod_stats(t, p->uid, &stats);
                comma(d);
                fputc('{', d->out);
                json_text(d->out, "uid", p->uid);
                fputc(',', d->out);
                json_text(d->out, "namespace", p->namespace_);
                fputc(',', d->out);
                json_text(d->out, "name", p->name);
                fputc(',', d->out);
                json_text(d->out, "identity", p->identity);
                fputc(',', d->out);
                json_text(d->out, "mode", atomic_load(&p->mode) == TUNNEL_SERVING ? "serving" : "draining");
                fprintf(d->out,
                        ",\"netns_cookie\":%llu,\"netns_ino\":%llu,\"ports\":{\"outbound\":%u,\"inbound\":%u,\"hbone\":"
                        "%u},"
                        "\"connections\":%llu,\"streams_quiet_ms\":%llu,\"held\":%llu,\"buffered\":%llu}",
                        (unsigned long long)p->netns_cookie, (unsigned long long)p->netns_ino, p->ports.outbound,
                        p->ports.inbound, p->ports.hbone, (unsigned long long)stats.connections,
                        (unsigned long long)stats.quiet_ms, (unsigned long long)stats.held,
                        (unsigned long long)atomic_load(&p->buffered));
        }
}

static void dump_identities(struct tunnel *t, struct dump *d)
{
        for (struct link *l = t->identities.next; l != &t->identities; l = l->next) {
                struct identity *i = container(l, struct held_identity, link)->identity;
                comma(d);
                fputc('{', d->out);
                json_text(d->out, "id", i->uri);
                fputc(',', d->out);
                json_text(d->out, "serial", i->serial);
                fprintf(d->out, ",\"not_after\":%lld}", (long long)i->not_after_s);
        }
}

int tunnel_dump(struct tunnel *t, const char *what, int fd)
{
        if (strcmp(what, "workloads") == 0 || strcmp(what, "services") == 0 || strcmp(what, "policies") == 0 ||
            strcmp(what, "versions") == 0)
                return mesh_dump(t->mesh, what, fd);
        if (strcmp(what, "denials") == 0)
                return denials_dump(t->denials, fd);
        bool flows = strcmp(what, "connections") == 0, tunnels = strcmp(what, "tunnels") == 0,
             pods = strcmp(what, "pods") == 0;
        if (!flows && !tunnels && !pods && strcmp(what, "identities") != 0)
                return -EINVAL;
        int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3), result = 0;
        struct dump d = {
                .out = copy < 0 ? NULL : fdopen(copy, "w"), .lock = PTHREAD_MUTEX_INITIALIZER, .tunnels = tunnels};
        if (!d.out) {
                result = -errno;
                if (copy >= 0)
                        close(copy);
                return result;
        }
        fputc('[', d.out);
        if (flows || tunnels)
                result = loop_all(t, mail_dump, &d);
        if (flows)
                vouch_each(t->vouch, dump_vouched, &d);
        else if (tunnels)
                ;
        else if (pods)
                dump_pods(t, &d);
        else
                dump_identities(t, &d);
        fputs("\n]\n", d.out);
        if (fclose(d.out) != 0 && result == 0)
                result = -EIO;
        return result;
}

/* -- why ----------------------------------------------------------------------------------------------------------- */

#define AUTHZ_POLICIES 256
#define AUTHZ_RULES 32 /* of one policy */

/* "IP", "IP:PORT", "[IP]:PORT"; port 0 where there is none. */
static int parse_endpoint(const char *text, struct endpoint *out)
{
        char host[64];
        uint8_t ip[16];
        bool four;
        const char *start = text, *stop = text + strlen(text), *port = NULL;
        *out = (struct endpoint){0};
        if (*text == '[') {
                start = text + 1;
                stop = strchr(start, ']');
                if (!stop || (stop[1] && stop[1] != ':'))
                        return -EINVAL;
                port = stop[1] ? stop + 2 : NULL;
        } else if (strchr(text, ':') && strchr(text, ':') == strrchr(text, ':')) {
                stop = strchr(text, ':');
                port = stop + 1;
        }
        if ((size_t)(stop - start) >= sizeof(host))
                return -EINVAL;
        memcpy(host, start, (size_t)(stop - start));
        host[stop - start] = 0;
        four = inet_pton(AF_INET, host, ip) == 1;
        if (!four && inet_pton(AF_INET6, host, ip) != 1)
                return -EINVAL;
        addr_from_bytes(&out->addr, ip, four ? 4 : 16);
        if (!port)
                return 0;
        char *end;
        unsigned long n = *port >= '0' && *port <= '9' ? strtoul(port, &end, 10) : 0;
        if (n == 0 || n > 65535 || *end)
                return -EINVAL;
        out->port = (uint16_t)n;
        return 0;
}

struct answer {
        struct dump d;
        size_t most; /* bytes */
        const struct rbac_request *asked;
};

/* Why it does not match: for each rule the lists that stand in the way. Half of the room is kept for names. */
static void explain_missed(const struct answer *a, const struct policy_record *p)
{
        FILE *out = a->d.out;
        fputs(",\"missed\":[", out);
        for (unsigned r = 0; r < p->nrules && r < AUTHZ_RULES && (size_t)ftell(out) < a->most / 2; r++) {
                unsigned missed = rbac_missed(p, r, a->asked), some = 0;
                fputs(r ? ",[" : "[", out);
                for (unsigned list = 0; list <= LISTS; list++)
                        if (missed & 1u << list)
                                fprintf(out, "%s\"%s\"", some++ ? "," : "",
                                        list < LISTS ? policy_list_names[list] : "nothing");
                fputc(']', out);
        }
        fputc(']', out);
}

/* One more of the list, where it fits. */
static void explain(void *arg, const struct policy_record *p, int rule)
{
        struct answer *a = arg;
        FILE *out = a->d.out;
        if ((size_t)ftell(out) + 2 * strlen(p->r.name) + 128 > a->most)
                return;
        comma(&a->d);
        fputc('{', out);
        json_text(out, "name", p->r.name);
        fprintf(out, ",\"action\":\"%s\",\"dry_run\":%s,\"matched\":%s,\"rule\":%d", p->deny ? "Deny" : "Allow",
                p->dry_run ? "true" : "false", rule < 0 ? "false" : "true", rule);
        if (rule < 0)
                explain_missed(a, p);
        fputc('}', out);
}

int tunnel_authz(struct tunnel *t, const char *identity, const char *source, const char *destination, char *out,
                 size_t out_len)
{
        const struct mesh_view *v = mesh_newest(t->mesh);
        struct rbac_request request = {.identity = *identity ? identity : NULL};
        struct rbac_verdict verdict = {.policy = "", .rule = -1};
        char reason[2400], td[256], *text = NULL;
        size_t len = 0;
        if (parse_endpoint(source, &request.source) < 0 || parse_endpoint(destination, &request.destination) < 0 ||
            !request.destination.port || (*identity && !spiffe_trust_domain(identity, td, sizeof(td))))
                return -EINVAL;
        const struct workload *w = view_workload_at(v, &request.destination.addr);
        if (w) {
                rbac_decide(v, w, &request, &verdict);
                rbac_text(&verdict, reason, sizeof(reason));
        } else {
                char ip[ENDPOINT_STRLEN];
                snprintf(reason, sizeof(reason), "no workload at %s", addr_format(&request.destination.addr, ip));
        }
        struct answer a = {.d.out = open_memstream(&text, &len), .most = out_len, .asked = &request};
        if (!a.d.out)
                return -ENOMEM;
        fprintf(a.d.out, "{\"allow\":%s,\"rule\":%d,", verdict.allow ? "true" : "false", verdict.rule);
        json_text(a.d.out, "policy", verdict.policy);
        fputc(',', a.d.out);
        json_text(a.d.out, "reason", reason);
        fputc(',', a.d.out);
        json_text(a.d.out, "workload", w ? w->uid : "");
        fputs(",\"policies\":[", a.d.out);
        if (w)
                rbac_consider(v, w, &request, AUTHZ_POLICIES, explain, &a);
        fputs("]}", a.d.out);
        int result = fclose(a.d.out) != 0 ? -ENOMEM : len >= out_len ? -EMSGSIZE : 0;
        if (result == 0)
                memcpy(out, text, len + 1);
        free(text);
        return result;
}

void tunnel_free(struct tunnel *t)
{
        while (!link_alone(&t->pods))
                if (pod_remove(t, container(t->pods.next, struct pod, link)) < 0)
                        abort(); /* a stuck worker: nothing can be freed under it */
        for (unsigned i = 0; i < t->nworkers; i++)
                loop_stop(&t->workers[i]);
        while (!link_alone(&t->identities))
                unshelve(&t->identities, container(t->identities.next, struct held_identity, link)->identity->uri);
        for (unsigned i = 0; i < t->nworkers; i++)
                for (int h = 0; h < LOOP_HASH; h++)
                        while (!link_alone(&t->workers[i].identities[h]))
                                unshelve(&t->workers[i].identities[h],
                                         container(t->workers[i].identities[h].next, struct held_identity, link)
                                                 ->identity->uri);
        vouch_free(t->vouch);
        mesh_free(t->mesh);
        event_free(t->event);
        denials_free(t->denials);
        free(t);
}
