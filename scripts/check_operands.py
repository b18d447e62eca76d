#!/usr/bin/env python3
"""Looks for registers that are written while a product of a warpgroup still reads them.

    scripts/check_operands.py OBJECT...

A wgmma with its first operand in registers reads them until it is waited for, but ptxas takes them to be free as soon as
it is issued. Whether it has put something else there only the machine code shows: here every path is followed from each
such product (HGMMA R, R, gdesc) to the wait that ends its group (WARPGROUP.DEPBAR). Needs cuobjdump, of the CUDA toolkit.
"""
import re
import shutil
import subprocess
import sys

CUOBJDUMP = shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump"
PRODUCT = re.compile(r"HGMMA\S* R\d+, R(\d+), gdesc")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
BRANCH = re.compile(r"\bBRA\S* .*?(0x[0-9a-f]+)")
# What has no register of its own to write: its first operand is an address, a barrier or a predicate.
WRITES_NOTHING = ("ST", "RED", "BAR", "SYNCS", "ARRIVES", "LDGSTS", "UTMA", "BRA", "BSSY", "BSYNC", "EXIT", "WARP",
                  "MEMBAR", "FENCE", "ERRBAR", "CCTL", "NOP", "DEPBAR", "USETMAXREG", "NANOSLEEP", "R2UR")


def functions(dump):
    """name -> [(address, instruction)]"""
    found, code = {}, []
    for line in dump.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            code = found.setdefault(match[1], [])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", line):
            code.append((int(match[1], 16), match[2]))
    return found


def written(instruction):
    """The registers that an instruction writes."""
    text = re.sub(r"^@!?U?P\w+\s+", "", instruction)
    name, _, operands = text.partition(" ")
    if name.startswith(WRITES_NOTHING):
        return set()
    for operand in operands.split(",")[:2]:  # a predicate may come first
        if match := re.match(r"\s*R(\d+)\b(?!\s*\])", operand):
            first = int(match[1])
            if name.startswith("HGMMA"):
                return set(range(first, first + int(re.match(r"HGMMA\.64x(\d+)x", name)[1]) // 2))
            width = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name or "CS2R" in name else 1
            return set(range(first, first + width))
        if not re.match(r"\s*U?P", operand):
            return set()
    return set()


def overwritten(code, start):
    """The instructions that write what the product code[start] reads, before it is waited for."""
    place = {address: i for i, (address, _) in enumerate(code)}
    first = int(PRODUCT.search(code[start][1])[1])
    operands = set(range(first, first + 4))
    # Where a path is, and how many groups were committed since that of the product; -1: nor was that.
    paths, seen, found = [(start + 1, 0 if "gsb0" in code[start][1] else -1)], set(), []
    while paths:
        i, groups = paths.pop()
        while i < len(code) and (i, groups) not in seen:
            seen.add((i, groups))
            text = code[i][1]
            wait = WAIT.search(text)
            if wait and groups >= int(wait[1], 16):
                break
            if operands & written(text):
                found.append(code[i])
                break
            if "HGMMA" in text and "gsb0" in text:
                groups += 1
            if branch := BRANCH.search(text):
                target = place[int(branch[1], 16)]
                if not text.startswith("@") and ".DIV" not in text:
                    i = target
                    continue
                paths.append((target, groups))
            if re.match(r"EXIT", text):
                break
            i += 1
    return found


def main(objects):
    products = 0
    failed = False
    for path in objects:
        dump = subprocess.run([CUOBJDUMP, "-sass", path], check=True, capture_output=True, text=True).stdout
        for name, code in functions(dump).items():
            for start, (address, text) in enumerate(code):
                if not PRODUCT.search(text):
                    continue
                products += 1
                for where, what in overwritten(code, start):
                    failed = True
                    print(f"{path}: {name}: {what} at {where:#x} while the product at {address:#x} reads it")
    if products == 0:
        sys.exit("no product with an operand in registers: these objects, or this dump, are not what is expected")
    print(f"{products} products, " + ("some overwritten" if failed else "none overwritten"))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
