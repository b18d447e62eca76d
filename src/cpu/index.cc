// index: the transpose of a selection by counting sort: chunks of tokens are counted apart, the counts scanned in the
// order of the chunks, and each chunk then writes its rows to places of its own, ascending.
#include <numeric>

#include "call.h"
#include "cpu/workers.h"
#include "parallel.h"

namespace moba::cpu {

namespace {

// One selection seen as rows of ids, by (token, query head).
class Ids {
 public:
  Ids(const Call& call, const Selection& selection)
      : ids_(static_cast<const std::int32_t*>(selection.ids.data)),
        token_stride_(selection.ids.stride[0]),
        head_stride_(selection.ids.stride[1]),
        slots_(call.plan.slots),
        heads_per_row_(call.plan.problem.q_heads / selection.ids.shape[1]) {}

  // The ids of the row, without the -1 behind them.
  std::span<const std::int32_t> row(std::int64_t token, std::int64_t q_head) const {
    const std::int32_t* first = ids_ + token * token_stride_ + q_head / heads_per_row_ * head_stride_;
    const auto end = std::find(first, first + slots_, -1);
    return {first, end};
  }

 private:
  const std::int32_t* ids_;
  std::int64_t token_stride_, head_stride_, slots_, heads_per_row_;
};

// f(key head, block of the batch, row) for every chosen block of tokens [begin, end), rows ascending per key head.
template <class F>
void for_each_choice(const Call& call, const Ids& ids, std::int64_t begin, std::int64_t end, F&& f) {
  const std::int64_t group = call.plan.group;
  for_each_sequence(call.sequences, begin, end, [&](const Sequence& sequence, std::int64_t first, std::int64_t last) {
    for (std::int64_t token = first; token < last; ++token) {
      for (std::int64_t head = 0; head < call.plan.problem.q_heads; ++head) {
        const std::int32_t row = static_cast<std::int32_t>(token * group + head % group);
        for (const std::int32_t id : ids.row(token, head)) f(head / group, sequence.block_begin + id, row);
      }
    }
  });
}

void write_counts(const Call& call, const Selection& selection, std::int64_t begin, std::int64_t end) {
  const std::int64_t heads = selection.ids.shape[1], per_row = call.plan.problem.q_heads / heads;
  const Ids ids(call, selection);
  std::int32_t* counts = static_cast<std::int32_t*>(selection.counts.data);
  for (std::int64_t token = begin; token < end; ++token) {
    for (std::int64_t head = 0; head < heads; ++head) {
      counts[token * selection.counts.stride[0] + head * selection.counts.stride[1]] =
          static_cast<std::int32_t>(ids.row(token, head * per_row).size());
    }
  }
}

}  // namespace

void index(const Call& call, const Selection& selection) {
  const std::int64_t tokens = call.plan.problem.total_q, lists = call.plan.problem.kv_heads * call.plan.max_blocks;
  const std::int64_t chunks = index_chunks(call.plan), step = ceil_div(std::max<std::int64_t>(tokens, 1), chunks);
  const auto chunk_end = [&](std::int64_t chunk) { return std::min(tokens, (chunk + 1) * step); };
  std::int64_t* places = reinterpret_cast<std::int64_t*>(call.scratch.data());  // [chunks][lists]
  std::int64_t* offsets = static_cast<std::int64_t*>(selection.offsets.data);
  std::int32_t* rows = static_cast<std::int32_t*>(selection.rows.data);
  const Ids ids(call, selection);

  parallel_for(call.plan.threads, chunks, [&](std::int64_t chunk, int) {
    std::int64_t* count = places + chunk * lists;
    std::fill_n(count, lists, 0);
    for_each_choice(
        call, ids, chunk * step, chunk_end(chunk),
        [&](std::int64_t head, std::int64_t block, std::int32_t) { ++count[head * call.plan.max_blocks + block]; });
    write_counts(call, selection, chunk * step, chunk_end(chunk));
  });

  // How many rows each list has; where each list starts; where in it each chunk does.
  constexpr std::int64_t kLists = 512;
  const std::int64_t groups = ceil_div(lists, kLists);
  const auto for_each_list = [&](auto&& f) {
    parallel_for(call.plan.threads, groups, [&](std::int64_t group, int) {
      for (std::int64_t list = group * kLists; list < std::min(lists, (group + 1) * kLists); ++list) f(list);
    });
  };
  for_each_list([&](std::int64_t list) {
    std::int64_t rows_of_list = 0;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) rows_of_list += places[chunk * lists + list];
    offsets[list + 1] = rows_of_list;
  });
  offsets[0] = 0;
  std::partial_sum(offsets, offsets + lists + 1, offsets);
  for_each_list([&](std::int64_t list) {
    std::int64_t next = offsets[list];
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::int64_t count = places[chunk * lists + list];
      places[chunk * lists + list] = next;
      next += count;
    }
  });

  parallel_for(call.plan.threads, chunks, [&](std::int64_t chunk, int) {
    std::int64_t* place = places + chunk * lists;
    for_each_choice(call, ids, chunk * step, chunk_end(chunk),
                    [&](std::int64_t head, std::int64_t block, std::int32_t row) {
                      rows[place[head * call.plan.max_blocks + block]++] = row;
                    });
  });
}

}  // namespace moba::cpu
