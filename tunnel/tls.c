/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Theory of operation
 *
 * OpenSSL sees two buffers through a BIO of ours and never a socket: the loop fills `in` with one large recv() and
 * empties `out` with one send() for many records. TLS 1.3 only, AES-GCM only, certificates on both sides, no tickets,
 * no resumption, no early data: a ticket would hold the leaf and not the chain, and the checks could not be repeated.
 * Host names play no part; who the peer is, is its SPIFFE URI.
 *
 * An SSL_CTX serves both roles: the purpose of the peer's certificate (clientAuth, serverAuth) is checked by OpenSSL
 * according to the role.
 *
 * The handshake is OpenSSL's; what comes after it is ours (tls_record.c). OpenSSL hands its traffic secrets out in one
 * way, the callback that is meant for key logs; here they go into the connection and nowhere else. It reads no byte
 * beyond the handshake's last record (no read_ahead), so the first of ours is where it stopped, with the number 0 in
 * both directions: a server without tickets has sent nothing under these keys. If any of that were not so, the first
 * record would not open and the connection fail.
 *
 * What remains of TLS then (RFC 8446 4.6, 5, 6): KeyUpdate, which is sent every 2^23 records (below the limit of 5.5)
 * and answered before the next data, once, however often it came: a peer that asks and does not read must not fill
 * `out`; tickets of a server, which are thrown away; alerts. All else ends the connection with an alert, as do 32
 * records in a row that bring no data. A client that wants smaller records (RFC 6066 4; OpenSSL agrees) gets them.
 */
#include <errno.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <pthread.h>
#include <stdio.h>
#include "gcm.h"
#include "tls.h"

#define KEY_UPDATE_RECORDS (1u << 23)
#define IDLE_MOST 32
#define MESSAGE_MOST 131338 /* a ticket of greatest length: servers put the client's chain into it */

static BIO_METHOD *method;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static int bio_read(BIO *bio, char *to, int n)
{
        struct tls *t = BIO_get_data(bio);
        BIO_clear_retry_flags(bio);
        if (t->in.len == 0) {
                BIO_set_retry_read(bio);
                return -1;
        }
        if ((size_t)n > t->in.len)
                n = (int)t->in.len;
        memcpy(to, buf_at(&t->in), (size_t)n);
        buf_take(&t->in, (size_t)n);
        return n;
}

static int bio_write(BIO *bio, const char *from, int n)
{
        struct tls *t = BIO_get_data(bio);
        BIO_clear_retry_flags(bio);
        return buf_add(&t->out, from, (size_t)n) ? n : -1;
}

static long bio_ctrl(BIO *bio, int command, long number, void *pointer)
{
        (void)bio, (void)number, (void)pointer;
        return command == BIO_CTRL_FLUSH;
}

static int bio_create(BIO *bio)
{
        BIO_set_init(bio, 1);
        return 1;
}

static void make_method(void)
{
        method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "sidestep");
        if (!method)
                abort();
        BIO_meth_set_read(method, bio_read);
        BIO_meth_set_write(method, bio_write);
        BIO_meth_set_ctrl(method, bio_ctrl);
        BIO_meth_set_create(method, bio_create);
}

bool spiffe_trust_domain(const char *uri, char *out, size_t n)
{
        if (strncmp(uri, "spiffe://", 9) != 0)
                return false;
        const char *td = uri + 9, *ns = strchr(td, '/');
        if (!ns || ns == td || (size_t)(ns - td) >= n || strncmp(ns, "/ns/", 4) != 0)
                return false;
        const char *name = ns + 4, *sa = strchr(name, '/');
        if (!sa || sa == name || strncmp(sa, "/sa/", 4) != 0 || !sa[4] || strchr(sa + 4, '/'))
                return false;
        memcpy(out, td, (size_t)(ns - td));
        out[ns - td] = 0;
        return true;
}

/* The certificate's one URI SAN; NULL or what is wrong. A name with a NUL inside is no name. */
static const char *spiffe_of(X509 *cert, char uri[TLS_URI_MAX])
{
        GENERAL_NAMES *names = X509_get_ext_d2i(cert, NID_subject_alt_name, NULL, NULL);
        const char *wrong = "certificate without SPIFFE identity";
        int found = 0;
        char td[256];
        for (int i = 0; names && i < sk_GENERAL_NAME_num(names); i++) {
                const GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);
                if (name->type != GEN_URI)
                        continue;
                const ASN1_IA5STRING *s = name->d.uniformResourceIdentifier;
                size_t n = (size_t)ASN1_STRING_length(s);
                if (++found > 1 || n >= TLS_URI_MAX || memchr(ASN1_STRING_get0_data(s), 0, n)) {
                        wrong = found > 1 ? "certificate with more than one URI identity"
                                          : "certificate with a bad identity";
                        found = 2;
                        break;
                }
                memcpy(uri, ASN1_STRING_get0_data(s), n);
                uri[n] = 0;
        }
        GENERAL_NAMES_free(names);
        if (found != 1)
                return wrong;
        return spiffe_trust_domain(uri, td, sizeof(td))
                       ? NULL
                       : "certificate with an identity that is not spiffe://TD/ns/NS/sa/SA";
}

static int64_t not_after(const X509 *cert)
{
        struct tm tm;
        return ASN1_TIME_to_tm(X509_get0_notAfter(cert), &tm) == 1 ? (int64_t)timegm(&tm) : 0;
}

/* SHA-256 of the certificate; nothing else has the digest of zeros that a failure leaves. */
static void digest(const X509 *cert, uint8_t out[TLS_DIGEST])
{
        unsigned n = 0;
        memset(out, 0, TLS_DIGEST);
        X509_digest(cert, EVP_sha256(), out, &n);
}

static int select_h2(SSL *ssl, const unsigned char **out, unsigned char *outlen, const unsigned char *in,
                     unsigned int inlen, void *arg)
{
        (void)ssl, (void)arg;
        return SSL_select_next_proto((unsigned char **)out, outlen, (const unsigned char *)"\x02h2", 3, in, inlen) ==
                               OPENSSL_NPN_NEGOTIATED
                       ? SSL_TLSEXT_ERR_OK
                       : SSL_TLSEXT_ERR_ALERT_FATAL;
}

/* Every certificate of a PEM text, in order. Owner: the caller. */
static STACK_OF(X509) * read_pem(const char *pem)
{
        STACK_OF(X509) *all = sk_X509_new_null();
        BIO *bio = BIO_new_mem_buf(pem, -1);
        while (bio && all) {
                X509 *cert = X509_new_ex(gcm_libctx(), NULL);
                if (!cert || !PEM_read_bio_X509(bio, &cert, NULL, NULL) || !sk_X509_push(all, cert)) {
                        X509_free(cert);
                        break;
                }
        }
        BIO_free(bio);
        ERR_clear_error(); /* the end of the text is an error to PEM_read */
        return all;
}

/* "LABEL client_random secret" in hexadecimal digits, once for each secret of a handshake. */
static void take_secret(const SSL *ssl, const char *line)
{
        static const char *const labels[] = {"SERVER_TRAFFIC_SECRET_0 ", "CLIENT_TRAFFIC_SECRET_0 "};
        struct tls *t = SSL_get_app_data(ssl);
        for (unsigned of_client = 0; of_client < 2; of_client++) {
                size_t n = strlen(labels[of_client]);
                const char *digits = strrchr(line, ' ');
                if (strncmp(line, labels[of_client], n) != 0)
                        continue;
                struct traffic *to = t->server == of_client ? &t->rx : &t->tx;
                size_t size = 0;
                if (OPENSSL_hexstr2buf_ex(to->secret, sizeof(to->secret), &size, digits + 1, '\0') == 1)
                        to->size = (unsigned)size;
        }
}

static int configure(SSL_CTX *ctx)
{
        static const unsigned char h2[] = "\x02h2";
        SSL_CTX_set_options(ctx, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE);
        SSL_CTX_set_read_ahead(ctx, 0);
        SSL_CTX_set_keylog_callback(ctx, take_secret);
        SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
        SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
        SSL_CTX_set_alpn_select_cb(ctx, select_h2, NULL);
        return SSL_CTX_set_min_proto_version(ctx, TLS1_3_VERSION) == 1 && SSL_CTX_set_num_tickets(ctx, 0) == 1 &&
               SSL_CTX_set_ciphersuites(ctx, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384") == 1 &&
               SSL_CTX_set_alpn_protos(ctx, h2, sizeof(h2) - 1) == 0;
}

int identity_new(struct identity **out, const char *uri, const char *key_pem, const char *chain_pem,
                 const char *roots_pem)
{
        int result = -ENOMEM;
        struct identity *i = calloc(1, sizeof(*i));
        STACK_OF(X509) *chain = read_pem(chain_pem), *roots = read_pem(roots_pem);
        BIO *bio = BIO_new_mem_buf(key_pem, -1);
        EVP_PKEY *key = bio ? PEM_read_bio_PrivateKey_ex(bio, NULL, NULL, NULL, gcm_libctx(), NULL) : NULL;
        char own[TLS_URI_MAX];
        BIO_free(bio);
        if (!i || !chain || !roots)
                goto out;
        result = -EBADMSG;
        if (!key || sk_X509_num(chain) < 1 || sk_X509_num(roots) < 1)
                goto out;
        X509 *leaf = sk_X509_value(chain, 0);
        result = -EKEYREJECTED;
        if (spiffe_of(leaf, own) || strcmp(own, uri) != 0 || X509_check_private_key(leaf, key) != 1)
                goto out;
        result = -ENOMEM;
        i->ctx = SSL_CTX_new_ex(gcm_libctx(), gcm_query(), TLS_method());
        i->uri = strdup(uri);
        if (!i->ctx || !i->uri || !configure(i->ctx))
                goto out;
        spiffe_trust_domain(uri, i->trust_domain, sizeof(i->trust_domain));
        i->not_after_s = INT64_MAX;
        for (int n = 0; n < sk_X509_num(chain); n++) {
                int64_t end = not_after(sk_X509_value(chain, n));
                if (end < i->not_after_s)
                        i->not_after_s = end;
        }
        result = -EKEYEXPIRED;
        if (i->not_after_s <= (int64_t)time(NULL))
                goto out;
        result = -EKEYREJECTED;
        if (SSL_CTX_use_certificate(i->ctx, leaf) != 1 || SSL_CTX_use_PrivateKey(i->ctx, key) != 1)
                goto out;
        for (int n = 1; n < sk_X509_num(chain); n++) /* after the leaf: they go to the key that was set last */
                if (SSL_CTX_add1_chain_cert(i->ctx, sk_X509_value(chain, n)) != 1)
                        goto out;
        i->roots = calloc((size_t)sk_X509_num(roots), sizeof(*i->roots));
        result = -ENOMEM;
        if (!i->roots)
                goto out;
        for (int n = 0; n < sk_X509_num(roots); n++) {
                X509_STORE_add_cert(SSL_CTX_get_cert_store(i->ctx),
                                    sk_X509_value(roots, n)); /* twice the same is no error */
                digest(sk_X509_value(roots, n), i->roots[i->nroots++]);
        }
        BIGNUM *serial = ASN1_INTEGER_to_BN(X509_get0_serialNumber(leaf), NULL);
        char *digits = serial ? BN_bn2dec(serial) : NULL;
        snprintf(i->serial, sizeof(i->serial), "%s", digits ? digits : "");
        OPENSSL_free(digits);
        BN_free(serial);
        atomic_init(&i->refs, 1);
        *out = i;
        i = NULL;
        result = 0;
out:
        ERR_clear_error();
        EVP_PKEY_free(key);
        sk_X509_pop_free(chain, X509_free);
        sk_X509_pop_free(roots, X509_free);
        if (i) {
                SSL_CTX_free(i->ctx);
                free(i->roots);
                free(i->uri);
                free(i);
        }
        return result;
}

struct identity *identity_ref(struct identity *i)
{
        atomic_fetch_add_explicit(&i->refs, 1, memory_order_relaxed);
        return i;
}

void identity_unref(struct identity *i)
{
        if (!i || atomic_fetch_sub(&i->refs, 1) != 1)
                return;
        SSL_CTX_free(i->ctx);
        free(i->roots);
        free(i->uri);
        free(i);
}

bool identity_trusts(const struct identity *i, const uint8_t root[TLS_DIGEST])
{
        for (unsigned n = 0; n < i->nroots; n++)
                if (memcmp(i->roots[n], root, TLS_DIGEST) == 0)
                        return true;
        return false;
}

int tls_open(struct tls *t, struct identity *i, bool server)
{
        pthread_once(&once, make_method);
        *t = (struct tls){.ssl = SSL_new(i->ctx), .server = server, .most = RECORD_PLAIN};
        BIO *bio = BIO_new(method);
        if (!t->ssl || !bio) {
                SSL_free(t->ssl);
                BIO_free(bio);
                t->ssl = NULL;
                return -ENOMEM;
        }
        BIO_set_data(bio, t);
        SSL_set_bio(t->ssl, bio, bio);
        SSL_set_app_data(t->ssl, t);
        if (server)
                SSL_set_accept_state(t->ssl);
        else
                SSL_set_connect_state(t->ssl);
        return 0;
}

void tls_settle(struct tls *t)
{
        SSL_free(t->ssl);
        t->ssl = NULL;
}

void tls_close(struct tls *t)
{
        tls_settle(t);
        traffic_free(&t->rx);
        traffic_free(&t->tx);
        buf_free(&t->in);
        buf_free(&t->out);
        buf_free(&t->message);
}

int tls_handshake(struct tls *t)
{
        ERR_clear_error();
        int n = SSL_do_handshake(t->ssl);
        if (n != 1)
                return SSL_get_error(t->ssl, n) == SSL_ERROR_WANT_READ ? 0 : -1;
        if (SSL_has_pending(t->ssl) || !traffic_set(&t->rx, t->rx.secret, t->rx.size, false) ||
            !traffic_set(&t->tx, t->tx.secret, t->tx.size, true)) {
                snprintf(t->wrong, sizeof(t->wrong), "no traffic keys from OpenSSL");
                return -1;
        }
        unsigned mode = SSL_SESSION_get_max_fragment_length(SSL_get0_session(t->ssl));
        if (mode)
                t->most = (size_t)256 << mode; /* 512 to 4096 */
        return 1;
}

const char *tls_peer(struct tls *t, char uri[TLS_URI_MAX], int64_t *not_after_s, uint8_t root[TLS_DIGEST])
{
        const unsigned char *alpn;
        unsigned int n;
        SSL_get0_alpn_selected(t->ssl, &alpn, &n);
        if (n != 2 || memcmp(alpn, "h2", 2) != 0)
                return "peer does not speak h2";
        X509 *cert = SSL_get0_peer_certificate(t->ssl);
        STACK_OF(X509) *chain = SSL_get0_verified_chain(t->ssl);
        if (!cert || !chain || SSL_get_verify_result(t->ssl) != X509_V_OK)
                return "peer's certificate is not verified";
        *not_after_s = INT64_MAX;
        for (int i = 0; i < sk_X509_num(chain); i++) {
                int64_t end = not_after(sk_X509_value(chain, i));
                if (end < *not_after_s)
                        *not_after_s = end;
        }
        digest(sk_X509_value(chain, sk_X509_num(chain) - 1), root);
        return spiffe_of(cert, uri);
}

/* -- after the handshake ------------------------------------------------------------------------------------------ */

static bool seal_alert(struct tls *t, uint8_t level, uint8_t alert)
{
        return record_seal(&t->tx, &t->out, CONTENT_ALERT, (uint8_t[]){level, alert}, 2);
}

/* Ends the connection with an alert. -2. */
static int fail(struct tls *t, int alert)
{
        snprintf(t->wrong, sizeof(t->wrong), "%s", SSL_alert_desc_string_long(alert));
        t->failed = true;
        seal_alert(t, SSL3_AL_FATAL, (uint8_t)alert);
        return -2;
}

/* The peer's alert. 0: of no consequence; -1, -2: tls_read(). */
static int alerted(struct tls *t, const struct content *c)
{
        if (c->n != 2)
                return fail(t, c->n ? TLS1_AD_DECODE_ERROR : SSL3_AD_UNEXPECTED_MESSAGE);
        if (c->bytes[1] == TLS1_AD_USER_CANCELLED)
                return 0;
        if (c->bytes[1] == SSL3_AD_CLOSE_NOTIFY) {
                t->ended = true;
                return -1;
        }
        snprintf(t->wrong, sizeof(t->wrong), "peer: %s (%u)", SSL_alert_desc_string_long(c->bytes[1]),
                 c->bytes[1]); /* OpenSSL 3.0 has no name for certificate_required */
        t->failed = true;
        return -2;
}

static bool update_key(struct tls *t)
{
        static const uint8_t message[] = {SSL3_MT_KEY_UPDATE, 0, 0, 1, SSL_KEY_UPDATE_NOT_REQUESTED};
        t->asked = false;
        return record_seal(&t->tx, &t->out, CONTENT_HANDSHAKE, message, sizeof(message)) && traffic_update(&t->tx);
}

/* Messages of the handshake's kind, from one record or several. 0 or an alert. */
static int post_handshake(struct tls *t, const struct content *c)
{
        if (c->n == 0)
                return SSL3_AD_UNEXPECTED_MESSAGE;
        if (!buf_add(&t->message, c->bytes, c->n))
                return TLS1_AD_INTERNAL_ERROR;
        while (t->message.len >= 4) {
                const uint8_t *m = buf_at(&t->message);
                size_t n = (size_t)m[1] << 16 | (size_t)m[2] << 8 | m[3];
                if (m[0] != SSL3_MT_KEY_UPDATE && (m[0] != SSL3_MT_NEWSESSION_TICKET || t->server))
                        return SSL3_AD_UNEXPECTED_MESSAGE;
                if (n > MESSAGE_MOST)
                        return SSL3_AD_ILLEGAL_PARAMETER;
                if (t->message.len < 4 + n)
                        return 0;
                if (m[0] == SSL3_MT_KEY_UPDATE) {
                        if (n != 1)
                                return TLS1_AD_DECODE_ERROR;
                        if (m[4] > SSL_KEY_UPDATE_REQUESTED)
                                return SSL3_AD_ILLEGAL_PARAMETER;
                        if (t->message.len > 5) /* the next record has another key */
                                return SSL3_AD_UNEXPECTED_MESSAGE;
                        if (!traffic_update(&t->rx))
                                return TLS1_AD_INTERNAL_ERROR;
                        if (m[4] == SSL_KEY_UPDATE_REQUESTED)
                                t->asked = true;
                }
                buf_take(&t->message, 4 + n);
        }
        return 0;
}

int tls_read(struct tls *t, const uint8_t **plain)
{
        while (!t->failed) {
                struct content c;
                int result;
                if (t->opened)
                        buf_take(&t->in, t->opened);
                t->opened = 0;
                if (t->ended)
                        return -1;
                if (t->in.len == 0)
                        return 0;
                int n = record_open(&t->rx, buf_at(&t->in), t->in.len, &c);
                if (n < 0)
                        return fail(t, -n);
                if (n == 0)
                        return 0;
                t->opened = (size_t)n;
                if (t->message.len && c.type != CONTENT_HANDSHAKE)
                        return fail(t, SSL3_AD_UNEXPECTED_MESSAGE);
                if (c.type == CONTENT_DATA && c.n) {
                        t->idle = 0;
                        *plain = c.bytes;
                        return (int)c.n;
                }
                if (++t->idle > IDLE_MOST)
                        return fail(t, SSL3_AD_UNEXPECTED_MESSAGE);
                switch (c.type) {
                case CONTENT_DATA:
                        break;
                case CONTENT_ALERT:
                        if ((result = alerted(t, &c)) < 0)
                                return result;
                        break;
                case CONTENT_HANDSHAKE:
                        if ((result = post_handshake(t, &c)) > 0)
                                return fail(t, result);
                        break;
                default:
                        return fail(t, SSL3_AD_UNEXPECTED_MESSAGE);
                }
        }
        return -2;
}

/* One record, under a new key where one is due. */
static bool put(struct tls *t, const uint8_t *plain, size_t n, uint64_t *key_updates)
{
        bool due = t->tx.records >= KEY_UPDATE_RECORDS;
        if ((due || t->asked) && !update_key(t))
                return false;
        *key_updates += due;
        return record_seal(&t->tx, &t->out, CONTENT_DATA, plain, n);
}

int tls_write(struct tls *t, const void *plain, size_t n, uint64_t *key_updates)
{
        const uint8_t *at = plain;
        for (size_t part; n > 0 && !t->failed; at += part, n -= part) {
                part = n < t->most ? n : t->most;
                t->failed = !put(t, at, part, key_updates);
        }
        return t->failed ? -1 : 0;
}

void tls_end(struct tls *t)
{
        if (t->tx.cipher && !t->failed)
                seal_alert(t, SSL3_AL_WARNING, SSL3_AD_CLOSE_NOTIFY);
}

const char *tls_error(const struct tls *t, char *text, size_t n)
{
        unsigned long code = ERR_peek_last_error();
        const char *reason = code ? ERR_reason_error_string(code) : NULL;
        snprintf(text, n, "%s", *t->wrong ? t->wrong : reason ? reason : "TLS failed");
        return text;
}
