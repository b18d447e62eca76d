// Plans of the cuda backend for devices that need not be there.
#pragma once

#include <string>

#include "cuda/setup.h"
#include "support.h"

namespace moba::test {

inline constexpr std::size_t kMiB = std::size_t{1} << 20;

inline const cuda::DeviceLimits kH200{0, "NVIDIA H200", 9, 0, 132, 141'000 * kMiB};
inline const cuda::DeviceLimits kA100{0, "NVIDIA A100", 8, 0, 108, 80'000 * kMiB};
inline const cuda::DeviceLimits kB200{0, "NVIDIA B200", 10, 0, 148, 180'000 * kMiB};
inline const cuda::DeviceLimits kRtx{0, "NVIDIA RTX PRO 6000", 12, 0, 188, 96'000 * kMiB};

// One sequence of bfloat16, as many queries as keys.
Problem problem_of(std::int64_t tokens, std::int64_t q_heads, std::int64_t kv_heads, std::int64_t head_dim,
                   const Config& config);
Problem good_problem();

// A plan as Plan makes it; refused as it would be.
Plan::Impl planned(const Problem& problem, const cuda::DeviceLimits& device, const std::string& family = "",
                   std::size_t limit = 0);
std::size_t workspace_of(const Plan::Impl& plan);
std::size_t backward_workspace_of(const Plan::Impl& plan);

// Why the plan is refused, or "accepted".
std::string message_of(const Problem& problem, const cuda::DeviceLimits& device = kH200, const std::string& family = "",
                       std::size_t limit = 0);
// The limit, or the one that its refusal asks for.
std::size_t granted(const Problem& problem, const cuda::DeviceLimits& device, std::size_t limit);
// What no plan of backward may be able to do without: dk and dv of a key head, in float32.
std::size_t key_sums(const Problem& problem);

}  // namespace moba::test
