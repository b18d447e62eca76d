// Every argument of every function that is refused, one change at a time, by an Error that names the argument and
// before anything is written.
#include <algorithm>
#include <functional>

#include "refusals.h"
#include "support.h"

namespace moba::test {
namespace {

// All arguments of all functions, good ones; a test spoils one.
struct Arguments {
  Case c{.q_heads = 4,
         .kv_heads = 2,
         .head_dim = 8,
         .q_lengths = {20, 13},
         .k_lengths = {25, 33},
         .config = {.block_size = 8, .top_k = 2},
         .rope = Rope{}};
  Data data{c};
  Plan plan{c.problem(), {.threads = 1}};
  std::vector<std::byte> memory = std::vector<std::byte>(plan.workspace_bytes(), std::byte{0x5a}),
                         untouched_memory = memory;
  Attention result{plan.problem()}, partial{plan.problem()};
  Array q_rotated_memory{c.dtype, {33, 4, 8}}, k_rotated_memory{c.dtype, {58, 2, 8}};
  Array centroids_memory{c.dtype, {plan.max_blocks(), 2, 8}},
      written_centroids_memory{c.dtype, {plan.max_blocks(), 2, 8}};
  Chosen read{plan}, written{plan};

  Inputs inputs = data.inputs();
  Outputs outputs = result.outputs();
  Tensor q_rotated = q_rotated_memory.tensor(), k_rotated = k_rotated_memory.tensor();
  ConstTensor centroids = centroids_memory.tensor();             // of gate
  Tensor written_centroids = written_centroids_memory.tensor();  // of pool
  Selection given, selection = written.selection();              // of attend; of gate, index and select
  std::vector<Outputs> partials;
  Workspace workspace = memory;

  Arguments() {
    centroids_memory.fill(1);
    partial.out.fill(2);
    partial.lse.fill(3);
    partials = {partial.outputs(), partial.outputs()};
    given = read.selection();
    select(plan, inputs, given, workspace);
    memory = untouched_memory;
    for (std::int64_t token = 0; token < 33; ++token) {
      for (std::int64_t head = 0; head < 4; ++head) written.set_row(token, head, {0, 2});
    }
  }

  // Whether nothing that a call may write holds anything new.
  bool untouched() const {
    return result.out.untouched() && result.lse.untouched() && q_rotated_memory.untouched() &&
           k_rotated_memory.untouched() && written_centroids_memory.untouched() && written.counts.untouched() &&
           written.offsets.untouched() && written.rows.untouched() && memory == untouched_memory;
  }
};

enum Function { kRope, kPool, kGate, kIndex, kSelect, kAttend, kForward, kDense, kMerge };
constexpr const char* kNames[] = {"rope", "pool", "gate", "index", "select", "attend", "forward", "dense", "merge"};

void call(Function function, Arguments& a) {
  switch (function) {
    case kRope:
      return rope(a.plan, a.inputs, a.q_rotated, a.k_rotated, a.workspace);
    case kPool:
      return pool(a.plan, a.inputs, a.written_centroids, a.workspace);
    case kGate:
      return gate(a.plan, a.inputs, a.centroids, a.selection, a.workspace);
    case kIndex:
      return index(a.plan, a.inputs, a.selection, a.workspace);
    case kSelect:
      return select(a.plan, a.inputs, a.selection, a.workspace);
    case kAttend:
      return attend(a.plan, a.inputs, a.given, a.outputs, a.workspace);
    case kForward:
      return forward(a.plan, a.inputs, a.outputs, a.workspace);
    case kDense:
      return dense(a.plan, a.inputs, a.outputs, a.workspace);
    case kMerge:
      return merge(a.plan, a.partials, a.outputs);
  }
}

void expect_refused(Function function, const std::string& argument, const std::string& what,
                    const std::function<void(Arguments&)>& change) {
  SCOPED_TRACE(std::string(kNames[function]) + ", " + argument + ": " + what);
  Arguments a;
  change(a);
  try {
    call(function, a);
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    EXPECT_TRUE(refuses(error.what(), argument));
    EXPECT_TRUE(a.untouched());
  }
}

// One tensor argument of a function.
struct Argument {
  Function function;
  std::string name;
  std::function<Tensor(const Arguments&)> get;
  std::function<void(Arguments&, const Tensor&)> set;
  bool output = false;          // written: may not overlap anything
  bool any_strides = false;     // the last stride need not be 1
  bool strict_strides = false;  // no two elements in one place
};

Tensor mutable_view(const ConstTensor& t) {
  Tensor view;
  view.data = const_cast<void*>(t.data);
  view.dtype = t.dtype, view.device = t.device, view.rank = t.rank, view.shape = t.shape, view.stride = t.stride;
  return view;
}

#define ARGUMENT(function, name, member)                                       \
  Argument {                                                                   \
    function, name, [](const Arguments& a) { return mutable_view(a.member); }, \
        [](Arguments& a, const Tensor& t) { a.member = t; }                    \
  }

Argument written(Argument a, bool any_strides = false) {
  a.output = a.strict_strides = true;
  a.any_strides = any_strides;
  return a;
}
Argument read_only(Argument a, bool any_strides, bool strict_strides) {
  a.any_strides = any_strides;
  a.strict_strides = strict_strides;
  return a;
}

std::vector<Argument> arguments() {
  std::vector<Argument> all;
  for (const Function f : {kRope, kPool, kGate, kIndex, kSelect, kAttend, kForward, kDense}) {
    all.push_back(ARGUMENT(f, "cu_seqlens_q", inputs.cu_seqlens_q));
    all.push_back(ARGUMENT(f, "cu_seqlens_k", inputs.cu_seqlens_k));
    if (f != kPool && f != kIndex) all.push_back(ARGUMENT(f, "q", inputs.q));
    if (f != kGate && f != kIndex) all.push_back(ARGUMENT(f, "k", inputs.k));
    if (f == kAttend || f == kForward || f == kDense) all.push_back(ARGUMENT(f, "v", inputs.v));
  }
  for (const Function f : {kAttend, kForward, kDense, kMerge}) {
    all.push_back(written(ARGUMENT(f, "out", outputs.out)));
    all.push_back(written(ARGUMENT(f, "lse", outputs.lse), true));
  }
  all.push_back(ARGUMENT(kMerge, "partial out", partials[1].out));
  all.push_back(read_only(ARGUMENT(kMerge, "partial lse", partials[1].lse), true, false));
  all.push_back(written(ARGUMENT(kRope, "q_rotated", q_rotated)));
  all.push_back(written(ARGUMENT(kRope, "k_rotated", k_rotated)));
  all.push_back(written(ARGUMENT(kPool, "centroids", written_centroids)));
  all.push_back(ARGUMENT(kGate, "centroids", centroids));
  for (const Function f : {kGate, kSelect, kIndex}) {
    Argument ids = ARGUMENT(f, "selection.ids", selection.ids);
    all.push_back(f == kIndex ? read_only(ids, false, true) : written(ids));
    all.push_back(written(ARGUMENT(f, "selection.counts", selection.counts), true));
    all.push_back(written(ARGUMENT(f, "selection.offsets", selection.offsets)));
    Argument rows = ARGUMENT(f, "selection.rows", selection.rows);
    all.push_back(f == kGate ? read_only(rows, false, true) : written(rows));
  }
  all.push_back(read_only(ARGUMENT(kAttend, "selection.offsets", given.offsets), false, true));
  all.push_back(read_only(ARGUMENT(kAttend, "selection.rows", given.rows), false, true));
  return all;
}

struct Change {
  std::string what;
  std::function<void(Tensor&)> apply;
};

// Whatever is wrong with a tensor by itself.
std::vector<Change> changes(const Argument& argument, const Tensor& good) {
  const int last = good.rank - 1;
  std::vector<Change> all{
      {"not given", [](Tensor& t) { t = Tensor(); }},
      {"null pointer", [](Tensor& t) { t.data = nullptr; }},
      {"not aligned", [](Tensor& t) { t.data = static_cast<std::byte*>(t.data) + 1; }},
      {"on a device", [](Tensor& t) { t.device = Device::cuda; }},
      {"a dimension more", [](Tensor& t) { t.shape[t.rank] = 1, t.stride[t.rank] = 1, ++t.rank; }},
      {"a dimension less", [](Tensor& t) { t.rank == 1 ? void(t.shape[0] = 0) : void(--t.rank); }},
      {"negative rank", [](Tensor& t) { t.rank = -1; }},
      {"huge rank", [](Tensor& t) { t.rank = 1 << 20; }},
      {"another float", [](Tensor& t) { t.dtype = t.dtype == DType::f16 ? DType::bf16 : DType::f16; }},
      {"another type", [](Tensor& t) { t.dtype = t.dtype == DType::i32 ? DType::i64 : DType::i32; }},
      {"no type", [](Tensor& t) { t.dtype = static_cast<DType>(200); }},
  };
  for (int i = 0; i < good.rank; ++i) {
    const std::string d = " in dimension " + std::to_string(i);
    all.push_back({"one element less" + d, [i](Tensor& t) { --t.shape[i]; }});
    all.push_back({"one element more" + d, [i](Tensor& t) { ++t.shape[i]; }});
    all.push_back({"nothing" + d, [i](Tensor& t) { t.shape[i] = 0; }});
    all.push_back({"negative size" + d, [i](Tensor& t) { t.shape[i] = -t.shape[i]; }});
    all.push_back({"negative stride" + d, [i](Tensor& t) { t.stride[i] = -t.stride[i]; }});
    all.push_back({"a stride too large to multiply" + d, [i](Tensor& t) { t.stride[i] = std::int64_t{1} << 61; }});
    if (argument.strict_strides) {
      all.push_back({"stride 0" + d, [i](Tensor& t) { t.stride[i] = 0; }});
      if (i != last) all.push_back({"overlapping" + d, [i](Tensor& t) { --t.stride[i]; }});
    }
  }
  if (!argument.any_strides) all.push_back({"last stride 2", [last](Tensor& t) { t.stride[last] = 2; }});
  return all;
}

TEST(RefusedCalls, GoodArgumentsAreAccepted) {
  for (int f = kRope; f <= kMerge; ++f) {
    Arguments a;
    EXPECT_TRUE(a.untouched());
    EXPECT_NO_THROW(call(static_cast<Function>(f), a)) << kNames[f];
    EXPECT_FALSE(a.untouched()) << kNames[f];
  }
}

TEST(RefusedCalls, EveryTensor) {
  const Arguments good;
  for (const Argument& argument : arguments()) {
    for (const Change& change : changes(argument, argument.get(good))) {
      const bool optional =
          argument.name == "lse" || (argument.function == kGate && argument.name == "selection.offsets");
      if (optional && change.what == "not given") continue;
      expect_refused(argument.function, argument.name, change.what, [&](Arguments& a) {
        Tensor t = argument.get(a);
        change.apply(t);
        argument.set(a, t);
      });
    }
  }
}

TEST(RefusedCalls, TensorsOfADevice) {
  expect_refused(kForward, "q.device: is cuda; allowed: cpu", "on a device",
                 [](Arguments& a) { a.inputs.q.device = Device::cuda; });
}

// A written tensor in the memory of whatever else the function has: refused, whichever of the two.
TEST(RefusedCalls, EveryOverlap) {
  const std::vector<Argument> all = arguments();
  for (const Argument& output : all) {
    if (!output.output) continue;
    for (const Argument& other : all) {
      if (other.function != output.function || other.name == output.name) continue;
      if (other.function == kGate && other.name == "selection.rows") continue;  // gate does not look into them
      expect_refused(output.function, output.name, "in the memory of " + other.name, [&](Arguments& a) {
        Tensor t = output.get(a);
        const Tensor there = other.get(a);
        // The end of one in the beginning of the other, aligned for both.
        std::int64_t last = 0;
        for (int i = 0; i < there.rank; ++i) last += (there.shape[i] - 1) * there.stride[i];
        const auto end =
            reinterpret_cast<std::uintptr_t>(there.data) + static_cast<std::size_t>(last) * size_in_bytes(there.dtype);
        t.data = reinterpret_cast<void*>(end / 8 * 8);  // NOLINT(performance-no-int-to-ptr): an address on purpose
        output.set(a, t);
      });
    }
    if (output.function == kMerge) continue;
    expect_refused(output.function, "workspace", "in the memory of " + output.name, [&](Arguments& a) {
      Tensor t = output.get(a);
      t.data = a.memory.data() + a.memory.size() / 16 * 8;
      output.set(a, t);
    });
  }
  for (const Argument& input : all) {
    if (input.output || input.function == kMerge) continue;
    if (input.function == kGate && input.name == "selection.rows") continue;  // gate does not look into them
    expect_refused(input.function, "workspace", "in the memory of " + input.name, [&](Arguments& a) {
      Tensor t = input.get(a);
      // What cu_seqlens hold is checked before where they are.
      const std::size_t bytes = t.rank == 1 ? static_cast<std::size_t>(t.shape[0]) * size_in_bytes(t.dtype) : 0;
      std::memcpy(a.memory.data(), t.data, bytes);
      a.untouched_memory = a.memory;
      t.data = a.memory.data();
      input.set(a, t);
    });
  }
}

TEST(RefusedCalls, Workspaces) {
  for (int f = kRope; f < kMerge; ++f) {
    const Function function = static_cast<Function>(f);
    expect_refused(function, "workspace", "one byte short",
                   [](Arguments& a) { a.workspace = a.workspace.first(a.workspace.size() - 1); });
    expect_refused(function, "workspace", "none", [](Arguments& a) { a.workspace = {}; });
    expect_refused(function, "workspace", "null",
                   [](Arguments& a) { a.workspace = Workspace(static_cast<std::byte*>(nullptr), a.workspace.size()); });
  }
}

TEST(RefusedCalls, RopeWithoutOne) {
  expect_refused(kRope, "rope", "not in the plan", [](Arguments& a) {
    a.c.rope.reset();
    a.plan = Plan(a.c.problem());
    a.untouched_memory = a.memory;
  });
}

TEST(RefusedCalls, CuSeqlens) {
  struct Bad {
    std::string what;
    bool q;  // else k
    std::vector<std::int32_t> entries;
  };
  const std::vector<Bad> all{{"does not begin with 0", true, {1, 20, 33}},
                             {"begins below 0", true, {-1, 20, 33}},
                             {"descends", true, {0, 34, 33}},
                             {"negative", true, {0, -1, 33}},
                             {"ends below the total", true, {0, 20, 32}},
                             {"ends above the total", true, {0, 20, 34}},
                             {"longer than allowed", true, {0, 21, 33}},
                             {"last longer than allowed", true, {0, 12, 33}},
                             {"does not begin with 0", false, {1, 25, 58}},
                             {"descends", false, {0, 59, 58}},
                             {"ends below the total", false, {0, 25, 57}},
                             {"ends above the total", false, {0, 25, 59}},
                             {"longer than allowed", false, {0, 34, 58}},
                             {"last longer than allowed", false, {0, 24, 58}},
                             {"a very long one", false, {0, 2147483647, 58}}};
  for (int f = kRope; f < kMerge; ++f) {
    for (const Bad& bad : all) {
      expect_refused(static_cast<Function>(f), bad.q ? "cu_seqlens_q" : "cu_seqlens_k", bad.what, [&](Arguments& a) {
        Array& cu = bad.q ? *a.data.cu_seqlens_q : *a.data.cu_seqlens_k;
        for (std::int64_t i = 0; i < 3; ++i) cu.as<std::int32_t>(i) = bad.entries[i];
      });
    }
  }
}

TEST(RefusedCalls, Ids) {
  const std::vector<std::pair<std::string, std::vector<std::int32_t>>> all{
      {"descending", {2, 1}},        {"twice the same", {1, 1}},   {"past the last block", {0, 5}},
      {"far past", {0, 2147483647}}, {"negative", {-2, 1}},        {"-1 in between", {-1, 1}},
      {"-2 behind", {1, -2}},        {"lowest", {-2147483648, -1}}};
  for (const std::int64_t token : {0, 19, 20, 32}) {
    for (const auto& [what, row] : all) {
      expect_refused(kIndex, "selection.ids[" + std::to_string(token) + ", 3]", what, [&, r = row](Arguments& a) {
        for (std::int64_t slot = 0; slot < 2; ++slot) a.written.ids.as<std::int32_t>(token, 3, slot) = r[slot];
      });
    }
  }
  // Block 4 is in the second sequence only: 25 keys are 4 blocks, 33 are 5.
  expect_refused(kIndex, "selection.ids[19, 0]", "of a longer sequence", [](Arguments& a) {
    a.written.set_row(19, 0, {0, 4});
  });
  Arguments good;
  good.written.set_row(20, 0, {0, 4});
  good.written.set_row(21, 0, {});
  EXPECT_NO_THROW(call(kIndex, good));
}

TEST(RefusedCalls, Transposes) {
  const auto offset = [](Arguments& a, std::int64_t i) -> std::int64_t& { return a.read.offsets.as<std::int64_t>(i); };
  const auto entry = [](Arguments& a, std::int64_t i) -> std::int32_t& { return a.read.rows.as<std::int32_t>(i); };
  expect_refused(kAttend, "selection.offsets[0]", "does not begin with 0", [&](Arguments& a) { offset(a, 0) = 1; });
  expect_refused(kAttend, "selection.offsets[0]", "begins below 0", [&](Arguments& a) { offset(a, 0) = -1; });
  expect_refused(kAttend, "selection.offsets", "descends", [&](Arguments& a) { offset(a, 3) = offset(a, 2) - 1; });
  expect_refused(kAttend, "selection.offsets", "negative", [&](Arguments& a) { offset(a, 1) = -5; });
  expect_refused(kAttend, "selection.offsets", "beyond the rows",
                 [&](Arguments& a) { offset(a, a.read.offsets.dim(0) - 1) = a.read.rows.dim(0) + 1; });
  expect_refused(kAttend, "selection.offsets", "far beyond",
                 [&](Arguments& a) { offset(a, a.read.offsets.dim(0) - 1) = std::int64_t{1} << 62; });
  expect_refused(kAttend, "selection.rows", "twice the same", [&](Arguments& a) { entry(a, 1) = entry(a, 0); });
  expect_refused(kAttend, "selection.rows", "descending", [&](Arguments& a) { std::swap(entry(a, 1), entry(a, 2)); });
  expect_refused(kAttend, "selection.rows", "negative", [&](Arguments& a) { entry(a, 0) = -1; });
  expect_refused(kAttend, "selection.rows", "of another sequence",
                 [&](Arguments& a) { entry(a, offset(a, 1) - 1) = 40; });
  expect_refused(kAttend, "selection.rows", "past the last token",
                 [&](Arguments& a) { entry(a, offset(a, a.read.offsets.dim(0) - 1) - 1) = 66; });
}

// gate leaves the transpose of other ids behind: attend does not take it for that of the new ones.
TEST(RefusedCalls, AttendAfterGateWithoutIndex) {
  expect_refused(kAttend, "selection.offsets[0]", "of older ids", [](Arguments& a) {
    EXPECT_NO_THROW(index(a.plan, a.inputs, a.given, a.workspace));
    EXPECT_NO_THROW(gate(a.plan, a.inputs, a.centroids, a.given, a.workspace));
    a.memory = a.untouched_memory;
  });
  Arguments a;
  gate(a.plan, a.inputs, a.centroids, a.given, a.workspace);
  index(a.plan, a.inputs, a.given, a.workspace);
  EXPECT_NO_THROW(call(kAttend, a));
  // Who has no use for the transpose gives none.
  Selection ids_only = a.given;
  ids_only.offsets = ids_only.rows = {};
  EXPECT_NO_THROW(gate(a.plan, a.inputs, a.centroids, ids_only, a.workspace));
}

}  // namespace
}  // namespace moba::test
