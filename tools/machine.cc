#include "machine.h"

#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <string_view>
#include <thread>

namespace moba::cli {
namespace {

// The least number in the files called `name` in the folder mount + path and in those above it, up to `mount`. Where
// nothing is set, a file holds "max", a number beyond all memory, or is not there.
double least_limit(const std::string& mount, std::string path, const std::string& name) {
  double least = std::numeric_limits<double>::infinity();
  while (true) {
    std::string full = mount;
    full.append(path).append("/").append(name);
    std::ifstream file(full);
    double limit = 0;
    if (file >> limit) least = std::min(least, limit);
    const std::size_t slash = path.rfind('/');
    if (slash == std::string::npos) return least;
    path.resize(slash);
  }
}

}  // namespace

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    for (const std::string_view key : {"model name", "Model", "cpu model", "Hardware"}) {
      if (line.compare(0, key.size(), key) != 0) continue;
      const std::size_t begin = line.find_first_not_of(" \t:", key.size());
      if (begin != std::string::npos) return line.substr(begin);
    }
  }
  return "unknown";
}

int cores() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
  return static_cast<int>(std::thread::hardware_concurrency());
}

double group_memory_limit(const std::string& membership, const std::string& mount) {
  double least = std::numeric_limits<double>::infinity();
  std::ifstream file(membership);
  for (std::string line; std::getline(file, line);) {  // NUMBER:CONTROLLER,CONTROLLER...:PATH; version 2: 0::PATH
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",",
                      path = line.substr(second + 1);
    if (controllers == ",,") least = std::min(least, least_limit(mount, path, "memory.max"));
    if (controllers.find(",memory,") != std::string::npos) {
      least = std::min(least, least_limit(mount + "/memory", path, "memory.limit_in_bytes"));
    }
  }
  return least;
}

double memory_bytes() {
  const double machine = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGE_SIZE));
  return std::min(machine, group_memory_limit("/proc/self/cgroup", "/sys/fs/cgroup"));
}

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown";
#endif
}

std::string build_type() { return MOBA_BUILD_TYPE; }

std::string operating_system() {
  utsname system;
  if (uname(&system) != 0) return "unknown";
  return std::string(system.sysname) + " " + system.release + " " + system.machine;
}

}  // namespace moba::cli
