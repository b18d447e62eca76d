#include "cuda/setup.h"

#include <algorithm>
#include <array>
#include <limits>
#include <string>

#include "cuda/backend.h"
#include "refuse.h"

namespace moba::cuda {
namespace {

constexpr std::size_t kDefaultScratch = std::size_t{2} << 30;
constexpr std::size_t kLeastBackward = std::size_t{1408} << 20;  // with the selection 1.5 GiB for 64K x 16 heads
constexpr std::size_t kSmallIndex = std::size_t{256} << 20;      // every plan has so much: index() cannot take less
constexpr std::int64_t kMaxInt = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kMaxEntries = kMaxInt + 1 - (1 << 16);  // of a key head: kernels round their number up
constexpr std::int64_t kMaxGrid = 65535;                       // a head is a y of a grid
const char* const kElse = " on cuda; the cpu backend takes others";

// Scratch of backward where the caller sets no limit: as much as q, k, v and out take, within bounds.
std::size_t default_backward(const Shape& s) {
  constexpr std::int64_t kElementBytes = 2;
  const std::int64_t q = std::int64_t{s.total_q} * s.q_heads, k = std::int64_t{s.total_k} * s.kv_heads;
  const std::int64_t bytes = 2 * (q + k) * s.head_dim * kElementBytes;
  return std::clamp(static_cast<std::size_t>(bytes), kLeastBackward, kDefaultScratch);
}

void check_problem(const Plan::Impl& plan) {
  const Problem& p = plan.problem;
  const auto allowed = [](const std::string& what) { return what + kElse; };
  if (p.dtype == DType::f32) refuse("dtype", name(p.dtype), allowed("f16, bf16"));
  constexpr std::array<std::int64_t, 6> kHeadDims = {32, 64, 96, 128, 192, 256};
  if (std::ranges::find(kHeadDims, p.head_dim) == kHeadDims.end()) {
    refuse("head_dim", p.head_dim, allowed("32, 64, 96, 128, 192, 256"));
  }
  const std::int64_t block = p.config.block_size;
  if (block % 16 != 0 || block > 8192) refuse("config.block_size", block, allowed("multiples of 16 up to 8192"));
  if (plan.slots > 64) refuse("config.top_k", p.config.top_k, allowed("up to 64"));
  if (p.q_heads > kMaxGrid) refuse("q_heads", p.q_heads, allowed("up to " + std::to_string(kMaxGrid)));
  if (*p.config.scale < 0) refuse("config.scale", *p.config.scale, allowed("0 or more"));
  if (checked_product("total_q * q_heads / kv_heads * top_k", {p.total_q, plan.group, plan.slots}) > kMaxEntries) {
    refuse("total_q", p.total_q, allowed("total_q * q_heads / kv_heads * top_k up to 2^31 - 2^16"));
  }
  if (plan.max_blocks > kMaxBlocks || checked_product("blocks * kv_heads", {plan.max_blocks, p.kv_heads}) > kMaxInt) {
    refuse("config.block_size", block, allowed("blocks up to 2^21, blocks * kv_heads up to 2^31 - 1"));
  }
}

Shape shape_of(const Plan::Impl& plan, const DeviceLimits& device) {
  const Problem& p = plan.problem;
  Shape s;
  s.dtype = p.dtype;
  s.head_dim = static_cast<int>(p.head_dim);
  s.q_heads = static_cast<int>(p.q_heads);
  s.kv_heads = static_cast<int>(p.kv_heads);
  s.group = static_cast<int>(plan.group);
  s.batch = static_cast<int>(p.batch);
  s.total_q = static_cast<int>(p.total_q);
  s.total_k = static_cast<int>(p.total_k);
  s.block_size = static_cast<int>(p.config.block_size);
  s.top_k = static_cast<int>(std::min<std::int64_t>(p.config.top_k, kMaxInt));
  s.slots = static_cast<int>(plan.slots);
  s.max_blocks = static_cast<int>(plan.max_blocks);
  s.causal = p.config.causal;
  s.scale = static_cast<float>(plan.scale);
  s.sm_count = device.sm_count;
  return s;
}

// The kernels for the shape; `family` is "sm90", "portable" or empty for the best.
void choose_kernels(Setup& setup, const std::string& family) {
  const Shape& s = setup.shape;
  if (!family.empty() && family != "sm90" && family != "portable") {
    refuse("options.cuda_kernels", "'" + family + "'", "sm90, portable, or empty for the best");
  }
  const bool fits = s.head_dim == 64 || s.head_dim == 128;
  if (family == "sm90") {
    if (!setup.device.has_sm90()) {
      refuse("options.cuda_kernels", "sm90",
             "portable on " + setup.device.name + ", which is not of compute capability 9.0");
    }
    if (!fits) refuse("options.cuda_kernels", "sm90", "portable, where head_dim is not 64 or 128");
  }
  if (family == "portable" || !setup.device.has_sm90() || !fits) return;
  if (s.slots <= (s.causal ? 17 : 16)) setup.gate = GateKernel::sm90;
  setup.attend = s.block_size <= 128 ? AttendKernel::resident_sm90 : AttendKernel::stream_sm90;
  setup.dense = AttendKernel::stream_sm90;
  setup.backward = BackwardKernel::sm90;
}

// Rows of one attend unit. Resident keys want many rows, since a change of units costs a multiprocessor time, but also
// many units, so that all end at about the same time: 32 each are 3 to 4 % faster than 8 at 8K and 32K tokens.
int rows_per_unit(const Setup& setup) {
  const Shape& s = setup.shape;
  if (setup.attend == AttendKernel::stream_sm90) return 128;
  if (setup.attend == AttendKernel::portable) return portable_rows(s.head_dim);
  const std::int64_t entries = std::int64_t{s.total_q} * s.q_heads * s.slots;
  return static_cast<int>(
      std::clamp<std::int64_t>(ceil_div(entries, std::int64_t{32} * s.sm_count * 64) * 64, 512, 2048));
}

std::size_t slab_bytes(const Setup& setup, std::int64_t heads, std::int64_t tokens) {
  Carver carver;
  BatchMemory(carver, setup.shape);
  RopeMemory(carver, setup);
  SlabMemory(carver, setup, {0, static_cast<int>(heads), 0, static_cast<int>(tokens)});
  return carver.used();
}

// The public index() takes all tokens of some key heads at once.
std::size_t index_bytes(const Setup& setup, std::int64_t heads) {
  Carver carver;
  BatchMemory(carver, setup.shape);
  IndexMemory(carver, setup.shape, {0, static_cast<int>(heads), 0, setup.shape.total_q});
  return carver.used();
}

std::size_t dense_bytes(const Setup& setup) {
  Carver carver;
  BatchMemory(carver, setup.shape);
  DenseMemory(carver, setup);
  return carver.used();
}

// What no choice of slabs can do without.
std::size_t least_bytes(const Setup& setup) {
  const std::int64_t tokens = std::clamp<std::int64_t>(setup.shape.total_q, 1, kTokenStep);
  const std::size_t index = index_bytes(setup, 1);
  return std::max({slab_bytes(setup, 1, tokens), dense_bytes(setup), index <= kSmallIndex ? index : 0});
}

// Slabs as large as `limit` allows, which is least_bytes or more, and of about equal size: whole heads if one fits,
// else tokens of one head.
void choose_slabs(Setup& setup, std::size_t limit) {
  const Shape& s = setup.shape;
  const std::int64_t tokens = std::max(1, s.total_q), heads = s.kv_heads;
  std::int64_t most = largest(heads, [&](std::int64_t n) { return slab_bytes(setup, n, tokens) <= limit; });
  if (most > 0) {
    setup.slab_tokens = static_cast<int>(tokens);
    setup.slab_heads = static_cast<int>(ceil_div(heads, ceil_div(heads, most)));
    return;
  }
  const std::int64_t steps = ceil_div(tokens, kTokenStep);
  most =
      largest(steps, [&](std::int64_t n) { return slab_bytes(setup, 1, std::min(tokens, n * kTokenStep)) <= limit; });
  setup.slab_heads = 1;
  setup.slab_tokens = static_cast<int>(ceil_div(steps, ceil_div(steps, most)) * kTokenStep);
}

const char* name_of(AttendKernel kernel) {
  switch (kernel) {
    case AttendKernel::resident_sm90:
      return "resident sm90";
    case AttendKernel::stream_sm90:
      return "stream sm90";
    case AttendKernel::portable:
      return "portable";
  }
  return "unknown";
}

std::string slabs(const Shape& s, int heads, int tokens) {
  const std::int64_t count = ceil_div(s.kv_heads, heads) * ceil_div(std::max(1, s.total_q), tokens);
  return std::to_string(count) + (count == 1 ? " slab" : " slabs");
}

std::string describe_forward(const Plan::Impl& plan) {
  const Setup& setup = *plan.cuda;
  if (plan.forward_is_dense) return std::string(name_of(setup.dense)) + ", every block chosen: full attention";
  return std::string("gate ") + (setup.gate == GateKernel::sm90 ? "sm90" : "portable") + ", attend " +
         name_of(setup.attend) + ", " + slabs(setup.shape, setup.slab_heads, setup.slab_tokens);
}

std::string describe_backward(const Plan::Impl& plan) {
  const Setup& setup = *plan.cuda;
  if (plan.backward_workspace_limit > 0) return "backward refused: the workspace limit is too low";
  const BackwardSetup& backward = plan.forward_is_dense ? setup.dense_backward : setup.chosen_backward;
  const std::int64_t passes = ceil_div(backward.all_parts, backward.parts);
  return std::string("backward ") + (setup.backward == BackwardKernel::sm90 ? "sm90" : "portable") + ", " +
         slabs(setup.shape, backward.slab_heads, backward.slab_tokens) +
         (passes > 1 ? " of " + std::to_string(passes) + " passes" : "");
}

}  // namespace

BatchMemory::BatchMemory(Carver& carver, const Shape& shape)
    : sequences(carver.take<DeviceSequence>(shape.batch)), blocks(carver.take<DeviceBlock>(shape.max_blocks)) {}

RopeMemory::RopeMemory(Carver& carver, const Setup& setup)
    : steps(carver.take<double2>(std::int64_t{kRopeRun} * setup.rope_pairs)) {}

SlabMemory::SlabMemory(Carver& carver, const Setup& setup, Slab slab) {
  const Shape& s = setup.shape;
  const std::int64_t lists = std::int64_t{slab.heads} * s.max_blocks;
  const std::int64_t entries = std::int64_t{slab.heads} * slab.tokens * s.group * s.slots;
  ids = carver.take<std::int32_t>(entries);
  index.offsets = carver.take<std::int64_t>(lists + 1);
  index.rows = carver.take<std::int32_t>(entries);
  index.positions = carver.take<std::int32_t>(entries);
  index_scratch = carver.take<std::byte>(static_cast<std::int64_t>(index_scratch_bytes(s, slab)));
  units.units = carver.take<Unit>(unit_capacity(s, slab, setup.rows_per_unit));
  units.counters = carver.take<std::int32_t>(2);
  partials.out = carver.take<std::uint16_t>(entries * s.head_dim);
  partials.lse = carver.take<float>(entries);
}

DenseMemory::DenseMemory(Carver& carver, const Setup& setup) {
  units.units = carver.take<Unit>(dense_unit_capacity(setup.shape, setup.dense_rows_per_unit));
  units.counters = carver.take<std::int32_t>(2);
}

IndexMemory::IndexMemory(Carver& carver, const Shape& shape, Slab slab)
    : scratch(carver.take<std::byte>(static_cast<std::int64_t>(index_scratch_bytes(shape, slab)))) {}

void prepare(Plan::Impl& plan, const DeviceLimits& device) {
  check_problem(plan);
  const auto made = std::make_shared<Setup>();
  Setup& setup = *made;
  setup.device = device;
  setup.shape = shape_of(plan, device);
  if (plan.rope && !plan.problem.rope->cos.given()) setup.rope_pairs = static_cast<int>(plan.rope->pairs());
  choose_kernels(setup, plan.options.cuda_kernels);
  setup.rows_per_unit = rows_per_unit(setup);
  setup.dense_rows_per_unit = setup.dense == AttendKernel::portable ? portable_rows(setup.shape.head_dim) : 128;

  plan.selection_bytes = 0;  // chosen and used slab by slab
  const std::size_t outside = kAlignment + plan.q_rotated_bytes + plan.k_rotated_bytes + plan.centroids_bytes;
  const std::size_t least = least_bytes(setup), limit = plan.options.workspace_limit;
  if (limit > 0 && limit < outside + least) {
    refuse("options.workspace_limit", std::to_string(limit) + " bytes",
           "at least " + std::to_string(outside + least) + " bytes for this problem");
  }
  const std::size_t most = limit > 0 ? limit - outside : std::max(kDefaultScratch, least);
  choose_slabs(setup, most);
  std::size_t scratch = std::max(slab_bytes(setup, setup.slab_heads, setup.slab_tokens), least);
  // What index() takes grows with tokens * blocks. Where that is too much it is refused, and the rest goes on.
  const std::size_t index = index_bytes(setup, 1);
  if (index <= most) scratch = std::max(scratch, index);
  plan.index_workspace_limit = index <= most ? 0 : outside + index;
  setup.index_heads = static_cast<int>(
      largest(setup.shape.kv_heads, [&](std::int64_t heads) { return index_bytes(setup, heads) <= scratch; }));
  plan.scratch_bytes = aligned(scratch);

  const std::size_t outside_backward = kAlignment + plan.q_rotated_bytes + plan.k_rotated_bytes;
  const std::size_t most_backward = limit > 0 ? limit - outside_backward : default_backward(setup.shape);
  plan.backward_scratch_bytes = aligned(prepare_backward(setup, plan, most_backward));
  const std::size_t backward = outside_backward + plan.backward_scratch_bytes;
  plan.backward_workspace_limit = limit > 0 && backward > limit ? backward : 0;
  plan.cuda = made;
}

void prepare(Plan::Impl& plan) {
  plan.device = Device::cuda;
  plan.steps = &kSteps;
  prepare(plan, device_limits(plan.options.cuda_device));
}

std::string describe_kernels(const Plan::Impl& plan) {
  return "cuda (" + plan.cuda->device.name + "): " + describe_forward(plan) + "; " + describe_backward(plan);
}

}  // namespace moba::cuda
