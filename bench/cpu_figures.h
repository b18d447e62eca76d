// The figures of the cpu backend.
#pragma once

namespace moba::bench {

// Measures for about a minute and prints lines "figure NAME VALUE UNIT" to stdout, everything else to stderr.
void cpu_figures(int threads, int repetitions);

}  // namespace moba::bench
