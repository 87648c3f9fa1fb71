"""PTX as a list of instructions."""

import re
from typing import Any, NamedTuple


class Instruction(NamedTuple):
    """One line: ``@!predicate parts operands``."""

    predicate: str | None
    negated: bool
    parts: list[str]
    """The name, split at its dots."""
    operands: list[Any]
    """Registers and numbers as they are written; lists of them for braces; (register, offset) for an address."""
    text: str


class Code:
    """The code of a kernel.

    Args:
        ptx: text with one entry.
        shared_bytes: the shared memory that it is launched with.

    """

    def __init__(self, ptx: str, shared_bytes: int) -> None:
        head, _, body = ptx.partition(".entry")[2].partition("{")
        self.name = head.partition("(")[0].strip()
        self.parameters = re.findall(r"\w+_param_\d+", head)
        self.warps = int(re.findall(r"ntid (\d+)", head)[0]) // 32
        self.shared_bytes = shared_bytes
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in body.splitlines():
            self._read(re.sub(r"//.*", "", line).strip())

    def _read(self, line: str) -> None:
        line = re.sub(r"^\{ \.reg \.b\d+ tmp; (.*;) \}$", r"\1", line)  # a register for one line
        if line.endswith(":"):
            self.labels[line[:-1]] = len(self.instructions)
        elif line.endswith(";") and not line.startswith("."):
            match = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*);", line)
            if match is None:
                raise NotImplementedError(line)
            negated, predicate, name, rest = match.groups()
            found = Instruction(predicate, bool(negated), name.split("."), _operands(rest), f"{self.name}: {line}")
            self.instructions.append(found)


def _operands(text: str) -> list[Any]:
    found: list[Any] = []
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", text):
        if part.startswith("{"):
            found.append([x.strip() for x in part[1:-1].split(",")])
        elif part.startswith("["):
            base, _, offset = part[1:-1].partition("+")
            found.append((base.strip(), int(offset or 0)))
        else:
            found.append(part)
    return found
