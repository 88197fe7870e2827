/* SPDX-License-Identifier: Apache-2.0 */
/* TLS connections of the engine with a peer that is OpenSSL alone, and with itself for what OpenSSL would never send.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include "dice.h"
#include "gcm.h"
#include "tls.h"

#define MOST 70000

static int allocations = -1; /* that OpenSSL still gets; < 0: all */

static bool none_left(void)
{
        return allocations >= 0 && allocations-- == 0 && (allocations = 0, true);
}

static void *get(size_t n, const char *file, int line)
{
        (void)file, (void)line;
        return n && !none_left() ? malloc(n) : NULL;
}

static void *grow(void *block, size_t n, const char *file, int line)
{
        (void)file, (void)line;
        if (n)
                return none_left() ? NULL : realloc(block, n);
        free(block);
        return NULL;
}

static void give(void *block, const char *file, int line)
{
        (void)file, (void)line;
        free(block);
}

#define URI "spiffe://cluster.local/ns/a/sa/b"

static char *key_pem, *cert_pem;
static struct identity *id;

/* One self-signed certificate, which both sides have and trust. */
static void credentials(char **key_text, char **cert_text)
{
        EVP_PKEY *key = EVP_EC_gen("P-256");
        X509 *cert = X509_new();
        X509_set_version(cert, 2);
        ASN1_INTEGER_set(X509_get_serialNumber(cert), 7);
        X509_gmtime_adj(X509_getm_notBefore(cert), -3600);
        X509_gmtime_adj(X509_getm_notAfter(cert), 86400);
        X509_set_pubkey(cert, key);
        const char *extensions[][2] = {{"subjectAltName", "critical,URI:" URI},
                                       {"basicConstraints", "critical,CA:TRUE"}};
        for (int i = 0; i < 2; i++) {
                X509_EXTENSION *e = X509V3_EXT_conf(NULL, NULL, extensions[i][0], extensions[i][1]);
                assert_non_null(e);
                X509_add_ext(cert, e, -1);
                X509_EXTENSION_free(e);
        }
        assert_true(X509_sign(cert, key, EVP_sha256()) > 0);
        BIO *bio[] = {BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem())};
        PEM_write_bio_PrivateKey(bio[0], key, NULL, NULL, 0, NULL, NULL);
        PEM_write_bio_X509(bio[1], cert);
        char **out[] = {key_text, cert_text};
        for (int i = 0; i < 2; i++) {
                char *text;
                long n = BIO_get_mem_data(bio[i], &text);
                *out[i] = strndup(text, (size_t)n);
                BIO_free(bio[i]);
        }
        EVP_PKEY_free(key);
        X509_free(cert);
}

struct pair {
        struct tls ours;
        SSL *theirs;
        BIO *in, *out;      /* theirs */
        uint8_t fragment;   /* what they ask for: a mode of RFC 6066 4, or 0 */
        const char *groups; /* the only ones they have, or NULL */
        bool refuses;       /* our certificate, when our handshake is done */
        bool hasty;         /* a server that speaks before our Finished */
};

static void carry(struct pair *p)
{
        char *bytes;
        long n = BIO_get_mem_data(p->out, &bytes);
        assert_true(n == 0 || buf_add(&p->ours.in, bytes, (size_t)n));
        assert_int_equal(BIO_reset(p->out), 1);
        if (p->ours.out.len)
                assert_int_equal(BIO_write(p->in, buf_at(&p->ours.out), (int)p->ours.out.len), (int)p->ours.out.len);
        if (p->ours.out.len)
                buf_take(&p->ours.out, p->ours.out.len);
}

static int any(int ok, X509_STORE_CTX *store)
{
        (void)ok, (void)store;
        return 1;
}

/* A handshake with plain OpenSSL, which sends `tickets` behind it if it is the server. */
static void meet(struct pair *p, struct identity *i, bool server, const char *suite, unsigned tickets)
{
        SSL_CTX *ctx = SSL_CTX_new(TLS_method()); /* of the process: plain OpenSSL */
        BIO *bio = BIO_new_mem_buf(key_pem, -1);
        EVP_PKEY *key = PEM_read_bio_PrivateKey(bio, NULL, NULL, NULL);
        BIO_free(bio);
        bio = BIO_new_mem_buf(cert_pem, -1);
        X509 *cert = PEM_read_bio_X509(bio, NULL, NULL, NULL);
        BIO_free(bio);
        assert_int_equal(SSL_CTX_use_certificate(ctx, cert), 1);
        assert_int_equal(SSL_CTX_use_PrivateKey(ctx, key), 1);
        EVP_PKEY_free(key);
        X509_free(cert);
        SSL_CTX_set_ciphersuites(ctx, suite);
        SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER, p->refuses ? NULL : any);
        if (p->groups)
                assert_int_equal(SSL_CTX_set1_groups_list(ctx, p->groups), 1);
        SSL_CTX_set_num_tickets(ctx, tickets);
        SSL_CTX_set_session_id_context(ctx, (const uint8_t *)"t", 1);
        assert_int_equal(tls_open(&p->ours, i, server), 0);
        SSL_CTX_set_tlsext_max_fragment_length(ctx, p->fragment);
        p->theirs = SSL_new(ctx);
        SSL_CTX_free(ctx);
        p->in = BIO_new(BIO_s_mem());
        p->out = BIO_new(BIO_s_mem());
        SSL_set_bio(p->theirs, p->in, p->out);
        if (server)
                SSL_set_connect_state(p->theirs);
        else
                SSL_set_accept_state(p->theirs);
        int done = 0, other = 0;
        if (p->hasty) {
                uint8_t early[1];
                size_t n;
                assert_int_equal(tls_handshake(&p->ours), 0);
                carry(p);
                assert_int_equal(SSL_read_early_data(p->theirs, early, 1, &n), SSL_READ_EARLY_DATA_FINISH);
                assert_int_equal(SSL_write_early_data(p->theirs, "hasty", 5, &n), 1);
        }
        for (int turn = 0; turn < 10 && !(done == 1 && other == 1); turn++) {
                if (other != 1)
                        other = SSL_do_handshake(p->theirs);
                carry(p);
                if (done != 1)
                        done = tls_handshake(&p->ours);
                carry(p);
                assert_int_not_equal(done, -1);
        }
        assert_int_equal(done, 1);
        assert_int_equal(other, p->refuses ? -1 : 1);
        assert_string_equal(SSL_get_cipher_name(p->theirs), suite);
        tls_settle(&p->ours);
        assert_int_equal(gcm_contexts(), gcm_libctx() ? 2 : 0); /* both directions are ours, and only of our side */
}

static void part(struct pair *p)
{
        tls_close(&p->ours);
        SSL_free(p->theirs);
        assert_int_equal(gcm_contexts(), 0);
        ERR_clear_error();
}

static void say(struct pair *p, const uint8_t *bytes, size_t len)
{
        uint64_t updates = 0;
        for (size_t at = 0, n; at < len; at += n) {
                n = len - at > RECORD_PLAIN ? RECORD_PLAIN : len - at;
                assert_int_equal(tls_write(&p->ours, bytes + at, n, &updates), 0);
        }
}

/* Everything that is there now. Returns what tls_read() said last. */
static int hear(struct tls *t, uint8_t *to, size_t room, size_t *have)
{
        const uint8_t *plain;
        int n;
        *have = 0;
        while ((n = tls_read(t, &plain)) > 0) {
                assert_true(*have + (size_t)n <= room);
                memcpy(to + *have, plain, (size_t)n);
                *have += (size_t)n;
        }
        return n;
}

/* One message each way, of several records; ours arrives in pieces of `piece` bytes. */
static void talk(struct pair *p, size_t len, size_t piece)
{
        static uint8_t sent[MOST], got[MOST];
        size_t have = 0, part, put;
        fill(sent, len);
        say(p, sent, len);
        carry(p);
        for (int n; have < len && (n = SSL_read(p->theirs, got + have, (int)(len - have))) > 0; have += (size_t)n)
                ;
        assert_int_equal(have, len);
        assert_memory_equal(got, sent, len);
        fill(sent, len);
        assert_int_equal(SSL_write_ex(p->theirs, sent, len, &put), 1);
        char *bytes;
        size_t all = (size_t)BIO_get_mem_data(p->out, &bytes);
        have = 0;
        for (size_t at = 0, n; at < all; at += n) {
                n = all - at < piece ? all - at : piece;
                assert_true(buf_add(&p->ours.in, bytes + at, n));
                assert_int_equal(hear(&p->ours, got + have, sizeof(got) - have, &part), 0);
                have += part;
        }
        assert_int_equal(BIO_reset(p->out), 1);
        assert_int_equal(have, len);
        assert_memory_equal(got, sent, len);
        carry(p); /* an answer to a KeyUpdate */
}

static const char *const suites[] = {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"};

/* As tls_write() does after 2^23 records, and with the wish for an answer, which the engine never has. */
static void new_key(struct tls *t, bool requested)
{
        assert_true(record_seal(&t->tx, &t->out, CONTENT_HANDSHAKE, (uint8_t[]){24, 0, 0, 1, requested}, 5));
        assert_true(traffic_update(&t->tx));
}

static void test_with_plain_openssl(void **unused)
{
        static const size_t pieces[] = {1 << 20, 5, 16000, 1};
        (void)unused;
        for (int k = 0; k < 8; k++) {
                struct pair p = {0};
                meet(&p, id, k & 1, suites[k / 2 & 1], k & 4 ? 3 : 0);
                for (int n = 0; n < 40; n++)
                        talk(&p, 1 + roll(n & 1 ? 300 : MOST), pieces[n % 4]);
                /* new keys for each direction, by either side, with and without an answer */
                for (int n = 0; n < 12; n++) {
                        if (n & 2) {
                                new_key(&p.ours, n & 1);
                        } else {
                                int kind = n & 1 ? SSL_KEY_UPDATE_REQUESTED : SSL_KEY_UPDATE_NOT_REQUESTED;
                                assert_int_equal(SSL_key_update(p.theirs, kind), 1);
                        }
                        talk(&p, 1 + roll(MOST), pieces[n % 4]);
                        talk(&p, 1 + roll(MOST), pieces[n % 4]);
                }
                part(&p);
        }
}

static void test_padding_is_taken_off(void **unused)
{
        (void)unused;
        for (int k = 0; k < 2; k++) {
                struct pair p = {0};
                meet(&p, id, k & 1, suites[0], 0);
                SSL_set_block_padding(p.theirs, 4096);
                for (int n = 0; n < 20; n++)
                        talk(&p, 1 + roll(9000), 1 << 20);
                part(&p);
        }
}

/* What a client with little memory asks for is kept to (RFC 6066 4). */
static void test_small_fragments(void **unused)
{
        (void)unused;
        for (uint8_t mode = 0; mode <= TLSEXT_max_fragment_length_4096; mode++) {
                struct pair p = {.fragment = mode};
                meet(&p, id, true, suites[0], 0);
                for (int n = 0; n < 5; n++)
                        talk(&p, n ? 1 + roll(MOST) : MOST, 1 << 20);
                part(&p);
        }
}

/* A server that wants another group than the client thought: a second ClientHello. */
static void test_hello_retry(void **unused)
{
        (void)unused;
        for (int k = 0; k < 2; k++) {
                struct pair p = {.groups = k ? "P-384" : "X25519"}; /* k == 0: the control, it is the first one */
                meet(&p, id, false, suites[k], 2);
                assert_int_equal(SSL_get_negotiated_group(p.theirs), k ? NID_secp384r1 : NID_X25519);
                for (int n = 0; n < 5; n++)
                        talk(&p, 1 + roll(MOST), 1 << 20);
                part(&p);
        }
}

/* A server may speak as soon as it has said Finished (half a round trip early): its first record under these keys. */
static void test_a_hasty_server(void **unused)
{
        struct pair p = {.hasty = true};
        uint8_t got[64];
        size_t have;
        (void)unused;
        meet(&p, id, false, suites[0], 2);
        assert_int_equal(hear(&p.ours, got, sizeof(got), &have), 0);
        assert_int_equal(have, 5);
        assert_memory_equal(got, "hasty", 5);
        for (int n = 0; n < 5; n++)
                talk(&p, 1 + roll(MOST), 1 << 20);
        part(&p);
}

/* A client's handshake is done before the server has seen its certificate: what the server says then is its first
 * record, and the reason that is logged. */
static void test_a_certificate_that_is_refused(void **unused)
{
        struct pair p = {.refuses = true};
        const uint8_t *plain;
        char text[64];
        (void)unused;
        meet(&p, id, false, suites[0], 0);
        carry(&p);
        assert_int_equal(tls_read(&p.ours, &plain), -2);
        assert_string_equal(tls_error(&p.ours, text, sizeof(text)), "peer: unknown CA (48)");
        assert_int_equal(p.ours.out.len, 0);
        part(&p);
}

static void test_ends(void **unused)
{
        const uint8_t *plain;
        uint8_t one[1];
        (void)unused;
        for (int k = 0; k < 2; k++) {
                struct pair p = {0};
                meet(&p, id, k & 1, suites[0], 0);
                SSL_shutdown(p.theirs);
                assert_int_equal(SSL_get_shutdown(p.theirs), SSL_SENT_SHUTDOWN);
                carry(&p);
                assert_int_equal(tls_read(&p.ours, &plain), -1);
                assert_int_equal(tls_read(&p.ours, &plain), -1);
                tls_end(&p.ours);
                carry(&p);
                assert_int_equal(SSL_shutdown(p.theirs), 1);
                part(&p);

                p = (struct pair){0};
                meet(&p, id, k & 1, suites[0], 0);
                tls_end(&p.ours);
                carry(&p);
                assert_int_equal(SSL_read(p.theirs, one, 1), 0);
                assert_int_equal(SSL_get_error(p.theirs, 0), SSL_ERROR_ZERO_RETURN);
                part(&p);
        }
}

/* Each byte of a record changed: it is not opened, none of it is given out, and the peer is told. */
static void test_what_changed_on_the_way(void **unused)
{
        (void)unused;
        for (unsigned at = 0; at < 5 + 20 + 1 + 16; at++) {
                struct pair p = {0};
                uint8_t got[64];
                char text[64];
                size_t have;
                meet(&p, id, at & 1, suites[at >> 1 & 1], 0);
                assert_int_equal(SSL_write(p.theirs, "twenty bytes of text", 20), 20);
                carry(&p);
                assert_int_equal(p.ours.in.len, 5 + 20 + 1 + 16);
                buf_at(&p.ours.in)[at] ^= (uint8_t)(1u << roll(8));
                int result = hear(&p.ours, got, sizeof(got), &have);
                assert_int_equal(have, 0);
                if (result == 0) { /* a greater length: it waits, and what comes next does not help */
                        assert_true(at == 3 || at == 4);
                        for (int n = 0; n < 20 && result == 0; n++) {
                                uint8_t more[1000] = {0};
                                SSL_write(p.theirs, more, sizeof(more));
                                carry(&p);
                                result = hear(&p.ours, got, sizeof(got), &have);
                                assert_int_equal(have, 0);
                        }
                }
                assert_int_equal(result, -2);
                assert_int_equal(hear(&p.ours, got, sizeof(got), &have), -2);
                tls_error(&p.ours, text, sizeof(text));
                assert_true(strcmp(text, "bad record mac") == 0 || (at < 5 && strlen(text) > 5));
                carry(&p);
                result = SSL_read(p.theirs, got, 1);
                assert_int_equal(SSL_get_error(p.theirs, result), SSL_ERROR_SSL);
                if (at >= 5)
                        assert_int_equal(ERR_GET_REASON(ERR_peek_error()), SSL_R_SSLV3_ALERT_BAD_RECORD_MAC);
                uint64_t updates = 0;
                assert_int_equal(tls_write(&p.ours, "x", 1, &updates), -1);
                part(&p);
        }
}

/* -- with itself -------------------------------------------------------------------------------------------------- */

struct twins {
        struct tls client, server;
};

static void move(struct tls *from, struct tls *to)
{
        assert_true(from->out.len == 0 || buf_add(&to->in, buf_at(&from->out), from->out.len));
        if (from->out.len)
                buf_take(&from->out, from->out.len);
}

static void meet_twin(struct twins *w)
{
        *w = (struct twins){0};
        assert_int_equal(tls_open(&w->client, id, false), 0);
        assert_int_equal(tls_open(&w->server, id, true), 0);
        assert_int_equal(tls_handshake(&w->client), 0);
        move(&w->client, &w->server);
        assert_int_equal(tls_handshake(&w->server), 0);
        move(&w->server, &w->client);
        assert_int_equal(tls_handshake(&w->client), 1);
        move(&w->client, &w->server);
        assert_int_equal(tls_handshake(&w->server), 1);
        tls_settle(&w->client);
        tls_settle(&w->server);
}

static void part_twin(struct twins *w)
{
        tls_close(&w->client);
        tls_close(&w->server);
}

#define TICKET "\x04\0\0\x05\1\2\3\4\5"

/* Content that OpenSSL would not send: what the client reads of it, and the server: the same but for tickets. */
static void test_what_does_not_belong(void **unused)
{
        static const struct {
                const char *name;
                struct {
                        int type;
                        const char *bytes;
                        size_t n;
                } records[3]; /* of the other side, until one without type */
                int result;
                const char *error; /* NULL: whatever */
        } cases[] = {
                {"data", {{23, "hello", 5}}, 0, NULL},
                {"no data", {{23, "", 0}}, 0, NULL},
                {"a ticket", {{22, TICKET, 9}}, 0, NULL},
                {"two tickets in a record", {{22, TICKET TICKET, 18}}, 0, NULL},
                {"a ticket in two records", {{22, TICKET, 3}, {22, &TICKET[3], 6}}, 0, NULL},
                {"data inside a ticket", {{22, TICKET, 3}, {23, "hello", 5}}, -2, "unexpected_message"},
                {"an alert inside a ticket", {{22, TICKET, 8}, {21, "\1\0", 2}}, -2, "unexpected_message"},
                {"a ticket behind a KeyUpdate", {{22, "\x18\0\0\1\0" TICKET, 14}}, -2, "unexpected_message"},
                {"a KeyUpdate behind a ticket", {{22, TICKET "\x18\0\0\1\0", 14}}, 0, NULL},
                {"a KeyUpdate in two records", {{22, "\x18\0", 2}, {22, "\0\1\0", 3}}, 0, NULL},
                {"a KeyUpdate that is longer", {{22, "\x18\0\0\2\0\0", 6}}, -2, "decode error"},
                {"a KeyUpdate without content", {{22, "\x18\0\0\0", 4}}, -2, "decode error"},
                {"a KeyUpdate of another kind", {{22, "\x18\0\0\1\2", 5}}, -2, "illegal parameter"},
                {"a record under the old key", {{22, "\x18\0\0\1\0", 5}, {23, "hello", 5}}, -2, "bad record mac"},
                {"a message that never ends", {{22, "\4\xff\xff\xff", 4}}, -2, "illegal parameter"},
                {"a request for a certificate", {{22, "\x0d\0\0\0", 4}}, -2, "unexpected_message"},
                {"a ClientHello", {{22, "\1\0\0\0", 4}}, -2, "unexpected_message"},
                {"no handshake message", {{22, "", 0}}, -2, "unexpected_message"},
                {"ChangeCipherSpec", {{20, "\1", 1}}, -2, "unexpected_message"},
                {"a type that is none", {{99, "?", 1}}, -2, "unexpected_message"},
                {"zeros alone", {{0, "\0\0\0", 3}}, -2, "unexpected_message"},
                {"close_notify", {{21, "\1\0", 2}}, -1, NULL},
                {"close_notify, then data", {{21, "\1\0", 2}, {23, "hello", 5}}, -1, NULL},
                {"user_canceled", {{21, "\1\x5a", 2}}, 0, NULL},
                {"another alert", {{21, "\2\x30", 2}}, -2, "peer: unknown CA (48)"},
                {"an alert that OpenSSL has no name for", {{21, "\2\x74", 2}}, -2, "peer: unknown (116)"},
                {"an alert without content", {{21, "", 0}}, -2, "unexpected_message"},
                {"an alert of one byte", {{21, "\1", 1}}, -2, "decode error"},
                {"two alerts in a record", {{21, "\1\0\1\0", 4}}, -2, "decode error"},
        };
        (void)unused;
        for (size_t c = 0; c < 2 * sizeof(cases) / sizeof(*cases); c++) {
                struct twins w;
                uint8_t got[64];
                char text[64];
                size_t have, i = c / 2;
                struct tls *from = c & 1 ? &w.client : &w.server, *to = c & 1 ? &w.server : &w.client;
                int expected = cases[i].result;
                const char *error = cases[i].error;
                if (c & 1 && cases[i].records[0].type == CONTENT_HANDSHAKE && cases[i].records[0].bytes[0] == 4) {
                        expected = -2;
                        error = NULL;
                }
                meet_twin(&w);
                for (int r = 0; r < 3 && (cases[i].records[r].type || cases[i].records[r].n); r++)
                        assert_true(record_seal(&from->tx, &from->out, cases[i].records[r].type,
                                                cases[i].records[r].bytes, cases[i].records[r].n));
                move(from, to);
                int result = hear(to, got, sizeof(got), &have);
                tls_error(to, text, sizeof(text));
                print_message("%s: %d, %s\n", cases[i].name, result, result == -2 ? text : "no error");
                assert_int_equal(result, expected);
                assert_int_equal(have, i == 0 ? 5 : 0);
                if (error)
                        assert_string_equal(text, error);
                /* an error is told, but not to one who told of one */
                assert_int_equal(to->out.len > 0, result == -2 && strncmp(text, "peer", 4) != 0);
                part_twin(&w);
        }
}

/* As long as a ticket may be; longer ones are none. */
static void test_large_tickets(void **unused)
{
        static const size_t lengths[] = {20000, 131338, 131339};
        static uint8_t ticket[4 + 131339];
        (void)unused;
        for (unsigned i = 0; i < 3; i++) {
                struct twins w;
                const uint8_t *plain;
                char text[64];
                size_t len = 4 + lengths[i], n;
                meet_twin(&w);
                memcpy(ticket,
                       (uint8_t[]){4, (uint8_t)(lengths[i] >> 16), (uint8_t)(lengths[i] >> 8), (uint8_t)lengths[i]}, 4);
                for (size_t at = 0; at < len; at += n) {
                        n = len - at < RECORD_PLAIN ? len - at : RECORD_PLAIN;
                        assert_true(record_seal(&w.server.tx, &w.server.out, CONTENT_HANDSHAKE, ticket + at, n));
                }
                move(&w.server, &w.client);
                assert_int_equal(tls_read(&w.client, &plain), i == 2 ? -2 : 0);
                if (i == 2)
                        assert_string_equal(tls_error(&w.client, text, sizeof(text)), "illegal parameter");
                assert_int_equal(w.client.message.len == 0, i < 2);
                part_twin(&w);
        }
}

static void test_lengths_that_do_not_belong(void **unused)
{
        static const struct {
                uint8_t header[5];
                int result;
                const char *error;
        } cases[] = {
                {{23, 3, 3, 0x41, 0x00}, 0, NULL}, /* the most that may be: it waits */
                {{23, 3, 3, 0x41, 0x01}, -2, "record overflow"},
                {{23, 3, 3, 0xff, 0xff}, -2, "record overflow"},
                {{23, 3, 3, 0, 16}, -2, "bad record mac"},
                {{23, 3, 3, 0, 0}, -2, "bad record mac"},
                {{21, 3, 3, 0, 2}, -2, "unexpected_message"}, /* in clear text */
                {{20, 3, 3, 0, 1}, -2, "unexpected_message"},
                {{22, 3, 3, 0, 5}, -2, "unexpected_message"},
                {{'G', 'E', 'T', ' ', '/'}, -2, "unexpected_message"},
        };
        (void)unused;
        for (size_t c = 0; c < sizeof(cases) / sizeof(*cases); c++) {
                struct twins w;
                const uint8_t *plain;
                char text[64];
                meet_twin(&w);
                assert_true(buf_add(&w.server.in, cases[c].header, 5));
                assert_int_equal(tls_read(&w.server, &plain), cases[c].result);
                if (cases[c].error)
                        assert_string_equal(tls_error(&w.server, text, sizeof(text)), cases[c].error);
                part_twin(&w);
        }
}

/* Once more, in another order, left out, sent back: a nonce is of one record and one direction. */
static void test_order(void **unused)
{
        (void)unused;
        for (int k = 0; k < 5; k++) {
                struct twins w;
                uint8_t got[64];
                uint64_t updates = 0;
                size_t have, n;
                meet_twin(&w);
                for (int r = 0; r < 3; r++)
                        assert_int_equal(tls_write(&w.client, &"abc"[r], 1, &updates), 0);
                n = w.client.out.len / 3;
                uint8_t *record = buf_at(&w.client.out);
                static const int orders[][3] = {{0, 1, 2}, {0, 0, 1}, {1, 0, 2}, {0, 2, 1}};
                struct tls *to = k == 4 ? &w.client : &w.server;
                for (int r = 0; r < 3; r++)
                        assert_true(buf_add(&to->in, record + (size_t)orders[k % 4][r] * n, n));
                int result = hear(to, got, sizeof(got), &have);
                assert_int_equal(result, k == 0 ? 0 : -2);
                assert_int_equal(have, k == 0 ? 3 : k == 1 || k == 3 ? 1 : 0);
                assert_memory_equal(got, "abc", have);
                part_twin(&w);
        }
}

/* Records that bring nothing are bounded, of each kind and mixed; data begins the count anew. */
static void test_nothing_for_ever(void **unused)
{
        static const char request[] = "\x18\0\0\1\1";
        (void)unused;
        for (int kind = 0; kind < 4; kind++)
                for (int rounds = 1; rounds <= 3; rounds++) {
                        struct twins w;
                        uint8_t got[64];
                        uint64_t updates = 0;
                        size_t have;
                        int result = 0, most = rounds == 3 ? 33 : 32;
                        meet_twin(&w);
                        for (int round = 0; round < rounds; round++) {
                                for (int n = 0; n < most; n++) {
                                        int k = kind == 3 ? n % 3 : kind;
                                        assert_true(record_seal(&w.server.tx, &w.server.out,
                                                                k == 0 ? CONTENT_DATA : CONTENT_HANDSHAKE,
                                                                k == 1 ? TICKET : request,
                                                                k == 0   ? 0
                                                                : k == 1 ? 9
                                                                         : 5));
                                        if (k == 2)
                                                assert_true(traffic_update(&w.server.tx));
                                }
                                assert_int_equal(tls_write(&w.server, "x", 1, &updates), 0);
                                move(&w.server, &w.client);
                                result = hear(&w.client, got, sizeof(got), &have);
                                if (result == -2)
                                        break;
                                assert_int_equal(have, 1);
                                assert_true(w.client.out.len <= 32 * 64);
                                assert_int_equal(tls_write(&w.client, "y", 1, &updates), 0);
                                move(&w.client, &w.server);
                                assert_int_equal(hear(&w.server, got, sizeof(got), &have), 0);
                                assert_int_equal(have, 1);
                        }
                        assert_int_equal(result, most == 33 ? -2 : 0);
                        part_twin(&w);
                }
}

/* Who asks for new keys again and again, and reads nothing, fills no memory: one answer, before the next data. */
static void test_many_requests_have_one_answer(void **unused)
{
        struct twins w;
        uint8_t got[64], first[48];
        uint64_t updates = 0;
        size_t have;
        (void)unused;
        meet_twin(&w);
        memcpy(first, w.server.tx.secret, sizeof(first));
        for (int n = 0; n < 2000; n++) {
                new_key(&w.client, true);
                assert_int_equal(tls_write(&w.client, "x", 1, &updates), 0);
                move(&w.client, &w.server);
                assert_int_equal(hear(&w.server, got, sizeof(got), &have), 0);
                assert_int_equal(have, 1);
                assert_true(w.server.out.len <= 64);
        }
        for (int n = 0; n < 2; n++)
                assert_int_equal(tls_write(&w.server, "y", 1, &updates), 0);
        assert_memory_not_equal(w.server.tx.secret, first, 32);
        assert_int_equal(w.server.tx.records, 2);
        move(&w.server, &w.client);
        assert_int_equal(hear(&w.client, got, sizeof(got), &have), 0);
        assert_int_equal(have, 2);
        assert_memory_equal(w.server.tx.secret, w.client.rx.secret, 32);
        assert_int_equal(updates, 0); /* the count is of those that we begin */
        part_twin(&w);
}

/* A change of keys that fails at each of its allocations: what was sealed opens in its order, and nothing is sealed
 * under a key that was to be left, where the count of records could begin anew. */
static void test_change_of_keys_without_memory(void **unused)
{
        (void)unused;
        for (int asked = 0; asked < 2; asked++) {
                int result = -1, most = 0;
                for (; result < 0; most++) {
                        struct twins w;
                        uint8_t got[64];
                        char text[64];
                        uint64_t updates = 0;
                        size_t have;
                        assert_true(most < 1000);
                        meet_twin(&w);
                        assert_int_equal(tls_write(&w.server, "x", 1, &updates), 0);
                        move(&w.server, &w.client);
                        assert_int_equal(hear(&w.client, got, sizeof(got), &have), 0);
                        if (asked)
                                new_key(&w.client, true);
                        else
                                w.server.tx.records = w.client.rx.records = 1u << 23;
                        move(&w.client, &w.server);
                        allocations = most;
                        result = hear(&w.server, got, sizeof(got), &have);
                        if (result == 0)
                                result = tls_write(&w.server, "y", 1, &updates);
                        tls_end(&w.server);
                        allocations = -1;
                        move(&w.server, &w.client);
                        int heard = hear(&w.client, got, sizeof(got), &have);
                        tls_error(&w.client, text, sizeof(text));
                        assert_string_not_equal(heard == -2 ? text : "", "bad record mac");
                        assert_int_equal(have, result == 0);
                        if (result == 0)
                                assert_int_equal(heard, -1);
                        part_twin(&w);
                }
                print_message("%d allocations\n", most - 1);
                assert_true(most > 5);
        }
}

/* The keys change by themselves before AES-GCM's limit. */
static void test_key_update_by_count(void **unused)
{
        struct twins w;
        uint64_t updates = 0;
        uint8_t first[48], got[64];
        size_t have;
        (void)unused;
        meet_twin(&w);
        memcpy(first, w.client.tx.secret, sizeof(first));
        w.client.tx.records = w.server.rx.records = (1u << 23) - 2;
        for (unsigned n = 0; n < 4; n++) {
                assert_int_equal(tls_write(&w.client, "x", 1, &updates), 0);
                assert_int_equal(updates, n < 2 ? 0 : 1);
                assert_int_equal(memcmp(first, w.client.tx.secret, 32) != 0, n >= 2);
                move(&w.client, &w.server);
                assert_int_equal(hear(&w.server, got, sizeof(got), &have), 0);
                assert_int_equal(have, 1);
                assert_memory_equal(w.client.tx.secret, w.server.rx.secret, sizeof(first));
        }
        assert_int_equal(w.client.tx.records, 2);
        part_twin(&w);
}

/* Whatever comes in place of records, nothing is given out and nothing is read beyond it. */
static void test_noise(void **unused)
{
        (void)unused;
        for (int n = 0; n < 400; n++) {
                struct twins w;
                uint8_t noise[600], got[64];
                size_t have, len = 1 + roll(sizeof(noise));
                meet_twin(&w);
                fill(noise, len);
                if (n & 1 && len > 5)
                        memcpy(noise, (uint8_t[]){23, 3, 3, 0, (uint8_t)roll(256)}, 5);
                uint8_t *exact = malloc(len); /* so that a sanitizer sees its end */
                memcpy(exact, noise, len);
                buf_free(&w.server.in);
                w.server.in = (struct buf){.bytes = exact, .len = len, .cap = len};
                int result = hear(&w.server, got, sizeof(got), &have);
                assert_true(result == 0 || result == -2);
                assert_int_equal(have, 0);
                w.server.in = (struct buf){0};
                free(exact);
                part_twin(&w);
        }
}

/* Neither traffic secrets nor keys are left in a connection that was closed. */
static void test_secrets_are_wiped(void **unused)
{
        static const struct traffic none;
        struct twins w;
        (void)unused;
        meet_twin(&w);
        assert_memory_equal(w.client.tx.secret, w.server.rx.secret, 32);
        assert_memory_not_equal(w.client.tx.secret, w.client.rx.secret, 32);
        assert_memory_not_equal(w.client.tx.secret, none.secret, 32);
        part_twin(&w);
        assert_memory_equal(&w.client.tx, &none, sizeof(none));
        assert_memory_equal(&w.client.rx, &none, sizeof(none));
}

static int set_up(void **unused)
{
        (void)unused;
        credentials(&key_pem, &cert_pem);
        return identity_new(&id, URI, key_pem, cert_pem, cert_pem);
}

static int tear_down(void **unused)
{
        (void)unused;
        identity_unref(id);
        free(key_pem);
        free(cert_pem);
        return 0;
}

int main(void)
{
        assert_int_equal(CRYPTO_set_mem_functions(get, grow, give), 1);
        const struct CMUnitTest tests[] = {
                cmocka_unit_test(test_with_plain_openssl),
                cmocka_unit_test(test_padding_is_taken_off),
                cmocka_unit_test(test_key_update_by_count),
                cmocka_unit_test(test_ends),
                cmocka_unit_test(test_what_changed_on_the_way),
                cmocka_unit_test(test_what_does_not_belong),
                cmocka_unit_test(test_lengths_that_do_not_belong),
                cmocka_unit_test(test_order),
                cmocka_unit_test(test_nothing_for_ever),
                cmocka_unit_test(test_noise),
                cmocka_unit_test(test_secrets_are_wiped),
                cmocka_unit_test(test_small_fragments),
                cmocka_unit_test(test_large_tickets),
                cmocka_unit_test(test_many_requests_have_one_answer),
                cmocka_unit_test(test_hello_retry),
                cmocka_unit_test(test_a_hasty_server),
                cmocka_unit_test(test_a_certificate_that_is_refused),
                cmocka_unit_test(test_change_of_keys_without_memory),
        };
        return cmocka_run_group_tests(tests, set_up, tear_down);
}
