// The audit of keys on the CPU: sums that tell what accumulating them must come to, taken while they are copied.
// Registered through torch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "isa.h"
#include "keys.h"
#include "memory.h"
#include "syrk.h"

namespace knowedit {
namespace {

AuditKernel audit_kernel(int64_t isa) {
  check_isa(isa);
#if defined(__x86_64__)
  if (isa >= kAvx512) return kAuditAvx512;
  if (isa == kAvx2) return kAuditAvx2;
#endif
  return kAuditGeneric;
}

// Every row's own audit, and a copy of it to `out` (if present) while it is in cache.
void row_audit(std::optional<Tensor> out, Tensor sums, Tensor keys, Tensor signs, int64_t isa) {
  check_keys(keys);
  const int64_t tokens = keys.size(0), d = keys.size(1), bytes = d * keys.element_size();
  STD_TORCH_CHECK(signs.scalar_type() == ScalarType::Double && signs.is_contiguous() && signs.numel() == kProbes * d,
                  "signs must be contiguous float64 [4, d]");
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.is_contiguous() && sums.numel() == tokens * (1 + kProbes),
                  "sums must be contiguous float64 [n, 5]");
  STD_TORCH_CHECK(!out || (out->is_contiguous() && out->scalar_type() == keys.scalar_type() && out->numel() == tokens * d),
                  "out must be contiguous, [n, d], of the keys' dtype");
  const Type type = type_of(keys);
  const AuditKernel audit_row = audit_kernel(isa);
  const double* z = numbers<double>(signs);
  double* each = written<double>(sums);
  char* to = out ? written<char>(*out) : nullptr;
  const int64_t chunk = 256, chunks = (tokens + chunk - 1) / chunk;
  dynamic_for(chunks, [&](int64_t i) {
    for (int64_t t = i * chunk; t < std::min(tokens, (i + 1) * chunk); ++t) {
      const char* row = address(keys, t, 0);
      if (to) std::memcpy(to + t * bytes, row, bytes);
      std::fill_n(each + t * (1 + kProbes), 1 + kProbes, 0.0);
      audit_row(row, type, d, z, each + t * (1 + kProbes));
    }
  });
}

// Copies rows (all when `rows` is absent) to `out` (if present) and audits them while they are in cache.
void pack(std::optional<Tensor> out, Tensor audit, Tensor keys, std::optional<Tensor> rows, Tensor signs, int64_t isa) {
  check_keys(keys);
  const int64_t d = keys.size(1), tokens = rows ? rows->numel() : keys.size(0), bytes = d * keys.element_size();
  STD_TORCH_CHECK(signs.scalar_type() == ScalarType::Double && signs.is_contiguous() && signs.numel() == kProbes * d,
                  "signs must be contiguous float64 [4, d]");
  STD_TORCH_CHECK(audit.scalar_type() == ScalarType::Double && audit.is_contiguous() && audit.numel() == 1 + kProbes,
                  "audit must be contiguous float64 [5]");
  STD_TORCH_CHECK(!rows || (rows->scalar_type() == ScalarType::Long && rows->is_contiguous()), "rows must be int64");
  STD_TORCH_CHECK(!out || (out->is_contiguous() && out->scalar_type() == keys.scalar_type() && out->numel() == tokens * d),
                  "out must be contiguous, [rows, d], of the keys' dtype");
  if (tokens == 0 || d == 0) return;
  const Type type = type_of(keys);
  const AuditKernel audit_row = audit_kernel(isa);
  const double* z = numbers<double>(signs);
  const int64_t* index = rows ? numbers<int64_t>(*rows) : nullptr;
  char* to = out ? written<char>(*out) : nullptr;
  for (int64_t t = 0; index && t < tokens; ++t)
    STD_TORCH_CHECK(index[t] >= 0 && index[t] < keys.size(0), "row ", index[t], " is not among the keys");
  // fixed chunks, added in order: the same bits for any number of threads. Small batches stay on one thread:
  // waiting for a second one costs more on a busy machine than the work.
  const int64_t chunk = 256, chunks = (tokens + chunk - 1) / chunk;
  std::vector<double> partial(chunks * (1 + kProbes), 0.0);
  const auto work = [&](int64_t i) {
    for (int64_t t = i * chunk; t < std::min(tokens, (i + 1) * chunk); ++t) {
      const char* row = address(keys, index ? index[t] : t, 0);
      if (to) std::memcpy(to + t * bytes, row, bytes);
      audit_row(row, type, d, z, &partial[i * (1 + kProbes)]);
    }
  };
  if (chunks < 8)
    for (int64_t i = 0; i < chunks; ++i) work(i);
  else
    dynamic_for(chunks, work);
  double* total = written<double>(audit);
  for (int64_t i = 0; i < chunks; ++i)
    for (int64_t p = 0; p <= kProbes; ++p) total[p] += partial[i * (1 + kProbes) + p];
}

}  // namespace
}  // namespace knowedit

// the schemas are in knowedit_kernels/_ops.py
STABLE_TORCH_LIBRARY_IMPL(knowedit, CPU, m) {
  m.impl("pack_cpu_", TORCH_BOX(&knowedit::pack));
  m.impl("row_audit_cpu_", TORCH_BOX(&knowedit::row_audit));
}
