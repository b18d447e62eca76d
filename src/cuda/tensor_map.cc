// Descriptions of tensors for the copy engine of sm_90. The encoder is a function of the driver, which is asked for
// through the runtime, so that the library does not link with libcuda.
#include "cuda/tensor_map.h"

#include <string>

#include "cuda/launch.h"

namespace moba::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION < 12050
    MOBA_CUDA(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result));
#else
    MOBA_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
#endif
    if (result != cudaDriverEntryPointSuccess) throw Error("CUDA: the driver has no cuTensorMapEncodeTiled (12.0)");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

}  // namespace

CUtensorMap tensor_map_3d(DType dtype, const View<const void>& view, int head_dim, int heads, int tokens,
                          int box_tokens, int box_heads) {
  constexpr cuuint64_t kElementBytes = 2;
  const auto u64 = [](std::int64_t n) { return static_cast<cuuint64_t>(n); };
  const auto u32 = [](int n) { return static_cast<cuuint32_t>(n); };
  // A stride that is never taken may be anything in the view, but the encoder wants a multiple of 16 bytes.
  const std::int64_t head_stride = heads == 1 ? head_dim : view.head_stride;
  const std::int64_t token_stride = tokens == 1 ? head_dim : view.token_stride;
  // In the order of the kernels' coordinates. For tensors with the heads outermost the first stride is greater than the
  // second, which the encoder takes (drivers up to CUDA 13.0 were tried).
  const cuuint64_t sizes[3] = {u64(head_dim), u64(heads), u64(tokens)};
  const cuuint64_t strides[2] = {u64(head_stride) * kElementBytes, u64(token_stride) * kElementBytes};
  const cuuint32_t box[3] = {64, u32(box_heads), u32(box_tokens)};
  const cuuint32_t steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encoder()(&map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
                const_cast<void*>(view.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error("CUDA: cuTensorMapEncodeTiled returned " + std::to_string(static_cast<int>(result)) + " for [" +
                std::to_string(tokens) + ", " + std::to_string(heads) + ", " + std::to_string(head_dim) +
                "], strides in elements " + std::to_string(token_stride) + ", " + std::to_string(head_stride));
  }
  return map;
}

}  // namespace moba::cuda
