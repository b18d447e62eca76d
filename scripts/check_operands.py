#!/usr/bin/env python3
"""Looks for registers that are written while a product of a warpgroup still reads them.

    scripts/check_operands.py OBJECT...
    scripts/check_operands.py --self-test

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
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")  # not one with a predicate, by match()
COMMIT = re.compile(r"HGMMA\S* .*\bgsb0\b")
BRANCH = re.compile(r"\bBRA\S* .*?(0x[0-9a-f]+)$")
ALWAYS_BRANCH = re.compile(r"BRA(\.U)? 0x[0-9a-f]+$")
UNKNOWN_FLOW = re.compile(r"(@\S+ )?(CALL|RET|BRX|JMP|JMX)\b")
WRITES_NO_REGISTER = ("WARPSYNC", "NANOSLEEP", "USETMAXREG", "R2UR", "R2P", "BAR", "BSSY", "BSYNC", "DEPBAR")
MOST_GROUPS = 8  # that a wait tells apart


def functions(dump):
    """name -> [(address, instruction)]"""
    found, code = {}, []
    for line in dump.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            code = found.setdefault(match[1], [])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", line):
            if code and int(match[1], 16) <= code[-1][0]:
                sys.exit("a function is there twice: give the objects one by one, for one architecture each")
            code.append((int(match[1], 16), match[2]))
    return found


def width(name):
    """How many registers an instruction writes from its first on."""
    if name.startswith("HGMMA"):
        return int(re.match(r"HGMMA\.64x(\d+)x", name)[1]) // 2
    if ".128" in name or name.startswith(("HMMA", "IMMA", "QMMA")) or re.match(r"LDSM.*\.4", name):
        return 4
    if ".64" in name or "WIDE" in name or name.startswith(("CS2R", "DADD", "DMUL", "DFMA")) or "F64" in name:
        return 2
    return 2 if re.match(r"LDSM.*\.2", name) else 1


def written(instruction):
    """The registers that an instruction writes."""
    name, _, operands = re.sub(r"^@!?U?P\w+\s+", "", instruction).partition(" ")
    if name.startswith(WRITES_NO_REGISTER):
        return set()
    for operand in operands.split(",")[:2]:  # a predicate may come first
        if match := re.match(r"\s*R(\d+)\b", operand):
            return set(range(int(match[1]), int(match[1]) + width(name)))
        if not re.match(r"\s*U?P", operand):
            break
    return set()


def overwritten(code, start):
    """The instructions that write what the product code[start] reads, before it is waited for."""
    place = {address: i for i, (address, _) in enumerate(code)}
    first = int(PRODUCT.search(code[start][1])[1])
    operands = set(range(first, first + 4))
    # Where a path is, and how many groups were committed since that of the product; -1: nor was that.
    paths, seen, found = [(start + 1, 0 if COMMIT.match(code[start][1]) else -1)], set(), []
    while paths:
        i, groups = paths.pop()
        while i < len(code) and (i, groups) not in seen:
            seen.add((i, groups))
            address, text = code[i]
            if UNKNOWN_FLOW.match(text):
                sys.exit(f"{text} at {address:#x}: where it leads is not known")
            wait = WAIT.match(text)
            if wait and groups >= int(wait[1], 16):
                break
            if operands & written(text):
                found.append(code[i])
                break
            if COMMIT.match(text):
                groups = min(groups + 1, MOST_GROUPS)
            if branch := BRANCH.search(text):
                paths.append((place[int(branch[1], 16)], groups))
            if ALWAYS_BRANCH.match(text) or text.startswith("EXIT"):
                break
            i += 1
    return found


def check(dump, path):
    """The number of products, and a line for each that is overwritten."""
    products, lines = 0, []
    for name, code in functions(dump).items():
        for start, (address, text) in enumerate(code):
            if not PRODUCT.search(text):
                continue
            products += 1
            for where, what in overwritten(code, start):
                lines.append(f"{path}: {name}: {what} at {where:#x} while the product at {address:#x} reads it")
    return products, lines


def self_test():
    product = "HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24, gsb0"
    other = "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], R88, gsb0"
    cases = [  # what follows a product, and whether that writes what the product reads
        (["WARPGROUP.DEPBAR.LE gsb0, 0x0", "FMUL R120, R1, R2"], False),
        (["FMUL R123, R1, R2", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], True),
        (["FMUL R124, R120, R2", "STS.128 [R120+0x10], R120", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], False),
        (["LDS.128 R118, [R7+UR7+0x36c00]", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], True),
        (["LDSM.16.M88.4 R117, [R7]", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], True),
        (["ISETP.GE.AND P0, PT, R120, R1, PT", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], False),
        ([other, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R120, R1"], False),
        ([other, other, "WARPGROUP.DEPBAR.LE gsb0, 0x3", "MOV R120, R1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], True),
        (["@P0 BRA 0x0040", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT", "MOV R120, R1"], True),
        (["BRA 0x0040", "MOV R120, R1", "EXIT", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], False),
        (["BRA P0, 0x0040", "MOV R120, R1", "EXIT", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], True),
        (["@P0 WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R120, R1"], True),
        ([other, "@P0 BRA 0x0010", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], False),
    ]
    for behind, expected in cases:
        code = [f"/*{0x10 * i:04x}*/ {text} ;" for i, text in enumerate([product] + behind)]
        products, lines = check("\n".join(["Function : test"] + code), "self-test")
        if products != 1 or bool(lines) != expected:
            sys.exit(f"self-test: {behind}: {lines}")
    print(f"self-test: {len(cases)} cases are as expected")


def main(objects):
    products, lines = 0, []
    for path in objects:
        dump = subprocess.run([CUOBJDUMP, "-sass", path], check=True, capture_output=True, text=True).stdout
        more_products, more_lines = check(dump, path)
        products, lines = products + more_products, lines + more_lines
    if products == 0:
        sys.exit("no product with an operand in registers: these objects, or this dump, are not what is expected")
    print("\n".join(lines + [f"{products} products, {len(lines)} overwritten"]))
    return 1 if lines else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--self-test"]:
        self_test()
    elif len(sys.argv) == 1 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    else:
        sys.exit(main(sys.argv[1:]))
