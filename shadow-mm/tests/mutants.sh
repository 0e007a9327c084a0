#!/bin/sh
# Plants one bug at a time and expects the tests to notice.
# usage: shadow-mm/tests/mutants.sh [mutant...]
set -eu
cd "$(dirname "$0")/.."
target="${CARGO_TARGET_DIR:-../target}/mutants"
all="lost_share skipped_flush skipped_copy lost_dirty held_taken leaked_table
     lost_descriptor pinned_shared supervisor_zapped unzeroed_page"
survived=0
for mutant in ${*:-$all}; do
    log="$target.$mutant.log"
    mkdir -p "$(dirname "$log")"
    if RUSTFLAGS="--cfg mutant=\"$mutant\"" CARGO_TARGET_DIR="$target" \
        cargo test --quiet --no-fail-fast >"$log" 2>&1; then
        echo "SURVIVED $mutant"
        survived=$((survived + 1))
    elif grep -q '^error: could not compile' "$log"; then
        echo "BROKEN   $mutant (does not compile, see $log)"
        survived=$((survived + 1))
    else
        echo "caught   $mutant by $(grep -c '^test .* FAILED\|^    [a-z_:]*$' "$log") tests"
    fi
done
exit "$survived"
