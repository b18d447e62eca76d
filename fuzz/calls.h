// The public functions under arguments of a fuzzer's making.
#pragma once

#include <functional>
#include <string_view>

#include "views.h"

namespace moba::fuzz {

// Runs `call`, which must succeed or be refused by moba::Error in one line that begins with an argument: one of the
// views, or what `names` says. A refused call must have written nothing. Anything else ends the process.
void judge(std::string_view function, const Views& views, const std::function<void()>& call);
// The same of what takes no views.
bool accepted(std::string_view function, const std::function<void()>& call);

// Each draws a problem, plans it and, if it is planned and small, calls the functions that take the plan, a few in
// turn.
void call_attention(Bytes& bytes);
void call_cache(Bytes& bytes);

// What both kinds of problem share.
Options draw_options(Bytes& bytes);
Config draw_config(Bytes& bytes);
// A rope, whose tables, if it has them, are views of `tables`.
Rope draw_rope(Bytes& bytes, std::int64_t head_dim, std::int64_t positions, Views& tables);

}  // namespace moba::fuzz
