#!/usr/bin/env bash
# Runs these tests under other releases of triton, next to the installed torch: compiling calls none
# of it. Without arguments: the oldest release we allow, the one we test with, and the newest.
#   tests/compile/versions.sh [VERSION...]
set -uo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(($#)) || set -- 3.6.0 "$(sed -n 's/^triton==//p' constraints.txt)" newest
failed=()
for version; do
  requirement=triton
  [ "$version" = newest ] || requirement+="==$version"
  python -m pip install --quiet --no-deps --target "$work/$version" "$requirement" || exit
  export PYTHONPATH="$work/$version:$PWD/kernels"
  python -c 'import triton; print("triton", triton.__version__)'
  python -m pytest -q tests/compile || failed+=("$version")
done
echo "failed under: ${failed[*]:-none}"
((${#failed[@]} == 0))
