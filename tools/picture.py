"""A terminal's output as a picture: ./dspark --show -p "..." | python3 picture.py TITLE > show.svg (needs rich)"""
import io, sys
from rich.console import Console
from rich.text import Text

console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
console.print(Text.from_ansi(sys.stdin.read()))
print(console.export_svg(title=sys.argv[1]))
