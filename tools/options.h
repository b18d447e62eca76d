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

// The mask, the scale, RoPE, and how to compute.
void add_attention_options(CLI::App& app, AttentionOptions& attention);
// The same but for the mask, where it is always causal.
void add_causal_attention_options(CLI::App& app, AttentionOptions& attention);

// --check of gradients.
void add_check_option(CLI::App& app, CheckGradients& check);

// How to compute: backend, threads, instruction set; GPU, its kernels and workspace.
void add_execution_options(CLI::App& app, Options& options);

// To be called when everything is parsed: refuse options that do not go together.
void check_attention_options(const CLI::App& app, const AttentionOptions& attention);
void check_execution_options(const CLI::App& app, const Options& options);

}  // namespace moba::cli
