#!/bin/sh
# Everything that is to be learnt on a machine with a GPU: build, check, benchmark, test, sanitize.
#
#     bench/gpu_report.sh OUT        (make gpu-report OUT=<folder>)
#
# With what the machine's own Python has, nothing downloaded. OUT gets log.txt, report.json and report.md with charts,
# and of kernels that no card has proved norm_convolution.json and tilings.json, each with an .md beside it.
# A step that fails, crashes or hangs is recorded, and the others still run; the exit status is 1 if one did.
# PYTHON names another Python, ONLY="bench tests" those steps alone, SECONDS_OF_BENCH the time for measuring
# what has been proved; BITFAST_COMMIT says the commit where there is only a copy.

out=$1
[ -n "$out" ] || { echo "usage: $0 OUT" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
: > "$out/log.txt"
unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1
summary="" status=0

# step NAME SECONDS COMMAND...: at its limit a step is interrupted, and killed soon after.
step() {
    name=$1 seconds=$2
    shift 2
    case " ${ONLY:-$name} " in *" $name "*) ;; *) return ;; esac
    printf '\n===== %s: %s\n' "$name" "$*" >> "$out/log.txt"
    began=$(date +%s)
    if timeout --signal=INT --kill-after=5 "$seconds" "$@" >> "$out/log.txt" 2>&1
    then ended=done
    else
        code=$? status=1
        if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then ended="out of time"; else ended="failed ($code)"; fi
    fi
    note "$name: $ended after $(($(date +%s) - began)) s; $(tail -n 1 "$out/log.txt" | cut -c 1-120)"
}

note() {
    echo "$1"
    summary="$summary$1
"
}

# Kernels that no card has proved yet have steps of their own: one that hangs must not cost the others' results.
# They come first: a machine may be taken away before the end.
unproved="tests/gpu/test_norm_convolution*.py" its_cases=norm_convolution
small="tests/gpu/test_same_padding.py tests/gpu/test_prepared_launch.py"
kernels="tests/test_group_norm_act_kernels.py tests/test_weight_standardization_kernels.py
    tests/test_resize_normalize_kernels.py"
pytest="-m pytest -q -rfE -p no:cacheprovider"
spread=""
"$python" -c "import xdist" 2> /dev/null && spread="-n 8"

# bench_step NAME SECONDS FILE ARGUMENTS...: cases of the benchmark, written to FILE.json and FILE.md.
bench_step() {
    name=$1 seconds=$2 file="$out/$3"
    shift 3
    step "$name" "$((seconds + 90))" "$python" -m bench.run --device cuda --seconds "$seconds" --rounds 5 \
        --output "$file.json" --markdown "$file.md" "$@"
}

step install 60 env BITFAST_EXTENSION=none "$python" -m pip install --quiet --no-index --no-deps \
    --no-build-isolation --editable .
step build 180 env BITFAST_EXTENSION=cuda "$python" setup.py --quiet build_ext --inplace
step environment 60 "$python" -m bitfast env --check
# shellcheck disable=SC2086 # lists of words
step tests-unproved 150 "$python" $pytest -vv $unproved
bench_step bench-unproved 150 "$its_cases" --only "$its_cases"
step tilings 120 "$python" -m bench.norm_convolution_tilings --seconds 80 \
    --output "$out/tilings.json" --markdown "$out/tilings.md"
bench_step bench "${SECONDS_OF_BENCH:-180}" report --skip "$its_cases" --charts "$out"
step host 120 "$python" -m bench.host_training --output "$out/host_training.json"
# shellcheck disable=SC2086
step tests 240 "$python" $pytest $spread --ignore-glob=$unproved tests/gpu $kernels
if command -v compute-sanitizer > /dev/null
then
    # Without torch's cache every tensor is an allocation of its own, whose ends are watched. Calls that torch makes
    # to ask what the driver can do are no errors of ours.
    sanitizer="compute-sanitizer --error-exitcode 9 --print-limit 20"
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    # The checks that CUDA kernels make of themselves launch each of them.
    step memcheck-checks 100 $sanitizer --tool memcheck --report-api-errors no "$python" -m bitfast env --check
    step racecheck-checks 100 $sanitizer --tool racecheck "$python" -m bitfast env --check
    # shellcheck disable=SC2086
    step memcheck 200 $sanitizer --tool memcheck --report-api-errors no "$python" $pytest $small $kernels
    # shellcheck disable=SC2086
    step racecheck 200 $sanitizer --tool racecheck "$python" $pytest $small $kernels
else
    note "memcheck, racecheck: skipped, compute-sanitizer is not installed"
fi

printf '\n%s' "$summary" | tee -a "$out/log.txt"
exit "$status"
