"""Say what one share of the numbers in a file comes to: sum, average, extremes, standard deviation."""

import argparse
import sys
from math import fsum, sqrt
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--file", type=Path, required=True, help="the numbers, one a line")
parser.add_argument("--idx", type=int, required=True, help="which share, counted from 0")
parser.add_argument("--of", type=int, default=4, help="the number of shares (default 4)")
arguments = parser.parse_args()
if not 0 <= arguments.idx < arguments.of:
    parser.error(f"--idx must be one of 0 to {arguments.of - 1}")

lines = arguments.file.read_bytes().splitlines()
first, end = (len(lines) * index // arguments.of for index in (arguments.idx, arguments.idx + 1))
if first == end:
    sys.exit(f"{arguments.file} has {len(lines)} numbers: share {arguments.idx} of {arguments.of} is empty")

# Not NumPy: to import it takes longer than all of this.
numbers = [float(line) for line in lines[first:end]]
total = fsum(numbers)
average = total / len(numbers)
print(
    {
        "container index": arguments.idx,
        "sum": total,
        "average": average,
        "max": max(numbers),
        "min": min(numbers),
        "standard deviation": sqrt(fsum((number - average) ** 2 for number in numbers) / len(numbers)),
    }
)
