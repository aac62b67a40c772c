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

# refuses PATTERN ARGUMENTS: exit status 2, nothing on stdout, one line on stderr that says so
refuses() {
    pattern=$1
    shift
    plan "$@"
    [ $? -eq 2 ] && [ ! -s $dir/out ] && [ "$(wc -l < $dir/log)" -eq 1 ] && grep -q -- "^plan: .*$pattern" $dir/log
    report $? "refused: $*"
}
for rate in 180 180ms 0tokens/s 1e-320tokens/s 1e999tokens/s nantokens/s etokens/s 1..2tokens/s; do
    refuses "--rate: '$rate'.*: expected .*as in '20 tokens/s'" --rate "$rate"
done
refuses "unit '' is none of" --rate 1tokens/s/
refuses "--machine: '1e300\$/us': expected 1e-12 to 1e+12" --rate 1tokens/s --machine '1e300$/us'
refuses "expected \$/Mtoken, found" --rate 1tokens/s --api '$8/month'
for share in 2 0 -1 nan inf x 1e-320 50users; do
    refuses "--utilization: '$share': expected .*as in '90%'" --rate 1tokens/s --utilization "$share"
    refuses "--accept: '.*$share': expected .*as in '90%'" --profile "$profile" --accept ".5,$share"
done
refuses "--accept: '': expected" --profile "$profile" --accept .5,,.5
for most in 0 -5 1.5 nan x 99999999; do
    refuses "--concurrency: '$most': expected a whole number of 1 to 100,000" --profile "$profile" --concurrency "$most"
done
for option in '--users 5users' '--accept .5' '--target 3tokens/s'; do
    refuses "${option%% *} needs --profile" --rate 1tokens/s $option
done
refuses "--users needs --target" --profile "$profile" --users 5users

# profile WHAT EXPECTED, FOUND: the file $dir/profile is refused by its name, then that
profile() { refuses "$dir/profile: $1: expected $2, found $3" --profile $dir/profile --accept .5; }
while IFS='|' read -r object what expected found; do
    printf '%s' "$object" > $dir/profile
    profile "$what" "$expected" "$found"
done <<'END'
[1, 2]|profile|an object|\[1, 2\]
{}|rows|a list of numbers|nothing
{"rows": [1]}|us|a list of numbers|nothing
{"rows": [], "us": []}|rows|a list of numbers|\[\]
{"rows": [1], "us": "x"}|us|a list of numbers|"x"
{"rows": [1], "us": [null]}|us\[0\]|0.001 to 1e+12|nothing
{"rows": [1], "us": [true]}|us\[0\]|0.001 to 1e+12|true
{"rows": [1, 2], "us": [1, 0]}|us\[1\]|0.001 to 1e+12|0
{"rows": [1], "us": [NaN]}|us\[0\]|0.001 to 1e+12|NaN
{"rows": [1], "us": [1e999]}|us\[0\]|0.001 to 1e+12|Infinity
{"rows": [1.5], "us": [1]}|rows\[0\]|a whole number of 1 to 1e+08|1.5
{"rows": [2, 1], "us": [1, 2]}|rows\[1\]|more than rows\[0\], 2|1
{"rows": [1, 1], "us": [1, 2]}|rows\[1\]|more than rows\[0\], 1|1
{"rows": [1, 2], "us": [1]}|us|2 numbers, as many as rows|1
{"rows": [1], "us": [1], "draft_us": "x"}|draft_us|0 to 1e+12|"x"
{"rows": [1], "us": [1], "session_us": NaN}|session_us|0 to 1e+12|NaN
{"rows": [1], "us": [1], "draft_more_us": -5}|draft_more_us|0 to 1e+12|-5
END
printf '{"rows": [1, 8], "us": [100,' > $dir/profile
refuses "$dir/profile: Expecting value: line 1 column 29" --profile $dir/profile
: > $dir/profile
refuses "$dir/profile: Expecting value" --profile $dir/profile
printf '\377' > $dir/profile
refuses "$dir/profile: .*utf-8" --profile $dir/profile
python3 -c 'print("[" * 100000)' > $dir/profile
refuses "$dir/profile: " --profile $dir/profile
refuses "$dir: Is a directory" --profile $dir
refuses "/nonexistent: No such file" --profile /nonexistent
refuses ": No such file" --profile ''
refuses "--profile: us: expected a list" --profile '{"rows": [1]}'
if [ -e /dev/full ]; then
    python3 tools/plan --machine '$6580/month' --rate '180 tokens/s' > /dev/full 2> $dir/log
    [ $? -eq 1 ] && [ "$(cat $dir/log)" = "plan: standard output: No space left on device" ]
    report $? "output that cannot be written: one line, exit status 1"
fi
python3 tools/plan --machine '$6580' --rate '180 tokens/s' > $dir/out 2> $dir/log
[ $? -eq 2 ]
report $? "refused: a price without a time"
echo "1..$n"
[ $bad -eq 0 ]
