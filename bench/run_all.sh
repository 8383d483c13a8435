#!/bin/sh
# Runs every benchmark and every comparison with other software that is there, and prints one table of the comparisons.
#
#   bench/run_all.sh [--quick] [BUILD]
#
# BUILD is a build folder with the benchmarks (default: build/bench, else build/test). Peers that are not installed are
# skipped with a line that says so. Which Python has which peer, and where KANN is:
#
#   PYTHON            torch and NumPy (default: python3)
#   EXPLAIND_PYTHON   ExPLAIND              JAX_PYTHON      neural-tangents
#   CAPTUM_PYTHON     Captum                KANN            a checkout of KANN
#
# --quick takes a few minutes: smaller jobs, the same checks. Exit status 1 where a result is wrong.
set -u

quick=
if [ "${1:-}" = --quick ]; then
    quick=1
    shift
fi
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root" || exit 2
build=${1:-build/bench}
[ -d "$build/bench" ] || build=build/test
if [ ! -d "$build/bench" ]; then
    echo "no benchmarks: cmake --preset bench && cmake --build build/bench, or name the build folder" >&2
    exit 2
fi
build=$(CDPATH='' cd -- "$build" && pwd)

python=${PYTHON:-python3}
explaind=${EXPLAIND_PYTHON:-$python}
jax=${JAX_PYTHON:-$python}
captum=${CAPTUM_PYTHON:-$python}
program=$build/pathkernel-decompose
out=pathkernel-out/bench
mkdir -p "$out" || exit 2
PATHKERNEL_TABLE=$root/$out/table.tsv
export PATHKERNEL_TABLE
printf 'job\tours, s\tits, s\tratio\tour error\tits error\tours, MB\tits, MB\n' > "$PATHKERNEL_TABLE"
failed=0

# run NAME COMMAND...: what it prints goes to the screen and to a file.
run() {
    name=$1
    shift
    echo "== $name"
    if "$@" > "$out/$name.log" 2>&1; then
        cat "$out/$name.log"
    else
        status=$?
        cat "$out/$name.log"
        echo "== $name: exit status $status"
        failed=$((failed + 1))
    fi
}

# ---- our own benchmarks
for bench in "$build"/bench/bench_*; do
    if [ ! -f "$bench" ] || [ ! -x "$bench" ]; then
        continue
    fi
    run "$(basename "$bench")" "$bench" ${quick:+--quick}
done

# ---- comparisons
peers=bench/peers
if "$explaind" -c 'import explaind' 2> /dev/null; then
    if [ "$quick" ]; then
        run explaind "$explaind" $peers/run_explaind.py --program "$program" --job sgd --steps 10 --tests 10
    else
        for width in 32 128; do
            run "explaind_sgd_$width" "$explaind" $peers/run_explaind.py --program "$program" --job sgd --width $width
            run "explaind_adamw_$width" "$explaind" $peers/run_explaind.py --program "$program" --width $width
        done
    fi
else
    echo "skipped: explaind: ExPLAIND is not installed for $explaind"
fi
ntk_options="--program $build/bench/bench_kernel --jax-python $jax --torch-python $python"
if [ "$quick" ]; then
    ntk_options="$ntk_options --rows 16 --threads 1 --kernels full,trace --budget 2 --patience 20 --memory 1"
fi
# shellcheck disable=SC2086 # options are words
run ntk "$python" $peers/run_ntk.py $ntk_options
if "$captum" -c 'import captum' 2> /dev/null; then
    run tracin "$captum" $peers/run_tracin.py --program "$program" ${quick:+--steps 20}
else
    echo "skipped: tracin: Captum is not installed for $captum"
fi
if "$python" -c 'import torch' 2> /dev/null; then
    if [ "$quick" ]; then
        run training "$python" $peers/run_training.py --program "$build/bench/bench_train" \
            --optimizers sgd --ways eager --rounds 1
    else
        for threads in 1 2; do
            run "training_$threads" "$python" $peers/run_training.py --program "$build/bench/bench_train" \
                --threads $threads
        done
    fi
    run kann "$python" $peers/run_kann.py --program "$build/bench/bench_train" ${quick:+--rounds 1}
else
    echo "skipped: training, kann: torch and NumPy are not installed for $python"
fi

# ---- one table
echo
awk -F '\t' '{
    printf "%-66s", $1
    for (i = 2; i <= NF; i++) printf " %10s", $i
    print ""
}' "$PATHKERNEL_TABLE"
[ "$failed" -eq 0 ] || echo "$failed of the programs failed: their logs are in $out"
[ "$failed" -eq 0 ]
