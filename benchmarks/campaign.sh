#!/usr/bin/env bash
# Fills the tables of docs/performance.md on a machine with one GPU and no network.
#
#   bash benchmarks/campaign.sh --out DIR [--minutes 9] [--resume] [--quick] [--wheels FOLDER]
#
# Results are saved in DIR/summary.md and DIR/results.json as they come; --resume goes on where the last call ended.
# FOLDER (or ATTNRES_WHEELS) holds wheels of what the machine lacks, rivals among them. PYTHON names the interpreter.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
wheels=${ATTNRES_WHEELS:-}
arguments=()
while (($#)); do
  case $1 in
    --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done
python=${PYTHON:-python3}
export PYTHONPATH="$here/../src:$here${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  for wheel in "$wheels"/*.whl; do
    [ -e "$wheel" ] || { echo "no wheels in $wheels" >&2; exit 2; }
    "$python" -m zipfile -e "$wheel" "$site"
  done
  export PYTHONPATH="$PYTHONPATH:$site" # behind src: fast-attnres brings a package called attnres too
fi
"$python" "$here/campaign.py" "${arguments[@]}"
