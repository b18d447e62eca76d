#!/usr/bin/env bash
# Builds everything and runs every test. Installs what is missing from Debian's packages first, and says what.
#
#   ./scripts/test.sh             build, tests, package
#   ./scripts/test.sh --all       every phase below, as CI does (CI=true in the environment means the same)
#   ./scripts/test.sh PHASE...    these phases only, e.g. `./scripts/test.sh format tidy`
#
#   format    clang-format: the sources look as .clang-format says
#   build     Release, warnings are errors; the benchmarks in the full run only
#   tests     ctest
#   package   installs to build/check, then builds examples/consumer against that, by find_package and by pkg-config
#   demo      the program on data/, as ./scripts/demo.sh runs it: it ends well, and leaves a picture
#   figures   the benchmarks, once each: every figure that README.md quotes is printed. What it is, is not looked at
#   embed     the same example with the library inside its own build (add_subdirectory), static; then that installed
#   tidy      clang-tidy, with the checks of .clang-tidy
#   asan      build and ctest with the address and undefined-behaviour sanitizers
#   tsan      build and ctest with the thread sanitizer
#   fuzz      a short round of every fuzzer, the same inputs every time (./scripts/fuzz.sh round)
#   operands  the machine code for Hopper: no register is written that a product still reads; skipped without cuobjdump
#   gpusan    the small tests of the cuda backend under compute-sanitizer; skipped where that or a GPU is missing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

every_phase=(format build tests package demo figures embed tidy asan tsan fuzz operands gpusan)
phases=(build tests package)
[[ ${CI:-} == true || ${CI:-} == 1 ]] && phases=("${every_phase[@]}")
case ${1:-} in
  -h | --help)
    sed -n '2,20s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
    ;;
  --all) phases=("${every_phase[@]}") ;;
  ?*)
    phases=("$@")
    for phase in "$@"; do
      [[ " ${every_phase[*]} " == *" $phase "* ]] || die "no phase is called '$phase'; there are: ${every_phase[*]}"
    done
    ;;
esac
chosen() { [[ " ${phases[*]} " == *" $1 "* ]]; }

check=$PWD/build/check     # where packages are installed to and consumers built
with_bench=OFF             # the phase build compiles the benchmarks where tidy or figures follows
cxx=${CXX:-g++}
jobs=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}

sources() { find include src tools tests fuzz bench examples -regex '.*\.\(h\|cc\|cu\|cuh\)'; }

run_format() { sources | xargs clang-format-14 --dry-run --Werror; }

# Where nvcc is found: kernels for these GPUs rather than for all. Newer ones translate those of the first when they load them.
run_build() { build ci -DMOBA_BENCH="$with_bench" '-DMOBA_CUDA_ARCHITECTURES=80;90-real'; }

run_tests() { ctest --preset ci -j "$jobs"; }

# consume KIND PREFIX [PKG-CONFIG-OPTION]: builds and runs examples/consumer against the libmoba installed in PREFIX.
consume() {
  local kind=$1 prefix=$2 flags
  cmake -S examples/consumer -B "$check/consumer-$kind" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_PREFIX_PATH="$prefix" --fresh
  cmake --build "$check/consumer-$kind"
  "$check/consumer-$kind/consumer"
  PKG_CONFIG_PATH=$(dirname "$(find "$prefix" -name moba.pc)")
  export PKG_CONFIG_PATH
  read -r -a flags <<<"$(pkg-config "${@:3}" --cflags --libs moba)"
  echo "pkg-config: ${flags[*]}"
  "$cxx" -std=c++20 -O2 examples/consumer/main.cc "${flags[@]}" -Wl,-rpath,"$(pkg-config --variable=libdir moba)" \
    -o "$check/consumer-$kind-pc"
  "$check/consumer-$kind-pc"
}

run_package() {
  local library strangers
  rm -rf "$check/shared" "$check/shared-moved"
  cmake --install build/ci --prefix "$check/shared" >/dev/null
  mv "$check/shared" "$check/shared-moved" # an installed tree can be moved
  "$check/shared-moved/bin/moba" info >/dev/null
  consume shared "$check/shared-moved"
  library=$(find "$check/shared-moved" -name libmoba.so)
  strangers=$(nm -DC --defined-only "$library" | cut -d ' ' -f 3- | grep -v -E '^(typeinfo( name)? for |vtable for )?moba::' || true)
  [[ -z $strangers ]] || die "libmoba.so shows names that are not moba's: $strangers"
}

run_demo() {
  local picture=$check/selection.svg backend backends=(cpu)
  if build/ci/bin/moba info --backend cuda; then backends+=(cuda); fi
  for backend in "${backends[@]}"; do
    rm -f "$picture"
    build/ci/bin/moba compare data/smollm2-135m-layer15.safetensors --block-size 128 --top-k 8 --rope-base 100000 \
      --svg "$picture" --backend "$backend"
    grep -q '<path\|<rect' "$picture" || die "the picture is empty: $picture"
    [[ $(tail -n 1 "$picture") == *'</svg>' ]] || die "the picture is cut short: $picture"
  done
}

# What README.md quotes of moba_bench, whatever processor runs it.
figures=(cpu.sgemm cpu.attend cpu.attend_over_sgemm cpu.attend_bf16 cpu.attend_bf16_over_sgemm
  cpu.backward cpu.backward_over_sgemm cpu.routing_share cpu.moba_over_dense cpu.dense cpu.dense_over_sgemm cpu.flop_ratio
  cpu.peak_extra_mib cpu.decode cpu.decode_speedup cpu.decode_over_full cpu.decode_bandwidth cpu.decode_read)

run_figures() {
  local name printed missing=()
  [[ -x build/ci/bin/moba_bench ]] || die "moba_bench is not built: ask for the phase build as well"
  # Timed as the other way of bfloat16 products, so only where the processor has them and the plan would not take them.
  [[ $(build/ci/bin/moba info) =~ 'bf16 dot '+('not available'|'available, preferred') ]] || figures+=(cpu.attend_bf16_dot)
  build/ci/bin/moba_bench --repetitions 1 | tee "$check/figures.txt"
  for name in "${figures[@]}"; do
    printed=$(awk -v name="$name" '$1 == "figure" && $2 == name && NF == 4 {++n} END {print n + 0}' "$check/figures.txt")
    [[ $printed == 1 ]] || missing+=("$name ($printed times)")
  done
  [[ ${#missing[@]} == 0 ]] || die "figures that are not printed once: ${missing[*]}"
}

run_embed() {
  local nvcc newest
  nvcc=$(sed -n 's/^CMAKE_CUDA_COMPILER:[A-Z]*=//p' build/ci/CMakeCache.txt 2>/dev/null || true)
  newest=$("${nvcc:-nvcc}" --list-gpu-arch 2>/dev/null | sed 's/^compute_//' | sort -n | tail -n 1 || true)
  mkdir -p "$check/embed"
  cat >"$check/embed/CMakeLists.txt" <<EOF
cmake_minimum_required(VERSION 3.25)
project(embed LANGUAGES CXX)
set(MOBA_SHARED OFF)
set(MOBA_INSTALL ON)
set(MOBA_WERROR ON)
set(MOBA_CUDA_ARCHITECTURES ${newest:-90}-real) # for the newest GPU that nvcc knows, which the phase build leaves out
add_subdirectory($PWD moba)
add_executable(consumer $PWD/examples/consumer/main.cc)
target_link_libraries(consumer PRIVATE moba::moba)
EOF
  cmake -S "$check/embed" -B "$check/embed/build" -G Ninja -DCMAKE_BUILD_TYPE=Debug
  cmake --build "$check/embed/build"
  "$check/embed/build/consumer"
  rm -rf "$check/static"
  cmake --install "$check/embed/build" --prefix "$check/static" >/dev/null
  consume static "$check/static" --static
}

# Every C++ file that the build compiles. Its flags are those of g++, some of which clang does not know.
run_tidy() {
  sed -n 's/^ *"file": "\(.*\.cc\)",\{0,1\}$/\1/p' build/ci/compile_commands.json | sort -u |
    xargs -P "$jobs" -n 1 clang-tidy-14 -p build/ci --quiet --warnings-as-errors='*' \
      --extra-arg=-Wno-unknown-warning-option 2> >(grep -v 'warnings generated' >&2)
}

sanitize() {
  cmake --preset "$1"
  "${fixed_layout[@]}" cmake --build --preset "$1"
  "${fixed_layout[@]}" ctest --preset "$1" -j "$jobs"
}
run_asan() { sanitize asan-ubsan; }
run_tsan() { sanitize tsan; }

run_fuzz() { ./scripts/fuzz.sh round; }

run_operands() {
  local objects
  mapfile -t objects < <(compgen -G 'build/ci/src/CMakeFiles/moba_cuda_sm90.dir/cuda/*.o')
  if ! command -v python3 >/dev/null; then
    echo "skipped: there is no python3"
    return
  fi
  python3 scripts/check_operands.py --self-test
  if ! command -v cuobjdump >/dev/null && [[ ! -x /usr/local/cuda/bin/cuobjdump ]]; then
    echo "skipped: cuobjdump is neither on the PATH nor in /usr/local/cuda/bin"
  elif [[ ! -x build/ci/bin/moba_tests ]]; then
    die "the tests are not built: ask for the phase build as well"
  elif [[ ${#objects[@]} == 0 ]]; then
    echo "skipped: the build has no cuda backend"
  else
    python3 scripts/check_operands.py "${objects[@]}"
  fi
}

run_gpusan() {
  local checker tool tests=build/ci/bin/moba_cuda_tests
  if ! checker=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer); then
    echo "skipped: compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin"
  elif ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    echo "skipped: nvidia-smi finds no GPU"
  elif [[ ! -x build/ci/bin/moba_tests ]]; then
    die "the tests are not built: ask for the phase build as well"
  elif [[ ! -x $tests ]]; then
    echo "skipped: the build has no cuda backend"
  elif ! build/ci/bin/moba info --backend cuda; then
    echo "skipped: the cuda backend has no GPU that it can use"
  else
    for tool in memcheck racecheck initcheck synccheck; do
      printf '\n%s\n' "$tool"
      MOBA_CUDA_CHECKER=1 "$checker" --tool "$tool" --error-exitcode 9 "$tests" --gtest_filter='*Small*:-CudaRefused*'
    done
  fi
}

packages=()
if chosen build || chosen tests || chosen asan || chosen tsan || chosen tidy || chosen package || chosen demo; then
  packages+=("${build_packages[@]}" "${program_packages[@]}" "${test_packages[@]}")
elif chosen embed; then
  packages+=("${build_packages[@]}" "${test_packages[@]}")
fi
if chosen format || chosen tidy; then packages+=("${lint_packages[@]}"); fi
if chosen figures; then packages+=("${bench_packages[@]}"); fi
if chosen build && { chosen tidy || chosen figures; }; then
  with_bench=ON
  packages+=("${bench_packages[@]}")
fi
require_packages "${packages[@]}"

# Each phase runs to its end or first error; the others run all the same, but for those that need the build.
summary=() failed=0 broken=0
mkdir -p build/check
for phase in "${every_phase[@]}"; do
  chosen "$phase" || continue
  if [[ $broken == 1 && $phase =~ ^(tests|package|demo|figures|tidy|operands|gpusan)$ ]]; then
    summary+=("$(printf '%-8s not run: the build failed' "$phase")")
    continue
  fi
  printf '\n==== %s\n' "$phase"
  start=$SECONDS
  set +e
  (
    set -e
    "run_$phase"
  ) 2>&1 | tee "build/check/$phase.log"
  status=${PIPESTATUS[0]}
  set -e
  line=$(printf '%-8s %-6s %4d s' "$phase" "$([[ $status == 0 ]] && echo ok || echo FAILED)" $((SECONDS - start)))
  closing=$(grep -E '^([0-9]+% tests passed|skipped:)' "build/check/$phase.log" || true)
  summary+=("$line${closing:+   $closing}")
  if [[ $status != 0 ]]; then
    failed=1
    if [[ $phase == build ]]; then broken=1; fi
  fi
done
printf '\n==== %s\n' "summary"
printf '%s\n' "${summary[@]}"
[[ $failed == 0 ]] || die "a phase failed; its output is above and in build/check/PHASE.log"
