// Which instruction set a call runs on.
#pragma once

#include <hwy/highway.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace moba::cpu {

// The Highway bit of the target called `target_name` ("" for the best one), or 0 if this build or machine has none.
std::int64_t find_target(std::string_view target_name);
std::string target_name(std::int64_t target);

// AVX-512 in any of its kinds: Highway numbers the better targets lower.
#define MOBA_IS_AVX512(target) (HWY_ARCH_X86 && (target) <= HWY_AVX3)

// Largest vector (floats) of any target; scratch sizes are made for it.
inline constexpr std::int64_t kMaxLanes = 16;

// The entry for `target` of a function exported with HWY_EXPORT in the same file. (HWY_DYNAMIC_DISPATCH would take one
// target for the whole process; a plan chooses its own.)
#if ((HWY_TARGETS & (HWY_TARGETS - 1)) == 0)
#define MOBA_KERNEL(function, target) ((void)(target), &HWY_STATIC_DISPATCH(function))
#else
#define MOBA_KERNEL(function, target) (HWY_DISPATCH_TABLE(function)[::moba::cpu::target_index(target)])
inline std::size_t target_index(std::int64_t target) {
  hwy::ChosenTarget chosen;
  chosen.Update(target);
  return chosen.GetIndex();
}
#endif

}  // namespace moba::cpu
