# shellcheck shell=bash disable=SC2034
# What the scripts share: the packages each needs, and how the missing ones are installed. Sourced, not run.
# Everything said here goes to stderr, so that a script may keep stdout for its results.

# Debian packages, by what they are needed for. A name may carry ":COMMAND": having that command is as good.
build_packages=(g++:g++ cmake:cmake ninja-build:ninja libhwy-dev libtbb-dev)
program_packages=(libcli11-dev nlohmann-json3-dev)
test_packages=(libgtest-dev librapidcheck-dev pkg-config:pkg-config)
lint_packages=(clang-format-14:clang-format-14 clang-tidy-14:clang-tidy-14)
fuzz_packages=(clang-14:clang++-14 libclang-rt-14-dev llvm-14:llvm-symbolizer-14)
bench_packages=(libbenchmark-dev libopenblas-pthread-dev)

say() { printf '%s\n' "$*" >&2; }
die() {
  say "error: $*"
  exit 1
}

# require_packages PACKAGE...: returns once all are there; installs what is missing and says so before it does. Where there
# is no dpkg only the commands are looked for; CMake says which libraries it does not find. MOBA_NO_INSTALL=1 in the
# environment leaves all of it to CMake, for who has the libraries from elsewhere.
require_packages() {
  [[ ${MOBA_NO_INSTALL:-} == 1 ]] && return
  local package name command missing=()
  for package in "$@"; do
    name=${package%%:*} command=${package#*:}
    if [[ $package == *:* ]] && command -v "$command" >/dev/null; then continue; fi
    if ! command -v dpkg-query >/dev/null; then
      if [[ $package == *:* ]]; then missing+=("$name"); fi
    elif ! installed "$name"; then
      missing+=("$name")
    fi
  done
  [[ ${#missing[@]} == 0 ]] && return

  local run=()
  if ! command -v apt-get >/dev/null; then
    die "missing, by their names on Debian: ${missing[*]}. There is no apt-get here to install them with."
  elif [[ $(id -u) == 0 ]]; then
    run=(env)
  elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [[ -t 0 && -t 2 ]]; }; then
    run=(sudo env)
  else
    die "missing Debian packages: ${missing[*]}. Installing them takes root. Run this, then try again:
  apt-get update && apt-get install --no-install-recommends ${missing[*]}"
  fi

  say "Installing Debian packages: ${missing[*]}"
  local log start=$SECONDS
  log=$(mktemp)
  run+=(DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120)
  if ! { "${run[@]}" update && "${run[@]}" install -y --no-install-recommends "${missing[@]}"; } </dev/null >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    rm -f "$log"
    die "apt-get failed (its last lines are above). Needed: ${missing[*]}"
  fi
  rm -f "$log"
  say "Installed in $((SECONDS - start)) s."
}

# installed PACKAGE: whether dpkg has it.
installed() {
  # shellcheck disable=SC2016 # the ${} is dpkg-query's
  [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

# The sanitizers of g++ 12 and clang 14 need memory layouts less random than some kernels make them.
fixed_layout=()
if [[ $(cat /proc/sys/vm/mmap_rnd_bits 2>/dev/null || echo 0) -gt 28 ]] && setarch "$(uname -m)" -R true 2>/dev/null; then
  fixed_layout=(setarch "$(uname -m)" -R)
fi

# build PRESET [CMAKE-OPTION...]: configures and builds the preset, in build/PRESET.
build() {
  local preset=$1
  shift
  cmake --preset "$preset" "$@" >&2
  cmake --build --preset "$preset" >&2
}
