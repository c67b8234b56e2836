"""Prints the table of systems from docs/systems.json (`make systems`); needs nothing but Python.

python docs/print_systems.py                    print it
python docs/print_systems.py --write README.md  print it, and put it between the markers in the file
python docs/print_systems.py --check README.md  leave with status 1 if the file holds another table
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

BEGIN, END = "<!-- systems: begin (printed by `make systems`) -->", "<!-- systems: end -->"


def table() -> str:
    """What works as rows with the command that shows it; the rest as one line per family."""
    systems = json.loads(Path(__file__).with_name("systems.json").read_text(encoding="utf-8"))
    lines = ["| system | family | works | what | command |", "|---|---|---|---|---|"]
    planned: dict[str, list[str]] = {}
    for one in systems:
        if one["works"] == "no":
            note = f" ({one['what']})" if one["what"] != "planned" else ""
            planned.setdefault(one["family"], []).append(one["name"] + note)
        else:
            lines.append("| {name} | {family} | {works} | {what} | `{command}` |".format(**one))
    lines += ["", "Not yet:", ""]
    lines += [f"- **{family}**: {', '.join(names)}" for family, names in planned.items()]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if len(argv) not in (0, 2) or (argv and argv[0] not in ("--write", "--check")):
        print(__doc__, file=sys.stderr)
        return 2
    wanted = table()
    if not argv:
        print(wanted)
        return 0
    mode, file = argv[0], Path(argv[1])
    text = file.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"error: {file} has no lines {BEGIN!r} and {END!r}", file=sys.stderr)
        return 2
    new = f"{before}{BEGIN}\n\n{wanted}\n\n{END}{after}"
    if mode == "--check":
        if new != text:
            print(f"error: the table in {file} is not that of docs/systems.json: run `make systems`", file=sys.stderr)
        return int(new != text)
    print(wanted)
    file.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
