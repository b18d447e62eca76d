#!/usr/bin/env bash
# Measures. Lines "figure NAME VALUE UNIT" and nothing else go to stdout, all the rest to stderr.
#
#   ./scripts/bench.sh cpu [OPTION...]     options are passed on to moba_bench: see its --help
#
# Installs what is missing from Debian's packages first, and says what.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh
case ${1:-} in
  cpu) shift ;;
  *)
    sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac

require_packages "${build_packages[@]}" "${program_packages[@]}" "${bench_packages[@]}"
build bench
# OpenBLAS picks its kernels by the processor, unless the environment says otherwise; the figures compare with the ones
# that fit the machine.
unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE
build/bench/bin/moba_bench "$@" | awk '/^figure /{print; fflush(); next} {print > "/dev/stderr"}'
