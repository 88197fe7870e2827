/* SPDX-License-Identifier: Apache-2.0 */
/* Chance that is the same in every run. */
#ifndef SIDESTEP_TEST_DICE_H
#define SIDESTEP_TEST_DICE_H

#include <stddef.h>
#include <stdint.h>

static uint64_t dice = 20260101;

/* Less than n. */
static unsigned roll(unsigned n)
{
        dice = dice * 6364136223846793005ull + 1442695040888963407ull;
        return (unsigned)(dice >> 33) % n;
}

static void fill(uint8_t *to, size_t n)
{
        for (size_t i = 0; i < n; i++)
                to[i] = (uint8_t)roll(256);
}

#endif
