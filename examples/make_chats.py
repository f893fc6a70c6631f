"""Write conversations about sums, chats.jsonl, and the same ones with a right and a wrong last answer, pairs.jsonl and
held-out.jsonl: python make_chats.py [COUNT]"""

import json
import sys
from typing import Any

import numpy as np


def question(a: int, b: int) -> dict[str, str]:
    return {"role": "user", "content": f"What is {a} + {b}?"}


def answer(a: int, b: int, total: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"{a} + {b} = {total}."}


def write(file: str, rows: list[dict[str, Any]]) -> None:
    with open(file, "w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


random = np.random.default_rng(0)
chats, pairs = [], []
for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 2000):
    messages = []
    for a, b in random.integers(0, 10, (random.integers(1, 4), 2)):
        messages += [question(a, b), answer(a, b, a + b)]
    wrong = answer(a, b, a + b + random.choice([-1, 1, 2]))
    chats.append({"messages": messages})
    pairs.append({"chosen": messages, "rejected": [*messages[:-1], wrong]})
write("chats.jsonl", chats)
write("pairs.jsonl", pairs[100:])
write("held-out.jsonl", pairs[:100])
