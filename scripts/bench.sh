#!/usr/bin/env bash
# Measures. Lines "figure NAME VALUE UNIT" and nothing else go to stdout, all the rest to stderr.
#
#   ./scripts/bench.sh cpu [OPTION...]     options are passed on to moba_bench: see its --help
#   ./scripts/bench.sh cuda [OPTION...]    takes an NVIDIA GPU and nvcc; options are passed on to moba_bench_cuda. Where
#                                          python3 has PyTorch, its dense attention is timed as well, and with
#                                          matplotlib a run without options draws docs/crossover.svg
#
# Installs what is missing from Debian's packages first, and says what.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

# Figures to stdout, the rest to stderr.
sort_lines() { awk '/^figure /{print; fflush(); next} {print > "/dev/stderr"}'; }

bench_cpu() {
  require_packages "${build_packages[@]}" "${program_packages[@]}" "${bench_packages[@]}"
  build bench
  # OpenBLAS picks its kernels by the processor, unless the environment says otherwise; the figures compare with the
  # ones that fit the machine.
  unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE
  build/bench/bin/moba_bench "$@" | sort_lines
}

bench_cuda() {
  [[ " $* " == *' --help '* ]] || nvidia-smi -L >/dev/null 2>&1 || die "bench.sh cuda: there is no NVIDIA GPU here (nvidia-smi -L lists none)"
  [[ -n ${CUDACXX:-} ]] || command -v nvcc "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" >/dev/null ||
    die "bench.sh cuda: nvcc was not found; put it on the PATH or set CUDACXX"
  require_packages "${build_packages[@]}" libcli11-dev
  build bench-cuda
  local figures=build/bench-cuda/figures.txt python=(bench/torch_attention.py --figures build/bench-cuda/figures.txt)
  build/bench-cuda/bin/moba_bench_cuda "$@" | sort_lines | tee "$figures"
  if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    say "No PyTorch with a GPU here: nothing to compare with."
    return
  fi
  # What was not measured would be missing in the picture.
  if [[ $# == 0 ]]; then python+=(--plot docs/crossover.svg); else python+=(--quick); fi
  python3 "${python[@]}" | sort_lines
}

case ${1:-} in
  cpu | cuda) "bench_$1" "${@:2}" ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
