// What is active in a few rows of x, for the C++ kernels that read the weights of that alone.

#pragma once

#include <cstdint>
#include <vector>

namespace {

constexpr long GROUP = 8;  // rows of x at once
constexpr long BATCH = 8;  // rows of w at once

// What is active in up to GROUP rows: entries, ascending, and their values in each row, zero where a
// row has not chosen them; padded with zeros to whole batches.
struct Active {
  std::vector<int32_t> index;
  std::vector<float> value;  // [batches, GROUP, BATCH]
  std::vector<uint8_t> any;
  long count = 0;

  float of(long n, long row) const { return value[(n / BATCH * GROUP + row) * BATCH + n % BATCH]; }
};

}  // namespace
