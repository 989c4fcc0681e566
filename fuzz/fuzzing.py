"""What the fuzz_*.py scripts share: atheris, a corpus that starts with seeds, a dictionary, and a time to stop.

    python fuzz/fuzz_sse.py [--seconds N] [options of libFuzzer]

Inputs of interest are kept in .fuzz/corpus/TARGET and used again; an input that breaks a promise is saved as
.fuzz/TARGET-crash-..., to be tried with `python fuzz/targets.py FILE` and to be kept in tests/fuzz/test_parsers.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import atheris
except ImportError:
    sys.exit("fuzzing needs atheris, which has wheels for Linux: pip install atheris")

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".fuzz"
MAX_BYTES = 65_536
# Instrumented code takes several times as long, and the machine may be shared.
SLACK = 8.0
MEMORY_EVERY = 64

sys.path.insert(0, str(ROOT))
with atheris.instrument_imports(include=["gorouter_trio"]):
    import targets


def try_input(name: str, data: bytes) -> None:
    """Hold one input to what its target promises; memory, which is slow to measure, for long ones and now and then."""
    measured = len(data) >= 4_096 or sum(data[:8]) % MEMORY_EVERY == 0
    targets.run(targets.TARGETS[name], data, slack=SLACK, measure_memory=measured)


def fuzz(name: str, test_one_input: Callable[[bytes], None]) -> None:
    """Fuzz until the time is over, and then exit with the status that libFuzzer gives."""
    parser = argparse.ArgumentParser(description=f"Fuzz the target {name}; other options go to libFuzzer.")
    parser.add_argument("--seconds", type=int, default=60, help="how long (default: 60; 0: until stopped)")
    options, others = parser.parse_known_args()
    corpus = WORK / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(targets.TARGETS[name].seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    dictionary = WORK / f"{name}.dict"
    dictionary.write_text("".join(f'"{_escape(word)}"\n' for word in targets.TARGETS[name].words))
    arguments = [
        f"-max_total_time={options.seconds}",
        f"-max_len={MAX_BYTES}",
        f"-dict={dictionary}",
        f"-artifact_prefix={WORK / name}-",
        "-timeout=10",
        "-print_final_stats=1",
        *others,
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *arguments], test_one_input)
    atheris.Fuzz()


def _escape(word: bytes) -> str:
    return "".join(chr(b) if b < 128 and chr(b).isalnum() else f"\\x{b:02x}" for b in word)
