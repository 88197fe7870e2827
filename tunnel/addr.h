/* SPDX-License-Identifier: Apache-2.0 */
/* The one address form: 16 bytes, IPv4 mapped into ::ffff:0:0/96, network byte order. */
#ifndef SIDESTEP_ADDR_H
#define SIDESTEP_ADDR_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

struct addr {
        uint8_t ip[16];
};

/* An address and a port in host order. */
struct endpoint {
        struct addr addr;
        uint16_t port;
};

static inline bool addr_is_v4(const struct addr *a)
{
        static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
        return memcmp(a->ip, mapped, 12) == 0;
}

static inline bool addr_equal(const struct addr *a, const struct addr *b)
{
        return memcmp(a, b, sizeof(*a)) == 0;
}

/* From 4 or 16 bytes; -1 on any other length. */
static inline int addr_from_bytes(struct addr *a, const uint8_t *b, size_t len)
{
        if (len == 16) {
                memcpy(a->ip, b, 16);
                return 0;
        }
        if (len != 4)
                return -1;
        memset(a->ip, 0, 10);
        a->ip[10] = a->ip[11] = 0xff;
        memcpy(a->ip + 12, b, 4);
        return 0;
}

static inline int addr_from_sockaddr(struct endpoint *e, const struct sockaddr_storage *ss)
{
        if (ss->ss_family == AF_INET) {
                const struct sockaddr_in *s = (const struct sockaddr_in *)ss;
                e->port = ntohs(s->sin_port);
                return addr_from_bytes(&e->addr, (const uint8_t *)&s->sin_addr, 4);
        }
        if (ss->ss_family == AF_INET6) {
                const struct sockaddr_in6 *s = (const struct sockaddr_in6 *)ss;
                e->port = ntohs(s->sin6_port);
                return addr_from_bytes(&e->addr, (const uint8_t *)&s->sin6_addr, 16);
        }
        return -1;
}

/* A mapped address becomes AF_INET. Returns the length. */
static inline socklen_t addr_to_sockaddr(const struct endpoint *e, struct sockaddr_storage *ss)
{
        memset(ss, 0, sizeof(*ss));
        if (addr_is_v4(&e->addr)) {
                struct sockaddr_in *s = (struct sockaddr_in *)ss;
                s->sin_family = AF_INET;
                s->sin_port = htons(e->port);
                memcpy(&s->sin_addr, e->addr.ip + 12, 4);
                return sizeof(*s);
        }
        struct sockaddr_in6 *s = (struct sockaddr_in6 *)ss;
        s->sin6_family = AF_INET6;
        s->sin6_port = htons(e->port);
        memcpy(&s->sin6_addr, e->addr.ip, 16);
        return sizeof(*s);
}

static inline bool addr_is_loopback(const struct addr *a)
{
        static const uint8_t one[16] = {[15] = 1};
        return addr_is_v4(a) ? a->ip[12] == 127 : memcmp(a->ip, one, 16) == 0;
}

#define ENDPOINT_STRLEN 56 /* "[" + 45 + "]:" + 5 + NUL, rounded */

static inline const char *addr_format(const struct addr *a, char out[ENDPOINT_STRLEN])
{
        if (addr_is_v4(a))
                inet_ntop(AF_INET, a->ip + 12, out, ENDPOINT_STRLEN);
        else
                inet_ntop(AF_INET6, a->ip, out, ENDPOINT_STRLEN);
        return out;
}

/* "1.2.3.4:80" or "[2001:db8::1]:80", the form of the HBONE authority. */
static inline const char *endpoint_format(const struct endpoint *e, char out[ENDPOINT_STRLEN])
{
        char ip[ENDPOINT_STRLEN];
        addr_format(&e->addr, ip);
        snprintf(out, ENDPOINT_STRLEN, addr_is_v4(&e->addr) ? "%.45s:%u" : "[%.45s]:%u", ip, e->port);
        return out;
}

#endif
