#include "output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "moba/error.h"
#include "text.h"

namespace moba::cli {
namespace {

namespace fs = std::filesystem;

constexpr std::array kEndingSignals{SIGINT, SIGTERM, SIGHUP};

// The temporary file that a signal must remove: one file is written at a time. Plain memory, for the signal handler.
char pending_temporary[PATH_MAX] = "";

void remove_pending_and_die(int signal) {
  if (pending_temporary[0] != '\0') unlink(pending_temporary);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void guard(const std::string& temporary) {
  if (temporary.size() >= sizeof(pending_temporary)) return;
  std::memcpy(pending_temporary, temporary.c_str(), temporary.size() + 1);
  for (const int signal : kEndingSignals) {
    // A signal that is ignored (nohup) stays ignored.
    if (std::signal(signal, remove_pending_and_die) == SIG_IGN) std::signal(signal, SIG_IGN);
  }
  std::signal(SIGXFSZ, SIG_IGN);  // a file that grows too large then fails the write, with a message
}

void unguard() { pending_temporary[0] = '\0'; }

// Where `path` leads: a link is followed, so that the link stays and its target is replaced.
fs::path resolve(const std::string& path) {
  if (path.empty()) throw Error("output: the file name is empty");
  std::error_code fault;
  if (!fs::is_symlink(path, fault)) return path;
  fs::path target = fs::canonical(path, fault);
  if (fault) throw Error(path + ": is a link that leads nowhere");
  return target;
}

fs::path folder_of(const fs::path& path) { return path.has_parent_path() ? path.parent_path() : fs::path("."); }

}  // namespace

void check_output(const std::string& path, const std::string& input) {
  const fs::path target = resolve(path), folder = folder_of(target);
  std::error_code fault;
  if (!fs::is_directory(folder, fault)) throw Error(path + ": the folder " + folder.string() + " does not exist");
  const fs::file_status status = fs::status(target, fault);
  if (status.type() == fs::file_type::none) throw Error(path + ": " + fault.message());
  if (fs::exists(status) && !fs::is_regular_file(status)) throw Error(path + ": is there and is not a regular file");
  if (!target.has_filename()) throw Error(path + ": names a folder; a file is wanted");
  if (access(folder.c_str(), W_OK | X_OK) != 0) {
    throw Error(path + ": cannot write in the folder " + folder.string() + ": " + std::strerror(errno));
  }
  if (!input.empty() && fs::equivalent(target, input, fault)) {
    throw Error(path + ": is the input file; the output must be another");
  }
}

OutputFile::OutputFile(const std::string& path) : shown_(path) {
  check_output(path);
  const fs::path target = resolve(path);
  path_ = target.string();
  // A name of its own, short whatever the target's is, so that it fits wherever that fits. Left over from a killed
  // process with the same number, it is passed by.
  for (int attempt = 0; descriptor_ < 0; ++attempt) {
    const std::string name = format(".moba-%d-%d.tmp", static_cast<int>(getpid()), attempt);
    temporary_ = (folder_of(target) / name).string();
    descriptor_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor_ < 0 && errno != EEXIST) fail("cannot create a file beside it");
  }
  guard(temporary_);
  struct stat old {};
  if (stat(path_.c_str(), &old) == 0) static_cast<void>(!fchmod(descriptor_, old.st_mode & 07777));  // at best
}

OutputFile::~OutputFile() {
  if (descriptor_ >= 0) close(descriptor_);
  if (!temporary_.empty()) {
    unlink(temporary_.c_str());
    unguard();
  }
}

void OutputFile::write(const void* data, std::size_t bytes) {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    constexpr std::size_t kMost = std::size_t{1} << 30;  // one call of write(2) takes less than 2 GiB
    const ssize_t written = ::write(descriptor_, at, std::min(bytes, kMost));
    if (written < 0) {
      if (errno == EINTR) continue;
      fail("cannot write");
    }
    at += written;
    bytes -= static_cast<std::size_t>(written);
  }
}

void OutputFile::commit() {
  if (fsync(descriptor_) != 0) fail("cannot write");
  const int closed = close(descriptor_);
  descriptor_ = -1;
  if (closed != 0) fail("cannot write");
  if (rename(temporary_.c_str(), path_.c_str()) != 0) fail("cannot rename the finished file");
  temporary_.clear();
  unguard();
}

void OutputFile::fail(const char* action) { throw Error(shown_ + ": " + action + ": " + std::strerror(errno)); }

}  // namespace moba::cli
