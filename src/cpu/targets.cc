#include "cpu/targets.h"

#include "cpu/bf16_dot.h"
#include "moba/info.h"

namespace moba {
namespace cpu {

std::int64_t find_target(std::string_view wanted) {
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    if (wanted.empty() || wanted == hwy::TargetName(target)) return target;
  }
  return 0;
}

std::string target_name(std::int64_t target) { return hwy::TargetName(target); }

}  // namespace cpu

std::vector<std::string> cpu_targets() {
  std::vector<std::string> names;
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) names.push_back(cpu::target_name(target));
  return names;
}

Bf16Support bf16_support() { return cpu::bf16_dot_support(); }

}  // namespace moba
