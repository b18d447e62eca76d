// The commands of the program: what each takes from the command line, and the function that does it. They print to
// standard output and throw moba::Error for whatever they refuse.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "moba/config.h"
#include "moba/plan.h"

namespace moba::cli {

// What to compute and how, for the commands that read tensors from a file.
struct AttentionOptions {
  Config config;
  std::optional<Rope> rope;
  Options options;
};

struct RunArguments {
  std::string input, output;
  AttentionOptions attention;
  bool write_selection = false;
  bool quiet = false;
};
void run(const RunArguments& arguments);    // run.cc
void dense(const RunArguments& arguments);  // run.cc

struct CompareArguments {
  std::string input;
  std::string svg;  // empty: no picture
  AttentionOptions attention;
  std::int64_t check_rows = 4096;  // query tokens held against float64, the last ones
  int repeat = 3;
};
void compare(const CompareArguments& arguments);  // compare.cc

struct MapArguments {
  std::string input, output;
  AttentionOptions attention;
  std::int64_t sequence = 0;
};
void map(const MapArguments& arguments);  // map.cc

// Whether gradients are held against float64.
enum class CheckGradients : std::uint8_t { automatic, always, never };
// As much arithmetic as that is done for by itself.
inline constexpr double kCheckedFlop = 5e10;

struct BackwardArguments {
  std::string input;
  std::string output;  // empty: none
  AttentionOptions attention;
  std::optional<std::uint64_t> seed;  // of dout, where the file has none
  CheckGradients check = CheckGradients::automatic;
  int repeat = 3;
  bool quiet = false;
};
void backward(const BackwardArguments& arguments);  // backward.cc

struct DecodeArguments {
  std::string input;
  AttentionOptions attention;
  std::optional<std::int64_t> prefill;  // tokens fed in one call; not given: half of them
  std::optional<std::int64_t> tokens;   // then fed one by one; not given: the rest
  std::int64_t page_size = 0;           // 0: contiguous
  int repeat = 3;
  std::int64_t sequence = 0;
};
void decode(const DecodeArguments& arguments);  // decode.cc

struct PlanArguments {
  std::string problem;
  Options options;  // unless the problem says otherwise
};
void plan(const PlanArguments& arguments);  // plan.cc

struct BenchArguments {
  std::string problem;
  Options options;  // unless the problem says otherwise
  int repeat = 5;
  bool dense = true;
  bool backward = false;
  std::string json;  // empty: none
};
void bench(const BenchArguments& arguments);  // bench.cc

void info(const Options& options);  // info.cc

}  // namespace moba::cli
