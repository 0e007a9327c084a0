# The program that examples/evaluate warms once: what takes long, then the point at which it is frozen, then one line.
import sys
import decimal, fractions, json, math, re, statistics  # noqa: F401 (for those who write the lines)

primes = [n for n in range(2, 20000) if all(n % d for d in range(2, math.isqrt(n) + 1))]

with open("/dev/vmm", "w") as vmm:
    vmm.write("freeze\n")
# From here on in the original, and in every clone.
with open("/dev/vmm") as vmm:
    role, number, count, name = vmm.readline().split()

if role == "clone":
    try:
        print(eval(sys.stdin.readline()))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
else:
    sys.stdin.read()  # stays until examples/evaluate has no more use for it
