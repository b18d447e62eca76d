// The machine and the build, for headers of measurements and bug reports.
#pragma once

#include <string>

namespace moba::cli {

std::string processor_name();    // "Intel(R) Xeon(R) ..."; "unknown" where the system does not say
int cores();                     // that this process may run on
double memory_bytes();           // of the machine
std::string compiler();          // "GCC 12.2.0"
std::string build_type();        // "Release"
std::string operating_system();  // "Linux 6.1.0 x86_64"

}  // namespace moba::cli
