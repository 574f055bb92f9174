// Where a thread packs keys, kept from call to call.
#pragma once
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace knowedit {

// In pages as large as can be had. Fresh ordinary ones would cost a twentieth of the time of d = 4096 in float64, a fault
// each, and more addresses than a processor keeps translated.
class Workspace {
 public:
  char* at_least(size_t bytes) {
    if (held_ < bytes) {
      constexpr size_t kPage = size_t{1} << 21;
      memory_.reset();
      held_ = (bytes + kPage - 1) / kPage * kPage;
      memory_.reset(static_cast<char*>(std::aligned_alloc(kPage, held_)));
      if (!memory_) held_ = 0;
      STD_TORCH_CHECK(memory_, "no memory for ", bytes, " bytes of packed keys");
#if defined(__linux__)
      madvise(memory_.get(), held_, MADV_HUGEPAGE);  // advice: where there are none, ordinary pages do
#endif
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t held_ = 0;
};

inline thread_local Workspace workspace;

}  // namespace knowedit
