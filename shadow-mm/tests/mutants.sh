#!/bin/sh
# Plants one bug at a time and expects the tests to notice.
# usage: shadow-mm/tests/mutants.sh [--check] [mutant...]
# --check: no tests; only whether each bug is still planted somewhere, and compiles
set -eu
check=
[ "${1:-}" != --check ] || { check=yes; shift; }
cd "$(dirname "$0")/.."
target="${CARGO_TARGET_DIR:-../target}/mutants"
mkdir -p "$target"
target=$(cd "$target" && pwd)
all="lost_share skipped_flush skipped_copy lost_dirty held_taken leaked_table
     lost_descriptor pinned_shared supervisor_zapped unzeroed_page
     early_reuse skipped_recheck unchecked_write lost_dirty_at_trim unflushed_trim
     slot_freed_early unchecked_slack truncated_stays section_keeps_frame
     failed_write_forgotten kept_dirty unflushed_clean image_survives zeroes_over_image
     lost_parent writable_link writable_below forgotten_fork
     held_table_taken unowned_edges narrow_trim copied_in_fork pins_forgotten
     hole_stays_charged store_unnoticed unheld_save quota_lost quota_unchecked
     thawed_early thawed_clean thaw_unseen thaw_unflushed zeroes_over_layer read_twice
     frozen_writable frozen_counted frozen_in_place frozen_unflushed uncounted_entry
     kept_truncated kept_as_child never_opened promises_kept
     kept_unfilled kept_clean pinned_kept kept_shared
     reset_stays_cut rebased_unseen kept_open kept_twin kept_mapped kept_with_later kept_cut kept_unlooked"
survived=0
planted=$(grep -rho 'mutant = "[a-z_]*"' src | sed 's/.*"\(.*\)"/\1/' | sort -u)
for mutant in $all $planted; do
    case " $(echo $all) " in *" $mutant "*) ;; *) echo "UNKNOWN  $mutant (planted, and not in this list)"; survived=$((survived + 1));; esac
    case " $(echo $planted) " in *" $mutant "*) ;; *) echo "GONE     $mutant (nothing is planted under this name)"; survived=$((survived + 1));; esac
done
for mutant in ${*:-$all}; do
    log="$target/$mutant.log"
    # A wrapper around this workspace's rustc only, so that the dependencies are built once.
    wrapper="$target/rustc-$mutant"
    printf '#!/bin/sh\nexec "$@" --cfg '\''mutant="%s"'\''\n' "$mutant" >"$wrapper"
    chmod +x "$wrapper"
    if [ -n "$check" ]; then
        if RUSTC_WORKSPACE_WRAPPER="$wrapper" CARGO_TARGET_DIR="$target" CARGO_INCREMENTAL=0 cargo check -p shadow-mm >"$log" 2>&1; then
            echo "planted  $mutant"
        else
            echo "BROKEN   $mutant (does not compile, see $log)"
            survived=$((survived + 1))
        fi
        continue
    fi
    if RUSTC_WORKSPACE_WRAPPER="$wrapper" CARGO_TARGET_DIR="$target" CARGO_INCREMENTAL=0 \
        cargo test -p shadow-mm --no-fail-fast >"$log" 2>&1; then
        echo "SURVIVED $mutant"
        survived=$((survived + 1))
    elif grep -q '^error: could not compile' "$log"; then
        echo "BROKEN   $mutant (does not compile, see $log)"
        survived=$((survived + 1))
    else
        tests=$(sed -n 's/^test \([a-z_:]*\) .*FAILED$/\1/p' "$log" | tr '\n' ' ')
        echo "caught   $mutant by $tests"
    fi
done
exit "$survived"
