// moba info: what a bug report should say of the build and the machine.
#include "moba/info.h"

#include <cstdio>

#include "commands.h"
#include "machine.h"
#include "names.h"
#include "text.h"

namespace moba::cli {

void info() {
  const auto line = [](const char* name, const std::string& value) { std::printf("%-11s %s\n", name, value.c_str()); };
  const Bf16Support bf16 = bf16_support();
  std::string targets;
  for (const std::string& target : cpu_targets()) targets += (targets.empty() ? "" : " ") + target;

  line("version", version());
  line("compiler", compiler());
  line("build type", build_type());
  line("system", operating_system());
  line("processor", processor_name());
  line("cores", std::to_string(cores()));
  line("memory", format_bytes(memory_bytes()));
  line("cpu targets", targets);
  line("bf16 dot", !bf16.available  ? "not available"
                   : bf16.preferred ? "available, preferred"
                                    : "available, not preferred: widening is the faster here");
  line("backends", list_words(kBackends, " "));
}

}  // namespace moba::cli
