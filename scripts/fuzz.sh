#!/usr/bin/env bash
# Fuzzes, by clang's libFuzzer with the address and undefined-behaviour sanitizers: random changes to inputs that reached
# new code, starting from fuzz/seeds. Installs what is missing from Debian's packages first, and says what.
#
#   ./scripts/fuzz.sh MINUTES [TARGET...]     these targets, one after the other, in equal shares; all if none is named
#   ./scripts/fuzz.sh round [TARGET...]       the same few inputs every time: what CI runs
#
#   safetensors   the reader of safetensors files: any bytes are refused in one line, or read to the last byte
#   arguments     every public function: whatever the arguments, it succeeds or names the bad one, and stays in its memory
#   problem       a whole small problem: the cpu agrees with the reference, from the rotation to the gradients
#
# Inputs that found new code are kept in build/fuzz/corpus/TARGET, for the next time. An input that fails is named at the
# end; build/fuzz/bin/fuzz_TARGET FILE runs it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

every_target=(safetensors arguments problem)
usage() { sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

case ${1:-} in
  -h | --help)
    usage
    exit
    ;;
  round) ;;
  *)
    if ! [[ ${1:-} =~ ^[1-9][0-9]{0,4}$ ]]; then
      usage >&2
      die "fuzz.sh: '${1:-}' is not a number of minutes from 1 to 99999, nor 'round'"
    fi
    ;;
esac
length=$1
targets=("${@:2}")
[[ ${#targets[@]} -gt 0 ]] || targets=("${every_target[@]}")
for target in "${targets[@]}"; do
  [[ " ${every_target[*]} " == *" $target "* ]] || die "no fuzzer is called '$target'; there are: ${every_target[*]}"
done

require_packages "${build_packages[@]}" "${program_packages[@]}" "${test_packages[@]}" "${fuzz_packages[@]}"
build fuzz
ASAN_SYMBOLIZER_PATH=$(command -v llvm-symbolizer-14 || true) # Debian gives it no other name
export ASAN_SYMBOLIZER_PATH

# How many inputs a round tries, about ten seconds of them each.
declare -A runs=([safetensors]=30000 [arguments]=2500 [problem]=300)

# fuzz TARGET: runs it. Where it fails, libFuzzer writes the input to build/fuzz/failures.
fuzz() {
  local target=$1 corpus=build/fuzz/corpus/$1 options
  options=(-len_control=0 -max_len=512 -timeout=60 -print_funcs=0 -artifact_prefix="build/fuzz/failures/$target-")
  if [[ $length == round ]]; then
    corpus=build/fuzz/round/$target # empty, so that a round does not depend on those before it
    rm -rf "$corpus"
    options+=(-runs="${runs[$target]}" -seed=1)
  else
    options+=(-max_total_time=$((length * 60 / ${#targets[@]})))
  fi
  mkdir -p "$corpus"
  "${fixed_layout[@]}" "build/fuzz/bin/fuzz_$target" "${options[@]}" "$corpus" "fuzz/seeds/$target" 2>&1 |
    awk '!/^#[0-9]+\t(NEW|REDUCE|RELOAD)|^INFO|dictionary. ######$|# Uses:/ {print; fflush()}'
}

failed=()
mkdir -p build/fuzz/failures
touch build/fuzz/started
for target in "${targets[@]}"; do
  say "==== $target"
  fuzz "$target" || failed+=("$target")
done
if [[ ${#failed[@]} != 0 ]]; then
  say "Inputs that fail:"
  find build/fuzz/failures -type f -newer build/fuzz/started >&2
  die "fuzz.sh: failed: ${failed[*]}"
fi
