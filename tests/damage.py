"""Files with bytes changed at random, and bounds for who reads them."""

import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Numbers that a size, an offset or a length would rather not be.
EXTREME = [
    value.to_bytes(8, "little") for value in (0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Change bytes in one to three places."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(changed) + 1)
        end = min(len(changed), start + draw.choice([1, 1, 2, 4, 8, 100]))
        other = draw.randrange(len(changed) + 1)
        match draw.randrange(7):
            case 0:
                changed[start:end] = draw.randbytes(end - start)
            case 1:
                del changed[start:end]
            case 2:
                changed[start:start] = changed[other : other + end - start]
            case 3:
                changed[start : start + 8] = draw.choice(EXTREME)
            case 4:
                changed[start:end] = bytes(end - start)
            case 5:
                changed = changed[:start] or changed
            case 6:
                if start < len(changed):
                    changed[start] ^= 1 << draw.randrange(8)
    return bytes(changed)


@contextmanager
def bounded(seconds: int = 60, memory: int = 1 << 30) -> Iterator[None]:
    """Give the code inside so much time, after which the process ends, and so much more memory."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
