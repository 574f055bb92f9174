// The op syrk_cuda_ (schema in knowedit_kernels/_ops.py): checks, tensor maps, launch.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "syrk_kernel.cuh"

namespace knowedit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// The driver's function, found at run time: the library then needs no link to libcuda.
decltype(&cuTensorMapEncodeTiled) encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
        "looking for cuTensorMapEncodeTiled");
  STD_TORCH_CHECK(found && result == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

CUtensorMap boxes_of(const Tensor& keys) {
  static const auto encode = encoder();
  CUtensorMap map;
  const uint64_t size[] = {uint64_t(keys.size(1)), uint64_t(keys.size(0))}, pitch[] = {uint64_t(keys.stride(0)) * 2};
  const uint32_t box[] = {kBox, kTokens}, step[] = {1, 1};
  const auto type = keys.scalar_type() == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult status =
      encode(&map, type, 2, const_cast<void*>(keys.const_data_ptr()), size, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int(status));
  return map;
}

void syrk_cuda(std::vector<Tensor> c, std::vector<Tensor> keys, Tensor tiles, int64_t cap, int64_t first) {
  STD_TORCH_CHECK(!c.empty() && c.size() == keys.size() && c.size() <= kLayers, "1 to ", kLayers, " layers, a c for each");
  const int64_t d = keys[0].size(1), ld = c[0].stride(0);
  const int device = keys[0].get_device_index();
  STD_TORCH_CHECK(tiles.scalar_type() == ScalarType::Int && tiles.is_contiguous() && tiles.dim() == 2 && tiles.size(1) == 4 &&
                      tiles.get_device_index() == device,
                  "tiles must be contiguous int32 [programs, 4] on the keys' device");
  int doublings = 0;
  while (cap && first << doublings < cap) ++doublings;
  STD_TORCH_CHECK(cap == 0 || (first > 0 && first % kTokens == 0 && first << doublings == cap),
                  "chain lengths must be multiples of ", kTokens, ", the last a power of two times the first");
  Layers layers;
  for (size_t i = 0; i < c.size(); ++i) {
    STD_TORCH_CHECK(keys[i].dim() == 2 && keys[i].size(1) == d && keys[i].stride(1) == 1 && keys[i].stride(0) % 8 == 0 &&
                        d % 8 == 0 && reinterpret_cast<uintptr_t>(keys[i].const_data_ptr()) % 16 == 0,
                    "keys must be [tokens, d] with d and the row stride multiples of 8, starting on 16 bytes");
    STD_TORCH_CHECK(keys[i].scalar_type() == keys[0].scalar_type() && keys[i].get_device_index() == device &&
                        (keys[0].scalar_type() == ScalarType::Half || keys[0].scalar_type() == ScalarType::BFloat16),
                    "keys must be all float16 or all bfloat16, on one device");
    STD_TORCH_CHECK(c[i].scalar_type() == ScalarType::Double && c[i].dim() == 2 && c[i].size(0) == d && c[i].size(1) == d &&
                        c[i].stride(0) == ld && ld % 2 == 0 && c[i].stride(1) == 1 && c[i].get_device_index() == device &&
                        reinterpret_cast<uintptr_t>(c[i].const_data_ptr()) % 16 == 0,
                    "c must be float64 [d, d] with one even row stride, on the keys' device, starting on 16 bytes");
    STD_TORCH_CHECK(keys[i].size(0) > 0 && keys[i].size(0) < (int64_t(1) << 30), "1 to 2^30 tokens in a launch");
    layers.keys[i] = boxes_of(keys[i]);
    layers.c[i] = static_cast<double*>(c[i].mutable_data_ptr());
    layers.tokens[i] = int(keys[i].size(0));
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "reading the device");
  const auto kernel = keys[0].scalar_type() == ScalarType::BFloat16 ? &syrk_kernel<true> : &syrk_kernel<false>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "reserving shared memory");
  const int programs = int(tiles.size(0));
  kernel<<<std::min(programs, processors), kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(
      layers, static_cast<const int4*>(tiles.const_data_ptr()), programs, int(d), ld, Chains{int(cap), int(first), doublings});
  check(cudaGetLastError(), "launching the second moment");
}

}  // namespace
}  // namespace knowedit

STABLE_TORCH_LIBRARY_IMPL(knowedit, CUDA, m) { m.impl("syrk_cuda_", TORCH_BOX(&knowedit::syrk_cuda)); }
