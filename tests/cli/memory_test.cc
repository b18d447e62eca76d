// The memory that the program believes it may have, and what it counts on taking.
#include <gtest/gtest.h>

#include <filesystem>
#include <limits>
#include <string>

#include "accuracy.h"
#include "gradient_accuracy.h"
#include "machine.h"
#include "memory_use.h"
#include "moba/error.h"
#include "support.h"

namespace moba::cli {
namespace {

// A tree of control groups.
class GroupMemoryLimit : public testing::Test {
 protected:
  void set(const std::string& group, const std::string& name, const std::string& text) {
    std::filesystem::create_directories(folder_.file(group));
    write_bytes(folder_.file(group + "/" + name), text);
  }
  double limit(const std::string& membership) {
    write_bytes(folder_.file("membership"), membership);
    return group_memory_limit(folder_.file("membership"), folder_.path());
  }

  TemporaryFolder folder_;
};

constexpr double kNone = std::numeric_limits<double>::infinity();

TEST_F(GroupMemoryLimit, VersionTwo) {
  EXPECT_EQ(limit(""), kNone);
  EXPECT_EQ(limit("0::/a/b/c\n"), kNone);
  set("a/b/c", "memory.max", "max\n");
  EXPECT_EQ(limit("0::/a/b/c\n"), kNone);
  set("a", "memory.max", "3000000000\n");
  EXPECT_EQ(limit("0::/a/b/c\n"), 3e9);
  set("a/b/c", "memory.max", "5000000000\n");
  EXPECT_EQ(limit("0::/a/b/c\n"), 3e9) << "that of a group above is less";
  set("a/b", "memory.max", "2000000000\n");
  EXPECT_EQ(limit("0::/a/b/c\n"), 2e9);
  EXPECT_EQ(limit("0::/a\n"), 3e9);
  EXPECT_EQ(limit("0::/elsewhere\n"), kNone);
  set(".", "memory.max", "1000000000\n");
  for (const char* path : {"/a/b/c", "/elsewhere", "/"}) {
    EXPECT_EQ(limit("0::" + std::string(path) + "\n"), 1e9) << "of the mounted group itself, as in a container";
  }
}

TEST_F(GroupMemoryLimit, VersionOne) {
  const std::string membership = "11:cpu,cpuacct:/x\n9:memory:/a/b\n1:name=systemd:/y\n0::/z\n";
  set("memory", "memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_GT(limit(membership), 1e18);
  set("memory/a", "memory.limit_in_bytes", "4000000000\n");
  EXPECT_EQ(limit(membership), 4e9);
  EXPECT_EQ(limit("3:hugetlb,memory:/a\n"), 4e9);
  EXPECT_GT(limit("3:memory2:/a\nnonsense\n:\n"), 1e18);
}

TEST(MemoryUse, IsRefusedBeyondTheLimit) {
  EXPECT_GT(memory_bytes(), 0);
  EXPECT_LE(memory_bytes(), group_memory_limit("/proc/self/cgroup", "/sys/fs/cgroup"));
  EXPECT_NO_THROW(require_memory(memory_bytes()));
  EXPECT_THROW(require_memory(memory_bytes() * 1.01), Error);
}

TEST(MemoryUse, ComparisonsAreCounted) {
  Problem problem{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = 64, .config = {}, .rope = {}};
  problem.total_q = problem.total_k = 10000;
  const Plan plan(problem);
  const double few = accuracy_bytes(plan, 1), some = accuracy_bytes(plan, 5000), all = accuracy_bytes(plan, 10000);
  const MemoryUse use = memory_use(plan);
  EXPECT_GT(few, 2 * (use.k + use.v)) << "in float32";
  EXPECT_GT(some, few + use.q);
  EXPECT_GT(all, some + use.q);
  EXPECT_EQ(accuracy_bytes(plan, 20000), all);
}

TEST(MemoryUse, GradientsAreCounted) {
  Problem problem{.dtype = DType::bf16, .q_heads = 4, .kv_heads = 2, .head_dim = 64, .config = {}, .rope = {}};
  problem.total_q = problem.total_k = 10000;
  const Plan plan(problem);
  const MemoryUse use = memory_use(plan);
  const double tensors = use.gradients() + use.results();
  EXPECT_EQ(use.backward_workspace, static_cast<double>(plan.backward_workspace_bytes()));
  EXPECT_GE(use.trained(), tensors + use.backward_workspace + static_cast<double>(plan.selection_bytes()));
  EXPECT_EQ(static_cast<double>(plan.ids_bytes()), use.ids);
  const double unrotated = gradient_accuracy_bytes(plan);
  EXPECT_GT(unrotated, 2 * 2 * (use.inputs() + use.out)) << "inputs and gradients in float32";
  problem.rope.emplace();
  EXPECT_GT(gradient_accuracy_bytes(Plan(problem)), unrotated + use.q + use.k);
}

}  // namespace
}  // namespace moba::cli
