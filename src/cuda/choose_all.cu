// The choice of a plan that has a slot for every block: all blocks that a row sees. What forward keeps where it is
// dense.
#include "cuda/batch.cuh"
#include "cuda/contract.h"
#include "cuda/divide.cuh"
#include "cuda/launch.h"

namespace moba::cuda {

namespace {

constexpr int kThreads = 256;

// A thread a row; grid: (rows of a key head, key heads).
__global__ void __launch_bounds__(kThreads)
    choose_blocks(Shape shape, Batch batch, IdsView<std::int32_t> ids, CountsView counts) {
  const int row = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int token = row / shape.group, in_group = row - token * shape.group;
  if (token >= shape.total_q) return;
  const Candidates seen = candidates_of(shape, batch, token);
  const int count = seen.high - seen.low + (seen.has_own ? 1 : 0);
  const std::int64_t head = blockIdx.y;
  std::int32_t* to = ids.data + head * ids.head_stride + token * ids.token_stride + in_group * ids.group_stride;
  for (int slot = 0; slot < shape.slots; ++slot) to[slot] = slot < count ? slot : -1;
  if (counts.data == nullptr) return;
  counts.data[head * counts.head_stride + token * counts.token_stride + in_group * counts.group_stride] = count;
}

}  // namespace

void choose_all(const Shape& shape, Batch batch, IdsView<std::int32_t> ids, CountsView counts, cudaStream_t stream) {
  launch(choose_blocks, dim3(divide_up(shape.total_q * shape.group, kThreads), shape.kv_heads), kThreads, 0, stream,
         shape, batch, ids, counts);
}

}  // namespace moba::cuda
