// The contract between the host and the device: plain structs, and every function that launches kernels. All launches
// go to the stream given, allocate nothing, never wait for the device and can be captured in a graph.
//
// A row is a (query token, query head). Within a key head h its id is token * group + (query head - h * group), with
// tokens counted through the packed batch; ids fit in 31 bits (checked by the plan). Blocks are numbered through the
// batch, sequence after sequence, as in moba::Selection; a selection's ids count within the sequence.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "moba/tensor.h"

namespace moba::cuda {

// What is the same for every call of a plan.
struct Shape {
  DType dtype = DType::bf16;  // f16 or bf16
  int head_dim = 0;           // d, a multiple of 32, 32 to 256
  int q_heads = 0, kv_heads = 0, group = 1;
  int batch = 0;
  int total_q = 0, total_k = 0;
  int block_size = 0;  // B, a multiple of 16
  int top_k = 0;       // as configured; the own block counts
  int slots = 0;       // ids of a row: min(top_k, blocks of the longest sequence); 1 to 64
  int max_blocks = 0;  // upper bound of the blocks of the batch; 0 where there are no keys
  bool causal = true;
  float scale = 1.0f;  // factor on q . k, >= 0
  int sm_count = 1;    // of the device
};

// A part of the work, processed at once: key heads [head_begin, head_begin + heads), query tokens [token_begin,
// token_begin + tokens). Rows of a slab are numbered from 0 within each of its key heads:
// (token - token_begin) * group + head in group.
struct Slab {
  int head_begin = 0, heads = 0;
  int token_begin = 0, tokens = 0;
};

// One sequence of the batch, on the device. Query i of it sits at position k_len - q_len + i.
struct DeviceSequence {
  int q_begin, q_len, k_begin, k_len, block_begin, blocks;
};

// One block, on the device. A causal query token t of the block's sequence sees the first
// min(keys, max(0, t - first_token + 1)) keys of it.
struct DeviceBlock {
  int key_begin;    // token of k
  int keys;         // min(B, what is left of the sequence); 0 for the unused numbers behind the last block
  int first_token;  // the query token at the position of the block's first key; may lie outside the sequence's queries
  int sequence;
};

// The batch on the device. Made by prepare_batch.
struct Batch {
  const DeviceSequence* sequences;  // [batch]
  const DeviceBlock* blocks;        // [max_blocks]
};

// [tokens or blocks, heads, d] of the plan's dtype; strides count elements and are multiples of 8; data is 16-byte
// aligned; the last stride is 1.
template <class Void>
struct View {
  Void* data;
  std::int64_t token_stride, head_stride;
};

// lse f32 [Hq, Tq]; null if not wanted.
struct LseView {
  float* data;
  std::int64_t head_stride, token_stride;
};

// Ids of a selection, i32, `slots` of them side by side for a row: those of (token, head in group) of key head h stand
// at data + (h - head_begin) * head_stride + (token - token_begin) * token_stride + head in group * group_stride, where
// head_begin and token_begin are the slab's. group_stride = 0: the heads of a group share their ids.
template <class Int>
struct IdsView {
  Int* data;
  std::int64_t head_stride, token_stride, group_stride;
};

// How many ids of a row are not -1; null if not wanted.
using CountsView = IdsView<std::int32_t>;

// The transpose of the slab's ids.
struct Index {
  std::int64_t* offsets;  // [heads * max_blocks + 1]: entries of (head h of the slab, block b) are
                          // offsets[h * max_blocks + b] ...
  std::int32_t* rows;     // [heads * tokens * group * slots] row ids (not slab rows), ascending for each (head, block)
  std::int32_t* positions;  // [heads][slab rows][slots]: entry of each id, less offsets[h * max_blocks]; -1 for no id,
                            // kInvalidRow in every slot of a row whose ids are not ascending, in range, then -1
};
inline constexpr std::int32_t kInvalidRow = -2;

// A work unit of attend or backward: rows of one list against one key range.
struct alignas(16) Unit {
  std::int64_t first;            // first entry of the unit in Index::rows (lists) and in the partials
  std::int32_t head;             // key head, of all (not of the slab)
  std::int32_t key_begin, keys;  // tokens of k; keys >= 1, for dense() as many as the unit's last row sees
  std::int32_t rows;             // >= 1
  std::int32_t first_token;      // row with token t sees min(keys, max(0, t - first_token + 1)) keys if causal
  std::int32_t masked;           // leading rows that see fewer than `keys` keys; 0 if not causal
  std::int32_t row0;       // >= 0: the first `masked` rows (dense: all rows) are row0, row0 + 1, ...; -1: read them
  std::int32_t part = 0;   // backward: which of the pass's parts of their block the keys are
  std::int32_t share = 0;  // backward: where its dk and dv go, or -1: no other unit has its keys
  std::int32_t rest = 0;   // units are copied whole, 16 bytes at a time
};

struct UnitList {
  Unit* units;             // [capacity], capacity from unit_capacity()
  std::int32_t* counters;  // [2]: units handed out so far (0 when attend starts), units in the list
};

// Partial results, by entry of Index::rows: the normalised output of (row, block) and its log-sum-exp, base 2, of the
// scaled scores (-inf, and out 0, where no key is seen). A partial row is stored in fragment order: its 16-byte chunk
// 4m + c holds the columns 32m + 8x + 2c and + 1 for x = 0 .. 3, in that order.
struct Partials {
  void* out;   // [entries][d] of the plan's dtype
  float* lse;  // [entries]
};

// Where attend writes: partials (slab), or final rows where every row is of one unit (dense).
struct AttendOutput {
  Partials partials;  // out null: write the final rows
  View<void> out;     // [Tq, Hq, d]
  LseView lse;
};

struct AttendInput {
  View<const void> q, k, v;
  const std::int32_t* rows;  // Index::rows; null for dense
};

// How units of lists are ordered and cut: key heads go in sections, and in each of them units with many rows come
// first.
struct Sections {
  int heads = 1;                            // of a section
  int most_rows = 64, last_most_rows = 64;  // of a unit, multiples of 64; of one of the slab's last section
};

// backward: a block's keys are cut into parts of part_keys (the last may have fewer), which the kernel holds at a time,
// and taken in passes of some parts of every block, as memory allows.
struct Pass {
  Sections sections;
  int part_keys;
  int part_begin, parts;  // the parts of every block, those that it has
};

// The keys whose dk and dv are sums over `count` shares, from `first` on.
struct Split {
  std::int32_t first, count;
  std::int32_t head, key_begin, keys;  // as in Unit
};

struct ShareList {
  Split* splits;           // [share_capacity().splits]
  std::int32_t* counters;  // [2]: shares, splits
};

// What backward needs of a row besides q and dout. That of slab row r of head h of the slab stands at r + h * rows of a
// head; behind all of them is one that rows of no unit read.
struct RowValues {
  // For backward_sm90, else null: lse and delta as of row_terms.cuh.
  uint4* terms = nullptr;
  // For backward_portable, else null: lse, base 2, +inf for a row with lse -inf and for what is behind all, whose
  // weights are 0; dout . out.
  float *lse = nullptr, *delta = nullptr;
};

// Sums in float32 over slabs of tokens; null where one slab has all.
struct KeyTotals {
  float *dk, *dv;  // [Tk, d] of one key head, dk times scale
};

struct BackwardInput {
  View<const void> q, k, v, dout;
  const std::int32_t* rows;  // Index::rows; null for dense
  RowValues values;
};

struct BackwardOutput {
  void* dq;                  // partials of dq, times scale: [parts of the pass][entries][d], rows as in Partials::out
  std::int64_t part_stride;  // entries of a part
  float* shares;             // [shares][2][part_keys][d]: dk, times scale, and dv; not written behind the unit's keys
  View<void> dk, dv;         // [Tk, Hk, d], where Unit::share is -1
  KeyTotals totals;          // added to in their place, if there are any
  int part_keys;             // of a unit at most
};

// When a kernel starts: behind all that is in the stream, or, where the device can, while the kernel before it ends or
// beside it (launch.h).
enum class Start : std::uint8_t { behind, early, beside };

// ---- Setup ----

// batch.cu: sequences and blocks from cu_seqlens (device, i32 [batch + 1]; null: one sequence of all tokens). Tables
// that are not ascending from 0 to the total, or hold a sequence above the longest allowed or (from_zero) one with more
// queries than keys, give a batch without keys and without queries, so that nothing out of bounds is touched: every row
// is then written as NaN by merge and dense.
void prepare_batch(const Shape& shape, const std::int32_t* cu_seqlens_q, const std::int32_t* cu_seqlens_k,
                   std::int64_t max_seqlen_q, std::int64_t max_seqlen_k, bool from_zero, DeviceSequence* sequences,
                   DeviceBlock* blocks, cudaStream_t stream);

// ---- The steps ----

struct RopeParameters {
  bool interleaved;
  int pairs;              // rotary_dim / 2
  double magnitude;       // factor on cos and sin
  double frequency[128];  // radians per position of each pair; unused where a table is given
  bool back = false;      // by the opposite angles
  const double2* steps;   // by rope_steps(), on the device; unused where a table is given
  const float* cos;       // the caller's table on the device, [positions, pairs], or null
  const float* sin;
  std::int64_t cos_stride, sin_stride;
};

// rope.cu. cos and sin of the angles of positions 0 .. kRopeRun - 1, [kRopeRun][pairs]: what all runs of kRopeRun
// positions have in common.
inline constexpr int kRopeRun = 64;
void rope_steps(const RopeParameters&, double2* steps, cudaStream_t);
void rope_queries(const Shape&, const RopeParameters&, Batch, View<const void> q, View<void> q_rotated, cudaStream_t);
// Rotates k and pools the rotated keys in one pass. centroids.data may be null.
void rope_keys(const Shape&, const RopeParameters&, Batch, View<const void> k, View<void> k_rotated,
               View<void> centroids, cudaStream_t);

// pool.cu: centroids [max_blocks, Hk, d]; rows behind the last block are not written.
void pool(const Shape&, Batch, View<const void> k, View<void> centroids, cudaStream_t);

// gate_sm90.cu (d 64 and 128, slots up to 17), gate_portable.cu (all).
void gate_sm90(const Shape&, Slab, Batch, View<const void> q, View<const void> centroids, IdsView<std::int32_t> ids,
               CountsView counts, cudaStream_t);
void gate_portable(const Shape&, Slab, Batch, View<const void> q, View<const void> centroids, IdsView<std::int32_t> ids,
                   CountsView counts, cudaStream_t);

// index.cu, for up to kMaxBlocks blocks. Entries of the slab start at offsets_begin (device, null: 0), which is how the
// slabs of a public index() follow each other. positions may be null.
inline constexpr int kMaxBlocks = 1 << 21;
std::size_t index_scratch_bytes(const Shape&, Slab);
void index(const Shape&, Slab, Batch, IdsView<const std::int32_t> ids, CountsView counts, const Index&,
           const std::int64_t* offsets_begin, void* scratch, cudaStream_t);

// units.cu, dense_units.cu. rows_per_unit is a multiple of 64. Both set counters; long units first within a key
// head, or for backward within a section of heads (unit_lists.cuh).
std::int64_t unit_capacity(const Shape&, Slab, int rows_per_unit);
std::int64_t dense_unit_capacity(const Shape&, int rows_per_unit);
void list_units(const Shape&, Slab, Batch, const Index&, int rows_per_unit, const UnitList&, cudaStream_t);
// Rows row0 .. row0 + rows - 1 of one (key head, sequence) against the keys that the last of them sees. Rows that see
// no key get no unit: dense() writes them by itself.
void list_dense_units(const Shape&, Batch, int rows_per_unit, const UnitList&, cudaStream_t);

// attend_resident_sm90.cu: B <= 128, d 64 and 128: the unit's keys stay in shared memory; units of any number of rows
// (rows_per_unit in setup.cc).
void attend_resident_sm90(const Shape&, const AttendInput&, const UnitList&, const AttendOutput&, cudaStream_t);
// attend_stream_sm90.cu: any number of keys, d 64 and 128; units of at most 128 rows.
void attend_stream_sm90(const Shape&, const AttendInput&, const UnitList&, const AttendOutput&, cudaStream_t);
// attend_portable.cu: any number of keys, all d; units of at most portable_rows(d) rows.
int portable_rows(int head_dim);
void attend_portable(const Shape&, const AttendInput&, const UnitList&, const AttendOutput&, cudaStream_t);

// merge.cu: out and lse of the slab's rows from the partials of their ids, added up in the order of the ids. A row
// without ids or keys: out 0, lse -inf. A row of kInvalidRow, or of a token that lies in no sequence: NaN.
void merge(const Shape&, Slab, const Index&, const Partials&, View<void> out, LseView lse, cudaStream_t);
// Rows that list_dense_units left out: 0 and -inf, or NaN for tokens that lie in no sequence.
void fill_dense_rest(const Shape&, Batch, View<void> out, LseView lse, cudaStream_t);
// The public merge(): out = sum of exp(lse_i - lse) out_i over `count` partials of the caller's.
inline constexpr int kMaxCallerPartials = 48;  // what fits in the arguments of a kernel
struct CallerPartials {
  int count;
  View<const void> out[kMaxCallerPartials];
  View<const void> lse[kMaxCallerPartials];  // f32 [Hq, Tq]
};
void merge_partials(const Shape&, const CallerPartials&, View<void> out, LseView lse, cudaStream_t);

// ---- The steps of backward ----

// choose_all.cu: the ids, and counts if wanted, of a plan whose slots hold every block: all that a row sees.
void choose_all(const Shape&, Batch, IdsView<std::int32_t> ids, CountsView counts, cudaStream_t);

// backward_rows.cu: the values of the slab's rows. lse f32 [Hq, Tq]. Launched beside the kernel before it, which must
// be launched so too, or behind all (launch.h).
std::int64_t row_value_count(const Shape&, Slab);
void row_values(const Shape&, Slab, View<const void> out, View<const void> dout, View<const void> lse, const RowValues&,
                cudaStream_t);

// units.cu, dense_units.cu, as the functions above. Dense: lists of all the rows of the slab that see a part of their
// sequence, which then stands for a block. They expect counters of 0 in the ShareList.
std::int64_t backward_unit_capacity(const Shape&, Slab, const Pass&);
std::int64_t dense_backward_unit_capacity(const Shape&, Slab, const Pass&);
struct ShareCapacity {
  std::int64_t shares, splits;
};
ShareCapacity share_capacity(const Shape&, Slab, const Pass&);
ShareCapacity dense_share_capacity(const Shape&, Slab, const Pass&);
void list_backward_units(Start, const Shape&, Slab, Batch, const Index&, const Pass&, const UnitList&, const ShareList&,
                         cudaStream_t);
void list_dense_backward_units(Start, const Shape&, Slab, Batch, const Pass&, const UnitList&, const ShareList&,
                               cudaStream_t);

// dk and dv, and the partials of dq, of all units. backward_sm90.cu: d 64 and 128, parts of 128 keys.
inline constexpr int kSm90PartKeys = 128;
void backward_sm90(const Shape&, Slab, const BackwardInput&, const UnitList&, const BackwardOutput&, cudaStream_t);
// backward_portable.cu: all d, parts of portable_part_keys(d) keys or, up to d = 64, of 64.
int portable_part_keys(int head_dim);
void backward_portable(const Shape&, Slab, const BackwardInput&, const UnitList&, const BackwardOutput&, cudaStream_t);

// backward_keys.cu: what shares add up to, in their order: final dk and dv, or, where there are totals, added to them.
void sum_shares(const Shape&, const Pass&, const ShareList&, const float* shares, View<void> dk, View<void> dv,
                const KeyTotals&, cudaStream_t);
// The totals of key head `head` as dk and dv; NaN for tokens that lie in no sequence.
void write_totals(const Shape&, Batch, int head, const KeyTotals&, View<void> dk, View<void> dv, cudaStream_t);
// dk and dv of keys of no unit: 0, or NaN for tokens that lie in no sequence. index null: dense.
void fill_keys(const Shape&, Slab, Batch, const Index* index, View<void> dk, View<void> dv, cudaStream_t);

// backward_queries.cu: dq of the slab's rows from the partials of a pass, added up in the order of parts, then ids. A
// row without any: 0. A row of kInvalidRow, or of a token that lies in no sequence: NaN. Launched beside sum_shares().
struct QuerySums {
  IdsView<const std::int32_t> ids;  // data null: dense
  Index index;                      // unused for dense
  const void* partials;             // BackwardOutput
  std::int64_t part_stride;
  float* totals;     // [rows of the slab][d] from pass to pass; null where one does all
  bool first, last;  // of the passes
};
void sum_queries(const Shape&, Slab, Batch, const Pass&, const QuerySums&, View<void> dq, cudaStream_t);

}  // namespace moba::cuda
