/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whatever bytes a batch holds, the state stays whole: every lookup and dump works afterwards, and one good record
 * still goes in. The first byte says how to read the rest: as a batch, as a body of an Address or of an
 * Authorization, or as a response of delta xDS. A workload that names the policy is always there: what was decoded is
 * also evaluated, for callers whose identity comes from the same bytes.
 */
#include "mesh.h"
#include "rbac.h"
#include "state.h"
#include "tunnel.h"
#include <stdlib.h>
#include <fcntl.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define RESIDENT "u//Pod/n/resident"

static struct mesh *mesh;
static int sink;

static void put32(uint8_t *p, uint32_t v)
{
        for (unsigned i = 0; i < 4; i++)
                p[i] = (uint8_t)(v >> (8 * i));
}

static size_t wrap(uint8_t *out, uint32_t op, const char *name, const uint8_t *body, size_t len)
{
        size_t n = strlen(name), used = 16 + n + 1 + len, padded = (used + 7) & ~(size_t)7;
        memset(out, 0, 16 + padded);
        memcpy(out, "SSB1", 4);
        put32(out + 8, 1);
        put32(out + 16, op);
        put32(out + 20, (uint32_t)n);
        put32(out + 24, 1);
        put32(out + 28, (uint32_t)len);
        memcpy(out + 32, name, n);
        out[32 + n] = '1';
        if (len)
                memcpy(out + 33 + n, body, len);
        return 16 + padded;
}

/* The uid or namespace/hostname that a body claims is what its name must be: take the first fitting strings out of it.
 */
static void body_name(const uint8_t *body, size_t len, char name[64])
{
        static const uint8_t good[] = "u//Pod/n/a";
        strcpy(name, "n/h");
        if (len > sizeof(good) && memmem(body, len, good, sizeof(good) - 1))
                strcpy(name, (const char *)good);
}

static void consistent(const struct rbac_verdict *verdict)
{
        char text[128];
        bool named = *verdict->policy != 0, rule = verdict->rule >= 0;
        rbac_text(verdict, text, sizeof(text));
        switch (verdict->reason) {
        case RBAC_OPEN:
        case RBAC_NOT_DENIED:
                if (!verdict->allow || named || rule)
                        abort();
                break;
        case RBAC_ALLOWED:
                if (!verdict->allow || !named || !rule)
                        abort();
                break;
        case RBAC_DENIED:
                if (verdict->allow || !named || !rule)
                        abort();
                break;
        case RBAC_NOT_ALLOWED:
        case RBAC_NOT_RECEIVED:
                if (verdict->allow || !named || rule)
                        abort();
                break;
        }
}

struct considered {
        const struct rbac_verdict *verdict;
        unsigned n;
};

static void considered(void *arg, const struct policy_record *p, int rule)
{
        struct considered *c = arg;
        const struct rbac_verdict *v = c->verdict;
        c->n++;
        if (rule < -1 || rule >= (int)(p->nrules ? p->nrules : 1))
                abort();
        if (!p->dry_run && p->deny && rule >= 0 && v->reason != RBAC_DENIED)
                abort();
        if (!p->dry_run && !p->deny && rule >= 0 && v->reason == RBAC_NOT_ALLOWED)
                abort();
        if (p->undecodable && (!p->deny || rule != 0))
                abort();
}

/* The workload that is always there, and callers made of the input. */
static void evaluate(const struct mesh_view *v, const uint8_t *data, size_t size)
{
        char identity[96];
        struct rbac_request req = {.identity = identity};
        struct rbac_verdict verdict, again;
        const struct workload *w = view_workload(v, RESIDENT);
        if (!w)
                return; /* a batch took it away */
        for (size_t i = 0; i < 4; i++) {
                size_t at = size * i / 4, n = size - at < 24 ? size - at : 24;
                snprintf(identity, sizeof(identity), i ? "spiffe://td/ns/%.*s/sa/%.*s" : "%.*s%.*s", (int)n / 2,
                         (const char *)data + at, (int)(n - n / 2), (const char *)data + at + n / 2);
                if (n < 4)
                        continue;
                addr_from_bytes(&req.source.addr, data + at, n >= 16 && i % 2 ? 16 : 4);
                req.destination =
                        (struct endpoint){.addr = req.source.addr, .port = (uint16_t)(data[at] << 8 | data[at + 1])};
                rbac_decide(v, w, &req, &verdict);
                consistent(&verdict);
                rbac_decide(v, w, &req, &again);
                if (again.reason != verdict.reason || again.policy != verdict.policy || again.rule != verdict.rule)
                        abort();
                struct considered c = {&verdict, 0};
                rbac_consider(v, w, &req, 64, considered, &c);
                if (c.n == 0 && verdict.reason != RBAC_OPEN && verdict.reason != RBAC_NOT_RECEIVED)
                        abort();
        }
}

static void look(const struct mesh_view *v, const uint8_t *data, size_t size)
{
        struct rbac_request req = {0};
        struct rbac_verdict verdict;
        struct endpoint dst = {.port = 80};
        struct route r;
        for (size_t i = 0; i + 4 <= size && i < 256; i++) {
                if (addr_from_bytes(&dst.addr, data + i, i + 16 <= size && i % 2 ? 16 : 4))
                        continue;
                const struct workload *w = view_workload_at(v, &dst.addr);
                view_route(v, w, &dst, i, &r);
                for (unsigned k = 0; k < r.nsans; k++)
                        if (strncmp(r.sans[k], "spiffe://", 9) != 0)
                                abort();
                if (!w)
                        continue;
                if (view_workload(v, w->uid) == NULL)
                        abort();
                view_inbound_service(v, w, 8080, &r);
                rbac_decide(v, w, &req, &verdict);
                consistent(&verdict);
                if (view_policy_missing(v, w) && verdict.allow)
                        abort();
        }
}

/* Address{Workload{namespace n, uid, policies n/h, address 10.0.0.1}} */
static void settle(void)
{
        static const char body[] = "\x0a\x23\x12\x01n\x1a\x04\x0a\x00\x00\x01\xa2\x01\x11" RESIDENT "\x82\x01\x03n/h";
        uint8_t batch[256];
        char report[64];
        size_t len = wrap(batch, 1, RESIDENT, (const uint8_t *)body, sizeof(body) - 1);
        if (mesh_apply(mesh, batch, len, report, sizeof(report)) || *report)
                abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
        static const char *const what[] = {"workloads", "services", "policies", "versions"};
        struct tunnel_settings settings = {.cluster_cidrs = "10.0.0.0/8,fd00::/8"};
        static const uint8_t empty[16] = {'S', 'S', 'B', '1', 1};
        char report[512], name[64];
        int r = 0;
        if (!mesh) {
                sink = open("/dev/null", O_WRONLY);
                mesh_new(&mesh, 1);
                mesh_settings(mesh, &settings);
                settle();
        }
        if (!size)
                return 0;
        if (data[0] & 0x40) {
                struct tunnel_delta told;
                r = mesh_apply_delta(mesh, data + 1, size - 1, &told, report, sizeof(report));
                if (!r && (strnlen(told.nonce, sizeof(told.nonce)) == sizeof(told.nonce) || told.resources > size))
                        abort();
        } else if (data[0] % 3 == 0) {
                r = mesh_apply(mesh, data + 1, size - 1, report, sizeof(report));
        } else {
                uint8_t *batch = malloc(size + 128);
                body_name(data + 1, size - 1, name);
                size_t len = wrap(batch, data[0] % 3 == 1 ? 1 : 3, name, data + 1, size - 1);
                r = mesh_apply(mesh, batch, len, report, sizeof(report));
                if (r)
                        abort(); /* the framing is ours and good */
                free(batch);
        }
        if (strnlen(report, sizeof(report)) == sizeof(report))
                abort();
        look(mesh_view(mesh, 0), data, size);
        evaluate(mesh_view(mesh, 0), data, size);
        for (unsigned i = 0; i < 4; i++)
                if (mesh_dump(mesh, what[i], sink))
                        abort();
        if (data[0] & 0x80) { /* start afresh now and then: a full batch of nothing */
                struct mesh_counts n;
                if (mesh_apply(mesh, empty, sizeof(empty), report, sizeof(report)))
                        abort();
                mesh_counts(mesh, &n);
                if (n.workloads || n.services || n.policies)
                        abort();
                mesh_view(mesh, 0);
                mesh_in_force(mesh, 0);
                mesh_sync(mesh, NULL, NULL);
                settle();
        }
        return 0;
}
