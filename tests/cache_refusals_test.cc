// Every argument of a CachePlan, of append and of decode that is refused: by an Error that names it, before anything is
// written.
#include <algorithm>
#include <functional>

#include "cache_support.h"

namespace moba::test {
namespace {

CacheProblem good_problem() {
  return {.q_heads = 4,
          .kv_heads = 2,
          .head_dim = 16,
          .max_batch = 3,
          .max_new_tokens = 40,
          .max_length = 100,
          .config = {.block_size = 8, .top_k = 3}};
}

std::string message(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "not refused";
}

TEST(CacheRefusals, Plans) {
  struct Bad {
    const char* argument;
    std::function<void(CacheProblem&, Options&)> change;
  };
  const std::vector<Bad> all{
      {"max_batch: is 0; allowed: 1 to", [](auto& p, auto&) { p.max_batch = 0; }},
      {"max_batch: is -3; allowed: 1 to", [](auto& p, auto&) { p.max_batch = -3; }},
      {"max_new_tokens: is 0; allowed: 1 to", [](auto& p, auto&) { p.max_new_tokens = 0; }},
      {"max_new_tokens: is 2000000000; allowed: q_heads / kv_heads * max_new_tokens up to",
       [](auto& p, auto&) { p.max_new_tokens = 2000000000; }},
      {"max_length: is 0; allowed: 1 to", [](auto& p, auto&) { p.max_length = 0; }},
      {"max_length: is 4294967296; allowed: 1 to", [](auto& p, auto&) { p.max_length = std::int64_t{1} << 32; }},
      {"max_length * q_heads * head_dim: is more than 2^56",
       [](auto& p, auto&) {
         p.max_length = std::int64_t{1} << 30;
         p.q_heads = std::int64_t{1} << 24, p.kv_heads = 1;
         p.max_new_tokens = 1;
       }},
      {"config.causal: is false; allowed: true", [](auto& p, auto&) { p.config.causal = false; }},
      {"config.block_size: is 0", [](auto& p, auto&) { p.config.block_size = 0; }},
      {"config.top_k: is 0", [](auto& p, auto&) { p.config.top_k = 0; }},
      {"head_dim: is 7", [](auto& p, auto&) { p.head_dim = 7; }},
      {"kv_heads: is 0", [](auto& p, auto&) { p.kv_heads = 0; }},
      {"q_heads: is 5", [](auto& p, auto&) { p.q_heads = 5; }},
      {"dtype: is i32", [](auto& p, auto&) { p.dtype = DType::i32; }},
      {"rope.rotary_dim: is 3", [](auto& p, auto&) { p.rope = Rope{.rotary_dim = 3}; }},
      {"options.backend: is cuda; allowed: cpu, reference", [](auto&, auto& o) { o.backend = Backend::cuda; }},
      {"options.threads: is -1", [](auto&, auto& o) { o.threads = -1; }},
  };
  for (const Bad& bad : all) {
    CacheProblem problem = good_problem();
    Options options;
    bad.change(problem, options);
    EXPECT_TRUE(message([&] { CachePlan(problem, options); }).starts_with(bad.argument))
        << message([&] { CachePlan(problem, options); });
  }
}

// Two sequences of 20 and 13 tokens, the last 5 and 3 of them new; good until a test spoils something.
struct Arguments {
  Case c{.q_heads = 4,
         .kv_heads = 2,
         .head_dim = 16,
         .q_lengths = {20, 13},
         .k_lengths = {20, 13},
         .config = {.block_size = 8, .top_k = 3}};
  CachePlan plan{good_problem(), {.threads = 1}};
  CacheForm form;
  Array k_memory{DType::f32, {8, 2, 16}}, v_memory{DType::f32, {8, 2, 16}}, q_memory{DType::f32, {8, 4, 16}};
  Array cu = starts({5, 3});
  Array out{DType::f32, {8, 4, 16}}, lse{DType::f32, {4, 8}}, ids{DType::i32, {8, 4, 3}};
  std::vector<std::byte> memory = std::vector<std::byte>(plan.workspace_bytes(), std::byte{0x5a});
  std::vector<float> cached = std::vector<float>(std::size_t{2} * 64 * 2 * 16, 0.25f),
                     centroids = std::vector<float>(std::size_t{2} * 12 * 2 * 16, 0.5f);
  std::vector<std::int32_t> lengths{20, 13}, table{3, 1, 5, 6, -1, 7, 2, 99, -1, -1}, indptr{0, 3, 5},
      indices{3, 1, 5, 7, 2}, last_page_len{4, 5};

  ConstTensor k = k_memory.tensor(), v = v_memory.tensor(), q = q_memory.tensor(), cu_seqlens = cu.tensor();
  DecodeOutputs outputs{out.tensor(), lse.tensor(), ids.tensor()};
  Workspace workspace = memory;
  Cache cache;

  explicit Arguments(CacheForm which) : form(which) {
    // Pages of 8 tokens; or 32 places a sequence.
    const std::int64_t pages = form == CacheForm::contiguous ? 2 : 8, size = 64 / pages;
    cache.k = Tensor(cached.data(), DType::f32, {pages, size, 2, 16});
    cache.v = Tensor(cached.data() + std::ptrdiff_t{64} * 32, DType::f32, {pages, size, 2, 16});
    cache.centroids = Tensor(centroids.data(), DType::f32, {2, 12, 2, 16});
    if (form == CacheForm::csr) {
      cache.indptr = ConstTensor(indptr.data(), DType::i32, {3});
      cache.indices = ConstTensor(indices.data(), DType::i32, {5});
      cache.last_page_len = ConstTensor(last_page_len.data(), DType::i32, {2});
    } else {
      cache.lengths = ConstTensor(lengths.data(), DType::i32, {2});
    }
    if (form == CacheForm::block_table) cache.block_table = ConstTensor(table.data(), DType::i32, {2, 5});
  }
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  bool untouched() const {
    const auto all = [](const auto& values, auto value) {
      return std::ranges::all_of(values, [&](auto is) { return is == value; });
    };
    return out.untouched() && lse.untouched() && ids.untouched() && all(memory, std::byte{0x5a}) &&
           all(cached, 0.25f) && all(centroids, 0.5f);
  }
};

enum Function : unsigned { kAppend = 1, kDecode = 2 };

void call(unsigned function, Arguments& a) {
  if (function == kAppend) return append(a.plan, a.k, a.v, a.cu_seqlens, a.cache, a.workspace);
  decode(a.plan, a.q, a.cu_seqlens, a.cache, a.outputs, a.workspace);
}

void expect_refused(CacheForm form, unsigned functions, const std::string& start,
                    const std::function<void(Arguments&)>& spoil) {
  for (const unsigned function : {kAppend, kDecode}) {
    if ((functions & function) == 0) continue;
    Arguments a(form);
    spoil(a);
    const std::string got = message([&] { call(function, a); });
    EXPECT_TRUE(got.starts_with(start)) << (function == kAppend ? "append: " : "decode: ") << got << "\nnot " << start;
    EXPECT_TRUE(a.untouched()) << start;
  }
}

constexpr unsigned kBoth = kAppend | kDecode;
constexpr CacheForm kForms[] = {CacheForm::contiguous, CacheForm::block_table, CacheForm::csr};

TEST(CacheRefusals, GoodArgumentsAreTaken) {
  for (const CacheForm form : kForms) {
    Arguments a(form);
    for (const unsigned function : {kAppend, kDecode}) {
      EXPECT_EQ(message([&] { call(function, a); }), "not refused");
    }
    a.outputs.lse = a.outputs.ids = {};
    EXPECT_EQ(message([&] { call(kDecode, a); }), "not refused");
    // Unaligned to anything, and exactly as large as the plan says.
    std::vector<std::byte> odd(a.plan.workspace_bytes() + 1);
    a.workspace = std::span(odd).subspan(1);
    EXPECT_EQ(message([&] { call(kDecode, a); }), "not refused");
  }
}

TEST(CacheRefusals, Tensors) {
  for (const CacheForm form : kForms) {
    expect_refused(form, kAppend, "k: is not given", [](Arguments& a) { a.k = {}; });
    expect_refused(form, kAppend, "v: is not given", [](Arguments& a) { a.v = {}; });
    expect_refused(form, kDecode, "q: is not given", [](Arguments& a) { a.q = {}; });
    expect_refused(form, kAppend, "k: is f16 [8, 2, 16]", [](Arguments& a) { a.k.dtype = DType::f16; });
    expect_refused(form, kAppend, "v: is f32 [7, 2, 16]; allowed: f32 [8, 2, 16]",
                   [](Arguments& a) { a.v.shape[0] = 7; });
    expect_refused(form, kAppend, "k: is f32 [8, 3, 16]", [](Arguments& a) { a.k.shape[1] = 3; });
    expect_refused(form, kDecode, "q: is f32 [8, 4, 15]", [](Arguments& a) { a.q.shape[2] = 15; });
    expect_refused(form, kDecode, "q.stride[2]: is 2; allowed: 1", [](Arguments& a) { a.q.stride[2] = 2; });
    expect_refused(form, kDecode, "q: is a null pointer", [](Arguments& a) { a.q.data = nullptr; });
    expect_refused(form, kBoth, "cache.k: is not given", [](Arguments& a) { a.cache.k = {}; });
    expect_refused(form, kBoth, "cache.v: is not given", [](Arguments& a) { a.cache.v = {}; });
    expect_refused(form, kBoth, "cache.centroids: is not given", [](Arguments& a) { a.cache.centroids = {}; });
    expect_refused(form, kBoth, "cache.k: is bf16", [](Arguments& a) { a.cache.k.dtype = DType::bf16; });
    expect_refused(form, kBoth, "cache.v: is f32", [](Arguments& a) { --a.cache.v.shape[1]; });
    expect_refused(form, kBoth, "cache.k: is f32", [](Arguments& a) { a.cache.k.shape[2] = 1; });
    expect_refused(form, kBoth, "cache.k.stride[2]: is 16", [](Arguments& a) { a.cache.k.stride[1] = 16; });
    expect_refused(form, kBoth, "cache.centroids: is f32 [1, 12, 2, 16]; allowed: f32 [2, any, 2, 16]",
                   [](Arguments& a) { a.cache.centroids.shape[0] = 1; });
    expect_refused(form, kBoth,
                   "cache.centroids: is f32 [2, 1, 2, 16]; allowed: at least the 2 blocks that sequence 0 fills",
                   [](Arguments& a) { a.cache.centroids.shape[1] = 1; });
    expect_refused(form, kDecode, "out: is not given", [](Arguments& a) { a.outputs.out = {}; });
    expect_refused(form, kDecode, "out: is f32 [7, 4, 16]", [](Arguments& a) { a.outputs.out.shape[0] = 7; });
    expect_refused(form, kDecode, "lse: is f32 [4, 7]", [](Arguments& a) { a.outputs.lse.shape[1] = 7; });
    expect_refused(form, kDecode, "ids: is i32 [8, 4, 2]; allowed: i32 [8, 4, 3]",
                   [](Arguments& a) { a.outputs.ids.shape[2] = 2; });
    expect_refused(form, kBoth, "new tokens: is 41; allowed: up to max_new_tokens, 40",
                   [](Arguments& a) { a.k.shape[0] = a.v.shape[0] = a.q.shape[0] = 41; });
  }
  expect_refused(CacheForm::contiguous, kBoth, "cache.k: is f32 [1, 32, 2, 16]; allowed: f32 [2, any, 2, 16]",
                 [](Arguments& a) { a.cache.k.shape[0] = 1; });
  expect_refused(CacheForm::csr, kBoth, "cache.k: is f32 [8, 0, 2, 16]; allowed: pages of 1 token or more",
                 [](Arguments& a) { a.cache.k.shape[1] = a.cache.v.shape[1] = 0; });
}

TEST(CacheRefusals, NewTokens) {
  for (const CacheForm form : kForms) {
    const auto entries = [](Arguments& a, std::vector<std::int32_t> values) {
      for (std::int64_t i = 0; i < 3; ++i) a.cu.as<std::int32_t>(i) = values[static_cast<std::size_t>(i)];
    };
    expect_refused(form, kBoth, "cu_seqlens: is not given; allowed: i32 [3], unless there is one sequence",
                   [](Arguments& a) { a.cu_seqlens = {}; });
    expect_refused(form, kBoth, "cu_seqlens: is i64", [](Arguments& a) { a.cu_seqlens.dtype = DType::i64; });
    expect_refused(form, kBoth, "cu_seqlens[0]: is 1; allowed: 0", [&](Arguments& a) { entries(a, {1, 5, 8}); });
    expect_refused(form, kBoth, "cu_seqlens[2]: is 4; allowed: no less than", [&](Arguments& a) {
      entries(a, {0, 5, 4});
    });
    expect_refused(form, kBoth, "cu_seqlens[2]: is 7; allowed: the total, 8", [&](Arguments& a) {
      entries(a, {0, 5, 7});
    });
  }
}

TEST(CacheRefusals, LengthsThatLie) {
  for (const CacheForm form : {CacheForm::contiguous, CacheForm::block_table}) {
    expect_refused(form, kBoth, "cache.lengths[1]: is -1; allowed: 0 or more", [](Arguments& a) { a.lengths[1] = -1; });
    expect_refused(form, kBoth,
                   "cache.lengths[0]: is 4; allowed: at least the new tokens of the sequence in cu_seqlens (5)",
                   [](Arguments& a) { a.lengths[0] = 4; });
    expect_refused(form, kBoth, "cache.lengths[0]: is 101; allowed: up to max_length, 100",
                   [](Arguments& a) { a.lengths[0] = 101; });
    expect_refused(form, kBoth, "cache.lengths: is i32 [4]; allowed: up to max_batch (3) sequences",
                   [](Arguments& a) { a.cache.lengths.shape[0] = 4; });
    expect_refused(form, kBoth, "cache.lengths: is i64 [2]", [](Arguments& a) { a.cache.lengths.dtype = DType::i64; });
    expect_refused(form, kBoth, "cache.lengths: is not given", [](Arguments& a) { a.cache.lengths = {}; });
  }
  expect_refused(CacheForm::contiguous, kBoth,
                 "cache.lengths[0]: is 33; allowed: up to what the cache has places for, 32",
                 [](Arguments& a) { a.lengths[0] = 33; });
  expect_refused(CacheForm::block_table, kBoth,
                 "cache.lengths[1]: is 41; allowed: up to what the cache has places for, 40",
                 [](Arguments& a) { a.lengths[1] = 41; });
  expect_refused(CacheForm::csr, kBoth, "cache.last_page_len[0]: is 9; allowed: 1 to the page size, 8",
                 [](Arguments& a) { a.last_page_len[0] = 9; });
  expect_refused(CacheForm::csr, kBoth, "cache.last_page_len[1]: is 0; allowed: 1 to the page size, 8",
                 [](Arguments& a) { a.last_page_len[1] = 0; });
  expect_refused(CacheForm::csr, kBoth, "length of sequence 1 in cache.indptr: is 0; allowed: at least the new tokens",
                 [](Arguments& a) {
                   a.indptr = {0, 3, 3};
                 });
}

TEST(CacheRefusals, Tables) {
  expect_refused(CacheForm::block_table, kBoth, "cache.block_table[0, 1]: is 8; allowed: pages of cache.k, 0 to 7",
                 [](Arguments& a) { a.table[1] = 8; });
  expect_refused(CacheForm::block_table, kBoth, "cache.block_table[1, 0]: is -1; allowed: pages of cache.k, 0 to 7",
                 [](Arguments& a) { a.table[5] = -1; });
  expect_refused(CacheForm::block_table, kBoth, "cache.block_table: is i32 [1, 5]",
                 [](Arguments& a) { a.cache.block_table.shape[0] = 1; });
  expect_refused(CacheForm::csr, kBoth, "cache.indices[4]: is 100; allowed: pages of cache.k, 0 to 7",
                 [](Arguments& a) { a.indices[4] = 100; });
  expect_refused(CacheForm::csr, kBoth, "cache.indptr[0]: is 1; allowed: 0", [](Arguments& a) { a.indptr[0] = 1; });
  expect_refused(CacheForm::csr, kBoth, "cache.indptr[2]: is 2; allowed: no less than the entry before it (3)",
                 [](Arguments& a) { a.indptr[2] = 2; });
  expect_refused(CacheForm::csr, kBoth, "cache.indptr[2]: is 6; allowed: up to the entries of cache.indices, 5",
                 [](Arguments& a) { a.indptr[2] = 6; });
  expect_refused(CacheForm::csr, kBoth, "cache.indptr: is i32 [2]", [](Arguments& a) { a.cache.indptr.shape[0] = 2; });
  expect_refused(CacheForm::csr, kBoth, "cache.indices: is not given", [](Arguments& a) { a.cache.indices = {}; });
  expect_refused(CacheForm::csr, kBoth, "cache.last_page_len: is not given",
                 [](Arguments& a) { a.cache.last_page_len = {}; });
  expect_refused(CacheForm::csr, kBoth, "cache.lengths: is given; allowed: not given beside cache.indptr",
                 [](Arguments& a) { a.cache.lengths = ConstTensor(a.lengths.data(), DType::i32, {2}); });
  expect_refused(CacheForm::csr, kBoth, "cache.indptr: is given; allowed: not given beside cache.block_table",
                 [](Arguments& a) {
                   a.cache.block_table = ConstTensor(a.table.data(), DType::i32, {2, 5});
                 });
}

// New tokens go to pages of their own; what is only read may be shared.
TEST(CacheRefusals, PagesThatAreUsedTwice) {
  expect_refused(CacheForm::block_table, kAppend, "cache.block_table[1, 1]: is page 5, which is used twice",
                 [](Arguments& a) { a.table[6] = 5; });
  expect_refused(CacheForm::block_table, kAppend, "cache.block_table[0, 0]: is page 5, which is used twice",
                 [](Arguments& a) { a.table[0] = 5; });
  expect_refused(CacheForm::csr, kAppend,
                 "cache.indices[3]: is page 5, which is used twice; allowed: pages of their own",
                 [](Arguments& a) { a.indices[3] = 5; });
  for (const unsigned function : {kAppend, kDecode}) {
    Arguments shared(CacheForm::block_table);
    shared.table[5] = shared.table[0];
    EXPECT_EQ(message([&] { call(function, shared); }), "not refused");
  }
}

TEST(CacheRefusals, Memory) {
  for (const CacheForm form : kForms) {
    const std::size_t bytes = CachePlan(good_problem(), {.threads = 1}).workspace_bytes();
    expect_refused(form, kBoth,
                   "workspace: is " + std::to_string(bytes - 1) + " bytes; allowed: at least plan.workspace_bytes(), " +
                       std::to_string(bytes),
                   [](Arguments& a) { a.workspace = a.workspace.first(a.workspace.size() - 1); });
    expect_refused(form, kBoth, "workspace: is 0 bytes", [](Arguments& a) { a.workspace = {}; });
    expect_refused(form, kAppend, "cache.k: is in memory that k spans",
                   [](Arguments& a) { a.k.data = a.cached.data() + 100; });
    expect_refused(form, kAppend, "cache.v: is in memory that v spans",
                   [](Arguments& a) { a.v.data = a.cached.data() + std::ptrdiff_t{64} * 32 + 7; });
    expect_refused(form, kAppend, "cache.centroids: is in memory that k spans",
                   [](Arguments& a) { a.k.data = a.centroids.data(); });
    expect_refused(form, kAppend, "cache.k: is in memory that cache.v spans",
                   [](Arguments& a) { a.cache.v.data = a.cached.data() + 16; });
    expect_refused(form, kAppend, "cache.centroids: is in memory that cache.v spans", [](Arguments& a) {
      a.cache.centroids.data = a.cache.v.data;
      a.cache.centroids.shape[1] = 2;
    });
    expect_refused(form, kDecode, "out: is in memory that q spans",
                   [](Arguments& a) { a.outputs.out.data = const_cast<void*>(a.q.data); });
    expect_refused(form, kDecode, "out: is in memory that cache.k spans",
                   [](Arguments& a) { a.outputs.out.data = a.cached.data(); });
    expect_refused(form, kDecode, "lse: is in memory that cache.centroids spans",
                   [](Arguments& a) { a.outputs.lse.data = a.centroids.data(); });
    expect_refused(form, kDecode, "lse: is in memory that out spans",
                   [](Arguments& a) { a.outputs.lse.data = a.outputs.out.data; });
    expect_refused(form, kDecode, "ids: is in memory that out spans",
                   [](Arguments& a) { a.outputs.ids.data = a.outputs.out.data; });
    expect_refused(form, kBoth, "workspace: is in memory that", [](Arguments& a) {
      a.cached.resize(a.plan.workspace_bytes(), 0.25f);
      const std::ptrdiff_t moved =
          reinterpret_cast<std::byte*>(a.cached.data()) - static_cast<std::byte*>(a.cache.k.data);
      a.cache.k.data = static_cast<std::byte*>(a.cache.k.data) + moved;
      a.cache.v.data = static_cast<std::byte*>(a.cache.v.data) + moved;
      a.workspace = std::as_writable_bytes(std::span(a.cached)).first(a.plan.workspace_bytes());
    });
  }
}

// Tables are only read, so nothing may be written over them.
TEST(CacheRefusals, OutputsOverTables) {
  std::vector<std::int32_t> room(1 << 14);
  const auto refused = [&](CacheForm form, const std::string& name, ConstTensor& (*get)(Arguments&)) {
    const auto move_table = [&](Arguments& a) {
      ConstTensor& table = get(a);
      const std::int64_t count = table.shape[0] * (table.rank == 2 ? table.shape[1] : 1);
      std::copy_n(static_cast<const std::int32_t*>(table.data), count, room.begin());
      table.data = room.data();
    };
    expect_refused(form, kDecode, "out: is in memory that " + name + " spans", [&](Arguments& a) {
      move_table(a);
      a.outputs.out.data = room.data();
    });
    expect_refused(form, kAppend, "cache.centroids: is in memory that " + name + " spans", [&](Arguments& a) {
      move_table(a);
      a.cache.centroids.data = room.data();
    });
  };
  for (const CacheForm form : kForms) refused(form, "cu_seqlens", [](auto& a) -> ConstTensor& { return a.cu_seqlens; });
  refused(CacheForm::contiguous, "cache.lengths", [](auto& a) -> ConstTensor& { return a.cache.lengths; });
  refused(CacheForm::block_table, "cache.block_table", [](auto& a) -> ConstTensor& { return a.cache.block_table; });
  refused(CacheForm::csr, "cache.indptr", [](auto& a) -> ConstTensor& { return a.cache.indptr; });
  refused(CacheForm::csr, "cache.indices", [](auto& a) -> ConstTensor& { return a.cache.indices; });
  refused(CacheForm::csr, "cache.last_page_len", [](auto& a) -> ConstTensor& { return a.cache.last_page_len; });
}

// k and v of a page may lie beside each other: [pages, 2, page size, heads, d], and with tokens inside: [.., 2, heads,
// d].
TEST(CacheRefusals, KeysAndValuesMayInterleave) {
  for (const std::int64_t offset : {256, 32}) {
    Arguments a(CacheForm::block_table);
    a.cache.k.stride = a.cache.v.stride =
        offset == 32 ? std::array<std::int64_t, 4>{512, 64, 16, 1} : std::array<std::int64_t, 4>{512, 32, 16, 1};
    a.cache.v.data = a.cached.data() + offset;
    EXPECT_EQ(message([&] { call(kAppend, a); }), "not refused");
    a.cache.v.data = a.cached.data() + offset - 16;
    EXPECT_TRUE(message([&] { call(kAppend, a); }).starts_with("cache.k: is in memory that cache.v spans"));
  }
}

}  // namespace
}  // namespace moba::test
