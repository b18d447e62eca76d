// The command line options that several commands share.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "commands.h"

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace moba::cli {

// A whole number in [low, high], read strictly; the command line is refused otherwise.
CLI::Option* add_int(CLI::App& app, const std::string& name, std::int64_t low, std::int64_t high,
                     std::function<void(std::int64_t)> set, const std::string& help);

// --block-size, --top-k.
void add_block_options(CLI::App& app, AttentionOptions& attention);

// The mask, the scale, RoPE, and how to compute: backend, threads, instruction set.
void add_attention_options(CLI::App& app, AttentionOptions& attention);

// To be called when everything is parsed: refuses RoPE options that do not go together.
void check_rope_options(const CLI::App& app, const AttentionOptions& attention);

}  // namespace moba::cli
