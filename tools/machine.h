// The machine and the build, for headers of measurements and bug reports.
#pragma once

#include <string>

namespace moba::cli {

std::string processor_name();    // "Intel(R) Xeon(R) ..."; "unknown" where the system does not say
int cores();                     // that this process may run on
std::string compiler();          // "GCC 12.2.0"
std::string build_type();        // "Release"
std::string operating_system();  // "Linux 6.1.0 x86_64"

// The most memory that this process may have: that of the machine, or the limit of its control group where that is
// less.
double memory_bytes();

// The least memory limit of a process's control groups and of those above them, version 1 or 2; infinite where none is
// set. `membership` is its /proc/PID/cgroup, `mount` where the groups are mounted.
double group_memory_limit(const std::string& membership, const std::string& mount);

}  // namespace moba::cli
