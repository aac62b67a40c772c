"""The table of character classes in dspark.h, from a list of ranges: unicode_table.py CLASSES.tsv

A line of the list: first and last code point in hexadecimal, class (L, M, N, P, S or Z for white space).
P and S are one class to the patterns. A range becomes its class, the distance from the range before and
its length - 1, numbers in base 26 with the last digit in upper case."""
import sys

CLASS = {"L": 0, "M": 1, "N": 2, "P": 3, "S": 3, "Z": 4}


def number(n):
    digits = chr(ord("A") + n % 26)
    while n >= 26:
        n //= 26
        digits = chr(ord("a") + n % 26) + digits
    return digits


rows = [line.split() for line in open(sys.argv[1]).read().splitlines()[1:]]
ranges = []
for first, last, kind in sorted((int(a, 16), int(b, 16), CLASS[c]) for a, b, c in rows):
    if ranges and ranges[-1][1] + 1 == first and ranges[-1][2] == kind:
        ranges[-1][1] = last
    else:
        ranges.append([first, last, kind])
table, at = "", 0
for first, last, kind in ranges:
    table += f"{kind}{number(first - at)}{number(last - first)}"
    at = last + 1
for i in range(0, len(table), 104):
    print(f'    "{table[i:i + 104]}"')
