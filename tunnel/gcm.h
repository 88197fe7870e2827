/* SPDX-License-Identifier: Apache-2.0 */
/* AES-GCM for TLS records, by libipsec-mb where that is there and faster, else OpenSSL's own. */
#ifndef SIDESTEP_GCM_H
#define SIDESTEP_GCM_H

#include <openssl/types.h>

/* What fetches an algorithm by these two has AES-128-GCM and AES-256-GCM of libipsec-mb, everything else of OpenSSL.
 * Both NULL, OpenSSL's defaults, where libipsec-mb is not used. Of the process, never freed; any thread. */
OSSL_LIB_CTX *gcm_libctx(void);
const char *gcm_query(void);
/* Which one is in use, and why not the other; "OpenSSL (...)" or "libipsec-mb 1.3.0". */
const char *gcm_name(void);
/* Contexts with a key that libipsec-mb has now; two a TLS connection. */
unsigned gcm_contexts(void);

#endif
