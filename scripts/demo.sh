#!/usr/bin/env bash
# Builds the program and runs MoBA attention on the Q, K, V of a real language model (data/README.md): the time of each
# step, the speed against full attention, the error of both against float64, how much of the attention mass the selected
# blocks hold, and a picture of the selection. Where nvcc was found and there is a GPU, then the same on that. Installs
# what is missing from Debian's packages first, and says what.
#
#   ./scripts/demo.sh [OPTION...]     options are passed on to `moba compare`: see its --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit
fi

require_packages "${build_packages[@]}" "${program_packages[@]}"
build demo
moba=build/demo/bin/moba
echo
"$moba" info
echo
compare=("$moba" compare data/smollm2-135m-layer15.safetensors --block-size 128 --top-k 8 --rope-base 100000)
"${compare[@]}" --svg build/demo/selection.svg "$@"
if [[ " $* " != *" --backend"* ]] && "$moba" info --backend cuda >/dev/null 2>&1; then
  printf '\n==== The same on the GPU\n'
  "${compare[@]}" --svg build/demo/selection-cuda.svg "$@" --backend cuda
fi
