// The figures of decode over a cache, on the cpu.
#pragma once

namespace moba::bench {

// Prints lines "figure NAME VALUE UNIT" to stdout, everything else to stderr.
void decode_figures(int threads, int repetitions);

}  // namespace moba::bench
