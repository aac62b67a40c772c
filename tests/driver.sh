#!/bin/sh
# The program ./dspark (or $DSPARK), TAP: what it refuses and how, and what it says with the small model.
cd "$(dirname "$0")/.." || exit 1
dspark=${DSPARK:-./dspark} model=${MODEL:-tools/spark-tiny/model}
dir=build/driver.$$
mkdir -p $dir && trap 'rm -rf $dir' EXIT
n=0 bad=0

# claim, then a command that must succeed
check() {
    n=$((n + 1)) claim=$1
    shift
    if "$@"; then echo "ok $n - $claim"
    else echo "not ok $n - $claim"; sed 's/^/# /' $dir/out $dir/err | cut -c1-200 | head -n 20; bad=$((bad + 1)); fi
}
# arguments of the program; leaves $status, $dir/out, $dir/err
run() { $dspark "$@" < /dev/null > $dir/out 2> $dir/err; status=$?; }
# exit status, arguments: nothing on stdout, one line on stderr
refuses() {
    expected=$1
    shift
    run "$@"
    [ $status -eq $expected ] && [ ! -s $dir/out ] && [ "$(wc -l < $dir/err)" -eq 1 ]
}
says() { run "$@" && [ ! -s $dir/err ]; }
says_grep() { pattern=$1; shift; run "$@" && grep -q -- "$pattern" $dir/out; }

for call in "--nonsense" "word" "--backend tpu" "-n" "-n ten" "-n -1" "-n 1.5" "-n 1e99" "-t -1" "-t nan" "--top-p 2" "--seed -1" \
    "--seed 99999999999999999999" "-c 0" "--threads 0" "--stop" "--schedule fast" "--verify maybe" "--threshold 2" \
    "--schedule threshold" "--preset reckless" "--log $dir/none/log" "--metrics $dir/none/metrics" \
    "--metrics $dir" "--profile $dir/none/profile" "--profile $dir" "--json --show" "--plain --compare" --fast-prefill "-m /nonexistent" "-m Makefile"; do
    check "$call: one line on stderr, exit status 2" refuses 2 -p x $call
done
# exit status, a pattern of the line on stderr, arguments
says_why() { pattern=$2; status=$1; shift 2; refuses $status "$@" && grep -q -- "^dspark: $pattern" $dir/err; }
for name in -m --preset --profile --metrics --log --stop; do
    check "$name '': refused as empty" says_why 2 "$name '': expected [A-Z]" -p x $name ''
done
check "numbers and presets are refused with what was expected" eval 'says_why 2 "-n .1.5.: expected a whole number, 0 to 1e+09" -n 1.5 &&
    says_why 2 "--seed .1e3.: expected a whole number, 0 to 1.8" --seed 1e3 && says_why 2 "-t .x.: expected 0 to 100" -t x &&
    says_why 2 "--preset .x.: expected code" --preset x'
check "the 17th --stop is refused as one too many" eval \
    'says_why 2 "--stop .x.: expected at most 16" -p x $(printf -- "--stop x %.0s" 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17)'
check "-h: a list on stdout" says_grep '--compare' -h
check "--help: the same" says_grep '--compare' --help
mkdir $dir/empty
check "a directory without a checkpoint: one line, exit status 1" refuses 1 -m $dir/empty -p x
check "output that cannot be written: exit status 1" \
    sh -c "$dspark -h > /dev/full 2> $dir/err; [ \$? -eq 1 ]"

# A text of the small model, in the ways of asking for it.
text() { run -m $model -n 40 "$@" && [ $status -eq 0 ] && [ ! -s $dir/err ] && cat $dir/out > $dir/text; }
same() { text "$@" && cmp -s $dir/text $dir/first; }
differs() { text "$@" && ! cmp -s $dir/text $dir/first; }
piped() { printf '%s\n' "$prompt" | $dspark -m $model -n 40 "$@" > $dir/out 2> $dir/err && cmp -s $dir/out $dir/first; }
# a text, arguments that stop before it
stops() {
    before=$1 full=$(cat $dir/first)
    shift
    text -p "$prompt" "$@" && [ "$(cat $dir/text)" = "$(printf %s "${full%%"$before"*}")" ] &&
        json -p "$prompt" -n 40 "$@" && [ "$(field finish)" = '"stop_string"' ]
}
# --show: what it prints without its codes
uncoloured() { sed "s/$(printf '\033')\[[0-9]*m//g" $dir/out; }
begin='<｜begin▁of▁sentence｜>'
shows_text() {
    run -m $model -n 40 -p "$prompt" --show --schedule block &&
        [ "$(uncoloured | sed '1d; / verified, /d')" = "$begin$prompt$(cat $dir/first)" ]
}
# Green: the name of the colour, each accepted draft in the text, and again in its cycle.
shows_accepted() {
    accepted=$(uncoloured | sed -n 's/.* verified, \([0-9]*\) accepted:.*/\1/p' | awk '{ n += $1 } END { print n }')
    [ "$accepted" -gt 0 ] && [ "$(grep -o "$(printf '\033')\[32m" $dir/out | wc -l)" -eq $((1 + 2 * accepted)) ]
}
# the prompt up to the answer, arguments
form() {
    expected=$begin$1
    shift
    run -m $model -n 4 -p hi --show "$@" && [ "$(uncoloured | sed -n '2s/\(.*<[/]*think>\).*/\1/p')" = "$expected" ]
}
unread() {
    sh -c "$dspark -m $model $1" > $dir/out 2> $dir/err
    [ $? -eq 1 ] && [ ! -s $dir/out ] && [ "$(wc -l < $dir/err)" -eq 1 ] && grep -q "standard input: " $dir/err
}
unwritten() {
    sh -c "$dspark -m $model -p x -n 9 --log $dir/log $1" 2> $dir/err
    [ $? -eq 1 ] && grep -qx "dspark: standard output cannot be written" $dir/err && ! grep -qv '^{.*}$' $dir/log
}
# arguments of a chat on a terminal, in which the lines of $typed are typed: $dir/said has a line for each answer
chat() {
    printf "$typed" | python3 -c 'import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)' \
        sh -c 'stty -echo; exec "$@"' sh $dspark -m $model -n 9 "$@" > $dir/out 2> $dir/err || return 1
    tr -d '\r' < $dir/out | sed -nE '/\[K|^> /{ s/.*\[K//; s/^[> ]*//; p; }' > $dir/said
}
said() { sed -n "$1p" $dir/said; }
chats() {
    typed='hi\n/retry\n/reset\nhi\n/what\n/quit\n' && chat && [ -n "$(said 1)" ] && [ "$(said 1)" != "$(said 2)" ] &&
        [ "$(said 2)" = "$(said 3)" ] && said 4 | grep -q '^commands: /retry with the next seed'
}
takes_back() {
    typed='hi\n/quit\n' && chat && answer=$(said 1) || return 1
    typed="$(head -c 200 /dev/zero | tr '\0' 'x')\\nnone\\0hi\\nhi\\n/quit\\n" && chat -c 60 && [ "$(said 3)" = "$answer" ] &&
        said 1 | grep -q 'the prompt is too long' && said 2 | grep -q 'a zero byte'
}
field() { sed -n 's/.*"'"$1"'": \([^,}]*\).*/\1/p' $dir/out; }
json() { run -m $model --json "$@" && [ "$(wc -l < $dir/out)" -eq 1 ]; }
count_tokens() { sed 's/.*"tokens": \[\([^]]*\)\].*/\1/' $dir/out | tr ',' '\n' | grep -c '[0-9]'; }
makes() { json -p "$prompt" -n $1 && [ "$(count_tokens)" -eq $1 ] && [ "$(field finish)" = '"length"' ]; }
has_keys() {
    json -p "$prompt" -n 30 || return 1
    for key in text tokens prompt_tokens seconds tokens_per_second tau cycles drafted scheduled accepted \
        accepted_by_position finish; do grep -q "\"$key\": " $dir/out || return 1; done
}
parses() { json -p "$1" --chat -n 60 -t 1 && python3 -c 'import json, sys
d = json.load(open(sys.argv[1], encoding="utf-8"))
assert len(d["tokens"]) > 0 and d["accepted"] <= d["scheduled"] <= d["drafted"] and d["tau"] >= 1' $dir/out; }
drafts() { json -p "$prompt" -n 60 "$@"; [ "$(field drafted)" $compare 0 ]; }

if [ ! -e $model/config.json ]; then
    n=$((n + 1)) && echo "ok $n - texts of the small model # SKIP there is no $model"
else
    prompt="Once upon a time" word=the
    check "-m and -p: a text, and nothing on stderr" text -p "$prompt"
    cp $dir/text $dir/first
    check "the same call gives the same text again" same -p "$prompt"
    check "--plain: the same text" same -p "$prompt" --plain
    check "one thread: the same text" same -p "$prompt" --threads 1
    check "--schedule block: the same text" same -p "$prompt" --schedule block
    check "--schedule threshold: the same text" same -p "$prompt" --schedule threshold --threshold .7
    check "-p - reads the prompt from standard input" piped -p -
    check "without -p standard input is the prompt, where it is no terminal" piped
    check "standard input that cannot be read is no empty prompt: one line, exit status 1" unread "< $dir"
    check "nor is one that is closed" unread '-p - <&-'
    check "closed standard output: exit status 1, and no text in the files that are opened" unwritten '>&-'
    check "an answer ends with the first step that cannot be written" eval 'unwritten "> /dev/full" && [ "$(wc -l < $dir/log)" -eq 1 ]'
    check "temperature 1: another text" differs -p "$prompt" -t 1 --seed 3
    check "--chat: another text" differs -p "$prompt" --chat
    check "--chat: a question, to be answered without thinking" form '<｜User｜>hi<｜Assistant｜></think>' --chat
    check "--think: the same, thinking" form '<｜User｜>hi<｜Assistant｜><think>' --think
    check "--system stands before the question" form 'Be brief.<｜User｜>hi<｜Assistant｜></think>' --system "Be brief."
    word=$(tr -cs 'A-Za-z' '\n' < $dir/first | sed -n 5p)
    span=$(sed -n "s/.*\(.. $word ..\).*/\1/p" $dir/first | head -n 1)
    check "--stop: the text up to that word" stops "$word" --stop "$word"
    check "the text up to a --stop of several tokens" stops "$span" --stop "$span"
    check "of two --stop, the one that comes first in the text" stops "$span" --stop "$word ${span##* }" --stop "$span"
    check "a --stop that does not come: the same text" same -p "$prompt" --stop "$word@@"
    for limit in 1 2 7 33; do check "-n $limit makes $limit tokens" makes $limit; done
    check "-n 0 goes on until the context is full" \
        eval 'json -p "$prompt" -n 0 -c 24 --stop @@@@ && [ "$(field finish)" = "\"context\"" ]'
    check "a prompt longer than the context: one line, exit status 2" \
        refuses 2 -m $model -c 3 -p "one two three four five six seven eight"
    check "a context beyond the model's: one line, exit status 2" refuses 2 -m $model -c 999999999 -p x
    check "--json has its fields" has_keys
    if command -v python3 > /dev/null; then
        check "--json is JSON, quotes, controls and emoji in the prompt" parses "$(printf 'say "\\\\" \t\001 \360\237\230\200')"
    fi
    if command -v python3 > /dev/null; then
        check "a chat: an answer, another by /retry, the same after /reset; what else begins with / lists these" chats
        check "a question that is too long, or has a zero byte, is refused and leaves the chat as it was" takes_back
    fi
    compare=-gt; check "--schedule block drafts" drafts --schedule block
    compare=-eq; check "--plain does not draft" drafts --plain
    check "--compare: the texts are identical" says_grep 'texts identical' -m $model -p "$prompt" -n 60 --compare
    check "--compare at temperature 1: the texts are identical" \
        says_grep 'texts identical' -m $model -p "$prompt" -n 60 --compare -t 1 --seed 5
    check "--verify rejection runs" text -p "$prompt" -t 1 --verify rejection
    check "--show without its colours: the prompt and the same text" shows_text
    check "--show: the accepted drafts are green" shows_accepted
    check "--show lists the cycles" \
        says_grep 'of 5 verified' -m $model -p "$prompt" -n 40 --show --schedule block
    check "--stats is on stderr" eval 'run -m $model -p "$prompt" -n 40 --stats && grep -q "^tau " $dir/err'
    check "--check says whether it fits" says_grep ' in all: fits' -m $model --check
    check "--check says what passes cost" says_grep '^passes .* 4: .* ms' -m $model --check
    check "--check --learn: nothing is known yet" eval 'says_grep "^passes *to be learned" -m $model --check --learn && ! grep -q "0.00 ms" $dir/out'
    for preset in code chat regulated; do
        check "--preset $preset: the same text" same -p "$prompt" --preset $preset
    done
    check "what is given beside a preset holds: the coupled text" eval 'json -p "$prompt" -n 40 -t 1 --plain && text=$(field text) &&
        json -p "$prompt" -n 40 -t 1 --preset creative --schedule block --verify coupled && [ "$(field text)" = "$text" ] &&
        json -p "$prompt" -n 40 -t 1 --preset creative --schedule block && [ "$(field text)" != "$text" ]'
    check "--compare expects no equal texts of a preset with rejection" eval 'says_grep "texts different" \
        -m $model -p "$prompt" -n 60 -t 1 --compare --preset creative --schedule block && [ $status -eq 0 ]'
    check "--learn: the same text" same -p "$prompt" --learn
    check "--profile writes what passes cost" eval 'text -p "$prompt" --profile $dir/profile && grep -q "\"us\"" $dir/profile'
    check "--profile reads what it wrote: the same text" same -p "$prompt" --profile $dir/profile
    sed 's/"draft_us": .*/"draft_us": 1e8,/' $dir/profile > $dir/learned
    check "--profile with --plain keeps what it cannot measure" eval \
        'text -p "$prompt" --plain --profile $dir/learned && sed -n "s/.*draft_us.: //p" $dir/learned | awk "{ exit !(\$1 + 0 > 1e6) }"'
    echo '{}' > $dir/broken
    check "a broken profile: one line, exit status 1" refuses 1 -m $model -p "$prompt" --profile $dir/broken
    check "--log has a line a step: the first gives two tokens" eval 'text -p "$prompt" --plain --log $dir/log && [ "$(wc -l < $dir/log)" -eq 39 ]'
    echo kept > $dir/kept
    check "a run that fails leaves the files as they are, and no new ones" eval 'refuses 2 -m $model -c 3 -p "one two three" \
        --metrics $dir/kept --log $dir/kept --profile $dir/unmade && [ "$(cat $dir/kept)" = kept ] && [ ! -e $dir/unmade ]'
    check "--metrics counts the tokens" eval 'text -p "$prompt" --metrics $dir/metrics &&
        grep -qx "dspark_generation_tokens_total 40" $dir/metrics'
fi

echo "1..$n"
[ $bad -eq 0 ]
