// What a Plan holds: the problem and everything that follows from it.
#pragma once

#include <cstddef>
#include <cstdint>

#include <memory>

#include "moba/plan.h"
#include "rope_table.h"

namespace moba {

struct Steps;
namespace cuda {
struct Setup;
}

struct Plan::Impl {
  Problem problem;  // with every default filled in: max_seqlen_*, scale, rotary_dim
  Options options;
  Device device = Device::cpu;   // where tensors and workspace of a call must lie
  const Steps* steps = nullptr;  // of the backend
  int threads = 1;
  std::int64_t group = 1;       // g = Hq / Hk
  std::int64_t slots = 1;       // ids per row
  std::int64_t max_blocks = 0;  // of the batch
  double scale = 1.0;
  bool forward_is_dense = false;          // every row chooses every block: nothing to select
  std::shared_ptr<const RopeTable> rope;  // null where the problem has none

  // cpu backend
  std::int64_t cpu_target = 0;     // Highway target bit
  bool bf16_dot = false;           // bfloat16 pair products
  std::int64_t attend_rows = 0;    // rows of one attend task
  std::int64_t dense_rows = 0;     // rows of one dense task
  std::int64_t backward_rows = 0;  // rows of one backward task
  std::size_t scratch_per_thread = 0;

  std::shared_ptr<const cuda::Setup> cuda;  // cuda backend; null for others

  std::size_t backward_scratch_bytes = 0;  // scratch of backward, and of the rope before it; 0 where there is none

  // cuda: the least options.workspace_limit with which index() and select() can be called, if the plan has less; else
  // 0.
  std::size_t index_workspace_limit = 0;
  std::size_t backward_workspace_limit = 0;  // the same of the backward functions

  // Workspace of forward: scratch, then the outputs of the inner stages, each at a multiple of kAlignment.
  std::size_t scratch_bytes = 0;
  std::size_t q_rotated_bytes = 0, k_rotated_bytes = 0, centroids_bytes = 0, selection_bytes = 0;
};

}  // namespace moba
