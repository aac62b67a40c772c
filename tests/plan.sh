#!/bin/sh
# tools/plan, TAP: what a machine costs and carries, against figures worked out by hand; wrong units are refused.
cd "$(dirname "$0")/.." || exit 1
n=0 bad=0
if ! command -v python3 > /dev/null; then echo "1..0 # SKIP no python3"; exit 0; fi
dir=build/plan.$$
mkdir -p $dir && trap 'rm -rf $dir' EXIT

report() {      # status, claim
    n=$((n + 1))
    if [ "$1" -eq 0 ]; then echo "ok $n - $2"; else echo "not ok $n - $2"; bad=$((bad + 1)); sed 's/^/# /' $dir/log; fi
}
plan() { python3 tools/plan --machine '$6580/month' "$@" > $dir/out 2> $dir/log; }
# claim, what, the value that a line of the table must show
shows() {
    awk -v what="$2" -v value="$3" 'index($0, what) == 1 { rest = substr($0, length(what) + 1); gsub(/^ +/, "", rest)
        found = found || rest == value } END { exit !found }' $dir/out
    status=$?
    cp $dir/out $dir/log
    report $status "$1"
}

plan --rate '180 tokens/s' --api '$28.2/Mtoken' --utilization 50%
shows "180 tokens/s are 467 million tokens in a month of 30 days" "the same in a month" "466.6 Mtoken"
shows "half of them used, \$6,580 a month are \$28.21 a million" "cost of output" "28.21 \$/Mtoken"
shows "at the API's price per million, half the machine's tokens are what it costs" \
    "break-even with the API, utilization" "50.01 %"
plan --rate '180 tokens/s'
shows "all of them used, \$6,580 a month are \$14.10 a million" "cost of output" "14.1 \$/Mtoken"

# Passes take 10 ms however many rows up to 8: 4 requests of 1 + 1 rows get (1 + .5) / 10 ms = 150 tokens/s each.
profile='{"rows": [1, 8, 9], "us": [10000, 10000, 90000]}'
plan --profile "$profile" --accept .5 --target '150 tokens/s' --users '9 users'
shows "a user's rate is tau over the pass that verifies" "tokens for each" "150 tokens/s"
shows "of users who always ask a machine has as many as it serves at the target" \
    "users of a machine, p95 in the target" "4 users"
shows "9 users at 4 a machine need 3 machines" "machines" "3"
# 4 at once suffice for N users at 1/10 while P(Binomial(N - 1, .1) <= 3) >= .95: N = 15 (.9559), not 16 (.9444)
plan --profile "$profile" --accept .5 --target '150 tokens/s' --active 10%
shows "of users who ask a tenth of the time a machine has as many as the binomial's 95th percentile allows" \
    "users of a machine, p95 in the target" "15 users"
plan --profile "$profile" --accept .5 --target '151 tokens/s'
shows "a target that no user can have serves nobody" "served at once" "0 users"
plan --profile '{"rows": [1, 4], "us": [10000, 34000]}' --accept .5 --concurrency 1
shows "drafts that cost more than they bring are not verified" "drafts verified" "0"
plan --profile '{"rows": [1, 2], "us": [10000, 12500], "draft_us": 4000}' --accept .5 --concurrency 1
shows "the draft's own time counts: 1.5 / 16.5 ms is less than 1 / 10 ms" "tokens for each" "100 tokens/s"

plan --profile '{"rows": [4, 8], "us": [8000, 10000], "session_us": 100, "draft_us": 1000, "draft_more_us": 50}' \
    --accept 1 --concurrency 10
# beyond the points a row takes half of 10 / 8 ms, more than the 2 / 4 ms between them: 20 rows take 17.5 ms; with 9 x
# .1 and drafts of 1.45, 20 tokens in 19.85 ms
shows "passes beyond the profile, further requests and their drafts cost what it says" "machine, all of the time" \
    "1,008 tokens/s"
plan --profile "$profile" --accept .5 --concurrency 4 --json && python3 - $dir/out 2> $dir/log <<'END'
import json, sys
d = json.load(open(sys.argv[1]))
tau = {r["factor"]: r["$/Mtoken"] for r in d["sensitivity"] if r["utilization"] == 1}
assert d["plan"]["cost of output"]["unit"] == "$/Mtoken"
assert abs(tau[.5] / tau[1] - 1.5 / 1.25) < 1e-9, tau
END
report $? "JSON: with half the accepted drafts, the cost is 1.5 / 1.25 times as much"

for wrong in "--rate 180" "--rate 180ms" "--rate 0tokens/s" "--api \$8/month --rate 1tokens/s" \
    "--rate 1tokens/s --utilization 2" "--profile {\"rows\":[1,2],\"us\":[1,0]}" \
    "--profile {\"rows\":[2,1],\"us\":[1,2]}" "--profile {\"rows\":[],\"us\":[]}" \
    "--profile /nonexistent" "--rate 1tokens/s --users 5users"; do
    plan $wrong
    status=$?
    [ $status -eq 2 ] && [ ! -s $dir/out ]
    report $? "refused: $wrong"
done
python3 tools/plan --machine '$6580' --rate '180 tokens/s' > $dir/out 2> $dir/log
[ $? -eq 2 ]
report $? "refused: a price without a time"
echo "1..$n"
[ $bad -eq 0 ]
