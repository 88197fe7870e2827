/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation
 *
 * Tunnels of a worker that may be used again, found by (source pod, destination): the key is the pod and its
 * certificate, the hop's address and port, the destination's record and the identities it may have. Never shared
 * between pods, not even of one service account: policy and logs go by the tunnel's source address. A tunnel that is
 * being dialled takes flows already; when it fails all of them fail with it. When all are full, one more is opened:
 * nghttp2 would queue silently.
 */
#include <errno.h>
#include <string.h>
#include "hbone.h"
#include "pod.h"

static uint32_t place(const struct pod *p, const struct endpoint *hop)
{
        uint32_t h = 2166136261u ^ hop->port ^ (uint32_t)((uintptr_t)p >> 6);
        for (int i = 0; i < 16; i++)
                h = (h ^ hop->addr.ip[i]) * 16777619u;
        return h % LOOP_HASH;
}

static bool same_sans(const struct tun *t, const struct route *r)
{
        if (t->nsans != r->nsans)
                return false;
        for (unsigned i = 0; i < r->nsans; i++)
                if (strcmp(t->sans[i], r->sans[i]) != 0)
                        return false;
        return true;
}

static bool fits(const struct tun *t, const struct flow *f, const struct route *r, const struct identity *i)
{
        return t->pod == f->pod && t->identity == i && t->record == r->dst->record &&
               t->remote.port == r->next_hop.port && addr_equal(&t->remote.addr, &r->next_hop.addr) && same_sans(t, r);
}

static int copy_sans(struct tun *t, const struct route *r)
{
        t->sans = calloc(r->nsans ? r->nsans : 1, sizeof(*t->sans));
        for (; t->sans && t->nsans < r->nsans; t->nsans++)
                if (!(t->sans[t->nsans] = strdup(r->sans[t->nsans])))
                        return -ENOMEM;
        return t->sans ? 0 : -ENOMEM;
}

int pool_open(struct flow *f, const struct route *r, struct identity *i)
{
        struct worker *w = f->w;
        struct link *shelf = &w->pool[place(f->pod, &r->next_hop)];
        for (struct link *l = shelf->next; l != shelf; l = l->next) {
                struct tun *t = container(l, struct tun, pool);
                if (fits(t, f, r, i) && tun_has_room(t))
                        return tun_submit(t, f);
        }
        struct tun *t;
        int result = tun_dial(w, f->pod, i, &r->next_hop, &t);
        if (result < 0)
                return result;
        t->record = r->dst->record;
        if (copy_sans(t, r) < 0) {
                tun_fail(t, FLAG_CONNECT, "no memory");
                return -ENOMEM;
        }
        link_add(shelf, &t->pool);
        f->b.tun = t;
        return tun_submit(t, f);
}

void pool_give_up(struct flow *f)
{
        struct tun *t = f->b.tun;
        if (t && t->state != TUN_DEAD && t->nwaiting)
                t->nwaiting--;
        link_remove(&f->member);
}

void pool_review(struct tun *t)
{
        const struct workload *dst = view_workload_at(t->w->view, &t->remote.addr);
        if (worker_identity(t->w, t->pod->identity) != t->identity || !dst || dst->record != t->record)
                tun_retire(t);
}
