#include "command_line.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <functional>
#include <new>

#include "commands.h"
#include "moba/error.h"
#include "moba/info.h"
#include "options.h"
#include "problem_text.h"
#include "text.h"

namespace moba::cli {
namespace {

const char* const kOverview =
    R"(Mixture of Block Attention on the CPU or an NVIDIA GPU: every query attends to the top-k blocks of keys
that it scores highest, its own block among them.)";

const char* const kExamples = R"(
Start here:
  moba compare data/smollm2-135m-layer15.safetensors --rope-base 100000
  moba plan 'tokens=32768 q_heads=32 kv_heads=8 d=128 dtype=bf16'
  moba COMMAND --help

Exit codes: 0 done, 1 refused input or failure, 2 wrong command line.)";

const char* const kFileHelp = R"(
The input holds q [Tq, Hq, d] and k, v [Tk, Hk, d], all F32, F16 or BF16, Hq a multiple of Hk. Sequences packed
one after another are told apart by I32 cu_seqlens [sequences + 1] from 0 to the token count, or by cu_seqlens_q
and cu_seqlens_k where queries and keys differ. Other tensors are passed over. What takes more memory than the
machine has, than the control group (cgroup) of the process allows or than is free on the GPU, is refused before it
is allocated. The GPU takes F16 and BF16.
)";

// Every command's arguments live here while the command line is parsed and the command runs.
struct Parsed {
  RunArguments run, dense;
  CompareArguments compare;
  BackwardArguments backward;
  DecodeArguments decode;
  MapArguments map;
  PlanArguments plan;
  BenchArguments bench;
  Options info;
  std::function<void()> command;  // what the command line asks for
};

void add_input(CLI::App& app, std::string& input) {
  app.add_option("IN", input, "safetensors file with q, k and v")->required()->type_name("");
}

void add_output(CLI::App& app, std::string& output, const char* help) {
  app.add_option("-o,--output", output, help)->required()->type_name("FILE");
}

int to_int(std::int64_t value) { return static_cast<int>(value); }

void add_repeat(CLI::App& app, int& repeat) {
  add_int(
      app, "--repeat", 1, 1000, [&repeat](std::int64_t x) { repeat = to_int(x); },
      "passes to time, the fastest counts (default " + std::to_string(repeat) + ")");
}

void add_sequence(CLI::App& app, std::int64_t& sequence) {
  add_int(
      app, "--sequence", 0, std::numeric_limits<std::int64_t>::max(), [&sequence](std::int64_t x) { sequence = x; },
      "which sequence of a pack (default 0)");
}

void add_run(CLI::App& app, Parsed& parsed) {
  RunArguments& arguments = parsed.run;
  CLI::App& command = *app.add_subcommand("run", "MoBA on the tensors of a file");
  add_input(command, arguments.input);
  add_output(command, arguments.output, "safetensors file to write: out [Tq, Hq, d] and lse F32 [Hq, Tq]");
  add_block_options(command, arguments.attention);
  add_attention_options(command, arguments.attention);
  command.add_flag("--selection", arguments.write_selection,
                   "also write the chosen blocks: ids I32 [Tq, Hq, slots], ascending, then -1");
  command.add_flag("--quiet", arguments.quiet, "print nothing");
  command.footer(std::string(kFileHelp) + R"(
Examples:
  moba run qkv.safetensors -o out.safetensors --block-size 128 --top-k 8
  moba run qkv.safetensors -o out.safetensors --rope-base 100000 --selection
  moba run qkv.safetensors -o out.safetensors --rope-base 500000 --rope-scaling llama3 --rope-factor 8
  moba run qkv.safetensors -o exact.safetensors --backend reference
  moba run qkv.safetensors -o out.safetensors --backend cuda --workspace-limit 512M)");
  command.callback([&] {
    check_attention_options(command, arguments.attention);
    parsed.command = [&] { run(arguments); };
  });
}

void add_dense(CLI::App& app, Parsed& parsed) {
  RunArguments& arguments = parsed.dense;
  CLI::App& command = *app.add_subcommand("dense", "full attention on the tensors of a file");
  add_input(command, arguments.input);
  add_output(command, arguments.output, "safetensors file to write: out [Tq, Hq, d] and lse F32 [Hq, Tq]");
  add_attention_options(command, arguments.attention);
  command.add_flag("--quiet", arguments.quiet, "print nothing");
  command.footer(std::string(kFileHelp) + R"(
Example:
  moba dense qkv.safetensors -o dense.safetensors --rope-base 100000)");
  command.callback([&] {
    check_attention_options(command, arguments.attention);
    parsed.command = [&] { dense(arguments); };
  });
}

void add_compare(CLI::App& app, Parsed& parsed) {
  CompareArguments& arguments = parsed.compare;
  CLI::App& command = *app.add_subcommand("compare", "MoBA against full attention: speed, error, attention kept");
  add_input(command, arguments.input);
  add_block_options(command, arguments.attention);
  add_repeat(command, arguments.repeat);
  add_int(
      command, "--check-rows", 0, std::numeric_limits<std::int64_t>::max(),
      [&](std::int64_t x) { arguments.check_rows = x; },
      "hold the last N query tokens against float64; 0: none (default " + std::to_string(arguments.check_rows) + ")");
  command.add_option("--svg", arguments.svg, "also write the picture of moba map")->type_name("FILE");
  add_attention_options(command, arguments.attention);
  command.footer(std::string(kFileHelp) + R"(
The error of a row is |out - float64| / |float64|. The share of the dense attention mass is how much of the softmax
of full attention lies on keys in the chosen blocks.

Examples:
  moba compare data/smollm2-135m-layer15.safetensors --rope-base 100000 --svg map.svg
  moba compare qkv.safetensors --block-size 64 --top-k 4 --check-rows 256
  moba compare qkv.safetensors --backend cuda --kernels portable)");
  command.callback([&] {
    check_attention_options(command, arguments.attention);
    parsed.command = [&] { compare(arguments); };
  });
}

void add_backward(CLI::App& app, Parsed& parsed) {
  BackwardArguments& arguments = parsed.backward;
  CLI::App& command = *app.add_subcommand("backward", "gradients of MoBA: speed, error, a file of them");
  add_input(command, arguments.input);
  CLI::Option* output =
      command
          .add_option("-o,--output", arguments.output,
                      "also write dq [Tq, Hq, d], dk and dv [Tk, Hk, d], out and lse, and dout if it was made up")
          ->type_name("FILE")
          ->check([](const std::string& path) { return path.empty() ? "--output: the file name is empty" : ""; }, "");
  add_block_options(command, arguments.attention);
  add_int(
      command, "--seed", 0, std::numeric_limits<std::int64_t>::max(),
      [&](std::int64_t x) { arguments.seed = static_cast<std::uint64_t>(x); },
      "of a random dout, where the file holds none (default 1)");
  add_check_option(command, arguments.check);
  add_repeat(command, arguments.repeat);
  command.add_flag("--quiet", arguments.quiet, "print and check nothing")->needs(output);
  add_attention_options(command, arguments.attention);
  command.footer(std::string(kFileHelp) + R"(
dout, the gradient of out, is a tensor of the file if it holds one, of q's shape and type; else it is random. Where
top-k covers every block these are the gradients of full attention.

The error of a row is |x - float64| / |float64|, or against an average row where that is longer. The float64 gradients
are of the same blocks, out and lse.

Examples:
  moba backward data/smollm2-135m-layer15.safetensors --rope-base 100000
  moba backward qkv.safetensors -o gradients.safetensors --block-size 64 --top-k 4 --check never
  moba backward qkv.safetensors --backend cuda --check always)");
  command.callback([&] {
    check_attention_options(command, arguments.attention);
    parsed.command = [&] { backward(arguments); };
  });
}

void add_decode(CLI::App& app, Parsed& parsed) {
  DecodeArguments& arguments = parsed.decode;
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  CLI::App& command =
      *app.add_subcommand("decode", "token by token through a KV cache: speed, bytes read, the same as a prefill");
  add_input(command, arguments.input);
  add_block_options(command, arguments.attention);
  add_int(
      command, "--prefill", 0, kMost, [&](std::int64_t x) { arguments.prefill = x; },
      "tokens to feed in one call (default: half of them, or fewer where --tokens wants more)");
  add_int(
      command, "--tokens", 0, kMost, [&](std::int64_t x) { arguments.tokens = x; },
      "tokens to feed one by one after that (default: all that follow)");
  add_int(
      command, "--page-size", 1, kMost, [&](std::int64_t x) { arguments.page_size = x; },
      "keep keys and values in pages of N tokens (default: contiguous)");
  add_repeat(command, arguments.repeat);
  add_sequence(command, arguments.sequence);
  add_causal_attention_options(command, arguments.attention);
  command.footer(std::string(kFileHelp) + R"(
Blocks and out of every token are held against one prefill of all of them: the same blocks, and out within rounding, or
the exit code is 1. Dense is the same cache with every block chosen. A token's time is that of its append and its
decode; what it must read are the keys and values of the blocks that were chosen for it, and the centroids of those
before its own where there are more than top-k. There is no cache on a GPU yet.

Examples:
  moba decode data/smollm2-135m-layer15.safetensors --rope-base 100000
  moba decode qkv.safetensors --prefill 1000 --tokens 100 --page-size 16)");
  command.callback([&] {
    check_attention_options(command, arguments.attention);
    parsed.command = [&] { decode(arguments); };
  });
}

void add_map(CLI::App& app, Parsed& parsed) {
  MapArguments& arguments = parsed.map;
  CLI::App& command = *app.add_subcommand("map", "the chosen blocks as a picture");
  add_input(command, arguments.input);
  add_output(command, arguments.output, "SVG file to write");
  add_block_options(command, arguments.attention);
  add_sequence(command, arguments.sequence);
  add_attention_options(command, arguments.attention);
  command.footer(std::string(kFileHelp) + R"(
One panel per query head: query blocks from top to bottom, key blocks from left to right; the darker a cell, the more
queries of the block chose the key block. Beside each head stands the share of the dense attention mass it keeps.

Example:
  moba map data/smollm2-135m-layer15.safetensors -o map.svg --rope-base 100000)");
  command.callback([&] {
    check_attention_options(command, arguments.attention);
    parsed.command = [&] { map(arguments); };
  });
}

// With what the text of a problem says of how to compute. One that cannot be read is the command's to complain of.
Options options_with(const std::string& problem, const Options& options) {
  try {
    return parse_problem(problem, options).options;
  } catch (const Error&) {
    return options;
  }
}

void add_plan(CLI::App& app, Parsed& parsed) {
  PlanArguments& arguments = parsed.plan;
  CLI::App& command = *app.add_subcommand("plan", "memory and arithmetic of a problem, before running it");
  command.add_option("PROBLEM", arguments.problem, "the problem as text, see below")->required()->type_name("");
  add_execution_options(command, arguments.options);
  command.footer("\n" + problem_text_help() + R"(
Examples:
  moba plan 'tokens=32768 q_heads=32 kv_heads=8 d=128 block=128 topk=8 dtype=bf16'
  moba plan 'tq=1 tk=100000 batch=16 q_heads=32 kv_heads=8'     (decoding)
  moba plan --backend cuda 'tokens=1048576 q_heads=32 kv_heads=8 dtype=bf16')");
  command.callback([&] {
    check_execution_options(command, options_with(arguments.problem, arguments.options));
    parsed.command = [&] { plan(arguments); };
  });
}

void add_bench(CLI::App& app, Parsed& parsed) {
  BenchArguments& arguments = parsed.bench;
  CLI::App& command = *app.add_subcommand("bench", "times of a problem, stage by stage");
  command.add_option("PROBLEM", arguments.problem, "the problem as text, see below")->required()->type_name("");
  add_int(
      command, "--repeat", 1, 100000, [&](std::int64_t x) { arguments.repeat = to_int(x); },
      "timed passes, after one to warm up (default 5)");
  command.add_flag_callback(
      "--no-dense", [&] { arguments.dense = false; }, "leave full attention out");
  command.add_flag("--backward", arguments.backward, "time backward too");
  command.add_option("--json", arguments.json, "also write the figures as JSON")->type_name("FILE");
  add_execution_options(command, arguments.options);
  command.footer("\n" + problem_text_help() + R"(
The tensors are random. GFLOP/s come from the fastest pass and the arithmetic that moba plan states. On a
GPU the times are those of its work, without what the host takes to ask for it.

Examples:
  moba bench 'tokens=16384 q_heads=8 kv_heads=2'
  moba bench 'tokens=16384 q_heads=8 kv_heads=2 dtype=bf16 threads=1' --no-dense --json bench.json
  moba bench --backend cuda 'tokens=65536 q_heads=16 d=128 dtype=bf16' --backward)");
  command.callback([&] {
    check_execution_options(command, options_with(arguments.problem, arguments.options));
    parsed.command = [&] { bench(arguments); };
  });
}

void add_info(CLI::App& app, Parsed& parsed) {
  CLI::App& command = *app.add_subcommand("info", "this build and this machine, for bug reports");
  add_execution_options(command, parsed.info);
  command.footer(R"(
With --backend and other options it also says whether they can be had here: where they cannot, the exit code is 1.

Examples:
  moba info
  moba info --backend cuda --device 1)");
  command.callback([&] {
    check_execution_options(command, parsed.info);
    parsed.command = [&] { info(parsed.info); };
  });
}

// One line on standard error, whatever is in the message.
int fail(int code, const std::string& message) {
  std::fprintf(stderr, "moba: %s\n", printable(message, 2000).c_str());
  return code;
}

// What the parser says, or something better where it only says that a command is wanted.
std::string complaint(const CLI::App& app, const CLI::ParseError& error, int argc, const char* const* argv) {
  if (!app.get_subcommands().empty()) return error.what();
  std::string names;
  for (const CLI::App* command : app.get_subcommands({})) names += (names.empty() ? "" : ", ") + command->get_name();
  return (argc > 1 ? "there is no command '" + printable(argv[1]) + "'" : std::string("a command is wanted")) +
         "; there are " + names;
}

int run_guarded(const std::function<void()>& command) {
  try {
    command();
  } catch (const std::bad_alloc&) {
    return fail(1, "out of memory");
  } catch (const std::exception& error) {
    return fail(1, error.what());
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) return fail(1, "cannot write to standard output");
  return 0;
}

}  // namespace

int run_command_line(int argc, const char* const* argv) {
  Parsed parsed;
  CLI::App app(kOverview, "moba");
  app.footer(kExamples);
  app.require_subcommand(1);
  app.set_version_flag("--version", std::string("moba ") + version());
  app.get_formatter()->column_width(34);
  for (const auto add :
       {add_run, add_dense, add_compare, add_backward, add_decode, add_map, add_plan, add_bench, add_info})
    add(app, parsed);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    const auto chosen = app.get_subcommands();
    const std::string command = chosen.empty() ? "moba" : "moba " + chosen.front()->get_name();
    return fail(2, complaint(app, error, argc, argv) + " (see " + command + " --help)");
  }
  return run_guarded(parsed.command);
}

}  // namespace moba::cli
