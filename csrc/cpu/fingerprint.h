// The fingerprint of a weight's bits (lowrank/fingerprint.py), as much of it as there is of the weight at a time.
#pragma once
#include <cstdint>

namespace knowedit {

// Adds to sums [count, 2] what the next `bytes` of as many rows give; keys[0] belongs to their first lane. All but the
// last bytes of a row are whole lanes, of eight.
using RowSums = void (*)(const char* rows, int64_t stride, int64_t count, const uint64_t* keys, int64_t bytes,
                         uint64_t* sums);
RowSums row_sums();  // for this machine

// Adds to a fingerprint [2] what rows first .. first + count - 1 of the weight come to, by their sums.
void add_rows(const uint64_t* sums, int64_t first, int64_t count, uint64_t* total);

}  // namespace knowedit
